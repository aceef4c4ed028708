"""Sessions beside everything else: training goes on bit for bit, room runs out, clients err or vanish."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fedsea.client.decoding import SplitDecoder
from fedsea.errors import CapacityError, ConfigError, FedseaError, NonFiniteError, ProtocolError, TransportError
from fedsea.model.decoding import TrunkDecoder
from fedsea.wire import messages as m
from tests.support.decoding import alone, answer, central, comes_back_to, decoding, held, prompt_of
from tests.support.federation import Federation, assert_same_bits

DEADLINE_S = 60.0


@pytest.fixture
def idle(federation) -> Federation:
    """A server that does nothing but sessions."""
    fed = federation("a", "b", inference={"prefill_tokens": 8, "kv_memory_mb": 1, "max_tokens": 128})
    fed.start_server()
    return fed


@contextlib.contextmanager
def endless(decoder: SplitDecoder) -> Iterator[list[list[int]]]:
    """One answer after the other, until the context ends; all answers so far."""
    over, answers = threading.Event(), []

    def work() -> None:
        with contextlib.suppress(TransportError):  # the server leaves when the training is over
            while not over.is_set():
                answers.append(answer(decoder, prompt_of(20), 20))

    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(work)
        try:
            yield answers
        finally:
            over.set()
        going.result(DEADLINE_S)


def test_training_is_bit_for_bit_what_it_is_without_sessions(federation):
    plan = {
        "adapter": {"dropout": 0.2},
        "training": {"micro_batches": 2, "rounds": 3, "steps_per_round": 4},
        "clients": {"b": {"input_blocks": 2}},
    }
    quiet = federation("a", "b", **plan)
    server = quiet.spawn_server()
    for child in (*(quiet.spawn_client(name) for name in ("a", "b")), server):
        child.finish()
    busy = federation("a", "b", **plan)
    server = busy.spawn_server()
    with contextlib.ExitStack() as stack:
        decoders = [stack.enter_context(decoding(busy, name, retry_s=1.0)) for name in ("a", "b")]
        answers = [stack.enter_context(endless(decoder)) for decoder in decoders]
        children = [busy.spawn_client(name) for name in ("a", "b")]
        children[0].wait_for("step", 11)
    for child in (*children, server):
        child.finish()
    assert all(len(one) > 1 for one in answers)
    assert_same_bits(busy, quiet)


def test_answers_of_sessions_opened_before_a_step_are_the_old_trunks_until_they_end(federation, base_model):
    fed = federation("a", training={"rounds": 1, "steps_per_round": 3})
    fed.start_server(exit_when_finished=False)
    prompt = prompt_of(6)
    with decoding(fed) as decoder, decoder.open(40) as sequences:
        before = sequences.extend([prompt])
        fed.start_client("a").finish()
        sequences.rollback([2])
        torch.testing.assert_close(sequences.extend([prompt[2:]]), before, rtol=1e-5, atol=1e-5)
        assert sequences.session.version == 0


# --- room -------------------------------------------------------------------------------------------------------------


def test_session_waits_for_room_and_then_goes_on(idle, base_model):
    prompt = prompt_of(5)
    with decoding(idle) as decoder, contextlib.ExitStack() as stack:
        full = []
        while True:
            sequences = decoder.open(128)
            sequences.extend([prompt])
            full.append(stack.enter_context(sequences))
            if held(idle)[2] + full[0].max_tokens * 384 > 1 << 20:
                break
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(answer, decoder, prompt, 4)
            waits_for_it = decoder.open(128)
            full.pop().close()
            waits_for_it.close()
            assert waits.result(DEADLINE_S) == central(base_model, prompt, 4)
    assert comes_back_to(idle, (0, 0, 0))


def test_session_without_room_ends_with_an_error_that_says_when_to_try_again(idle):
    with decoding(idle, retry_s=1.5) as decoder, contextlib.ExitStack() as stack:
        full = [stack.enter_context(decoder.open(128)) for _ in range(64)]
        with pytest.raises(CapacityError, match="full at the moment") as raised:
            _ = [sequences.extend([prompt_of(3)]) for sequences in full]
        assert raised.value.retry_after_s > 0
    assert comes_back_to(idle, (0, 0, 0))


# --- clients that err -------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(idle, base_model) -> Iterator[tuple[SplitDecoder, Federation]]:
    """A client to err with, while another one's answer goes on; afterwards nothing is left and nobody was disturbed."""
    with decoding(idle, "b") as other, other.open(24) as bystander:
        expected = alone(other, "b")
        prompt = prompt_of(10)
        bystander.extend([prompt[:5]])
        before = held(idle)
        with decoding(idle, "a") as decoder:
            yield decoder, idle
            assert comes_back_to(idle, before)
        got = bystander.extend([prompt[5:]], [5])
        with expected.open(24) as sequences:
            torch.testing.assert_close(got, sequences.extend([prompt], [5]), rtol=1e-4, atol=1e-5)
    assert comes_back_to(idle, (0, 0, 0))


