"""The conformance suite: what every experiment must pass, ours and a stranger's.

    from lmplay.testing import check_experiment
    check_experiment("my_idea.py")

Each check is a function of its own, so that a test runner can name the one that failed.
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

from . import checkpoint, probe
from .api import IGNORE, Batch, ModelRunner
from .discover import Experiment, find, load
from .optimizers import check_groups

TINY: dict[str, Any] = {
    "num_blocks": 2, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "max_len": 12, "vocab_size": 23,
    "dropout": 0.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Subject:
    """One variant at a tiny size, and what the checks need of it again and again."""

    experiment: Experiment
    config: Any
    device: str = "cpu"

    @property
    def runner(self) -> ModelRunner:
        return self.experiment.runner(self.config)

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        return probe.build_model(self.runner, seed).to(self.device, dtype)

    def moved(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model as if it had trained: weights that start at 0 would hide what they multiply."""
        model, generator = probe.build_model(self.runner, 0), torch.Generator().manual_seed(2)
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
    """The variant `name` (or path.py:variant) at a tiny size; settings that are no sizes are kept."""
    experiment = load(*find(name))
    known = {f.name for f in dataclasses.fields(experiment.config_type)}
    variant = experiment.source.variants[experiment.variant]
    sizes = {k: v for k, v in TINY.items() if k in known}
    kept = {k: v for k, v in variant.items() if k not in TINY}
    return Subject(experiment, experiment.config_type(**{**sizes, **kept, **settings}), device)


def check_experiment(name: str, log: Callable[[str], None] = lambda text: None, device: str = "cpu") -> None:
    """Run every check on one variant, its models on `device`.

    Raises:
        AssertionError: the first check that fails, with what was expected.
    """
    subject = tiny(name, device)
    for check in CHECKS:
        log(f"{name}: {check.__name__}")
        check(subject)


def _gradients(subject: Subject, model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    total = sum(int((b.targets != IGNORE).sum()) for b in batches)
    model.zero_grad(set_to_none=True)
    for batch in batches:
        (subject.runner.step(model, batch).loss_sum / total).backward()
    return {
        name: p.grad.to_dense() if p.grad.is_sparse else p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def check_step(s: Subject) -> None:
    """The step's sums are those of the full logits and cross entropy."""
    model, batch = s.moved(torch.float64), s.batch()
    model.eval()
    out = s.runner.step(model, batch)
    rows = [s.runner.logits(model, batch.ids[:, : t + 1], None)[0] for t in range(batch.ids.shape[1])]
    logits = torch.stack(rows, 1)
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    counted = batch.targets != IGNORE
    torch.testing.assert_close(out.loss_sum.double(), expected, rtol=1e-8, atol=1e-8)
    assert int(out.n_tokens) == int(counted.sum())
    assert int(out.n_correct) == int(((logits.argmax(-1) == batch.targets) & counted).sum())


def check_causal(s: Subject) -> None:
    """No position sees a later one."""
    model, ids = s.moved(torch.float64).eval(), s.batch().ids
    middle = ids.shape[1] // 2
    changed = ids.clone()
    changed[:, middle:] = (changed[:, middle:] + 1) % s.config.vocab_size
    before = s.runner.step(model, Batch(ids[:, :middle], ids[:, :middle])).loss_sum
    targets = ids.clone()
    targets[:, middle:] = IGNORE
    after = s.runner.step(model, Batch(changed, targets)).loss_sum
    torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-9)


def check_every_parameter_learns(s: Subject) -> None:
    """One of two batches that hold every token gives every parameter a gradient.

    Two, since what a LayerNorm takes out again has a gradient of rounding alone, which may be 0 once.
    """
    model = s.moved()  # at the start a LayerNorm's gains of 1, say, may cancel a sum exactly
    size = -(-s.config.vocab_size // s.config.max_len) + 1
    ids = (torch.arange(size * s.config.max_len) % s.config.vocab_size).view(size, s.config.max_len)
    ids = ids.to(s.device)
    idle = probe.without_gradient(s.runner, model, Batch(ids, ids.roll(-1, 1)))
    if idle:
        again = probe.without_gradient(s.runner, model, Batch(ids.flip(1), ids))
        idle = [name for name in idle if name in again]
    assert not idle, f"no gradient reaches {idle}"


def check_accumulation(s: Subject) -> None:
    """Mini-batches of 1 and of 4 give the same gradient."""
    model, batch = s.moved(torch.float64), s.batch()
    whole = _gradients(s, model, [batch])
    parts = [Batch(batch.ids[i : i + 1], batch.targets[i : i + 1]) for i in range(len(batch.ids))]
    split = _gradients(s, model, parts)
    assert whole.keys() == split.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], split[name], rtol=1e-8, atol=1e-10, msg=f"gradient of {name}")


