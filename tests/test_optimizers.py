"""Schedules, groups, and the sparse update against the dense one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lmplay import testing
from lmplay.discover import find, load
from lmplay.errors import LmplayError
from lmplay.plan import Schedule
from lmplay.training.muon import Muon32, orthogonalized
from lmplay.training.optimizer_specs import Optimizer
from lmplay.training.optimizers import Optimizers, RowAdagrad, check_groups, lr_multiplier

NAMES = ["adagrad", "adamw", "adam", "sgd", "rmsprop", "muon", "swats"]


def test_schedules() -> None:
    assert lr_multiplier(Schedule(name="constant"), 0.7) == 1
    warm = Schedule(name="linear_warmup", warmup=0.1)
    assert [lr_multiplier(warm, p) for p in (0.05, 0.1, 1.0)] == [0.5, 1, 1]
    cosine = Schedule(name="cosine", warmup=0.2, floor=0.1)
    assert lr_multiplier(cosine, 0.1) == 0.5
    assert lr_multiplier(cosine, 0.6) == pytest.approx(0.55)
    assert lr_multiplier(cosine, 1.0) == pytest.approx(0.1)
    wsd = Schedule(name="wsd", decay=0.25, floor=0.0)
    assert [lr_multiplier(wsd, p) for p in (0.5, 0.75, 0.875, 1.0)] == [1, 1, 0.5, 0]
    cycle = Schedule(name="one_cycle", floor=0.0)
    assert lr_multiplier(cycle, 0.3) == pytest.approx(1)
    assert lr_multiplier(cycle, 1.0) == pytest.approx(0)


def test_one_cycle_equals_torchs() -> None:
    p = [nn.Parameter(torch.zeros(1))]
    steps = 40
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.SGD(p, lr=1.0),
        max_lr=1.0,
        total_steps=steps + 1,
        pct_start=0.3,
        final_div_factor=1e12,
    )
    # torch ends the rise one step before pct_start of all steps
    ours = Schedule(name="one_cycle", floor=0.0, warmup=(0.3 * (steps + 1) - 1) / steps)
    for step in range(steps):
        theirs.optimizer.step()
        theirs.step()
        assert lr_multiplier(ours, (step + 1) / steps) == pytest.approx(
            theirs.get_last_lr()[0], abs=1e-6
        )


class Table(nn.Module):
    def __init__(self, sparse: bool):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(40, 6, sparse=sparse)
        self.out = nn.Linear(6, 3)

    def loss(self, seed: int) -> torch.Tensor:
        ids = torch.randint(10, (25,), generator=torch.Generator().manual_seed(seed))
        return self.out(self.table(ids)).square().sum()


def groups(model: Table) -> list[dict]:
    return [
        {"params": [model.table.weight], "role": "embedding", "rows": model.table.sparse},
        {"params": [model.out.weight], "role": "matrix"},
        {"params": [model.out.bias], "role": "vector"},
    ]


def trained(sparse: bool, spec: Optimizer, clip: float | None = None, passes: int = 3) -> Table:
    model = Table(sparse)
    optimizers = Optimizers(spec, groups(model), model)
    for step in range(8):
        optimizers.set_lr(1 - step / 10)
        for part in range(passes):
            (model.loss(step * 10 + part) / passes).backward()
            optimizers.coalesce()
        optimizers.unscale_and_clip(clip)
        optimizers.step()
        optimizers.zero_grad()
    return model


@pytest.mark.parametrize(
    "spec", [Optimizer(name="adagrad", lr=0.1), Optimizer(name="sgd", lr=0.01, momentum=0)]
)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_sparse_update_equals_the_dense_one(spec: Optimizer, clip: float | None) -> None:
    sparse, dense = (trained(kind, spec, clip) for kind in (True, False))
    start = Table(False)
    torch.testing.assert_close(sparse.table.weight, dense.table.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sparse.out.weight, dense.out.weight, rtol=1e-5, atol=1e-6)
    assert torch.equal(sparse.table.weight[10:], start.table.weight[10:]), (
        "rows never looked up stay"
    )
    assert not torch.equal(sparse.table.weight[:10], start.table.weight[:10])


def test_row_adagrad_equals_torchs_adagrad() -> None:
    a, b = (nn.Parameter(torch.arange(12.0).view(6, 2).clone()) for _ in range(2))
    ours = RowAdagrad([a], lr=0.3, eps=1e-10)
    theirs = torch.optim.Adagrad([b], lr=0.3)
    for step in range(5):
        rows = torch.tensor([[step % 6, 2, 2]])
        values = torch.full((3, 2), 1.5 + step)
        a.grad = torch.sparse_coo_tensor(rows, values, (6, 2), check_invariants=True)
        b.grad = a.grad.to_dense()
        ours.step()
        theirs.step()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "spec", [Optimizer(name="adamw", weight_decay=0.1), Optimizer(name="adagrad", weight_decay=0.1)]
)
def test_where_sparse_would_differ_the_dense_update_is_used_and_said(spec: Optimizer) -> None:
    sparse, dense = (trained(kind, spec) for kind in (True, False))
    torch.testing.assert_close(sparse.table.weight, dense.table.weight, rtol=1e-5, atol=1e-6)
    model = Table(True)
    assert any("dense update" in note for note in Optimizers(spec, groups(model), model).notes)


def test_lazy_is_a_choice_that_is_said() -> None:
    spec = Optimizer(name="adamw", weight_decay=0.1, lazy=True)
    model = Table(True)
    assert any("lazy" in note for note in Optimizers(spec, groups(model), model).notes)
    assert torch.equal(trained(True, spec).table.weight[10:], Table(True).table.weight[10:])
    with pytest.raises(LmplayError, match="lazy goes with"):
        Optimizers(Optimizer(name="rmsprop", lazy=True), groups(model), model)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_lowers_the_loss_and_its_state_travels(name: str) -> None:
    subject = testing.tiny("gpt2ish")
    spec = Optimizer(name=name, lr=0.003, weight_decay=0.01)  # type: ignore[arg-type]
    batch = subject.batch()

    def start() -> tuple[nn.Module, Optimizers]:
        model = subject.model()
        return model, Optimizers(spec, subject.runner.param_groups(model), model)

    def step(model: nn.Module, optimizers: Optimizers) -> float:
        out = subject.runner.step(model, batch)
        (out.loss_sum / out.n_tokens).backward()
        optimizers.unscale_and_clip(1.0)
        optimizers.step()
        optimizers.zero_grad()
        return float(out.loss_sum.detach())

    model, optimizers = start()
    losses = [step(model, optimizers) for _ in range(6)]
    assert losses[-1] < losses[0]
    other, restored = start()
    other.load_state_dict(model.state_dict())
    restored.load_state_tensors({k: v.clone() for k, v in optimizers.state_tensors().items()})
    step(model, optimizers)
    step(other, restored)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_step_does_not_reach_moves_alike_after_a_resume(name: str) -> None:
    """A layer that is dropped now and then, an expert that nothing is sent to: momentum and decay
    go on."""
    spec = Optimizer(name=name, lr=0.1, weight_decay=0.1)  # type: ignore[arg-type]

    def start() -> tuple[nn.Module, Optimizers]:
        torch.manual_seed(0)
        # the last is never reached
        model = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])
        return model, Optimizers(
            spec, [{"params": list(model.parameters()), "role": "matrix"}], model
        )

    def step(model: nn.Module, optimizers: Optimizers, reached: int) -> None:
        x = torch.linspace(-1, 1, 8).view(2, 4)
        for layer in list(model.children())[:reached]:
            x = layer(x)
        x.square().sum().backward()
        optimizers.unscale_and_clip(None)
        optimizers.step()
        optimizers.zero_grad()

    model, optimizers = start()
    step(model, optimizers, 2)
    other, restored = start()
    other.load_state_dict(model.state_dict())
    restored.load_state_tensors({k: v.clone() for k, v in optimizers.state_tensors().items()})
    for m, o in ((model, optimizers), (other, restored)):
        step(m, o, 1)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weight_decay_acts_on_matrices_only() -> None:
    model = Table(False)
    optimizers = Optimizers(Optimizer(name="adamw", weight_decay=0.3), groups(model), model)
    decays = {
        id(p): g["weight_decay"]
        for part in optimizers.parts
        for g in part.param_groups
        for p in g["params"]
    }
    assert [decays[id(p)] for p in (model.table.weight, model.out.weight, model.out.bias)] == [
        0.3,
        0.3,
        0.0,
    ]


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_muon_in_float32_is_torchs_but_for_rounding(shape: tuple[int, int]) -> None:
    start = torch.randn(shape)
    gradients = torch.randn(6, *shape)
    weights = []
    for kind in (torch.optim.Muon, Muon32):
        p = torch.nn.Parameter(start.clone())
        optimizer = kind([p], lr=0.1, weight_decay=0.2, momentum=0.9)
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
        weights.append(p.detach())
    # bfloat16 rounds each of the iterations: .4 % of entries of about 1 / sqrt(n).
    assert (weights[0] - weights[1]).abs().max() < 0.02
    assert (weights[0] - start).abs().max() > 0.2


def test_orthogonalized_moves_the_singular_values_near_one() -> None:
    x = torch.randn(20, 50)
    values = torch.linalg.svdvals(orthogonalized(x, (3.4445, -4.775, 2.0315), 5))
    assert 0.6 < values.min() < values.max() < 1.3


def test_muon_takes_the_matrices() -> None:
    subject = testing.tiny("gpt2ish")
    model = subject.model()
    optimizers = Optimizers(
        Optimizer(name="muon", lr=0.02), subject.runner.param_groups(model), model
    )
    muon = {
        id(p)
        for part in optimizers.parts
        if isinstance(part, torch.optim.Muon)
        for g in part.param_groups
        for p in g["params"]
    }
    named = {n for n, p in model.named_parameters() if id(p) in muon}
    assert "blocks.0.ff.fc1.weight" in named
    assert not {"head.weight", "tok_embed.weight", "ln.weight", "head.bias"} & named


def test_groups_must_be_complete_and_disjoint() -> None:
    model = Table(False)
    with pytest.raises(LmplayError, match=r"out\.bias"):
        check_groups(groups(model)[:2], model)
    with pytest.raises(LmplayError, match="two groups"):
        check_groups([*groups(model), groups(model)[0]], model)
    with pytest.raises(LmplayError, match="unknown"):
        check_groups([{"params": list(model.parameters()), "weight_decay": 1}], model)


def test_clipping_by_norm_equals_torchs() -> None:
    a = Table(False)
    b = Table(False)
    optimizers = Optimizers(Optimizer(), groups(a), a)
    a.loss(0).backward()
    b.loss(0).backward()
    norm = optimizers.unscale_and_clip(0.25)
    expected = torch.nn.utils.clip_grad_norm_(b.parameters(), 0.25)
    assert math.isclose(float(norm), float(expected), rel_tol=1e-6)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


# ---------------------------------------------------------------- optimizers of experiments


def module_of(name: str) -> Any:
    return load(*find(name)).module


def own_and_theirs(
    own: torch.optim.Optimizer, theirs: torch.optim.Optimizer, steps: int = 12
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Give both the gradients of one function, each at its own weights; return the weights."""
    target = torch.linspace(-1, 1, 20).view(4, 5)
    for step in range(steps):
        for optimizer in (own, theirs):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * min(1, (step + 1) / 4)  # a warm-up
                for p in group["params"]:
                    p.grad = 2 * (p.detach() - target) + 0.1 * torch.sin(p.detach() * 5)
            optimizer.step()
    return tuple(  # type: ignore[return-value]
        [p.detach() for g in o.param_groups for p in g["params"]] for o in (own, theirs)
    )


