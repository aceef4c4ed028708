"""The quickstart's end: an application at a client asks the federation's model, through `fedsea gateway`."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from fedsea.errors import FedseaError
from fedsea.evaluation.processes import Processes

MOST_TOKENS = 60
"""Longest answer."""
_PATIENCE_S = 120.0


def start_gateway(folder: Path, address: str, name: str, processes: Processes) -> Path | None:
    """Start a client's gateway, with the run that this client has finished.

    Returns:
        The file that gets its URL; None where the packages that it needs are not installed.
    """
    if not all(find_spec(package) for package in ("starlette", "uvicorn")):
        return None
    ready = folder / "runs" / "gateway"
    processes.start(
        "gateway",
        [
            *("gateway", "--server", address, "--identity", str(folder / "clients" / name), "--port", "0"),
            *("--run", str(folder / "runs" / name), "--model", str(folder / "model"), "--threads", "1"),
            *("--ready-file", str(ready)),
        ],
    )
    return ready


def ask(url: str, model: str, prompt: str, show: Callable[[str], None]) -> tuple[str, str]:
    """Let the model go on from a text, as any program that speaks OpenAI's API does.

    Args:
        url: The gateway's.
        model: How the gateway calls it.
        prompt: The text.
        show: Given the answer, piece by piece as it comes.

    Returns:
        The answer, and why it ended: "stop", or "length" where it was cut off after `MOST_TOKENS`.

    Raises:
        FedseaError: There was no whole answer.
    """
    wanted = {"model": model, "prompt": prompt, "max_tokens": MOST_TOKENS, "temperature": 0, "stream": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/completions", json.dumps(wanted).encode(), headers)  # noqa: S310 (http, ours)
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
    pieces: list[str] = []
    ended = "stop"
    try:
        with directly.open(request, timeout=_PATIENCE_S) as answer:
            for line in answer:
                event = line.decode().strip().removeprefix("data: ")
                if event == "[DONE]":
                    return "".join(pieces), ended
                if event:
                    choice = json.loads(event)["choices"][0]
                    pieces.append(choice["text"])
                    ended = choice["finish_reason"] or ended
                    show(choice["text"])
    except (OSError, ValueError, LookupError) as error:
        why = f"status {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
        raise FedseaError(f"The gateway gave no answer ({why}): see gateway.log among the logs.") from None
    raise FedseaError("The gateway's answer broke off: see gateway.log among the logs.")
