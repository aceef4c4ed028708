"""What of a plan is agreed on: its hash, and how differences are told; and which segments it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsea.errors import ConfigError
from fedsea.plan import (
    ClientLimits,
    FederationPlan,
    backward_channel,
    differences,
    open_channels,
    parse_plan,
    parse_plan_json,
    trust_statement,
)
from fedsea.privacy.pricing import pooled
from fedsea.server.state import ServerStore
from fedsea.types import Channel


def plan(seed: int = 0, **model: object) -> FederationPlan:
    return parse_plan({"seed": seed, "model": {"path": "m", **model}, "clients": [{"name": "a"}]})


RESOLVED = {"fingerprint": {"config": "00ff", "embedding": "11ee"}}


def test_a_model_that_was_moved_is_the_same_plan():
    here, there = plan(**RESOLVED), plan(path="/elsewhere/m", revision="v2", **RESOLVED)
    assert here.sha256() == there.sha256()
    assert differences(here, there) == []


def test_another_model_is_another_plan_wherever_it_is():
    here, there = plan(**RESOLVED), plan(fingerprint={"config": "00ff", "embedding": "22dd"})
    assert here.sha256() != there.sha256()
    assert differences(here, there) == ["model.fingerprint.embedding: 11ee here, 22dd there"]


def test_without_a_fingerprint_the_path_says_which_model_it_is():
    assert plan().sha256() != plan(path="n").sha256()


def test_the_path_travels_with_the_plan():
    there = plan(path="/models/m", **RESOLVED)
    again = parse_plan_json(there.to_json())
    assert again == there
    assert again.sha256() == there.sha256()


def test_every_other_value_is_agreed_on():
    assert plan(**RESOLVED).sha256() != plan(seed=1, **RESOLVED).sha256()
    assert differences(plan(**RESOLVED), plan(seed=1, **RESOLVED)) == ["seed: 0 here, 1 there"]


# --- which segments are trained ---------------------------------------------------------------------------------------

NO_OUTPUT_BLOCKS = {"partition": {"output_blocks": 0}}
HEAD = {"input": "frozen", "targets": ["q_proj", "lm_head"]}


def trainings(**sections: Any) -> FederationPlan:
    return parse_plan({"model": {"path": "m"}, "clients": [{"name": "a"}], **sections})


@pytest.mark.parametrize(
    ("blocks", "adapter", "expected"),
    [
        ((1, 1), {}, "input trunk output"),
        ((0, 0), {}, "trunk"),
        ((1, 1), {"input": "frozen", "output": "frozen"}, "trunk"),
        ((0, 0), {"input": "full", "output": "full"}, "input trunk output"),
        ((0, 0), {"targets": ["q_proj"]}, "trunk"),
        ((0, 0), {"targets": ["q_proj", "lm_head"]}, "trunk output"),
        ((0, 0), {"targets": ["q_proj", "model.lm_head"]}, "trunk output"),
        ((0, 0), {"targets": ["q_proj", "embed_out"]}, "trunk output"),
        ((0, 0), {"targets": ["q_proj", "output_layer"]}, "trunk output"),
        ((0, 0), {"targets": ["q_proj", "output"]}, "trunk output"),
        ((0, 0), {"targets": ["q_proj", "lm_head"], "output": "frozen"}, "trunk"),
        ((1, 1), {"targets": ["lm_head"]}, "output"),
        ((1, 1), {"targets": ["lm_head"], "input": "full"}, "input output"),
        ((1, 1), {"targets": ["output"]}, "input trunk output"),
        ((0, 0), {"targets": ["embed_tokens"]}, "trunk"),
    ],
)
def test_a_segment_is_trained_if_the_targets_may_mean_a_layer_of_it(
    blocks: tuple[int, int], adapter: dict[str, Any], expected: str
) -> None:
    made = trainings(partition=dict(zip(("input_blocks", "output_blocks"), blocks, strict=True)), adapter=adapter)
    sides = {"input": made.trains_below_cut("a"), "trunk": made.trains_trunk, "output": made.trains_output("a")}
    assert " ".join(side for side, trained in sides.items() if trained) == expected
    assert made.clients_train is made.trains_own("a") is (expected != "trunk")
    assert made.sends_gradients("a") is (sides["input"] or sides["trunk"])


def test_lora_of_the_head_alone_needs_what_every_trained_output_needs() -> None:
    noise = {"hidden_std": 9.0, "gradient_std": 9.0, "hidden_clip": 1.0, "gradient_clip": 1.0, "epsilon": 9.0}
    common = {"trust": {"mode": "noised"}, "noise": noise, "adapter": HEAD, **NO_OUTPUT_BLOCKS}
    with pytest.raises(ConfigError, match=r"updates leave without noise \(noise.update_std = 0\)"):
        trainings(**common, optimizer={"clip_scope": "segment"})
    with pytest.raises(ConfigError, match="the norm of this client's gradients leaves it"):
        trainings(**common, aggregation={"sync": "personal"})
    personal = trainings(**common, aggregation={"sync": "personal"}, optimizer={"clip_scope": "segment"})
    assert pooled(personal, "a")[Channel.GRADIENT]


def test_lora_of_the_head_alone_leaves_as_an_update_and_is_said_to() -> None:
    made = trainings(adapter={**HEAD, "trunk": "frozen"}, aggregation={"sync": "step"}, **NO_OUTPUT_BLOCKS)
    assert open_channels(made, "a") == (Channel.HIDDEN, Channel.UPDATE)
    assert backward_channel(made) == "closed at the cut"
    assert "gradients of this client's own segments leave in every step" in trust_statement(made, "a")
    with pytest.raises(ConfigError, match=r"aggregation\.secure = false"):
        ClientLimits(secure_aggregation=True).check(made, "a")


def test_a_personal_head_is_not_exported_at_the_server(tmp_path: Path) -> None:
    made = trainings(adapter=HEAD, aggregation={"sync": "personal"}, **NO_OUTPUT_BLOCKS)
    with pytest.raises(ConfigError, match="each client has its own segments"):
        ServerStore.peek(tmp_path, made)


@pytest.mark.parametrize(
    ("blocks", "adapter"),
    [
        ((1, 1), {"input": "frozen", "trunk": "frozen", "output": "frozen"}),
        ((0, 0), {"trunk": "frozen"}),
        ((1, 0), {"input": "frozen", "trunk": "frozen"}),
        ((1, 1), {"targets": ["lm_head"], "output": "frozen"}),
    ],
)
def test_a_plan_that_trains_nothing_is_refused(blocks: tuple[int, int], adapter: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="nothing would be trained"):
        trainings(partition=dict(zip(("input_blocks", "output_blocks"), blocks, strict=True)), adapter=adapter)
