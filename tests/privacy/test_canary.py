"""A silo's text and its token ids appear nowhere but in the client's own data file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from fedsea.client import results
from fedsea.client.segments import ClientSegments
from fedsea.errors import FedseaError
from fedsea.observe.metrics import ServerMetrics
from fedsea.observe.progress import ClientDisplay, ServerDisplay
from fedsea.observe.recorders import ClientRecorder, ServerRecorder
from fedsea.privacy.boundary import Boundary
from fedsea.wire.channel import ClientStream
from fedsea.wire.session import PeerSession
from tests.support.canary import CANARY, TRUST, assert_absent, forms, plant


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


@pytest.fixture
def rows(monkeypatch) -> list[bytes]:
    """Rows of values as they were before the boundary, of every release."""
    seen: list[bytes] = []
    for method in ("hidden", "gradient"):
        original = getattr(Boundary, method)

        def release(self, values_TH, origin=None, original=original):
            seen.extend(row.tobytes() for row in values_TH.detach().numpy()[:3] if row.any())
            return original(self, values_TH, origin)

        monkeypatch.setattr(Boundary, method, release)
    return seen


@pytest.mark.parametrize("mode", TRUST)
def test_nothing_of_the_text_reaches_logs_status_metrics_files_or_the_wire(
    federation, base_model, log, wire, rows, mode, capfd
):
    fed = federation("a", "b", **TRUST[mode])
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
    sent = b"".join(wire)
    assert_absent("the wire", sent, canary)
    assert len(rows) > 50
    as_they_were = sum(row in sent for row in rows)
    assert as_they_were == (len(rows) if mode == "trusted-server" else 0)
    files = [path for path in fed.folder.rglob("*") if path.is_file() and path != fed.silos["a"]]
    files += [path for path in (fed.identities / "a").rglob("*") if path.is_file()]  # where the ledger is
    expected = {"metrics.jsonl", "plan.json", "prepared.safetensors"}
    assert expected | ({"ledger.jsonl"} if mode == "noised" else set()) <= {path.name for path in files}
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
