"""What a client is willing to take part in. It never leaves the client."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from fedsea.errors import ConfigError
from fedsea.plan.federation import FederationPlan
from fedsea.plan.pseudonyms import PseudonymSettings
from fedsea.plan.sections import MAGNITUDES, CodecName, Flag, NoiseSection, Real, Section, Whole, computable
from fedsea.plan.trust import no_claim_reason
from fedsea.types import Channel


class ClientLimits(Section):
    """What this client is willing to take part in; checked against the plan, never sent.

    Attributes:
        train: Segments that the federation may train here.
        min_input_blocks: Fewest blocks that must stay here before the cut.
        max_input_blocks: Most blocks that this machine can hold there.
        min_output_blocks: Fewest blocks that must stay here behind the trunk.
        max_output_blocks: Most blocks that this machine can hold there.
        codecs: Codecs that this client accepts.
        trust: Trust modes that this client accepts.
        secure_aggregation: Refuse plans in which the server receives this client's own parameters or gradients of them.
    """

    train: tuple[Literal["input", "output"], ...] = ("input", "output")
    min_input_blocks: Whole = Field(0, ge=0)
    max_input_blocks: Whole = Field(1024, ge=0)
    min_output_blocks: Whole = Field(0, ge=0)
    max_output_blocks: Whole = Field(1024, ge=0)
    codecs: tuple[CodecName, ...] = ("fp32", "bf16", "fp16", "int8")
    trust: tuple[Literal["trusted-server", "noised"], ...] = ("trusted-server", "noised")
    secure_aggregation: Flag = False

    def check(self, plan: FederationPlan, name: str) -> None:
        """Refuse a plan that asks for more than this client gives.

        Raises:
            ConfigError: Names every field that is outside the limits.
        """
        cut, problems = plan.partition_of(name), []
        if plan.adapter.input != "frozen" and "input" not in self.train:
            problems.append(f"adapter.input = {plan.adapter.input!r}, but this client does not train its input segment")
        if plan.adapter.output != "frozen" and "output" not in self.train:
            problems.append(
                f"adapter.output = {plan.adapter.output!r}, but this client does not train its output segment"
            )
        for side, count in (("input", cut.input_blocks), ("output", cut.output_blocks)):
            least, most = getattr(self, f"min_{side}_blocks"), getattr(self, f"max_{side}_blocks")
            if not least <= count <= most:
                problems.append(f"{side}_blocks = {count}, but this client allows {least} to {most}")
        for channel in ("hidden", "gradient"):
            if (codec := getattr(plan.wire, channel)) not in self.codecs:
                problems.append(f"wire.{channel} = {codec!r}, but this client accepts {', '.join(self.codecs)}")
        if plan.trust.mode not in self.trust:
            problems.append(f"trust.mode = {plan.trust.mode!r}, but this client accepts {', '.join(self.trust)}")
        own = plan.clients_train and plan.aggregation.sync != "personal"
        if self.secure_aggregation and own and not plan.aggregation.secure:
            problems.append("aggregation.secure = false, but this client's parameters leave it in a masked sum only")
        if problems:
            raise ConfigError(
                "The server's plan goes past this client's limits: " + "; ".join(problems) + ". "
                "Ask the operator for another plan, or widen the limits in your client settings."
            )


class ClientNoise(Section):
    """More noise, tighter clips or a smaller budget than the plan's; a key that is left out has the plan's value.

    Attributes:
        hidden_std: Standard deviation of the noise on hidden states; at least the plan's.
        gradient_std: Of that on gradients; at least the plan's.
        update_std: Of that on updates; at least the plan's.
        hidden_clip: L2 bound of hidden states; at most the plan's, where that has one.
        gradient_clip: Of gradients; at most the plan's, where that has one.
        update_clip: Of updates; at most the plan's, where that has one.
        epsilon: Budget; at most the plan's, where that has one.
    """

    hidden_std: Real | None = Field(None, gt=0)
    gradient_std: Real | None = Field(None, gt=0)
    update_std: Real | None = Field(None, gt=0)
    hidden_clip: Real | None = Field(None, gt=0)
    gradient_clip: Real | None = Field(None, gt=0)
    update_clip: Real | None = Field(None, gt=0)
    epsilon: Real | None = Field(None, gt=0)

    _computable = field_validator(*MAGNITUDES)(computable)

    def over(self, plan: FederationPlan, name: str) -> NoiseSection:
        """The noise of this client: the plan's, or this where it is stricter.

        Raises:
            ConfigError: Names every field that is laxer than the plan's, or that cannot work.
        """
        own = self.model_dump(exclude_none=True)
        if not own:
            return plan.noise
        if plan.trust.mode != "noised":
            raise ConfigError(
                f'[noise] of this client\'s settings needs a plan with trust.mode = "noised"; this one has '
                f"{plan.trust.mode!r}, under which no noise is added. Ask the operator for another plan, or remove the "
                "table."
            )
        problems = []
        for key, value in own.items():
            least = key.endswith("_std")
            agreed = getattr(plan.noise, key)
            if (least and value < agreed) or (not least and agreed and value > agreed):
                problems.append(
                    f"noise.{key} = {value:g}, but the plan asks for {'at least' if least else 'at most'} {agreed:g}"
                )
        noise = plan.noise.model_copy(update=own)
        problems += [
            f"noise.{channel}_clip = {noise.clip(channel):g} bounds nothing without noise.{channel}_std above 0"
            for channel in Channel
            if noise.clip(channel) and not noise.std(channel)
        ]
        if not problems and noise.epsilon and (reason := no_claim_reason(plan, name, noise)):
            problems.append(f"noise.epsilon = {noise.epsilon:g} cannot be kept: {reason}")
        if problems:
            raise ConfigError(
                f"A client's noise may only be stricter than the plan's: {'; '.join(problems)}. Mend the table [noise] "
                "of your client settings."
            )
        return noise


class ClientSettings(Section):
    """A client's settings file."""

    limits: ClientLimits = ClientLimits()
    noise: ClientNoise = ClientNoise()
    pseudonyms: PseudonymSettings = PseudonymSettings()
