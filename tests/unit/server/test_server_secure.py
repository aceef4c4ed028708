"""Secure rounds at the coordinator, with the clients' real part behind it: who is asked, left out, or asked again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsea.client.secure import SecureRounds
from fedsea.errors import AggregationError, ProtocolError
from fedsea.federation.secure import Advertisement, Layout, Transcript, check_fresh
from fedsea.privacy.boundary import Boundary
from fedsea.wire import messages as m
from tests.support.secure import Registry
from tests.unit.server.coordination import NAME, SHAPES, World

SECURE = {"secure": True}
WAIT = {"training": {"rounds": 1, "steps_per_round": 1, "wait": 10.0, "min_clients": 3}}
ALL = {"training": {"rounds": 1, "steps_per_round": 1}}


class Outbox:
    """A trunk that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def tell(self, message: m.Message) -> None:
        self.messages.append(message)

    def seal(self, release: Any) -> Any:
        return release.take()


class Office:
    """A coordinator and the clients' part of secure aggregation, joined by lists instead of streams."""

    def __init__(self, folder: Any, *names: str, **plan: Any) -> None:
        self.folder, self.names = folder, names
        self.registry = Registry()
        self.notaries = {name: self.registry.enrol(name) for name in names}
        self.plan = {"aggregation": {**SECURE, **plan.pop("aggregation", {})}, **plan}
        self.values = {name: float(index + 1) for index, name in enumerate(names)}
        self.tokens: dict[str, int] = dict.fromkeys(names, 2)
        self.transcripts: list[Transcript] = []
        self.delivered = 0
        self.world = self.start()
        self.clients = {name: self.client(name) for name in names}
        self.silent: set[str] = set()

    def start(self) -> World:
        if self.delivered:
            self.world.store.close()
        self.delivered = 0
        return World(self.folder / "server", *self.names, verifier=self.notaries[self.names[0]], **self.plan)

    def client(self, name: str) -> tuple[SecureRounds, Outbox]:
        outbox = Outbox()
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        layout = Layout.of(dict.fromkeys(self.names, SHAPES))
        return SecureRounds(self.world.plan, name, "run", layout, lambda: self.notaries[name], outbox, folder), outbox  # type: ignore[arg-type]

    def train(self) -> None:
        """Everybody joins and trains until the round is due."""
        self.world.join(*self.names)
        self.world.whole_step(*self.names)

    def hand_over(self, *, until: type | None = None) -> bool:
        """Deliver everything, both ways, until nothing moves; with `until`, up to before a message of that kind."""
        while True:
            fresh = self.world.sent[self.delivered :]
            for name, message in fresh:
                if until is not None and isinstance(message, until):
                    return True
                self.delivered += 1
                self.tell(name, message)
            self.world.run()
            if self.delivered == len(self.world.sent):
                return False

    def tell(self, name: str, message: Any) -> None:
        rounds, outbox = self.clients[name]
        if name in self.silent:
            return
        if isinstance(message, m.RoundOpen):
            rounds.begin(message, 0, self.tokens[name], lambda: self.maskable(name))
        elif isinstance(message, m.SecureRoster | m.SecureDelivery | m.SecureSurvivors | m.SecureEvidence):
            rounds.receive(message)
        self.send(name, outbox)

    def maskable(self, name: str) -> Any:
        return Boundary("trusted-server").maskable({NAME: torch.full((2, 2), self.values[name])})

    def send(self, name: str, outbox: Outbox) -> None:
        while outbox.messages:
            message = outbox.messages.pop(0)
            if isinstance(message, m.SecureKeys):
                keys = (message.certificate, message.sharing_key, message.mask_key, message.commitment)
                ad = Advertisement(name, *keys, message.signature)
                self.transcripts.append(Transcript(name, message.round, message.attempt, ad, {}))
            if isinstance(message, m.SecureUpdate):
                self.transcripts.append(Transcript(name, message.round, message.attempt, None, message.tensors))
            self.world.coordinator.receive(name, message)

    def lose(self, name: str) -> None:
        self.world.coordinator.connected.discard(name)
        self.world.coordinator.leave(name)
        self.world.run()
        self.clients[name] = self.client(name)

    def back(self, name: str) -> None:
        self.world.join(name, next_step=1)

    def result(self) -> float:
        assert self.world.coordinator.finished
        tensor = self.world.coordinator.state.result[NAME]
        assert bool((tensor == tensor[0, 0]).all())
        return float(tensor[0, 0])


@pytest.fixture
def office(tmp_path):
    def make(*names: str, **plan: Any) -> Office:
        return Office(tmp_path, *(names or ("a", "b", "c")), **plan)

    return make


