"""The training loop: :meth:`Trainer.train` and :meth:`Trainer.train_step`.

One module, because a change to the loop, to its state or to the content of checkpoints needs a
change to the others.
"""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import adapt, decoding
from ..api import ModelRunner, StepOut
from ..classification import report
from ..data.packing import Arrays, ValidationSet
from ..data.prepare import Prepared
from ..data.stages import stages
from ..data.windows import Windows
from ..devices import Precision, check_compiler, peak_memory_mb, release_memory
from ..errors import LmplayError, NotFiniteError
from ..model import (
    autocast,
    build_model,
    count_flops,
    find_mini_batch,
    parameter_counts,
    seed_of,
    to_batch,
    undisturbed,
)
from ..ops import IGNORE
from ..plan import Plan, PlanStage
from ..threads import Share
from . import checkpoint, stream, warm_start
from .curves import (
    TRAIN,
    VALIDATE,
    AppendOnlyFile,
    CurveFile,
    Samples,
    check_digest,
    read_curve,
    write_digests,
)
from .optimizers import Optimizers, lr_multiplier
from .progress import Reporter
from .record import check_state
from .run_folder import RunFolder

LN2 = math.log(2)
ONE_THREAD_FLOPS = 2e7
"""Of a mini-batch. Below it more threads only wait for each other, and with one thread a run's
rounding is the same whatever else the machine does."""
FP16_SCALE = 2.0**16  # first scale of the loss in fp16; the GradScaler adapts it


@dataclass
class TrainState:
    """Position of a run in its plan: all that a resume needs besides tensors.

    The names are those of existing checkpoints.
    """

    plan_step: int = 0  # index of the stage
    index: int = 0  # optimizer steps in the stage
    step_seconds: float = 0.0  # training time in the stage
    step: int = 0  # optimizer steps in the run
    tokens: int = 0  # processed, whether they count in the loss or not
    seconds: float = 0.0  # training time, without validation, saving and preparation
    validated_at: int = -1  # tokens at the last validation; -1 before the first


@dataclass(frozen=True)
class Options:
    """How a run is executed. Nothing here changes a result but by rounding and dropout's draws."""

    compile_model: bool = False
    save_minutes: float = 5.0
    # adapts torch's threads while other processes train; None: the threads stay as they are
    share: Share | None = None
    until: float | None = None  # seconds since 1970, when the run is stopped as by SIGTERM


@dataclass(frozen=True)
class Start:
    """Where a run's weights come from, and which of them it trains."""

    initial: warm_start.InitialWeights | None = None
    freeze: tuple[str, ...] = ()
    train_only: tuple[str, ...] = ()


class Stopped(Exception):
    """A signal stopped the run, which was saved. `status` is the exit status."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.status = 128 + signum


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured.

    loss_sum (nats) and n_correct are sums over its counted tokens; log holds the experiment's own
    curves as means; grad_norm is the norm before clipping.
    """

    loss_sum: float
    n_correct: float
    log: dict[str, float]
    grad_norm: float


