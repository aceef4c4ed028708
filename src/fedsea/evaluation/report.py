"""The quickstart's page: one HTML file with its plots inside."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from fedsea.evaluation.asking import MOST_TOKENS
from fedsea.plan import FederationPlan, trust_statement
from fedsea.storage import write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedsea.evaluation.quickstart import QuickstartResult

Curves = Mapping[str, Sequence[Mapping[str, Any]]]

Cells = Sequence[Sequence[str]]
"""A table of text, row by row, its heading first."""

KINDS = {
    "Forward": "hidden states to the server",
    "Output": "hidden states back",
    "Backward": "gradients to the server",
    "InputGradient": "gradients back",
    "RoundUpdate": "trained parameters to the server",
    "RoundResult": "averaged parameters back",
    "StepReady": "own segments' gradients to the server",
    "StepDone": "summed gradients back",
}
"""Kind of message to what it carries; the rest is handshake."""

PHASES = {
    "input": "input segment (here)",
    "trunk": "waiting for the trunk",
    "output": "output segment and loss (here)",
    "commit": "gradients and checkpoints to disk",
}

PARTS = {
    "federation": "the federation, from its start to its end",
    "comparison": "beside it: the models it is compared with",
}


def phase_rows(phases_s: Mapping[str, float]) -> list[tuple[str, float]]:
    """Phases of the clients' steps, in words, with their seconds."""
    return [(PHASES.get(name, name), seconds) for name, seconds in phases_s.items()]


def time_rows(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """Parts of the quickstart, in words, with their wall seconds."""
    return [(PARTS.get(name, name), value) for name, value in seconds.items()]


def traffic_rows(bytes_by_kind: Mapping[str, int]) -> list[tuple[str, int]]:
    """What travelled, in words, with its bytes; the largest first."""
    rows = {KINDS[kind]: count for kind, count in bytes_by_kind.items() if kind in KINDS}
    other = sum(count for kind, count in bytes_by_kind.items() if kind not in KINDS)
    return sorted((rows | {"handshake and control": other}).items(), key=lambda row: -row[1])


def loss_rows(result: QuickstartResult) -> list[tuple[str, float, dict[str, float]]]:
    """Model, pooled loss, and loss by silo, in the order of telling."""
    values = result.val_loss
    rows = [("base", values["base"], result.by_silo["base"])]
    rows += [(f"{name} alone", loss, result.by_silo[name]) for name, loss in values["alone"].items()]
    rows += [(name, values[name], result.by_silo[name]) for name in ("federated", "central")]
    return rows


def in_words(result: QuickstartResult) -> str:
    """What the losses say, in a sentence of the run's own figures."""
    values = result.val_loss
    alone = sorted(values["alone"].values())
    return (
        f"Together the clients reach a validation loss of {values['federated']:.3f} over everybody's text; trained on "
        f"all text in one place it is {values['central']:.3f}, trained alone {alone[0]:.3f} to {alone[-1]:.3f}, and "
        f"untrained {values['base']:.3f}."
    )


def cut_off(result: QuickstartResult) -> str:
    """A remark behind an answer that was longer than it may be; "" behind any other."""
    return f"(cut off after {MOST_TOKENS} tokens)" if result.sample["finish_reason"] == "length" else ""


def write_report(result: QuickstartResult, plan: FederationPlan, curves: Curves, reading: Cells = ()) -> None:
    """Write the page to `result.report`.

    Args:
        result: What the quickstart found.
        plan: For its settings and its trust mode.
        curves: Client to the lines of its `metrics.jsonl`.
        reading: What the server could have read; nothing if it was not audited.
    """
    environment = jinja2.Environment(loader=jinja2.PackageLoader("fedsea.evaluation", "."), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        result=result,
        plan=plan,
        statement=trust_statement(plan),
        losses=loss_rows(result),
        summary=in_words(result),
        cut_off=cut_off(result),
        reading=reading,
        silos=list(curves),
        traffic=traffic_rows(result.bytes_by_kind),
        phases=phase_rows(result.phases_s),
        loss_plot=_svg(lambda axes: _plot_losses(axes, result)),
        curve_plot=_svg(lambda axes: _plot_curves(axes, curves)),
    )
    write_bytes_atomic(result.report, page.encode())


def _svg(draw: Any) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "fedsea"}):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _plot_losses(axes: Axes, result: QuickstartResult) -> None:
    rows = loss_rows(result)
    names = [name for name, _, _ in rows]
    colours = ["#b7b7b7", *["#7fa6c9"] * len(result.val_loss["alone"]), "#1f6f54", "#3b3b3b"]
    bars = axes.barh(names, [loss for _, loss, _ in rows], color=colours)
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("validation loss on all silos' held-out text (nats per target token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)


def _plot_curves(axes: Axes, curves: Curves) -> None:
    for index, (name, lines) in enumerate(curves.items()):
        steps = [line for line in lines if line["kind"] == "step"]
        held = [line for line in lines if line["kind"] == "evaluation"]
        colour = f"C{index}"
        axes.plot([s["step"] for s in steps], [s["mean_loss"] for s in steps], color=colour, alpha=0.35, linewidth=1)
        axes.plot(
            [h["next_step"] for h in held], [h["mean_loss"] for h in held], "o-", color=colour, label=name, markersize=4
        )
    axes.set_xlabel("step (thin: training loss; dots: held-out loss)")
    axes.set_ylabel("nats per target token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
