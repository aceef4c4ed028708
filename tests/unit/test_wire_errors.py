"""Errors over the wire: every code has its row, and what is private stays here."""

from __future__ import annotations

import logging

import grpc
import pytest

from fedsea import errors
from fedsea.errors import CapacityError, ConfigError, FedseaError, ProtocolError, StorageError, TransportError
from fedsea.wire.errors import (
    TABLE,
    NonFiniteMessage,
    PeerClosed,
    error_from_status,
    error_of,
    failure_of,
    status_of,
)


def all_classes(cls: type[FedseaError] = FedseaError) -> list[type[FedseaError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in all_classes(sub))]


@pytest.mark.parametrize("cls", [cls for cls in all_classes() if cls.__module__ == errors.__name__])
def test_every_error_has_a_row_and_keeps_its_class(cls: type[FedseaError]) -> None:
    assert cls.code in TABLE
    status, sentence, trailers = status_of(cls("Say what to do."))
    again = error_from_status(status, sentence, dict(trailers), "host:1")
    assert type(again) is cls


def test_a_sentence_about_the_peer_arrives_in_full() -> None:
    assert error_of(failure_of(ConfigError("Set rounds to 3."))).message == "Set rounds to 3."


def test_a_path_on_the_servers_disk_stays_there(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        failure = failure_of(StorageError("/secret/place is full"))
    assert "/secret" not in failure.message
    assert "/secret/place is full" in caplog.text


def test_an_unexpected_exception_becomes_a_generic_sentence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        status, sentence, _ = status_of(ZeroDivisionError("private detail"))
    assert status is grpc.StatusCode.INTERNAL
    assert "private" not in sentence
    assert "ZeroDivisionError" in caplog.text


def test_the_time_to_wait_arrives() -> None:
    status, sentence, trailers = status_of(CapacityError("Full.", 7.5))
    again = error_from_status(status, sentence, dict(trailers), "host:1")
    assert isinstance(again, CapacityError)
    assert again.retry_after_s == 7.5


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert failure_of(ConfigError("one\n\x1b[2Jtwo")).message == "one  [2Jtwo"


def test_a_failure_about_a_message_names_its_step() -> None:
    assert failure_of(NonFiniteMessage("NaN.", "Forward", step=5)).step == 5


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, TransportError),
        (grpc.StatusCode.CANCELLED, TransportError),
        (grpc.StatusCode.UNIMPLEMENTED, ProtocolError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ProtocolError),
        (grpc.StatusCode.UNAUTHENTICATED, errors.AuthError),
    ],
)
def test_statuses_without_a_code_become_sentences(status: grpc.StatusCode, expected: type[FedseaError]) -> None:
    error = error_from_status(status, "grpc's own words", {}, "host:1")
    assert type(error) is expected
    assert "host:1" in error.message
    assert "grpc's" not in error.message


@pytest.mark.parametrize("text", ["soon", "", "-3", "nan", "inf"])
def test_a_damaged_retry_time_is_harmless(text: str) -> None:
    trailers = {"fedsea-code": "CAPACITY", "fedsea-retry-after-s": text}
    error = error_from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "Full.", trailers, "host:1")
    assert isinstance(error, CapacityError)
    assert 0.0 <= error.retry_after_s <= 1.0


def test_the_end_of_a_stream_counts_as_transport() -> None:
    assert isinstance(error_of(failure_of(PeerClosed("gone"))), TransportError)
    assert not isinstance(error_of(failure_of(PeerClosed("gone"))), PeerClosed)
