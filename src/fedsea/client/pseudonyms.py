"""Where a client's pseudonyms meet its data and its prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsea.data.detokenize import TextFilter
from fedsea.data.prompts import PromptMaker
from fedsea.data.templates import instruction_prompt
from fedsea.errors import ConfigError
from fedsea.plan import load_settings
from fedsea.privacy.pseudonyms import Pseudonyms, open_pseudonyms
from fedsea.storage import write_bytes_atomic

log = logging.getLogger(__name__)

_NOTE = "pseudonyms"


def pseudonyms_of(settings: Path | None, owner: str, run: Path | None = None) -> Pseudonyms | None:
    """The pseudonyms of a client, if its settings file switches them on.

    Args:
        settings: The file, or None.
        owner: Name of the client; a mapping of another one is refused.
        run: The client's run folder; if it was trained on pseudonyms, no new mapping is begun for it.

    Raises:
        ConfigError: The file, a package or the key cannot be used, or the mapping is another client's, or lost.
        StorageError: The mapping is truncated or was altered.
    """
    if settings is None or not (chosen := load_settings(settings).pseudonyms).enabled:
        return None
    mapping = settings.parent / chosen.mapping
    if run is not None and trained_on_pseudonyms(run) and not mapping.exists():
        raise ConfigError(
            f"{run} was trained on pseudonyms, and their mapping {mapping} is not there: put the newest copy of it and "
            "of its key back, for a new mapping has other surrogates. To begin with one, take a new run folder."
        )
    found = open_pseudonyms(chosen, settings.parent, owner)
    log.info(
        "identifiers that are recognised become pseudonyms before tokenising (%d in the mapping so far); "
        "`fedsea pseudonyms recall` says how many are not recognised",
        found.num_entries,
    )
    return found


def note_training(run: Path, settings: Path | None) -> None:
    """Note in a run's folder that it is trained on pseudonyms, for those who use it."""
    if settings is not None and load_settings(settings).pseudonyms.enabled:
        write_bytes_atomic(run / _NOTE, b"")


def trained_on_pseudonyms(run: Path) -> bool:
    """Whether this was noted in a client's run folder."""
    return (run / _NOTE).exists()


def warn_without(run: Path, pseudonyms: Pseudonyms | None) -> None:
    """Say so if a run that was trained on pseudonyms is used without them."""
    if pseudonyms is None and trained_on_pseudonyms(run):
        log.warning(
            "%s was trained on pseudonyms, and nothing is replaced in what you ask now: names and numbers leave as "
            "they are. Give the --settings of the training.",
            run,
        )


def refuse_without(run: Path, settings: Path | None) -> None:
    """Refuse to give a client's rows to a run that was trained on pseudonyms as they are.

    Raises:
        ConfigError: The run was, and the settings file switches none on.
    """
    if trained_on_pseudonyms(run) and (settings is None or not load_settings(settings).pseudonyms.enabled):
        raise ConfigError(
            f"{run} was trained on pseudonyms, and without them the names and numbers in your rows would leave as they "
            "are: give the --settings of the training, whose [pseudonyms] are enabled."
        )


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given.

    Attributes:
        ids: Token ids.
        restore: Begins a filter that puts originals back into one answer; None: nothing was replaced.
    """

    ids: list[int]
    restore: Callable[[], TextFilter] | None = None


class Prompts:
    """From what a user asks to what the model is given, as in training. Any number of threads may use it.

    Args:
        tokenizer: A transformers tokenizer.
        pseudonyms: Replace identifiers first; None: nothing is replaced.
    """

    def __init__(self, tokenizer: Any, pseudonyms: Pseudonyms | None = None) -> None:
        self._maker = PromptMaker(tokenizer)
        self._pseudonyms = pseudonyms

    @property
    def replaces(self) -> bool:
        """Whether identifiers are replaced, so that only text can be taken."""
        return self._pseudonyms is not None

    def text(self, text: str) -> Prompt:
        """A plain text.

        Raises:
            FedseaError: Its identifiers cannot be replaced.
        """
        return self._made([text], lambda new: self._maker.text(new[0]))

    def instruction(self, text: str) -> Prompt:
        """An instruction, in the template of training.

        Raises:
            FedseaError: Its identifiers cannot be replaced.
        """
        return self._made([text], lambda new: self._maker.text(instruction_prompt(new[0])))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """A conversation, see `PromptMaker.chat`.

        Raises:
            ConfigError: The template refuses it.
            FedseaError: Its identifiers cannot be replaced.
        """

        def made(new: Sequence[str]) -> list[int]:
            return self._maker.chat([{**one, "content": text} for one, text in zip(messages, new, strict=True)])

        return self._made([message["content"] for message in messages], made)

    def _made(self, texts: Sequence[str], made: Callable[[Sequence[str]], list[int]]) -> Prompt:
        pseudonyms = self._pseudonyms
        if pseudonyms is None:
            return Prompt(made(texts))
        replaced = pseudonyms.conversation(texts)
        return Prompt(made([one.text for one in replaced]), lambda: pseudonyms.restorer(replaced))