def test_a_secure_round_closes_with_the_mean_and_no_single_value(office):
    o = office(**ALL)
    o.train()
    o.hand_over()
    assert o.result() == 2.0
    assert o.world.ran("take_means") == [("take_means", {NAME: 6}, 6)]
    assert not o.world.ran("average")


@pytest.mark.parametrize("stage", [m.SecureRoster, m.SecureDelivery])
def test_with_wait_all_a_member_that_leaves_before_masking_begins_it_anew_with_fresh_keys(office, stage):
    o = office(**ALL)
    o.train()
    assert o.hand_over(until=stage)
    o.lose("b")
    o.hand_over()
    assert o.world.coordinator.waiting_for() == ("b",)
    o.back("b")
    o.hand_over()
    assert o.result() == 2.0
    assert {t.attempt for t in o.transcripts} == {1, 2}
    assert check_fresh(o.transcripts) == []


def test_with_wait_all_the_sum_is_made_without_a_member_that_left_after_masking(office):
    o = office("a", "b", "c", "d", **ALL)
    o.train()
    assert o.hand_over(until=m.SecureSurvivors)
    o.lose("b")
    o.hand_over()
    assert o.result() == 2.5
    o.back("b")
    assert len(o.world.to("b", m.RoundResult)) == 1


def test_a_member_that_comes_back_while_keys_are_collected_sends_others(office):
    o = office(**ALL)
    o.silent = {"c"}
    o.train()
    o.hand_over()
    o.lose("b")
    o.back("b")
    o.silent = set()
    o.tell("c", o.world.to("c", m.RoundOpen)[-1])
    o.hand_over()
    assert o.result() == 2.0
    assert {t.attempt for t in o.transcripts} == {1}


def test_a_client_that_lost_its_keys_unseen_begins_the_attempt_anew(office):
    """Its stream broke and was back before the server noticed: two sets of keys of one attempt."""
    o = office(**ALL)
    o.train()
    assert o.hand_over(until=m.SecureRoster)
    o.clients["b"] = o.client("b")
    o.tell("b", m.RoundOpen(0, 1))
    o.hand_over()
    assert o.result() == 2.0
    assert max(t.attempt for t in o.transcripts) == 2


def test_with_bounded_waiting_others_go_on_without_who_is_late(office):
    o = office("a", "b", "c", "d", **{"training": {**WAIT["training"], "min_clients": 4}})
    o.train()
    o.silent = {"d"}
    o.hand_over()
    o.world.pass_time(9.0)
    assert not o.world.coordinator.finished
    o.world.pass_time(1.5)
    o.hand_over()
    assert o.result() == 2.0
    assert o.world.ran("take_means") == [("take_means", {NAME: 6}, 6)]


def test_with_bounded_waiting_a_client_without_training_is_not_in_the_sum(office):
    o = office("a", "b", "c", "d", **WAIT)
    o.world.join("a", "b", "c")
    o.world.whole_step("a", "b", "c")
    o.world.join("d", next_step=0)
    o.hand_over()
    assert o.result() == 2.0
    assert "d" not in {t.client for t in o.transcripts}


def test_too_few_end_the_run_after_three_attempts_and_tell_everybody(office):
    o = office(**WAIT)
    o.train()
    o.silent = {"b", "c"}
    for _ in range(3):
        o.hand_over()
        o.world.pass_time(10.5)
    assert isinstance(o.world.coordinator.failure, AggregationError)
    assert set(o.world.ended) == {"a", "b", "c"}
    assert o.world.coordinator.state.rounds_done == 0


def test_a_plan_that_skips_closes_the_round_without_a_sum_and_says_so_to_who_missed_it(office):
    o = office(**WAIT, aggregation={"secure_failure": "skip"})
    o.train()
    o.silent = {"b", "c"}
    for _ in range(3):
        o.hand_over()
        o.world.pass_time(10.5)
    assert o.world.coordinator.finished
    again = o.start()
    again.join("b", next_step=1)
    [result] = again.to("b", m.RoundResult)
    assert result.tensors.tensors == {}


def test_after_a_restart_a_sum_that_may_have_been_revealed_is_asked_of_the_same_clients_only(office):
    o = office("a", "b", "c", "d", **{"training": {**WAIT["training"], "min_clients": 4}})
    o.train()
    o.silent = {"d"}
    o.hand_over()
    o.world.pass_time(10.5)
    assert o.hand_over(until=m.SecureEvidence)
    o.silent = set()
    o.world = o.start()
    for name in o.names:
        o.clients[name] = o.client(name)
        o.back(name)
    o.hand_over()
    assert o.result() == 2.0
    assert o.world.to("d", m.RoundOpen) == []


def restarted(office: Any) -> Office:
    """A server that was started again at a round's end; of its clients, one has found it."""
    o: Office = office(**{"training": {**WAIT["training"], "wait": 1.0}})
    o.train()
    assert o.hand_over(until=m.SecureRoster)
    o.world = o.start()
    o.clients = {name: o.client(name) for name in o.names}
    o.back("a")
    return o


