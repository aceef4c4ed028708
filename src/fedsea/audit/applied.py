"""The noise that a run's client really added: what its ledger has, which the plan only bounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedsea.client.accounts import find_ledgers
from fedsea.errors import FedseaError
from fedsea.plan import FederationPlan, NoiseSection
from fedsea.plan.sections import MAGNITUDES
from fedsea.privacy.book import Book

OF_THE_PLAN = "the plan's"
_OF_THE_LEDGER = "that of the run's ledger"
_CHANGED = "that of the run's ledger, which has several: of each key the laxest"
_UNKNOWN = (
    "the plan's, which is the least: what this run really added stands in its client's ledger, which is not to be had "
    "from this folder"
)


def applied(plan: FederationPlan, name: str, run: Path, run_id: str) -> tuple[NoiseSection, str]:
    """The noise of a run's releases, and where that is known from, in words.

    Args:
        plan: The run's.
        name: The client.
        run: Its folder; the server's holds no ledger.
        run_id: The run, as ledgers name it.
    """
    if plan.trust.mode != "noised":
        return plan.noise, OF_THE_PLAN
    found = _charged(plan, name, run, run_id)
    if not found:
        return plan.noise, _UNKNOWN
    if len(found) == 1:
        return found[0], _OF_THE_LEDGER
    return _laxest(found), _CHANGED


def _charged(plan: FederationPlan, name: str, run: Path, run_id: str) -> list[NoiseSection]:
    """Each noise that releases of this run were charged with; none if no ledger says."""
    try:
        books = [Book.open(folder) for folder in find_ledgers(run)]
    except FedseaError:  # moved or damaged; the claim says which
        return []
    whose = {"plan_sha256": plan.sha256(), "client": name}
    found: list[NoiseSection] = []
    for book in books:
        if whose.items() <= book.about.items():
            found += [noise for charged, noise in book.runs if charged == run_id and noise not in found]
    return found


def _laxest(found: Sequence[NoiseSection]) -> NoiseSection:
    """Of each key the value that protects least; 0 is no clip."""
    changed = {}
    for key in MAGNITUDES:
        values = [getattr(noise, key) for noise in found]
        changed[key] = min(values) if key.endswith("_std") or 0.0 in values else max(values)
    return found[0].model_copy(update=changed)
