"""The conformance suite: checks that every experiment must pass, ours and yours.

    from lmplay.testing import check_experiment
    check_experiment("my_idea.py", print)

Each check is a function of its own, so that a test runner can name the one that failed.

One module, because every check starts from the same Subject.
"""

from __future__ import annotations

import dataclasses
import tempfile
import typing
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .api import IGNORE, Batch, ModelRunner, StepOut
from .discover import Experiment, find, load
from .model import build_model, parameter_counts, without_gradient
from .training import checkpoint
from .training.optimizers import check_groups

TINY: dict[str, Any] = {
    "num_blocks": 2,
    "embed_dim": 16,
    "num_heads": 2,
    "num_kv_heads": 1,
    "max_len": 12,
    "vocab_size": 23,
    "dropout": 0.0,
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """One variant at a tiny size, with what the checks need of it."""

    experiment: Experiment
    config: Any
    device: str = "cpu"

    @property
    def runner(self) -> ModelRunner:
        return self.experiment.runner(self.config)

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        return build_model(self.runner, seed).to(self.device, dtype)

    def moved(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """Return the model as if it had been trained: weights that start at 0 would hide what they
        multiply."""
        model = build_model(self.runner, seed)
        generator = torch.Generator().manual_seed(seed + 2)
        with torch.no_grad():
            for p in model.parameters():
                size = p.double().square().mean().sqrt() or 1.0
                p.add_(0.1 * size * torch.randn(p.shape, generator=generator))
        return model.to(self.device, dtype)

    def batch(self, size: int = 4, seed: int = 1) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        shape = (size, self.config.max_len)
        ids = torch.randint(self.config.vocab_size, shape, generator=generator)
        targets = torch.randint(self.config.vocab_size, shape, generator=generator)
        targets[0, : self.config.max_len // 3] = IGNORE
        return Batch(ids.to(self.device), targets.to(self.device))


def tiny(name: str, device: str = "cpu", **settings: Any) -> Subject:
    """Return the variant `name` (or path.py:variant) at a tiny size, with its other settings."""
    experiment = load(*find(name))
    known = {f.name for f in dataclasses.fields(experiment.config_type)}
    variant = experiment.source.variants[experiment.variant]
    sizes = {k: v for k, v in TINY.items() if k in known}
    kept = {k: v for k, v in variant.items() if k not in TINY and "." not in k}
    return Subject(experiment, experiment.config_type(**{**sizes, **kept, **settings}), device)


def check_experiment(
    name: str, log: Callable[[str], None] = lambda text: None, device: str = "cpu"
) -> None:
    """Run every check on one variant, with its models on `device`.

    Raises:
        AssertionError: the first check that fails, with what was expected.
    """
    subject = tiny(name, device)
    for check in CHECKS:
        log(f"{name}: {check.__name__}")
        check(subject)


def _objective(out: StepOut, n_tokens: int, share: float) -> Tensor:
    """Return what is trained on a mini-batch with a share of the sequences of `n_tokens` tokens."""
    mean = out.loss_sum / n_tokens
    return mean if out.aux_loss is None else mean + share * out.aux_loss


def _gradients(subject: Subject, model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    total = sum(int((b.targets != IGNORE).sum()) for b in batches)
    sequences = sum(len(b.ids) for b in batches)
    model.zero_grad(set_to_none=True)
    for batch in batches:
        out = subject.runner.step(model, batch)
        _objective(out, total, len(batch.ids) / sequences).backward()
    return {
        name: p.grad.to_dense() if p.grad.is_sparse else p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def check_step(s: Subject) -> None:
    """The step's sums equal those of full logits and cross entropy."""
    model = s.moved(torch.float64)
    batch = s.batch()
    model.eval()
    out = s.runner.step(model, batch)
    rows = [
        s.runner.logits(model, batch.ids[:, : t + 1], None)[0] for t in range(batch.ids.shape[1])
    ]
    logits = torch.stack(rows, 1)
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    counted = batch.targets != IGNORE
    torch.testing.assert_close(out.loss_sum.double(), expected, rtol=1e-8, atol=1e-8)
    assert int(out.n_tokens) == int(counted.sum())
    assert int(out.n_correct) == int(((logits.argmax(-1) == batch.targets) & counted).sum())


def check_causal(s: Subject) -> None:
    """No position depends on a later one."""
    model = s.moved(torch.float64).eval()
    ids = s.batch().ids
    middle = ids.shape[1] // 2
    changed = ids.clone()
    changed[:, middle:] = (changed[:, middle:] + 1) % s.config.vocab_size
    before = s.runner.step(model, Batch(ids[:, :middle], ids[:, :middle])).loss_sum
    targets = ids.clone()
    targets[:, middle:] = IGNORE
    after = s.runner.step(model, Batch(changed, targets)).loss_sum
    torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-9)


def check_every_parameter_learns(s: Subject) -> None:
    """Every parameter gets a gradient from a batch that contains every token, in one of four models
    and batches.

    Not in the first alone, because the gradient of what a LayerNorm removes again is only rounding
    and may be 0, and because not every token reaches every expert.
    """
    size = -(-s.config.vocab_size // s.config.max_len) + 1
    idle: list[str] = []
    for seed in range(4):
        # At the start a LayerNorm's gains of 1, say, may cancel a sum exactly, so it is moved.
        model = s.moved(seed=seed)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(size * s.config.max_len, generator=generator)
        ids = (order % s.config.vocab_size).view(size, s.config.max_len).to(s.device)
        found = without_gradient(s.runner, model, Batch(ids, ids.roll(-1, 1)))
        idle = found if seed == 0 else [name for name in idle if name in found]
        if not idle:
            return
    raise AssertionError(f"no gradient reaches {idle}")


def check_accumulation(s: Subject) -> None:
    """Mini-batches of 1 and of 4 give the same gradient."""
    model = s.moved(torch.float64)
    batch = s.batch()
    full = _gradients(s, model, [batch])
    parts = [Batch(batch.ids[i : i + 1], batch.targets[i : i + 1]) for i in range(len(batch.ids))]
    split = _gradients(s, model, parts)
    assert full.keys() == split.keys()
    for name in full:
        torch.testing.assert_close(
            full[name], split[name], rtol=1e-8, atol=1e-10, msg=f"gradient of {name}"
        )


def check_deterministic(s: Subject) -> None:
    """The same seed gives the same model and gradient, another seed another model."""
    first = s.model()
    second = s.model()
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), f"{name} differs between two models of one seed"
    one, two = (_gradients(s, m, [s.batch()]) for m in (first, second))
    assert all(torch.equal(one[n], two[n]) for n in one), "gradients differ between two equal steps"
    other = s.model(seed=1)
    assert any(
        not torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True)
    )


def check_initialized_by_name(s: Subject) -> None:
    """Each module with parameters initializes them in reset_parameters."""
    model = s.model()
    for path, module in model.named_modules():
        owns = [n for n, _ in module.named_parameters(recurse=False)]
        has = hasattr(module, "reset_parameters") or hasattr(module, "_reset_parameters")
        assert has or not owns, f"{path or 'the model'} owns {owns} and has no reset_parameters"


def check_cached_decoding(s: Subject) -> None:
    """Decoding with a cache gives the logits of a full pass, by token and by pieces."""
    model = s.moved(torch.float64).eval()
    ids = s.batch().ids
    with torch.no_grad():
        full = [s.runner.logits(model, ids[:, : t + 1], None)[0] for t in range(ids.shape[1])]
        for prompt in (1, ids.shape[1] // 2):
            cache = s.runner.new_cache(model, len(ids), s.config.max_len)
            logits, cache = s.runner.logits(model, ids[:, :prompt], cache)
            torch.testing.assert_close(logits, full[prompt - 1], rtol=1e-8, atol=1e-10)
            for t in range(prompt, ids.shape[1]):
                logits, cache = s.runner.logits(model, ids[:, t : t + 1], cache)
                torch.testing.assert_close(logits, full[t], rtol=1e-8, atol=1e-10)
        # two pieces of several tokens each
        cache = s.runner.new_cache(model, len(ids), s.config.max_len)
        _, cache = s.runner.logits(model, ids[:, :3], cache)
        logits, cache = s.runner.logits(model, ids[:, 3:8], cache)
        torch.testing.assert_close(logits, full[7], rtol=1e-8, atol=1e-10)


def check_param_groups(s: Subject) -> None:
    """Every parameter is in exactly one group."""
    model = s.model()
    check_groups(s.runner.param_groups(model), model)


def check_saves_and_loads(s: Subject) -> None:
    """A model that was saved and loaded computes the same."""
    model = s.model()
    other = s.model(seed=1)
    batch = s.batch()
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(Path(folder), 1, {"model": checkpoint.model_tensors(model)}, {})
        checkpoint.load_model_tensors(other, checkpoint.verify(path).tensors("model"), path)
    a, b = (s.runner.step(m.eval(), batch).loss_sum for m in (model, other))
    assert torch.equal(a, b)


def check_fold(s: Subject) -> None:
    """The folded model computes the same logits without the training-only parameters."""
    model = s.moved(torch.float64).eval()
    ids = s.batch().ids
    folded = s.runner.fold(model).eval()
    with torch.no_grad():
        a, b = (s.runner.logits(m, ids, None)[0] for m in (model, folded))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    kept = {n for n, _ in folded.named_parameters()}
    for pattern in s.runner.training_only:
        assert not any(fnmatch(n, pattern) for n in kept), f"{pattern} is still in the folded model"
    _, extra = parameter_counts(s.runner, model)
    assert (extra == 0) == (folded is model), (
        "fold and training_only must agree on whether there is anything to fold"
    )


def check_bf16(s: Subject) -> None:
    """Under bf16 autocast, loss and gradients are finite and close to float32's."""
    model = s.model()
    batch = s.batch()
    exact = float(s.runner.step(model, batch).loss_sum.detach())
    with torch.autocast(torch.device(s.device).type, dtype=torch.bfloat16):
        out = s.runner.step(model, batch)
    assert out.loss_sum.dtype == torch.float32
    assert abs(float(out.loss_sum.detach()) - exact) < 0.05 * abs(exact)
    out.loss_sum.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            values = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
            assert bool(values.isfinite().all()), f"the gradient of {name} is not finite"


def check_fp16(s: Subject) -> None:
    """Under fp16 autocast with a GradScaler, loss and gradients are finite.

    Not in CHECKS: fp16 is for older CUDA cards.
    """
    model = s.model()
    batch = s.batch()
    exact = float(s.runner.step(model, batch).loss_sum.detach())
    kind = torch.device(s.device).type
    scaler = torch.amp.GradScaler(kind, init_scale=2.0**8)
    with torch.autocast(kind, dtype=torch.float16):
        out = s.runner.step(model, batch)
    assert abs(float(out.loss_sum.detach()) - exact) < 0.05 * abs(exact)
    scaler.scale(out.loss_sum).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            values = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
            assert bool(values.isfinite().all()), f"the gradient of {name} is not finite"


def check_learns(s: Subject) -> None:
    """A few steps on one batch lower its loss."""
    model = s.model()
    batch = s.batch()
    rates = {
        id(p): g.get("lr_scale", 1.0) for g in s.runner.param_groups(model) for p in g["params"]
    }
    first = float(s.runner.step(model, batch).loss_sum.detach())
    for _ in range(10):
        grads = _gradients(s, model, [batch])
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in grads:
                    p.sub_(0.01 * rates[id(p)] * grads[name].sign())
    assert float(s.runner.step(model, batch).loss_sum.detach()) < first


def check_config_fields(s: Subject) -> None:
    """Every field of the Config changes the parameters or the computation.

    A Config may refuse a value (ValueError) that would have no effect with its other fields, if
    another variant of the idea accepts it.
    """
    variants = s.experiment.source.variants
    reference = _signature(s)
    for field in dataclasses.fields(s.config):
        accepted, changed = _changes(s, field, reference)
        for variant in variants if not accepted else ():
            other = tiny(f"{s.experiment.source.path}:{variant}", s.device)
            accepted, changed = _changes(other, field, _signature(other))
            if accepted:
                break
        assert accepted, f"no other value of {field.name} is accepted"
        assert changed, f"{field.name} changes nothing"


def _changes(
    s: Subject, field: dataclasses.Field[Any], reference: tuple[Any, ...]
) -> tuple[bool, bool]:
    """Return whether another value of the field is accepted, and whether one changes the
    reference."""
    accepted = False
    for value in _other_values(s, field):
        signature = _signature_or_none(s, field.name, value)
        accepted = accepted or signature is not None
        if signature is not None and signature != reference:
            return True, True
    return accepted, False


def _other_values(s: Subject, field: dataclasses.Field[Any]) -> list[Any]:
    """Return other values of the field, those of the idea's variants for a text or a number."""
    value = getattr(s.config, field.name)
    named = [v[field.name] for v in s.experiment.source.variants.values() if field.name in v]
    hint = typing.get_type_hints(type(s.config))[field.name]
    if typing.get_origin(hint) is typing.Literal:
        return [v for v in typing.get_args(hint) if v != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [v for v in (value * 2, value + 1, max(1, value // 2), 1, *named) if v != value]
    if isinstance(value, float):
        return [value * 2, value / 2 + 0.25, 0.5]
    if value is None:  # of an optional field; what it stands for, the variants say
        return [v for v in named if v is not None]
    return [text for text in (*named, value[::-1], value[:1]) if text != value]


def _signature_or_none(s: Subject, name: str, value: Any) -> Any:
    """Return what the config with this value makes; None if the Config refuses the value.

    A field may need another one to change with it, so each switch is tried as well.
    """
    switches = [
        f.name
        for f in dataclasses.fields(s.config)
        if f.name != name and isinstance(getattr(s.config, f.name), bool)
    ]
    for also in ({}, *({switch: not getattr(s.config, switch)} for switch in switches)):
        try:
            config = dataclasses.replace(s.config, **also, **{name: value})
            return _signature(Subject(s.experiment, config, s.device))
        except ValueError:
            continue
    return None


def _signature(s: Subject) -> tuple[Any, ...]:
    """Return what a config makes: shapes and devices; loss, gradients and buffers of one step."""
    torch.manual_seed(0)
    model = s.moved().train()
    devices = tuple(m.on_cpu for m in model.modules() if hasattr(m, "on_cpu"))
    shapes = tuple((n, tuple(p.shape)) for n, p in model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(
        min(23, s.config.vocab_size), (4, min(12, s.config.max_len)), generator=generator
    )
    ids = ids.to(s.device)
    with s.runner.fixed_weights(model):
        loss = _objective(s.runner.step(model, Batch(ids, ids)), 1, 1.0)
        loss.backward()
    gradients = tuple(
        float(p.grad.to_dense().abs().sum()) for p in model.parameters() if p.grad is not None
    )
    buffers = tuple(float(b.double().abs().sum()) for b in model.buffers())
    return shapes, devices, float(loss.detach()), gradients, buffers


def check_compiles(s: Subject, backend: str = "inductor") -> None:
    """torch.compile gives the same loss and gradients, in the way that the trainer uses it.

    Slow, and therefore not in CHECKS. "aot_eager" traces the same graphs forward and backward,
    which is what an experiment can break, and does not generate code for them.
    """
    model = s.moved()
    batch = s.batch()
    expected = _gradients(s, model, [batch])
    loss = float(s.runner.step(model, batch).loss_sum.detach())
    compiled: Any = torch.compile(model, backend=backend)
    total = int((batch.targets != IGNORE).sum())
    model.zero_grad(set_to_none=True)
    with s.runner.fixed_weights(model):
        out = s.runner.step(compiled, batch)
        _objective(out, total, 1.0).backward()
    assert abs(float(out.loss_sum.detach()) - loss) < 1e-3
    for name, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
            torch.testing.assert_close(
                grad, expected[name], rtol=1e-3, atol=1e-5, msg=f"gradient of {name}"
            )


CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_step,
    check_causal,
    check_every_parameter_learns,
    check_accumulation,
    check_deterministic,
    check_initialized_by_name,
    check_cached_decoding,
    check_param_groups,
    check_saves_and_loads,
    check_fold,
    check_bf16,
    check_learns,
    check_config_fields,
)
