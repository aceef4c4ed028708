"""Trust modes and noise in the plan and in a client's settings: what is refused, and what is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fedsea.errors import ConfigError
from fedsea.plan import (
    ClientNoise,
    backward_channel,
    load_settings,
    open_channels,
    parse_plan,
    server_statement,
    trust_statement,
)
from fedsea.plan.sections import MAGNITUDES
from fedsea.types import Channel
from tests.unit.privacy.plans import CLAIMED, FROZEN, noised

OUTPUT_ONLY = {"input": "frozen", "trunk": "frozen", "output": "adapter"}


@pytest.mark.parametrize(
    ("noise", "sections", "sentence"),
    [
        ({}, {}, "needs noise"),
        ({"gradient_std": 1.0}, {"adapter": OUTPUT_ONLY}, "leaves client a: set noise.hidden_std or noise.update_std"),
        ({"update_std": 1.0}, {}, "leaves client a: set noise.hidden_std or noise.gradient_std above 0"),
        ({"hidden_clip": 1.0, "gradient_std": 1.0}, {}, "noise.hidden_clip bounds nothing"),
        ({"hidden_std": -1.0}, {}, "noise.hidden_std"),
        ({"hidden_std": 1.0, "hidden_clip": -2.0}, {}, "noise.hidden_clip"),
        ({"hidden_std": float("nan")}, {}, "noise.hidden_std"),
        ({"hidden_std": float("inf")}, {}, "noise.hidden_std"),
        ({"hidden_std": 1.0, "delta": 0.0}, {}, "noise.delta"),
        ({"hidden_std": 1.0, "unit": "word"}, {}, "noise.unit"),
        ({"hidden_std": 1.0, "epsilon": 3.0}, {}, "noise.epsilon = 3 cannot be kept for client a"),
        ({**CLAIMED, "gradient_clip": 0.0, "epsilon": 3.0}, {}, "no clip bounds the gradients"),
        ({**CLAIMED, "unit": "token"}, {}, 'noise.unit = "token" needs input_blocks = 0'),
        ({**CLAIMED, "unit": "token"}, {"partition": {"input_blocks": 0}}, "needs a closed backward channel"),
        ({"sigma_relative": 1.0}, {}, "unknown key"),
    ],
)
def test_noise_that_cannot_work_is_refused_with_the_reason(noise, sections, sentence):
    with pytest.raises(ConfigError, match=sentence):
        noised(noise, **sections)


@pytest.mark.parametrize("key", MAGNITUDES)
@pytest.mark.parametrize("value", [1e-300, 1e-40, 9e-13, 2e12, 1e38, 1e300])
def test_noise_and_clips_that_float32_cannot_hold_are_refused(tmp_path, key, value):
    sentence = re.escape(f"noise.{key}: {value:g} is out of range; give 1e-12 to 1e+12")
    both = {"hidden_std": 1.0, "gradient_std": 1.0, "update_std": 1.0}
    with pytest.raises(ConfigError, match=sentence):
        noised({**both, key: value})
    with pytest.raises(ConfigError, match=sentence):
        settings(tmp_path, **{key: value})


@pytest.mark.parametrize("key", MAGNITUDES)
@pytest.mark.parametrize("value", [1e-12, 1e12])
def test_the_bounds_of_noise_and_clips_are_allowed(tmp_path, key, value):
    both = {"hidden_std": 1.0, "gradient_std": 1.0, "update_std": 1.0}
    assert getattr(noised({**both, key: value}).noise, key) == value
    assert getattr(settings(tmp_path, **{key: value}), key) == value


def test_noise_without_its_trust_mode_is_refused():
    with pytest.raises(ConfigError, match=r'needs trust.mode = "noised"'):
        noised({"hidden_std": 1.0}, trust={"mode": "trusted-server"})


def test_a_token_unit_is_accepted_where_one_token_moves_one_row_only():
    plan = noised({**CLAIMED, "unit": "token"}, partition={"input_blocks": 0}, adapter=OUTPUT_ONLY)
    assert plan.noise.unit == "token"


def test_noise_is_part_of_what_both_sides_agree_on():
    assert noised().sha256() != noised({**CLAIMED, "hidden_std": 5.0}).sha256()


def test_only_channels_on_which_something_leaves_are_open():
    assert open_channels(noised(), "a") == (Channel.HIDDEN, Channel.GRADIENT)
    output = noised(adapter=OUTPUT_ONLY, aggregation={"sync": "personal"})
    assert open_channels(output, "a") == (Channel.HIDDEN,)
    shared = noised(adapter={**FROZEN, "output": "adapter"})
    assert open_channels(shared, "a") == (Channel.HIDDEN, Channel.GRADIENT, Channel.UPDATE)


def test_the_statement_of_noise_says_what_is_noised_and_that_it_may_not_help():
    said = trust_statement(noised({"hidden_std": 0.5}), "a")
    assert "hidden states (standard deviation 0.5)" in said
    assert "No noise is added to gradients" in said
    assert "can still reconstruct text unless the audit shows otherwise" in said


def test_a_closed_backward_channel_is_said_in_both_modes_at_both_ends():
    trusted = parse_plan({"model": {"path": "x"}, "clients": [{"name": "a"}], "adapter": OUTPUT_ONLY})
    for plan in (noised(adapter=OUTPUT_ONLY), trusted):
        assert backward_channel(plan) == "closed"
        assert "backward channel: closed" in trust_statement(plan, "a")
        assert "backward channel: closed" in server_statement(plan)
        assert "forward channel still gives text away" in server_statement(plan)
    assert backward_channel(noised()) == "open"
    assert "backward channel" not in trust_statement(noised())


# --- a client's own noise ---------------------------------------------------------------------------------------------


def settings(tmp_path: Path, **noise: Any) -> ClientNoise:
    lines = [f"{key} = {value}" for key, value in noise.items()]
    (tmp_path / "client.toml").write_text("\n".join(["[noise]", *lines]))
    return load_settings(tmp_path / "client.toml").noise


def test_a_client_may_be_stricter(tmp_path):
    plan = noised({**CLAIMED, "epsilon": 8.0})
    noise = settings(tmp_path, hidden_std=5.0, gradient_clip=0.5, epsilon=2.0).over(plan, "a")
    assert (noise.hidden_std, noise.gradient_std) == (5.0, CLAIMED["gradient_std"])
    assert (noise.hidden_clip, noise.gradient_clip) == (1.0, 0.5)
    assert noise.epsilon == 2.0
    assert ClientNoise().over(plan, "a") == plan.noise


def test_a_client_may_clip_and_budget_where_the_plan_does_not(tmp_path):
    plan = noised({"hidden_std": 4.0, "gradient_std": 4.0})
    noise = settings(tmp_path, hidden_clip=1.0, gradient_clip=1.0, epsilon=2.0).over(plan, "a")
    assert (noise.hidden_clip, noise.epsilon) == (1.0, 2.0)


def test_a_laxer_client_is_refused_by_the_names_of_all_fields(tmp_path):
    plan = noised({**CLAIMED, "epsilon": 8.0})
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, hidden_std=1.0, gradient_clip=2.0, epsilon=9.0).over(plan, "a")
    for part in ("noise.hidden_std = 1,", "at least 4", "noise.gradient_clip = 2,", "at most 1", "noise.epsilon = 9,"):
        assert part in caught.value.message


@pytest.mark.parametrize("key", ["hidden_std", "hidden_clip", "epsilon"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_zero_and_below_are_refused(tmp_path, key, value):
    with pytest.raises(ConfigError, match=f"noise.{key}"):
        settings(tmp_path, **{key: value})


def test_a_client_cannot_claim_what_its_plan_leaves_open(tmp_path):
    with pytest.raises(ConfigError, match="gradients leave without noise"):
        settings(tmp_path, hidden_clip=1.0, epsilon=2.0).over(noised({"hidden_std": 1.0}), "a")
    with pytest.raises(ConfigError, match="bounds nothing"):
        settings(tmp_path, gradient_clip=1.0).over(noised({"hidden_std": 1.0}), "a")


def test_own_noise_under_a_plan_without_noise_is_refused_and_not_forgotten(tmp_path):
    plan = parse_plan({"model": {"path": "x"}, "clients": [{"name": "a"}]})
    with pytest.raises(ConfigError, match="under which no noise is added"):
        settings(tmp_path, hidden_std=1.0).over(plan, "a")


def test_a_client_accepts_both_modes_unless_its_limits_say_otherwise(tmp_path):
    (tmp_path / "client.toml").write_text('[limits]\ntrust = ["noised"]')
    limits = load_settings(tmp_path / "client.toml").limits
    limits.check(noised(), "a")
    with pytest.raises(ConfigError, match=r"trust.mode = 'trusted-server', but this client accepts noised"):
        limits.check(parse_plan({"model": {"path": "x"}, "clients": [{"name": "a"}]}), "a")
