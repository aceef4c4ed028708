"""What a run leaves in its folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedsea.errors import StorageError
from fedsea.observe.run_log import RunLog, read_lines
from fedsea.plan import parse_plan, parse_plan_json


def events(folder: Path) -> list[tuple[int, str, float]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                number = value.simple_value or (value.tensor.float_val[0] if value.tensor.float_val else 0.0)
                found.append((event.step, value.tag, number))
    return found


def test_lines_are_on_disk_before_close(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False)
    log.write("round", step=1)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1
    log.close()


@pytest.mark.parametrize("torn", [b'{"time": 1.0, "kin', b"x" * 200_000])
def test_a_torn_last_line_is_cut_off_when_the_run_goes_on(tmp_path: Path, torn: bytes) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.write("step", step=0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    with RunLog(tmp_path, tensorboard=False) as log:
        log.write("step", step=1)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1]


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"ti')
    RunLog(tmp_path, tensorboard=False).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_reading_leaves_out_a_torn_last_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write("step", step=0, mean_loss=float("nan"), other=float("inf"))
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line["mean_loss"] is None
    assert line["other"] is None


def test_a_long_string_is_refused(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log, pytest.raises(AssertionError):
        log.write("step", note="word " * 100)
    assert read_lines(tmp_path / "metrics.jsonl") == []


def test_tensorboard_reads_the_scalars_of_both_processes_of_a_run(tmp_path: Path) -> None:
    with RunLog(tmp_path, clock=lambda: 1.0) as log:
        log.write("step", step=3, mean_loss=1.5, flag=True, name="clinic")
    with RunLog(tmp_path, clock=lambda: 2.0) as log:
        log.write("evaluation", next_step=4, mean_loss=0.5)
    assert events(tmp_path) == [(3, "step/mean_loss", 1.5), (4, "evaluation/mean_loss", 0.5)]


def test_tensorflow_is_never_looked_for(tmp_path: Path) -> None:
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow was imported')")
    code = "import sys; from pathlib import Path; from fedsea.observe.run_log import RunLog\n"
    code += (
        "with RunLog(Path(sys.argv[1])) as log: log.write('step', step=0, loss=1.0)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env={"PYTHONPATH": str(tmp_path)})


def test_the_resolved_plan_is_written_whole(tmp_path: Path) -> None:
    plan = parse_plan({"model": {"path": "m"}, "clients": [{"name": "clinic"}]})
    with RunLog(tmp_path, tensorboard=False) as log:
        log.write_plan(plan)
    document = json.loads((tmp_path / "plan.json").read_text())
    assert parse_plan_json(json.dumps(document)) == plan
    assert document["training"]["rounds"] == 1


def test_a_folder_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        RunLog(tmp_path / "file" / "run")
