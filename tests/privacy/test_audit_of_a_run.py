"""A run folder is audited with what the client trained, under the plan that is in it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fedsea.audit import settings
from fedsea.audit.about import notes
from fedsea.audit.claimed import claimed
from fedsea.audit.report import write_report
from fedsea.audit.run import audit
from fedsea.audit.settings import AuditOptions
from fedsea.audit.subject import open_subject
from fedsea.audit.verdict import Verdict
from fedsea.client.run import train_alone
from fedsea.client.setup import ClientOptions
from fedsea.errors import ConfigError
from tests.support.audited import PLAN, SILO, TINY, noised_plan


def test_a_run_is_audited_with_the_trained_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "QUICK", replace(TINY, known=8))
    text = PLAN.read_text().replace('path = "model"', f"path = {json.dumps(str(PLAN.parent / 'model'))}")
    plan = tmp_path / "plan.toml"
    plan.write_text(text.replace("rounds = 4", "rounds = 1").replace("steps_per_round = 20", "steps_per_round = 2"))
    noise = "hidden_std = 100.0\nhidden_clip = 2.0\ngradient_std = 10.0\ngradient_clip = 0.01\n"
    noise += "update_std = 10.0\nupdate_clip = 0.1\n"
    text = plan.read_text().replace("[adapter]", f'[trust]\nmode = "noised"\n\n[noise]\n{noise}\n[adapter]', 1)
    plan.write_text(text.replace("[optimizer]", "[optimizer]\nmax_norm = 0.0"))
    rows = SILO.read_text().splitlines()[:40]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    run, own = tmp_path / "run", tmp_path / "client.toml"
    own.write_text("[noise]\nhidden_std = 150.0\n")
    options = ClientOptions("", Path(), (tmp_path / "rows.jsonl",), run, evaluate=False, settings=own)
    train_alone(plan, "bank", options)
    subject = open_subject(run)
    assert subject.stricter == {"hidden_std": 150.0}
    assert subject.name == "bank"
    assert subject.parameters is not None
    assert any(float(tensor.abs().max()) > 0 for name, tensor in subject.parameters.items() if "lora_B" in name)
    assert subject.epochs == 1  # two steps of ten of its 40 rows
    assert subject.trunk is not None  # it trained alone, so its folder has the trunk
    assert any(float(tensor.abs().max()) > 0 for name, tensor in subject.trunk.items() if "lora_B" in name)
    found = audit(AuditOptions(run, quick=True, attacks=("A1",)))
    assert found.self_check >= 0.99
    assert found.verdict is not Verdict.BROKEN
    assert found.about["audited"] == "the client's trained segments, with the trained trunk"
    assert found.about["noise_std"] == {"hidden": 150.0, "gradient": 10.0, "update": 10.0}
    assert found.findings == ()  # the bytes have the run's noise
    assert "The noise that was audited is that of the run's ledger." in found.sentences
    assert found.claim.startswith("DP claim: epsilon = ")
    (spent,) = found.to_json()["ledgers"]
    assert spent["epsilon"] > 0
    assert {row["channel"] for row in spent["rows"]} >= {"hidden", "gradient"}
    page = write_report(found, tmp_path / "out").read_text()
    assert "DP claim: epsilon = " in page
    assert "<td>gradient</td>" in page
    assert "folder" not in spent
    assert not any("by pseudonyms" in said for said in found.sentences)
    (run / "pseudonyms").write_bytes(b"")  # as training notes it
    assert any("by pseudonyms" in said for said in notes(open_subject(run), ()))
    with pytest.raises(ConfigError, match="audited with the noise that it was trained with; leave --settings out"):
        open_subject(run, settings=own)
    with pytest.raises(ConfigError, match="is the run of bank"):
        open_subject(run, client="clinic")
    shutil.rmtree(run / "trunk")
    assert "base model's trunk" in open_subject(run).states
    anchor = run / "ledger" / "ledger.jsonl"
    anchor.write_bytes(anchor.read_bytes()[:40])
    assert open_subject(run).noise_from.startswith("the plan's, which is the least")
    assert open_subject(run).stricter == {}
    sentence, none = claimed(open_subject(run))
    assert sentence.startswith("no DP claim: The privacy ledger")
    assert none == ()
    assert found.about["trained"]
    assert found.about["client"] == "bank"


def test_a_client_audits_the_noise_of_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "QUICK", TINY)
    file, own = noised_plan(tmp_path, 0.01, 0.01, "update_std = 0.01\n"), tmp_path / "client.toml"
    own.write_text("[noise]\nhidden_std = 400.0\ngradient_std = 400.0\n")
    found = audit(AuditOptions(file, quick=True, attacks=("A1",), settings=own))
    assert found.by_attack()["A1"]["hidden"]["recovery"] < 0.1
    assert found.findings == ()  # the bytes hold the client's noise, which is what is looked for
    assert found.about["noise_std"] == {"hidden": 400.0, "gradient": 400.0, "update": 0.01}
    assert found.about["own_noise"] == {"hidden_std": 400.0, "gradient_std": 400.0}
    assert found.about["plan_sha256"] == open_subject(file).plan.sha256()  # what the federation calls it
    assert "standard deviation 400" in found.statement
    assert any("own noise, stricter than the plan's: hidden_std = 400" in sentence for sentence in found.sentences)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[noise]\nhidden_std = 0.001\n", "only be stricter than the plan's"),
        ('[limits]\ntrust = ["trusted-server"]\n', "past this client's limits"),
    ],
)
def test_settings_with_which_the_client_would_not_take_part_are_refused(tmp_path: Path, text: str, said: str) -> None:
    own = tmp_path / "client.toml"
    own.write_text(text)
    with pytest.raises(ConfigError, match=said):
        open_subject(noised_plan(tmp_path), settings=own)


def test_settings_with_pseudonyms_are_named_as_what_the_audit_does_not_apply(tmp_path: Path) -> None:
    own = tmp_path / "client.toml"
    own.write_text("[pseudonyms]\nenabled = true\n")
    assert open_subject(PLAN, settings=own).pseudonyms
    assert list(tmp_path.iterdir()) == [own]  # no mapping was begun with invented names
