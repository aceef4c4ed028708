"""What the coordinator decides, without a network, a model or a clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fedsea.errors import AuthError, FedseaError, NonFiniteError, ProtocolError, StorageError
from fedsea.server.waiting import EVALUATION_WAITS, RETURN_S
from fedsea.types import BlockRange, Reply
from fedsea.wire import messages as m
from tests.unit.server.coordination import NAME, World, tensor_of

ONE_ROUND = {"training": {"rounds": 1, "steps_per_round": 3}}
PERSONAL = {"aggregation": {"sync": "personal"}, "training": {"rounds": 1, "steps_per_round": 3}}
EVALUATION = m.Forward(7, 0, 0, 1, BlockRange(1, 4), (2,), 2, True, {"": torch.ones(2, 3)})


def waits(**training: object) -> dict[str, dict[str, object]]:
    return {"training": {"rounds": 2, "steps_per_round": 2, "wait": 5.0, **training}}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(*names: str, **plan) -> World:
        for one in made:
            one.store.close()
        made.append(World(tmp_path / "run", *(names or ("a", "b")), **plan))
        return made[-1]

    yield make
    made[-1].store.close()


# --- a step of several clients ------------------------------------------------------------------------------------


def test_micro_batches_of_all_clients_run_as_one_batch_in_the_plans_order(world):
    w = world(**ONE_ROUND)
    w.join("b", "a")
    w.forward("b")
    assert not w.ran("forward")
    w.forward("a")
    assert w.ran("forward") == [("forward", 0, 0, ("a", "b"))]
    assert torch.equal(tensor_of(w.to("a", m.Output)[0]), torch.full((2, 3), 2.0))


def test_gradients_are_propagated_in_the_order_of_slots(world):
    w = world("a", training={"micro_batches": 2})
    w.join("a")
    w.forward("a", 0)
    w.forward("a", 1)
    w.backward("a", 1)
    assert not w.ran("backward")
    w.backward("a", 0)
    assert w.ran("backward") == [("backward", 0, ("a",)), ("backward", 1, ("a",))]


def test_a_client_with_fewer_micro_batches_is_absent_from_the_last_slots(world):
    w = world(clients={"a": {"micro_batches": 2}}, **ONE_ROUND)
    w.join("a", "b")
    w.whole_step("a", "b")
    assert sorted(w.ran("forward")) == [("forward", 0, 0, ("a", "b")), ("forward", 0, 1, ("a",))]
    assert w.ran("finish") == [("finish", 0, 6, 2.0, 2)]


def test_a_step_ends_when_every_client_is_ready_and_all_are_told(world):
    w = world(**ONE_ROUND)
    w.join("a", "b")
    w.work("a", "b")
    w.ready("a")
    assert w.coordinator.state.next_step == 0
    w.ready("b")
    assert w.coordinator.state.next_step == 1
    assert w.to("a", m.StepDone) == [m.StepDone(0, 4, 0.5, w.to("a", m.StepDone)[0].tensors)]
    assert w.to("b", m.StepOpen) == [m.StepOpen(0, 0), m.StepOpen(1, 0)]


def test_the_state_is_durable_before_clients_are_told(world, monkeypatch):
    w = world("a", **ONE_ROUND)
    w.join("a")
    w.work("a")

    def refuse(*_: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(w.store, "save", refuse)
    w.ready("a")
    assert not w.to("a", m.StepDone)
    assert isinstance(w.coordinator.failure, StorageError)
    assert isinstance(w.ended["a"], StorageError)
    assert w.coordinator.state.next_step == 0


def test_clients_that_only_train_their_output_side_send_no_gradients(world):
    w = world("a", adapter={"input": "frozen", "trunk": "frozen"}, **PERSONAL)
    w.join("a")
    w.forward("a")
    w.ready("a")
    assert w.coordinator.state.next_step == 1
    assert not w.to("a", m.InputGradient)


def test_a_gradient_of_a_client_that_sends_none_is_refused(world):
    w = world("a", adapter={"input": "frozen", "trunk": "frozen"}, **PERSONAL)
    w.join("a")
    w.forward("a")
    with pytest.raises(ProtocolError, match="no output"):
        w.backward("a")


def test_at_a_rounds_end_everybody_is_told_who_is_missing(world):
    w = world(**waits())
    end_of_round(w, "a", "b")
    w.coordinator.leave("b")
    assert w.to("a", m.Waiting)[-1].waiting_for == ("b",)
    w.update("a", 1.0)
    assert w.coordinator.waiting_for() == ("b",)
    w.join("b", next_step=2)
    assert w.to("a", m.Waiting)[-1].waiting_for == ()
    w.update("b", 1.0)
    assert w.coordinator.waiting_for() == ("a", "b"), "in the next round's first step"


def test_nobody_is_waited_for_when_the_run_is_over(world):
    w = world(**waits(rounds=1))
    end_of_round(w, "a", "b")
    w.coordinator.leave("b")
    w.update("a", 1.0)
    w.pass_time(6.0)
    assert w.coordinator.finished
    assert w.to("a", m.Waiting)[-1].waiting_for == ()


def test_waiting_clients_are_told_for_whom(world):
    w = world(**ONE_ROUND)
    w.join("a", "b")
    w.coordinator.leave("b")
    assert w.to("a", m.Waiting)[-1].waiting_for == ("b",)
    w.join("b")
    assert w.to("a", m.Waiting)[-1].waiting_for == ()


# --- repeats and changes ------------------------------------------------------------------------------------------


def test_a_repeated_forward_is_answered_from_the_record(world):
    w = world("a", **ONE_ROUND)
    w.join("a")
    w.forward("a")
    w.forward("a")
    assert len(w.ran("forward")) == 1
    first, second = w.to("a", m.Output)
    assert tensor_of(first) is tensor_of(second)


def test_a_repeated_gradient_is_answered_from_the_record(world):
    w = world("a", **ONE_ROUND)
    w.join("a")
    w.forward("a")
    w.backward("a")
    w.backward("a")
    assert len(w.ran("backward")) == 1
    assert len(w.to("a", m.InputGradient)) == 2


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_changed_values_begin_the_step_again(world, kind):
    w = world(**ONE_ROUND)
    w.join("a", "b")
    w.forward("a")
    w.forward("b")
    w.backward("a")
    getattr(w, kind)("a", value=9.0)
    assert w.ran("reset")
    assert w.to("a", m.StepOpen)[-1] == m.StepOpen(0, 1)
    assert w.to("b", m.StepOpen)[-1] == m.StepOpen(0, 1)
    w.whole_step("a", "b")
    assert w.coordinator.state.next_step == 1


def test_jobs_of_an_attempt_that_was_given_up_do_not_run(world):
    w = world("a", **ONE_ROUND)
    w.join("a")
    message = m.Forward(0, 0, 0, 1, BlockRange(1, 4), (2,), 2, False, {"": torch.ones(2, 3)})
    w.coordinator.receive("a", message)
    w.coordinator.steps.restart()
    w.run()
    assert not w.ran("forward")
    assert not w.to("a", m.Output)


def test_values_of_an_attempt_that_was_given_up_are_ignored(world):
    w = world("a", **ONE_ROUND)
    w.join("a")
    w.coordinator.steps.restart()
    w.run()
    w.forward("a", attempt=0)
    assert not w.ran("forward")


def test_ready_sent_again_after_the_step_is_answered_from_the_record(world):
    w = world("a", **ONE_ROUND)
    w.join("a")
    w.whole_step("a")
    w.ready("a", step=0)
    assert [done.step for done in w.to("a", m.StepDone)] == [0, 0]
    assert len(w.ran("finish")) == 1


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"blocks": BlockRange(1, 3)}, "the plan gives it 1:4"),
        ({"blocks": BlockRange(0, 4)}, "the plan gives it 1:4"),
        ({"num_micro_batches": 2}, "announced 2 micro-batches"),
        ({"micro_batch": 1}, "which the plan does not have"),
        ({"step": 2}, "which is not open"),
        ({"tensors": {"x": torch.ones(2, 3)}}, "exactly one unnamed tensor"),
    ],
)
def test_a_forward_that_does_not_fit_the_plan_is_refused(world, changes, sentence):
    w = world("a", **ONE_ROUND)
    w.join("a")
    with pytest.raises(ProtocolError, match=sentence):
        w.forward("a", **changes)


def test_a_gradient_before_its_output_is_refused(world):
    w = world(**ONE_ROUND)
    w.join("a", "b")
    w.forward("a")
    with pytest.raises(ProtocolError, match="no output"):
        w.backward("a")


def test_a_gradient_of_another_shape_is_refused(world):
    w = world("a", **ONE_ROUND)
    w.join("a")
    w.forward("a")
    with pytest.raises(ProtocolError, match="shape"):
        w.backward("a", tensors={"": torch.ones(3, 3)})


def test_another_number_of_target_tokens_than_was_sent_is_refused(world):
    w = world("a", **ONE_ROUND)
    w.join("a")
    w.work("a")
    with pytest.raises(ProtocolError, match="another number of target tokens"):
        w.ready("a", tokens=99)


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), -1.0, 1e41])
def test_a_norm_that_gradients_cannot_have_sends_its_client_away_and_others_go_on(world, norm):
    w = world(**waits())
    w.join("a", "b")
    w.work("a", "b")
    w.ready("b", norm=norm)
    assert w.ended.keys() == {"b"}
    assert isinstance(w.ended["b"], NonFiniteError)
    assert "client b" in w.ended["b"].message
    w.whole_step("a")
    assert w.ran("finish") == [("finish", 0, 2, 1.0, 1)], "nothing of b is left in the step"
    assert w.coordinator.failure is None


def test_what_is_said_again_while_the_step_is_applied_changes_nothing(world):
    w = world("a", **ONE_ROUND)
    w.join("a")
    w.work("a")
    w.coordinator.receive("a", m.StepReady(0, 0, 2, 1.0))
    w.coordinator.receive("a", m.StepReady(0, 0, 2, float("inf")))
    w.run()
    assert not w.ended
    assert w.coordinator.state.next_step == 1
    assert w.to("a", m.StepOpen) == [m.StepOpen(0, 0), m.StepOpen(1, 0)]


def test_ready_for_a_step_that_is_not_open_is_refused(world):
    w = world("a", **ONE_ROUND)
    w.join("a")
    with pytest.raises(ProtocolError, match="not open"):
        w.ready("a", step=2)


def test_messages_that_only_a_server_sends_are_refused(world):
    w = world("a", **ONE_ROUND)
    w.join("a")
    with pytest.raises(ProtocolError, match="may not send StepOpen"):
        w.coordinator.receive("a", m.StepOpen(0, 0))
    with pytest.raises(ProtocolError, match="may not send StepOpen"):
        w.coordinator.answer("a", m.StepOpen(0, 0), lambda _: None)


def test_a_bundle_that_lacks_a_parameter_is_refused(world):
    w = world("a", aggregation={"sync": "step"}, **ONE_ROUND)
    w.join("a")
    w.work("a")
    with pytest.raises(ProtocolError, match="all 1 of its trained parameters"):
        w.ready("a")


def test_a_client_whose_folder_is_newer_than_the_servers_is_refused(world):
    w = world("a", **ONE_ROUND)
    with pytest.raises(ProtocolError, match="Restore the newest run folder at the server"):
        w.join("a", next_step=1)
    with pytest.raises(ProtocolError, match="Restore the newest run folder at the server"):
        w.join("a", round=1)


def test_a_client_whose_folder_is_older_than_the_run_is_refused(world):
    w = world("a", **ONE_ROUND)
    w.join("a")
    w.whole_step("a")
    with pytest.raises(ProtocolError, match="newest run folder at that client"):
        w.join("a", next_step=0)
    w.join("a", next_step=1)
    w.whole_step("a")
    with pytest.raises(ProtocolError, match="newest run folder at that client"):
        w.join("a", next_step=0, prepared_step=0)


def test_a_pull_back_for_a_client_that_trains_nothing_below_the_cut_is_refused(world):
    w = world("a", adapter={"input": "frozen"}, **ONE_ROUND)
    w.join("a")
    two = torch.ones(2, 3)
    message = m.Pullback(0, 0, BlockRange(1, 4), (2,), {"": two}, two)
    with pytest.raises(ProtocolError, match="train nothing below the cut"):
        w.coordinator.answer("a", message, lambda _: None)


def test_a_sequence_longer_than_the_plans_is_refused(world):
    w = world("a", data={"max_tokens": 8}, **ONE_ROUND)
    w.join("a")
    with pytest.raises(ProtocolError, match="a sequence of 9 tokens"):
        w.forward("a", lengths=(9,), tensors={"": torch.ones(9, 3)})
    assert w.ran("forward") == []


def test_a_ready_member_that_leaves_a_bounded_step_still_gets_its_outcome(world):
    w = world(**waits())
    w.join("a", "b")
    w.work("a", "b")
    w.ready("b")
    w.coordinator.leave("b")
    w.ready("a", step=0)
    assert w.coordinator.state.outcomes.keys() == {"a", "b"}
    w.join("b", next_step=0, prepared_step=0)
    assert [done.step for done in w.to("b", m.StepDone)] == [0]


# --- coming back --------------------------------------------------------------------------------------------------


def test_a_client_that_breaks_off_goes_on_in_the_same_step(world):
    w = world(**ONE_ROUND)
    w.join("a", "b")
    w.forward("a")
    w.forward("b")
    w.backward("b")
    w.coordinator.leave("a")
    w.join("a")
    assert w.to("a", m.StepOpen) == [m.StepOpen(0, 0), m.StepOpen(0, 0)]
    w.forward("a")
    w.backward("a")
    assert len(w.ran("forward")) == 1
    w.ready("a")
    w.ready("b")
    assert w.coordinator.state.next_step == 1


def test_ready_said_before_the_opening_was_read_does_not_count(world):
    w = world("a", **ONE_ROUND)
    w.join("a")
    w.work("a")
    w.coordinator.leave("a")
    w.join("a")  # it said where it stands while it still wrote its gradients down
    w.ready("a")
    assert w.coordinator.state.next_step == 0, "it will read the opening and forget what it prepared"
    w.whole_step("a")
    assert w.coordinator.state.next_step == 1
    assert w.to("a", m.StepOpen) == [m.StepOpen(0, 0), m.StepOpen(0, 0), m.StepOpen(1, 0)]


def test_an_opening_that_was_perhaps_never_read_is_told_on_the_next_connection(world):
    w = world("a", **ONE_ROUND)
    w.join("a", prepared_step=0)  # the server was restarted and has nothing of the step
    assert w.to("a", m.StepOpen) == [m.StepOpen(0, 0)]
    w.coordinator.leave("a")
    w.join("a", prepared_step=0)
    assert w.to("a", m.StepOpen) == [m.StepOpen(0, 0)] * 2


def test_a_client_that_need_only_say_that_it_is_ready_does_nothing_again(world):
    w = world(**ONE_ROUND)
    w.join("a", "b")
    w.work("a", "b")
    w.coordinator.leave("a")
    w.join("a", prepared_step=0)
    assert w.to("a", m.StepOpen) == [m.StepOpen(0, 0)]
    w.ready("a")
    w.ready("b")
    assert w.coordinator.state.next_step == 1


def test_a_client_that_came_back_without_what_it_prepared_is_no_longer_ready(world):
    w = world(**ONE_ROUND)
    w.join("a", "b")
    w.work("a", "b")
    w.ready("a")
    w.coordinator.leave("a")
    w.join("a")
    w.ready("b")
    assert w.coordinator.state.next_step == 0
    w.whole_step("a")
    assert w.coordinator.state.next_step == 1


def test_a_client_that_comes_back_while_the_step_is_applied_is_told_its_outcome_alone(world):
    w = world("a", **ONE_ROUND)
    w.join("a")
    w.work("a")
    w.coordinator.receive("a", m.StepReady(0, 0, 2, 1.0))
    w.coordinator.leave("a")
    w.coordinator.join("a", m.Join("", 0, 0, 0))
    w.run()
    assert [done.step for done in w.to("a", m.StepDone)] == [0]
    assert w.to("a", m.StepOpen) == [m.StepOpen(0, 0), m.StepOpen(1, 0)]


def test_a_client_that_missed_the_outcome_is_told_when_it_comes_back(world):
    w = world(**ONE_ROUND)
    w.join("a", "b")
    w.work("a", "b")
    w.ready("a")
    w.coordinator.leave("a")
    w.ready("b")
    assert not w.to("a", m.StepDone)
    w.join("a", next_step=0, prepared_step=0)
    assert [done.step for done in w.to("a", m.StepDone)] == [0]


def test_a_restarted_server_opens_the_step_once_to_a_client_that_was_ready(world):
    w = world(**ONE_ROUND)
    w.join("a", prepared_step=0)
    w.ready("a")
    w.join("b")
    assert w.to("a", m.StepOpen) == [m.StepOpen(0, 0)]
    w.whole_step("a", "b")
    assert w.coordinator.state.next_step == 1


def test_a_restarted_server_goes_on_where_it_was(world):
    w = world("a", **ONE_ROUND)
    w.join("a")
    w.whole_step("a")
    again = world("a", **ONE_ROUND)
    assert again.ran("load") == [("load", ("parameter.trunk",))]
    again.join("a", next_step=0, prepared_step=0)
    assert [done.step for done in again.to("a", m.StepDone)] == [0]
    assert again.to("a", m.StepOpen) == [m.StepOpen(1, 0)]


def test_a_client_that_missed_the_outcome_of_its_first_turn_is_told_although_others_stepped_before(world):
    w = world(training={"mode": "sequential", "rounds": 1, "steps_per_round": 2})
    w.join("a", "b")
    w.whole_step("a")
    w.whole_step("a")
    w.work("b")
    w.coordinator.connected.discard("b")
    w.ready("b")
    assert not w.to("b", m.StepDone)
    w.join("b", next_step=0, prepared_step=2)
    assert [done.step for done in w.to("b", m.StepDone)] == [2]


# --- turns --------------------------------------------------------------------------------------------------------


def test_clients_take_turns(world):
    w = world(training={"mode": "sequential", "rounds": 1, "steps_per_round": 2})
    w.join("a", "b")
    assert not w.to("b", m.StepOpen)
    for name in ("a", "a", "b", "b"):
        w.whole_step(name)
    assert [opened.step for opened in w.to("a", m.StepOpen)] == [0, 1]
    assert [opened.step for opened in w.to("b", m.StepOpen)] == [2, 3]
    assert w.to("a", m.RoundOpen) == [m.RoundOpen(0)]


def test_values_out_of_turn_are_ignored(world):
    w = world(training={"mode": "sequential", "rounds": 1, "steps_per_round": 2})
    w.join("a", "b")
    w.forward("b")
    assert not w.ran("forward")


# --- waiting for a bounded time -----------------------------------------------------------------------------------


def test_a_straggler_is_left_behind_after_the_wait_and_joins_the_next_step(world):
    w = world(**waits())
    w.join("a", "b")
    w.forward("a")
    w.pass_time(4.9)
    assert not w.ran("forward")
    w.pass_time(0.2)
    assert w.ran("forward") == [("forward", 0, 0, ("a",))]
    w.forward("b")
    w.backward("a")
    w.ready("a")
    assert w.coordinator.state.next_step == 1
    assert w.to("b", m.StepOpen) == [m.StepOpen(0, 0), m.StepOpen(1, 0)]


def test_the_wait_begins_when_others_begin_to_wait_however_ticks_fall(world):
    w = world(**waits())
    w.join("a", "b")
    w.now = 100.0
    w.forward("a")  # nobody has looked at the clock since the step began
    w.now = 104.9
    w.coordinator.tick()
    assert not w.ran("forward")
    w.now = 105.1
    w.coordinator.tick()
    w.run()
    assert w.ran("forward") == [("forward", 0, 0, ("a",))]


def test_a_client_that_evaluates_before_its_turn_in_a_step_is_not_late(world):
    w = world(**waits())
    w.join("a", "b")
    w.forward("b")
    for _ in range(4):
        w.coordinator.answer("a", EVALUATION, lambda _: None, trains=True)
        w.pass_time(6.0)  # the engine is at it for longer than others wait for a client
        w.pass_time(4.0)
    w.forward("a")
    assert w.ran("forward") == [("forward", 0, 0, ("a", "b"))]


def test_a_client_is_waited_for_as_ever_when_its_evaluation_is_answered(world):
    w = world(**waits())
    w.join("a", "b")
    w.forward("b")
    w.coordinator.answer("a", EVALUATION, lambda _: None, trains=True)
    w.pass_time(6.0)
    w.pass_time(5.1)
    assert w.ran("forward") == [("forward", 0, 0, ("b",))]


def test_an_evaluation_beside_the_training_gives_no_more_time(world):
    w = world(**waits())
    w.join("a", "b")
    w.forward("b")
    w.coordinator.answer("a", EVALUATION, lambda _: None)
    w.pass_time(5.1)
    assert w.ran("forward") == [("forward", 0, 0, ("b",))]


@pytest.mark.parametrize("at_once", [False, True], ids=["answered-late", "answered-at-once"])
def test_others_do_not_wait_for_ever_for_a_client_that_evaluates(world, at_once):
    w = world(**waits())
    w.join("a", "b")
    w.forward("b")
    while not w.ran("forward"):
        assert w.now < (EVALUATION_WAITS + 1) * 5.0
        w.coordinator.answer("a", EVALUATION, lambda _: None, trains=True)
        if at_once:
            w.run()
        w.pass_time(3.0)
    assert w.now >= EVALUATION_WAITS * 5.0
    assert w.ran("forward") == [("forward", 0, 0, ("b",))]


def test_an_evaluation_whose_answer_cannot_be_sent_is_over(world):
    w = world(**waits())
    w.join("a", "b")
    w.forward("b")

    def lost(_: m.Message) -> None:
        raise BrokenPipeError

    w.coordinator.answer("a", EVALUATION, lost, trains=True)
    with pytest.raises(BrokenPipeError):
        w.run()
    w.pass_time(5.1)
    assert w.ran("forward") == [("forward", 0, 0, ("b",))]


def test_every_straggler_has_its_own_time(world):
    w = world("a", "b", "c", **waits())
    w.join("a", "b")
    w.forward("a")
    w.pass_time(4.0)
    w.join("c")
    w.pass_time(1.5)
    assert w.coordinator.step.members.keys() == {"a", "c"}, "the time of b is up; c has just come"
    w.pass_time(3.6)
    assert w.ran("forward") == [("forward", 0, 0, ("a",))]


def test_what_is_sent_out_of_turn_does_not_hide_what_is_missing(world):
    w = world(**waits(micro_batches=2))
    w.join("a", "b")
    w.forward("a", 0)
    w.forward("b", 1)
    w.pass_time(6.0)
    assert w.ran("forward") == [("forward", 0, 0, ("a",))]


def test_nobody_is_left_behind_while_all_are_late(world):
    w = world(**waits())
    w.join("a", "b")
    w.pass_time(100.0)
    w.forward("a")
    w.forward("b")
    assert w.ran("forward") == [("forward", 0, 0, ("a", "b"))]


def test_what_a_straggler_gave_already_counts(world):
    w = world(**waits())
    w.join("a", "b")
    w.work("a", "b")
    w.ready("a")
    w.pass_time(6.0)
    assert w.ran("finish") == [("finish", 0, 4, 1.0, 1)]
    assert not w.to("b", m.StepDone)


def test_a_late_client_enters_a_step_whose_first_batch_has_not_run(world):
    w = world(**waits())
    w.join("a")
    w.join("b")
    assert w.to("b", m.StepOpen) == [m.StepOpen(0, 0)]
    w.forward("a")
    w.forward("b")
    assert w.ran("forward") == [("forward", 0, 0, ("a", "b"))]


def test_a_client_that_comes_too_late_waits_for_the_next_step(world):
    w = world(**waits())
    w.join("a")
    w.forward("a")
    w.join("b")
    assert not w.to("b", m.StepOpen)
    w.backward("a")
    w.ready("a")
    assert w.to("b", m.StepOpen) == [m.StepOpen(1, 0)]


def test_a_client_alone_in_a_step_does_not_hold_up_who_came_later(world):
    w = world(**waits(micro_batches=2))
    w.join("a")
    w.forward("a", 0)
    w.join("b")
    w.pass_time(4.9)
    assert not w.to("b", m.StepOpen)
    w.pass_time(0.2)
    assert w.to("b", m.StepOpen) == [m.StepOpen(0, 1)]
    w.forward("b", 0)
    w.forward("b", 1)
    w.pass_time(6.0)
    w.whole_step("b")
    assert w.coordinator.state.next_step == 1


def test_a_client_alone_in_a_step_does_not_hold_up_who_was_left_behind(world):
    w = world(**waits(micro_batches=2))
    w.join("a", "b")
    w.forward("a", 0)
    w.forward("a", 1)
    w.pass_time(6.0)
    assert w.coordinator.step.members.keys() == {"a"}
    w.forward("b", 0)  # late, and ignored; but it is there
    w.pass_time(6.0)
    assert w.to("b", m.StepOpen)[-1] == m.StepOpen(0, 1)


def test_a_client_that_hangs_does_not_end_the_step_of_one_that_is_slow(world):
    w = world(**waits(micro_batches=2))
    w.join("a", "b")
    w.forward("a", 0)
    w.forward("a", 1)
    w.pass_time(6.0)
    w.pass_time(100.0)  # a computes; b is connected, and nothing comes from it
    w.backward("a", 0)
    w.backward("a", 1)
    w.ready("a")
    assert w.coordinator.state.next_step == 1
    assert not w.ran("reset")


def test_a_client_that_leaves_is_not_waited_for(world):
    w = world(**waits())
    w.join("a", "b")
    w.forward("a")
    w.coordinator.leave("b")
    w.run()
    assert w.ran("forward") == [("forward", 0, 0, ("a",))]


def test_a_step_whose_members_all_left_begins_again_with_who_comes(world):
    w = world(**waits())
    w.join("a")
    w.forward("a")
    w.coordinator.leave("a")
    w.run()
    w.join("b")
    w.whole_step("b")
    assert w.coordinator.state.next_step == 1


def test_no_step_begins_below_min_clients(world):
    w = world(**waits(min_clients=2))
    w.join("a")
    assert not w.to("a", m.StepOpen)
    w.join("b")
    assert w.to("a", m.StepOpen) == [m.StepOpen(0, 0)]


def test_a_client_that_missed_steps_may_come_back(world):
    w = world(**waits())
    w.join("a")
    w.whole_step("a")
    w.join("b", next_step=0)
    w.coordinator.leave("a")
    w.run()
    w.join("a", next_step=0)
    assert w.coordinator.connected == {"a", "b"}


# --- rounds -------------------------------------------------------------------------------------------------------


def end_of_round(w: World, *names: str) -> None:
    w.join(*names)
    while not w.coordinator.round_due:
        w.whole_step(*names)


def test_a_round_is_aggregated_when_all_have_sent_their_parameters(world):
    w = world(clients={"a": {"micro_batches": 3}}, **ONE_ROUND)
    end_of_round(w, "a", "b")
    assert w.to("b", m.RoundOpen) == [m.RoundOpen(0)]
    w.update("a", 1.0)
    assert not w.ran("average")
    w.update("b", 5.0)
    [result] = w.to("a", m.RoundResult)
    assert torch.equal(result.tensors.tensors[NAME], torch.full((2, 2), 2.0))
    assert w.to("a", m.Finished) == w.to("b", m.Finished) == [m.Finished(3)]
    assert w.coordinator.finished


def test_a_client_that_was_away_gets_the_last_result(world):
    w = world(training={"rounds": 2, "steps_per_round": 1})
    end_of_round(w, "a", "b")
    w.update("a", 1.0)
    w.update("b", 3.0)
    w.coordinator.leave("b")
    w.join("b", next_step=1)
    assert [result.round for result in w.to("b", m.RoundResult)] == [0, 0]


def test_the_last_result_survives_a_restart(world):
    plan = {"training": {"rounds": 2, "steps_per_round": 1}}
    w = world(**plan)
    end_of_round(w, "a", "b")
    w.update("a", 1.0)
    w.update("b", 3.0)
    again = world(**plan)
    again.join("b", next_step=1)
    [result] = again.to("b", m.RoundResult)
    assert torch.equal(result.tensors.tensors[NAME], torch.full((2, 2), 2.0))


def test_an_update_sent_again_after_the_result_is_answered_with_it(world):
    w = world(training={"rounds": 2, "steps_per_round": 1})
    end_of_round(w, "a", "b")
    w.update("a", 1.0)
    w.update("b", 3.0)
    w.update("a", 1.0)
    assert len(w.ran("average")) == 1
    assert len(w.to("a", m.RoundResult)) == 2


def test_an_update_that_is_not_due_is_refused(world):
    w = world(**ONE_ROUND)
    w.join("a", "b")
    with pytest.raises(ProtocolError, match="not due"):
        w.update("a", 1.0)
    end_of_round(w, "a", "b")
    with pytest.raises(ProtocolError, match="not due"):
        w.update("a", 1.0, round=1)


@pytest.mark.parametrize("claimed", [5, 7, 10**9])
def test_another_weight_than_the_server_counted_is_refused(world, claimed):
    w = world(**ONE_ROUND)
    end_of_round(w, "a", "b")
    with pytest.raises(ProtocolError, match=f"trained on {claimed} target tokens in round 0; this server counted 6"):
        w.update("a", 1.0, tokens=claimed)
    w.update("a", 1.0)
    w.update("b", 1.0)
    assert w.engine.weights == {"a": 6.0, "b": 6.0}


def test_where_clients_may_begin_anew_they_weigh_what_they_still_have(world):
    w = world(**waits(rounds=1))
    end_of_round(w, "a", "b")
    with pytest.raises(ProtocolError, match="this server counted 4"):
        w.update("a", 1.0, tokens=5)
    w.update("a", 1.0, tokens=1)
    w.update("b", 1.0)
    assert w.engine.weights == {"a": 1.0, "b": 4.0}


def test_a_straggler_weighs_only_the_steps_that_it_was_ready_in(world):
    w = world(**waits(rounds=1))
    w.join("a", "b")
    w.whole_step("a", "b")
    w.work("a", "b")
    w.ready("a")
    w.pass_time(6.0)
    w.update("a", 1.0, tokens=4)
    w.update("b", 1.0, tokens=2)
    assert w.engine.weights == {"a": 4.0, "b": 2.0}


def test_the_counts_of_a_round_survive_a_restart_and_begin_anew_with_the_next(world):
    plan = {"training": {"rounds": 2, "steps_per_round": 1}}
    w = world(**plan)
    end_of_round(w, "a", "b")
    again = world(**plan)
    again.join("a", "b", next_step=1)
    again.update("a", 1.0, tokens=2)
    again.update("b", 1.0, tokens=2)
    assert again.coordinator.state.rounds_done == 1
    assert again.coordinator.state.round_tokens == {}


def test_a_round_does_not_wait_for_ever_for_a_silent_client(world):
    w = world(**waits(rounds=1))
    end_of_round(w, "a", "b")
    w.update("a", 1.0)
    w.pass_time(6.0)
    assert w.ran("average") == [("average", ("a",))]
    assert w.to("b", m.RoundResult)


def test_a_round_goes_on_without_a_client_that_left(world):
    w = world(**waits(rounds=1))
    end_of_round(w, "a", "b")
    w.update("a", 1.0)
    w.coordinator.leave("b")
    w.run()
    assert w.ran("average") == [], "it may only have lost its connection"
    w.pass_time(6.0)
    assert w.ran("average") == [("average", ("a",))]


def test_a_round_is_not_made_of_parameters_that_were_not_trained_in_it(world):
    w = world(**waits(rounds=2, steps_per_round=1))
    end_of_round(w, "a")
    w.join("b")
    w.update("b", -100.0)
    w.update("a", 1.0)
    assert w.ran("average") == [("average", ("a",))]
    assert w.to("b", m.RoundResult), "it gets the result all the same"


def test_a_client_that_began_anew_is_not_waited_for_and_brings_nothing(world):
    w = world(**waits(rounds=1))
    end_of_round(w, "a", "b")
    w.update("a", 1.0, tokens=0)
    w.update("b", 1.0)
    assert w.ran("average") == [("average", ("b",))]


def test_a_round_whose_clients_all_stay_silent_keeps_the_last_average(world):
    w = world(**waits(rounds=2, steps_per_round=1))
    end_of_round(w, "a", "b")
    w.update("a", 1.0)
    w.update("b", 3.0)
    w.coordinator.leave("b")
    w.whole_step("a")
    w.join("b", next_step=1, round=1)
    w.update("b", -100.0, round=1)
    assert not w.coordinator.finished
    w.pass_time(6.0)
    assert len(w.ran("average")) == 1
    assert w.coordinator.finished
    assert torch.equal(w.to("b", m.RoundResult)[-1].tensors.tensors[NAME], torch.full((2, 2), 2.0))


def test_a_first_round_whose_clients_all_stay_silent_changes_nothing(world):
    w = world(**waits(rounds=2, steps_per_round=1))
    end_of_round(w, "a")
    w.join("b")
    w.update("b", -100.0)
    w.pass_time(6.0)
    assert not w.ran("average")
    assert w.to("b", m.RoundResult) == [m.RoundResult(0, Reply({}))]
    again = world(**waits(rounds=2, steps_per_round=1))
    assert again.coordinator.state.rounds_done == 1


def test_a_round_waits_for_those_who_trained_in_it_even_after_a_restart(world):
    w = world(**waits(rounds=1))
    end_of_round(w, "a", "b")
    again = world(**waits(rounds=1))
    assert again.coordinator.round_due
    again.join("a", next_step=2)
    again.update("a", 1.0)
    assert again.ran("average") == []
    again.join("b", next_step=2)
    again.update("b", 3.0)
    assert again.ran("average") == [("average", ("a", "b"))]


def test_a_restarted_server_closes_no_round_without_those_who_may_still_be_seeking_it(world):
    w = world(**waits(rounds=1))
    end_of_round(w, "a", "b")
    again = world(**waits(rounds=1))
    again.join("a", next_step=2)
    again.update("a", 1.0)
    again.pass_time(10.0)
    assert again.ran("average") == [], "b seeks the server with pauses of up to ten seconds"
    again.join("b", next_step=2)
    again.update("b", 3.0)
    assert again.ran("average") == [("average", ("a", "b"))]


def test_a_restarted_server_closes_a_round_without_those_who_do_not_come(world):
    w = world(**waits(rounds=1))
    end_of_round(w, "a", "b")
    again = world(**waits(rounds=1))
    again.join("a", next_step=2)
    again.update("a", 1.0)
    again.pass_time(RETURN_S + 0.1)
    assert again.ran("average") == [("average", ("a",))]


def test_a_restarted_server_begins_no_step_before_those_who_trained_had_time_to_find_it(world):
    w = world(**waits(rounds=2))
    w.join("a", "b")
    w.whole_step("a", "b")
    again = world(**waits(rounds=2))
    again.join("a", next_step=1)
    assert not again.to("a", m.StepOpen), "a would train the rest of the round alone"
    assert again.to("a", m.Waiting)[-1].waiting_for == again.coordinator.waiting_for() == ("b",)
    again.pass_time(3.0)
    again.join("b", next_step=1)
    assert again.to("a", m.StepOpen) == again.to("b", m.StepOpen) == [m.StepOpen(1, 0)]


def test_a_restarted_server_does_not_wait_long_for_who_trained_and_does_not_come(world):
    w = world("a", "b", "c", **waits(rounds=2))
    w.join("a", "b")
    w.whole_step("a", "b")
    again = world("a", "b", "c", **waits(rounds=2))
    again.join("a", "c", next_step=1)
    again.pass_time(RETURN_S - 0.1)
    assert not again.to("a", m.StepOpen)
    again.pass_time(0.2)
    assert again.to("a", m.StepOpen) == again.to("c", m.StepOpen) == [m.StepOpen(1, 0)]


def test_a_client_that_repeats_other_values_again_and_again_is_sent_away(world):
    w = world(**waits())
    w.join("a", "b")
    for value in range(6):
        if "b" in w.ended:
            break
        w.forward("b", value=float(value))
        w.forward("b", value=float(value) + 100.0)
    assert "again and again" in w.ended["b"].message
    w.work("a")
    w.ready("a", 0)
    assert w.coordinator.state.next_step == 1


def test_personal_parameters_are_never_asked_for(world):
    w = world("a", **PERSONAL)
    w.join("a")
    for _ in range(3):
        w.whole_step("a")
    assert not w.to("a", m.RoundOpen)
    assert w.to("a", m.Finished) == [m.Finished(3)]


def test_rounds_count_although_nothing_is_aggregated(world):
    w = world("a", aggregation={"sync": "personal"}, training={"rounds": 2, "steps_per_round": 2})
    w.join("a")
    counts = []
    for _ in range(4):
        w.whole_step("a")
        counts.append(w.coordinator.state.rounds_done)
    assert counts == [0, 1, 1, 2]
    w.join("a", next_step=4)
    assert not w.to("a", m.RoundResult)


def test_who_joins_a_finished_run_is_told_so(world):
    w = world("a", **PERSONAL)
    w.join("a")
    for _ in range(3):
        w.whole_step("a")
    w.join("a", next_step=3)
    assert w.to("a", m.Finished) == [m.Finished(3), m.Finished(3)]


def test_who_joins_while_a_round_is_due_is_asked(world):
    w = world(**ONE_ROUND)
    end_of_round(w, "a", "b")
    w.coordinator.leave("b")
    w.join("b", next_step=3)
    assert w.to("b", m.RoundOpen) == [m.RoundOpen(0), m.RoundOpen(0)]


# --- faults of the engine -----------------------------------------------------------------------------------------


def test_a_client_with_values_that_are_not_finite_is_sent_away_and_others_go_on(world):
    w = world(**waits())
    w.join("a", "b")
    w.forward("a")
    w.engine.passes.fails = NonFiniteError("the gradient is not finite", "b")
    w.forward("b")
    assert w.ended.keys() == {"b"}
    assert isinstance(w.ended["b"], NonFiniteError)
    assert w.to("a", m.StepOpen)[-1] == m.StepOpen(0, 1)
    w.whole_step("a")
    assert w.coordinator.state.next_step == 1
    assert w.coordinator.failure is None


def test_a_client_whose_share_overflows_the_trunks_gradient_is_sent_away_and_others_go_on(world):
    w = world(**waits())
    w.join("a", "b")
    w.engine.overflows, w.engine.contributed = True, {"a": 1.0, "b": float("inf")}
    w.whole_step("a", "b")
    assert w.ran("shares") == [("shares", 0, {"a": [0], "b": [0]})]
    assert w.ended.keys() == {"b"}
    assert "in step 0, by what client b sent" in w.ended["b"].message
    w.whole_step("a")
    assert w.coordinator.state.next_step == 1
    assert w.coordinator.failure is None


def test_an_overflow_that_no_one_client_caused_ends_the_run_in_one_sentence(world):
    w = world(**waits())
    w.join("a", "b")
    w.engine.overflows, w.engine.contributed = True, {"a": 2e38, "b": 3e38}
    w.whole_step("a", "b")
    assert isinstance(w.coordinator.failure, NonFiniteError)
    assert "The trunk's gradient of step 0" in w.coordinator.failure.message
    assert "Lower optimizer.learning_rate" in w.coordinator.failure.message
    assert w.ended.keys() == {"a", "b"}


def test_a_fault_without_a_name_ends_the_run_for_everybody(world):
    w = world(**ONE_ROUND)
    w.join("a", "b")
    w.engine.passes.fails = RuntimeError("private detail")
    w.forward("a")
    w.forward("b")
    assert w.ended.keys() == {"a", "b"}
    assert type(w.coordinator.failure) is FedseaError
    assert "private" not in w.coordinator.failure.message


# --- questions ----------------------------------------------------------------------------------------------------


def test_an_evaluation_is_answered_outside_any_step(world):
    w = world(**ONE_ROUND)
    answers: list[m.Message] = []
    w.coordinator.answer("a", EVALUATION, answers.append)
    w.run()
    assert torch.equal(tensor_of(answers[0]), torch.full((2, 3), 5.0))
    assert w.coordinator.step is None


def test_an_evaluation_that_fails_concerns_its_asker_alone(world):
    w = world(**ONE_ROUND)

    def fail(_):
        raise RuntimeError("private")

    w.engine.passes.evaluate = fail
    answers: list[m.Message] = []
    w.coordinator.answer("a", EVALUATION, answers.append)
    w.run()
    assert isinstance(answers[0], m.Failure)
    assert answers[0].fatal
    assert "private" not in answers[0].message
    assert w.coordinator.failure is None


def test_the_trunks_parameters_are_handed_out_if_the_plan_shares_them(world, tmp_path):
    w = world(**ONE_ROUND)
    answers: list[m.Message] = []
    w.coordinator.answer("a", m.FetchTrunk(), answers.append)
    w.run()
    assert answers[0].tensors.tensors.keys() == {"trunk"}
    closed = World(tmp_path / "other", "a", durability={"share_trunk": False})
    with pytest.raises(AuthError, match="does not share"):
        closed.coordinator.answer("a", m.FetchTrunk(), answers.append)
