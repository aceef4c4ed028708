"""Secure rounds through real streams: equal to the plain mean, with members that drop out, too few, and skips."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsea.client.secure import SecureRounds
from fedsea.errors import AggregationError, FedseaError
from fedsea.federation.secure import Member
from fedsea.wire import messages as m
from tests.support.federation import Federation, make_identities

TEN = tuple(f"c{index}" for index in range(10))


class DroppedOut(FedseaError):
    """What a member of these tests ends with."""


def rounds_of(federation: Federation) -> dict[str, torch.Tensor]:
    return federation.durable()["rounds"][0]


def assert_means(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=2**-23, atol=2**-28)


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[dict[str, torch.Tensor], int]]:
    """Client to the values and the weight that it masked last."""
    seen: dict[str, tuple[dict[str, torch.Tensor], int]] = {}
    mask = Member.mask

    def noted(self: Member, values: Any, weight: int) -> Any:
        seen[self.name] = {name: tensor.clone() for name, tensor in values.items()}, weight
        return mask(self, values, weight)

    monkeypatch.setattr(Member, "mask", noted)
    return seen


@pytest.fixture
def drop_out(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Client to the message at which it ends instead of answering."""
    when: dict[str, type] = {}
    receive = SecureRounds.receive

    def ended(self: SecureRounds, message: Any) -> None:
        if when.get(self._name) is type(message):
            raise DroppedOut("this client was ended by the test")
        receive(self, message)

    monkeypatch.setattr(SecureRounds, "receive", ended)
    return when


def weighted_mean(masked: dict[str, Any], names: list[str]) -> dict[str, torch.Tensor]:
    total = sum(masked[name][1] for name in names)
    keys = masked[names[0]][0]
    return {key: sum(masked[n][0][key].double() * (masked[n][1] / total) for n in names).float() for key in keys}


def test_secure_rounds_equal_plain_ones(federation):
    plans = {"training": {"rounds": 1}, "clients": {"b": {"input_blocks": 2}, "c": {"input_blocks": 2}}}
    plain, secure = federation("a", "b", "c", **plans), federation("a", "b", "c", aggregation={"secure": True}, **plans)
    parts = {}
    for one in (plain, secure):
        parts = one.train()
    assert_means(rounds_of(secure), rounds_of(plain))
    sent = parts["a"].result.bytes_by_kind
    assert sent["SecureUpdate"] > 0
    assert "RoundUpdate" not in sent


def test_ten_clients_of_whom_three_drop_out_at_different_moments(tmp_path, base_model, masked, drop_out):
    drop_out |= {"c2": m.SecureRoster, "c5": m.SecureDelivery, "c7": m.SecureSurvivors}
    identities = make_identities(tmp_path / "identities", TEN)
    training = {"rounds": 1, "steps_per_round": 1, "wait": 50.0, "min_clients": 10}
    federation = Federation(
        tmp_path / "run", base_model, identities, TEN, {"training": training, "aggregation": {"secure": True}}
    )
    try:
        server = federation.start_server()
        parts = {}
        for name in TEN:
            parts[name] = federation.start_client(name)
            server.wait_for_client(name)
        for name, part in parts.items():
            if name in drop_out:
                with pytest.raises(DroppedOut):
                    part.finish()
            else:
                assert part.finish().next_step == 1
        server.stop()
        assert server.status["errors"] == {}
        found = rounds_of(federation)
    finally:
        federation.close()
    assert_means(found, weighted_mean(masked, [name for name in TEN if name not in ("c2", "c5")]))
    for name in ("c0", "c9"):
        own = {n: t for n, t in federation.durable()[name][0].items() if n.startswith("parameter.")}
        assert all(torch.equal(t, found[n.removeprefix("parameter.")]) for n, t in own.items())


def too_few(federation: Any, drop_out: dict[str, type], **aggregation: Any) -> Federation:
    drop_out |= {"a": m.SecureDelivery, "b": m.SecureDelivery}
    training = {"rounds": 1, "steps_per_round": 2, "wait": 5.0, "min_clients": 4}
    made: Federation = federation("a", "b", "c", "d", training=training, aggregation={"secure": True, **aggregation})
    return made


def finish_dropped(parts: dict[str, Any]) -> None:
    for name in ("a", "b"):
        with pytest.raises(DroppedOut):
            parts[name].finish()


def test_too_few_survivors_stop_the_run_in_words_and_keep_everybodys_state(federation, drop_out):
    run = too_few(federation, drop_out)
    server = run.start_server()
    parts = {name: run.start_client(name) for name in run.names}
    finish_dropped(parts)
    with pytest.raises(AggregationError, match="Secure aggregation of round 0 needs 3 of 4 clients, and 2 are left"):
        server.finish()
    for name in ("c", "d"):
        with pytest.raises(AggregationError, match="state is kept"):
            parts[name].finish()
    state = run.durable()
    assert state["server"][1]["next_step"] == 2
    assert state["c"][1]["state"]["next_step"] == 2
    assert "rounds" not in state
    drop_out.clear()  # the clients are back, and the same run goes on to its end
    run.train()
    assert run.durable()["server"][1]["rounds_done"] == 1


def test_a_plan_that_skips_goes_on_with_everybodys_own_parameters(federation, drop_out):
    run = too_few(federation, drop_out, secure_failure="skip")
    server = run.start_server()
    parts = {name: run.start_client(name) for name in run.names}
    finish_dropped(parts)
    for name in ("c", "d"):
        assert parts[name].finish().next_step == 2
    server.stop()
    state = run.durable()
    assert state["server"][1]["rounds_done"] == state["c"][1]["state"]["rounds_done"] == 1
    own = [{n: t for n, t in state[name][0].items() if "lora" in n} for name in ("c", "d")]
    assert any(not torch.equal(own[0][name], own[1][name]) for name in own[0])
    assert "rounds" not in state
