"""Loading a tokenizer, and what fedsea needs to know about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedsea.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path_or_id: str, revision: str = "main", *, vocab_size: int | None) -> PreTrainedTokenizerBase:
    """Load a tokenizer; code that comes with a checkpoint is never run.

    Args:
        path_or_id: Local folder or hub id.
        revision: Hub revision.
        vocab_size: Rows of the model's embedding; `None` leaves the check out.

    Raises:
        ConfigError: There is no tokenizer, it is broken, or its ids do not fit the model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, revision=revision, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 (the Rust library raises bare Exceptions for a broken file)
        raise ConfigError(
            f"No tokenizer could be loaded from {path_or_id} ({type(error).__name__}). It must be a folder or hub id "
            "with tokenizer.json or tokenizer.model and tokenizer_config.json, and need no code of its own."
        ) from None
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse a tokenizer that can give ids for which the model has no embedding.

    Raises:
        ConfigError: The largest id is not below `vocab_size`.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ConfigError(
            f"The tokenizer gives ids up to {largest}, but the model's vocabulary ends at {vocab_size - 1}: "
            "use the tokenizer of this model, or a model whose embedding was resized for the added tokens."
        )
    if largest < 0:
        raise ConfigError("The tokenizer has no tokens: use the tokenizer of this model.")


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, without the special tokens that a tokenizer adds by itself."""
    if not texts:
        return []
    # verbose=False: no warning about model_max_length; fedsea cuts to the plan's max_tokens itself.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def beginning_of(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts before a text: usually BOS or nothing, two tokens for GLM."""
    plain = ids_of(tokenizer, ["a"])[0]
    full: list[int] = tokenizer("a", return_attention_mask=False)["input_ids"]
    for start in range(len(full) if plain else 0):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in full[:1] else []
