"""The answer to a request: its events, put together or passed on as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect

from fedsea.client.gateway import forms
from fedsea.client.gateway.errors import document, note
from fedsea.client.gateway.forms import Delta, End, Form, Gathered
from fedsea.client.gateway.work import Event, Work
from fedsea.errors import FedseaError


class Answer:
    """Events of one request on their way into JSON.

    Args:
        work: Where they come from.
        form: How the route writes them.
        num_choices: Choices in all.
        num_each: Choices of each prompt.
        first_s: How long the first event may take.
    """

    def __init__(self, work: Work, form: Form, num_choices: int, num_each: int, first_s: float) -> None:
        self._work = work
        self._form = form
        self._choices = [Gathered() for _ in range(num_choices)]
        self._num_each = num_each
        self._events = work.events(first_s)

    def _usage(self) -> dict[str, Any]:
        return forms.usage_of(self._choices, self._num_each)

    async def whole(self) -> dict[str, Any]:
        """Everything at once."""
        async for event in self._events:
            self._note(event)
        return self._form.whole(self._choices, self._usage())

    async def begin(self) -> Event:
        """The first event; an error before it still gets a status of its own."""
        return await anext(self._events)

    async def pieces(self, beginning: Event, leaving: asyncio.Task[None], *, with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events.

        Args:
            beginning: What `begin` gave.
            leaving: Ended with the stream.
            with_usage: Whether counts come last.
        """
        try:
            for index in range(len(self._choices)):
                for piece in self._form.first(index):
                    yield forms.event(piece)
            yield self._piece(beginning)
            async for event in self._events:
                yield self._piece(event)
            if with_usage:
                yield forms.event(self._form.usage(self._usage()))
            yield forms.DONE
        except ClientDisconnect:
            return
        except FedseaError as error:
            note("a stream ended", error)
            yield forms.event(document(error))
        finally:
            self._work.cancel()
            leaving.cancel()
            await self._events.aclose()

    def _piece(self, event: Event) -> str:
        assert not isinstance(event, FedseaError)
        piece = self._form.delta(event) if isinstance(event, Delta) else self._form.last(event)
        self._note(event)
        return forms.event(piece)

    def _note(self, event: Event) -> None:
        assert not isinstance(event, FedseaError)
        gathered = self._choices[event.index]
        if isinstance(event, End):
            gathered.end = event
            return
        gathered.text.append(event.text)
        gathered.tokens += event.tokens
