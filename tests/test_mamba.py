"""Mamba and Mamba-2 against the transformers library's classes, and each scan against the loop over
time."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, write_plan
from torch import Tensor

from lmplay import discover, testing
from lmplay import model as probe
from lmplay.api import Batch
from lmplay.data.tokenizers import train_bpe
from lmplay.decoding import Sampling, generate
from lmplay.errors import LmplayError
from lmplay.export.hf import form_of, write_hf

MAMBA, MAMBA2 = (discover.load(*discover.find(name)).module for name in ("mamba", "mamba2"))
BOTH = ["mamba", "mamba2"]


def library(s: testing.Subject, model: torch.nn.Module) -> torch.nn.Module:
    """The transformers library's model with our weights."""
    import transformers

    form = s.runner.to_hf(model)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(form.model_type, **form.config, pad_token_id=None)
    )
    own = dict(model.named_parameters())
    missing, unexpected = theirs.load_state_dict(
        {t: own[o] for t, o in form.names.items()}, strict=False
    )
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    theirs.tie_weights()
    return theirs.eval()


@pytest.mark.parametrize("variant", BOTH)
def test_logits_and_gradients_equal_the_transformers_librarys(variant: str) -> None:
    s = testing.tiny(variant, max_len=70)  # more than one chunk of either scan
    model = s.moved()
    theirs = library(s, model)
    batch = s.batch()
    form = s.runner.to_hf(model)
    logits = theirs(batch.ids).logits
    torch.testing.assert_close(model.head(model(batch.ids)), logits, rtol=1e-4, atol=1e-4)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"
    )
    loss.backward()
    s.runner.step(model, batch).loss_sum.backward()
    gradients = dict(theirs.named_parameters())
    own = dict(model.named_parameters())
    for name, ours in form.names.items():
        scale = float(gradients[name].grad.abs().max())
        torch.testing.assert_close(
            own[ours].grad, gradients[name].grad, rtol=1e-3, atol=1e-4 * scale, msg=name
        )


