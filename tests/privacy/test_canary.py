"""A silo's text and its token ids appear nowhere but in the client's own data file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from transformers import AutoTokenizer

from fedsea.client import results
from fedsea.client.segments import ClientSegments
from fedsea.errors import FedseaError
from fedsea.observe.metrics import ServerMetrics
from fedsea.observe.progress import ClientDisplay, ServerDisplay
from fedsea.observe.recorders import ClientRecorder, ServerRecorder
from fedsea.wire.channel import ClientStream
from fedsea.wire.session import PeerSession
from tests.support.federation import Federation

CANARY = "Zebulon Quasimir 0471-993"


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Every line of every logger, at its lowest level, with traces."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(logging.Formatter().format(record))
            lines.append(repr(record.args))

    handler, level = Keep(), logging.root.level
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.DEBUG)
    logging.getLogger("fedsea").setLevel(logging.DEBUG)
    yield lines
    logging.root.removeHandler(handler)
    logging.root.setLevel(level)
    logging.getLogger("fedsea").setLevel(logging.NOTSET)


@pytest.fixture
def wire(monkeypatch) -> list[bytes]:
    """Every chunk that either side sends, before encryption."""
    chunks: list[bytes] = []
    for kind in (ClientStream, PeerSession):
        original = kind._write

        async def write(self, chunk, original=original):
            chunks.append(bytes(chunk))
            await original(self, chunk)

        monkeypatch.setattr(kind, "_write", write)
    return chunks


def forms(base_model: Path) -> list[bytes]:
    """The canary as text, escaped text, and as lists of its token ids as they might be printed or stored."""
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    found = [CANARY.encode(), CANARY.split()[0].encode(), json.dumps(CANARY).encode(), CANARY.encode("utf-16-le")]
    for text in (CANARY, " " + CANARY):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][2:10]
        found += [separator.join(map(str, ids)).encode() for separator in (", ", ",", " ", "\n")]
        found += [np.array(ids, dtype=kind).tobytes() for kind in ("<i8", "<i4", "<i2", "<f4")]
    return found


def assert_absent(where: str, content: bytes, canary: list[bytes]) -> None:
    assert not [form for form in canary if form in content], f"the canary is in {where}"


def plant(fed: Federation, name: str) -> None:
    rows = [json.dumps({"text": f"{CANARY} opens the door for {CANARY}"}) for _ in range(20)]
    fed.silos[name].write_text("\n".join(rows) + "\n")


def test_nothing_of_the_text_reaches_logs_status_metrics_files_or_the_wire(federation, base_model, log, wire, capfd):
    fed = federation("a", "b")
    plant(fed, "a")
    canary = forms(base_model)
    assert any(form in fed.silos["a"].read_bytes() for form in canary)
    metrics = ServerMetrics(CollectorRegistry())
    display = ServerDisplay(fed.plan)
    statuses: list[dict[str, object]] = []
    with ServerRecorder(fed.folder / "server", display, metrics) as recorder:

        def keep(status: dict[str, object]) -> None:
            recorder(status)
            statuses.append(status)

        fed.start_server(keep)
        recorders = {name: ClientRecorder(fed.folder / name) for name in fed.names}
        parts = [
            fed.start_client(name, recorders[name], ClientDisplay(fed.plan, name), evaluate=True) for name in fed.names
        ]
        statuses.append(results.status(fed.address, fed.identities / "a"))
        for part in (*parts, fed.server):
            part.finish()
        for one in recorders.values():
            one.__exit__(None, None, None)

    assert sum(map(len, wire)) > 100_000
    assert any("joined" in line for line in log)
    assert len(statuses) > 1
    shown = capfd.readouterr()
    assert_absent("the log", "\n".join(log).encode(), canary)
    assert_absent("a display", (shown.out + shown.err).encode(), canary)
    assert_absent("the status", json.dumps(statuses).encode(), canary)
    assert_absent("the metrics", generate_latest(metrics.registry), canary)
    assert_absent("the wire", b"".join(wire), canary)
    files = [path for path in fed.folder.rglob("*") if path.is_file() and path != fed.silos["a"]]
    assert {"metrics.jsonl", "plan.json", "prepared.safetensors"} <= {path.name for path in files}
    for path in files:
        assert_absent(str(path), path.read_bytes(), canary)


BAD_SILOS = {
    "malformed-row": f'{{"text": "{CANARY}"}}\n{{"text": "{CANARY}\n',
    "wrong-type": f'{{"text": "one"}}\n{{"text": ["{CANARY}"]}}\n',
    "wrong-column": f'{{"{CANARY}": "{CANARY}"}}\n',
    "no-utf8": f'{{"text": "{CANARY} \udcff"}}\n',
    "empty-rows": f'{{"text": "", "other": "{CANARY}"}}\n',
}


@pytest.mark.parametrize("kind", BAD_SILOS)
def test_errors_about_data_do_not_quote_it(federation, base_model, log, kind):
    fed = federation("a")
    fed.silos["a"].write_bytes(BAD_SILOS[kind].encode(errors="surrogateescape"))
    fed.start_server()
    part = fed.start_client("a")
    with pytest.raises(FedseaError) as caught:
        part.finish()
    canary = forms(base_model)
    said = f"{caught.value.message}\n{caught.value!r}\n{caught.value.__cause__!r}\n{caught.value.__context__!r}"
    assert_absent("the error", said.encode(), canary)
    assert_absent("the log", "\n".join(log).encode(), canary)
    assert str(fed.silos["a"]) in caught.value.message


def test_an_error_in_the_middle_of_a_step_does_not_quote_values(federation, base_model, log, monkeypatch):
    fed = federation("a")
    plant(fed, "a")
    original = ClientSegments.head

    def poisoned(self, batch, hidden, update, number):
        return original(self, batch, hidden * float("nan"), update, number)

    monkeypatch.setattr(ClientSegments, "head", poisoned)
    fed.start_server()
    part = fed.start_client("a")
    with pytest.raises(FedseaError, match="loss of client a is not finite") as caught:
        part.finish()
    assert_absent("the error", caught.value.message.encode(), forms(base_model))
    assert_absent("the log", "\n".join(log).encode(), forms(base_model))
    assert "tensor(" not in "\n".join(log)
