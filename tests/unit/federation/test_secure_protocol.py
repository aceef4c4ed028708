"""Secure aggregation among members and a server in one process: sums, dropouts, lies and hostile shares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedsea.errors import AggregationError, FedseaError, ProtocolError, UnprotectedRelease
from fedsea.federation.secure import Member, Phase
from tests.support.secure import SHAPES, FakeNotary, Registry, make_cast


def assert_is_mean(cast, survivors):
    means, weights = cast.aggregator.unmask()
    expected = cast.plain_mean(survivors)
    assert means.keys() == expected.keys()
    for name, mean in means.items():
        bound = cast.setting.numbers.error + expected[name].abs() * 2.0**-24
        assert bool(((mean.double() - expected[name]).abs() <= bound).all()), name
        assert weights[name] == sum(cast.weights[n] for n in survivors if name in cast.values[n])


# --- sums -------------------------------------------------------------------------------------------------------------

LOSSES = {
    "nobody": {},
    "before advertising": {"c0": Phase.KEYS, "c5": Phase.KEYS, "c9": Phase.KEYS},
    "before sharing": {"c0": Phase.SHARES, "c5": Phase.SHARES, "c9": Phase.SHARES},
    "before masking": {"c0": Phase.MASKED, "c5": Phase.MASKED, "c9": Phase.MASKED},
    "after masking": {"c0": Phase.CONSENT, "c5": Phase.CONSENT, "c9": Phase.CONSENT},
    "before revealing": {"c1": Phase.REVEAL, "c2": Phase.REVEAL, "c3": Phase.REVEAL},
    "mixed": {"c0": Phase.SHARES, "c4": Phase.MASKED, "c9": Phase.CONSENT},
    "mixed otherwise": {"c3": Phase.KEYS, "c4": Phase.MASKED, "c5": Phase.REVEAL},
}


@pytest.mark.parametrize("when", LOSSES)
def test_ten_clients_of_whom_three_drop_out_sum_to_the_plain_mean(when):
    cast, lost = make_cast(10), LOSSES[when]
    cast.play(lost)
    assert_is_mean(cast, [name for name in cast.names if lost.get(name, Phase.DONE) > Phase.MASKED])


@pytest.mark.parametrize("count", [2, 3, 7])
def test_few_clients_sum_to_the_plain_mean(count):
    cast = make_cast(count)
    cast.play()
    assert_is_mean(cast, cast.names)


def test_clients_with_different_partitions_sum_what_they_share():
    deeper = {**SHAPES, "block.0": (4, 4)}
    cast = make_cast(6, shapes=dict.fromkeys(("c0", "c2", "c5"), deeper))
    cast.play({"c2": Phase.MASKED})
    assert_is_mean(cast, [name for name in cast.names if name != "c2"])


def test_members_who_are_not_in_order_of_their_names_sum_as_well():
    cast = make_cast(11)  # c10 comes before c2 by name, behind it in the plan
    cast.play({"c10": Phase.MASKED})
    assert_is_mean(cast, cast.names[:10])


# --- too few ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.KEYS, Phase.SHARES, Phase.MASKED, Phase.CONSENT, Phase.REVEAL])
def test_too_few_survivors_are_a_clear_end_in_every_phase(phase):
    cast = make_cast(10)
    with pytest.raises(AggregationError, match="needs 7 of 10 clients, and 6 are left") as raised:
        cast.play(dict.fromkeys(cast.names[:4], phase))
    assert "c0, c1, c2, c3" in raised.value.message
    assert "state is kept" in raised.value.message


def test_a_sum_over_too_few_holders_of_a_parameter_is_not_made():
    deeper = {**SHAPES, "block.0": (4, 4)}
    cast = make_cast(6, least=2, shapes=dict.fromkeys(("c0", "c2"), deeper))
    with pytest.raises(AggregationError, match=r"fewer than 2 hold block\.0"):
        cast.play({"c2": Phase.MASKED})


def test_members_refuse_such_a_sum_themselves():
    deeper = {**SHAPES, "block.0": (4, 4)}
    cast = make_cast(6, least=2, shapes=dict.fromkeys(("c0", "c2"), deeper))
    cast.play(until=Phase.MASKED)
    cast.mask([name for name in cast.names if name != "c2"])
    with pytest.raises(AggregationError, match=r"fewer than 2 hold block\.0"):
        cast.members["c0"].consent([name for name in cast.names if name != "c2"])


# --- a server that lies -----------------------------------------------------------------------------------------------


def shared(count=5, **options):
    cast = make_cast(count, **options)
    cast.play(until=Phase.MASKED)
    return cast


def masked(count=5, **options):
    cast = shared(count, **options)
    cast.mask()
    return cast


def test_a_server_that_shows_members_different_survivors_gets_nothing():
    cast = masked(10)
    most, others = cast.names[:8], cast.names[2:]
    signatures = {}
    for name in cast.names[:5]:
        signatures[name] = cast.members[name].consent(most)
    for name in cast.names[5:]:
        signatures[name] = cast.members[name].consent(others)
    for name in cast.names:
        mine = most if name in cast.names[:5] else others
        with pytest.raises(ProtocolError, match=r"no consent of .* told members different things"):
            cast.members[name].reveal({other: signature for other, signature in signatures.items() if other in mine})


def test_a_server_cannot_do_with_the_consent_of_fewer_than_the_threshold():
    cast = masked(10)
    signatures = {name: cast.members[name].consent(cast.names) for name in cast.names}
    with pytest.raises(ProtocolError, match="Only 6 members have consented to the sum, and 7 must"):
        cast.members["c0"].reveal({name: signatures[name] for name in cast.names[:6]})


def test_no_member_reveals_both_kinds_of_share():
    """First asked with c4 in the sum, then without: the second question has no answer."""
    cast = masked()
    cast.aggregator.proceed()
    cast.consent()
    revealed = cast.members["c0"].reveal(cast.aggregator.signatures)
    assert set(revealed) == set(cast.names)
    for again in (lambda m: m.consent(cast.names[:4]), lambda m: m.reveal(cast.aggregator.signatures)):
        with pytest.raises(ProtocolError, match="twice, or out of turn"):
            again(cast.members["c0"])


@pytest.mark.parametrize("case", ["without itself", "a stranger", "twice"])
def test_a_list_of_survivors_that_cannot_be_is_refused(case):
    cast = make_cast(6)
    cast.play({"c5": Phase.SHARES}, until=Phase.MASKED)
    cast.mask()
    survivors = {
        "without itself": cast.names[1:5],
        "a stranger": cast.names[:6],  # c5 has shared nothing
        "twice": (*cast.names[:5], "c1"),
    }[case]
    with pytest.raises(ProtocolError, match="nothing was revealed"):
        cast.members["c0"].consent(survivors)


def test_a_server_cannot_invent_members():
    cast = make_cast()
    cast.advertise()
    stranger = Registry().enrol("c4")  # of another authority
    forged = Member(cast.setting, "c4", stranger).advertise()
    with pytest.raises(ProtocolError, match="keys that the server gives for c4 are not signed"):
        cast.members["c0"].share((*cast.roster[:4], forged))


def test_a_server_cannot_pass_one_client_s_certificate_off_as_another_s():
    cast = make_cast()
    cast.advertise()
    third = cast.roster[3]
    with pytest.raises(ProtocolError, match="for c4 are not signed"):
        cast.members["c0"].share(
            (
                *cast.roster[:4],
                replace(third, name="c4", sharing_key=b"1" * 32, mask_key=b"2" * 32, commitment=b"3" * 32),
            )
        )


@pytest.mark.parametrize("field", ["sharing_key", "mask_key", "commitment"])
def test_a_server_cannot_exchange_a_key(field):
    cast = make_cast()
    cast.advertise()
    changed = replace(cast.roster[2], **{field: b"x" * 32})
    with pytest.raises(ProtocolError, match="for c2 are not signed"):
        cast.members["c0"].share((*cast.roster[:2], changed, *cast.roster[3:]))


def test_keys_of_another_attempt_are_refused():
    registry = Registry()
    before, now = make_cast(registry=registry, attempt=1), make_cast(registry=registry, attempt=2)
    before.advertise()
    now.advertise()
    with pytest.raises(ProtocolError, match="for c2 are not signed"):
        now.members["c0"].share((*now.roster[:2], before.roster[2], *now.roster[3:]))


def test_a_roster_without_the_own_keys_is_refused():
    cast = make_cast(registry=(registry := Registry()))
    cast.advertise()
    other = make_cast(registry=registry).members["c0"].advertise()
    with pytest.raises(ProtocolError, match="does not have this client's own keys"):
        cast.members["c0"].share((other, *cast.roster[1:]))


def test_a_roster_of_too_few_is_refused_by_the_members():
    cast = make_cast(10)
    cast.advertise()
    with pytest.raises(AggregationError, match="needs 7 of 10"):
        cast.members["c0"].share(cast.roster[:6])


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 3], [1, 0, 2, 3, 4]])
def test_a_roster_with_a_member_twice_or_out_of_order_is_refused(order):
    cast = make_cast()
    cast.advertise()
    with pytest.raises(ProtocolError, match="names someone twice, out of order"):
        cast.members["c0"].share([cast.roster[index] for index in order])


def test_members_who_saw_different_rosters_do_not_consent_to_each_other():
    """Each half gets other members; the digests that they sign differ, so no side collects a threshold."""
    cast = make_cast(6, threshold=4)
    cast.advertise()
    one, other = cast.roster[:5], cast.roster[1:]
    sealed = {
        ad.name: cast.members[ad.name].share(one if ad.name in ("c0", "c1", "c2") else other) for ad in cast.roster
    }
    with pytest.raises(ProtocolError, match="do not open"):
        cast.members["c1"].receive({name: sealed[name]["c1"] for name in ("c0", "c2", "c3", "c4")})


# --- hostile shares ---------------------------------------------------------------------------------------------------


def delivered(cast, name):
    for other in cast.names:
        cast.aggregator.add_shares(other, cast.members[other].share(cast.roster))
    cast.aggregator.proceed()
    return cast.aggregator.delivery(name)


@pytest.mark.parametrize("how", ["altered", "swapped", "another's", "empty"])
def test_shares_that_are_not_as_they_were_sealed_are_refused_before_masking(how):
    cast = make_cast()
    cast.play(until=Phase.SHARES)
    shares = delivered(cast, "c0")
    if how == "altered":
        shares["c3"] = shares["c3"][:-1] + bytes([shares["c3"][-1] ^ 1])
    elif how == "swapped":
        shares["c1"], shares["c3"] = shares["c3"], shares["c1"]
    elif how == "another's":
        shares["c3"] = cast.aggregator.delivery("c1")["c3"]
    else:
        shares["c3"] = b""
    with pytest.raises(ProtocolError, match="do not open"):
        cast.members["c0"].receive(shares)
    with pytest.raises(UnprotectedRelease):
        cast.members["c0"].mask(cast.values["c0"], cast.weights["c0"])


def test_shares_of_another_attempt_are_refused():
    registry = Registry()
    before, now = make_cast(registry=registry), make_cast(registry=registry, attempt=2)
    for cast in (before, now):
        cast.play(until=Phase.SHARES)
    shares = delivered(now, "c0")
    shares["c3"] = delivered(before, "c0")["c3"]
    with pytest.raises(ProtocolError, match="do not open"):
        now.members["c0"].receive(shares)


def test_shares_of_someone_who_is_no_member_are_refused():
    cast = make_cast()
    cast.play(until=Phase.SHARES)
    shares = delivered(cast, "c0")
    with pytest.raises(ProtocolError, match="no other member"):
        cast.members["c0"].receive({**shares, "c9": shares["c1"]})


def test_too_few_shares_are_refused_before_masking():
    cast = make_cast(10)
    cast.play(until=Phase.SHARES)
    shares = delivered(cast, "c0")
    with pytest.raises(AggregationError, match="needs 7 of 10"):
        cast.members["c0"].receive({name: shares[name] for name in list(shares)[:5]})


@pytest.mark.parametrize("liars", [("c0",), ("c5",), ("c1", "c3")])
@pytest.mark.parametrize("lost", [{}, {"c4": Phase.MASKED}])
def test_members_that_reveal_wrong_shares_do_not_spoil_the_sum(lost, liars):
    cast = make_cast(9, threshold=6)
    cast.play(lost, until=Phase.REVEAL)
    for name in cast.aggregator.waiting_for():
        shares = cast.members[name].reveal(cast.aggregator.signatures)
        if name in liars:
            shares = {owner: bytes([0]) + bytes(31) + b"\x07" for owner in shares}
        cast.aggregator.add_reveal(name, shares)
    cast.aggregator.proceed()
    assert_is_mean(cast, [name for name in cast.names if name not in lost])


def test_secrets_that_were_shared_wrongly_end_the_attempt_and_name_the_client(monkeypatch):
    cast = make_cast(4)
    cast.play(until=Phase.SHARES)
    cast.members["c2"]._seed = b"other than what it committed to!"
    cast.play()
    with pytest.raises(AggregationError, match="shares of client c2's secret do not give back"):
        cast.aggregator.unmask()


@pytest.mark.parametrize("what", ["keys", "shares", "consent", "reveal"])
def test_the_server_refuses_what_a_member_may_not_send(what):
    cast = make_cast(4)
    if what == "keys":
        bad = replace(cast.members["c0"].advertise(), mask_key=b"x" * 32)
        with pytest.raises(ProtocolError, match="not signed with its certificate"):
            cast.aggregator.add_keys(bad)
    elif what == "shares":
        cast.play(until=Phase.SHARES)
        sealed = cast.members["c0"].share(cast.roster)
        sealed.popitem()
        with pytest.raises(ProtocolError, match="one sealed share for every other member"):
            cast.aggregator.add_shares("c0", sealed)
    elif what == "consent":
        cast.play(until=Phase.CONSENT)
        with pytest.raises(ProtocolError, match="did not sign for this sum"):
            cast.aggregator.add_consent("c0", cast.members["c1"].consent(cast.names))
    else:
        cast.play(until=Phase.REVEAL)
        shares = cast.members["c0"].reveal(cast.aggregator.signatures)
        shares.popitem()
        with pytest.raises(ProtocolError, match="one share for every member"):
            cast.aggregator.add_reveal("c0", shares)


# --- masks are used once ----------------------------------------------------------------------------------------------


def test_a_member_never_masks_twice_with_the_same_keys():
    cast = masked()
    with pytest.raises(UnprotectedRelease, match="masks that were used before"):
        cast.members["c0"].mask(cast.values["c0"], cast.weights["c0"])


def test_a_value_outside_the_range_leaves_the_masks_unused():
    cast = shared()
    member = cast.members["c0"]
    member.receive(cast.aggregator.delivery("c0"))
    wild = {**cast.values["c0"], "norm": torch.full((7,), 1e9)}
    with pytest.raises(AggregationError, match="beyond 1024"):
        member.mask(wild, 5)
    member.mask(cast.values["c0"], 5)


@pytest.mark.parametrize("call", ["share", "receive", "mask", "consent", "reveal"])
def test_nothing_is_answered_out_of_turn(call):
    cast = make_cast()
    calls = {
        "share": lambda m: m.share(()),
        "receive": lambda m: m.receive({}),
        "mask": lambda m: m.mask(cast.values["c0"], 1),
        "consent": lambda m: m.consent(cast.names),
        "reveal": lambda m: m.reveal({}),
    }
    with pytest.raises(FedseaError):
        calls[call](cast.members["c0"])


def test_the_notaries_of_these_tests_refuse_a_wrong_signature():
    """A fake that accepts everything would let every test of a lying server pass for nothing."""
    registry = Registry()
    one, other = registry.enrol("c0"), registry.enrol("c1")
    assert isinstance(one, FakeNotary)
    assert one.verify(one.certificate, b"statement", one.sign(b"statement"))
    assert not one.verify(one.certificate, b"statement", other.sign(b"statement"))
    assert not one.verify(one.certificate, b"another", one.sign(b"statement"))
