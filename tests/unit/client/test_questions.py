"""What is asked of a trunk: how long an answer may be owed."""

from __future__ import annotations

from typing import Any

from fedsea.client.patience import LOOKS
from fedsea.client.questions import OpenQuestions
from fedsea.errors import TransportError
from fedsea.wire import messages as m

SILENCE = TransportError("The server says nothing.")
SENT: Any = object()


def look(questions: OpenQuestions, times: int = LOOKS) -> None:
    for _ in range(times):
        questions.look(SILENCE)


def test_lasting_questions_of_a_silent_server_end_and_those_of_a_step_do_not():
    questions, opened = OpenQuestions(), m.StepOpen(0, 0)
    questions.begin(opened)
    assert questions.take(opened)
    step, _ = questions.add(("output", 0, 0, 0), SENT, lasting=False)
    asked = [questions.add(("evaluation", 0, -1, number), SENT, lasting=True)[0] for number in range(2)]
    look(questions)
    assert not any(future.done() for future in asked)
    look(questions, 1)
    assert [future.exception(0) for future in asked] == [SILENCE, SILENCE]
    assert questions.lasting() == []
    look(questions, 2 * LOOKS)
    assert not step.done()


def test_patience_begins_anew_with_every_answer_and_every_connection():
    questions = OpenQuestions()
    first, second = (questions.add(("evaluation", 0, -1, number), SENT, lasting=True)[0] for number in range(2))
    look(questions)
    questions.resolve(("evaluation", 0, -1, 0), 5)
    assert first.result(0) == 5
    look(questions)
    assert questions.lasting() == [SENT]
    look(questions)
    assert not second.done()
