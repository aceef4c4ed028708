"""How long a server that is connected may owe an answer.

Time is counted in looks, which are taken while the connection is there and not busy with what is asked: neither a
server that is being sought nor a slow line counts as silence.
"""

from __future__ import annotations

from fedsea.errors import TransportError

LOOKS = 8
"""So many without an answer are borne."""
_BUSY = 10
"""And so many times as many while the server answers others in the meantime: it may have long prompts before it."""


class Patience:
    """Counts looks without an answer; one for everybody who is answered in turn."""

    def __init__(self) -> None:
        self._looks = 0.0

    def renew(self) -> None:
        """An answer came, or it is asked anew."""
        self._looks = 0.0

    def look(self, *, waits: bool, busy: bool = False) -> bool:
        """Take a look; True if there has been no answer for too long.

        Args:
            waits: Whether an answer is owed.
            busy: Whether others were answered since the last look.
        """
        self._looks = self._looks + (1 / _BUSY if busy else 1) if waits else 0.0
        return self._looks > LOOKS


def pause_s(answer_within_s: float) -> float:
    """Time between two looks."""
    return answer_within_s / LOOKS


def silence(answer_within_s: float) -> TransportError:
    """What whoever waited is told."""
    return TransportError(
        f"The server is connected and did not answer in {answer_within_s:g} s: try again later, and if it stays so, "
        "tell its operator."
    )
