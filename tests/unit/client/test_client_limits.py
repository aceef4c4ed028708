"""What a client is willing to take part in."""

from __future__ import annotations

import pytest

from fedsea.client.setup import ClientOptions, check_limits
from fedsea.errors import ConfigError
from fedsea.plan import ClientLimits, parse_plan


def plan(**sections):
    return parse_plan({"model": {"path": "m"}, "clients": [{"name": "a", "input_blocks": 3}], **sections})


def test_the_defaults_accept_any_plan():
    ClientLimits().check(plan(), "a")


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        ({"train": ("output",)}, "adapter.input"),
        ({"train": ("input",)}, "adapter.output"),
        ({"max_input_blocks": 2}, "input_blocks = 3"),
        ({"min_input_blocks": 4}, "input_blocks = 3"),
        ({"min_output_blocks": 2}, "output_blocks = 1"),
        ({"codecs": ("bf16",)}, "wire.hidden"),
        ({"codecs": ("bf16",)}, "wire.gradient"),
        ({"trust": ("noised",)}, "trust.mode"),
    ],
)
def test_a_plan_past_a_limit_is_refused_with_the_fields_name(limits, field):
    with pytest.raises(ConfigError, match=field):
        ClientLimits(**limits).check(plan(), "a")


def test_frozen_segments_need_no_permission():
    ClientLimits(train=()).check(plan(adapter={"input": "frozen", "output": "frozen"}), "a")


def test_all_problems_are_said_at_once():
    with pytest.raises(ConfigError) as caught:
        ClientLimits(train=(), codecs=("bf16",)).check(plan(), "a")
    message = caught.value.message
    assert all(field in message for field in ("adapter.input", "adapter.output", "wire.hidden", "wire.gradient"))


def options(tmp_path, text: str) -> ClientOptions:
    settings = tmp_path / "client.toml"
    settings.write_text(text)
    return ClientOptions("127.0.0.1:1", tmp_path, settings=settings)


def test_limits_are_read_from_the_settings_file(tmp_path):
    with pytest.raises(ConfigError, match="allows 0 to 2"):
        check_limits(plan(), "a", options(tmp_path, "[limits]\nmax_input_blocks = 2\n"))
    check_limits(plan(), "a", options(tmp_path, "[limits]\nmax_input_blocks = 3\n"))


@pytest.mark.parametrize(
    ("text", "problem"), [("[limits]\nmax_blocks = 2\n", "limits|max_blocks"), ("[limits", "not valid TOML")]
)
def test_bad_settings_are_refused(tmp_path, text, problem):
    with pytest.raises(ConfigError, match=problem):
        check_limits(plan(), "a", options(tmp_path, text))