def check_deterministic(s: Subject) -> None:
    """The same seed gives the same model and gradient; another seed another model."""
    first, second = s.model(), s.model()
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), f"{name} differs between two models of one seed"
    one, two = (_gradients(s, m, [s.batch()]) for m in (first, second))
    assert all(torch.equal(one[n], two[n]) for n in one), "gradients differ between two equal steps"
    other = s.model(seed=1)
    assert any(not torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True))


def check_initialised_by_name(s: Subject) -> None:
    """Each module that owns parameters starts them in reset_parameters, from its own name's seed."""
    model = s.model()
    for path, module in model.named_modules():
        owns = [n for n, _ in module.named_parameters(recurse=False)]
        has = hasattr(module, "reset_parameters") or hasattr(module, "_reset_parameters")
        assert has or not owns, f"{path or 'the model'} owns {owns} and has no reset_parameters"


def check_cached_decoding(s: Subject) -> None:
    """Reading token by token, or prompt and then token by token, gives the logits of a full pass."""
    model, ids = s.moved(torch.float64).eval(), s.batch().ids
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
    """Written to a checkpoint and read into another model, the function is the same."""
    model, other, batch = s.model(), s.model(seed=1), s.batch()
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(Path(folder), 1, {"model": checkpoint.model_tensors(model)}, {})
        checkpoint.load_model_tensors(other, checkpoint.verify(path).tensors("model"), path)
    a, b = (s.runner.step(m.eval(), batch).loss_sum for m in (model, other))
    assert torch.equal(a, b)


def check_fold(s: Subject) -> None:
    """The folded model computes the same logits, without the parameters that serve training only."""
    model, ids = s.moved(torch.float64).eval(), s.batch().ids
    folded = s.runner.fold(model).eval()
    with torch.no_grad():
        a, b = (s.runner.logits(m, ids, None)[0] for m in (model, folded))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    kept = {n for n, _ in folded.named_parameters()}
    for pattern in s.runner.training_only:
        assert not any(fnmatch(n, pattern) for n in kept), f"{pattern} is still in the folded model"
    _, extra = probe.parameter_counts(s.runner, model)
    assert (extra == 0) == (folded is model), "fold and training_only must agree on whether there is anything to fold"


def check_bf16(s: Subject) -> None:
    """Under bf16 autocast loss and gradients are finite and near those of float32."""
    model, batch = s.model(), s.batch()
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


def check_learns(s: Subject) -> None:
    """A few steps on one batch, at the rates that the groups ask for, lower its loss."""
    model, batch = s.model(), s.batch()
    rates = {id(p): g.get("lr_scale", 1.0) for g in s.runner.param_groups(model) for p in g["params"]}
    first = float(s.runner.step(model, batch).loss_sum.detach())
    for _ in range(10):
        grads = _gradients(s, model, [batch])
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in grads:
                    p.sub_(0.01 * rates[id(p)] * grads[name].sign())
    assert float(s.runner.step(model, batch).loss_sum.detach()) < first


def check_config_fields(s: Subject) -> None:
    """Every field of the Config changes something: the parameters, or what is computed.

    A field that goes with certain others only may be refused (ValueError) where it would do nothing, if another
    variant of the idea accepts it.
    """
    variants, reference = s.experiment.source.variants, _signature(s)
    for field in dataclasses.fields(s.config):
        accepted, changed = _changes(s, field, reference)
        for variant in variants if not accepted else ():
            other = tiny(f"{s.experiment.source.path}:{variant}", s.device)
            accepted, changed = _changes(other, field, _signature(other))
            if accepted:
                break
        assert accepted, f"no other value of {field.name} is accepted"
        assert changed, f"{field.name} changes nothing"


