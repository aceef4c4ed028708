"""A federation's model, opened to be used: the way from a client's settings to a decoder that is ready."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsea.client import setup
from fedsea.client.decoding import SplitDecoder
from fedsea.client.pseudonyms import Prompts, pseudonyms_of, warn_without
from fedsea.client.results import PartsWatch, observing, own_run
from fedsea.client.setup import ClientOptions
from fedsea.client.trunk import Trunk
from fedsea.data.tokenizer import load_tokenizer
from fedsea.errors import ConfigError
from fedsea.model.checkpoint import Checkpoint
from fedsea.plan import FederationPlan
from fedsea.privacy.pseudonyms import Pseudonyms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class OpenedDecoder:
    """A split model that is ready, and what goes with it.

    Attributes:
        decoder: Opens sequences; any number of threads may use it.
        tokenizer: The base model's.
        plan: The server's plan.
        name: This client.
        trunk: The connection; ends with the context that gave this.
        checkpoint: This client's copy of the base model.
        pseudonyms: What replaces identifiers in prompts and puts them back into answers, if the settings say so.
    """

    decoder: SplitDecoder
    tokenizer: PreTrainedTokenizerBase
    plan: FederationPlan
    name: str
    trunk: Trunk
    checkpoint: Checkpoint
    pseudonyms: Pseudonyms | None = None

    @property
    def prompts(self) -> Prompts:
        """Makes prompts as training did; see there for answers."""
        return Prompts(self.tokenizer, self.pseudonyms)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's, the model's, and those of its settings for generation."""
        stated = [
            self.tokenizer.eos_token_id,
            getattr(self.checkpoint.config.get_text_config(decoder=True), "eos_token_id", None),
        ]
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says nothing
            settings = json.loads((self.checkpoint.folder / "generation_config.json").read_text(encoding="utf-8"))
            stated.append(settings.get("eos_token_id"))
        found = {token for ids in stated for token in (ids if isinstance(ids, list | tuple) else [ids])}
        return tuple(sorted(token for token in found if isinstance(token, int)))


@contextlib.contextmanager
def open_decoder(
    options: ClientOptions, *, base: bool = False, tell: Callable[[str], None] = setup.unsaid
) -> Iterator[OpenedDecoder]:
    """Open the federation's model for this client, through the server; the connection lasts as long as the context.

    A lost connection is sought for `options.retry_for_s`; answers under way then go on where they were. The log says so
    when answers come from a version of the trunk that this client's parameters were not trained with.

    Args:
        options: `options.run` holds this client's training run with the server; its parameters are used. No data.
        base: Use the base model's own segments with the server's trunk, whatever `options.run` holds.
        tell: Told what is being done meanwhile, for displays.

    Raises:
        ConfigError: The run folder holds no run, or another one; the plan allows no inference or goes past this
            client's limits; the base model is another one.
        FedseaError: The server cannot be reached or refuses.
    """
    tell(setup.reaching(options))
    invited = setup.accept(options)
    plan, name = invited.plan, invited.name
    if not plan.inference.enabled:
        raise ConfigError("The server's plan allows no inference (inference.enabled = false): ask its operator.")
    state, trained = (None, None) if base else own_run(options.run, invited.key)
    pseudonyms = pseudonyms_of(options.settings, name, options.run)
    warn_without(options.run, pseudonyms)
    tell(setup.CHECKING)
    checkpoint = setup.open_base_model(plan, options, name)
    vocab_size = int(checkpoint.config.get_text_config(decoder=True).vocab_size)
    tokenizer = load_tokenizer(str(checkpoint.folder), plan.model.revision, vocab_size=vocab_size)
    tell(setup.LOADING)
    segments = setup.load_segments(plan, checkpoint, name, options.device)
    if trained is not None:
        segments.load_tensors(trained)
    segments.train(False)
    trunk = observing(options, invited, setup.wire_limits(plan, checkpoint, name))
    watch = (lambda _: None) if state is None else PartsWatch(plan, name, state, options.run)
    with invited.keeper, trunk, setup.open_boundary(plan, name, invited.invitation.run_id, options) as boundary:
        decoder = SplitDecoder(plan, segments, trunk, boundary, on_version=watch)
        yield OpenedDecoder(decoder, tokenizer, plan, name, trunk, checkpoint, pseudonyms)
