"""The checks of `fedsea doctor` about a federation: identity, server, clock, plan, base model, memory."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fedsea.cli.checks import Check, attempt

if TYPE_CHECKING:
    from fedsea.model.checkpoint import Checkpoint
    from fedsea.plan import FederationPlan
    from fedsea.wire.identity.identity import Identity

SegmentSpec: TypeAlias = tuple[Any, range, str]
"""Kind, blocks, and what of it is trained."""

_CLOCK_WARN_S, _CLOCK_FAIL_S = 30.0, 300.0
_TRAINED_COPIES = 4
"""Float32 values a trained parameter takes: itself, its gradient, and AdamW's two moments."""


@dataclass(slots=True)
class Federation:
    """What the checks find out for one another."""

    identity: Identity | None = None
    plan: FederationPlan | None = None
    server_answers: bool = False


def identity(folder: Path, asked_for: bool, found: Federation) -> list[Check]:
    """The identity's validity, and the authority that it trusts."""
    from fedsea.wire.identity import Identity, needs_renewal

    if not folder.is_dir() and not asked_for:
        return [Check("identity", "warn", f"no folder {folder}", "a client makes one with `fedsea enroll`")]
    me = found.identity = Identity.load(folder)
    now = datetime.now(UTC)
    text = f"{me.role.value} {me.name}, {(me.not_after - now).days} days left (until {me.not_after:%Y-%m-%d %H:%M} UTC)"
    if me.role == "client":
        advice = f"it is renewed while `fedsea train` runs; if not, `fedsea enroll --name {me.name} --again`"
    else:
        advice = "the operator renews it with `fedsea ca server`"
    state = Check("identity", "warn", text, advice) if needs_renewal(me, now) else Check("identity", "ok", text)
    trusted = Check("authority", "ok", me.ca_fingerprint, "compare it with what the operator told you, once")
    return [state, trusted]


def server(address: str, found: Federation) -> list[Check]:
    """Whether the server answers us, how fast, and whether the clocks agree."""
    from fedsea.wire.status import call_status

    if found.identity is None:
        return [Check("server", "fail", "not asked: there is no usable identity", "mend the identity first")]
    start = time.time()
    status = asyncio.run(call_status(address, found.identity))
    seconds = time.time() - start
    found.server_answers = True
    where = f"step {status.get('next_step')} of {status.get('num_steps')}"
    text = f"{address} answers in {seconds * 1000:.0f} ms with TLS; {where}; fedsea {status.get('version')}"
    return [Check("server", "ok", text), *_clock(status, start, seconds)]


def _clock(status: dict[str, Any], start: float, seconds: float) -> list[Check]:
    theirs = status.get("time")
    if not isinstance(theirs, int | float):
        return []
    ahead = start + seconds / 2 - theirs
    text = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    if abs(ahead) > _CLOCK_FAIL_S:
        return [Check("clock", "fail", text, "set this machine's clock, or ask the operator to set the server's")]
    if abs(ahead) > _CLOCK_WARN_S:
        return [Check("clock", "warn", text, "keep the clock with NTP: certificates are valid by it")]
    return [Check("clock", "ok", text)]


def plan(path: Path | None, address: str | None, settings: Path | None, found: Federation) -> list[Check]:
    """The plan, from a file or the server, and this client's limits against it."""
    from fedsea.plan import ClientLimits, load_limits, load_plan

    limits = ClientLimits() if settings is None else load_limits(settings)
    if path is not None:
        agreed, source = load_plan(path), str(path)
    elif address is not None and found.identity is not None and found.server_answers:
        from fedsea.client.invitation import fetch_invitation

        agreed, source = asyncio.run(fetch_invitation(address, found.identity)).plan, "the server's"
    else:
        return []
    found.plan = agreed
    text = (
        f"{source}: {agreed.name}, {len(agreed.clients)} clients, {agreed.num_steps} steps, trust {agreed.trust.mode}"
    )
    checks = [Check("plan", "ok", text)]
    me = found.identity
    if me is not None and me.role == "client":
        limits.check(agreed, me.name)
        checks.append(Check("limits", "ok", f"the plan keeps within what {me.name} allows"))
    return checks


