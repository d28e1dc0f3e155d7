"""THE training loop: :meth:`Trainer.train`. Everything else in this file serves it."""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from . import checkpoint, generate, initial, probe
from .api import ModelRunner
from .data.packing import IGNORE, Arrays, ValidationSet, mixtures
from .data.shards import Prepared
from .devices import Precision, peak_memory_mb, release_memory
from .errors import LmplayError, NotFiniteError
from .optimizers import Optimizers, factor
from .plan import Plan, Step
from .report import Report
from .restore import Restored
from .runs import RunFolder
from .stats import TRAIN, VALIDATE, Curve, Samples

LN2 = math.log(2)
FP16_SCALE = 2.0**16  # what the loss is multiplied with in fp16, so that small gradients do not vanish


@dataclass
class Place:
    """Where in its plan a run is: all that a resume needs besides tensors."""

    plan_step: int = 0  # which step of the plan
    index: int = 0  # optimizer steps done in it
    step_seconds: float = 0.0  # of training in it
    step: int = 0  # optimizer steps done in all
    tokens: int = 0
    seconds: float = 0.0  # of training: without validation, saving and preparing
    validated_at: int = -1  # tokens at the last validation


@dataclass(frozen=True)
class Options:
    """How a run is carried out. It changes rounding, and what dropout draws when compiled; nothing else."""

    compile_model: bool = False
    save_minutes: float = 5.0


@dataclass(frozen=True)
class Start:
    """Where a run's weights begin, and which of them it trains."""

    initial: Restored | None = None
    freeze: tuple[str, ...] = ()
    train_only: tuple[str, ...] = ()