class Trainer:
    """One run of one experiment on one plan.

    Process `rank` of `world` processes reads its share of each batch. The loss is divided by the
    tokens of all processes, so whoever starts several must add up their gradients (DDP averages
    them), losses and counts. No command does.

    Args:
        prepared: the plan's tokenizer and tokens.
        run: the folder that the run writes to.
        start: where the weights come from. Default: the experiment's initialization.
    """

    def __init__(
        self,
        plan: Plan,
        prepared: Prepared,
        runner: ModelRunner,
        seed: int,
        device: torch.device,
        precision: Precision,
        run: RunFolder,
        reporter: Reporter,
        options: Options,
        start: Start | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        self.plan = plan
        self.prepared = prepared
        self.runner = runner
        self.seed = seed
        self.device = device
        self.precision = precision
        self.run = run
        self.reporter = reporter
        self.options = options
        self.rank = rank
        self.world = world
        self.length = runner.config.max_len
        self.batch_size = plan.batch.batch_size
        self.stages = stages(plan, prepared, self.length)
        self.validation = ValidationSet(plan, prepared, self.length)
        self.token_bytes = prepared.tokenizer.token_bytes
        self.has_label_head = plan.classify is not None and plan.classify.label_as == "head"
        self.start = start or Start()
        self.model = build_model(runner, seed).to(device)
        frozen = warm_start.freeze(self.model, self.start.freeze, self.start.train_only)
        if frozen:
            total = sum(1 for _ in self.model.parameters())
            names = ", ".join(frozen[:4])
            reporter.note(f"frozen: {len(frozen)} of {total} tensors ({names}, ...)")
        self.compiled_model: nn.Module = self.model
        if options.compile_model:
            check_compiler(device)
            self.compiled_model = torch.compile(self.model)  # type: ignore[assignment]
        self.state = TrainState()
        self.optimizers = self._make_optimizers()
        self.scaler = (
            torch.amp.GradScaler(device.type, init_scale=FP16_SCALE) if precision.scale else None
        )
        self.flops_per_token = 0.0
        self.mini_batch_size = 1
        self.train_curve = CurveFile(run.path / "train.csv", TRAIN)
        self.validate_curve = CurveFile(run.path / "validate.csv", VALIDATE)
        self.samples = Samples(run.path / "samples.jsonl")
        self.stream_log = stream.StreamLog(run.path)
        self.throughput: deque[float] = deque(maxlen=20)  # tokens per second of the last steps
        self.stop_signal: int | None = None
        self.last_saved = time.monotonic()
        self.last_checkpoint = "none yet"
        self.saved_state: TrainState | None = None
        torch.manual_seed(seed_of(seed, "training"))

    # ---------------------------------------------------------------- the loop

    def train(self) -> dict[str, Any]:
        """Train to the end of the plan; return the summary.

        Raises:
            Stopped: a signal asked for it. Everything is saved.
            NotFiniteError: a training loss, a gradient or a validation loss is not finite.
        """
        with self._signals():
            if self.state.validated_at < 0:
                self.validate()
                self.save()  # before training, so that a folder that refuses fails now
            while self.state.plan_step < len(self.plan.steps):
                began = time.perf_counter()
                sequences = self.stages[self.state.plan_step]
                arrays = sequences.batch(self.state.index, self.batch_size, self.rank, self.world)
                schedule = self.plan.schedule_of(self.stage)
                lr = self.optimizers.set_lr(lr_multiplier(schedule, self.schedule_progress()))
                result = self.train_step(arrays)
                self.finish_step(arrays, result, lr, time.perf_counter() - began)
                if self.progress() >= 1:
                    self.next_stage()
                if self.should_validate():
                    self.validate()
                # Whoever read our output through a pipe is gone.
                if self.reporter.reader_gone and self.stop_signal is None:
                    self.stop_signal = signal.SIGPIPE
                if self.options.until is not None and time.time() >= self.options.until:
                    self.stop_signal = signal.SIGTERM
                minutes = (time.monotonic() - self.last_saved) / 60
                if minutes >= self.options.save_minutes or self.stop_signal is not None:
                    self.save()
                if self.stop_signal is not None:
                    raise Stopped(self.stop_signal)
            self.save()
        return self.summary()

    def train_step(self, arrays: Arrays) -> StepResult:
        """Run one optimizer step on a batch, in mini-batches, at the current learning rates.

        Raises:
            NotFiniteError: the loss or a gradient is not finite. No weight was updated.
        """
        loss_sum, n_correct, log = self.accumulate(arrays)
        clip = self.plan.batch.grad_clip
        norm = float(self.optimizers.unscale_and_clip(clip, self.scaler))
        if self.gradients_are_finite(loss_sum, norm):
            self.optimizers.step(self.scaler)
        if self.scaler is not None:
            self.scaler.update()
        self.optimizers.zero_grad()
        return StepResult(loss_sum, n_correct, log, norm)

    def accumulate(self, arrays: Arrays) -> tuple[float, float, dict[str, float]]:
        """Add up the gradients of the batch's mean loss, mini-batch by mini-batch.

        Returns:
            The loss as a sum over the counted tokens (nats), the number of correct predictions, and
            means of the experiment's own curves.
        """
        n_counted = max(1, self.global_sum(arrays.n_tokens))
        size = len(arrays.ids)
        loss = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        log: dict[str, Tensor] = {}
        with self.runner.fixed_weights(self.model):
            for start in range(0, size, self.mini_batch_size):
                part = slice(start, min(start + self.mini_batch_size, size))
                out = self.forward_backward(arrays, part, n_counted)
                self.optimizers.coalesce()  # or sparse gradients would grow with each mini-batch
                loss += out.loss_sum.detach()
                correct += out.n_correct
                weight = (part.stop - part.start) / self.batch_size  # a mean over sequences
                for name, value in out.log.items():
                    _check_log_name(name)
                    sum_so_far = log.get(name, torch.zeros((), device=self.device))
                    log[name] = sum_so_far + value.detach() * weight
        return float(loss), float(correct), {k: float(v) for k, v in log.items()}

    def forward_backward(self, arrays: Arrays, part: slice, n_counted: int) -> StepOut:
        """Run one mini-batch: the sequences `part` of a batch with `n_counted` counted tokens."""
        with autocast(self.device, self.precision):
            out = self.runner.step(self.compiled_model, to_batch(arrays, part, self.device))
        objective = out.loss_sum / n_counted
        if out.aux_loss is not None:  # a mean over sequences, not over tokens
            objective = objective + out.aux_loss * ((part.stop - part.start) / self.batch_size)
        (objective if self.scaler is None else self.scaler.scale(objective)).backward()
        return out

    def gradients_are_finite(self, loss: float, norm: float) -> bool:
        """Return whether the weights can be updated.

        False: only fp16's loss scale was too large. The GradScaler then lowers it.

        Raises:
            NotFiniteError: the loss or the gradient itself is not finite.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            return True
        # At a scale of 1 it is the gradient itself that overflows.
        if math.isfinite(loss) and self.scaler is not None and self.scaler.get_scale() > 1:
            return False
        state = self.state
        what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        first = state.index * self.batch_size
        last = first + self.batch_size - 1
        raise NotFiniteError(
            f"step {state.step + 1} (stage {self.stage.step_name}, its training sequences {first} "
            f"to {last}): {what}; nothing was updated. {self._remedy()}"
        )

    def _remedy(self) -> str:
        return (
            f"The last good checkpoint is {self.last_checkpoint}. "
            "Usual fixes: a lower learning rate, or grad_clip in the plan."
        )

    # ---------------------------------------------------------------- position in the plan

    @property
    def stage(self) -> PlanStage:
        return self.plan.steps[self.state.plan_step]

    def max_steps(self) -> float:
        """Return the optimizer steps that the stage's budgets allow; inf if only time limits it."""
        return self.stages[self.state.plan_step].steps(self.batch_size, self.length)

    @property
    def windows(self) -> Windows | None:
        """The windows of the stage, if it is a stream; also at the plan's end."""
        number = min(self.state.plan_step, len(self.stages) - 1)
        found = self.stages[number]
        return found if isinstance(found, Windows) else None

    def windows_trained(self) -> int | None:
        """Return how many windows the model was trained on, if it is now between two of them."""
        if self.windows is None:
            return None
        if self.state.plan_step == len(self.stages):
            return len(self.windows.windows)
        return self.windows.starting_at(self.state.index)

    def progress(self, ahead: bool = False) -> float:
        """Return which share of the stage is done, in (0, 1]. The budget that ends first counts.

        Args:
            ahead: include the step about to run, so that the last step has the schedule's end.
        """
        by_steps = (self.state.index + ahead) / self.max_steps()
        minutes = self.stage.minutes
        by_time = self.state.step_seconds / (60 * minutes) if minutes else 0.0
        return min(1.0, max(by_steps, by_time, 1e-9))

    def schedule_progress(self) -> float:
        """Return where the step about to run is in the learning rate's schedule, in (0, 1]."""
        if self.windows is None or self.plan.schedule_of(self.stage).per == "stage":
            return self.progress(ahead=True)
        window = self.windows.at(self.state.index)
        return (self.state.index - window.first_step + 1) / window.steps

    def seconds_left(self) -> float:
        """Return the remaining training time of the stage, at the speed of the last steps."""
        minutes = self.stage.minutes
        by_time = 60 * minutes - self.state.step_seconds if minutes else math.inf
        per_step = self.batch_size * self.length / statistics.median(self.throughput)
        return max(0.0, min(by_time, (self.max_steps() - self.state.index) * per_step))

    def next_stage(self) -> None:
        """Move to the next stage, with its learning rates or its own optimizer."""
        state = self.state
        before = self.plan.optimizer_of(self.stage)
        state.plan_step += 1
        state.index = 0
        state.step_seconds = 0.0
        if state.plan_step == len(self.plan.steps):
            return
        self.reporter.note(f"stage {self.stage.step_name} begins")
        after = self.plan.optimizer_of(self.stage)
        if type(after) is type(before) and after == before.with_rates_of(after):
            self.optimizers.change_rates(after)  # the optimizer's state continues
        else:
            self.reporter.note(f"a new optimizer begins: {after.name}")
            self.optimizers = self._make_optimizers()

    def should_validate(self) -> bool:
        """Return whether a validation is due: every `every_tokens` tokens, in a stream between two
        windows, and at the plan's end."""
        state = self.state
        if self.windows is not None:
            return self.windows_trained() is not None
        every = self.plan.validation.every_tokens
        at_end = state.plan_step == len(self.plan.steps)
        interval_ended = state.tokens // every > max(0, state.validated_at) // every
        return state.validated_at != state.tokens and (at_end or interval_ended)

    # ---------------------------------------------------------------- curves and validation

    def finish_step(self, arrays: Arrays, result: StepResult, lr: float, seconds: float) -> None:
        """Advance the state by one optimizer step and append its row to train.csv."""
        state = self.state
        n = self.global_sum(arrays.n_tokens)
        processed = self.batch_size * self.length
        state.index += 1
        state.step += 1
        state.tokens += processed
        state.seconds += seconds
        state.step_seconds += seconds
        self.throughput.append(processed / seconds)
        row = {
            **self._axes(),
            **self._quality(result.loss_sum, result.n_correct, n, self._bytes(arrays)),
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": processed / seconds,
            **result.log,
        }
        self.train_curve.append(row)
        if self.options.share is not None:
            self.options.share.adapt(self.reporter.note)
        self.reporter.step(row, self.progress(), self.seconds_left(), peak_memory_mb(self.device))

    def validate(self) -> None:
        """Measure the loss on the validation set, in a stream on its windows, and generate a sample
        of text."""
        self.model.eval()
        self.optimizers.switch("eval")
        trained = self.windows_trained()
        if self.windows is not None and trained is not None:
            n_bytes = 0
            loss, correct, n = self.stream_log.test(
                self.windows, trained, self.evaluate, self.mini_batch_size
            )
        else:
            batches = list(self.validation.batches(self.mini_batch_size))
            n_bytes = sum(map(self._bytes, batches))
            loss, correct, n = self.evaluate(batches)
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"step {self.state.step}: the validation loss is {loss}. {self._remedy()}"
            )
        sample = self.sample()
        self.model.train()
        self.optimizers.switch("train")
        self.state.validated_at = self.state.tokens
        row = {**self._axes(), **self._quality(loss, correct, n, n_bytes)}
        self.validate_curve.append(row)
        self.samples.append(self.state.tokens, sample)
        self.reporter.validated(row, sample)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Arrays]) -> tuple[float, float, int]:
        """Return the loss (a sum, nats), the correct predictions and the number of counted targets,
        with the model in evaluation mode."""
        loss = 0.0
        correct = 0.0
        n = 0
        precision = autocast(self.device, self.precision)
        with precision, self.runner.fixed_weights(self.model):
            for arrays in batches:
                out = self.runner.step(self.model, to_batch(arrays, slice(None), self.device))
                loss += float(out.loss_sum)
                correct += float(out.n_correct)
                n += arrays.n_tokens
        return loss, correct, n

    def classification(self) -> report.Report:
        """Return how the model classifies the held-out examples."""
        self.model.eval()
        self.optimizers.switch("eval")
        with autocast(self.device, self.precision):
            found = report.evaluate(
                self.plan, self.prepared, self.runner, self.model, self.validation
            )
        self.model.train()
        self.optimizers.switch("train")
        return found

    def sample(self, new_tokens: int = 40) -> str:
        """Return a text that the model generates at this step; "" if its head is for labels.

        It has a random generator of its own, so that it does not change the training run.
        """
        if self.has_label_head:
            return ""
        tokenizer = self.prepared.tokenizer
        prompt = self.plan.validation.sample_prompt
        try:
            ids = tokenizer.encode(prompt)
        except LmplayError:  # a character tokenizer may lack the prompt's characters
            prompt = ""
            ids = [tokenizer.eot]
        stream = decoding.generate(
            self.runner,
            self.model,
            ids,
            new_tokens,
            self.runner.window(),
            tokenizer.vocab_size,
            decoding.Sampling(temperature=0.8, top_k=50),
            seed=self.seed,
            eot=tokenizer.eot,
        )
        return prompt + tokenizer.decode([tokens[0] for tokens in stream])

    def _axes(self) -> dict[str, float]:
        return {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "flops": self.state.tokens * self.flops_per_token,
            "seconds": self.state.seconds,
        }

    def _quality(self, loss: float, correct: float, n: int, n_bytes: int) -> dict[str, float]:
        """Return nats per token, bits per byte and accuracy.

        Args:
            loss, correct: sums over n counted tokens, which are n_bytes bytes of text.
        """
        return {
            "loss": loss / max(1, n),
            "bpb": loss / LN2 / n_bytes if n_bytes else math.nan,
            "accuracy": correct / max(1, n),
        }

    def _bytes(self, arrays: Arrays) -> int:
        """Return the text bytes of the counted targets; labels of a head are no text."""
        if self.has_label_head:
            return 0
        return int(np.sum(self.token_bytes[arrays.targets[arrays.targets != IGNORE]]))

    def summary(self) -> dict[str, Any]:
        """Return the final figures under the names that the command prints."""
        last = read_curve(self.validate_curve.path).iloc[-1]
        parameters, training_only = parameter_counts(self.runner, self.model)
        state = self.state
        bar = self.plan.validation.solved
        solved = {} if bar is None else {"solved": float(last["accuracy"]) >= bar}
        streamed = {} if self.windows is None else stream.record_of(self.stream_log.rows())
        bpb = {} if math.isnan(last["bpb"]) else {"val_bpb": float(last["bpb"])}
        return {
            **bpb,
            "val_loss": float(last["loss"]),
            "val_accuracy": float(last["accuracy"]),
            **solved,
            **streamed,
            "tokens": state.tokens,
            "steps": state.step,
            "seconds": round(state.seconds, 1),
            "tokens_per_second": round(state.tokens / state.seconds, 1),
            "parameters": parameters,
            "training_only_parameters": training_only,
            "peak_memory_mb": round(peak_memory_mb(self.device)),
        }

    # ---------------------------------------------------------------- before the first step

    def set_up(self, mini_batch_size: int | None, known: dict[str, Any]) -> dict[str, Any]:
        """Measure FLOPs per token and, if none is given, the fastest mini-batch size.

        Args:
            known: the run.json of an earlier start. What it measured is used again.

        Returns:
            flops_per_token, mini_batch_size and threads, for run.json.
        """
        arrays = self.stages[0].batch(0, self.batch_size, self.rank, self.world)
        self.model.train()
        kept = known.get("mini_batch_size")
        self.mini_batch_size = mini_batch_size or kept or 0
        if kept and mini_batch_size and kept != mini_batch_size:
            self.reporter.note(
                f"mini-batch {mini_batch_size} instead of {kept}: only rounding and the draws of "
                "dropout change"
            )
        share = self.options.share
        if share is not None and "threads" in known:
            share.keep(known["threads"])
        if not self.mini_batch_size:
            self._find_mini_batch_size(arrays)
        if self.device.type == "cuda":
            # The larger sizes that were tried must not count as this run's peak.
            torch.cuda.reset_peak_memory_stats(self.device)
        if "flops_per_token" in known:
            self.flops_per_token = float(known["flops_per_token"])
        else:
            # Measured at the mini-batch's size: a mini-batch may share work among its sequences.
            with autocast(self.device, self.precision):
                batch = to_batch(arrays, slice(0, self.mini_batch_size), self.device)
                passes = math.ceil(self.batch_size / self.mini_batch_size)
                self.flops_per_token = count_flops(self.runner, self.model, batch, passes)
        self._check_adapters(arrays)
        flops = self.flops_per_token * self.mini_batch_size * self.length
        if share is not None and "threads" not in known and flops < ONE_THREAD_FLOPS:
            share.keep(1)
        return {
            "flops_per_token": self.flops_per_token,
            "mini_batch_size": self.mini_batch_size,
            "threads": torch.get_num_threads() if share is None else share.chosen,
        }

    def _check_adapters(self, arrays: Arrays) -> None:
        """Name the low-rank adapters that change nothing, because the model does not call their
        layers."""
        if self.plan.model.lora is None:
            return
        with undisturbed(self.model, self.device), self.runner.fixed_weights(self.model):
            self.forward_backward(arrays, slice(0, self.mini_batch_size), n_counted=1)
            idle = adapt.without_effect(self.model)
        if idle:
            names = ", ".join(idle[:4])
            self.reporter.note(
                f"adapters without effect: {len(idle)} ({names}, ...): the model uses the weights "
                "of these layers and does not call them"
            )

    def _find_mini_batch_size(self, arrays: Arrays) -> None:
        self.reporter.note("looking for the fastest mini-batch size ...")

        def try_size(n_sequences: int) -> None:
            self.forward_backward(arrays, slice(0, n_sequences), n_counted=1)

        # What is computed from weights alone costs the same at every size, so it is not timed.
        with undisturbed(self.model, self.device), self.runner.fixed_weights(self.model):
            self.mini_batch_size = find_mini_batch(
                try_size, self.model, self.device, len(arrays.ids), self.length
            )
            if self.options.share is not None and self.device.type == "cpu":
                self.options.share.choose(lambda: self._speed(try_size))
        release_memory()
        threads = torch.get_num_threads()
        with_threads = ""
        if self.device.type == "cpu":
            with_threads = f" ({threads} thread{'s' if threads > 1 else ''})"
        self.reporter.note(
            f"mini-batch size {self.mini_batch_size} of {self.batch_size} is the fastest here"
            f"{with_threads}"
        )

    def _speed(self, try_size: Callable[[int], None], repeats: int = 5) -> float:
        """Return mini-batches per second, of the fastest of a few."""
        try_size(self.mini_batch_size)  # warm-up
        times = []
        for _ in range(repeats):
            self.model.zero_grad(set_to_none=True)
            began = time.perf_counter()
            try_size(self.mini_batch_size)
            times.append(time.perf_counter() - began)
        return 1 / min(times)

    def _make_optimizers(self) -> Optimizers:
        spec = self.plan.optimizer_of(self.stage)
        groups = self.runner.param_groups(self.model)
        optimizers = Optimizers(spec, groups, self.model, self.runner.make_optimizer)
        for note in optimizers.notes:
            self.reporter.note(note)
        return optimizers

    # ---------------------------------------------------------------- saving and stopping

    def save(self) -> None:
        """Write a checkpoint, unless this state is already saved."""
        if self.state == self.saved_state:
            return
        logs: dict[str, AppendOnlyFile] = {
            "train": self.train_curve,
            "validate": self.validate_curve,
            "samples": self.samples,
        }
        if self.windows is not None:
            logs["windows"] = self.stream_log.file
        for log in logs.values():
            log.sync()
        write_digests({log.path: log.size for log in logs.values()})
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        self.optimizers.switch("eval")
        tensors = {
            "model": checkpoint.model_tensors(self.model),
            "optimizer": self.optimizers.state_tensors(),
            "rng": rng,
        }
        state = {
            "place": asdict(self.state),  # a key that older checkpoints have, too
            **{f"{name}_bytes": log.size for name, log in logs.items()},
            "grad_scaler": {} if self.scaler is None else self.scaler.state_dict(),
        }
        path = checkpoint.save(self.run.checkpoints, self.state.step, tensors, state)
        self.optimizers.switch("train")
        self.last_checkpoint = str(path)
        self.last_saved = time.monotonic()
        self.saved_state = replace(self.state)

    def resume(self) -> bool:
        """Continue from the newest valid checkpoint.

        Curves are cut back to the checkpoint, so that no row is doubled or missing.

        Returns:
            False if there is no checkpoint. The curves are then empty, and the weights those of the
            initial model, if one was given.
        """
        found = self.run.newest(self.reporter.note, check_state)
        if found is None:
            self._truncate_logs(0, 0, 0, 0)
            if self.start.initial is not None:
                source = self.start.initial
                warm_start.warm_start(self.runner, self.model, source, self.reporter.note)
                self.start = replace(self.start, initial=None)  # frees its memory
            return False
        self.state = TrainState(**found.state["place"])
        if self.state.plan_step < len(self.plan.steps):
            self.optimizers = self._make_optimizers()
            self.optimizers.load_state_tensors(found.tensors("optimizer"))
        checkpoint.load_model_tensors(self.model, found.tensors("model"), found.path)
        self.optimizers.switch("train")
        rng = found.tensors("rng")
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.device)
        if self.scaler is not None:
            # Version 0.2 kept only the scale.
            version_0_2 = {
                **self.scaler.state_dict(),
                "scale": found.state.get("loss_scale", FP16_SCALE),
            }
            self.scaler.load_state_dict(found.state.get("grad_scaler") or version_0_2)
        state = found.state
        samples = state.get("samples_bytes", 0)  # older runs kept none
        windows = state.get("windows_bytes", 0)  # only in a stream
        self._truncate_logs(state["train_bytes"], state["validate_bytes"], samples, windows)
        self.last_checkpoint = str(found.path)
        self.saved_state = replace(self.state)
        return True

    def _truncate_logs(self, train: int, validate: int, samples: int, windows: int) -> None:
        """Cut the curves and samples back to these sizes in bytes.

        Raises:
            LmplayError: a curve is damaged.
        """
        curves: dict[AppendOnlyFile, int] = {
            self.train_curve: train,
            self.validate_curve: validate,
            self.stream_log.file: windows,
        }
        try:
            for curve, size in curves.items():
                if size:
                    check_digest(curve.path)
        except LmplayError as e:
            raise LmplayError(f"{e}; --fresh starts over") from e
        try:
            check_digest(self.samples.path)
        except LmplayError as e:  # texts are no results
            if samples:
                self.reporter.note(f"{e}; the samples so far are dropped")
            samples = 0
        logs = {**curves, self.samples: min(samples, self.samples.size)}
        # The digests first: if this is interrupted, they are those of the longer files as well.
        write_digests({log.path: size for log, size in logs.items()})
        for log, size in logs.items():
            log.truncate(size)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Finish the step and save on a Ctrl-C, SIGTERM or SIGHUP; stop at once on a second Ctrl-C.

        SIGHUP comes when a terminal or an ssh connection is closed; nohup keeps it away. A second
        SIGTERM is ignored: a Ctrl-C reaches this process and its parent, which may then send it.
        """

        def handle(signum: int, frame: FrameType | None) -> None:
            if self.stop_signal is None:
                self.stop_signal = signum
                self.reporter.note("stopping after this step ...")
            elif signum == signal.SIGINT:
                raise KeyboardInterrupt

        wanted = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            wanted.append(signal.SIGHUP)
        before = {s: signal.signal(s, handle) for s in wanted}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def global_sum(self, count: int) -> int:
        """Return a count summed over all processes."""
        if self.world == 1:
            return count
        total = torch.tensor(count, device=self.device)
        torch.distributed.all_reduce(total)
        return int(total)


def _check_log_name(name: str) -> None:
    """Raise LmplayError if a curve of StepOut.log cannot become a column of train.csv."""
    if name in (*TRAIN, "correct") or not name.isidentifier():
        raise LmplayError(f"StepOut.log: {name!r} cannot be a new column of train.csv; rename it")
