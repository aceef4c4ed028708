"""The only exit: every tensor that leaves a client is a `Release` made here.

With trust mode `trusted-server` the boundary checks and passes values on unchanged: the server can reconstruct
the text from them. With `noised` it clips, charges the ledger durably, then adds noise, in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fedsea.errors import ConfigError, NonFiniteError, UnprotectedRelease
from fedsea.plan import ClientNoise, FederationPlan, NoiseSection, trust_statement
from fedsea.plan.trust import TRUSTED_SERVER
from fedsea.privacy.claims import Claim, NoClaim, claim_of
from fedsea.privacy.clip import clip_rows, clip_sequences, clip_together
from fedsea.privacy.ledger import Ledger
from fedsea.privacy.noise import GaussianNoise
from fedsea.privacy.pricing import Pricing
from fedsea.tensors import all_finite
from fedsea.types import Channel, Origin, Release

STATEMENTS = {"trusted-server": TRUSTED_SERVER}
"""Trust mode to its sentence, for those that need no more of the plan."""


class Boundary:
    """Makes releases for one client under one trust mode. `Boundary.of` makes one for a plan.

    Any thread may call it. The ledger stays its opener's, who closes it.

    Args:
        trust_mode: A key of `STATEMENTS`.

    Attributes:
        statement: What is said at every start.
        noise: What is clipped to and added; None: nothing is.
        ledger: Where releases are charged; None: nowhere.
    """

    def __init__(self, trust_mode: str) -> None:
        if trust_mode not in STATEMENTS:
            raise ConfigError(f"Trust mode {trust_mode} needs its plan: make the boundary with Boundary.of(plan).")
        self.statement = STATEMENTS[trust_mode]
        self.noise: NoiseSection | None = None
        self.ledger: Ledger | None = None
        self._pricing: Pricing | None = None
        self._generator = GaussianNoise()

    @classmethod
    def of(
        cls,
        plan: FederationPlan,
        name: str = "",
        ledger: Ledger | None = None,
        settings: ClientNoise | None = None,
        *,
        key: bytes | None = None,
    ) -> Boundary:
        """The boundary of a client of a plan.

        Args:
            plan: The plan.
            name: The client; "" for the plan's first.
            ledger: Charged before anything is made that can be sent; None for trunks in this process, where nothing
                leaves: then noise is added, and nothing is counted.
            settings: The client's own noise, where it is stricter than the plan's.
            key: For tests that need the same noise twice: 32 bytes.

        Raises:
            ConfigError: The settings are laxer than the plan.
        """
        made, name = cls("trusted-server"), name or plan.client_names[0]
        noise = (settings or ClientNoise()).over(plan, name)
        made.statement = trust_statement(plan, name, noise)
        if plan.trust.mode == "noised":
            made.noise, made.ledger = noise, ledger
            made._pricing = Pricing(plan, name, noise)
            made._generator = GaussianNoise(key)
        return made

    def claim(self) -> Claim | NoClaim:
        """What may be claimed of all that was released under the plan with this client's ledger."""
        if self._pricing is None:
            return NoClaim("trust.mode is trusted-server: nothing is clipped and no noise is added")
        spent = None if self.ledger is None else self.ledger.spent
        return claim_of(self._pricing.plan, self._pricing.name, spent, self.noise)

    def hidden(self, hidden_TH: torch.Tensor, origin: Origin | None = None) -> Release:
        """Release hidden states at the trunk's input.

        Args:
            hidden_TH: Of all sequences, end to end.
            origin: What the rows come from; needed wherever noise is added.

        Raises:
            NonFiniteError: A value is NaN or infinite.
            BudgetExhausted: The budget does not cover it; nothing was released.
            StorageError: The ledger could not be written; nothing was released.
            UnprotectedRelease: Nobody said what the rows come from.
        """
        given = {"": hidden_TH}
        if self._pricing is not None:
            hidden_TH = self._rows(hidden_TH, Channel.HIDDEN, origin)
        return self._release({"": hidden_TH}, Channel.HIDDEN, given)

    def gradient(self, gradient_TH: torch.Tensor, origin: Origin | None = None) -> Release:
        """Release the gradient of the summed loss at the trunk's output; see `hidden`."""
        given = {"": gradient_TH}
        if self._pricing is not None:
            gradient_TH = self._rows(gradient_TH, Channel.GRADIENT, origin)
        return self._release({"": gradient_TH}, Channel.GRADIENT, given)

    def update(
        self, tensors: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor] | None = None
    ) -> Release:
        """Release trained parameters, or their gradients, by name.

        Args:
            tensors: By name.
            reference: What the server knows already; the difference to it is clipped and noised. None: zeros.

        Raises:
            NonFiniteError: A value is NaN or infinite.
            BudgetExhausted: The budget does not cover it; nothing was released.
            StorageError: The ledger could not be written; nothing was released.
        """
        given = tensors
        if self._pricing is not None and tensors:
            tensors = self._update(tensors, reference or {})
        return self._release(tensors, Channel.UPDATE, given)

    def maskable(
        self, tensors: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor] | None = None
    ) -> Maskable:
        """Like `update`, for secure aggregation: released once here, and sent under fresh masks in every attempt."""
        return Maskable(self.update(tensors, reference).take())

    def _rows(self, values_TH: torch.Tensor, channel: Channel, origin: Origin | None) -> torch.Tensor:
        assert self.noise is not None
        if origin is None or sum(origin.lengths) != values_TH.shape[0]:
            raise UnprotectedRelease(
                f"{channel} values were about to be released without saying of which sequences they are, so they "
                "cannot be clipped or accounted for: pass an Origin."
            )
        _check_finite({"": values_TH}, channel)
        if clip := self.noise.clip(channel):
            values_TH = self._clipped(values_TH, clip, origin)
        self._charge(channel, origin)
        std = self.noise.std(channel)
        return self._generator.add(values_TH, std) if std else values_TH

    def _clipped(self, values_TH: torch.Tensor, clip: float, origin: Origin) -> torch.Tensor:
        assert self.noise is not None
        if self.noise.unit == "token":
            return clip_rows(values_TH, clip)
        if origin.most_rows:
            return clip_rows(values_TH, clip / origin.most_rows**0.5)
        return clip_sequences(values_TH, origin.lengths, clip)

    def _update(
        self, tensors: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        assert self.noise is not None
        _check_finite(tensors, Channel.UPDATE)
        base = {name: reference[name].to(tensor) for name, tensor in tensors.items() if name in reference}
        values = {name: tensor.detach() - base[name] if name in base else tensor for name, tensor in tensors.items()}
        if clip := self.noise.update_clip:
            values = clip_together(values, clip)
        self._charge(Channel.UPDATE, None)
        if std := self.noise.update_std:
            values = {name: self._generator.add(tensor, std) for name, tensor in values.items()}
        return {name: tensor + base[name] if name in base else tensor for name, tensor in values.items()}

    def _charge(self, channel: Channel, origin: Origin | None) -> None:
        if self.ledger is not None and self._pricing is not None:
            self.ledger.charge(self._pricing.charge(channel, origin), self._pricing.limit)

    def _release(
        self, tensors: Mapping[str, torch.Tensor], channel: Channel, given: Mapping[str, torch.Tensor]
    ) -> Release:
        """A release with memory of its own: what is changed after it is neither sent nor sent again."""
        owned = {name: _owned(tensor.detach(), given[name]) for name, tensor in tensors.items()}
        if self._pricing is None:
            _check_finite(owned, channel)
        return Release(owned, channel)


class Maskable:
    """An update that was clipped, charged and noised once, and leaves under masks only; see `Boundary.maskable`."""

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self._values = values

    def under(self, mask: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> Release:
        """A release of masked integers.

        Args:
            mask: Turns the values into int64 tensors under masks that were never used before.

        Raises:
            UnprotectedRelease: What came back are no integers.
        """
        words = mask(self._values)
        if any(tensor.dtype is not torch.int64 for tensor in words.values()):
            raise UnprotectedRelease("An update was about to leave without its mask: nothing was sent. Report this.")
        return Release(words, Channel.UPDATE)


def _owned(values: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The values, copied where clip and noise have left them in the memory of who gave them."""
    shared = values.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    return values.clone() if shared else values


def _check_finite(tensors: Mapping[str, torch.Tensor], channel: Channel) -> None:
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            what = f"parameter {name}" if name else f"{channel} values"
            raise NonFiniteError(
                f"The {what} about to leave this client are not finite: nothing was sent and the step was not "
                "applied. Lower the learning rate, check this silo's data, or use bf16 or fp32 instead of fp16."
            )
