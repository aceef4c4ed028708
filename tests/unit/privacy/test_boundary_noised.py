"""The boundary with noise: clip, charge, noise, in this order, for every channel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsea.errors import ConfigError, NonFiniteError, UnprotectedRelease
from fedsea.plan import ClientNoise, FederationPlan
from fedsea.privacy.boundary import Boundary
from fedsea.privacy.claims import Claim, NoClaim
from fedsea.privacy.ledger import Ledger
from fedsea.types import Channel, Origin, Purpose, Release
from fedsea.wire.encoding import Encoder
from tests.unit.privacy.plans import noised

KEY = bytes(range(32))
LENGTHS = (5, 3)


def origin(**values: Any) -> Origin:
    return Origin(**{"purpose": Purpose.TRAINING, "lengths": LENGTHS} | values)


def values(scale: float = 1.0, rows: int = 8) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)) * scale


def taken(release: Release) -> torch.Tensor:
    return release.take()[""]


def quiet(plan: FederationPlan, clip: float) -> FederationPlan:
    """Hardly any noise, so that what was clipped can be seen."""
    noise = {f"{channel}_{what}": size for channel in Channel for what, size in (("clip", clip), ("std", 1e-7))}
    return plan.model_copy(update={"noise": plan.noise.model_copy(update=noise)})


@pytest.mark.parametrize("channel", ["hidden", "gradient"])
def test_what_the_encoder_gets_has_the_plans_standard_deviation(channel):
    plan = noised({"hidden_std": 0.8, "gradient_std": 0.3})
    raw_TH = values(3.0, rows=4096)
    release = getattr(Boundary.of(plan), channel)(raw_TH, origin(lengths=(4096,)))
    sealed = Encoder("client", {Channel(channel): "fp32"}).seal(release)
    sent_TH = torch.from_numpy(sealed.pieces[0].copy()).view(torch.float32).view(4096, 64)
    difference = (sent_TH - raw_TH).double()
    assert float(difference.std()) == pytest.approx(plan.noise.std(Channel(channel)), rel=0.01)
    assert abs(float((difference * raw_TH).mean())) < 0.05


def test_a_channel_without_noise_leaves_unchanged():
    raw_TH = values()
    assert torch.equal(taken(Boundary.of(noised({"hidden_std": 1.0})).gradient(raw_TH, origin())), raw_TH)


def test_a_sequence_is_clipped_before_noise_is_added():
    plan = quiet(noised(), 0.5)
    sent_TH = taken(Boundary.of(plan).hidden(values(10.0), origin()))
    norms = [float(part.norm()) for part in sent_TH.split(LENGTHS)]
    assert norms == pytest.approx([0.5, 0.5], rel=1e-3)


def test_rows_of_a_session_are_clipped_so_that_the_whole_sequence_keeps_its_bound():
    plan = quiet(noised(), 0.5)
    boundary = Boundary.of(plan)
    rows = [
        taken(boundary.hidden(values(10.0, count), origin(lengths=(count,), most_rows=16))) for count in (11, 1, 1, 3)
    ]
    whole = torch.cat(rows)
    assert float(whole.norm()) == pytest.approx(0.5, rel=1e-3)
    assert whole.norm(dim=1).max() <= 0.5 / 4 * 1.001


@pytest.mark.parametrize("cuts", [(8,), (5, 1, 2), (1,) * 8])
@pytest.mark.parametrize("most_rows", [0, 8, 12])
def test_replacing_a_sequence_changes_all_its_releases_together_by_at_most_twice_the_clip(cuts, most_rows):
    """And by as much, where values are turned round: sensitivity C would be half of the truth."""
    if not most_rows and len(cuts) > 1:
        cuts = (8,)
    plan = quiet(noised(), 0.5)
    boundary = Boundary.of(plan)
    worst = 0.0
    raw_TH = values(10.0)
    for other_TH in (-raw_TH, values(0.01), torch.zeros(8, 64), torch.randn(8, 64) * 100):
        difference = torch.cat(
            [
                taken(boundary.hidden(one, origin(lengths=(len(one),), most_rows=most_rows)))
                - taken(boundary.hidden(other, origin(lengths=(len(one),), most_rows=most_rows)))
                for one, other in zip(raw_TH.split(cuts), other_TH.split(cuts), strict=True)
            ]
        )
        assert difference.norm() <= 2 * 0.5 * (1 + 1e-4)
        worst = max(worst, float(difference.norm()))
    assert worst == pytest.approx(2 * 0.5 * (8 / (most_rows or 8)) ** 0.5, rel=1e-3)


def test_an_update_is_clipped_as_the_difference_to_what_the_server_knows():
    plan = quiet(noised(), 0.5)
    reference = {"a": torch.randn(4, 3), "b": torch.randn(5)}
    moved = {name: tensor + 10.0 for name, tensor in reference.items()}
    sent = Boundary.of(plan).update(moved, reference).take()
    change = torch.cat([(sent[name] - reference[name]).flatten() for name in sent])
    assert float(change.norm()) == pytest.approx(0.5, rel=1e-3)


def test_an_update_is_noised_in_every_value():
    plan = noised({"update_std": 0.5}, adapter={"input": "frozen", "output": "adapter"})
    tensors = {"a": torch.zeros(300, 200), "b": torch.zeros(50_000)}
    sent = Boundary.of(plan).update(tensors).take()
    whole = torch.cat([tensor.flatten() for tensor in sent.values()])
    assert float(whole.std()) == pytest.approx(0.5, rel=0.01)
    assert not torch.equal(sent["a"].flatten()[:1000], sent["b"][:1000])


def test_an_empty_update_is_no_release(tmp_path):
    with Ledger(tmp_path, noised(), "a") as ledger:
        assert Boundary.of(noised(), "a", ledger).update({}).take() == {}
        assert not ledger.spent.accounts


def test_two_releases_of_the_same_values_have_noise_of_their_own():
    boundary = Boundary.of(noised({"hidden_std": 1.0}))
    first, second = taken(boundary.hidden(values(), origin())), taken(boundary.hidden(values(), origin()))
    # Values lie on a grid 12 bits below the deviation, so one of the 512 pairs is equal by chance in 3.5 % of all runs.
    assert (first == second).sum() < 8
    assert (first - second).std() == pytest.approx(2**0.5, rel=0.25)


def test_noise_is_added_in_float32_whatever_the_model_computes_in():
    sent_TH = taken(Boundary.of(noised({"hidden_std": 1.0})).hidden(values().bfloat16(), origin()))
    assert sent_TH.dtype is torch.float32
    assert not torch.equal(sent_TH, sent_TH.bfloat16().float())


def test_without_its_origin_nothing_is_released():
    boundary = Boundary.of(noised())
    for given in (None, origin(lengths=(5, 2))):
        with pytest.raises(UnprotectedRelease, match="without saying of which sequences"):
            boundary.hidden(values(), given)


def test_values_that_are_not_finite_are_neither_charged_nor_released(tmp_path):
    bad_TH = values()
    bad_TH[2, 3] = float("nan")
    with Ledger(tmp_path, noised(), "a") as ledger:
        boundary = Boundary.of(noised(), "a", ledger)
        with pytest.raises(NonFiniteError):
            boundary.hidden(bad_TH, origin())
        with pytest.raises(NonFiniteError):
            boundary.update({"x": bad_TH})
        assert not ledger.spent.accounts


def test_a_clients_own_settings_are_what_is_added():
    stricter = Boundary.of(noised({"hidden_std": 1.0}), settings=ClientNoise(hidden_std=3.0))
    sent_TH = taken(stricter.hidden(torch.zeros(4096, 64), origin(lengths=(4096,))))
    assert float(sent_TH.std()) == pytest.approx(3.0, rel=0.01)
    assert "standard deviation 3" in stricter.statement
    with pytest.raises(ConfigError, match="at least 1"):
        Boundary.of(noised({"hidden_std": 1.0}), settings=ClientNoise(hidden_std=0.5))


def test_every_release_is_charged_before_it_is_made(tmp_path):
    plan = noised()
    with Ledger(tmp_path, plan, "a") as ledger:
        boundary = Boundary.of(plan, "a", ledger)
        boundary.hidden(values(), origin(documents=("d", "e"), pieces=(0, 0)))
        boundary.gradient(values(), origin(documents=("d", "e"), pieces=(0, 0)))
        assert ledger.spent.total == pytest.approx((2 / 4) ** 2 + (2 / 8) ** 2)
        claim = boundary.claim()
        assert isinstance(claim, Claim)
        assert claim.mu == pytest.approx(ledger.spent.total**0.5)


def test_the_papers_noise_is_counted_and_claims_nothing(tmp_path):
    plan = noised({"hidden_std": 1.0})
    with Ledger(tmp_path, plan, "a") as ledger:
        boundary = Boundary.of(plan, "a", ledger)
        boundary.hidden(values(), origin())
        assert ledger.spent.account(Channel.HIDDEN, Purpose.TRAINING).releases == 2
        assert isinstance(boundary.claim(), NoClaim)


def test_a_key_makes_the_same_noise_for_tests():
    plan = noised({"hidden_std": 1.0})
    sent = [taken(Boundary.of(plan, key=KEY).hidden(values(), origin())) for _ in range(2)]
    assert torch.equal(*sent)


def test_a_mode_that_needs_its_plan_cannot_be_made_without_one():
    with pytest.raises(ConfigError, match=r"Boundary.of"):
        Boundary("noised")


MODES = {
    "trusted-server": lambda: noised({}, trust={"mode": "trusted-server"}),
    "one channel noised": lambda: noised({"hidden_std": 1.0}),  # and neither gradients nor updates
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channel", Channel)
def test_what_changes_after_the_release_is_not_sent(mode: str, channel: Channel):
    boundary = Boundary.of(MODES[mode](), key=KEY)
    encoder = Encoder("client", dict.fromkeys(Channel, "fp32"))

    def sent(changed: bool) -> bytes:
        raw_TH = values()
        if channel is Channel.UPDATE:
            release = boundary.update({"a": raw_TH})
        else:
            release = getattr(boundary, channel)(raw_TH, origin())
        if changed:
            raw_TH.zero_()
        sealed = encoder.seal(release)
        if changed:
            raw_TH.fill_(1.0)
        return b"".join(bytes(piece) for piece in sealed.pieces)

    first = sent(changed=False)
    if boundary.noise is None or not boundary.noise.std(channel):  # noise differs in every release
        assert sent(changed=True) == first == values().numpy().tobytes()


def test_an_update_that_waits_for_its_masks_does_not_change():
    raw = values()
    waiting = Boundary.of(MODES["trusted-server"]()).maskable({"a": raw})
    raw.zero_()
    seen: list[torch.Tensor] = []
    waiting.under(lambda tensors: {name: seen.append(t) or t.long() for name, t in tensors.items()})
    assert torch.equal(seen[0], values())
