"""`fedsea pseudonyms`: what would be replaced, and how much is found."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli import options as o
from fedsea.cli import output

if TYPE_CHECKING:
    from fedsea.plan.pseudonyms import PseudonymSettings
    from fedsea.privacy.pseudonyms.pseudonyms import ReplacedText

app = typer.Typer(no_args_is_help=True, help="Identifiers that become pseudonyms before tokenising.")

_SHAPES = {
    "full": "as a full name in a sentence",
    "last_first": "as a last name before a first name",
    "first": "as a first name alone",
    "last": "as a last name alone",
    "capitals": "in capitals",
    "lower": "in lower case",
    "genitive": "in the genitive",
    "possessive": "with 's",
}
_KNOWN = {"known": "both names on a list", "partly": "one of them on a list", "unknown": "on no list"}

_NO_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@app.command()
def preview(
    file: Annotated[Path, typer.Argument(help="A data file: jsonl, csv, parquet or txt.")],
    settings: o.Settings = None,
    format_name: o.Format = "auto",
    field: o.Field = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows are shown.")] = 10,
    as_json: o.Json = False,
) -> None:
    """Show a file's rows with what would be replaced, at a terminal and nowhere else.

    The client's mapping is not touched: the surrogates shown are examples. With `--json`, types are counted over the
    whole file, and no text is shown.

    Example: `fedsea pseudonyms preview notes/2024.jsonl --settings client.toml`
    """
    output.begin(as_json=as_json)
    from fedsea.data.formats import DataFormat
    from fedsea.data.opening import texts_of
    from fedsea.errors import ConfigError

    if not as_json and not sys.stdout.isatty():
        raise ConfigError(
            "preview shows the text itself, so only at a terminal: run it there, or use --json for counts."
        )
    chosen, folder = _settings(settings)
    wanted = DataFormat(format_name, o.read_fields(field))  # type: ignore[arg-type]
    found = texts_of([file], wanted)
    if as_json:
        output.result(_counts(chosen, folder, found))
        return
    _show(chosen, folder, found, rows)


@app.command()
def recall(
    settings: o.Settings = None,
    notes: Annotated[int, typer.Option(min=1, help="How many notes are generated.")] = 1000,
    seed: Annotated[int, typer.Option(help="Other notes.")] = 0,
    as_json: o.Json = False,
) -> None:
    """Measure on generated notes how many planted identifiers are found, by type, and how much is taken for one.

    Your texts are other texts: look at `fedsea pseudonyms preview` of them too.

    Example: `fedsea pseudonyms recall --settings client.toml`
    """
    output.begin(as_json=as_json)
    chosen, folder = _settings(settings)
    from fedsea.privacy.pseudonyms.recogniser import Recogniser

    recogniser = Recogniser(chosen, folder)
    from fedsea.evaluation.notes.recall import measure
    from fedsea.evaluation.notes.writer import write_notes

    measured = measure(write_notes(notes, seed), recogniser.find, chosen.types)
    scores = {kind: one.to_dict() for kind, one in measured.items()}
    if as_json:
        output.result({"notes": notes, "seed": seed, "types": scores})
        return
    _table(scores)


def _settings(path: Path | None) -> tuple[PseudonymSettings, Path]:
    from fedsea.plan import load_settings
    from fedsea.plan.pseudonyms import PseudonymSettings

    if path is None:
        return PseudonymSettings(), Path()
    return load_settings(path).pseudonyms, path.parent


def _counts(chosen: PseudonymSettings, folder: Path, found: Any) -> dict[str, Any]:
    from collections import Counter

    from fedsea.privacy.pseudonyms.recogniser import Recogniser

    recogniser, types, count = Recogniser(chosen, folder), Counter[str](), 0
    for _, texts in found:
        count += 1
        types.update(span.kind for found_in_text in recogniser.find_all(texts) for span in found_in_text)
    return {"rows": count, "types": dict(sorted(types.items()))}


def _show(chosen: PseudonymSettings, folder: Path, found: Any, rows: int) -> None:
    import itertools
    import tempfile

    from rich.console import Console

    from fedsea.observe.figures import counted
    from fedsea.privacy.pseudonyms.opening import open_pseudonyms

    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as scratch:
        example = chosen.model_copy(
            update={"mapping": str(Path(scratch, "map")), "key": str(Path(scratch, "key")), "passphrase": False}
        )
        pseudonyms = open_pseudonyms(example, folder.absolute())
        found = iter(found)
        for place, texts in itertools.islice(found, rows):
            console.print(place, style="dim", markup=False)
            for text, replaced in zip(texts, pseudonyms.conversation(texts), strict=True):
                console.print(_marked(text, replaced))
        if next(iter(found), None) is not None:
            console.print(f"That was the first {counted(rows, 'row')}; --rows shows more.", style="dim")


def _marked(text: str, replaced: ReplacedText) -> Any:
    """The text with `[original → surrogate (type)]` where something is replaced: it shows without colours, too."""
    from rich.text import Text

    marked, at = Text(), 0
    for span, surrogate in zip(replaced.spans, replaced.surrogates, strict=True):
        marked.append(text[at : span.start].translate(_NO_CONTROLS))
        marked.append("[", style="dim")
        marked.append(text[span.start : span.end].translate(_NO_CONTROLS), style="red strike")
        marked.append(" → ", style="dim")
        marked.append(surrogate.translate(_NO_CONTROLS), style="green")
        marked.append(f" ({span.kind})]", style="dim")
        at = span.end
    marked.append(text[at:].translate(_NO_CONTROLS))
    return marked


def _table(scores: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("type", "planted", "found", "recall", "95 % interval", "precision")
    for kind, score in scores.items():
        low, high = score["recall_95"]
        table.add_row(
            kind,
            str(score["planted"]),
            str(score["found"]),
            _percent(score["recall"]),
            f"{low:.1%} – {high:.1%}" if score["planted"] else "",  # noqa: RUF001 (an interval)
            _percent(score["precision"]),
        )
    console = Console()
    console.print(table)
    missed = sorted(
        ((form, counts["planted"] - counts["found"], counts["planted"])
         for form, counts in scores.get("name", {}).get("by_form", {}).items()),
        key=lambda one: -one[1],
    )[:6]  # fmt: skip
    for form, count, planted in missed:
        if count:
            console.print(f"missed: {count} of {planted} names {_in_words(form)}", highlight=False)


def _in_words(form: str) -> str:
    """The form of a planted name, as the guide calls it."""
    shape, known = form.split(", ")
    return f"{_SHAPES[shape]}, {_KNOWN[known]}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
