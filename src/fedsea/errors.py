"""Every error that fedsea raises on purpose, with a stable code.

The code travels over the wire and appears in `--json` output; the message is the sentence that the user
reads, and says what to do next. Messages never hold text, tokens, labels or tensor values.
"""

from __future__ import annotations

from typing import ClassVar


class FedseaError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        code: Stable identifier, the same on both sides of the wire.
        exit_code: What the `fedsea` command exits with.
        retryable: Whether the same call may succeed later without anyone changing anything.
    """

    code: ClassVar[str] = "FEDSEA"
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    @property
    def message(self) -> str:
        """The sentence for the user."""
        return str(self)


class ConfigError(FedseaError):
    """A plan, setting, checkpoint or argument that cannot work."""

    code = "CONFIG"
    exit_code = 2


class DataError(ConfigError):
    """A silo that cannot be read; the message names file and line, never the text."""

    code = "DATA"
    exit_code = 3


class SessionTooLarge(ConfigError):  # noqa: N818 (said of a session)
    """A session needs more memory than the server ever has for one: a shorter one may fit."""

    code = "SESSION_TOO_LARGE"


class StorageError(FedseaError):
    """The disk refused: full, read-only, or a damaged file."""

    code = "STORAGE"
    exit_code = 4


class ProtocolError(FedseaError):
    """A peer sent something that the protocol does not allow."""

    code = "PROTOCOL"
    exit_code = 5


class AuthError(FedseaError):
    """A certificate that is missing, foreign, expired, revoked or not on the allow-list."""

    code = "AUTH"
    exit_code = 6


class TransportError(FedseaError):
    """The connection failed or broke; retried with jitter, bounded."""

    code = "TRANSPORT"
    exit_code = 7
    retryable = True


class CapacityError(FedseaError):
    """The server is full at the moment.

    Attributes:
        retry_after_s: Seconds after which trying again is sensible.
    """

    code = "CAPACITY"
    exit_code = 8
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SessionLost(FedseaError):  # noqa: N818 (the design's name)
    """The server no longer knows this session; it is replayed and continued."""

    code = "SESSION_LOST"
    exit_code = 9
    retryable = True


class NonFiniteError(FedseaError):
    """A loss, hidden state or gradient is NaN or infinite; the step was not applied.

    Attributes:
        client: Whose values they were, if one client can be named.
    """

    code = "NON_FINITE"
    exit_code = 10

    def __init__(self, message: str, client: str = "") -> None:
        super().__init__(message)
        self.client = client


class AggregationError(FedseaError):
    """A round's sum cannot be made: too few members are left, or what they sent does not fit; nothing is lost."""

    code = "AGGREGATION"
    exit_code = 12


class PrivacyError(FedseaError):
    """Something would have left the client that must not leave it."""

    code = "PRIVACY"
    exit_code = 11


class BudgetExhausted(PrivacyError):  # noqa: N818 (the design's name)
    """The privacy budget does not cover the release."""

    code = "BUDGET_EXHAUSTED"


class UnprotectedRelease(PrivacyError):  # noqa: N818 (the design's name)
    """A tensor was about to be sent that the privacy boundary did not make, or that was sent before."""

    code = "UNPROTECTED_RELEASE"


def _subclasses(cls: type[FedseaError]) -> dict[str, type[FedseaError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        for code, named in _subclasses(sub).items():
            found.setdefault(code, named)  # a subclass without a code of its own does not stand for its parent's
    return found


def error_from_code(code: str, message: str, retry_after_s: float = 1.0) -> FedseaError:
    """Rebuild an error that a peer reported.

    Args:
        code: A `FedseaError.code`; an unknown one gives `ProtocolError`.
        message: The peer's sentence.
        retry_after_s: Used by `CapacityError` only.
    """
    cls = _subclasses(FedseaError).get(code)
    if cls is CapacityError:
        return CapacityError(message, retry_after_s)
    if cls is None:
        return ProtocolError(f"The peer reported an unknown error code: {message}")
    return cls(message)