@pytest.mark.parametrize("variant", BOTH)
def test_weights_come_back_from_the_transformers_library(variant: str) -> None:
    """The names map both ways: a model of theirs, as they start it, in our form."""
    s = testing.tiny(variant)
    theirs = library(s, s.model())
    torch.manual_seed(7)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model = s.model(seed=1)
    state = theirs.state_dict()
    names = s.runner.to_hf(model).names
    assert set(names.values()) == {n for n, _ in model.named_parameters()}
    model.load_state_dict({ours: state[name] for name, ours in names.items()}, strict=False)
    ids = s.batch().ids
    torch.testing.assert_close(model.head(model(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("variant", "millions"), [("mamba", 100.1), ("mamba_735m", 735.2)])
def test_parameter_counts(variant: str, millions: float) -> None:
    experiment = discover.load(*discover.find(variant))
    config = experiment.config_type(**experiment.source.variants[variant], vocab_size=12515)
    with torch.device("meta"):
        count, _ = probe.parameter_counts(
            experiment.runner(config), experiment.runner(config).build()
        )
    assert round(count / 1e6, 1) == millions


# ---------------------------------------------------------------- the scans


def inputs1(length: int, size: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, dt, A_log, B, C, D, z, dt_bias, state of Mamba-1's scan."""
    shapes = [
        (2, length, 6),
        (2, length, 6),
        (6, 4),
        (2, length, 4),
        (2, length, 4),
        (6,),
        (2, length, 6),
        (6,),
        (2, 4, 6),
    ]
    made = [torch.randn(shape, dtype=dtype) for shape in shapes]
    made[1] *= size
    return made


def inputs2(length: int, size: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, delta, A, B, C, state of Mamba-2's."""
    shapes = [(2, length, 3, 4), (2, length, 3), (3,), (2, length, 5), (2, length, 5), (2, 3, 4, 5)]
    made = [torch.randn(shape, dtype=dtype) for shape in shapes]
    made[1] = size * made[1].abs() ** 4
    made[2] = -made[2].abs()
    return made


SCANS = [(MAMBA, inputs1), (MAMBA2, inputs2)]


def run(
    scan: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, last state, and the gradients of the inputs but the state."""
    leaves = [v.clone().requires_grad_() for v in inputs[:-1]]
    out, state = scan(*leaves, inputs[-1])
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    return out.detach(), state.detach(), list(torch.autograd.grad((out * weights).sum(), leaves))


@pytest.mark.parametrize(("module", "inputs"), SCANS, ids=BOTH)
@pytest.mark.parametrize("length", [1, 2, 5, 16, 17, 64, 65, 150])
def test_chunked_scan_is_the_loop(
    module: Any, inputs: Callable[..., list[Tensor]], length: int
) -> None:
    given = inputs(length, 1.0)
    expected = run(module.naive_scan, given)
    got = run(module.chunked_scan, given)
    for a, b in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("module", "inputs"), SCANS, ids=BOTH)
@pytest.mark.parametrize("size", [1e-6, 30.0, 1e4])
def test_extreme_steps(module: Any, inputs: Callable[..., list[Tensor]], size: float) -> None:
    """From hardly moving to forgetting all at once: finite, and still the loop."""
    given = inputs(100, size)
    expected = run(module.naive_scan, given)
    got = run(module.chunked_scan, given)
    for a, b in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
        assert bool(a.isfinite().all())
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * max(1.0, float(b.abs().max())))
    single = run(module.chunked_scan, [v.float() for v in given])
    for a, b in zip((*single[:2], *single[2]), (*expected[:2], *expected[2]), strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=2e-3, atol=2e-3 * max(1.0, float(b.abs().max()))
        )


@pytest.mark.parametrize(("module", "inputs"), SCANS, ids=BOTH)
def test_bf16_keeps_its_state_in_float32(module: Any, inputs: Callable[..., list[Tensor]]) -> None:
    """Inputs of bf16 under autocast: states are float32, and the output is bf16's rounding away
    from float64's."""
    wide = inputs(300, 0.05)
    narrow = [v.bfloat16() if v.ndim >= 3 and v.dtype == torch.float64 else v.float() for v in wide]
    narrow[-1] = wide[-1].float()
    if module is MAMBA2:
        narrow[1] = wide[1].float()  # delta is float32 by then
    exact, state, _ = run(module.naive_scan, [v.double() for v in narrow])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, last = module.chunked_scan(*narrow)
    assert out.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    error = 0.002 if module is MAMBA else 0.02  # Mamba-2's products are bf16's
    assert float((last - state).norm() / state.norm()) < (1e-5 if module is MAMBA else 0.02)
    assert float((out - exact).norm() / exact.norm()) < error + 2**-8


def test_memory_does_not_grow_with_length_times_states() -> None:
    """Kept for the backward pass are the inputs and one state a chunk: sqrt(T) of them."""

    def kept(states: int, length: int) -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        e = 32
        shapes = [
            (1, length, e),
            (1, length, e),
            (e, states),
            (1, length, states),
            (1, length, states),
            (e,),
        ]
        made = [torch.randn(s).requires_grad_() for s in (*shapes, (1, length, e), (e,))]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            MAMBA.chunked_scan(*made, torch.zeros(1, states, e))
        own = {v.untyped_storage().data_ptr() for v in made}
        return sum(n for pointer, n in sizes.items() if pointer not in own) // 4 // e

    for length in (100, 1600):
        for states in (4, 64):
            assert kept(states, length) == math.isqrt(length) * states


def test_copies_of_the_convolution_agree_and_are_a_convolution() -> None:
    for width, length, begins in itertools.product((1, 4), (1, 2, 3, 9), (True, False)):
        conv = torch.nn.Conv1d(6, 6, width, groups=6).double()
        x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
        past = torch.randn(2, width - 1, 6, dtype=torch.float64) * (not begins)
        padded = torch.cat([past, x], 1)
        plain = torch.nn.functional.silu(conv(padded.transpose(1, 2))).transpose(1, 2)
        wanted = torch.autograd.grad(plain.square().sum(), [x, conv.weight, conv.bias])
        for module in (MAMBA, MAMBA2):
            out, after = module.causal_conv(x, conv, None if begins else past)
            torch.testing.assert_close(out, plain)
            torch.testing.assert_close(after, padded[:, length:])
            got = torch.autograd.grad(out.square().sum(), [x, conv.weight, conv.bias])
            torch.testing.assert_close(got, wanted)


# ---------------------------------------------------------------- kernels


def fake(monkeypatch: pytest.MonkeyPatch, path: str, **functions: Any) -> None:
    """A package that is not installed here, with functions that follow its documentation."""
    parts = path.split(".")
    for i in range(len(parts)):
        module = types.ModuleType(".".join(parts[: i + 1]))
        module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, function in functions.items():
        setattr(module, name, function)


def test_mamba_kernel_is_called_as_its_documentation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """u, delta, z (B, E, T), A (E, N), B and C (B, N, T), as in mamba-ssm's own plain reference."""

    def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        assert delta_softplus
        assert return_last_state
        step = torch.nn.functional.softplus(delta + delta_bias[:, None])
        h = torch.zeros(len(u), *A.shape, dtype=u.dtype)
        ys = []
        for t in range(u.shape[2]):
            h = (
                torch.exp(step[:, :, t, None] * A) * h
                + (step * u)[:, :, t, None] * B[:, None, :, t]
            )
            ys.append((h * C[:, None, :, t]).sum(-1))
        return (torch.stack(ys, 2) + u * D[:, None]) * torch.nn.functional.silu(z), h

    fake(monkeypatch, "mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan_fn)
    given = inputs1(9, 1.0)
    given[-1] = torch.zeros_like(given[-1])
    torch.testing.assert_close(run(MAMBA.kernel_scan, given), run(MAMBA.naive_scan, given))
    monkeypatch.setattr(MAMBA, "INSTALLED", True)
    assert MAMBA.has_kernel(torch.device("cuda"))
    assert not MAMBA.has_kernel(torch.device("cpu"))


def test_mamba2_kernels_are_called_as_their_documentation_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chunk_simple_gla(q, k, v, g, scale, initial_state, output_final_state):
        """q, k (B, T, H, K), v (B, T, H, V), g (B, T, H) log decays; states (B, H, K, V)."""
        assert output_final_state
        h = initial_state
        ys = []
        for t in range(q.shape[1]):
            h = g[:, t].exp()[..., None, None] * h + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            ys.append(scale * (q[:, t].unsqueeze(-1) * h).sum(-2))
        return torch.stack(ys, 1), h

    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, initial_states, return_final_states):
        """x (B, T, H, P), dt (B, T, H), B and C (B, T, groups, N); states (B, H, P, N)."""
        assert return_final_states
        assert chunk_size in (64, 128, 256)
        return MAMBA2.naive_scan(x, dt, A, B.squeeze(2), C.squeeze(2), initial_states)

    given = inputs2(9, 1.0)
    expected = run(MAMBA2.naive_scan, given)
    fake(
        monkeypatch,
        "mamba_ssm.ops.triton.ssd_combined",
        mamba_chunk_scan_combined=mamba_chunk_scan_combined,
    )
    fake(monkeypatch, "fla.ops.simple_gla", chunk_simple_gla=chunk_simple_gla)
    for package in ("mamba-ssm", "flash-linear-attention"):
        monkeypatch.setattr(MAMBA2, "INSTALLED", package)
        assert MAMBA2.kernel_name(torch.device("cuda")) == package
        assert MAMBA2.kernel_name(torch.device("cpu")) is None
        torch.testing.assert_close(run(MAMBA2.kernel_scan, given), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("module", "inputs", "packages"),
    [
        (MAMBA, inputs1, {True: "mamba_ssm"}),
        (MAMBA2, inputs2, {"mamba-ssm": "mamba_ssm", "flash-linear-attention": "fla"}),
    ],
    ids=BOTH,
)
def test_real_kernels_are_the_loop(
    module: Any,
    inputs: Callable[..., list[Tensor]],
    packages: dict[Any, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Output, state and gradients of every kernel that is installed here."""
    there = {value: name for value, name in packages.items() if importlib.util.find_spec(name)}
    if not there:
        pytest.skip(f"none of {', '.join(packages.values())} is installed")
    given = [v.float().cuda() for v in inputs(300, 0.1)]
    given[-1].zero_()
    out, state, gradients = run(module.naive_scan, given)
    for value in there:
        monkeypatch.setattr(module, "INSTALLED", value)
        got = run(module.kernel_scan, given)
        for a, b in zip((*got[:2], *got[2]), (out, state, *gradients), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * max(1.0, float(b.abs().max())))


def test_which_scan_runs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    cuda = torch.device("cuda")
    for module, nothing, package in ((MAMBA, False, True), (MAMBA2, None, "mamba-ssm")):
        runner = module.Runner(module.Config())
        monkeypatch.setattr(module, "INSTALLED", nothing)
        assert runner.notes(cpu) == ["scan: chunked (there is no kernel for cpu)"]
        [line] = runner.notes(cuda)
        assert line.startswith("scan: chunked. ")
        assert "mamba-ssm is" in line or "mamba-ssm nor" in line
        assert "installed: " in line
        monkeypatch.setattr(module, "INSTALLED", package)
        assert runner.notes(cuda) == ["scan: kernel (mamba-ssm)"]
        assert runner.notes(cpu) == ["scan: chunked (there is no kernel for cpu)"]
        assert module.Runner(module.Config(scan="naive")).notes(cuda) == ["scan: naive"]


# ---------------------------------------------------------------- in use


@pytest.mark.parametrize("variant", BOTH)
def test_decoding_goes_on_past_max_len_with_a_state_that_does_not_grow(variant: str) -> None:
    s = testing.tiny(variant)
    model = s.model().eval()
    length = 3 * s.config.max_len
    got = [
        row[0]
        for row in generate(
            s.runner, model, [1, 2, 3], length, s.runner.window(), 23, Sampling(False)
        )
    ]
    ids = torch.tensor([[1, 2, 3, *got]])
    with torch.no_grad():
        logits = model.head(model(ids))[0, 2:-1]
        cache = s.runner.new_cache(model, 1, 1)
        sizes = []
        for t in range(length):
            _, cache = s.runner.logits(model, ids[:, t : t + 1], cache)
            sizes.append(sum(v.numel() for v in (*cache.inputs, *cache.states)))
    assert got == logits.argmax(-1).tolist()
    assert len(set(sizes)) == 1


def test_the_hybrid_has_both_kinds_of_block_and_a_window() -> None:
    s = testing.tiny("hybrid", num_blocks=4)
    kinds = [type(block.mixer).__name__ for block in s.model().blocks]
    assert kinds == ["Mixer", "Attention", "Mixer", "Attention"]
    assert s.runner.window() == s.config.max_len
    assert s.runner.to_hf(s.model()) is None


@pytest.mark.parametrize("variant", BOTH)
def test_the_hf_folder_is_the_model(variant: str, command: Command, tmp_path: Path) -> None:
    """Trained, written by lmp_cleanmodel, and read by the transformers library: the same greedy
    text."""
    plan = write_plan(tmp_path, tokenizer={"kind": "bpe", "vocab_size": 300})
    assert command("lmp_trainer", "--exp", variant, "--training-plan", str(plan)).returncode == 0
    run = f"gpt_out/tiny/{variant}-s0"
    done = command("lmp_cleanmodel", run, "--format", "hf", "--out", "hf")
    assert done.returncode == 0, done.stderr
    assert f"the transformers library's {variant}" in done.stdout
    text = command("lmp_generator", "the quick", "--model", run, "--max-len", "20").stdout.rstrip(
        "\n"
    )
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("the quick", return_tensors="pt", add_special_tokens=False).input_ids
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
    )
    assert tokenizer.decode(out[0], skip_special_tokens=True).rstrip() == text.rstrip()
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == variant
    refused = command("lmp_cleanmodel", run, "--format", "gguf")
    assert refused.returncode == 1
    assert f"--format hf writes this {variant}" in refused.stderr


def test_a_form_that_does_not_fit_is_told(tmp_path: Path) -> None:
    s = testing.tiny("mamba")
    model = s.model()
    form = form_of(s.experiment, s.runner, model)
    short = dataclasses.replace(form, tensors=dict(list(form.tensors.items())[1:]))
    with pytest.raises(LmplayError, match="has other parameters"):
        write_hf(tmp_path / "hf", short, train_bpe(["a b"], 257), 12)


@pytest.mark.parametrize("variant", ["mamba", "mamba2"])
def test_long_contexts_train_without_special_care(
    variant: str, command: Command, tmp_path: Path
) -> None:
    """A plan of 8192 positions, in less memory than one tensor (T, H, T) or (T, E, N) a head or
    state would take."""
    sizes = {"num_blocks": 1, "embed_dim": 16, "num_heads": 2, "max_len": 8192, "dropout": 0.0}
    steps = [{"step_name": "words", "datasets": ["words"], "steps": 2}]
    batch = {"batch_size": 1, "grad_clip": 1.0}
    plan = write_plan(tmp_path, model=sizes, steps=steps, batch=batch)
    done = command(
        "lmp_trainer", "--exp", variant, "--training-plan", str(plan), "--mini-batch-size", "1"
    )
    assert done.returncode == 0, done.stderr
    assert "tokens: 16384" in done.stdout
    s = testing.tiny(variant, num_blocks=1, max_len=8192, state_dim=128)
    ids = torch.zeros(1, 8192).long()
    kept = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal kept
        kept += t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        s.runner.step(s.model(), Batch(ids, ids))
    # half of the states of all positions, which naive scans keep several times
    assert kept < 8192 * 32 * 128 / 2


def test_a_text_read_in_pieces_is_the_text() -> None:
    """States of either scan are carried, over more positions than a chunk has."""
    for variant in (*BOTH, "hybrid"):
        s = testing.tiny(variant, max_len=90)
        model = s.moved(torch.float64).eval()
        ids = s.batch().ids
        cache = s.runner.new_cache(model, len(ids), 90)
        with torch.no_grad():
            whole, _ = s.runner.logits(model, ids)
            s.runner.logits(model, ids[:, :70], cache)
            pieces, _ = s.runner.logits(model, ids[:, 70:], cache)
        torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-10)
