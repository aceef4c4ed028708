"""What a client is willing to take part in. It never leaves the client."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedsea.errors import ConfigError
from fedsea.plan.federation import FederationPlan
from fedsea.plan.sections import CodecName, Section


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
    """

    train: tuple[Literal["input", "output"], ...] = ("input", "output")
    min_input_blocks: int = Field(0, ge=0)
    max_input_blocks: int = Field(1024, ge=0)
    min_output_blocks: int = Field(0, ge=0)
    max_output_blocks: int = Field(1024, ge=0)
    codecs: tuple[CodecName, ...] = ("fp32", "bf16", "fp16", "int8")
    trust: tuple[str, ...] = ("trusted-server",)

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
        if problems:
            raise ConfigError(
                "The server's plan goes past this client's limits: " + "; ".join(problems) + ". "
                "Ask the operator for another plan, or widen the limits in your client settings."
            )


class ClientSettings(Section):
    """A client's settings file."""

    limits: ClientLimits = ClientLimits()
