"""The baseline against software we did not write: the transformers library's GPT-2, and FLOPs by
formula."""

from __future__ import annotations

import math

import pytest
import torch

from lmplay import model as probe
from lmplay import testing
from lmplay.api import Batch


def transformers_gpt2(config, model):
    from transformers import GPT2Config, GPT2LMHeadModel

    c = config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.max_len,
            n_embd=c.embed_dim,
            n_layer=c.num_blocks,
            n_head=c.num_heads,
            activation_function="gelu",
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    ).double()
    own = model.state_dict()
    state = {
        "transformer.wte.weight": own["tok_embed.weight"],
        "transformer.wpe.weight": own["pos_embed.weight"],
    }
    for part in ("weight", "bias"):
        state[f"transformer.ln_f.{part}"] = own[f"ln.{part}"]
    for i in range(c.num_blocks):
        a = f"blocks.{i}"
        b = f"transformer.h.{i}"
        for part in ("weight", "bias"):
            for ours, name in (("ln1", "ln_1"), ("ln2", "ln_2")):
                state[f"{b}.{name}.{part}"] = own[f"{a}.{ours}.{part}"]
            qkv = torch.cat([own[f"{a}.attn.{n}.{part}"] for n in ("query", "key", "value")])
            state[f"{b}.attn.c_attn.{part}"] = qkv.t()
            for ours, name in (
                ("attn.proj", "attn.c_proj"),
                ("ff.fc1", "mlp.c_fc"),
                ("ff.fc2", "mlp.c_proj"),
            ):
                state[f"{b}.{name}.{part}"] = own[f"{a}.{ours}.{part}"].t()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"} | {
        m for m in missing if m.endswith((".attn.bias", ".masked_bias"))
    }
    return theirs.eval()


def test_logits_and_gradients_equal_the_transformers_librarys() -> None:
    s = testing.tiny("gpt2ish", tied=True, head_bias=False)
    model = s.model(dtype=torch.float64)
    theirs = transformers_gpt2(s.config, model)
    ids = s.batch().ids
    for t in (1, 5, s.config.max_len):
        logits, _ = s.runner.logits(model.eval(), ids[:, :t])
        torch.testing.assert_close(logits, theirs(ids[:, :t]).logits[:, -1], rtol=1e-10, atol=1e-10)
    theirs(ids, labels=ids).loss.backward()
    out = s.runner.step(model, Batch(ids[:, :-1], ids[:, 1:]))
    (out.loss_sum / out.n_tokens).backward()
    torch.testing.assert_close(model.tok_embed.weight.grad, theirs.transformer.wte.weight.grad)
    torch.testing.assert_close(
        model.blocks[0].ff.fc1.weight.grad, theirs.transformer.h[0].mlp.c_fc.weight.grad.t()
    )


def test_counted_flops_are_those_of_the_formula() -> None:
    s = testing.tiny("gpt2ish", embed_dim=32, max_len=24)
    c = s.config
    batch = s.batch(size=2)
    counted = probe.count_flops(s.runner, s.model(), batch)
    d = c.embed_dim
    t = c.max_len
    products = 6 * (c.num_blocks * 12 * d * d + d * c.vocab_size)
    # q kᵀ and weights·v forward; torch counts the flash backward as 5 products of that size, one
    # recomputed
    attention = c.num_blocks * (2 + 5) * 2 * t * d
    assert counted == pytest.approx(products + attention, rel=1e-6)


def test_initial_loss_is_that_of_a_uniform_guess() -> None:
    s = testing.tiny("gpt2ish", vocab_size=211)
    out = s.runner.step(s.model(), s.batch())
    assert float(out.loss_sum / out.n_tokens) == pytest.approx(math.log(211), abs=0.05)


def test_parameter_count_of_the_baseline_arena() -> None:
    s = testing.tiny(
        "gpt2ish", num_blocks=6, embed_dim=768, num_heads=12, max_len=1024, vocab_size=50257
    )
    model = s.runner.build()
    blocks = 6 * (12 * 768 * 768 + 13 * 768)
    expected = 50257 * 768 * 2 + 50257 + 1024 * 768 + blocks + 2 * 768
    assert sum(p.numel() for p in model.parameters()) == expected
