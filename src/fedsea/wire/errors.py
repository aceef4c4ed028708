"""The one table from error code to gRPC status and to what a peer may read.

A peer gets the code and a sentence. Errors about what the peer itself did or meets carry their own sentence; errors
about this machine (its disk, its data, its bugs) are logged here and replaced by a generic sentence.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from fedsea.errors import CapacityError, FedseaError, NonFiniteError, TransportError, error_from_code

if TYPE_CHECKING:
    from fedsea.wire.messages import Failure

log = logging.getLogger(__name__)

CODE_KEY = "fedsea-code"
RETRY_KEY = "fedsea-retry-after-s"
_LONGEST_MESSAGE = 1000
"""Characters; a status travels in HTTP/2 trailers, which hold a few kilobytes."""

_INTERNAL = "The peer had an internal error and logged it; ask its operator to look at the log, then try again."
_STORAGE = "The peer cannot use its disk and logged why; ask its operator to look at the log, then try again."
_PRIVACY = "The peer refused to send something that must not leave it; its own log says what."


@dataclass(frozen=True, slots=True)
class Row:
    """How one code travels.

    Attributes:
        status: gRPC status of a stream or call that ends with this error.
        instead: Sentence that the peer reads in place of the error's own; None lets the own one through.
    """

    status: grpc.StatusCode
    instead: str | None = None


TABLE: dict[str, Row] = {
    "FEDSEA": Row(grpc.StatusCode.INTERNAL, _INTERNAL),
    "CONFIG": Row(grpc.StatusCode.FAILED_PRECONDITION),
    "DATA": Row(grpc.StatusCode.FAILED_PRECONDITION, _INTERNAL),
    "SESSION_TOO_LARGE": Row(grpc.StatusCode.FAILED_PRECONDITION),
    "STORAGE": Row(grpc.StatusCode.INTERNAL, _STORAGE),
    "PROTOCOL": Row(grpc.StatusCode.INVALID_ARGUMENT),
    "AUTH": Row(grpc.StatusCode.UNAUTHENTICATED),
    "TRANSPORT": Row(grpc.StatusCode.UNAVAILABLE),
    "CAPACITY": Row(grpc.StatusCode.RESOURCE_EXHAUSTED),
    "SESSION_LOST": Row(grpc.StatusCode.ABORTED),
    "NON_FINITE": Row(grpc.StatusCode.FAILED_PRECONDITION),
    "AGGREGATION": Row(grpc.StatusCode.FAILED_PRECONDITION),
    "PRIVACY": Row(grpc.StatusCode.FAILED_PRECONDITION, _PRIVACY),
    "BUDGET_EXHAUSTED": Row(grpc.StatusCode.FAILED_PRECONDITION, _PRIVACY),
    "UNPROTECTED_RELEASE": Row(grpc.StatusCode.FAILED_PRECONDITION, _PRIVACY),
}


class PeerClosed(TransportError):  # noqa: N818 (an end, not a fault)
    """The peer ended the stream in good order; nothing more will come."""


class NonFiniteMessage(NonFiniteError):  # noqa: N818 (said of a message)
    """One message held a NaN or an infinity; it was dropped, the stream goes on.

    Attributes:
        kind: Class name of the message.
        step: Its step (its round, for a `RoundUpdate`), or -1.
        attempt: Its attempt, or -1.
        micro_batch: Its micro-batch, or -1.
    """

    def __init__(self, message: str, kind: str = "", step: int = -1, attempt: int = -1, micro_batch: int = -1) -> None:
        super().__init__(message)
        self.kind, self.step, self.attempt, self.micro_batch = kind, step, attempt, micro_batch


def public(error: BaseException) -> FedseaError:
    """The error as a peer may see it; what is held back is logged.

    Args:
        error: Anything that was raised; an exception that fedsea did not raise on purpose becomes "FEDSEA".
    """
    if not isinstance(error, FedseaError):
        log.error("an unexpected error is reported to a peer as internal", exc_info=error)
        return FedseaError(_INTERNAL)
    instead = TABLE.get(error.code, TABLE["FEDSEA"]).instead
    if instead is None:
        return error
    log.error("%s is reported to a peer without details: %s", error.code, error.message)
    return error_from_code(error.code, instead)


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """What a server ends a call with: status, sentence, trailing metadata."""
    shown = public(error)
    trailers = [(CODE_KEY, shown.code)]
    if isinstance(shown, CapacityError):
        trailers.append((RETRY_KEY, repr(float(shown.retry_after_s))))
    row = TABLE.get(shown.code, TABLE["FEDSEA"])
    return row.status, _one_line(shown.message), tuple(trailers)


def failure_of(error: BaseException, *, step: int = -1, fatal: bool = False) -> Failure:
    """The message that reports an error inside a stream."""
    from fedsea.wire.messages import Failure  # with torch, which a call for a status can do without

    shown = public(error)
    retry = shown.retry_after_s if isinstance(shown, CapacityError) else 0.0
    if step < 0 and isinstance(error, NonFiniteMessage):
        step = error.step
    return Failure(shown.code, _one_line(shown.message), retry, step, fatal)


def error_of(failure: Failure) -> FedseaError:
    """The error that a peer's `Failure` stands for."""
    return error_from_code(failure.code, failure.message, failure.retry_after_s)


def word_of(error: BaseException) -> bytes:
    """What a server says when it ends a sealed stream; whoever carries the stream reads nothing of it."""
    shown = public(error)
    retry = shown.retry_after_s if isinstance(shown, CapacityError) else 0.0
    return json.dumps([shown.code, _one_line(shown.message), retry]).encode()


def error_of_word(word: bytes) -> FedseaError:
    """The error behind such a word."""
    code, message, retry = json.loads(word)  # it opened, so the server wrote it
    return error_from_code(str(code), _one_line(str(message)), _seconds(str(retry)))


def unconfirmed(error: FedseaError) -> FedseaError:
    """What a relay says that the server said, before the two ends know each other."""
    sentence = f"The relay says, and the server has not confirmed it: {error.message}"
    return error_from_code(error.code, sentence, getattr(error, "retry_after_s", 1.0))


def error_from_status(status: grpc.StatusCode, details: str, trailers: dict[str, str], address: str) -> FedseaError:
    """The error behind a call that ended badly.

    Args:
        status: gRPC status of the call.
        details: Its sentence: the server's own when `trailers` has a fedsea code, else gRPC's, which is not shown.
        trailers: Trailing metadata.
        address: Server, for the message.
    """
    if code := trailers.get(CODE_KEY):
        return error_from_code(code, _one_line(details), _seconds(trailers.get(RETRY_KEY)))
    name = status.name
    if status is grpc.StatusCode.UNIMPLEMENTED:
        return error_from_code(
            "PROTOCOL", f"{address} does not speak this protocol: check the address, and that both sides run fedsea."
        )
    if status is grpc.StatusCode.UNAUTHENTICATED:
        return error_from_code("AUTH", f"{address} refused this certificate: run `fedsea doctor` to see why.")
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return error_from_code(
            "PROTOCOL", f"{address} refused the size of a message; both sides need compatible versions of fedsea."
        )
    return TransportError(
        f"The connection to {address} broke ({name}); check that the server runs and the network is up, then try again."
    )


def _one_line(text: str) -> str:
    """Without control characters: it ends in someone else's terminal and log."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:_LONGEST_MESSAGE])


def _seconds(text: str | None) -> float:
    try:
        seconds = float(text or 1.0)
    except ValueError:
        return 1.0
    return min(max(seconds, 0.0), 3600.0) if math.isfinite(seconds) else 1.0
