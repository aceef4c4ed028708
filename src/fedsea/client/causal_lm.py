"""The split model as an ordinary model of transformers: `generate`, `Trainer`, trl and lm_eval use it as it is.

    >>> model = SplitCausalLM.connect("server:7443", "identity/bank", run="runs/bank")      # doctest: +SKIP
    >>> ids = model.tokenizer("Dear customer,", return_tensors="pt")                        # doctest: +SKIP
    >>> model.generate(**ids, max_new_tokens=40)                                            # doctest: +SKIP

B  rows of a padded batch, S  its columns, K  columns whose logits are wanted, T  tokens end to end, V  vocabulary size
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedsea.client.backbone import Backbone, refuse
from fedsea.client.causal_cache import CacheKeeper, SplitCache
from fedsea.client.causal_head import kept_logits, loss_of, targets_of
from fedsea.client.causal_saving import load_trained, save_trained
from fedsea.client.decoding import SplitDecoder
from fedsea.client.inference import OpenedDecoder, open_decoder
from fedsea.client.padding import cells_of, refuse_padding_at_the_end
from fedsea.client.results import status
from fedsea.client.setup import ClientOptions
from fedsea.errors import ConfigError
from fedsea.model.attention import checkpoint_activations

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_MADE: ContextVar[list[SplitCache] | None] = ContextVar("caches that this call of generate made", default=None)


class SplitCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Input and output blocks here, the trunk wherever the decoder has it.

    Its parameters are the client's own; those of its adapters train, through the trunk, whose parameters stay as they
    are. Padding is neither computed nor sent. A padding position takes no loss, and its logits are zero.

    Args:
        decoder: The split model.
        config: The whole model's; None: what the segments know of it.

    Attributes:
        decoder: As given.
        tokenizer: The base model's, if the model was made by `connect`.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _is_stateful = False
    _no_split_modules: ClassVar[list[str]] = []

    def __init__(self, decoder: SplitDecoder, config: PreTrainedConfig | None = None) -> None:
        config = copy.deepcopy(decoder.segments.output_blocks.model.config if config is None else config)
        config._attn_implementation = "sdpa"
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # the trainer's count of targets depends on it
        self.decoder = decoder
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.all_tied_weights_keys: dict[str, str] = {}
        self.model = Backbone(decoder)
        self._caches = CacheKeeper()
        self._connection = contextlib.ExitStack()
        self.eval()

    @classmethod
    def connect(
        cls,
        server: str,
        identity: str | Path,
        *,
        run: str | Path = "runs/client",
        model: str | None = None,
        settings: str | Path | None = None,
        base: bool = False,
        device: str = "cpu",
        retry_for_s: float = 600.0,
    ) -> SplitCausalLM:
        """Open the federation's model through its server. `close` it, or use it as a context manager.

        Args:
            server: `HOST:PORT`.
            identity: Folder of this client's identity.
            run: Folder of this client's training run, whose parameters are used.
            model: This client's own copy of the base model; None takes the plan's path or hub id.
            settings: Client settings (TOML) with this client's limits.
            base: Use the base model's own segments, whatever `run` holds.
            device: Where the client's segments run.
            retry_for_s: How long a lost server is sought.

        Raises:
            ConfigError: As `client.inference.open_decoder`.
            FedseaError: The server cannot be reached or refuses.
        """
        options = ClientOptions(
            server,
            Path(identity),
            run=Path(run),
            model=model,
            settings=None if settings is None else Path(settings),
            device=device,
            retry_for_s=retry_for_s,
        )
        with contextlib.ExitStack() as connection:
            opened = connection.enter_context(open_decoder(options, base=base))
            if opened.pseudonyms is not None:
                log.warning(
                    "[pseudonyms] is enabled, but this model takes token ids, in which nothing can be replaced: make "
                    "them with fedsea.client.pseudonyms.Prompts, or use fedsea generate, chat or gateway"
                )
            made = cls.of(opened)
            if not base:  # without a cache it is not the published trunk that answers, but the one as it is now
                opened.decoder.on_version(status(options.server, options.identity)["next_step"])
            made._connection = connection.pop_all()
        return made

    @classmethod
    def of(cls, opened: OpenedDecoder) -> SplitCausalLM:
        """A model over an opened decoder, whose connection stays its opener's."""
        made = cls(opened.decoder, opened.checkpoint.config)
        made.tokenizer = opened.tokenizer
        made.tokenizer.padding_side = "left"  # a batch of prompts goes on at its right end
        if (opened.checkpoint.folder / "generation_config.json").is_file():
            made.generation_config = GenerationConfig.from_pretrained(opened.checkpoint.folder)
        return made

    def close(self) -> None:
        """Close all caches, and the connection that `connect` made; may be called twice."""
        self._caches.close()
        self._connection.close()

    def __enter__(self) -> SplitCausalLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: SplitCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, K, V], and the loss if there are labels; gradients pass, but not with a cache.

        Args:
            input_ids: [B, S].
            attention_mask: 0 where there is padding, on any side.
            position_ids: Not needed; only looked at for rows of several sequences ("padding-free" batches).
            cache: One of `new_cache`, which new tokens are added to; also as `past_key_values`, its older name.
            labels: [B, S], not shifted; -100 takes no loss.
            use_cache: True makes a cache if none is given (close it; in a call of `generate` that is done for you);
                None and False make none.
            logits_to_keep: Logits of so many last columns only, or of these columns; 0: of all.
            return_dict: False: a tuple.
            num_items_in_batch: What the summed loss is divided by; None: its number of targets.
            shift_labels: Used instead of labels: the same, each at the token before it.
            others: `output_attentions` and `output_hidden_states` are refused; the rest is not needed here.

        Raises:
            ConfigError: The inputs cannot be used; the message says why.
            FedseaError: The trunk is lost.
        """
        older = others.pop("past_key_values", None)
        cache = older if cache is None else cache
        input_ids = refuse(input_ids, others)
        if cache is None and use_cache:
            cache = self._cache_beside(input_ids)
        targets, loss = targets_of(labels, shift_labels), None
        if cache is None:
            cells = cells_of(input_ids, attention_mask, position_ids)
            final_TH = self.model.run(input_ids, cells)
            keep = logits_to_keep if targets is None else 0
            logits = kept_logits(self.decoder.segments.output_blocks, final_TH, cells, keep)
            if targets is not None:
                loss = loss_of(logits, cells, targets, num_items_in_batch)
        elif targets is not None:
            raise ConfigError("A loss cannot be taken with a cache: leave the cache out, or the labels.")
        else:
            last = logits_to_keep if isinstance(logits_to_keep, int) else 0
            logits = _own(cache).extend(input_ids, attention_mask, last)
            if not isinstance(logits_to_keep, int):
                logits = logits[:, logits_to_keep]
        output = CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)
        return output.to_tuple() if return_dict is False else output

    # --- generate ---------------------------------------------------------------------------------------------------

    def new_cache(self, max_tokens: int | None = None) -> SplitCache:
        """An empty cache, to be kept over several calls of `generate` or `forward`, and closed.

        It sees the adapters as they are now.

        Args:
            max_tokens: Most columns of a row, prompt and answer together; None: as many as the plan allows.
        """
        self._caches.sweep()
        return SplitCache(self.decoder.renewed(), max_tokens or self.decoder.max_tokens, self._caches)

    def _cache_beside(self, input_ids_BS: torch.Tensor) -> SplitCache:
        """A cache that was not prepared: in `generate`, of a prompt beside the one that is answered, as guidance has.

        Nobody there closes it, and such a prompt is answered no further than the call's own.
        """
        made = _MADE.get()
        if made is None:
            return self.new_cache()
        longest = max((cache.max_tokens for cache in made), default=self.decoder.max_tokens)
        cache = self.new_cache(min(self.decoder.max_tokens, input_ids_BS.shape[-1] + longest))
        made.append(cache)
        return cache

    def generate(self, *inputs: Any, **settings: Any) -> Any:
        """See `GenerationMixin.generate`; beams and return sequences share one run of their prompt.

        Caches are closed at the end, unless one of `new_cache` is given as `cache`.

        Raises:
            ConfigError: A prompt is padded on the right, or something is asked for that a split model cannot do.
            FedseaError: The trunk is lost.
        """
        made: list[SplitCache] = []
        token = _MADE.set(made)
        try:
            return super().generate(*inputs, **settings)
        finally:
            _MADE.reset(token)
            for cache in made:
                cache.close()

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ConfigError("A split model has a cache of its own: leave cache_implementation out.")
        if generation_config.is_assistant:
            raise ConfigError("A split model cannot be the assistant: take a small model that is all here.")
        if generation_config.assistant_early_exit is not None:
            raise ConfigError(
                "assistant_early_exit needs all blocks here, and most of a split model's are at the server: take a "
                "small assistant_model, or prompt_lookup_num_tokens."
            )
        refuse_padding_at_the_end(model_kwargs.get("attention_mask"))
        if (given := model_kwargs.get("cache")) is not None:
            _own(given)
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        elif generation_config.use_cache:
            cache = model_kwargs["cache"] = self.new_cache(max_cache_length + 1)
            if (made := _MADE.get()) is not None:
                made.append(cache)

    # --- what transformers asks of a model --------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, at the client."""
        embedding: nn.Module = self.model.input_blocks.get_input_embeddings()
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        """The LM head, at the client."""
        head: nn.Module = self.model.output_blocks.get_output_embeddings()
        return head

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Nothing to do: the segments are loaded as they are."""

    def gradient_checkpointing_enable(  # transformers' activation_checkpointing_enable comes here, and so do trainers
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute the activations of the client's blocks in the backward pass; the trunk is asked once either way.

        Args:
            gradient_checkpointing_kwargs: Settings of `torch.utils.checkpoint.checkpoint`.
            every_n_layers: Only those of every n-th block, counted in each of the two segments.
            offload: Keep what they are recomputed from in the host's memory.

        Raises:
            ConfigError: It is asked for in a way that the blocks cannot.
        """
        for segment in (self.decoder.segments.input_blocks, self.decoder.segments.output_blocks):
            if len(segment.blocks):
                settings = gradient_checkpointing_kwargs
                checkpoint_activations(segment.model, every_n_layers, offload=offload, settings=settings)

    def to(self, *args: Any, **kwargs: Any) -> SplitCausalLM:
        """Only to where it is: the device is chosen when the model is opened.

        Raises:
            ConfigError: Another device or type is asked for.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        moved = device is not None and (device.type, device.index or 0) != (self.device.type, self.device.index or 0)
        if moved or dtype not in (None, self.dtype):
            raise ConfigError("A split model stays where it is: give connect(device=...), and the plan's model.dtype.")
        return self

    def save_pretrained(
        self, save_directory: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None, **_: Any
    ) -> None:
        """Write what is trained here, and the config: not the base model's weights, nor anything of the trunk."""
        folder = Path(save_directory)
        save_trained(self, folder, state_dict)
        self.config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)

    def load_trained(self, folder: str | Path) -> None:
        """Take over what `save_pretrained`, or a checkpoint of a trainer's, holds.

        Raises:
            ConfigError: The folder holds something else.
        """
        load_trained(self, Path(folder))


def _own(cache: object) -> SplitCache:
    if not isinstance(cache, SplitCache):
        raise ConfigError("The cache of a split model must come from its new_cache().")
    return cache
