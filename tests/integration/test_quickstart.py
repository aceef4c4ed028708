"""The main job, small: every process, file and figure of `fedsea quickstart`, in a few steps."""

from __future__ import annotations

import math
import re

import pytest

from fedsea.errors import ConfigError, FedseaError
from fedsea.evaluation.preparation import CLIENTS, prepare
from fedsea.evaluation.quickstart import QuickstartOptions, run
from fedsea.plan import load_plan


@pytest.mark.timeout(600)
def test_a_short_quickstart_compares_all_models_and_writes_its_page(tmp_path):
    told, presented, shown, audited = [], [], [], []

    def audit(result):
        audited.append(result.sample["answer"])
        return ("defence", "channel"), ("some defence", "left out: <no time>")

    begun = []
    options = QuickstartOptions(tmp_path / "quick", steps=4, rows=60)
    found = run(options, lambda *report: told.append(report), presented.append, shown.append, audit, begun.append)

    assert set(found.val_loss) == {"base", "alone", "federated", "central"}
    assert set(found.val_loss["alone"]) == set(CLIENTS)
    losses = [found.val_loss["base"], found.val_loss["federated"], *found.val_loss["alone"].values()]
    assert all(math.isfinite(loss) for loss in losses)
    assert found.val_loss["federated"] < found.val_loss["base"]
    for name, loss in found.val_loss["alone"].items():
        assert found.by_silo[name][name] < found.by_silo["base"][name]
        assert loss > found.val_loss["federated"]
    for part in ("federation", *(f"{name} alone" for name in CLIENTS), "central"):
        assert (part, 4, 4) in told
    assert len(begun) == 1
    assert list(found.by_silo) == ["base", *CLIENTS, "central", "federated"]
    assert found.bytes_by_kind["Forward"] > found.bytes_by_kind["Backward"] > 0
    assert [result.sample["answer"] for result in presented] == [""]
    assert [set(result.seconds) for result in (*presented, found)] == [
        {"federation", "comparison"},
        {"federation", "comparison", "all"},
    ]
    assert audited == [found.sample["answer"]]
    assert found.sample["through"] == "gateway"
    assert found.sample["finish_reason"] in ("stop", "length")
    assert "".join(shown) == found.sample["answer"]
    assert len(shown) > 1
    log = (tmp_path / "quick" / "logs" / "gateway.log").read_text()
    assert not any(line in log for line in found.sample["prompt"].splitlines())
    page = found.report.read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "CAN reconstruct" in page
    assert f"trained alone {min(found.val_loss['alone'].values()):.3f} to " in page
    assert ("(cut off after 60 tokens)" in page) == (found.sample["finish_reason"] == "length")
    assert "<td>some defence</td><td>left out: &lt;no time&gt;</td>" in page
    assert not re.search(r"""(src|href)=["']https?:|url\(["']?https?:|@import|<script""", page), "it loads something"


def test_the_shipped_plan_fits_the_shipped_silos(tmp_path):
    prepare(tmp_path / "quick", None)
    plan = load_plan(tmp_path / "quick" / "plan.toml")
    central = load_plan(tmp_path / "quick" / "central.toml")
    assert plan.client_names == CLIENTS
    assert central.micro_batches_of("central")[1] == sum(plan.micro_batches_of(name)[1] for name in CLIENTS)
    assert central.data.holdout == 0.0 < plan.data.holdout
    assert central.optimizer == plan.optimizer
    assert central.num_steps == plan.num_steps
    text = (tmp_path / "quick" / "central.toml").read_text()
    assert [line for line in text.splitlines() if "holdout" in line] == ["holdout = 0.0"]
    assert "proportion" not in text, "a comment on the federation's clients"


@pytest.mark.parametrize("steps", [1, 7, 8, 30])
def test_the_plan_makes_as_many_steps_as_asked_for(tmp_path, steps):
    prepare(tmp_path / "quick", steps)
    assert load_plan(tmp_path / "quick" / "plan.toml").num_steps == steps


def test_silos_may_be_shortened(tmp_path):
    prepare(tmp_path / "quick", 1, rows=20)
    silos = sorted((tmp_path / "quick" / "silos").iterdir())
    assert [silo.stem for silo in silos] == sorted(CLIENTS)
    assert {len(silo.read_text().splitlines()) for silo in silos} == {20}


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not empty"):
        run(QuickstartOptions(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("name", "says"), [("mine.txt", "is a file"), ("mine.txt/inside", "a part of the path")])
def test_a_file_in_the_way_is_one_sentence(tmp_path, name, says):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FedseaError, match=says):
        run(QuickstartOptions(tmp_path / name))
