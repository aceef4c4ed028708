"""Servers and clients as processes of their own, which a test kills at a chosen point.

They are forked from a template process that has imported everything and trained once, so that a start costs neither.
Faults live here: a method is wrapped in the child before the work begins; production code knows nothing of it.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from fedsea.client.setup import ClientOptions
from fedsea.server.run import ServerOptions

DEADLINE_S = 60.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.warm"])


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a process at a chosen point.

    Attributes:
        where: `module:Class.method`.
        call: At which call of it, from 1.
        after: When the call has returned, instead of before it.
        action: "kill" is SIGKILL to itself; "halt" tells the test and stops this thread for ever; "census" tells
            the test the names of all parameters in the process's memory, and goes on.
    """

    where: str
    call: int = 1
    after: bool = False
    action: str = "kill"


def _parameters() -> list[str]:
    """Names of all parameters that live in this process, of the outermost model; of one in no model, its shape."""
    import gc

    import torch
    from transformers import PreTrainedModel

    gc.collect()
    everything = gc.get_objects()
    names: dict[int, str] = {}
    for model in [one for one in everything if issubclass(type(one), PreTrainedModel)]:
        for name, parameter in model.named_parameters():
            names[id(parameter)] = max(name, names.get(id(parameter), ""), key=len)
    living = [tensor for tensor in everything if issubclass(type(tensor), torch.nn.Parameter)]
    return sorted({names.get(id(parameter), f"unnamed {tuple(parameter.shape)}") for parameter in living})


def _arm(fault: Fault, news: Connection) -> None:
    module, _, path = fault.where.partition(":")
    owner = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    calls = 0

    def strike() -> None:
        if fault.action == "census":
            news.send(("census", _parameters()))
            return
        news.send(("fault", fault.where))
        if fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == fault.call
        if now and not fault.after:
            strike()
        result = original(*args, **kwargs)
        if now:
            strike()
        return result

    setattr(owner, name, wrapped)


class _Reporter:
    """A client's observer that tells the test."""

    def __init__(self, news: Connection) -> None:
        self._news = news

    def step(self, report: Any) -> None:
        self._news.send(("step", report.step))

    def evaluation(self, report: Any) -> None:
        self._news.send(("evaluation", report.mean_loss))

    def waiting(self, names: tuple[str, ...]) -> None:
        self._news.send(("waiting", names))


def _report_errors(work: Callable[[Connection], Any], faults: Sequence[Fault], news: Connection) -> None:
    faulthandler.enable()
    try:
        for fault in faults:
            _arm(fault, news)
        news.send(("end", work(news)))
    except BaseException as error:
        news.send(("error", f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from error


def _serve(options: ServerOptions, faults: Sequence[Fault], news: Connection) -> None:
    from fedsea.server import run

    told = threading.Event()

    def watch(_: dict[str, Any]) -> None:
        if not told.is_set() and options.ready_file is not None:
            told.set()
            news.send(("ready", options.ready_file.read_text()))

    _report_errors(lambda _: run.serve(options, watch), faults, news)


def _train(options: ClientOptions, faults: Sequence[Fault], news: Connection) -> None:
    from fedsea.client import run

    _report_errors(lambda news: run.train(options, _Reporter(news)).next_step, faults, news)


def _tell_modules(_options: None, _faults: Sequence[Fault], news: Connection) -> None:
    from tests.support import warm

    news.send(("end", sorted(warm.OF_A_SERVER)))


class Child:
    """A process and what it tells."""

    def __init__(self, target: Callable[..., None], options: Any, faults: Sequence[Fault]) -> None:
        self.news, theirs = _context.Pipe(duplex=False)
        self._process = _context.Process(target=target, args=(options, tuple(faults), theirs), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait_for(self, kind: str, value: Any = None) -> Any:
        """The next news of a kind (and value); fails if the process ends before, or says nothing for long."""
        try:
            while self.news.poll(DEADLINE_S):
                found, detail = self.news.recv()
                if found == kind and (value is None or detail == value):
                    return detail
                if found == "error":
                    raise AssertionError(f"the process failed: {detail}")
        except EOFError:
            raise AssertionError(f"the process ended without {kind!r}") from None
        raise AssertionError(f"no {kind!r} came in time")

    def finish(self) -> Any:
        """Wait for its good end."""
        result = self.wait_for("end")
        self._process.join(DEADLINE_S)
        assert self._process.exitcode == 0
        return result

    def wait_killed(self) -> None:
        """Wait until SIGKILL has ended it."""
        self._process.join(DEADLINE_S)
        assert self._process.exitcode == -signal.SIGKILL, f"exit code {self._process.exitcode}"

    def kill(self) -> None:
        """SIGKILL it now."""
        self._process.kill()
        self.wait_killed()

    def end(self) -> None:
        """Make sure that it is gone."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join(DEADLINE_S)


def spawn_server(options: ServerOptions, faults: Sequence[Fault] = ()) -> Child:
    """See `Fault`."""
    return Child(_serve, options, faults)


def spawn_client(options: ClientOptions, faults: Sequence[Fault] = ()) -> Child:
    """See `Fault`."""
    return Child(_train, options, faults)


def modules_of_a_server() -> list[str]:
    """Names of all modules that importing a server's main call brings, as the template process found it."""
    found: list[str] = Child(_tell_modules, None, ()).finish()
    return found
