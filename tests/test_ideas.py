"""What the ideas compute, each against a plain form of its formula, and copies of one formula
against each other."""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay import discover, testing
from lmplay.api import Batch, ModelRunner
from lmplay.training.optimizer_specs import Optimizer as OptimizerSpec
from lmplay.training.optimizers import Optimizers

SOURCES = discover.list_sources()
VARIANTS = [v for s in SOURCES for v in s.variants]
IDEAS = [next(iter(s.variants)) for s in SOURCES]


def variants_of_files_with(word: str) -> list[str]:
    """Variants of the files that contain a word: to load every file takes seconds."""
    return [v for s in SOURCES if word in s.path.read_text() for v in s.variants]


FOLDABLE = [
    v for v in variants_of_files_with("training_only") if testing.tiny(v).runner.training_only
]
HOLDING = [
    v
    for v in variants_of_files_with("fixed_weights")
    if type(testing.tiny(v).runner).fixed_weights is not ModelRunner.fixed_weights
]


def module(idea: str) -> ModuleType:
    return discover.load(*discover.find(idea)).module


def trained(s: testing.Subject, steps: int = 4, bf16: bool = False) -> nn.Module:
    """A model after a few steps of AdamW at the rates its groups ask for."""
    model = s.model()
    optimizers = Optimizers(
        OptimizerSpec(name="adamw", lr=3e-3), s.runner.param_groups(model), model
    )
    for i in range(steps):
        with (
            s.runner.fixed_weights(model),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
        ):
            out = s.runner.step(model, s.batch(seed=i))
            (out.loss_sum / out.n_tokens).backward()
        optimizers.unscale_and_clip(1.0)
        optimizers.step()
        optimizers.zero_grad()
    return model.eval()


@pytest.mark.parametrize("variant", FOLDABLE)
def test_folds_after_training(variant: str) -> None:
    s = testing.tiny(variant)
    model = trained(s).double()
    ids = s.batch().ids
    with torch.no_grad():
        a, b = (s.runner.logits(m, ids)[0] for m in (model, s.runner.fold(model).eval()))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", [v for v in IDEAS if v in FOLDABLE])
def test_folds_after_training_in_bf16(variant: str) -> None:
    s = testing.tiny(variant)
    model = trained(s, bf16=True)
    ids = s.batch().ids
    with torch.no_grad():
        a, b = (s.runner.logits(m, ids)[0] for m in (model, s.runner.fold(model).eval()))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", HOLDING)
def test_held_weights_give_the_naive_gradients(variant: str) -> None:
    """Computed once for two mini-batches, or anew in each: the same gradients."""
    s = testing.tiny(variant)
    model = s.moved(torch.float64)
    batches = [s.batch(seed=1), s.batch(seed=2)]
    naive = testing._gradients(s, model, batches)
    model.zero_grad(set_to_none=True)
    total = sum(int(s.runner.step(model, b).n_tokens) for b in batches)
    with s.runner.fixed_weights(model):
        for batch in batches:
            (s.runner.step(model, batch).loss_sum / total).backward()
    assert getattr(model, "cached", None) is None
    for name, p in model.named_parameters():
        grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
        torch.testing.assert_close(grad, naive[name], rtol=1e-9, atol=1e-12, msg=name)


SAME_START = [
    "attn_pos",
    "attn_pos_mul",
    "focus",
    "focus_simple",
    "lra",
    "lra_features",
    "lra_linear",
    "rgpt2ish",
    "uw1",
    "uw1_rows",
    "uw1_head",
    "uw2",
    "uw3",
    "uw4",
    "uw5",
    "uw6",
]


@pytest.mark.parametrize("variant", SAME_START)
def test_starts_from_the_baselines_function(variant: str) -> None:
    s = testing.tiny(variant)
    base = testing.tiny("gpt2ish")
    loss, wanted = (float(x.runner.step(x.model(), x.batch()).loss_sum.detach()) for x in (s, base))
    assert loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("multiply", [False, True])
