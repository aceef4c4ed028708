"""What is shown, on a terminal and elsewhere."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rich.console import Console

from fedsea.observe.observers import compose
from fedsea.observe.progress import ClientDisplay, ServerDisplay
from fedsea.observe.snapshots import InferenceSnapshot, ServerSnapshot
from fedsea.plan import FederationPlan, parse_plan

if TYPE_CHECKING:
    from fedsea.client.trainer import Observer

PLAN = parse_plan(
    {
        "model": {"path": "m"},
        "training": {"rounds": 2, "steps_per_round": 10},
        "clients": [{"name": "clinic"}, {"name": "bank"}],
    }
)


@dataclass(frozen=True)
class Step:
    step: int = 0
    round: int = 0
    num_steps: int = 20
    mean_loss: float = 2.5
    num_target_tokens: int = 500
    num_tokens: int = 1000
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    next_step: int = 10
    mean_loss: float = 1.25
    num_target_tokens: int = 5


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Link:
    num_bytes = (1_500_000, 2_000)


def plain() -> tuple[io.StringIO, Console]:
    out = io.StringIO()
    return out, Console(file=out, width=200)


def as_trainer_observer(display: ClientDisplay) -> Observer:
    return display  # mypy checks the structure


def test_a_client_prints_its_first_and_last_step_and_one_line_every_few_seconds() -> None:
    (out, console), clock = plain(), Clock()
    with ClientDisplay(console=console, clock=clock, every_s=5.0) as display:
        display.begin(PLAN, "clinic", Link())
        for step in range(20):
            clock.now = step + 1.0
            display.step(Step(step))
    shown = [line.split("step ")[1].split(" ")[0] for line in out.getvalue().splitlines()]
    assert shown == ["1/20", "6/20", "11/20", "16/20", "20/20"]


def test_a_clients_line_says_all_that_one_wants_to_know() -> None:
    (out, console), clock = plain(), Clock()
    with ClientDisplay(console=console, clock=clock) as display:
        display.begin(PLAN, "clinic", Link())
        clock.now = 2.0
        display.step(Step(9, 0))
    line = "clinic: step 10/20 · round 1 · loss 2.5000 · 500 tokens/s · up 1.50 MB, down 2.00 KB\n"
    assert out.getvalue() == line


def test_a_resumed_client_takes_its_speed_from_its_own_steps() -> None:
    (_, console), clock = plain(), Clock()
    display = ClientDisplay(PLAN, "clinic", console=console, clock=clock)
    display.begin(PLAN, "clinic")
    for step in (14, 15, 16):
        clock.now += 10.0
        display.step(Step(step))
    assert "30 s left" in display.line()


def test_the_time_left_is_told_when_a_few_steps_are_done_and_leaves_out_the_first() -> None:
    (_, console), clock = plain(), Clock()
    display = ClientDisplay(PLAN, "clinic", console=console, clock=clock)
    display.begin(PLAN, "clinic")
    for step, took_s in enumerate((60.0, 2.0)):
        clock.now += took_s
        display.step(Step(step))
        assert "left" not in display.line()
    clock.now += 2.0
    display.step(Step(2))
    assert "34 s left" in display.line()


def test_waiting_is_said_once_a_change() -> None:
    out, console = plain()
    with ClientDisplay(PLAN, "clinic", console=console) as display:
        display.waiting(("bank",))
        display.waiting(("bank",))
        display.waiting(())
    assert out.getvalue() == "clinic: waiting for bank\n"


def test_an_evaluation_is_always_said() -> None:
    out, console = plain()
    with ClientDisplay(PLAN, "clinic", console=console) as display:
        display.evaluation(Evaluation())
    assert out.getvalue() == "clinic: held-out loss 1.2500 after 10 steps\n"


def test_the_held_out_loss_is_the_latest_and_says_of_when_it_is() -> None:
    display = ClientDisplay(PLAN, "clinic", console=plain()[1])
    display.step(Step(0))
    assert "held-out" not in display.line()
    display.evaluation(Evaluation(next_step=0, mean_loss=7.5))
    assert "held-out 7.5000 before training" in display.line()
    display.evaluation(Evaluation())
    assert "held-out 1.2500 at step 10" in display.line()


def test_a_clients_pace_leaves_out_what_it_waited_for_others() -> None:
    clock = Clock()
    display = ClientDisplay(console=plain()[1], clock=clock)
    display.begin(PLAN, "clinic", Link())
    for step, waited in ((0, 600.0), (1, 0.0), (2, 60.0)):
        if waited:
            display.waiting(("bank", "law-office"))
            clock.now += waited / 2
            display.waiting(("bank",))
            clock.now += waited / 2
        display.waiting(())
        clock.now += 2.0
        display.step(Step(step))
    assert "500 tokens/s" in display.line()
    assert "34 s left" in display.line()


def test_a_servers_pace_leaves_out_what_it_waited_for_clients_that_were_away() -> None:
    clock = Clock()
    display = ServerDisplay(PLAN, console=plain()[1], clock=clock)
    both = replace(snapshot(), step=0, tokens=0, connected=("clinic", "bank"))
    for now, seen in (
        (0.0, replace(both, connected=("clinic",))),
        (600.0, both),  # it is there, and works
        (602.0, replace(both, step=1, tokens=1000)),
        (604.0, replace(both, step=2, tokens=2000)),
        (606.0, replace(both, step=3, tokens=3000)),
    ):
        clock.now = now
        display.update(seen)
    assert "500 target tokens/s" in display.line()
    assert "34 s left" in display.line()


def test_what_is_loaded_before_a_run_is_shown_and_then_the_run() -> None:
    out = io.StringIO()
    with ClientDisplay(console=Console(file=out, force_terminal=True, width=80)) as display:
        display.loading("reaching the server [::1]:1")
        assert "reaching the server [::1]:1 …" in out.getvalue()
        display.begin(PLAN, "clinic")
        out.truncate(0)
    assert "reaching" not in out.getvalue()
    assert "0/20" in out.getvalue()


def test_elsewhere_only_the_first_thing_that_is_loaded_is_said() -> None:
    out, console = plain()
    with ClientDisplay(console=console) as display:
        display.loading("loading the libraries")
        display.loading("reaching the server")
    assert out.getvalue() == "Loading the libraries, which takes some seconds.\n"


def test_quiet_shows_nothing_on_a_terminal_or_elsewhere() -> None:
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal)
        with ClientDisplay(PLAN, "clinic", quiet=True, console=console) as display:
            display.loading("the libraries")
            display.step(Step())
            display.evaluation(Evaluation())
            display.waiting(("bank",))
        with ServerDisplay(PLAN, quiet=True, console=console) as server:
            server.update(snapshot())
        assert out.getvalue() == ""


def test_a_terminal_shows_bar_loss_and_whom_one_waits_for() -> None:
    out = io.StringIO()
    with ClientDisplay(PLAN, "clinic", console=Console(file=out, force_terminal=True, width=120)) as display:
        display.step(Step(4))
        display.bytes(1_000_000, 5)
        display.waiting(("bank",))
        display.evaluation(Evaluation())
    text = out.getvalue()
    for part in ("5/20", "loss 2.5000", "up 1.00 MB", "waiting for bank", "held-out loss 1.2500"):
        assert part in text


def snapshot(plan: FederationPlan = PLAN) -> ServerSnapshot:
    return ServerSnapshot(3, plan.num_steps, 0, ("clinic",), ("bank",), 3000, 1000, 2000)


def test_a_server_names_the_missing_clients() -> None:
    out, console = plain()
    with ServerDisplay(PLAN, console=console) as display:
        display.update(snapshot())
    expected = "step 3/20 · round 1/2 · 1/2 clients · waiting for bank · up 1.00 KB, down 2.00 KB\n"
    assert out.getvalue() == expected


def test_a_server_says_of_a_client_that_does_not_train_that_it_uses_the_model() -> None:
    out = io.StringIO()
    with ServerDisplay(PLAN, console=Console(file=out, force_terminal=True, width=120)) as display:
        display.update(replace(snapshot(), waiting_for=(), using=("bank",)))
    assert "uses the model" in out.getvalue()
    assert "not connected" not in out.getvalue()


def test_a_server_says_why_a_missing_client_does_not_come() -> None:
    out, console = plain()
    with ServerDisplay(PLAN, console=console) as display:
        display.update(replace(snapshot(), refused={"bank": "revoked"}))
    assert "waiting for bank (revoked)" in out.getvalue()
    out = io.StringIO()
    with ServerDisplay(PLAN, console=Console(file=out, force_terminal=True, width=120)) as display:
        display.update(replace(snapshot(), refused={"bank": "expired"}))
    assert "not connected (expired)" in out.getvalue()


def test_a_server_shows_decoding_while_somebody_decodes() -> None:
    (out, console), clock = plain(), Clock()
    decoding = InferenceSnapshot(2, 5, 3_000_000, 1_000_000_000, tokens=10, batches=4)
    with ServerDisplay(PLAN, console=console, clock=clock) as display:
        display.update(replace(snapshot(), inference=decoding))
        clock.now = 5.0
        display.update(replace(snapshot(), inference=replace(decoding, tokens=60)))
        clock.now = 10.0
        display.update(replace(snapshot(), inference=replace(decoding, sessions=0, tokens=70)))
    first, second, third = out.getvalue().splitlines()
    assert first.endswith("inference: 2 sessions, 5 sequences · KV 3.00 MB of 1.00 GB")
    assert second.endswith("KV 3.00 MB of 1.00 GB · 10 tokens/s")
    assert "inference" not in third


def test_a_server_prints_at_once_when_a_client_comes_and_else_every_few_seconds() -> None:
    (out, console), clock = plain(), Clock()
    with ServerDisplay(PLAN, console=console, clock=clock) as display:
        display.update(snapshot())
        display.update(replace(snapshot(), step=4))
        display.update(replace(snapshot(), step=5, connected=("clinic", "bank")))
        clock.now = 5.0
        display.update(replace(snapshot(), step=6, connected=("clinic", "bank")))
    assert [line.split("/")[0] for line in out.getvalue().splitlines()] == ["step 3", "step 5", "step 6"]


def test_a_servers_terminal_lists_every_client() -> None:
    out = io.StringIO()
    with ServerDisplay(PLAN, console=Console(file=out, force_terminal=True, width=120)) as display:
        display.update(replace(snapshot(), inference=InferenceSnapshot(1, 1, 5, 10, 0, 0)))
    assert "not connected" in out.getvalue()
    assert "inference: 1 session," in out.getvalue()
    assert "clinic" in out.getvalue()


class Plain:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def step(self, report: object) -> None:
        self.seen.append("step")

    def evaluation(self, report: object) -> None:
        self.seen.append("evaluation")


class Following(Plain):
    def loading(self, what: str) -> None:
        self.seen.append("loading")

    def begin(self, plan: object, name: str, link: object = None) -> None:
        self.seen.append("begin")

    def waiting(self, names: object) -> None:
        self.seen.append("waiting")

    def bytes(self, up: int, down: int) -> None:
        self.seen.append("bytes")


def test_compose_tells_everybody_what_they_follow() -> None:
    plain_one, following = Plain(), Following()
    both = compose(plain_one, following)
    both.loading("the model")
    both.begin(PLAN, "clinic")
    both.step(Step())
    both.waiting(())
    both.bytes(1, 2)
    both.evaluation(Evaluation())
    assert plain_one.seen == ["step", "evaluation"]
    assert following.seen == ["loading", "begin", "step", "waiting", "bytes", "evaluation"]


def test_a_terminal_of_eighty_columns_cuts_no_fact() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    clock = Clock()
    display = ClientDisplay(console=console, clock=clock)
    display.begin(PLAN, "clinic-of-a-long-name-that-a-federation-gave-it-once", Link())
    display.evaluation(Evaluation())
    for step in range(12):
        clock.now += 2.0
        display.step(Step(step))
    console.print(display.render())
    for fact in ("12/20", "held-out 1.2500 at step 10", "up 1.50 MB, down 2.00 KB", "16 s left"):
        assert fact in out.getvalue()
