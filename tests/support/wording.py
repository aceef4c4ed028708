"""Looks for claims in everything that is shipped or stands beside it: strings, comments, pages, templates, assets."""

from __future__ import annotations

import ast
import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

FOLDERS = ("src", "docs", "examples", "benchmarks", "scripts")
BINARY = frozenset({".safetensors", ".pyc"})
VOCABULARY = "tokenizer.json"

CLAIMS = (
    r"privat\w*",
    r"anonym\w*",
    r"\bde ?identif\w*",
    r"\bun(?:identif|trace)\w*",
    r"\bprivacy ?(?:preserv|guarant|protect|respect|safe|friendly|first|by ?design)\w*",
    r"\b(?:preserv|guarant|protect|ensur|full|complete|perfect|total|strong)\w* (?:\w+ ){0,3}privacy\b",
    r"\bdps?\b",
    r"\bd\. ?p\.",
    r"\bdifferential(?:ly)? ?priva\w*",
)
MEANT_OTHERWISE = (
    r"private ?keys?(?: ?(?:pem|bytes))?\b",  # of a certificate, of a key exchange
    r"\bprivate ?format\b",
    r"\bprivate ?modes\b",  # of files: their owner alone may read them
    r"\bprivatetmp=",  # systemd's
    r"\breport a vulnerability privately\b",
    r"\bprivate ?(?:adapters?|lora)\b",  # trained parameters that the server does not know
    r"\bcalls no run private\b",
    r"\bis no anonymity\b",
    r'\bprivate"? and "?dp"? are kept for\b',
    r"\bno dp claim\b",
    r"\bdp claim: epsilon\b",
    r"\(epsilon, delta\) ?dp\b",
    r"\bis no (?:dp|differential ?privacy)\b",
    r"\bpractical secure aggregation for privacy ?preserving machine learning\b",
)
"""Whole phrases: a "not" that merely stands near a claim does not excuse it."""

_CLAIM, _OTHERWISE = (re.compile("|".join(parts)) for parts in (CLAIMS, MEANT_OTHERWISE))
_LINE_START = re.compile(r"(?m)^[ \t]*(?:(?:#+|//+|/?\*+|>+|[-+]|\|)[ \t]+)?")
_MARKUP = re.compile(r"<!--.*?-->|<[^<>]*>|\{#.*?#\}|\{\{.*?\}\}|\{%.*?%\}", re.DOTALL)
_COMMENT = re.compile(r"(?m)^[ \t]*#(.*)$|[ \t]#[ \t](.*)$")


def claims_in(text: str) -> list[str]:
    """What is claimed in a text, however it is written, with a few words around it."""
    found = []
    for form in _forms(text):
        hits = list(_CLAIM.finditer(form))
        excused = [match.span() for match in _OTHERWISE.finditer(form)] if hits else []
        for hit in hits:
            if not any(start <= hit.start() and hit.end() <= stop for start, stop in excused):
                found.append(form[max(0, hit.start() - 40) : hit.end() + 40])
    return found


def _forms(text: str) -> tuple[str, str]:
    """A text without regard to case and marks: once with blanks in place of all marks, once without marks."""
    plain = html.unescape(text).casefold()
    if not plain.isascii():
        plain = unicodedata.normalize("NFKD", plain).casefold()
        plain = "".join(char for char in plain if unicodedata.category(char) not in ("Cf", "Mn"))
        plain = re.sub(r"[\u2010-\u2015\u2212]", "-", plain)
    lines = _LINE_START.sub("", plain)
    glued = re.sub(r"-\s*\n\s*|[*_`~\\-]", "", _MARKUP.sub("", lines))
    spaced = re.sub(r"[-*_`~\\<>{}|#]", " ", lines)
    spaced_out, glued_out = (re.sub(r"\s+", " ", form) for form in (spaced, glued))
    return spaced_out, glued_out


def texts(root: Path) -> Iterator[tuple[str, str]]:
    """Where, and what: strings and comments of every Python file, and every other file whole."""
    for path in files(root):
        where = str(path.relative_to(root))
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".py" and not path.name.endswith("_pb2.py"):
            yield from ((f"{where}:{line}", string) for line, string in strings(ast.parse(text)))
            yield f"{where} (comments)", "\n".join("".join(parts) for parts in _COMMENT.findall(text))
        else:
            yield where, text


def files(root: Path) -> Sequence[Path]:
    """Everything that has words in it."""
    found = [path for path in root.iterdir() if path.suffix in (".md", ".toml") or path.name == "Makefile"]
    found += [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file()]
    return sorted(
        path for path in found if path.suffix not in BINARY and path.name != VOCABULARY and ".egg-info" not in str(path)
    )


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and value of every string, put together where it is written in several parts."""
    if (value := _string(tree)) is not None:
        yield getattr(tree, "lineno", 0), value
        if isinstance(tree, ast.JoinedStr):
            for part in tree.values:
                if isinstance(part, ast.FormattedValue):
                    yield from strings(part.value)
        return
    for child in ast.iter_child_nodes(tree):
        yield from strings(child)


def _string(node: ast.AST) -> str | None:
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=parts):
            return "".join(_string(part) or "…" for part in parts)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            before, after = _string(left), _string(right)
            return None if before is None or after is None else before + after
    return None
