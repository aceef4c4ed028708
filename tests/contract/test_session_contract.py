"""What every trunk promises a client that decodes: one suite, run against the local and the remote one."""

from __future__ import annotations

import pytest
import torch

from fedsea.client.trunk import Standing, Trunk, TrunkSession
from fedsea.errors import CapacityError, ProtocolError
from tests.contract.trunks import BOUNDARY, Bench, get

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def opened(bench: Bench) -> Trunk:
    options = {"role": "observe"} if bench.federation.server is not None else {}
    return bench.trunk(Standing(), **options)


def rows(bench: Bench, number: int, seed: int = 0) -> torch.Tensor:
    size = bench.direct.segment.hidden_size
    return torch.randn(number, size, generator=torch.Generator().manual_seed(seed))


def extend(trunk: Trunk, session: TrunkSession, hidden: torch.Tensor, positions, lengths, sources=()) -> torch.Tensor:
    return get(session.extend(trunk.seal(BOUNDARY.hidden(hidden)), positions, lengths, sources))


def test_new_tokens_give_what_the_whole_text_gives(bench):
    at = bench()
    trunk, text = opened(at), rows(at, 12)
    with torch.no_grad():
        expected = at.direct.segment(text, (12,))
    session = trunk.open_session(20)
    got = [extend(trunk, session, text[a:b], (a,), (b - a,)) for a, b in ((0, 5), (5, 6), (6, 9), (9, 12))]
    torch.testing.assert_close(torch.cat(got), expected, **TOLERANCE)
    # Back into the middle: what was there is forgotten.
    other = torch.cat([text[:7], rows(at, 3, seed=1)])
    with torch.no_grad():
        expected = at.direct.segment(other, (10,))
    torch.testing.assert_close(extend(trunk, session, other[7:], (7,), (3,)), expected[7:], **TOLERANCE)
    session.close()
    session.close()
    with pytest.raises(ProtocolError, match="closed"):
        extend(trunk, session, text[:1], (0,), (1,))


def test_sequences_of_a_session_have_lengths_of_their_own_and_take_over_from_each_other(bench):
    at = bench()
    trunk = opened(at)
    texts = [rows(at, 9, seed) for seed in range(3)]
    session = trunk.open_session(16, num_sequences=3)
    extend(trunk, session, torch.cat([texts[0][:4], texts[2][:2]]), (0, 0, 0), (4, 0, 2))
    extend(trunk, session, torch.cat([texts[0][4:5], texts[1][:5], texts[2][2:3]]), (4, 0, 2), (1, 5, 1))
    # As beams do: the first goes on twice, the third once, the second not at all.
    got = extend(trunk, session, torch.cat([t[7:8] for t in texts]), (5, 3, 5), (1, 1, 1), (0, 2, 0))
    pasts = (texts[0][:5], texts[2][:3], texts[0][:5])
    for number, (past, row) in enumerate(zip(pasts, got, strict=True)):
        whole = torch.cat([past, texts[number][7:8]])
        with torch.no_grad():
            expected = at.direct.segment(whole, (len(whole),))[-1]
        torch.testing.assert_close(row, expected, **TOLERANCE)


def test_sessions_do_not_see_each_other(bench):
    at = bench()
    trunk = opened(at)
    texts = [rows(at, 8, seed) for seed in range(4)]
    sessions = [trunk.open_session(8) for _ in texts]
    got: list[list[torch.Tensor]] = [[] for _ in texts]
    for position in range(8):
        futures = [
            session.extend(trunk.seal(BOUNDARY.hidden(text[position : position + 1])), (position,), (1,))
            for session, text in zip(sessions, texts, strict=True)
        ]
        for so_far, future in zip(got, futures, strict=True):
            so_far.append(get(future))
    for so_far, text in zip(got, texts, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(torch.cat(so_far), at.direct.segment(text, (8,)), **TOLERANCE)


def test_message_out_of_order_or_too_long_ends_that_session_alone(bench):
    at = bench()
    trunk, text = opened(at), rows(at, 40)
    good, bad, long = trunk.open_session(40), trunk.open_session(40), trunk.open_session(30)
    extend(trunk, bad, text[:2], (0,), (2,))
    with pytest.raises(ProtocolError, match="out of order"):
        extend(trunk, bad, text[:1], (3,), (1,))
    with pytest.raises(ProtocolError):
        extend(trunk, bad, text[:1], (2,), (1,))
    with pytest.raises(CapacityError, match="opened for 30"):
        extend(trunk, long, text[:31], (0,), (31,))
    with torch.no_grad():
        expected = at.direct.segment(text, (40,))
    torch.testing.assert_close(extend(trunk, good, text, (0,), (40,)), expected, **TOLERANCE)


def test_messages_may_follow_each_other_without_waiting(bench):
    at = bench()
    trunk, text = opened(at), rows(at, 30)
    session = trunk.open_session(30)
    futures = [session.extend(trunk.seal(BOUNDARY.hidden(text[i : i + 1])), (i,), (1,)) for i in range(30)]
    with torch.no_grad():
        expected = at.direct.segment(text, (30,))
    torch.testing.assert_close(torch.cat([get(future) for future in futures]), expected, **TOLERANCE)