def _changes(s: Subject, field: dataclasses.Field[Any], reference: tuple[Any, ...]) -> tuple[bool, bool]:
    """Whether another value of the field is accepted, and whether one that is changes the reference."""
    accepted = False
    for value in _other_values(s, field):
        signature = _signature_or_none(s, field.name, value)
        accepted = accepted or signature is not None
        if signature is not None and signature != reference:
            return True, True
    return accepted, False


def _other_values(s: Subject, field: dataclasses.Field[Any]) -> list[Any]:
    """Values of a field other than the config's own; for a text, what the idea's variants have."""
    value = getattr(s.config, field.name)
    hint = typing.get_type_hints(type(s.config))[field.name]
    if typing.get_origin(hint) is typing.Literal:
        return [v for v in typing.get_args(hint) if v != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [v for v in (value * 2, value + 1, max(1, value // 2)) if v != value]
    if isinstance(value, float):
        return [value * 2, value / 2 + 0.25, 0.5]
    if value is None:  # of an optional field; what it stands for, the variants say
        return [v[field.name] for v in s.experiment.source.variants.values() if v.get(field.name) is not None]
    texts = [v[field.name] for v in s.experiment.source.variants.values() if field.name in v]
    return [text for text in (*texts, value[::-1], value[:1]) if text != value]


def _signature_or_none(s: Subject, name: str, value: Any) -> Any:
    # Fields may only go together with others: head_bias has to leave before tied can come.
    for also in ({}, {"head_bias": False}):
        known = {k: v for k, v in also.items() if hasattr(s.config, k) and k != name}
        try:
            config = dataclasses.replace(s.config, **known, **{name: value})
            return _signature(Subject(s.experiment, config, s.device))
        except ValueError:
            continue
    return None


def _signature(s: Subject) -> tuple[Any, ...]:
    """What a config makes: parameter shapes and devices, loss and gradients of one training step."""
    torch.manual_seed(0)
    model = s.moved().train()
    devices = tuple(m.on_cpu for m in model.modules() if hasattr(m, "on_cpu"))
    shapes = tuple((n, tuple(p.shape)) for n, p in model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(min(23, s.config.vocab_size), (4, min(12, s.config.max_len)), generator=generator)
    ids = ids.to(s.device)
    loss = s.runner.step(model, Batch(ids, ids)).loss_sum
    loss.backward()
    gradients = tuple(float(p.grad.to_dense().abs().sum()) for p in model.parameters() if p.grad is not None)
    return shapes, devices, float(loss.detach()), gradients


def check_compiles(s: Subject, backend: str = "inductor") -> None:
    """torch.compile gives the same loss and gradients, as the trainer uses it: with what weights alone decide held.

    Slow, so not in CHECKS: one variant an idea. "aot_eager" traces the same graphs forward and backward, which is what
    an experiment can break, and spares generating code for them.
    """
    model, batch = s.moved(), s.batch()
    expected = _gradients(s, model, [batch])
    loss = float(s.runner.step(model, batch).loss_sum.detach())
    compiled: Any = torch.compile(model, backend=backend)
    total = int((batch.targets != IGNORE).sum())
    model.zero_grad(set_to_none=True)
    with s.runner.fixed_weights(model):
        out = s.runner.step(compiled, batch)
        (out.loss_sum / total).backward()
    assert abs(float(out.loss_sum.detach()) - loss) < 1e-3
    for name, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
            torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5, msg=f"gradient of {name}")


CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_step,
    check_causal,
    check_every_parameter_learns,
    check_accumulation,
    check_deterministic,
    check_initialised_by_name,
    check_cached_decoding,
    check_param_groups,
    check_saves_and_loads,
    check_fold,
    check_bf16,
    check_learns,
    check_config_fields,
)