def parameters() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    start = torch.randn(4, 5)
    return torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())


@pytest.mark.parametrize("weight_decay", [0.0, 0.4])
def test_lion_is_that_of_a_maintained_package(weight_decay: float) -> None:
    lion_pytorch = pytest.importorskip("lion_pytorch")
    a, b = parameters()
    own = module_of("lion").Lion([{"params": [a], "lr": 0.05, "weight_decay": weight_decay}])
    theirs = lion_pytorch.Lion([b], lr=0.05, betas=(0.9, 0.99), weight_decay=weight_decay)
    for x, y in zip(*own_and_theirs(own, theirs), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("weight_decay", [0.0, 0.4])
def test_schedule_free_is_that_of_its_authors(weight_decay: float) -> None:
    schedulefree = pytest.importorskip("schedulefree")
    a, b = parameters()
    own = module_of("schedule_free").ScheduleFreeAdamW(
        [{"params": [a], "lr": 0.05, "weight_decay": weight_decay}]
    )
    theirs = schedulefree.AdamWScheduleFree(
        [b], lr=0.05, betas=(0.9, 0.999), weight_decay=weight_decay
    )
    theirs.train()
    for x, y in zip(*own_and_theirs(own, theirs), strict=True):
        torch.testing.assert_close(x, y)
    own.eval()
    theirs.eval()
    torch.testing.assert_close(a, b)
    own.train()
    theirs.train()
    torch.testing.assert_close(a, b)
