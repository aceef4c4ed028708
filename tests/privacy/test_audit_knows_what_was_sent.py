"""An audit of a run attacks with what the server was sent: the public model alone would be less than it has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea.audit.knowing import model_of
from fedsea.audit.observe import Tap
from fedsea.audit.run import _Audit
from fedsea.audit.settings import AuditOptions, Clock
from fedsea.audit.subject import Subject, open_subject, variant
from fedsea.federation.secure import Member
from fedsea.model import adapters
from fedsea.types import Channel
from tests.support.audited import ONE_TEXT, PLAN, tiny_audits


def _trained(file: Path = PLAN) -> Subject:
    """As after a training that moved everything far."""
    subject = open_subject(file)
    tap = Tap(variant(subject.plan, subject.name), subject.checkpoint)
    draw = torch.Generator().manual_seed(0)

    def moved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value + 0.05 * torch.randn(value.shape, generator=draw) for name, value in tensors.items()}

    return replace(subject, parameters=moved(tap.segments.parameters()), trunk=moved(adapters.read(tap.trunk)))


@pytest.mark.parametrize("how", ["adapter", "full"])
def test_the_attackers_model_is_the_clients_and_the_servers_after_training(tmp_path: Path, how: str) -> None:
    text = PLAN.read_text().replace('path = "model"', f'path = "{PLAN.parent / "model"}"')
    file = tmp_path / "plan.toml"
    file.write_text(text.replace("[adapter]", f'[adapter]\ninput = "{how}"'))
    subject = _trained(file)
    tap = Tap(subject.plan, subject.checkpoint, subject.name, subject.parameters, trunk=subject.trunk)
    base, ids_T = model_of(subject), torch.arange(5, 25)
    found, truth = ids_T, ids_T
    own = (tap.segments.input_blocks, tap.trunk, tap.segments.output_blocks)
    for part, theirs in zip((base.input_blocks, base.trunk, base.output_blocks), own, strict=True):
        with torch.no_grad():
            found, truth = part(found, [20]), theirs(truth, [20])
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
        assert not any(parameter.requires_grad for parameter in part.model.parameters())


def test_the_audit_of_a_run_recovers_what_the_servers_adapters_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_audits(monkeypatch, ONE_TEXT)
    options = AuditOptions(PLAN, quick=True, attacks=("A1",))
    found = _Audit(_trained(), options, Clock(5.0, lambda *_: None), None, None, Member).run()
    a1 = found.by_attack()["A1"][Channel.HIDDEN.value]
    assert a1["recovery"] > 0.95
    assert found.about["attacker_model"] == "public weights and the adapters that were sent to the server"
    assert a1["prior"] == found.by_attack()["A0"]["hidden"]["recovery"]


def _under(subject: Subject, **changed: Any) -> Subject:
    aggregation = subject.plan.aggregation.model_copy(update=changed)
    return replace(subject, plan=subject.plan.model_copy(update={"aggregation": aggregation}))


def test_adapters_that_the_server_was_not_sent_are_not_the_attackers() -> None:
    subject = _trained()
    assert subject.sent
    assert not _under(subject, sync="personal").sent
    assert not open_subject(PLAN).sent


def test_the_mean_that_secure_aggregation_leaves_is_the_attackers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every client goes on with it after a round, and the server has sent it to them."""
    tiny_audits(monkeypatch, ONE_TEXT)
    subject = _under(_trained(), sync="round", secure=True)
    assert subject.sent.keys() == {*(subject.parameters or ()), *(subject.trunk or ())}
    options = AuditOptions(PLAN, quick=True, attacks=("A1",))
    found = _Audit(subject, options, Clock(5.0, lambda *_: None), None, None, Member).run()
    assert found.by_attack()["A1"]["hidden"]["recovery"] > 0.95
    assert "the mean of the clients' adapters" in found.about["attacker_model"]