def test_a_restarted_server_does_not_give_up_while_clients_may_still_be_seeking_it(office):
    o = restarted(office)
    o.hand_over()
    for _ in range(6):  # six times as long as anybody waits for a client that is slow
        o.world.pass_time(2.0)
        o.hand_over()
    assert o.world.coordinator.failure is None
    o.back("b")
    o.back("c")
    o.hand_over()
    assert o.result() == 2.0


def test_a_restarted_server_does_not_wait_for_ever_for_those_who_do_not_come(office):
    o = restarted(office)
    for _ in range(11):
        o.hand_over()
        o.world.pass_time(2.0)
    assert isinstance(o.world.coordinator.failure, AggregationError)


def test_a_round_whose_sum_may_have_been_revealed_is_not_skipped(office):
    """Members would go on with the values that are in that sum, and show the difference in the next one."""
    o = office(**WAIT, aggregation={"secure_failure": "skip"})
    o.train()
    assert o.hand_over(until=m.SecureEvidence)
    o.silent = {"b", "c"}
    for _ in range(3):
        o.hand_over()
        o.world.pass_time(10.5)
    assert isinstance(o.world.coordinator.failure, AggregationError)


def test_a_client_gives_no_sum_of_a_later_round_while_one_is_open(office):
    """The same parameters once more, over others, under another round's number: the difference shows single ones."""
    o = office(**ALL)
    o.train()
    o.hand_over()
    rounds, outbox = o.clients["a"]
    sent = len(outbox.messages)
    with pytest.raises(ProtocolError, match="sum of round 1 before it closed round 0"):
        rounds.begin(m.RoundOpen(1, 1), 0, 2, lambda: o.maskable("a"))
    assert len(outbox.messages) == sent


def test_weights_that_are_not_what_the_server_counted_are_refused(office):
    o = office(**ALL)
    o.tokens["b"] = 3
    o.train()
    o.hand_over()
    assert isinstance(o.world.coordinator.failure, AggregationError)
    assert "sum to 7 target tokens" in o.world.coordinator.failure.message
    assert not o.world.ran("take_means")


def test_messages_of_an_attempt_that_was_given_up_are_ignored(office):
    o = office(**ALL)
    o.train()
    assert o.hand_over(until=m.SecureDelivery)
    o.lose("b")
    o.world.coordinator.receive("a", m.SecureConsent(0, 1, b"s" * 70))
    o.back("b")
    o.hand_over()
    assert o.result() == 2.0


@pytest.mark.parametrize(
    "message",
    [
        m.SecureUpdate(0, 1, {}),
        m.SecureShares(0, 1, ("b",), (b"s" * 82,)),
        m.SecureConsent(0, 1, b"s" * 70),
        m.SecureReveal(0, 1, ("b",), (b"s" * 33,)),
        m.RoundUpdate(0, 2, {NAME: torch.ones(2, 2)}),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_is_out_of_turn_or_unmasked_is_refused(office, message):
    o = office(**ALL)
    o.train()
    with pytest.raises(ProtocolError):
        o.world.coordinator.receive("a", message)


def test_masked_values_are_refused_where_the_plan_has_no_secure_aggregation(tmp_path):
    w = World(tmp_path, "a", "b", training={"rounds": 1, "steps_per_round": 1})
    w.join("a", "b")
    w.whole_step("a", "b")
    with pytest.raises(ProtocolError, match="may not send SecureKeys"):
        w.coordinator.receive("a", m.SecureKeys(0, 1, b"", b"", b"", b"", b""))


def test_gradients_are_refused_where_the_plan_keeps_them_at_the_clients(tmp_path):
    w = World(tmp_path, "a", training={"rounds": 1, "steps_per_round": 1})
    w.join("a")
    w.work("a")
    with pytest.raises(ProtocolError, match="keeps at the clients"):
        w.ready("a", tensors={NAME: torch.ones(2, 2)})


def test_a_client_refuses_a_round_that_is_closed_and_a_roster_with_keys_that_it_has_forgotten(office):
    o = office(**ALL)
    o.train()
    rounds, outbox = o.clients["a"]
    with pytest.raises(ProtocolError, match="closed here"):
        rounds.begin(m.RoundOpen(0, 1), 1, 2, lambda: o.maskable("a"))
    assert o.hand_over(until=m.SecureRoster)
    [(_, roster)] = [item for item in o.world.sent[o.delivered :] if item[0] == "a"]
    rounds.begin(m.RoundOpen(0, 1), 0, 2, lambda: o.maskable("a"))
    outbox.messages.clear()
    rounds.receive(roster)
    rounds.receive(roster)
    assert outbox.messages == []
