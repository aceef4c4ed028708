"""The search under noise keeps several hypotheses, and none of them twice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedsea.audit.attacks import a2_likelihood, search
from tests.support.audited import observe


@pytest.mark.parametrize("shortlist", [False, True])
def test_hypotheses_are_all_different(shortlist: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if shortlist:  # half of it is what the model expects, half what the row alone suggests: often the same
        monkeypatch.setattr(search, "_EXHAUSTIVE", 10)
        monkeypatch.setattr(search, "_SHORTLIST", 64)
    audited = observe(rho=2.0, count=2, tokens=10)
    seen = [search.seen_once(audited.attacker, target) for target in audited.targets]
    group = search._Group(audited.attacker, seen, [target.ids_T for target in audited.targets], 8, True)
    for length in range(1, 10):
        group.step()
        hypotheses = group._ids_SBt.tolist()
        assert [len({tuple(ids) for ids in each}) for each in hypotheses] == [8, 8]
        assert all(len(ids) == length for each in hypotheses for ids in each)


def test_more_hypotheses_read_more_of_the_text_under_noise() -> None:
    audited = observe(rho=4.0, count=3, tokens=16)
    found = []
    for beam in (1, 8):
        audited.attacker = replace(audited.attacker, beam=beam)
        found.append(audited.score(a2_likelihood).recovery.value)
    assert found[1] > found[0] + 0.03


def test_more_hypotheses_than_tokens_in_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_FOLLOWERS", 4)  # of each of so many
    monkeypatch.setattr(search, "_OWN", 4)
    audited = observe(rho=0.5, count=1, tokens=3)
    audited.attacker = replace(audited.attacker, beam=audited.attacker.vocab_size + 1)
    assert audited.score(a2_likelihood).recovery.value > 0.5
