"""The routes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fedsea.client.gateway.answer import Answer
from fedsea.client.gateway.errors import RequestError, note, response, status_of, unforeseen
from fedsea.client.gateway.forms import ChatForm, TextForm
from fedsea.client.gateway.guard import Guard, read_body
from fedsea.client.gateway.metrics import GatewayMetrics
from fedsea.client.gateway.requests import ChatBody, Choice, TextBody, choices_of, parse
from fedsea.client.gateway.work import Work, Workers
from fedsea.client.pseudonyms import Prompt, Prompts
from fedsea.errors import FedseaError

_GONE = 499
"""For metrics: whoever asked has left."""

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Served:
    """What the routes need.

    Attributes:
        name: Of the model, as clients give it.
        created: When the gateway began, in seconds since the epoch.
        vocab_size: Ids from here on are no tokens.
        max_tokens: Longest sequence, prompt and answer together.
        default_new_tokens: Longest answer of a chat that asks for no length.
        stop_tokens: Ids that end an answer.
        max_body_bytes: Largest body.
        first_s: How long a request may wait for the first text.
        connected: Whether the federation's server is there.
    """

    name: str
    created: int
    vocab_size: int
    max_tokens: int
    default_new_tokens: int
    stop_tokens: tuple[int, ...]
    max_body_bytes: int
    first_s: float
    prompts: Prompts
    workers: Workers
    guard: Guard
    metrics: GatewayMetrics
    connected: Callable[[], bool]


def build(served: Served) -> Starlette:
    """The application."""
    routes = _Routes(served)
    table: tuple[tuple[str, Endpoint, str], ...] = (
        ("/v1/models", routes.models, "GET"),
        ("/v1/models/{name:path}", routes.model, "GET"),
        ("/v1/chat/completions", routes.chat, "POST"),
        ("/v1/completions", routes.completions, "POST"),
        ("/metrics", routes.show_metrics, "GET"),
        ("/health", routes.health, "GET"),
    )
    made = [
        Route(path, _answered(served, path, endpoint, guarded=path != "/health"), methods=[method])
        for path, endpoint, method in table
    ]
    return Starlette(routes=made, exception_handlers={HTTPException: _not_there})


def _answered(served: Served, path: str, endpoint: Endpoint, *, guarded: bool) -> Endpoint:
    """Around every endpoint: the guard, errors in their form, and the count."""

    async def call(request: Request) -> Response:
        try:
            if guarded:
                served.guard.check(request.headers)
            answer = await endpoint(request)
        except FedseaError as error:
            if status_of(error) >= 500:
                note("a request failed", error)
            answer = response(error)
        except ClientDisconnect:
            answer = Response(status_code=_GONE)
        except Exception as error:  # noqa: BLE001 (the last resort: whoever waits must hear of it)
            answer = response(unforeseen(error))
        served.metrics.request(path, answer.status_code)
        return answer

    return call


async def _not_there(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    sentence = {
        404: "There is no such address here: OpenAI's are under /v1 (base URL http://HOST:PORT/v1), as "
        "/v1/chat/completions, /v1/completions and /v1/models.",
        405: "This address does not take this method: completions take POST, everything else GET.",
    }
    answer = response(RequestError(sentence.get(status, "The request cannot be answered."), status))
    answer.headers.update((isinstance(error, HTTPException) and error.headers) or {})  # which methods are allowed
    return answer


class _Routes:
    def __init__(self, served: Served) -> None:
        self._served = served

    # --- about the gateway ------------------------------------------------------------------------------------------

    async def health(self, _request: Request) -> Response:
        """Whether a request can be answered now."""
        if self._served.connected():
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the federation's server is not connected; it is being sought"}, 503)

    async def show_metrics(self, _request: Request) -> Response:
        return Response(self._served.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._about())

    def _about(self) -> dict[str, Any]:
        served = self._served
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "fedsea",
            "max_model_len": served.max_tokens,
        }

    def _check_name(self, name: str) -> None:
        if name != self._served.name:
            raise RequestError(
                f"This gateway's model is called {self._served.name}: give that as `model`.",
                404,
                param="model",
                reason="model_not_found",
            )

    # --- generation -------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, ChatBody)

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, TextBody)

    async def _generate(self, request: Request, kind: type[ChatBody] | type[TextBody]) -> Response:
        served = self._served
        with served.workers.coming():
            data = await read_body(request, served.max_body_bytes)
            body, choices = await asyncio.to_thread(self._prepare, kind, data)
        work = served.workers.start(choices, after_prompt=kind is TextBody)
        form_kind: type[ChatForm] | type[TextForm] = ChatForm if kind is ChatBody else TextForm
        form = form_kind(served.name, logprobs=body.num_logprobs >= 0, usage=body.stream_options.include_usage)
        answer = Answer(work, form, len(choices), body.n, served.first_s)
        leaving = asyncio.create_task(_cancel_when_gone(request, work))
        streams = False
        try:
            if not body.stream:
                return JSONResponse(await answer.whole())
            beginning = await answer.begin()
            streams = True
        finally:
            if not streams:
                leaving.cancel()
                work.cancel()
        pieces = answer.pieces(beginning, leaving, with_usage=body.stream_options.include_usage)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(pieces, media_type="text/event-stream", headers=headers)

    def _prepare(self, kind: type[ChatBody] | type[TextBody], data: bytes) -> tuple[ChatBody | TextBody, list[Choice]]:
        """From bytes to prompts; not on the event loop, for long texts take a while."""
        served = self._served
        body = parse(kind, data)
        self._check_name(body.model)
        if isinstance(body, ChatBody):
            prompts = [served.prompts.chat([message.plain() for message in body.messages])]
        else:
            if served.prompts.replaces and not all(isinstance(p, str) for p in body.prompts):
                raise RequestError(
                    "This gateway replaces identifiers by pseudonyms, which token ids hide from it: send the text.",
                    param="prompt",
                    reason="unsupported",
                )
            prompts = [served.prompts.text(p) if isinstance(p, str) else Prompt(p) for p in body.prompts]
        if any(not 0 <= token < served.vocab_size for prompt in prompts for token in prompt.ids):
            most = served.vocab_size - 1
            raise RequestError(f"A token id is none of the model's, which are 0 to {most}.", param="prompt")
        choices = choices_of(
            body,
            prompts,
            max_tokens=served.max_tokens,
            default_new_tokens=served.default_new_tokens,
            stop_tokens=served.stop_tokens,
        )
        return body, choices


async def _cancel_when_gone(request: Request, work: Work) -> None:
    """Once the body is read, the next that comes of a connection is its end."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    work.cancel()
