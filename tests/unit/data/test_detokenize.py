"""Tokens become text as they come: whole characters, right spaces, nothing from a stop string on."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from fedsea.data.detokenize import TextStream
from fedsea.errors import ConfigError


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """As LLaMA 2's: a space before every word, bytes for what has no token."""
    words = ["▁", "▁to", "▁be", "be", ",", "▁or", "é"]
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *words])
    }
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def ids(tokenizer: Any, *tokens: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def streamed(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.finish()]


def test_a_character_of_several_tokens_appears_when_it_is_whole(tokenizer: Any) -> None:
    tokens = tokenizer.encode("aé😀b", add_special_tokens=False)
    assert streamed(TextStream(tokenizer), tokens) == ["a", "", "é", "", "", "", "😀", "b", ""]


def test_spaces_are_those_of_the_whole_text(sentencepiece: Any) -> None:
    tokens = ids(sentencepiece, "▁to", "▁be", ",", "▁", "▁or", "be")
    assert streamed(TextStream(sentencepiece), tokens) == ["to", " be", ",", " ", " or", "be", ""]


def test_an_answer_that_continues_a_prompt_keeps_its_first_space(sentencepiece: Any) -> None:
    stream = TextStream(sentencepiece, after=ids(sentencepiece, "<s>", "▁to"))
    assert streamed(stream, ids(sentencepiece, "▁be")) == [" be", ""]


def test_characters_of_byte_tokens_are_joined(sentencepiece: Any) -> None:
    tokens = ids(sentencepiece, "▁to", *(f"<0x{byte:02X}>" for byte in "😀ü".encode()), "▁be")
    assert streamed(TextStream(sentencepiece), tokens) == ["to", "", "", "", "😀", "", "ü", " be", ""]


@pytest.mark.parametrize("which", ["tokenizer", "sentencepiece"])
def test_pieces_joined_are_the_text_decoded_at_once(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(which)
    draw = random.Random(7)
    for _ in range(50):
        text = "".join(draw.choices(["to", " be", ", or", "é", "😀", "\n", "  ", "中"], k=12))
        tokens = tokenizer.encode(text)
        assert "".join(streamed(TextStream(tokenizer), tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_special_tokens_have_no_text(tokenizer: Any) -> None:
    tokens = [tokenizer.bos_token_id, *tokenizer.encode("a", add_special_tokens=False), tokenizer.eos_token_id]
    assert "".join(streamed(TextStream(tokenizer), tokens)) == "a"


def test_bytes_that_are_no_character_do_not_wait_for_ever(tokenizer: Any) -> None:
    stray = tokenizer.encode("é", add_special_tokens=False)[0]
    pieces = streamed(TextStream(tokenizer), [stray] * 40)
    assert "".join(pieces) == "\ufffd" * 40
    assert any(pieces[:20])


def test_a_text_that_ends_within_a_character_says_so_at_the_end(tokenizer: Any) -> None:
    tokens = tokenizer.encode("a😀", add_special_tokens=False)[:-1]
    assert streamed(TextStream(tokenizer), tokens) == ["a", "", "", "", "\ufffd"]


def test_nothing_appears_from_a_stop_string_on(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, ["##", "never"])
    pieces = streamed(stream, tokenizer.encode("a#b##c", add_special_tokens=False))
    assert pieces == ["a", "", "#b", "", "", "", ""]
    assert stream.stopped


def test_the_earliest_of_several_stop_strings_counts(tokenizer: Any) -> None:
    assert "".join(streamed(TextStream(tokenizer, ["cd", "bcde"]), tokenizer.encode("abcd"))) == "ab"


def test_the_beginning_of_a_stop_string_appears_when_nothing_follows(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, ["##"])
    assert streamed(stream, tokenizer.encode("a#", add_special_tokens=False)) == ["a", "", "#"]
    assert not stream.stopped


def test_a_stop_string_within_one_tokens_text_is_found(sentencepiece: Any) -> None:
    stream = TextStream(sentencepiece, "o")
    assert streamed(stream, ids(sentencepiece, "▁to", "▁be")) == ["t", "", ""]


def test_an_empty_stop_string_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="empty"):
        TextStream(tokenizer, [""])