class Stopped(Exception):
    """A signal asked to stop; the run was saved. `status` is the exit status."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.status = 128 + signum


class Trainer:
    """One run of one experiment on one plan; of each batch this process takes the share of (rank, world)."""

    def __init__(
        self, plan: Plan, prepared: Prepared, runner: ModelRunner, seed: int, device: torch.device,
        precision: Precision, run: RunFolder, report: Report, options: Options, start: Start | None = None,
        rank: int = 0, world: int = 1,
    ):  # fmt: skip
        self.plan, self.prepared, self.runner, self.seed = plan, prepared, runner, seed
        self.device, self.precision, self.run, self.report, self.options = (
            device,
            precision,
            run,
            report,
            options,
        )
        self.rank, self.world = rank, world
        self.length = runner.config.max_len
        self.batch_size = plan.batch.batch_size
        self.streams = mixtures(plan, prepared, self.length)
        self.validation = ValidationSet(plan, prepared, self.length)
        self.token_bytes = prepared.tokenizer.token_bytes
        self.start = start or Start()
        self.model = probe.build_model(runner, seed).to(device)
        frozen = initial.freeze(self.model, self.start.freeze, self.start.train_only)
        if frozen:
            total = sum(1 for _ in self.model.parameters())
            report.note(f"frozen: {len(frozen)} of {total} tensors ({', '.join(frozen[:4])}, ...)")
        self.trained: nn.Module = self.model
        if options.compile_model:
            self.trained = torch.compile(self.model)  # type: ignore[assignment]
        self.place = Place()
        self.optimizers = self._make_optimizers()
        self.loss_scale = FP16_SCALE if precision.scale else 1.0
        self.flops_per_token = 0.0
        self.mini_batch_size = 1
        self.train_curve = Curve(run.path / "train.csv", TRAIN)
        self.validate_curve = Curve(run.path / "validate.csv", VALIDATE)
        self.samples = Samples(run.path / "samples.jsonl")
        self.rates: deque[float] = deque(maxlen=20)  # tokens per second of the last steps
        self.stop_signal: int | None = None
        self.last_saved = time.monotonic()
        self.last_checkpoint = "none yet"
        self.saved_place: Place | None = None
        torch.manual_seed(probe.seed_of(seed, "training"))

    # ---------------------------------------------------------------- the loop

    def train(self) -> dict[str, Any]:
        """Train from where the run is to the plan's end; returns the summary.

        Raises:
            Stopped: a signal asked to; everything is saved.
            NotFiniteError: a loss or gradient is not finite; the update was not made. Or that of the validation is.
        """
        with self._signals():
            if self.place.validated_at < 0:
                self.validate()
            while self.place.plan_step < len(self.plan.steps):
                began = time.perf_counter()
                arrays = self.streams[self.place.plan_step].batch(
                    self.place.index, self.batch_size, self.rank, self.world
                )
                lr = self.optimizers.set_factor(factor(self.plan.schedule_of(self.current), self.progress(ahead=True)))
                sums = self.accumulate(arrays)
                norm = float(self.optimizers.prepare(self.plan.batch.grad_clip, self.loss_scale))
                if self.may_update(sums["loss"], norm):
                    self.optimizers.step()
                self.optimizers.zero_grad()
                self.record(arrays, sums, norm, lr, time.perf_counter() - began)
                if self.progress() >= 1:
                    self.next_plan_step()
                if self.due():
                    self.validate()
                minutes = (time.monotonic() - self.last_saved) / 60
                if minutes >= self.options.save_minutes or self.stop_signal is not None:
                    self.save()
                if self.stop_signal is not None:
                    raise Stopped(self.stop_signal)
            self.save()
        return self.summary()

    def accumulate(self, arrays: Arrays) -> dict[str, float]:
        """Forward and backward over a batch in mini-batches; gradients are of the mean over *all* its tokens.

        Returns the sums over the batch: loss in nats, hits, and the experiment's own curves as means.
        """
        total = max(1, self.global_sum(arrays.n_tokens))
        size, mini = len(arrays.ids), self.mini_batch_size
        loss = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        extra: dict[str, torch.Tensor] = {}
        with self.runner.fixed_weights(self.model):
            for start in range(0, size, mini):
                part = slice(start, min(start + mini, size))
                batch = probe.to_batch(arrays, part, self.device)
                with probe.autocast(self.device, self.precision):
                    out = self.runner.step(self.trained, batch)
                objective = out.loss_sum / total
                weight = (part.stop - part.start) / self.batch_size
                if out.aux_loss is not None:
                    objective = objective + out.aux_loss * weight
                (objective * self.loss_scale).backward()
                self.optimizers.compact()
                loss += out.loss_sum.detach()
                correct += out.n_correct
                for name, value in out.log.items():
                    if name in (*TRAIN, "correct") or not name.isidentifier():
                        raise LmplayError(f"StepOut.log: {name!r} cannot be a new column of train.csv; rename it")
                    extra[name] = extra.get(name, torch.zeros((), device=self.device)) + value.detach() * weight
        return {"loss": float(loss), "correct": float(correct), **{k: float(v) for k, v in extra.items()}}

    def may_update(self, loss: float, norm: float) -> bool:
        """Whether the gradients can be used.

        False where the loss scale of fp16 was too large for its range: it is halved, and nothing is wrong.

        Raises:
            NotFiniteError: loss or gradient is not finite.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            return True
        if math.isfinite(loss) and self.loss_scale > 1:
            self.loss_scale /= 2
            return False
        p = self.place
        what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        first = p.index * self.batch_size
        raise NotFiniteError(
            f"step {p.step + 1} (plan step {self.current.step_name}, sequences {first} to "
            f"{first + self.batch_size - 1}): {what}; nothing was updated. The last good checkpoint is "
            f"{self.last_checkpoint}. A lower learning rate or grad_clip in the plan are the usual cures."
        )

    # ---------------------------------------------------------------- where we are

    @property
    def current(self) -> Step:
        return self.plan.steps[self.place.plan_step]

    def max_steps(self) -> float:
        """Optimizer steps that the current plan step's budgets allow; infinite where minutes alone count."""
        step, stream = self.current, self.streams[self.place.plan_step]
        limits = [float(step.steps)] if step.steps else []
        if step.tokens:
            limits.append(math.ceil(step.tokens / (self.batch_size * self.length)))
        epochs = step.epochs if step.epochs or limits or step.minutes else 1.0
        if epochs:
            limits.append(max(1, int(epochs * stream.sequences) // self.batch_size))
        return min(limits, default=math.inf)

    def progress(self, ahead: bool = False) -> float:
        """How much of the plan step's budget is used, by whichever budget is nearest to its end.

        `ahead` counts the step that is about to be made: the schedule then ends exactly at 1.
        """
        by_steps = (self.place.index + ahead) / self.max_steps()
        minutes = self.current.minutes
        by_time = self.place.step_seconds / (60 * minutes) if minutes else 0.0
        return min(1.0, max(by_steps, by_time, 1e-9))

    def seconds_left(self) -> float:
        """Of training in this plan step, at the rate of the last steps."""
        minutes = self.current.minutes
        by_time = 60 * minutes - self.place.step_seconds if minutes else math.inf
        per_step = self.batch_size * self.length / statistics.median(self.rates)
        return max(0.0, min(by_time, (self.max_steps() - self.place.index) * per_step))

    def next_plan_step(self) -> None:
        p = self.place
        before = self.plan.optimizer_of(self.current)
        p.plan_step, p.index, p.step_seconds = p.plan_step + 1, 0, 0.0
        if p.plan_step < len(self.plan.steps):
            self.report.note(f"plan step {self.current.step_name} begins")
            after = self.plan.optimizer_of(self.current)
            if after == before.model_copy(update={"lr": after.lr, "other_lr": after.other_lr}):
                self.optimizers.change_rates(after)  # its state goes on
            else:
                self.report.note(f"a new optimizer begins: {after.name}")
                self.optimizers = self._make_optimizers()

    def due(self) -> bool:
        """Validation is due every so many tokens, and at the end."""
        p, every = self.place, self.plan.validation.every_tokens
        at_end = p.plan_step == len(self.plan.steps)
        return p.validated_at != p.tokens and (at_end or p.tokens // every > max(0, p.validated_at) // every)

    # ---------------------------------------------------------------- what is written down

    def record(self, arrays: Arrays, sums: dict[str, float], norm: float, lr: float, seconds: float) -> None:
        p = self.place
        n = self.global_sum(arrays.n_tokens)
        processed = self.batch_size * self.length
        p.index += 1
        p.step += 1
        p.tokens += processed
        p.seconds += seconds
        p.step_seconds += seconds
        self.rates.append(processed / seconds)
        extra = {k: v for k, v in sums.items() if k not in ("loss", "correct")}
        row = {
            **self._axes(),
            **self._quality(sums["loss"], sums["correct"], n, self._bytes(arrays)),
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": processed / seconds,
            **extra,
        }
        self.train_curve.append(row)
        self.report.step(row, self.progress(), self.seconds_left(), peak_memory_mb(self.device))

    def validate(self) -> None:
        """Loss, bits per byte and accuracy on the whole validation set, and a sample of text."""
        self.model.eval()
        loss, correct, n, size = 0.0, 0.0, 0, 0
        with (
            torch.no_grad(),
            probe.autocast(self.device, self.precision),
            self.runner.fixed_weights(self.model),
        ):
            for arrays in self.validation.batches(self.mini_batch_size):
                out = self.runner.step(self.model, probe.to_batch(arrays, slice(None), self.device))
                loss += float(out.loss_sum)
                correct += float(out.n_correct)
                n += arrays.n_tokens
                size += self._bytes(arrays)
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"step {self.place.step}: the validation loss is {loss}. The last good checkpoint is "
                f"{self.last_checkpoint}. A lower learning rate or grad_clip in the plan are the usual cures."
            )
        sample = self.sample()
        self.model.train()
        self.place.validated_at = self.place.tokens
        row = {**self._axes(), **self._quality(loss, correct, n, size)}
        self.validate_curve.append(row)
        self.samples.append(self.place.tokens, sample)
        self.report.validated(row, sample)

    def sample(self, new_tokens: int = 40) -> str:
        """Text from the model as it is now; draws from a generator of its own."""
        tokenizer = self.prepared.tokenizer
        prompt = self.plan.validation.sample_prompt
        try:
            ids = tokenizer.encode(prompt)
        except LmplayError:  # a character tokenizer may not have the prompt's characters
            prompt, ids = "", [tokenizer.eot]
        stream = generate.generate(
            self.runner, self.model, ids, new_tokens, self.runner.window(), tokenizer.vocab_size,
            generate.Sampling(temperature=0.8, top_k=50), seed=self.seed, eot=tokenizer.eot,
        )  # fmt: skip
        return prompt + tokenizer.decode([tokens[0] for tokens in stream])

    def _axes(self) -> dict[str, float]:
        p = self.place
        return {
            "step": p.step,
            "tokens": p.tokens,
            "flops": p.tokens * self.flops_per_token,
            "seconds": p.seconds,
        }

    def _quality(self, loss: float, correct: float, n: int, size: int) -> dict[str, float]:
        """From sums to nats per token, bits per byte and the share of hits."""
        return {"loss": loss / max(1, n), "bpb": loss / LN2 / max(1, size), "accuracy": correct / max(1, n)}

    def _bytes(self, arrays: Arrays) -> int:
        """Bytes of text that the counted targets stand for."""
        return int(np.sum(self.token_bytes[arrays.targets[arrays.targets != IGNORE]]))

    def summary(self) -> dict[str, Any]:
        """The final figures, under the names that a grep finds."""
        from .compare import read_curve  # pandas is needed at the end only

        last = read_curve(self.validate_curve.path).iloc[-1]
        parameters, extra = probe.parameter_counts(self.runner, self.model)
        p = self.place
        return {
            "val_bpb": float(last["bpb"]),
            "val_loss": float(last["loss"]),
            "val_accuracy": float(last["accuracy"]),
            "tokens": p.tokens,
            "steps": p.step,
            "seconds": round(p.seconds, 1),
            "tokens_per_second": round(p.tokens / p.seconds, 1),
            "parameters": parameters,
            "training_only_parameters": extra,
            "peak_memory_mb": round(peak_memory_mb(self.device)),
        }

    # ---------------------------------------------------------------- before the first step

    def prepare(self, mini_batch_size: int | None, known: dict[str, Any]) -> dict[str, Any]:
        """Measure what the run keeps: FLOPs per token, and the mini-batch size where none is asked for.

        `known` holds what an earlier start of this run measured; it is used again.
        """
        arrays = self.streams[0].batch(0, self.batch_size, self.rank, self.world)
        self.model.train()
        kept = known.get("mini_batch_size")
        self.mini_batch_size = mini_batch_size or kept or 0
        if kept and mini_batch_size and kept != mini_batch_size:
            self.report.note(
                f"mini-batch {mini_batch_size} instead of {kept}: equal but for rounding and dropout's draws"
            )
        if not self.mini_batch_size:
            self.report.note("looking for the fastest mini-batch size ...")

            def trial(size: int) -> None:
                with probe.autocast(self.device, self.precision):
                    out = self.runner.step(self.trained, probe.to_batch(arrays, slice(0, size), self.device))
                out.loss_sum.backward()

            with self.runner.fixed_weights(self.model):  # their cost is the same for every size
                self.mini_batch_size = probe.find_mini_batch(
                    trial, self.model, self.device, len(arrays.ids), self.length
                )
            self.model.zero_grad(set_to_none=True)
            release_memory()
            self.report.note(f"mini-batch size {self.mini_batch_size} of {self.batch_size} is the fastest here")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # the larger sizes that were tried are not the run's
        if "flops_per_token" in known:
            self.flops_per_token = float(known["flops_per_token"])
        else:  # at the mini-batch's size: what is shared by a mini-batch, as UE's distinct tokens, counts so
            with probe.autocast(self.device, self.precision):
                some = probe.to_batch(arrays, slice(0, self.mini_batch_size), self.device)
                passes = math.ceil(self.batch_size / self.mini_batch_size)
                self.flops_per_token = probe.count_flops(self.runner, self.model, some, passes)
        return {"flops_per_token": self.flops_per_token, "mini_batch_size": self.mini_batch_size}

    def _make_optimizers(self) -> Optimizers:
        spec = self.plan.optimizer_of(self.current)
        made = Optimizers(spec, self.runner.param_groups(self.model), self.model)
        for note in made.notes:
            self.report.note(note)
        return made

    # ---------------------------------------------------------------- saving and stopping

    def save(self) -> None:
        """Write a checkpoint of everything that a resume needs, unless this very place is saved."""
        if self.place == self.saved_place:
            return
        written = {"train": self.train_curve, "validate": self.validate_curve, "samples": self.samples}
        for lines in written.values():
            lines.sync()
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        tensors = {
            "model": checkpoint.model_tensors(self.model),
            "optimizer": self.optimizers.state_tensors(),
            "rng": rng,
        }
        state = {
            "place": asdict(self.place),
            **{f"{name}_bytes": lines.size for name, lines in written.items()},
            "loss_scale": self.loss_scale,
        }
        path = checkpoint.save(self.run.checkpoints, self.place.step, tensors, state)
        self.last_checkpoint = str(path)
        self.last_saved = time.monotonic()
        self.saved_place = replace(self.place)

    def resume(self) -> bool:
        """Go on from the newest checkpoint that verifies; where there is none, start, and return False.

        Curves are cut back to the checkpoint, so that no row is doubled or missing.
        """
        found = self.run.newest(self.report.note)
        if found is None:
            self.train_curve.cut(0)
            self.validate_curve.cut(0)
            self.samples.cut(0)
            if self.start.initial is not None:
                initial.adopt(self.runner, self.model, self.start.initial, self.report.note)
                self.start = replace(self.start, initial=None)  # its memory is not needed any more
            return False
        self.place = Place(**found.state["place"])
        if self.place.plan_step < len(self.plan.steps):
            self.optimizers = self._make_optimizers()
            self.optimizers.load_state_tensors(found.tensors("optimizer"))
        checkpoint.load_model_tensors(self.model, found.tensors("model"), found.path)
        rng = found.tensors("rng")
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.device)
        self.loss_scale = found.state["loss_scale"]
        self.train_curve.cut(found.state["train_bytes"])
        self.validate_curve.cut(found.state["validate_bytes"])
        self.samples.cut(found.state.get("samples_bytes", 0))  # older runs kept none
        self.last_checkpoint = str(found.path)
        self.saved_place = replace(self.place)
        return True

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM lets the step finish and saves; a second Ctrl-C stops at once."""

        def ask(signum: int, frame: FrameType | None) -> None:
            if self.stop_signal is None:
                self.stop_signal = signum
                self.report.note("stopping after this step ...")
            elif signum == signal.SIGINT:  # not SIGTERM: a parent may pass on the Ctrl-C that was heard here as well
                raise KeyboardInterrupt

        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def global_sum(self, count: int) -> int:
        """A count summed over all processes; with one process it is the count."""
        if self.world == 1:
            return count
        total = torch.tensor(count, device=self.device)
        torch.distributed.all_reduce(total)
        return int(total)
