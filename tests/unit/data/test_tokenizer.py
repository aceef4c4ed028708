"""Loading tokenizers, and refusing those that do not fit."""

from __future__ import annotations

import pytest

from fedsea.data import load_tokenizer
from fedsea.errors import ConfigError


def test_a_saved_tokenizer_loads_and_fits_its_model(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), vocab_size=len(tokenizer))
    assert loaded("ab")["input_ids"] == tokenizer("ab")["input_ids"]


def test_a_tokenizer_with_ids_behind_the_vocabulary_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"ids up to {len(tokenizer) - 1}, .* ends at {len(tokenizer) - 2}"):
        load_tokenizer(str(tmp_path), vocab_size=len(tokenizer) - 1)


def test_a_folder_without_tokenizer_and_a_broken_one_are_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text('{"version": 1}')
    (tmp_path / "none").mkdir()
    for folder in ("none", "broken"):
        with pytest.raises(ConfigError, match=f"No tokenizer could be loaded from .*{folder}"):
            load_tokenizer(str(tmp_path / folder), vocab_size=None)
