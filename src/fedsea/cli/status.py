"""`fedsea status`: how a server stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsea.cli import options as o
from fedsea.cli import output


def status(server: o.Server = None, identity: o.Identity = Path("identity"), as_json: o.Json = False) -> None:
    """Ask a server how its run stands: steps, rounds, clients, whom it waits for.

    Needs an identity that the server admits.

    Example: `fedsea status --server fedsea.example.org:7443`
    """
    output.begin(as_json=as_json)
    address = o.need_server(server)
    import asyncio

    from fedsea.wire.identity import Identity
    from fedsea.wire.status import call_status  # not through client.run, which takes seconds to load torch

    answer = asyncio.run(call_status(address, Identity.load(identity)))
    if as_json:
        output.result(answer)
    else:
        _show(answer)


def _show(answer: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from fedsea.observe.figures import bytes_text

    facts = Table.grid(padding=(0, 2))
    facts.add_row("federation", f"{answer['federation']} (run {answer['run_id']}, fedsea {answer['version']})")
    facts.add_row("trust mode", str(answer["trust_mode"]))
    facts.add_row("backward channel", str(answer.get("backward_channel", "open")))
    state = "finished" if answer["finished"] else "under way"
    facts.add_row("step", f"{answer['next_step']} of {answer['num_steps']}, {state}")
    facts.add_row("round", f"{answer['rounds_done']} of {answer['rounds']} done")
    up, down = bytes_text(answer["bytes_received"]), bytes_text(answer["bytes_sent"])
    facts.add_row("bytes", f"{up} from clients, {down} to clients")
    facts.add_row("inference", _inference(answer.get("inference")))
    clients = Table("client", "state")
    for name in answer["clients"]:
        trains, uses = name in answer["connected"], name in answer.get("using", ())
        state = "connected" if trains else "not connected to train" if uses else "not connected"
        if uses:
            state += ", uses the model"
        if reason := answer.get("refused", {}).get(name):
            state += f" ({reason})"
        if name in answer["waiting_for"]:
            state += ", the step waits for it"
        clients.add_row(str(name), state)
    console = Console()
    console.print(facts)
    console.print(clients)
    if said := answer.get("trust"):
        console.print(said, soft_wrap=not console.is_terminal, highlight=False)


def _inference(now: dict[str, Any] | None) -> str:
    """Decoding sessions, their memory, and what they did since the server started."""
    from fedsea.observe.figures import bytes_text, counted

    if now is None:
        return "not offered by the plan"
    memory = f"{bytes_text(now['kv_bytes'])} of {bytes_text(now['kv_bytes_limit'])} for keys and values"
    people = f"{counted(now['sessions'], 'session')} with {counted(now['sequences'], 'sequence')}"
    if waiting := now.get("waiting"):
        people += f", {waiting} waiting for room"
    return f"{people}, {memory}, {counted(now['tokens'], 'token')} so far"
