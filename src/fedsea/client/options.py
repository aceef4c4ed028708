"""A client's settings as values; apart from what uses them, so that a command line is read before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedsea.client.retry import RetryPolicy
from fedsea.data.formats import DataFormat


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Settings of a client that are not the federation's business.

    Attributes:
        server: `HOST:PORT`.
        identity: Folder of this client's identity.
        data: Files of the silo.
        run: Run folder.
        model: This client's own copy of the base model; None takes the plan's path or hub id.
        settings: Client settings (TOML) with the limits, or None for the defaults.
        format: Name of a `DataFormat`.
        fields: Role to column, see `DataFormat`.
        threads: CPU threads; None leaves torch's choice.
        device: Where the segments run.
        evaluate: Evaluate the held-out split before training, after every round and at the end.
        retry_for_s: How long a lost server is sought.
        answer_within_s: How long a server that is connected may owe an answer outside training; see `RemoteTrunk`.
        skip_bad_rows: Count malformed rows instead of refusing the file.
    """

    server: str
    identity: Path
    data: tuple[Path, ...] = ()
    run: Path = Path("runs/client")
    model: str | None = None
    settings: Path | None = None
    format: str = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None
    device: str = "cpu"
    evaluate: bool = True
    retry_for_s: float = 600.0
    answer_within_s: float = 120.0
    skip_bad_rows: bool = False

    @property
    def data_format(self) -> DataFormat:
        """How rows are read, as the type that the silo takes.

        Raises:
            ConfigError: There is no such format, or it has no such role.
        """
        return DataFormat(self.format, self.fields)  # type: ignore[arg-type]

    @property
    def retry(self) -> RetryPolicy:
        """As the type that the trunk takes."""
        return RetryPolicy(self.retry_for_s)