def test_prompts_that_cannot_be_run_are_refused_before_anything_is_sent(watched):
    decoder, _ = watched
    with pytest.raises(ConfigError, match="may have 128 tokens"):
        decoder.open(129)
    with decoder.open(8) as sequences:
        sequences.extend([[5]])
        for wrong, error, text in (
            ([[]], ConfigError, "at least one"),
            ([[5, decoder.vocab_size]], ConfigError, "vocabulary"),
            ([[-1]], ConfigError, "vocabulary"),
            ([[5] * 8], CapacityError, "opened for 8"),
        ):
            with pytest.raises(error, match=text):
                sequences.extend(wrong)
        assert sequences.extend([[6]]).shape == (1, decoder.vocab_size), "and the sequence goes on"


def raw(decoder: SplitDecoder, value: torch.Tensor):
    return decoder.trunk.seal(decoder.boundary.hidden(value))


@pytest.mark.parametrize("case", ["out of order", "too long", "other sequences", "before opening"])
def test_message_that_the_protocol_does_not_allow_ends_its_session_alone(watched, case):
    decoder, _ = watched
    session = decoder.trunk.open_session(8, 1)
    row = torch.randn(1, 32)
    session.extend(raw(decoder, row), (0,), (1,)).result(DEADLINE_S)
    if case == "before opening":
        decoder.trunk.send(m.SessionForward(77, 0, (0,), (1,), (), False, raw(decoder, row)))
        session.extend(raw(decoder, row), (1,), (1,)).result(DEADLINE_S)
        session.close()
        return
    wrong = {
        "out of order": ((row, (2,), (1,)), ProtocolError),
        "too long": ((row.repeat(9, 1), (0,), (9,)), CapacityError),
        "other sequences": ((row.repeat(2, 1), (1, 0), (1, 1)), FedseaError),
    }
    (value, positions, lengths), error = wrong[case]
    if case == "other sequences":
        decoder.trunk.send(m.SessionForward(session.number, 9, positions, lengths, (), False, raw(decoder, value)))
        with pytest.raises(ProtocolError, match="is for 2"):
            session.extend(raw(decoder, row), (1,), (1,)).result(DEADLINE_S)
        return
    with pytest.raises(error):
        session.extend(raw(decoder, value), positions, lengths).result(DEADLINE_S)


def test_hidden_states_that_are_not_finite_never_leave_their_client(watched):
    decoder, _ = watched
    with pytest.raises(NonFiniteError):
        raw(decoder, torch.full((1, 32), float("nan")))


def test_an_output_that_the_codec_cannot_carry_ends_its_session_alone(federation, monkeypatch):
    original = TrunkDecoder.run

    def run(self, turns):
        results = original(self, turns)
        pairs = zip(turns, results, strict=True)
        return [torch.full_like(result, 1e6) if turn.memory.max_tokens == 9 else result for turn, result in pairs]

    monkeypatch.setattr(TrunkDecoder, "run", run)
    fed = federation("a", wire={"hidden": "fp16"})
    fed.start_server(exit_when_finished=False)
    with decoding(fed) as decoder, decoder.open(12) as good, decoder.open(9) as bad:
        good.extend([[5, 6]])
        with pytest.raises(NonFiniteError, match="65504"):
            bad.extend([[5]])
        good.extend([[7]])
        assert good.session.num_replays == 0, "the stream is the same one"
        assert comes_back_to(fed, (1, 1, held(fed)[2]))
        assert answer(decoder, [5], 2), "and others may be opened"


def test_client_that_closes_in_the_middle_of_an_answer_leaves_nothing(watched):
    decoder, _ = watched
    sequences = decoder.open(64)
    sequences.extend([[5, 6]])
    pending = [sequences.session.extend(raw(decoder, torch.randn(8, 32)), (2,), (8,)) for _ in range(5)]
    sequences.close()
    for future in pending:
        assert isinstance(future.exception(DEADLINE_S), ProtocolError | None)
    with pytest.raises(ProtocolError, match="closed"):
        sequences.extend([[7]])


def test_connection_that_is_closed_ends_whoever_waits_on_it(idle):
    with decoding(idle) as decoder:
        session = decoder.trunk.open_session(8, 1)
        session.extend(raw(decoder, torch.randn(1, 32)), (0,), (1,)).result(DEADLINE_S)
    with pytest.raises(ProtocolError, match="closed on this side"):
        session.extend(None, (1,), (1,)).result(DEADLINE_S)
    assert comes_back_to(idle, (0, 0, 0)), "a goodbye ends the sessions"
