"""The checks of the source find what they are for, and let pass what is right."""

import json
import os
import subprocess
import sys

import pytest

from scripts import check_coverage, check_processes, check_source

BAD_CODE = {
    "an import of pickle": ("src/a.py", "import pickle", "imports pickle"),
    "an import from dill": ("src/a.py", "from dill import dumps", "imports dill"),
    "torch.load": ("src/a.py", "torch.load(path)", "without weights_only=True"),
    "torch.load that asks for pickles": ("src/a.py", "torch.load(path, weights_only=False)", "without weights_only"),
    "torch.save": ("src/a.py", "torch.save(x, path)", "writes a pickle"),
    "a sleep in a test": ("tests/a.py", "time.sleep(1)", "a test sleeps"),
    "an awaited sleep in a test": ("tests/a.py", "async def f():\n    await asyncio.sleep(0)", "a test sleeps"),
    "a bare skip": ("tests/a.py", "@pytest.mark.skip\ndef test(): pass", "without a reason"),
    "a skip for no GPU's sake": ("tests/a.py", "pytest.skip('slow')", "without a reason"),
    "an expected failure": ("tests/a.py", "@pytest.mark.xfail(reason='later')\ndef test(): pass", "without a reason"),
}

GOOD_CODE = {
    "safe loading": ("src/a.py", "torch.load(path, weights_only=True)"),
    "a sleep outside of tests": ("src/a.py", "time.sleep(1)"),
    "a skip for a missing GPU": ("tests/a.py", "pytest.skip('needs a CUDA device')"),
    "a mark for a missing GPU": ("tests/a.py", "@pytest.mark.skipif(none, reason='no GPU')\ndef test(): pass"),
}


def problems(tmp_path, monkeypatch, name, code):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text(code)
    return list(check_source.python_problems(path.relative_to(tmp_path)))


@pytest.mark.parametrize("what", BAD_CODE)
def test_bad_code_is_found(what, tmp_path, monkeypatch):
    name, code, expected = BAD_CODE[what]
    (problem,) = problems(tmp_path, monkeypatch, name, code)
    assert expected in problem


@pytest.mark.parametrize("what", GOOD_CODE)
def test_good_code_passes(what, tmp_path, monkeypatch):
    assert not problems(tmp_path, monkeypatch, *GOOD_CODE[what])


@pytest.mark.parametrize("folder", ["home", "root", "Users"])
def test_a_path_of_one_machine_is_found(folder, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"See /{folder}/somebody/notes.\n")
    assert list(check_source.path_problems(page))


def test_a_path_of_every_machine_passes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("See /srv/federation, src/work/a.py and https://example.org/home/page.\n")
    assert not list(check_source.path_problems(page))


def report(**covered):
    files = {
        f"src/fedsea/{room}/a.py": {"summary": {"covered_lines": count, "num_statements": 100}}
        for room, count in covered.items()
    }
    return json.dumps({"files": files})


def run_coverage_check(tmp_path, monkeypatch, text):
    path = tmp_path / "coverage.json"
    path.write_text(text)
    monkeypatch.setattr("sys.argv", ["check_coverage.py", str(path)])
    return check_coverage.main()


def test_coverage_at_the_floor_passes(tmp_path, monkeypatch):
    rooms = dict.fromkeys(check_coverage.ROOMS, 90)
    assert run_coverage_check(tmp_path, monkeypatch, report(**rooms, cli=10)) == 0


def test_one_room_below_the_floor_fails(tmp_path, monkeypatch, capsys):
    rooms = dict.fromkeys(check_coverage.ROOMS, 100) | {"wire": 89}
    assert run_coverage_check(tmp_path, monkeypatch, report(**rooms)) == 1
    assert "below the floor: wire" in capsys.readouterr().out


def test_a_room_without_any_file_fails(tmp_path, monkeypatch):
    rooms = dict.fromkeys(set(check_coverage.ROOMS) - {"model"}, 100)
    assert run_coverage_check(tmp_path, monkeypatch, report(**rooms)) == 1


def test_a_process_that_was_left_behind_is_found_and_ended(monkeypatch, capsys):
    word = f"test-{os.getpid()}"
    monkeypatch.setenv(check_processes.MARK, word)
    monkeypatch.setattr(check_processes, "GRACE_S", 0.0)
    left = subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1)
    assert left.stdout.readline()
    assert check_processes.main() == 1
    assert left.wait(timeout=10) != 0
    assert f"process {left.pid}" in capsys.readouterr().out
    left.stdin.close()
    left.stdout.close()


def test_no_process_left_behind_is_fine(monkeypatch):
    monkeypatch.setenv(check_processes.MARK, f"nobody-{os.getpid()}")
    assert check_processes.main() == 0
