"""The audit of a plan with secure aggregation plays rounds of it: masks that come again or do not cancel are found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from fedsea.audit import settings
from fedsea.audit.masking import _Notary, check_masks
from fedsea.audit.run import audit
from fedsea.audit.settings import AuditOptions
from fedsea.audit.subject import open_subject
from fedsea.audit.uniform import looks_uniform
from fedsea.audit.verdict import Verdict
from fedsea.errors import AuthError
from fedsea.federation.secure import Member, Setting, aggregator, member
from fedsea.federation.secure.masks import add_streams
from fedsea.federation.secure.messages import Notary
from fedsea.federation.secure.shamir import SHARE_BYTES
from tests.support.audited import PLAN, TINY


class SameKeys(Member):
    """Whoever is called so has the keys and the seed of the first of that name."""

    held: ClassVar[dict[str, tuple]] = {}

    def __init__(self, setting: Setting, name: str, notary: Notary) -> None:
        super().__init__(setting, name, notary)
        own = (self._sharing_key, self._mask_key, self._seed)
        self._sharing_key, self._mask_key, self._seed = self.held.setdefault(name, own)


class NoMasks(Member):
    def mask(self, values, weight):
        super().mask(values, weight)
        return self._words(values, weight)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    text = PLAN.read_text().replace('path = "model"', f'path = "{PLAN.parent / "model"}"')
    assert 'sync = "step"' in text
    file = tmp_path / "plan.toml"
    file.write_text(text.replace('sync = "step"', 'sync = "round"\nsecure = true'))
    return file


def test_real_members_use_every_mask_once(plan: Path) -> None:
    subject = open_subject(plan)
    assert check_masks(subject.plan, subject.checkpoint) == []


def test_masks_that_are_used_again_make_the_audit_say_broken(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "QUICK", TINY)
    monkeypatch.setattr(SameKeys, "held", {})
    options = AuditOptions(plan, quick=True, attacks=("A1",))
    found = audit(options, member=SameKeys)
    assert found.verdict is Verdict.BROKEN
    said = [finding.sentence for finding in found.findings]
    # Both keys of every client, in the second round with all and in the one that a member leaves.
    assert sum("key reused" in sentence for sentence in said) >= 2 * len(open_subject(plan).plan.clients)


def test_one_mask_for_all_rounds_shows_in_the_words_alone(plan: Path) -> None:
    subject = open_subject(plan)
    first: dict[str, dict] = {}

    class SameMask(Member):
        def mask(self, values, weight):
            zeros = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
            masks = first.setdefault(self.name, super().mask(zeros, 1))
            words = self._words(values, weight)
            return {index: masks[index] + vector for index, vector in words.items()}

    found = check_masks(subject.plan, subject.checkpoint, SameMask)
    assert {finding.verdict for finding in found} == {Verdict.BROKEN}
    said = " ".join(finding.sentence for finding in found)
    assert all(f"mask reused (client {name})" in said for name in subject.plan.client_names)
    assert "key reused" not in said


class OffByOne(Member):
    """Masks that are spread as they should be, and fresh, but do not cancel."""

    def mask(self, values, weight):
        words = super().mask(values, weight)
        for vector in words.values():
            vector[0] += 1 << 40
        return words


class HalfCancels(Member):
    """Whose pair masks cancel only if nobody leaves: who leaves after sharing is added anew."""

    def reveal(self, signatures):
        shares = super().reveal(signatures)
        gone = self._shares.keys() - self._survivors
        return shares | {name: self._shares[name][SHARE_BYTES:] for name in gone}


@pytest.mark.parametrize("faulty", [OffByOne, HalfCancels])
def test_masks_that_do_not_cancel_are_found_though_every_mask_is_fresh(plan: Path, faulty: type[Member]) -> None:
    plan.write_text(plan.read_text().replace("secure = true", "secure = true\nsecure_threshold = 2"))
    subject = open_subject(plan)
    assert check_masks(subject.plan, subject.checkpoint) == []
    found = check_masks(subject.plan, subject.checkpoint, faulty)
    assert {finding.verdict for finding in found} == {Verdict.BROKEN}
    said = [finding.sentence for finding in found]
    assert all("do not cancel" in sentence or "cannot be taken off" in sentence for sentence in said), said
    assert len(said) == 1  # the same fault in several rounds is one


def test_words_without_a_mask_are_found(plan: Path) -> None:
    subject = open_subject(plan)
    found = check_masks(subject.plan, subject.checkpoint, NoMasks)
    assert any("not masked" in finding.sentence for finding in found)


@pytest.mark.parametrize("bits", [8, 32, 56])
def test_masks_whose_lowest_bits_are_zero_are_found_though_they_are_fresh_and_cancel(
    plan: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    kept = np.uint64((2**64 - 1) ^ (2**bits - 1))

    def weak(words, adding, subtracting=()):
        for keys, change in ((adding, np.add), (subtracting, np.subtract)):
            for key in keys:
                mask = np.zeros(len(words), dtype=np.uint64)
                add_streams(mask, [key])
                change(words, mask & kept, out=words)

    for module in (member, aggregator):
        monkeypatch.setattr(module, "add_streams", weak)
    subject = open_subject(plan)
    (found,) = check_masks(subject.plan, subject.checkpoint)
    assert found.verdict is Verdict.BROKEN
    assert f"weak masks (client {', '.join(subject.plan.client_names)})" in found.sentence


@pytest.mark.parametrize("count", [0, 1, 3, 64, 1000, 20_000])
def test_uniform_words_pass_and_others_do_not(count: int) -> None:
    # Of all seeds at once a false alarm is as rare as one in a million.
    seeds = 20 if count > 1000 else 300
    for seed in range(seeds):
        words = np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)
        assert looks_uniform(words, 1e-9), seed
    if count >= 64:
        for bit in range(64):
            assert not looks_uniform(words & ~np.uint64(1 << bit), 1e-9), bit
            assert not looks_uniform(words | np.uint64(1 << bit), 1e-9), bit
        assert not looks_uniform(np.resize(words[: count // 2], count), 1e-9)
        assert not looks_uniform(np.full(count, words[0]), 1e-9)
    if count >= 1000:
        low = words & np.uint64(255)
        assert not looks_uniform(words - low + np.minimum(low, np.uint64(127)), 1e-9)


class TooFewWords(Member):
    def mask(self, values, weight):
        return {index: vector[:-1] for index, vector in super().mask(values, weight).items()}


class AnotherGroup(Member):
    def mask(self, values, weight):
        return {index + 7: vector for index, vector in super().mask(values, weight).items()}


class NoNumbers(Member):
    def mask(self, values, weight):
        return {index: vector.astype(np.float32) for index, vector in super().mask(values, weight).items()}


class NoCertificate(Member):
    certificate = b"short"

    def advertise(self):
        return replace(super().advertise(), certificate=self.certificate)


class NoText(NoCertificate):
    certificate = b"\xff\xfe\0" + bytes(32)


@pytest.mark.parametrize("faulty", [TooFewWords, AnotherGroup, NoNumbers, NoCertificate, NoText])
def test_a_member_that_sends_nonsense_is_a_finding_and_no_crash(plan: Path, faulty: type[Member]) -> None:
    subject = open_subject(plan)
    found = check_masks(subject.plan, subject.checkpoint, faulty)
    assert {finding.verdict for finding in found} == {Verdict.BROKEN}
    assert any("did not get through a round" in finding.sentence for finding in found)


def test_the_rounds_own_notary_refuses_what_is_no_certificate_or_key() -> None:
    notary = _Notary("a")
    for certificate in (b"", b"short", b"\xff\xfe\0" + bytes(32)):
        with pytest.raises(AuthError):
            notary.name(certificate)
        assert not notary.verify(certificate, b"statement", b"\1" * 64)
    assert notary.name(notary.certificate) == "a"
    assert notary.verify(notary.certificate, b"statement", notary.sign(b"statement"))
