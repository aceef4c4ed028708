"""A run that was trained on pseudonyms is not used without them unsaid."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsea.client.pseudonyms import note_training, warn_without
from fedsea.client.results import evaluate
from fedsea.client.setup import ClientOptions
from fedsea.errors import ConfigError, FedseaError


@pytest.mark.parametrize("enabled", [True, False])
def test_use_without_pseudonyms_of_a_run_that_was_trained_on_them_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, enabled: bool
) -> None:
    settings = tmp_path / "client.toml"
    settings.write_text(f"[pseudonyms]\nenabled = {str(enabled).lower()}\n", encoding="utf-8")
    note_training(tmp_path, settings)
    warn_without(tmp_path, None)
    assert ("was trained on pseudonyms" in caplog.text) is enabled


def test_a_run_without_settings_has_no_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    note_training(tmp_path, None)
    warn_without(tmp_path, None)
    assert not caplog.text


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("given", ["none", "disabled", "enabled"])
def test_rows_are_not_evaluated_as_they_are_by_a_run_that_was_trained_on_pseudonyms(
    tmp_path: Path, given: str, base: bool
) -> None:
    enabled, disabled = tmp_path / "client.toml", tmp_path / "other.toml"
    enabled.write_text("[pseudonyms]\nenabled = true\n", encoding="utf-8")
    disabled.write_text("", encoding="utf-8")
    note_training(tmp_path, enabled)
    settings = {"none": None, "disabled": disabled, "enabled": enabled}[given]
    options = ClientOptions("127.0.0.1:1", tmp_path / "no identity", run=tmp_path, settings=settings)
    with pytest.raises(FedseaError) as caught:
        evaluate(options, base=base)
    refused = isinstance(caught.value, ConfigError) and "give the --settings of the training" in str(caught.value)
    assert refused is (given != "enabled")  # with them it goes on, and then wants an identity
