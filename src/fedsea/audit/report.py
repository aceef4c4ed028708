"""The audit's page: one HTML file with its plots inside, and `report.json` beside it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from fedsea.audit.outcome import AuditReport, Outcome
from fedsea.audit.scoring import Score
from fedsea.storage import storage_error, write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def percent(value: float) -> str:
    """A share for tables.

    >>> percent(0.9951), percent(-0.001)
    ('99.5 %', '-0.1 %')
    """
    return f"{100 * value:.1f} %"


def rows_of(outcome: Outcome) -> list[list[str]]:
    """Attack, channel, recovery with its interval, prior, excess, identifiers, verdict: as text.

    One row; of planted notes and of own texts, where both were attacked, a row of each follows that has no verdict.
    """
    attack = outcome.attack
    head = [f"{attack.id} {attack.title}", outcome.channel]
    if outcome.score is not None:
        verdict = "" if outcome.verdict is None else outcome.verdict.value
        rows = [[*head, *_figures(outcome.score), verdict]]
        return rows + [
            [f"{attack.id}, {name}", outcome.channel, *_figures(one), ""] for name, one in outcome.sets.items()
        ]
    own = outcome.own or {}
    verdict = outcome.status if outcome.verdict is None else outcome.verdict.value
    rows = [[*head, *_own_figures(own), outcome.reason, verdict]]
    return rows + [
        [f"{attack.id}, {name}", outcome.channel, *_own_figures(one), one["sentence"], ""]
        for name, one in own.get("sets", {}).items()
    ]


def _own_figures(own: Mapping[str, Any]) -> list[str]:
    return [percent(own[key]) if key in own else "" for key in ("recovery", "prior", "excess")]


def _figures(score: Score) -> list[str]:
    recovery = f"{percent(score.recovery.value)} ({percent(score.recovery.low)} to {percent(score.recovery.high)})"
    named = ", ".join(f"{kind} {percent(share)}" for kind, share in score.identifiers.items())
    return [recovery, percent(score.prior.value), percent(score.excess.value), named]


NOT_IN_USE = (
    "Prompts and answers (channel session) are attacked with A1, A2 and A10. A3, A4 and A6 are run on training alone: "
    "a prompt that is sent again and again is averaged (A4) as a text is over epochs."
)
"""Said where results are listed, if any sessions were looked at."""

HEADINGS = ("attack", "channel", "tokens recovered", "prior", "excess", "identifiers, or what it says", "verdict")


def make_folder(folder: Path) -> None:
    """Make the report's folder.

    Raises:
        StorageError: The disk refused.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error("write to", folder, error) from None


@contextlib.contextmanager
def folder_for(folder: Path) -> Iterator[None]:
    """Make the report's folder; what was made of it is gone again if the work inside fails and leaves it empty.

    Raises:
        StorageError: The disk refused.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it is not empty
            for path in missing:
                path.rmdir()
        raise


def write_report(report: AuditReport, folder: Path) -> Path:
    """Write `report.json` and `report.html`; both hold texts of the audit, so they are for this machine.

    Returns:
        The page.

    Raises:
        StorageError: The disk refused.
    """
    make_folder(folder)
    values = report.to_json() | {"examples": list(report.examples), "seconds": report.seconds}
    write_bytes_atomic(folder / "report.json", (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
    environment = jinja2.Environment(loader=jinja2.PackageLoader("fedsea.audit", "."), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        report=report,
        about=report.about,
        headings=HEADINGS,
        not_in_use=NOT_IN_USE if report.about.get("sessions") else "",
        rows=[row for outcome in report.outcomes for row in rows_of(outcome)],
        plots=_plots(report),
    )
    path = folder / "report.html"
    write_bytes_atomic(path, page.encode())
    return path


def _plots(report: AuditReport) -> list[tuple[str, str]]:
    """Title and SVG of each curve that was drawn."""
    curves, plots = report.curves, []
    if noise := curves.get("noise"):
        plots.append(("Recovery against noise on the forward channel", _svg(lambda axes: _plot_noise(axes, noise))))
        plots.append(("Recovery against what the noise costs", _svg(lambda axes: _plot_cost(axes, noise))))
    for axis, title in (("k", "forward channel, k input blocks"), ("m", "backward channel, m output blocks")):
        if points := curves.get(axis):
            plots.append((f"Recovery against the cut: {title}", _svg(_cut_plot(axis, points))))
    return plots


def _svg(draw: Callable[[Axes], None]) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "fedsea"}):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    return text[text.index("<svg") :]


def _recovery(axes: Axes, xs: Sequence[float], points: Sequence[dict[str, Any]]) -> None:
    values = [100 * point["recovery"] for point in points]
    errors = [
        [max(0.0, 100 * (point["recovery"] - point["low"])) for point in points],
        [max(0.0, 100 * (point["high"] - point["recovery"])) for point in points],
    ]
    axes.errorbar(xs, values, yerr=errors, fmt="o-", color="#a33", capsize=3, label="recovered")
    axes.plot(xs, [100 * point["prior"] for point in points], "--", color="#777", label="the prior's own guess")
    axes.set_ylim(-3, 103)
    axes.set_ylabel("tokens, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _plot_noise(axes: Axes, points: Sequence[dict[str, Any]]) -> None:
    _recovery(axes, [point["rho"] for point in points], points)
    axes.set_xlabel("noise: mean norm over the hidden states' mean norm (bars: 95 % interval)")


def _plot_cost(axes: Axes, points: Sequence[dict[str, Any]]) -> None:
    _recovery(axes, [point["perplexity"] for point in points], points)
    axes.set_xscale("log")
    axes.set_xlabel("perplexity with this noise, without training under it")


def _cut_plot(axis: str, points: Sequence[dict[str, Any]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        _recovery(axes, [point[axis] for point in points], points)
        axes.set_xticks([point[axis] for point in points])
        axes.set_xlabel(f"{axis}, with the plan's own noise")

    return draw
