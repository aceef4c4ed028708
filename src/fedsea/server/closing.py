"""The end of a secure round, on the engine thread: masks come off, the result is durable; and a note of whose it is."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

from fedsea.errors import AggregationError
from fedsea.federation.secure import Aggregator
from fedsea.server.context import Run
from fedsea.server.state import RunState
from fedsea.storage import write_bytes_atomic

log = logging.getLogger(__name__)


def stop(error: AggregationError) -> None:
    """End the run."""
    raise error


def unmask(run: Run, current: Aggregator) -> RunState | AggregationError:
    """On the engine thread: the masks are taken off, and the round is made durable."""
    before, counted = run.state, run.state.round_tokens
    try:
        means, weights = current.unmask()
        for index, group in enumerate(current.setting.layout.groups):
            tokens = sum(counted.get(name, 0) for name in group.holders if name in current.survivors)
            found = weights.get(next(iter(group.shapes)), 0)
            if found > tokens or (run.wait_s is None and found < tokens):
                raise AggregationError(
                    f"The weights of round {before.rounds_done} sum to {found} target tokens (group {index}), and this "
                    f"server counted {tokens}. Restore the newest run folder on the side that is behind."
                )
    except AggregationError as error:
        return error
    total = sum(counted.get(name, 0) for name in current.survivors)
    result = run.engine.take_means(means, weights, total)
    state = replace(before, result=result, rounds_done=before.rounds_done + 1, round_tokens={}, skipped=0)
    run.store.save_round(run.engine, state)
    return state


def skip(run: Run) -> RunState:
    """On the engine thread: the round is closed without a sum."""
    before = run.state
    state = replace(before, rounds_done=before.rounds_done + 1, round_tokens={}, skipped=before.skipped + 1)
    run.store.save(run.engine, state)
    return state


def write_note(path: Path, current: Aggregator) -> None:
    """Before members reveal a sum: whose it is."""
    note = {"round": current.setting.round, "survivors": current.survivors}
    write_bytes_atomic(path, json.dumps(note).encode())


def read_note(path: Path, round_index: int) -> tuple[str, ...] | None:
    """Whose sum of a round members may have revealed; None if no attempt came so far."""
    try:
        note = json.loads(path.read_bytes())
        return tuple(note["survivors"]) if note["round"] == round_index else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("%s cannot be read: members refuse a second sum over others themselves", path)
        return None
