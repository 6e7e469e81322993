"""The HTTP side: routes, the key, streams of events, clients that go away.

Decides: which path answers what, that every refusal has the API's form, and that a client who disconnects frees its
slots, whether or not it streams. Does not know: how text is made.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from pte.serve.answers import Answer, event
from pte.serve.body import CompletionRequest, parse_json, read_chat, read_completion
from pte.serve.errors import ApiError, json_response
from pte.serve.fields import SHOWN_CHARACTERS
from pte.serve.house import Call, House
from pte.serve.prompts import PromptEncoder

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from pte.serve.models import ServedModels

MAX_BODY_BYTES = 16 * 2**20


class CallResponse(StreamingResponse):
    """A response whose call keeps its places until the client has read it or gone.

    Its last part is empty, and a server sends a part only once the client has fetched most of what came before.

    Args:
        call: Leaves however this ends.
        content: Parts of the body.
        media_type: Of the body.
        headers: Of the response.
    """

    def __init__(self, call: Call, content: AsyncIterator[str], *, media_type: str, headers: Mapping[str, str]) -> None:
        super().__init__(content, media_type=media_type, headers=headers)
        self.call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until all is sent or nobody listens."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.call.leave()


def event_stream(call: Call, answer: Answer) -> Response:
    """The answer as it comes."""
    headers = {"Cache-Control": "no-store"}
    return CallResponse(call, events(call, answer), media_type="text/event-stream", headers=headers)


async def events(call: Call, answer: Answer) -> AsyncIterator[str]:
    """The chunks of a stream; an engine that fails half-way is the last of them."""
    for chunk in answer.opening():
        yield chunk
    try:
        async for choice, piece, end in call.progress():
            yield answer.event(choice, piece, end)
    except ApiError as error:
        yield event(error.body())
        return
    for chunk in answer.closing(call.completion_tokens):
        yield chunk


async def whole_answer(call: Call, answer: Answer, request: Request) -> Response:
    """The answer when all completions have ended, or nothing for a client that has gone."""

    async def collect() -> None:
        async for choice, piece, end in call.progress():
            answer.add(choice, piece, end)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def parts(body: str) -> AsyncIterator[str]:
        yield body

    response: Response | None = None
    collecting, leaving = asyncio.create_task(collect()), asyncio.create_task(gone())
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)
        collecting.result()
        body = json.dumps(answer.whole(call.completion_tokens))
        headers = {"Content-Length": str(len(body))}
        response = CallResponse(call, parts(body), media_type="application/json", headers=headers)
        return response
    finally:
        collecting.cancel()
        leaving.cancel()
        if response is None:
            call.leave()


async def body_of(request: Request) -> bytes:
    """What a request brings, up to a size."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MAX_BODY_BYTES:
            raise ApiError(f"the body must have at most {MAX_BODY_BYTES} bytes, got more; send less", status=413)
    return bytes(content)


def make_app(house: House, *, api_key: str | None) -> FastAPI:
    """The application; the house works while it runs.

    Args:
        house: What is served.
        api_key: What clients must send as their bearer token; None to let everybody in.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        house.start()
        try:
            yield
        finally:
            house.worker.stop()

    app = FastAPI(title="pte serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(health_route(house))
    app.include_router(model_routes(house.models, api_key=api_key))
    app.include_router(completion_routes(house, api_key=api_key))
    app.add_exception_handler(ApiError, refusal)
    app.add_exception_handler(HTTPException, unknown_path)
    app.add_exception_handler(Exception, own_fault)
    return app


def refusal(_: Request, error: Exception) -> Response:
    """A refusal of ours."""
    assert isinstance(error, ApiError)
    return error.response()


def unknown_path(request: Request, error: Exception) -> Response:
    """A path or a method that there is not."""
    assert isinstance(error, HTTPException)
    message = f"no answer to {request.method} {request.url.path} ({error.detail}); see /v1/models"
    return ApiError(message, status=error.status_code, code="unknown_url").response()


def own_fault(_: Request, error: Exception) -> Response:
    """A fault of the server's own; its log has the rest."""
    return ApiError(f"the server failed ({type(error).__name__}); see its log", status=500).response()


def key_check(api_key: str | None) -> Callable[[Request], None]:
    """What refuses requests without the key, in a time that says nothing about it."""

    def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if api_key is None:
            return
        right = hmac.compare_digest(given.strip().encode(), api_key.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                "the API key must be the one that the server was started with, got none or another; send the header "
                "Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


def check_served(models: ServedModels, name: str) -> None:
    """Refuses the name of a model that is not served."""
    if name not in models.policies:
        raise ApiError(
            f"the model {name[:SHOWN_CHARACTERS]!r} does not exist here; use one of {', '.join(models.policies)}",
            status=404,
            param="model",
            code="model_not_found",
        )


def health_route(house: House) -> APIRouter:
    """Whether the server works, and how much of it is taken; open to all."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        lanes = house.worker.lanes
        models = {name: {"running": len(one.running), "waiting": len(one.waiting)} for name, one in lanes.items()}
        content = {
            "status": "failed" if house.failed else "ok",
            "slots": house.models.limits.slots,
            "cache_bytes": house.worker.cache_bytes,
            "models": models,
        }
        return json_response(content, status=503 if house.failed else 200)

    return router


def model_routes(models: ServedModels, *, api_key: str | None) -> APIRouter:
    """The models by name."""
    router = APIRouter(prefix="/v1", dependencies=[Depends(key_check(api_key))])
    created = int(time.time())

    def described(name: str) -> Mapping[str, object]:
        return {"id": name, "object": "model", "created": created, "owned_by": "pte"}

    @router.get("/models")
    async def all_models() -> Response:
        return json_response({"object": "list", "data": [described(name) for name in models.policies]})

    @router.get("/models/{name:path}")
    async def one_model(name: str) -> Response:
        check_served(models, name)
        return json_response(described(name))

    return router


def completion_routes(house: House, *, api_key: str | None) -> APIRouter:
    """The two calls that make text."""
    router = APIRouter(prefix="/v1", dependencies=[Depends(key_check(api_key))])
    models = house.models
    encoder = PromptEncoder(
        models.tokenizer,
        vocabulary=models.vocabulary,
        max_prompt_tokens=models.limits.max_prompt_tokens,
    )

    def understood(content: bytes, read: Callable[..., CompletionRequest]) -> CompletionRequest:
        body = parse_json(content)
        named = body.get("model")
        if isinstance(named, str):
            check_served(models, named)
        return read(body, limits=models.limits, encoder=encoder)

    async def answered(request: Request, read: Callable[..., CompletionRequest]) -> Response:
        # In a thread of its own, as long texts take long: streams go on meanwhile.
        wanted = await asyncio.to_thread(understood, await body_of(request), read)
        call, answer = house.enter(wanted), Answer(wanted, fingerprint=models.fingerprint)
        if wanted.stream:
            return event_stream(call, answer)
        return await whole_answer(call, answer, request)

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        return await answered(request, read_completion)

    @router.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answered(request, read_chat)

    return router