def model(path: str | None, found: Federation) -> list[Check]:
    """Whether the base model can be read, and whether this side's segments fit into memory."""
    where = path or (found.plan.model.path if found.plan else None)
    if where is None:
        return []
    from fedsea.model.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(where, found.plan.model.revision if found.plan else "main")
    text = f"{where}: {checkpoint.config.model_type}, {checkpoint.num_blocks} blocks, width {checkpoint.hidden_size}"
    checks = [Check("model", "ok", text)]
    if found.plan is None:
        return checks
    agreed = found.plan
    checks += attempt("adapters", lambda: _fits_model(checkpoint, agreed))
    if checks[-1].state == "fail":
        return checks
    if found.identity is not None and found.identity.role == "client":
        if found.identity.name in found.plan.client_names:
            checks.append(_client_memory(checkpoint, found.plan, found.identity.name))
    else:
        checks.append(_server_memory(checkpoint, found.plan))
    return checks


def _fits_model(checkpoint: Checkpoint, agreed: FederationPlan) -> list[Check]:
    """What the server checks when it starts: adapters, lengths, every client's cut, the largest tensors."""
    from fedsea.model.loading import check_plan
    from fedsea.server.run import make_roster

    check_plan(agreed, checkpoint.config)
    make_roster(agreed, checkpoint)
    return [Check("adapters", "ok", "targets, cuts and largest tensors of the plan fit this model")]


def _client_memory(checkpoint: Checkpoint, agreed: FederationPlan, name: str) -> Check:
    from fedsea.types import SegmentKind

    cut = agreed.partition_of(name)
    last = checkpoint.num_blocks
    cut.trunk(last)
    segments = (
        (SegmentKind.INPUT, range(cut.input_blocks), agreed.adapter.input),
        (SegmentKind.OUTPUT, range(last - cut.output_blocks, last), agreed.adapter.output),
    )
    return _fits(f"{name}'s segments", checkpoint, agreed, segments)


def _server_memory(checkpoint: Checkpoint, agreed: FederationPlan) -> Check:
    from fedsea.types import SegmentKind

    ranges = [agreed.partition_of(name).trunk(checkpoint.num_blocks) for name in agreed.client_names]
    blocks = range(min(r.start for r in ranges), max(r.stop for r in ranges))
    return _fits("the trunk", checkpoint, agreed, [(SegmentKind.TRUNK, blocks, agreed.adapter.trunk)])


def segment_bytes(checkpoint: Checkpoint, agreed: FederationPlan, kind: Any, blocks: range, trained: str) -> int:
    """Weights of a segment, and what AdamW needs if all of it is trained; adapters and activations come on top."""
    from fedsea.model.layout import parameters_of

    numbers = sum(math.prod(shape) for shape in parameters_of(checkpoint.config, kind, blocks).values())
    per_value = 4 if agreed.model.dtype == "float32" else 2
    return numbers * (4 * _TRAINED_COPIES if trained == "full" else per_value)


def copied_bytes(checkpoint: Checkpoint, agreed: FederationPlan, segments: Iterable[SegmentSpec]) -> int:
    """What a process on this CPU takes beside the weights to read them faster while it decodes."""
    from fedsea.model.layout import block_of, parameters_of
    from fedsea.model.products import most_copied_bytes
    from fedsea.types import SegmentKind

    if agreed.model.dtype != "float32":
        return 0
    owned: list[int] = []
    for kind, blocks, trained in segments:
        if trained == "full":
            continue
        shapes = parameters_of(checkpoint.config, kind, blocks)
        weights = {name: 4 * math.prod(shape) for name, shape in shapes.items() if len(shape) == 2}
        owned.append(sum(size for name, size in weights.items() if block_of(name) is not None))
        if kind is SegmentKind.OUTPUT:
            owned.append(sum(size for name, size in weights.items() if block_of(name) is None))
    return most_copied_bytes(owned)


def _fits(what: str, checkpoint: Checkpoint, agreed: FederationPlan, segments: Sequence[SegmentSpec]) -> Check:
    import psutil

    from fedsea.observe.figures import bytes_text

    free = int(psutil.virtual_memory().available)
    needed = sum(segment_bytes(checkpoint, agreed, *segment) for segment in segments)
    copied = copied_bytes(checkpoint, agreed, segments)
    faster = f", and decoding on the CPU up to {bytes_text(copied)} for copies of weights" if copied else ""
    verb = "takes" if what == "the trunk" else "take"
    text = f"{what} {verb} {bytes_text(needed)} plus adapters and activations{faster}; {bytes_text(free)} are free"
    if needed > free:
        return Check("memory", "fail", text, "use a machine with more memory, or model.dtype = 'bfloat16' in the plan")
    if needed + copied > 0.7 * free:
        return Check("memory", "warn", text, "it is tight: end other programs, or lower micro_batch_sequences")
    return Check("memory", "ok", text)
