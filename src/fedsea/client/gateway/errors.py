"""Errors as HTTP: the status, and OpenAI's form of the body."""

from __future__ import annotations

import logging
import math
import traceback
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse

from fedsea.errors import (
    AuthError,
    CapacityError,
    ConfigError,
    FedseaError,
    PrivacyError,
    ProtocolError,
    SessionLost,
    SessionTooLarge,
    TransportError,
)

log = logging.getLogger(__name__)

_STATUS: tuple[tuple[type[FedseaError], int, str], ...] = (
    (ConfigError, 400, "invalid_request_error"),
    (AuthError, 403, "permission_error"),
    (CapacityError, 429, "rate_limit_error"),
    (TransportError, 503, "server_error"),
    (PrivacyError, 403, "permission_error"),
    (SessionLost, 503, "server_error"),
    (ProtocolError, 502, "server_error"),
    (FedseaError, 500, "server_error"),
)


class RequestError(ConfigError):
    """A request that is refused with a status of its own.

    Attributes:
        status: HTTP status.
        param: Field of the body that is wrong.
        reason: OpenAI's `code`.
    """

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, reason: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.reason = reason


class Closing(TransportError):  # noqa: N818 (what was asked for, not what went wrong)
    """The gateway ends in good order, and with it what was under way."""

    def __init__(self) -> None:
        super().__init__("The gateway is shutting down: try again when it is back.")


def note(what: str, error: FedseaError) -> None:
    """Log what an error ended; a warning, unless that was asked for."""
    level = logging.INFO if isinstance(error, Closing) else logging.WARNING
    log.log(level, "%s (%s): %s", what, error.code, error.message)


def status_of(error: FedseaError) -> int:
    """HTTP status of an error."""
    return error.status if isinstance(error, RequestError) else _kind(error)[0]


def document(error: FedseaError) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    if isinstance(error, RequestError):
        kind = "authentication_error" if error.status == 401 else "invalid_request_error"
        return _document(error.message, kind, error.param, error.reason)
    code = "context_length_exceeded" if isinstance(error, SessionTooLarge) else error.code
    return _document(error.message, _kind(error)[1], None, code)


def response(error: FedseaError) -> JSONResponse:
    """The whole answer; one that may be tried again says when."""
    headers = {}
    if isinstance(error, CapacityError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, RequestError) and error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(document(error), status_of(error), headers)


def unforeseen(error: Exception) -> FedseaError:
    """Stands for an error of our own; the log gets its type and place, for its message might quote somebody's text."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    log.error("a request failed: %s%s", type(error).__name__, place)
    return FedseaError("Something went wrong in the gateway that fedsea did not foresee; its log names the place.")


def _kind(error: FedseaError) -> tuple[int, str]:
    return next((status, kind) for cls, status, kind in _STATUS if isinstance(error, cls))


def _document(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
