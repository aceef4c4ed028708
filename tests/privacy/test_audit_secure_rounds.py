"""The audit of a plan with secure aggregation looks at two rounds of it: masks that come again are found."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch

from fedsea.audit import settings
from fedsea.audit.masking import check_masks
from fedsea.audit.run import audit
from fedsea.audit.settings import AuditOptions
from fedsea.audit.subject import open_subject
from fedsea.audit.verdict import Verdict
from fedsea.federation.secure import Member, Setting
from fedsea.federation.secure.messages import Notary
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
    assert sum("key reused" in sentence for sentence in said) == 2 * len(open_subject(plan).plan.clients)


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
    assert [f.sentence for f in found if "mask reused" not in f.sentence] == []
    assert len(found) == len(subject.plan.clients)


def test_words_without_a_mask_are_found(plan: Path) -> None:
    subject = open_subject(plan)
    found = check_masks(subject.plan, subject.checkpoint, NoMasks)
    assert any("not masked" in finding.sentence for finding in found)
