"""What reviews broke once: one client's bad values, lateness or double, and everybody else to the end of the run."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from fedsea.client.segments import ClientSegments
from fedsea.client.trainer import Trainer
from fedsea.errors import AuthError, ConfigError, NonFiniteError, ProtocolError
from fedsea.model.passes import TrunkPasses
from tests.support.federation import DEADLINE_S

NUM_STEPS = 4
ALL = {"rounds": 1, "steps_per_round": NUM_STEPS}
WAITING = {"rounds": 1, "steps_per_round": NUM_STEPS, "wait": 0.5, "min_clients": 1}


@pytest.fixture
def held(monkeypatch) -> Callable[[str, int], tuple[threading.Event, threading.Event]]:
    """Stops a client once, before it says that it is ready; gives the events "it is there" and "it may go on"."""

    def hold(name: str, step: int) -> tuple[threading.Event, threading.Event]:
        there, may_go_on = threading.Event(), threading.Event()
        original = Trainer._prepare

        def prepare(self, opened, work, loss):
            if self.segments.name == name and opened.step == step and not there.is_set():
                there.set()
                assert may_go_on.wait(DEADLINE_S)
            original(self, opened, work, loss)

        monkeypatch.setattr(Trainer, "_prepare", prepare)
        return there, may_go_on

    return hold


# --- values -------------------------------------------------------------------------------------------------------


def everybody_finishes_when_b_comes_back(fed, error, match) -> None:
    """Client b is sent away with `error`; a waits for it, and goes on with it to the end when it is back."""
    fed.start_server()
    good, bad = fed.start_client("a"), fed.start_client("b")
    with pytest.raises(error, match=match):
        bad.finish()
    again = fed.start_client("b")
    assert good.finish().next_step == again.finish().next_step == NUM_STEPS
    fed.server.finish()
    assert all(torch.isfinite(tensor).all() for tensor in fed.parameters().values())


def test_a_gradient_near_overflow_names_its_client_and_others_finish(federation, monkeypatch):
    original, poisoned = ClientSegments.head, []

    def head(self, batch, hidden, update, number):
        loss, gradient = original(self, batch, hidden, update, number)
        if self.name == "b" and update == 1 and not poisoned:
            poisoned.append(True)
            gradient = torch.full_like(gradient, 3e38)
        return loss, gradient

    monkeypatch.setattr(ClientSegments, "head", head)
    fed = federation("a", "b", training=ALL)
    everybody_finishes_when_b_comes_back(fed, NonFiniteError, "client b sent is too large")


def test_an_answer_that_the_codec_cannot_carry_ends_that_stream_and_others_finish(federation, monkeypatch):
    original = TrunkPasses.forward

    def forward(self, step, slot, entries):
        outputs = original(self, step, slot, entries)
        return {name: torch.full_like(out, 1e6) if name == "b" else out for name, out in outputs.items()}

    monkeypatch.setattr(TrunkPasses, "forward", forward)
    fed = federation("a", "b", training=WAITING, wire={"hidden": "fp16"})
    server = fed.start_server(exit_when_finished=False)
    with pytest.raises(NonFiniteError, match="65504"):
        fed.start_client("b").finish()
    assert fed.start_client("a").finish().next_step == NUM_STEPS
    server.stop()


# --- lateness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", ["round", "personal"])
def test_a_straggler_that_was_left_behind_in_the_last_step_ends_well(federation, held, sync):
    there, may_go_on = held("b", NUM_STEPS - 1)
    training = {**WAITING, "wait": 1.0, "min_clients": 2}  # no step begins before both are there
    fed = federation("a", "b", training=training, aggregation={"sync": sync})
    fed.start_server()
    first, late = fed.start_client("a"), fed.start_client("b")
    assert there.wait(DEADLINE_S)
    assert first.finish().next_step == NUM_STEPS
    may_go_on.set()
    assert late.finish().next_step < NUM_STEPS
    fed.server.finish()
    durable = fed.durable()
    assert durable["server"][1]["rounds_done"] == 1
    if sync == "round":
        name = next(n for n in durable["a"][0] if n.startswith("parameter."))
        assert torch.equal(durable["a"][0][name], durable["b"][0][name]), "the average came to the straggler too"


def test_a_client_with_more_blocks_than_the_round_trained_keeps_its_own_there(federation):
    fed = federation("a", "b", training={**WAITING, "rounds": 2}, clients={"b": {"input_blocks": 2}})
    fed.start_server()
    assert fed.start_client("a").finish().next_step == 2 * NUM_STEPS
    fed.start_client("b").finish()  # its first block is averaged, its second one was the trunk's for everybody
    fed.server.finish()
    durable = fed.durable()
    assert durable["b"][1]["state"]["rounds_done"] == 2
    both = [name for name in durable["a"][0] if name.startswith("parameter.") and ".layers.0." in name]
    assert both
    assert all(torch.equal(durable["a"][0][name], durable["b"][0][name]) for name in both)
    assert any(".layers.1." in name for name in durable["b"][0])


# --- doubles ------------------------------------------------------------------------------------------------------


def test_a_second_process_that_knows_less_is_refused_and_the_first_goes_on(federation, held):
    there, may_go_on = held("a", 2)
    fed = federation("a", training=ALL)
    fed.start_server()
    first = fed.start_client("a")
    assert there.wait(DEADLINE_S)
    second = fed.start_client("a", run=fed.folder / "elsewhere", retry_for_s=0.0)
    with pytest.raises(ProtocolError, match=r"took part in step .* which its run folder does not know"):
        second.finish()
    may_go_on.set()
    assert first.finish().next_step == NUM_STEPS
    fed.server.finish()


def test_a_second_process_takes_over_where_clients_may_begin_anew(federation, held):
    there, may_go_on = held("a", 2)
    fed = federation("a", training=WAITING)
    fed.start_server()
    first = fed.start_client("a")
    assert there.wait(DEADLINE_S)
    second = fed.start_client("a", run=fed.folder / "elsewhere")
    assert second.finish().next_step == NUM_STEPS
    may_go_on.set()
    with pytest.raises(AuthError, match="only one may train"):
        first.finish()
    fed.server.finish()


# --- refused at the start -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ({"data": {"max_tokens": 5000}, "wire": {"max_tensor_mb": 1}}, "raise wire.max_tensor_mb"),
        ({"adapter": {"input": "full"}, "clients": {"b": {"input_blocks": 2}}}, "same as adapter.trunk"),
        ({"adapter": {"output": "frozen"}, "clients": {"b": {"output_blocks": 2}}}, "same as adapter.trunk"),
    ],
)
def test_a_plan_that_would_fail_in_the_middle_of_the_run_is_refused_before_anything_is_written(
    federation, plan, sentence
):
    fed = federation("a", "b", **plan)
    with pytest.raises(ConfigError, match=sentence):
        fed.start_server()
    assert not (fed.folder / "server").exists()
