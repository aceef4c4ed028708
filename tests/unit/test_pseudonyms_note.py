"""A run that was trained on pseudonyms is not used without them unsaid."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsea.client.pseudonyms import note_training, warn_without


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
