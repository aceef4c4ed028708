"""The quickstart's processes: what they are given, where their output goes, how they end."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedsea import __version__
from fedsea.errors import FedseaError
from fedsea.evaluation import processes as module
from fedsea.evaluation.processes import Processes


@pytest.fixture
def from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the libraries, which nothing here needs."""
    monkeypatch.setattr(module, "make_context", lambda: multiprocessing.get_context("spawn"))


def test_processes_end_in_reverse_so_that_none_misses_what_it_relies_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    class Child:
        exitcode = None

        def __init__(self, name: str, **_: Any) -> None:
            self.name = name

        def start(self) -> None:
            self.alive = True

        def is_alive(self) -> bool:
            return self.alive

        def terminate(self) -> None:
            ended.append(f"{self.name} told")

        def join(self, timeout: float) -> None:
            ended.append(f"{self.name} gone")
            self.alive = False

    class Context:
        Process = Child

    monkeypatch.setattr(module, "make_context", Context)
    with Processes(tmp_path) as processes:
        processes.start("first", ["server"])
        processes.start("second", ["gateway"])
        assert processes.alive("first")
        assert not processes.ended("first")
        assert not processes.ended("third")
    assert ended == ["second told", "second gone", "first told", "first gone"]


@pytest.mark.usefixtures("from_nothing")
def test_a_command_runs_in_a_process_of_its_own_and_prints_to_its_log(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        processes.start("shown", ["version"])
        assert processes.last_line("shown", timeout_s=60) == f"fedsea {__version__}"
        assert processes.ended("shown")


@pytest.mark.usefixtures("from_nothing")
def test_a_process_that_fails_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        processes.call("broken", exec, "print('one'); print('two'); raise SystemExit(3)")
        with pytest.raises(FedseaError, match="'broken' ended with code 3: two"):
            processes.wait(("broken",), timeout_s=60)


@pytest.mark.usefixtures("from_nothing")
def test_processes_have_one_thread_and_do_not_run_the_main_module_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    main = ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    with Processes(tmp_path) as processes:
        processes.call("shown", exec, "import os; print(os.environ['OMP_NUM_THREADS'])")
        assert processes.last_line("shown", timeout_s=60) == "1"
    assert not (tmp_path / "ran").exists()
    assert sys.modules["__main__"] is main
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "TOKENIZERS_PARALLELISM" not in os.environ
