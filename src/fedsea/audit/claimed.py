"""What may be claimed of what is audited: of a run by its ledger, of a plan nothing yet."""

from __future__ import annotations

from typing import Any

from fedsea.audit.subject import Subject
from fedsea.client.accounts import reports
from fedsea.errors import FedseaError
from fedsea.plan import no_claim_reason


def claimed(subject: Subject) -> tuple[str, tuple[dict[str, Any], ...]]:
    """One sentence, and what the ledgers of the run say (see `privacy.claims.report_of`)."""
    if subject.run is None:
        unit = subject.plan.noise.unit
        nothing = f"nothing was released yet; a run's ledger counts what one {unit} spends: audit the run folder."
        return f"no DP claim: {no_claim_reason(subject.plan, subject.name) or nothing}", ()
    try:
        found = [report for report in reports(subject.run) if report["client"] == subject.name]
    except FedseaError as error:
        return f"no DP claim: {error.message}", ()
    if not found:
        return "no DP claim: this folder holds no ledger of this client: audit the client's own run folder.", ()
    spent = tuple({key: value for key, value in report.items() if key != "folder"} for report in found)
    return " ".join(report["sentence"] for report in spent), spent
