"""What a message may say. The sender checks its own fields; the receiver checks them again, and against its limits.

Every error here is about names, sizes and counts; no value of a tensor is known yet.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from fedsea.errors import ProtocolError
from fedsea.types import BlockRange, Channel
from fedsea.wire.codecs import WORDS
from fedsea.wire.errors import NonFiniteMessage
from fedsea.wire.frames import Frame, Kind, TensorSpec
from fedsea.wire.limits import MAX_COUNT, MAX_MESSAGE_CHARACTERS, MAX_PLAN_BYTES, WireLimits

_MAY_BE_MINUS_ONE = frozenset({("Join", "prepared_step"), ("Failure", "step")})
_PATTERNS: Mapping[str, re.Pattern[str]] = {
    "software_version": re.compile(r"[0-9A-Za-z.+!_-]{1,64}"),
    "plan_sha256": re.compile(r"[0-9a-f]{64}"),
    "run_id": re.compile(r"[0-9A-Za-z._-]{1,128}"),
    "role": re.compile(r"train|observe"),
    "waiting_for": re.compile(r"[ -~]{1,128}"),
    "names": re.compile(r"[a-z0-9][a-z0-9._-]{0,62}"),
    "code": re.compile(r"[A-Z][A-Z_]{0,63}"),
    "message": re.compile(rf"[^\x00-\x1f\x7f-\x9f]{{0,{MAX_MESSAGE_CHARACTERS}}}"),
}
_LONGEST_RETRY_S = 86400.0
_KEY, _CERTIFICATE, _SIGNATURE = range(32, 33), range(64, 4097), range(8, 129)
_SIZES: Mapping[str, range] = {
    **dict.fromkeys(("certificate", "certificates"), _CERTIFICATE),
    **dict.fromkeys(("signature", "signatures"), _SIGNATURE),
    **dict.fromkeys(("sharing_key", "sharing_keys", "mask_key", "mask_keys", "commitment", "commitments"), _KEY),
    "sealed": range(82, 83),
    "shares": range(33, 34),
}
"""Bytes that a field may have."""


def check_fields(kind: Kind, fields: Mapping[str, Any]) -> None:
    """Types, ranges and patterns of a message's own fields.

    Raises:
        ProtocolError: A field holds what no correct peer sends.
        NonFiniteMessage: A number is NaN or infinite.
    """
    for name, value in fields.items():
        items = value if isinstance(value, tuple) else (value,)
        for item in items:
            _check_value(kind, name, item, fields)
    if "names" in fields:
        _check_names(kind, fields)
    if kind.name == "Forward":
        _check_micro_batch(fields)
    elif kind.name == "Pullback" and not all(fields["lengths"]):
        raise ProtocolError("A Pullback has an empty sequence.")
    elif kind.name == "SessionForward":
        _check_extension(fields)
    elif kind.name == "SessionOpen" and not (fields["num_sequences"] and fields["max_tokens"]):
        raise ProtocolError("A SessionOpen asks for no sequence, or for sequences without tokens.")


def _check_value(kind: Kind, name: str, value: Any, fields: Mapping[str, Any]) -> None:
    good = True
    if isinstance(value, str):
        good = _PATTERNS[name].fullmatch(value) is not None
    elif isinstance(value, bytes):
        good = len(value) in _SIZES[name]
    elif isinstance(value, bool | BlockRange):
        good = True
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise NonFiniteMessage(f"The {name} of a {kind.name} is NaN or infinite.", kind.name, **place(fields))
        good = value >= 0.0
        good = good and (name != "retry_after_s" or value <= _LONGEST_RETRY_S)
    else:
        least = -1 if (kind.name, name) in _MAY_BE_MINUS_ONE else 0
        good = isinstance(value, int) and least <= value < MAX_COUNT
    if not good:
        raise ProtocolError(f"The field {name} of a {kind.name} holds what the protocol does not allow.")


def _check_names(kind: Kind, fields: Mapping[str, Any]) -> None:
    names = fields["names"]
    if len(set(names)) != len(names) or any(
        len(value) != len(names) for value in fields.values() if isinstance(value, tuple)
    ):
        raise ProtocolError(f"A {kind.name} names a client twice, or has not one entry for each.")


def _check_micro_batch(fields: Mapping[str, Any]) -> None:
    lengths = fields["lengths"]
    if not lengths or min(lengths) < 1:
        raise ProtocolError("A Forward has no sequences, or an empty one.")
    if fields["micro_batch"] >= fields["num_micro_batches"]:
        raise ProtocolError("A Forward's micro_batch is not below its num_micro_batches.")
    if fields["num_target_tokens"] > sum(lengths):
        raise ProtocolError("A Forward claims more target tokens than it has tokens.")


def _check_extension(fields: Mapping[str, Any]) -> None:
    count, sources = len(fields["lengths"]), fields["sources"]
    if not sum(fields["lengths"]) or len(fields["positions"]) != count:
        raise ProtocolError("A SessionForward needs a position and a length for every sequence, and a new token.")
    if sources and (len(sources) != count or max(sources) >= count):
        raise ProtocolError("A SessionForward's sources name sequences that the session has not.")


def place(fields: Mapping[str, Any]) -> dict[str, int]:
    """Step, attempt and micro-batch of a message, as far as it has them."""
    step = fields.get("step", fields.get("round", -1))
    return {"step": step, "attempt": fields.get("attempt", -1), "micro_batch": fields.get("micro_batch", -1)}


def check_frame(frame: Frame, limits: WireLimits) -> None:
    """Everything that can be known from a header, against what a peer may announce.

    Raises:
        ProtocolError: Names the field and the limit.
        NonFiniteMessage: A number of the header is NaN or infinite.
    """
    kind, specs = frame.kind, frame.specs
    if kind.channel is None:
        if specs:
            raise ProtocolError(f"A {kind.name} carries a tensor; it must have none.")
    elif not specs:
        if not kind.optional:
            raise ProtocolError(f"A {kind.name} carries no tensor; it must have one.")
    elif kind.channel is Channel.UPDATE:
        _check_bundle(kind, specs, limits)
    else:
        _check_rows(kind, specs, limits)
    _check_payload(frame)
    if kind.name in ("Forward", "SessionForward", "Pullback"):
        _check_lengths(frame, limits)
    if "blocks" in frame.fields:
        _check_blocks(frame, limits)
    check_fields(kind, frame.fields)


def _check_payload(frame: Frame) -> None:
    if frame.kind.name == "Welcome":
        if not 1 <= frame.payload_bytes <= MAX_PLAN_BYTES:
            raise ProtocolError(f"A plan of {frame.payload_bytes} bytes was announced; {MAX_PLAN_BYTES} are allowed.")
        return
    expected = sum(spec.wire_bytes for spec in frame.specs)
    if frame.payload_bytes != expected:
        raise ProtocolError(
            f"A {frame.kind.name} announces {frame.payload_bytes} bytes of payload, but its tensors take {expected}."
        )


def _check_lengths(frame: Frame, limits: WireLimits) -> None:
    name, lengths = frame.kind.name, frame.fields["lengths"]
    if len(lengths) > limits.max_sequences:
        raise ProtocolError(f"A {name} has {len(lengths)} sequences; {limits.max_sequences} are allowed.")
    num_rows = frame.specs[0].shape[0]
    if sum(lengths) != num_rows:
        raise ProtocolError(f"A {name}'s lengths sum to {sum(lengths)}, but its hidden state has {num_rows} rows.")


def _check_blocks(frame: Frame, limits: WireLimits) -> None:
    blocks = frame.fields["blocks"]
    if blocks.stop > limits.num_blocks:
        raise ProtocolError(
            f"A {frame.kind.name} asks for blocks {blocks.start}:{blocks.stop} of a model of {limits.num_blocks} "
            "blocks."
        )


def _check_rows(kind: Kind, specs: tuple[TensorSpec, ...], limits: WireLimits) -> None:
    if limits.hidden_size is None:
        raise ProtocolError(f"A {kind.name} arrived before the plan was agreed on.")
    rows = kind.rows
    if [spec.name for spec in specs] != list(rows):
        wanted = "a single one" if len(rows) == 1 else f"{len(rows)}"
        raise ProtocolError(f"A {kind.name} carries {len(specs)} tensors, or misnamed ones; it must have {wanted}.")
    for spec, channel in zip(specs, rows.values(), strict=True):
        _check_tensor(kind, spec, channel, limits)
    if specs[-1].shape != specs[0].shape:
        raise ProtocolError(f"A {kind.name} has a gradient of another shape than its hidden states.")


def _check_tensor(kind: Kind, spec: TensorSpec, channel: Channel, limits: WireLimits) -> None:
    agreed = limits.codecs.get(channel)
    if spec.codec != agreed:
        raise ProtocolError(f"A {kind.name} uses the codec {spec.codec}; the plan says {agreed}.")
    if len(spec.shape) != 2 or spec.shape[1] != limits.hidden_size:
        raise ProtocolError(
            f"A {kind.name} has a tensor of shape {spec.shape}; it must be (tokens, {limits.hidden_size})."
        )
    if spec.shape[0] > limits.max_tokens:
        raise ProtocolError(f"A {kind.name} has {spec.shape[0]} tokens; {limits.max_tokens} are allowed.")
    _check_size(kind, spec, limits)


def _check_bundle(kind: Kind, specs: tuple[TensorSpec, ...], limits: WireLimits) -> None:
    seen: set[str] = set()
    shapes, codec = (limits.masked_shapes, WORDS) if kind.masked else (limits.bundle_shapes, "fp32")
    for spec in specs:
        expected = shapes.get(spec.name)
        if expected is None:
            raise ProtocolError(f"A {kind.name} holds a tensor that the plan does not name (number {len(seen) + 1}).")
        if spec.name in seen:
            raise ProtocolError(f"A {kind.name} holds {spec.name} twice.")
        if spec.codec != codec:
            raise ProtocolError(f"A {kind.name} uses the codec {spec.codec}; its tensors travel as {codec}.")
        if spec.shape != tuple(expected):
            raise ProtocolError(
                f"A {kind.name} holds {spec.name} with shape {spec.shape}; it must be {tuple(expected)}."
            )
        _check_size(kind, spec, limits)
        seen.add(spec.name)


def _check_size(kind: Kind, spec: TensorSpec, limits: WireLimits) -> None:
    if spec.float_bytes > limits.max_tensor_bytes:
        raise ProtocolError(
            f"A {kind.name} announces a tensor of {spec.float_bytes} bytes; {limits.max_tensor_bytes} are allowed. "
            "Lower the micro-batch's sequences, or raise wire.max_tensor_mb in the plan."
        )
