"""Sampling, sliding past the window, several samples in one batch, and the command."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import Command, write_plan

from lmplay import testing
from lmplay.data.tokenizers import Bytes
from lmplay.decoding import Sampling, TextStream, choose, generate
from lmplay.errors import LmplayError

GREEDY = Sampling(do_sample=False)


def run(
    subject: testing.Subject, prompt: list[int], n: int, how: Sampling = GREEDY, **options
) -> list[list[int]]:
    model = subject.model()
    tokens = generate(
        subject.runner,
        model,
        prompt,
        n,
        subject.config.max_len,
        subject.config.vocab_size,
        how,
        **options,
    )
    return list(tokens)


@pytest.mark.parametrize("variant", ["gpt2ish", "value_norm", "ue"])
def test_greedy_is_the_argmax_of_full_passes_also_past_the_window(variant: str) -> None:
    subject = testing.tiny(variant)
    window = subject.config.max_len
    got = [row[0] for row in run(subject, [1, 2, 3], 3 * window)]
    model = subject.model().eval()
    context = [1, 2, 3]
    held = [1, 2, 3]
    for token in got:
        if len(held) > window:
            held = context[-(window // 2) :]
        with torch.no_grad():
            logits, _ = subject.runner.logits(model, torch.tensor([held]))
        assert int(logits.argmax()) == token
        context.append(token)
        held = [*held, token]


def test_prompt_longer_than_the_window() -> None:
    subject = testing.tiny("gpt2ish")
    assert len(run(subject, list(range(20)), 5)) == 5


def test_samples_of_a_batch_differ_and_a_seed_repeats_them() -> None:
    subject = testing.tiny("gpt2ish")
    how = Sampling()
    a = run(subject, [1], 10, how, num_samples=3, seed=4)
    assert a == run(subject, [1], 10, how, num_samples=3, seed=4)
    assert a != run(subject, [1], 10, how, num_samples=3, seed=5)
    columns = list(zip(*a, strict=True))
    assert len(set(columns)) == 3


def test_end_of_text_ends() -> None:
    subject = testing.tiny("gpt2ish")
    first = run(subject, [1], 1)[0][0]
    assert run(subject, [1], 10, eot=first) == [[first]]


def test_choose() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4000, 1)
    seen = torch.zeros(4000, 4, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)

    def drawn(**options: float) -> torch.Tensor:
        return (
            torch.bincount(choose(logits, seen, Sampling(**options), generator), minlength=4) / 4000
        )  # type: ignore[arg-type]

    expected = logits[0].softmax(0)
    torch.testing.assert_close(drawn(), expected, atol=0.03, rtol=0)
    torch.testing.assert_close(
        drawn(temperature=0.5), (2 * logits[0]).softmax(0), atol=0.03, rtol=0
    )
    assert drawn(top_k=2)[:2].sum() == 0
    assert drawn(temperature=1e-40)[3] == 1, "as cold as a float can be"
    # probabilities .032 .087 .237 .644: .6 is reached by the first alone, .7 by the first two
    assert (drawn(top_p=0.6) > 0).tolist() == [False, False, False, True]
    assert (drawn(top_p=0.7) > 0).tolist() == [False, False, True, True]
    seen[:, 3] = True
    penalised = choose(logits, seen, Sampling(do_sample=False, repetition_penalty=2.0), None)
    assert set(penalised.tolist()) == {2}


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": 0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.nan},
    ],
)
def test_bad_sampling_is_refused(bad: dict) -> None:
    with pytest.raises(LmplayError):
        Sampling(**bad)


def test_streaming_holds_back_half_characters() -> None:
    tokenizer = Bytes()
    stream = TextStream(tokenizer)
    pieces = [stream.add(i) for i in tokenizer.encode("añ🙂")]
    assert pieces == ["a", "", "ñ", "", "", "", "🙂"]
    assert stream.end() == ""


def test_command(command: Command, tmp_path: Path) -> None:
    write_plan(tmp_path)
    assert (
        command(
            "lmp_trainer", "--exp", "ue", "--training-plan", "tiny.json", "--mini-batch-size", "8"
        ).returncode
        == 0
    )
    sample = ("--do-sample", "--max-len", "8", "--num-samples", "2", "--top-k", "20", "--seed", "3")
    first = command("lmp_generator", "the quick", *sample)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("the quick") == 2
    (tmp_path / "prompt.txt").write_text("the quick")
    run_folder = "gpt_out/tiny/ue-s0"
    again = command("lmp_generator", "prompt.txt", "--model", run_folder, *sample)
    assert again.stdout == first.stdout
    newest = sorted((tmp_path / run_folder / "checkpoints").iterdir())[-1]
    assert (
        command("lmp_generator", "the quick", "--model", str(newest), *sample).stdout
        == first.stdout
    )
