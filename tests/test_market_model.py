"""The market transformer: its cache without end against full passes, and what each switch
changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmplay.testing import Subject, tiny

PIECE = 3


def subject(**settings: Any) -> Subject:
    return tiny("market_modern", embed_dim=24, num_heads=6, max_len=1 + 4 * PIECE, **settings)


def logits(s: Subject, model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return s.runner.logits(model, ids)[0]


@pytest.mark.parametrize("sink", [True, False])
def test_stream_is_a_full_pass_until_something_leaves(sink: bool) -> None:
    s = subject(sink=sink)
    model = s.moved(torch.float64).eval()
    ids = s.batch(3).ids
    stream = s.runner.new_stream(model, 3, 1 + 4 * PIECE)
    at = 0
    with torch.no_grad():
        for t in (1, PIECE, 1, 2, 5):
            out, stream = s.runner.logits(model, ids[:, at : at + t], stream)
            at += t
            torch.testing.assert_close(out, logits(s, model, ids[:, :at]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sink", [True, False])
def test_one_layer_after_the_first_left_is_a_fresh_pass_over_sink_and_window(sink: bool) -> None:
    """In one layer nothing of what left lives on in the others, so a pass over what is held says
    the same."""
    s = subject(num_blocks=1, sink=sink)
    model = s.moved(torch.float64).eval()
    ids = torch.randint(s.config.vocab_size, (2, 1 + 30 * PIECE))
    stream = s.runner.new_stream(model, 2, 1 + 4 * PIECE)
    with torch.no_grad():
        s.runner.logits(model, ids[:, :1], stream)
        for at in range(1, ids.shape[1], PIECE):
            stream.make_room(PIECE, PIECE)
            for i in range(at, at + PIECE):
                out, stream = s.runner.logits(model, ids[:, i : i + 1], stream)
                first = max(1, at - 3 * PIECE)
                held = torch.cat([ids[:, :1], ids[:, first : i + 1]], 1)
                torch.testing.assert_close(out, logits(s, model, held), rtol=1e-9, atol=1e-11)
                assert int((stream.length - stream.gone).max()) <= stream.max_len


def test_rows_go_their_own_ways_and_a_roll_back_leaves_no_trace() -> None:
    """Rows that are rolled back again and again read on as if nothing had been."""
    s = subject()
    model = s.moved(torch.float64).eval()
    ids = torch.randint(s.config.vocab_size, (3, 1 + 12 * PIECE))
    straight, other = (s.runner.new_stream(model, 3, 1 + 4 * PIECE) for _ in range(2))
    done = torch.zeros(3, dtype=torch.int64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        expected = {}
        s.runner.logits(model, ids[:, :1], straight)
        s.runner.logits(model, ids[:, :1], other)
        for n in range(12):
            straight.make_room(PIECE, PIECE)
            out, _ = s.runner.logits(model, ids[:, 1 + n * PIECE : 1 + (n + 1) * PIECE], straight)
            expected[n] = out
        while int(done.min()) < 12:
            other.make_room(PIECE, PIECE)
            mark = other.mark()
            at = done.clamp(max=11)
            piece = torch.stack(
                [ids[r, 1 + n * PIECE : 1 + (n + 1) * PIECE] for r, n in enumerate(at.tolist())]
            )
            out, _ = s.runner.logits(model, piece, other)
            for r, n in enumerate(at.tolist()):
                if int(done[r]) < 12:
                    torch.testing.assert_close(out[r], expected[n][r], rtol=1e-9, atol=1e-11)
            back = (torch.rand(3, generator=generator) < 0.4) | (done >= 12)
            length = mark[0].clone()
            gone = mark[1].clone()
            other.roll_back(mark, back)
            assert torch.equal(other.length[back], length[back])
            assert torch.equal(other.gone[back], gone[back])
            done += ~back


def test_the_sink_never_leaves() -> None:
    s = subject(num_blocks=1)
    model = s.moved(torch.float64).eval()
    stream = s.runner.new_stream(model, 1, 1 + 2 * PIECE)
    with torch.no_grad():
        s.runner.logits(model, torch.tensor([[1]]), stream)
        kept = stream.sink.clone()
        for _ in range(20):
            stream.make_room(PIECE, PIECE)
            s.runner.logits(model, torch.randint(s.config.vocab_size, (1, PIECE)), stream)
            assert torch.equal(stream.sink, kept)
            assert bool(stream.seen[:, :, 0].all())


def test_a_cache_without_room_says_so() -> None:
    s = subject()
    model = s.model().eval()
    stream = s.runner.new_stream(model, 1, 1 + PIECE)
    with torch.no_grad(), pytest.raises(ValueError, match="make room"):
        s.runner.logits(model, torch.zeros(1, 2 + PIECE, dtype=torch.int64), stream)


def test_far_along_a_stream_the_angles_are_still_right() -> None:
    """After a million tokens the cache says what it said at the beginning of the same window."""
    s = subject(num_blocks=1)
    model = s.moved(torch.float32).eval()
    ids = torch.randint(s.config.vocab_size, (1, 1 + 3 * PIECE))
    near, far = (s.runner.new_stream(model, 1, 1 + 4 * PIECE) for _ in range(2))
    with torch.no_grad():
        a, _ = s.runner.logits(model, ids, near)
        s.runner.logits(model, ids[:, :1], far)
        far.length += 4 * PIECE * 10**5
        far.gone += 4 * PIECE * 10**5
        b, _ = s.runner.logits(model, ids[:, 1:], far)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_a_sink_no_position_sees_the_first() -> None:
    s = subject(sink=False)
    model = s.moved(torch.float64).eval()
    ids = s.batch().ids
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % s.config.vocab_size
    with torch.no_grad():
        assert torch.equal(logits(s, model, ids), logits(s, model, changed))
        assert not torch.equal(logits(s, model, ids[:, :1]), logits(s, model, changed[:, :1]))


@pytest.mark.parametrize("variant", ["market_modern", "market_mamba"])
def test_roll_back_of_whichever_model(variant: str) -> None:
    s = tiny(variant, max_len=24)
    model = s.moved(torch.float64).eval()
    ids = s.batch(2).ids
    stream = s.runner.new_stream(model, 2, 24)
    rows = torch.tensor([True, False])
    with torch.no_grad():
        s.runner.logits(model, ids[:, :4], stream)
        mark = stream.mark()
        s.runner.logits(model, ids[:, 4:7], stream)
        stream.roll_back(mark, rows)
        out, _ = s.runner.logits(model, ids[:, 7:9], stream)
        a = logits(s, model, torch.cat([ids[:1, :4], ids[:1, 7:9]], 1))
        b = logits(s, model, ids[1:, :9])
    torch.testing.assert_close(out, torch.cat([a, b]), rtol=1e-8, atol=1e-10)
