"""Whose run a folder holds: a client's part is of use only with the plan and the server's run that it grew with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsea.errors import ConfigError
from fedsea.plan import FederationPlan, differences, parse_plan_json

ALONE = "alone"
"""Stands for the server's run in a folder that was trained without a server."""


@dataclass(frozen=True, slots=True)
class RunKey:
    """Whose run a folder holds.

    Attributes:
        plan: The plan as fetched.
        run_id: Identity of the server's run, or `ALONE`.
        client: Name of the client; "" for one that does not matter.
    """

    plan: FederationPlan
    run_id: str
    client: str = ""

    def check(self, folder: Path, values: Mapping[str, Any], advice: str) -> None:
        """Refuse what another run left.

        Args:
            folder: For the message.
            values: State of a checkpoint in it.
            advice: What to give instead.

        Raises:
            ConfigError: Says what differs.
        """
        if "state" not in values:
            raise ConfigError(f"{folder} is no run folder of a client. {advice}")
        alone = values["run_id"] == ALONE
        if alone != (self.run_id == ALONE):
            how = "without a server (`fedsea train --alone`)" if alone else "with a server"
            raise ConfigError(f"The run in {folder} was trained {how}. {advice}")
        if (client := values.get("client", "")) and self.client and client != self.client:
            raise ConfigError(f"The run in {folder} is that of client {client}, and this is {self.client}. {advice}")
        if values["plan_sha256"] != self.plan.sha256():
            fields = "; ".join(differences(self.plan, parse_plan_json(values["plan"])))
            where = "the plan file" if alone else "the server's plan of today"
            raise ConfigError(
                f"The run in {folder} was started with another plan ({fields}; here is {where}, there the run). "
                f"{advice}"
            )
        if values["run_id"] != self.run_id:
            raise ConfigError(
                f"The run in {folder} belongs to another run of the server. {advice} If it is the server that went "
                "back, ask the operator to restore the server's run folder."
            )