def test_attention_position_against_a_loop(multiply: bool) -> None:
    s = testing.tiny("attn_pos_mul" if multiply else "attn_pos")
    table = s.experiment.module.DistanceTable(s.config).double()
    nn.init.normal_(table.weight)
    heads = 2
    size = 8
    for t, total in ((6, 6), (1, 6), (3, 7)):
        q = torch.randn(2, heads, t, size, dtype=torch.float64)
        k, v = torch.randn(2, 2, heads, total, size, dtype=torch.float64)
        out = torch.zeros_like(q)
        for b in range(2):
            for head in range(heads):
                for row in range(t):
                    i = total - t + row
                    scores = []
                    for j in range(i + 1):
                        content = q[b, head, row] @ k[b, head, j]
                        position = q[b, head, row] @ table.weight[head, i - j]
                        joined = content * (1 + position) if multiply else content + position
                        scores.append(joined / math.sqrt(size))
                    weights = torch.stack(scores).softmax(0)
                    out[b, head, row] = sum(w * v[b, head, j] for j, w in enumerate(weights))
        torch.testing.assert_close(table.attend(q, k, v), out)


def test_focus_divides_the_scores() -> None:
    s = testing.tiny("focus")
    attention = s.moved(torch.float64).blocks[1].attn
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    q, k, v = (
        m(x).unflatten(-1, (2, 8)).transpose(1, 2)
        for m in (attention.query, attention.key, attention.value)
    )
    # (B, t, H)
    scale = 2 * torch.sigmoid(F.linear(x, attention.temperature.weight, attention.temperature.bias))
    scores = q @ k.transpose(-1, -2) / math.sqrt(8) / scale.transpose(1, 2).unsqueeze(-1)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    read = scores.masked_fill(mask, float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(attention(x, None), attention.proj(read.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("factors", ["trained", "linear", "mlp"])
@pytest.mark.parametrize("per_feature", [False, True])
def test_learned_add_stays_in_its_range(factors: str, per_feature: bool) -> None:
    s = testing.tiny("lra", factors=factors, per_feature=per_feature)
    add = s.experiment.module.LearnedAdd(s.config)
    for p in add.parameters():
        nn.init.normal_(p, std=5.0)
    x = torch.randn(4, 3, 16)
    zero = torch.zeros(4, 3, 16)
    alpha = add(x, zero) / x
    beta = add(zero, x) / x
    for factor in (alpha, beta):
        assert 0.4 - 1e-5 <= float(factor.min()) <= float(factor.max()) <= 1.5 + 1e-5
    if not per_feature:
        torch.testing.assert_close(alpha, alpha[..., :1].expand_as(alpha))


def test_unified_linear_against_its_formula() -> None:
    s = testing.tiny("uw1")
    layer = s.experiment.module.UnifiedLinear(3, 5, s.config, "x").double()
    for p in layer.parameters():
        nn.init.normal_(p)
    made = layer.effective({})
    w = torch.empty(5, 3, dtype=torch.float64)
    for o in range(5):
        for i in range(3):
            row = layer.weight[o, i] * (layer.m_out[o] + layer.c_m_out) + layer.a_out[o]
            w[o, i] = row * (layer.m_in[i] + layer.c_m_in) + layer.a_in[i]
    torch.testing.assert_close(made["x.weight"], w)
    torch.testing.assert_close(made["x.bias"], layer.bias + layer.c_shift)


@pytest.mark.parametrize(("variant", "depth"), [("uw6", 0), ("uw2", 1), ("uw5", 2)])
def test_predictions_layer_by_layer(variant: str, depth: int) -> None:
    """The batched predictions are those of each layer's own z; every factor starts at 1 and every
    addend at 0."""
    s = testing.tiny(variant)
    model = s.model(dtype=torch.float64)
    starts = s.experiment.module.STARTS
    for vectors in [v for p in model.predictors for v in p().values()]:
        for kind, vector in vectors.items():
            torch.testing.assert_close(
                vector, torch.full_like(vector, starts[kind]), atol=1e-6, rtol=0
            )
    model = s.moved(torch.float64)
    for predictor in model.predictors:
        made = predictor()
        for number, path in enumerate(predictor.paths):
            h = predictor.enter @ predictor.z[number] + predictor.enter_bias
            h = F.gelu(h) if depth else h
            h = F.gelu(predictor.middle @ h + predictor.middle_bias) if depth == 2 else h
            for name, kind, rows in predictor.tables:
                if number in rows:
                    rest = predictor.get_parameter(f"{name}_rest")[rows.index(number)]
                    torch.testing.assert_close(
                        made[path][kind], predictor.get_parameter(name) @ h + rest
                    )


def test_memory_reads_by_plain_attention() -> None:
    s = testing.tiny("nnm", mem_ff=False, cells=5, mem_heads=3)
    model = s.moved(torch.float64)
    memory = model.blocks[0].memory
    bank = model.banks[0]
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    k, v = (m(bank.cells).view(5, 3, 8) for m in (bank.to_key, bank.to_value))
    q = memory.query(memory.ln(x)).view(2, 4, 3, 8)
    weights = (torch.einsum("btmh,cmh->btmc", q, k) / math.sqrt(8)).softmax(-1)
    read = torch.einsum("btmc,cmh->btmh", weights, v).flatten(2)
    torch.testing.assert_close(memory(x, model.effective()), memory.proj(read))


def test_mixed_linear_is_a_mixture_of_layers() -> None:
    s = testing.tiny("nnm_weights")
    layer = s.experiment.module.MemoryLinear(4, 6, 3).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    p = (x @ layer.select.T).softmax(-1)
    each = torch.stack(
        [F.linear(x, layer.weight[:, c], layer.bias.view(3, 6)[c]) for c in range(3)], -1
    )
    torch.testing.assert_close(layer(x), (each * p.unsqueeze(-2)).sum(-1))


def test_pattern_of_blocks_and_memories() -> None:
    config = testing.tiny("nnm_select").experiment.config_type
    assert config(pattern="BN-BNN-BNNN", num_blocks=9).letters == "BNBNNBNNN"
    assert config(pattern="BNN", num_blocks=7).letters == "BNNBNNB"
    with pytest.raises(ValueError, match="made of B and N"):
        config(pattern="BX")


def test_recurrent_baseline_with_state_computes_gpt2ish() -> None:
    """The forward pass is gpt2ish's; without its state it is gpt2ish's on sequences of a chunk's
    length."""
    base = testing.tiny("gpt2ish")
    model = base.moved(torch.float64)
    batch = base.batch()
    wanted = base.runner.step(model, batch).loss_sum
    s = testing.tiny("rgpt2ish")
    torch.testing.assert_close(s.runner.step(model, batch).loss_sum, wanted)
    chunks = zip(batch.ids.split(3, 1), batch.targets.split(3, 1), strict=True)
    apart = sum(base.runner.step(model, Batch(i, t)).loss_sum for i, t in chunks)
    torch.testing.assert_close(
        testing.tiny("rgpt2ish_stateless").runner.step(model, batch).loss_sum, apart
    )
    whole, cut = (testing._gradients(x, model, [batch]) for x in (base, s))
    assert any(not torch.allclose(whole[n], cut[n]) for n in whole), (
        "gradients must end at the chunks' borders"
    )


# ---------------------------------------------------------------- copies


def seeded(made: nn.Module) -> nn.Module:
    """Every parameter from a seed of its name, so that two copies hold the same numbers."""
    with torch.no_grad():
        for name, p in made.named_parameters():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            p.copy_(torch.randn(p.shape, generator=generator))
    return made.double()


def unified(idea: str) -> Any:
    m = module(idea)
    each = dict.fromkeys(("m_out", "a_out", "m_in", "a_in", "shift"), "plain")
    config = m.Config(**{"uw1": {"vectors": "plain"}, "sac1": each, "all1": {}}[idea])
    layer = seeded(m.UnifiedLinear(4, 6, config, "x"))
    return layer.effective() if idea == "all1" else layer.effective({})


def test_copies_of_the_unified_linear_agree() -> None:
    first, *others = (unified(idea) for idea in ("uw1", "sac1", "all1"))
    for other in others:
        for name in ("x.weight", "x.bias"):
            torch.testing.assert_close(other[name], first[name])


def test_copies_of_the_predictor_agree() -> None:
    made = []
    for idea, settings in (("uw1", {"vectors": "predicted"}), ("sac1", {})):
        m = module(idea)
        c = m.Config(embed_dim=8, num_heads=2, exp_mul=2.0, depth=2, **settings)
        predictor = seeded(
            m.Predictor(c, [m.UnifiedLinear(8, 8, c, "a"), m.UnifiedLinear(8, 32, c, "b")])
        )
        made.append(predictor())
    for path in ("a", "b"):
        assert made[0][path].keys() == made[1][path].keys()
        for kind, vector in made[0][path].items():
            torch.testing.assert_close(made[1][path][kind], vector)


def test_copies_of_the_learning_rates_agree() -> None:
    """Parameters of one name learn at one rate in uw and sacrificial, and the plain vectors in
    combined too."""
    rates: list[dict[str, float]] = []
    for variant in ("uw2", "sac2", "uw1", "all1"):
        sizes = (
            {"exp_mul": 2.0, "depth": 1, "block_norms": True} if variant in ("uw2", "sac2") else {}
        )
        s = testing.tiny(variant, **sizes)
        model = s.model()
        names = {id(p): name for name, p in model.named_parameters()}
        groups = s.runner.param_groups(model)
        rates.append({names[id(p)]: g.get("lr_scale", 1.0) for g in groups for p in g["params"]})
    for a, b in (rates[:2], rates[2:]):
        assert any(rate != 1.0 for rate in a.values())
        assert {n: r for n, r in a.items() if n in b} == {n: r for n, r in b.items() if n in a}


@pytest.mark.parametrize("act", ["gelu", "relu", "elu", "identity"])
def test_copies_of_the_unified_embedding_agree(act: str) -> None:
    tables: list[Tensor] = []
    for idea in ("ue", "sac1", "all1"):
        m = module(idea)
        c = m.Config(embed_dim=8, num_heads=2, front_embed_mul=3.0, mid_mul=2.0, front_act=act)
        embedding = seeded(m.UnifiedEmbedding(11, c))
        weights = [
            x for layer in (embedding.fc1, embedding.fc2) for x in (layer.weight, layer.bias)
        ]
        names = [
            f"tok_embed.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")
        ]
        tables.append(
            embedding.table(*([dict(zip(names, weights, strict=True))] if idea == "sac1" else []))
        )
    torch.testing.assert_close(tables[1], tables[0])
    torch.testing.assert_close(tables[2], tables[0])


@pytest.mark.parametrize("per_feature", [False, True])
def test_copies_of_the_learned_add_agree(per_feature: bool) -> None:
    x, f = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    outs = []
    for idea in ("lra", "all1"):
        m = module(idea)
        outs.append(
            seeded(m.LearnedAdd(m.Config(embed_dim=8, num_heads=2, per_feature=per_feature)))(x, f)
        )
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.startswith(("value_norm", "ue8x_value", "all1_value"))]
)
def test_value_norm_is_a_layer_norm_of_the_heads_values(variant: str) -> None:
    s = testing.tiny(variant, **({"where": "all"} if variant.startswith("value") else {}))
    attention = s.moved(torch.float64).blocks[0].attn
    norm = attention.norms["v"] if hasattr(attention, "norms") else attention.value_norm
    values = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    centred = (values - values.mean(-1, keepdim=True)) / (
        values.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(norm(values), centred * norm.weight + norm.bias)


def test_every_field_of_a_config_has_its_reason_beside_it() -> None:
    """A field that the baseline has not is explained on its line or above it."""
    base = {f.name for f in dataclasses.fields(module("gpt2ish").Config)}
    for source in SOURCES:
        if source.idea != "gpt2ish":
            text = source.path.read_text().splitlines()
            for name in set(source.config_fields) - base:
                (at,) = (i for i, line in enumerate(text) if line.startswith(f"    {name}:"))
                above = text[at - 1].strip().startswith("#")
                assert above or "  # " in text[at], f"{source.idea}: {name}"
