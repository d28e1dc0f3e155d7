"""What the ideas on `modern` compute, each against its paper's formula in plain form, or against a
maintained implementation."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay import discover, testing
from lmplay.api import IGNORE, Batch
from lmplay.ops.attention import naive_causal_attention as attention

T = 10


def module(idea: str) -> ModuleType:
    return discover.load(*discover.find(idea)).module


def norm(x: Tensor) -> Tensor:
    eps = torch.finfo(x.dtype).eps
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def heads(x: Tensor, n: int) -> Tensor:
    """(B, T, D) -> (B, n, T, D / n)."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class Case:
    """The model of a variant at a tiny size, as if trained, and inputs of its layers."""

    def __init__(self, variant: str, **settings: Any):
        self.subject = testing.tiny(variant, num_heads=2, max_len=16, **settings)
        self.c = self.subject.config
        self.module = self.subject.experiment.module
        self.model: Any = self.subject.moved(torch.float64).eval()
        self.block = self.model.blocks[0]
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(2, T, 16, dtype=torch.float64, generator=generator)
        self.ids = torch.randint(23, (2, T), generator=generator)
        if hasattr(self.module, "rotary_table"):
            self.rotary = self.module.rotary_table(self.c, 0, T, self.x)

    def qkv(self, block: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, of modern's attention."""
        attn = self.model.blocks[block].attn
        q, k, v = (heads(layer(self.x), 2) for layer in (attn.query, attn.key, attn.value))
        q, k = (self.module.rotate(norm(x), self.rotary) for x in (q, k))
        return q, k, v

    def layer_of(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Call an attention layer."""
        out: Tensor = layer(x, self.rotary, None)
        return out


# ---------------------------------------------------------------- positions


def test_learned_positions_are_added() -> None:
    case = Case("learned_position")
    model = case.model
    x = norm(model.tok_embed(case.ids) + model.pos_embed.weight[:T])
    for block in model.blocks:
        attn = block.attn
        y = norm(x)
        q, k, v = (heads(layer(y), 2) for layer in (attn.query, attn.key, attn.value))
        x = x + attn.proj(merged(attention(norm(q), norm(k), v)))
        x = x + block.ff.fc2(F.relu(block.ff.fc1(norm(x))) ** 2)
    close(model(case.ids), norm(x))


def test_alibi_is_blooms() -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    c = module("alibi").Config(num_heads=4, embed_dim=16)
    own = module("alibi").distance_biases(c, 0, T, torch.zeros(()))
    theirs = bloom.build_alibi_tensor(torch.ones(1, T), 4, torch.float32)  # (H, 1, T): of the key
    theirs = theirs + torch.full((T, T), float("-inf")).triu(1)
    torch.testing.assert_close(own.softmax(-1), theirs.softmax(-1))
    later = module("alibi").distance_biases(c, T - 2, 2, torch.zeros(()))
    assert torch.equal(later, own[:, -2:])


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_partial_rotations_are_gpt_neoxs(share: float) -> None:
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    m = module("partial_rope")
    c = m.Config(num_heads=2, embed_dim=32, rotary_share=share)
    x = torch.randn(2, 2, T, 16)
    cos, sin = m.rotary_table(c, 0, T, x)
    assert cos.shape[-1] == 8 * share
    theirs, _ = neox.apply_rotary_pos_emb(
        x, x, torch.cat([cos, cos], -1).unsqueeze(0), torch.cat([sin, sin], -1).unsqueeze(0)
    )
    torch.testing.assert_close(m.rotate(x, (cos, sin)), theirs)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("variant", ["gqa", "mqa"])
def test_grouped_queries_are_torchs(variant: str) -> None:
    case = Case(variant, num_kv_heads=1)
    attn = case.block.attn
    q = case.module.rotate(norm(heads(attn.query(case.x), 2)), case.rotary)
    k = case.module.rotate(norm(heads(attn.key(case.x), 1)), case.rotary)
    v = heads(attn.value(case.x), 1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    close(case.layer_of(attn, case.x), attn.proj(merged(out)))


def test_queries_and_keys_with_a_gain_and_without_a_norm() -> None:
    for variant, normed in (
        ("no_qk_norm", lambda x, gain: x),
        ("qk_gain", lambda x, g: norm(x) * g),
    ):
        case = Case(variant)
        attn = case.block.attn
        q, k, v = (heads(f(case.x), 2) for f in (attn.query, attn.key, attn.value))
        gains = [getattr(n, "weight", None) for n in (attn.query_norm, attn.key_norm)]
        q, k = (
            case.module.rotate(normed(x, g), case.rotary)
            for x, g in zip((q, k), gains, strict=True)
        )
        close(case.layer_of(attn, case.x), attn.proj(merged(attention(q, k, v))))


def test_values_are_mixed_with_the_first_blocks() -> None:
    case = Case("value_residual")
    first = case.qkv(0)[2]
    q, k, v = case.qkv(1)
    attn = case.model.blocks[1].attn
    a, b = attn.mix.shares
    out, kept = attn(case.x, case.rotary, None, first)
    close(out, attn.proj(merged(attention(q, k, a * v + b * first))))
    assert kept is first


def test_differential_attention_is_the_difference_of_two_maps() -> None:
    case = Case("differential")
    attn = case.model.blocks[1].attn
    q, k, v = case.qkv(1)
    (a1, b1), (a2, b2) = attn.share.vectors
    start = 0.8 - 0.6 * math.exp(-0.3)
    share = torch.exp(a1 @ b1) - torch.exp(a2 @ b2) + start
    both = torch.cat([v[:, 0], v[:, 1]], -1)  # (B, T, 2h): the values of the only pair
    one, two = (attention(q[:, i : i + 1], k[:, i : i + 1], both.unsqueeze(1)) for i in range(2))
    out = (1 - start) * norm(one - share * two) * attn.out_norm.weight
    close(case.layer_of(attn, case.x), attn.proj(out.squeeze(1)))


@pytest.mark.parametrize("variant", ["gated_attention", "gated_heads"])
def test_a_gate_multiplies_what_was_read(variant: str) -> None:
    case = Case(variant)
    attn = case.block.attn
    read = merged(attention(*case.qkv()))
    gate = torch.sigmoid(attn.gate(case.x))
    if variant == "gated_heads":
        gate = gate.repeat_interleave(8, -1)
    close(case.layer_of(attn, case.x), attn.proj(gate * read))


def test_a_sink_takes_a_part_of_the_weights() -> None:
    case = Case("zero_sink")
    q, k, v = case.qkv()
    scores = (q @ k.mT / math.sqrt(8)).exp().tril()
    weights = scores / (1 + scores.sum(-1, keepdim=True))
    close(case.layer_of(case.block.attn, case.x), case.block.attn.proj(merged(weights @ v)))
    case = Case("attention_sink")
    q, k, v = case.qkv()
    key, value = case.block.attn.sink.pair  # (1, H, 1, h)
    scores = (q @ k.mT / math.sqrt(8)).exp().tril()
    of_sink = (q @ key.mT / math.sqrt(8)).exp()
    read = (scores @ v + of_sink * value) / (scores.sum(-1, keepdim=True) + of_sink)
    close(case.layer_of(case.block.attn, case.x), case.block.attn.proj(merged(read)))


def test_a_temperature_divides_the_scores() -> None:
    case = Case("modern_focus")
    attn = case.block.attn
    q, k, v = case.qkv()
    s = 2 * torch.sigmoid(attn.temperature.weight @ case.x.mT + attn.temperature.bias.view(-1, 1))
    scores = q @ k.mT / (math.sqrt(8) * s.unsqueeze(-1))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    close(case.layer_of(attn, case.x), attn.proj(merged(weights @ v)))


def test_a_window_hides_what_is_far() -> None:
    case = Case("sliding_window", full_every=2, window=0.25)
    for block, window in ((0, 4), (1, T)):
        attn = case.model.blocks[block].attn
        q, k, v = case.qkv(block)
        distance = torch.arange(T).view(-1, 1) - torch.arange(T)
        scores = (q @ k.mT / math.sqrt(8)).exp() * ((distance >= 0) & (distance < window))
        weights = scores / scores.sum(-1, keepdim=True)
        close(case.layer_of(attn, case.x), attn.proj(merged(weights @ v)))


# ---------------------------------------------------------------- feed-forward layers


@pytest.mark.parametrize(
    ("variant", "width"), [("gelu", 64), ("relu", 64), ("ff_2x", 32), ("ff_8x", 128)]
)
def test_feed_forward_layers(variant: str, width: int) -> None:
    case = Case(variant)
    ff = case.block.ff
    inner = case.x @ ff.fc1.weight.T
    assert inner.shape[-1] == width
    formulas = {
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "relu": lambda x: x.clamp(min=0),
    }
    formula = formulas.get(variant, lambda x: x.clamp(min=0) ** 2)
    close(ff(case.x), formula(inner) @ ff.fc2.weight.T)


def test_swiglu_is_llamas() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    case = Case("swiglu")
    ff = case.block.ff
    config = llama.LlamaConfig(hidden_size=16, intermediate_size=43, num_attention_heads=2)
    theirs = llama.LlamaMLP(config).double()
    with torch.no_grad():
        theirs.gate_proj.weight.copy_(ff.fc1.weight)
        theirs.up_proj.weight.copy_(ff.gate.weight)
        theirs.down_proj.weight.copy_(ff.fc2.weight)
    close(ff(case.x), theirs(case.x))


@pytest.mark.parametrize("variant", ["moe", "moe_shared"])
def test_experts_token_by_token(variant: str) -> None:
    case = Case(variant)
    ff = case.block.ff
    ff.bias.copy_(torch.linspace(-0.2, 0.2, 8))
    rows = []
    for x in case.x.flatten(0, 1):
        scores = torch.sigmoid(ff.router.weight @ x)
        chosen = sorted(range(8), key=lambda e: float(scores[e] + ff.bias[e]))[-case.c.num_active :]
        out = torch.zeros_like(x)
        for expert in (*chosen, *range(8, 8 + case.c.num_shared)):
            inner = F.relu(ff.fc1[expert].weight @ x) ** 2
            out = out + (scores[expert] if expert < 8 else 1) * (ff.fc2[expert].weight @ inner)
        rows.append(out)
    close(ff(case.x).flatten(0, 1), torch.stack(rows))


def test_grouped_products_and_their_gradients_are_a_loops() -> None:
    product = module("moe").grouped_product
    x, weights = torch.randn(11, 8), torch.randn(3, 8, 16)
    ends = torch.tensor([4, 4, 11], dtype=torch.int32)  # the second group is empty
    results = []
    for dtype in (torch.float32, torch.float64):
        a, b = (v.to(dtype, copy=True).requires_grad_() for v in (x, weights))
        out = product(a, b, ends)
        out.square().sum().backward()
        results.append([v.float() for v in (out, a.grad, b.grad)])
    for fast, loop in zip(*results, strict=True):
        torch.testing.assert_close(fast, loop, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(4,), (1, 1, 2)])
def test_experts_are_balanced_by_the_loads_of_a_step(sizes: tuple[int, ...]) -> None:
    """Whatever the mini-batches: counted over a step, used after it."""
    case = Case("moe")
    model = case.model.train()
    batch = case.subject.batch()
    parts = zip(batch.ids.split(list(sizes)), batch.targets.split(list(sizes)), strict=True)
    chosen: list[Tensor] = []
    ff = case.block.ff
    hook = ff.router.register_forward_hook(
        lambda _, args, out: chosen.append((out.sigmoid() + ff.bias).topk(2).indices)
    )
    with case.subject.runner.fixed_weights(model):
        for ids, targets in parts:
            case.subject.runner.step(model, Batch(ids, targets))
        assert not ff.bias.any()
    hook.remove()
    load = torch.cat(chosen).flatten().bincount(minlength=8).double()
    load = load / load.sum()
    close(ff.load, load)
    close(ff.bias, 0.001 * torch.sign(1 / 8 - load))
    assert not ff.counts.any()


def test_the_loss_that_balances_experts() -> None:
    case = Case("moe_loss")
    model = case.model.train()
    for block in model.blocks:
        block.ff.load.copy_(torch.linspace(0.05, 0.2, 8))
    inputs: list[Tensor] = []
    for block in model.blocks:
        block.ff.router.register_forward_hook(lambda _, args, out: inputs.append(out.sigmoid()))
    out = case.subject.runner.step(model, Batch(case.ids, case.ids))
    expected = torch.zeros((), dtype=torch.float64)
    for scores in inputs:
        shares = (scores / scores.sum(-1, keepdim=True)).mean(0)
        expected = expected + 0.01 * 8 * (torch.linspace(0.05, 0.2, 8) * shares).sum()
    assert out.aux_loss is not None
    torch.testing.assert_close(out.aux_loss, expected)


# ---------------------------------------------------------------- norms and residuals


def parts_of(case: Case, x: Tensor) -> tuple[Tensor, Any]:
    """What the first block's attention adds to x, and its feed-forward layer."""
    return case.layer_of(case.block.attn, x), case.block.ff


def test_parallel_blocks_read_the_same_state() -> None:
    case = Case("parallel_blocks")
    added, ff = parts_of(case, norm(case.x))
    close(case.block(case.x, case.rotary, None), case.x + added + ff(norm(case.x)))


def test_post_norm_normalizes_the_sum() -> None:
    case = Case("post_norm")
    added, ff = parts_of(case, case.x)
    x = norm(case.x + added)
    close(case.block(case.x, case.rotary, None), norm(x + ff(x)))


def test_sandwich_norm_normalizes_what_is_added() -> None:
    case = Case("sandwich_norm")
    added, ff = parts_of(case, norm(case.x))
    x = case.x + case.block.attn_norm.weight * norm(added)
    expected = x + case.block.ff_norm.weight * norm(ff(norm(x)))
    close(case.block(case.x, case.rotary, None), expected)
    fresh: Any = case.subject.model(dtype=torch.float64)
    close(fresh.blocks[0](case.x, case.rotary, None), case.x)


def test_layer_norm_subtracts_the_mean() -> None:
    case = Case("layer_norm")

    def normed(x: Tensor, layer: Any) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    added, ff = parts_of(case, normed(case.x, case.block.attn_norm))
    x = case.x + added
    close(case.block(case.x, case.rotary, None), x + ff(normed(x, case.block.ff_norm)))


def test_dynamic_tanh_squashes() -> None:
    case = Case("dynamic_tanh")

    def squashed(x: Tensor, layer: Any) -> Tensor:
        return layer.weight * torch.tanh(layer.scale * x) + layer.bias

    added, ff = parts_of(case, squashed(case.x, case.block.attn_norm))
    x = case.x + added
    close(case.block(case.x, case.rotary, None), x + ff(squashed(x, case.block.ff_norm)))


def test_a_learned_add_scales_both_parts() -> None:
    case = Case("modern_lra")
    added, ff = parts_of(case, norm(case.x))
    (a, b), (c, d) = (
        0.4 + 1.1 * torch.sigmoid(add.shares) for add in (case.block.attn_add, case.block.ff_add)
    )
    x = a * case.x + b * added
    close(case.block(case.x, case.rotary, None), c * x + d * ff(norm(x)))
    fresh: Any = case.subject.model().blocks[0].attn_add
    torch.testing.assert_close(fresh(torch.ones(3), torch.zeros(3)), torch.ones(3))


def test_hyper_connections_are_the_papers() -> None:
    """Algorithm 2 of Zhu et al. 2024, position by position."""
    case = Case("hyper_connections")
    n = case.c.streams
    streams = torch.randn(2, T, n, 16, dtype=torch.float64)
    connection = case.block.ff_connection
    own = connection(streams, case.block.ff)
    static = connection.static[0]
    for b in range(2):
        for t in range(T):
            h = streams[b, t]  # (n, D)
            h_norm = norm(h)
            alpha = static[:, :-1] + connection.scale[0] * torch.tanh(
                h_norm @ connection.weight[:, :-1]
            )
            beta = static[:, -1] + connection.scale[1] * torch.tanh(
                h_norm @ connection.weight[:, -1]
            )
            mix = alpha.T @ h  # (1 + n, D)
            out = case.block.ff(norm(mix[0]))
            close(own[b, t], mix[1:] + torch.outer(beta, out))
    fresh: Any = case.subject.model().blocks[1]  # its layers are numbers 2 and 3
    assert fresh.attn_connection.static[0].tolist() == [[1, 1, 0, 1], [0, 0, 1, 1]]
    assert fresh.ff_connection.static[0].tolist() == [[0, 1, 0, 1], [1, 0, 1, 1]]


# ---------------------------------------------------------------- embeddings and heads


def test_tied_heads_are_the_embedding() -> None:
    case = Case("tied")
    assert case.model.head.weight is case.model.tok_embed.weight
    assert "head.weight" not in dict(case.model.named_parameters())
    assert float(case.subject.model().tok_embed.weight.std()) == pytest.approx(0.02, rel=0.2)


def test_softcap_of_the_logits() -> None:
    case = Case("softcap", cap=1.5)
    batch = Batch(case.ids, case.ids.roll(-1, 1).clone())
    batch.targets[:, -1] = IGNORE
    logits = 1.5 * torch.tanh(case.model(case.ids) @ case.model.head.weight.T / 1.5)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    close(case.subject.runner.step(case.model, batch).loss_sum, expected)


def test_z_loss_is_the_square_of_log_z() -> None:
    case = Case("z_loss", z_weight=0.5)
    targets = case.ids.clone()
    targets[0, :4] = IGNORE
    out = case.subject.runner.step(case.model.train(), Batch(case.ids, targets))
    z = torch.logsumexp(case.model(case.ids) @ case.model.head.weight.T, -1).square()
    expected = 0.5 * (z[0, 4:].mean() + z[1].mean()) / 2
    assert out.aux_loss is not None
    torch.testing.assert_close(out.aux_loss, expected, rtol=1e-6, atol=0)  # weights are float32


def test_the_token_after_the_next_is_predicted() -> None:
    case = Case("multi_token", ahead_weight=0.5)
    model = case.model.train()
    targets = case.ids.roll(-1, 1)
    out = case.subject.runner.step(model, Batch(case.ids, targets))
    _, ahead = model(case.ids, both=True)
    logits = ahead[:, :-1] @ model.head.weight.T
    expected = 0.5 * F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
    assert out.aux_loss is not None
    close(out.aux_loss, expected)
    assert not any("ahead" in n for n, _ in case.subject.runner.fold(model).named_parameters())


def test_ngrams_are_hashed_one_by_one() -> None:
    case = Case("ngram_embeddings", buckets=3)
    model = case.model
    rows = 3 * case.c.vocab_size
    for b in range(2):
        for t in range(T):
            text = [0, 0, *case.ids[b].tolist()][: t + 3]
            pair = (text[-1] + text[-2] * 1_000_003) % rows
            triple = (text[-1] + text[-2] * 1_000_003 + text[-3] * 1_000_003**2) % rows
            expected = (
                model.tok_embed.weight[text[-1]]
                + model.grams[0].weight[pair]
                + model.grams[1].weight[triple]
            )
            close(model.embed(case.ids, None)[b, t], expected)


# ---------------------------------------------------------------- mixing tokens


def test_canon_is_a_depthwise_convolution() -> None:
    case = Case("canon")
    canon = case.block.attn_canon
    weight = canon.weight.flip(0).squeeze(1).T.unsqueeze(1)  # (D, 1, 4), oldest first
    mixed = F.conv1d(F.pad(case.x.mT, (3, 0)), weight, groups=16).mT
    close(canon(case.x, None), case.x + mixed)


def random_scan(length: int) -> list[Tensor]:
    q, k, v = (torch.randn(2, 3, length, 4, dtype=torch.float64) for _ in range(3))
    log_a = -torch.rand(2, 3, length, 1, dtype=torch.float64)
    b = torch.rand(2, 3, length, 1, dtype=torch.float64)
    state = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    return [q, F.normalize(k, dim=-1), v, log_a, b, state]


@pytest.mark.parametrize("length", [1, 5, 64, 150])
def test_the_chunked_delta_rule_is_the_recurrence(length: int) -> None:
    m = module("deltanet")
    results = []
    for scan in (m.naive_scan, m.chunked_scan):
        torch.manual_seed(0)
        inputs = [x.requires_grad_() for x in random_scan(length)]
        out, state = scan(*inputs)
        (out.sin().sum() + state.square().sum()).backward()
        results.append([out, state, *(x.grad for x in inputs)])
    for naive, chunked in zip(*results, strict=True):
        torch.testing.assert_close(naive, chunked, rtol=1e-9, atol=1e-9)


def test_the_delta_rule_is_that_of_transformers() -> None:
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, log_a, b, _ = (x.float() for x in random_scan(T))
    theirs, last = qwen.torch_recurrent_gated_delta_rule(
        *(x.transpose(1, 2) for x in (q, k, v, log_a.squeeze(-1), b.squeeze(-1))),
        initial_state=torch.zeros(2, 3, 4, 4),
        output_final_state=True,
    )
    own, state = module("deltanet").chunked_scan(q / 2, k, v, log_a, b, torch.zeros(2, 3, 4, 4))
    torch.testing.assert_close(own, theirs.transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_memory_is_a_mixture_of_cells() -> None:
    case = Case("modern_nnm", cells=5)
    memory = case.model.blocks[1].memory
    scores = heads(F.gelu(case.x @ memory.fc1.weight.T) @ memory.fc2.weight.T, 2)
    read = scores.softmax(-1) @ memory.table
    close(memory(case.x), merged(read) @ memory.proj.weight.T)


@pytest.mark.parametrize("idea", ["modern_uw", "modern_sac"])
def test_unified_weights_against_their_formula(idea: str) -> None:
    case = Case(idea)
    layer = case.block.ff.fc1
    expected = torch.empty_like(layer.weight)
    for i in range(64):
        for j in range(16):
            by_row = layer.weight[i, j] * layer.m_out[i] + layer.a_out[i]
            expected[i, j] = by_row * layer.m_in[j] + layer.a_in[j]
    close(layer(case.x), case.x @ expected.T)


def test_sacrificial_weights_fold_into_modern() -> None:
    case = Case("modern_sac")
    shapes = {k: v.shape for k, v in Case("modern").model.state_dict().items()}
    assert {
        k: v.shape for k, v in case.subject.runner.fold(case.model).state_dict().items()
    } == shapes


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("shape", [(6, 4), (1200, 3), (5,)])
def test_soap_is_that_of_a_maintained_package(shape: tuple[int, ...]) -> None:
    package = pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    start = torch.randn(shape)
    a, b = (nn.Parameter(start.clone()) for _ in range(2))
    own = module("soap").Soap([{"params": [a], "lr": 0.05, "weight_decay": 0.1}])
    theirs = package.SOAP([b], lr=0.05, weight_decay=0.1, max_precondition_dim=1000)
    target = torch.randn(shape)
    for step in range(25):  # two changes of the basis
        for p, optimizer in ((a, own), (b, theirs)):
            p.grad = (p.detach() - target) * (1 + torch.arange(shape[-1]) + step % 3)
            optimizer.step()
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
