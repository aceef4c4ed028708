"""Rules that no linter knows, over the files that git tracks. Prints what breaks them, and exits with 1.

python scripts/check_source.py
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PICKLING = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
MARKS = frozenset({"skip", "skipif", "xfail", "importorskip"})
MISSING_MACHINE = re.compile(r"\b(gpu|cuda)\b", re.IGNORECASE)
PRIVATE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|work|mnt)/\w|\.\./shared/")
BINARY = frozenset({".safetensors", ".png", ".parquet"})


def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks and that are still there."""
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], check=True, capture_output=True, text=True).stdout
    return [path for name in listed.split("\0") if name and (path := Path(name)).is_file()]


def dotted(node: ast.AST) -> str:
    """`torch.load` for the expression that says so; "" for anything that is no dotted name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def imported(node: ast.AST) -> list[str]:
    """Top-level names of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(node.module or "").split(".")[0]]
    return []


def problems_of_call(call: ast.Call) -> Iterator[str]:
    """Calls that are never allowed."""
    name = dotted(call.func)
    if name == "torch.load":
        safe = any(
            keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            for keyword in call.keywords
        )
        if not safe:
            yield "torch.load without weights_only=True"
    if name == "torch.save":
        yield "torch.save writes a pickle; use safetensors"


def problems_of_test(node: ast.AST) -> Iterator[str]:
    """What a test must not do: sleep, or leave itself out for another reason than a missing GPU."""
    name = dotted(node.func) if isinstance(node, ast.Call) else dotted(node)
    last = name.rpartition(".")[2]
    if isinstance(node, ast.Call) and last == "sleep":
        yield "a test sleeps; wait for the event"
    if last in MARKS and name.startswith("pytest."):
        words = " ".join(v.value for v in ast.walk(node) if isinstance(v, ast.Constant) and isinstance(v.value, str))
        if not MISSING_MACHINE.search(words):
            yield f"{name} without a reason that names a missing GPU"


def python_problems(path: Path) -> Iterator[str]:
    """Problems of one Python file, as `path:line: what`."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    in_tests = path.parts[0] == "tests"
    inside_call = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        found = [f"imports {name}" for name in imported(node) if name in PICKLING]
        if isinstance(node, ast.Call):
            found += problems_of_call(node)
        if in_tests and isinstance(node, ast.Call | ast.Attribute) and id(node) not in inside_call:
            found += problems_of_test(node)
        for problem in found:
            yield f"{path}:{getattr(node, 'lineno', 1)}: {problem}"


def path_problems(path: Path) -> Iterator[str]:
    """Paths of somebody's machine in any text file."""
    if path.suffix in BINARY:
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if match := PRIVATE_PATH.search(line):
            yield f"{path}:{number}: names a path of one machine ({match.group()}…)"


def main() -> int:
    """Check everything; 1 if something is wrong."""
    problems = [problem for path in tracked("*.py") for problem in python_problems(path)]
    problems += [problem for path in tracked() if path != Path(__file__) for problem in path_problems(path)]
    for problem in sorted(problems):
        print(problem)
    print(f"{len(problems)} problems" if problems else "the source keeps its rules")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
