"""A small whole model that guesses what a large one will say, with a cache of its own.

T  new tokens, V  vocabulary of the large model
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.utils import logging as hf_logging

from fedsea.errors import ConfigError

_PROBE = (1, 2, 3)


class DraftModel:
    """Any causal language model that keeps nothing but keys and values. Any number of threads may use it.

    Args:
        path: Folder or hub id; only safetensors are read, and code that comes with a checkpoint is never run.
        revision: Hub revision.
        dtype: Of weights and computation: "auto" takes the checkpoint's.
        device: Where it lives.

    Raises:
        ConfigError: It cannot be loaded, or its cache cannot go back.
    """

    def __init__(
        self, path: str, *, revision: str = "main", dtype: str = "auto", device: torch.device | str = "cpu"
    ) -> None:
        hf_logging.disable_progress_bar()
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
        except Exception as error:  # noqa: BLE001 (transformers' own, of many kinds, for files that are damaged)
            raise ConfigError(
                f"No draft model could be loaded from {path} ({type(error).__name__}): give the folder of a whole "
                "Hugging Face causal language model with safetensors."
            ) from None
        self._model = model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        config = model.config.get_text_config(decoder=True)
        self.max_tokens: int | None = getattr(config, "max_position_embeddings", None)
        self.vocab_size = int(config.vocab_size)
        self._check(path)

    def _check(self, path: str) -> None:
        """A cache that goes back must leave no trace, which is not so where blocks have a state."""
        text, fresh = DraftText(self._model, self.device), DraftText(self._model, self.device)
        try:
            text.next(_PROBE)
            again_V, expected_V = text.next((_PROBE[0], _PROBE[2])), fresh.next((_PROBE[0], _PROBE[2]))
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"The model in {path} cannot draft: its cache cannot go back ({error}).") from error
        if not torch.allclose(again_V, expected_V, rtol=1e-2, atol=1e-2):
            raise ConfigError(f"The model in {path} cannot draft: its cache cannot go back.")

    def open(self) -> DraftText:
        """An empty text."""
        return DraftText(self._model, self.device)


class DraftText:
    """One text that a draft model continues. Made by `DraftModel.open`."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._cache = DynamicCache()
        self._held: list[int] = []

    @torch.inference_mode()
    def next(self, tokens: Sequence[int], agreed: int = 0) -> torch.Tensor:
        """Logits [V] in float32 of the token after these; what differs from the last text is forgotten.

        Args:
            tokens: The text, at least one token.
            agreed: So many first tokens are known to be those of the last call.
        """
        kept = common(self._held, tokens, agreed)
        if kept < len(self._held):
            self._cache.crop(kept - len(self._held))
            del self._held[kept:]
        new_1T = torch.tensor([list(tokens[kept:])], device=self._device)
        output = self._model(new_1T, cache=self._cache, use_cache=True, logits_to_keep=1)
        self._held += tokens[kept:]
        logits_V: torch.Tensor = output.logits[0, -1].float()
        return logits_V


def common(held: Sequence[int], tokens: Sequence[int], agreed: int = 0) -> int:
    """Tokens that a cache can keep for a text; the last one at least is run again, for its logits.

    >>> common([5, 6, 7], [5, 6, 8]), common([5, 6], [5, 6]), common([5], [5, 6])
    (2, 1, 1)
    """
    most = min(len(held), len(tokens) - 1)
    kept = min(agreed, most)
    while kept < most and held[kept] == tokens[kept]:
        kept += 1
    return kept
