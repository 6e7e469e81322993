"""Who is in the house: a call until its client has read the answer or gone, and streams while long texts are read."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from pte.serve.app import make_app
from pte.serve.house import House
from pte.serve.models import ServedModels
from served import PROMPT, limits, reasoner

pytestmark = pytest.mark.system

ROOM = limits(slots=1, max_queue=1, new=30, top=0)
WAIT_SECONDS = 20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ServedModels:
    return replace(reasoner(tmp_path_factory.mktemp("models"), room=ROOM), stop_token_ids=())


class Client:
    """Sends one request to an application in this event loop, and reads the answer as far as it likes.

    Args:
        house: What the application serves.
        path: Of the request.
        body: Of the request; None for a GET.
        reads: Whether it reads the end of the answer before it is told to.
    """

    def __init__(self, house: House, path: str, body: object = None, *, reads: bool = True) -> None:
        self.reading, self.gone = asyncio.Event(), asyncio.Event()
        self.asked = False
        self.status = 0
        self.content = b""
        self.body = b"" if body is None else json.dumps(body).encode()
        if reads:
            self.reading.set()
        method = "GET" if body is None else "POST"
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "http_version": "1.1", "method": method}
        scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "headers": [], "root_path": ""}
        self.task = asyncio.create_task(make_app(house, api_key=None)(scope, self.receive, self.send))

    async def receive(self) -> dict[str, object]:
        """The request, then, once it has gone, that it has."""
        if not self.asked:
            self.asked = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, object]) -> None:
        """Takes a part of the answer; the last one as soon as the client reads."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        if not message.get("more_body"):
            await self.reading.wait()
        self.content += message["body"]


@asynccontextmanager
async def working(models: ServedModels) -> AsyncIterator[House]:
    """A house whose worker runs in this event loop."""
    house = House(models, on_failure=lambda: None)
    house.start()
    try:
        yield house
    finally:
        house.worker.stop()


async def until(holds: Callable[[], bool]) -> None:
    """Lets the event loop run until something has happened."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not holds():
            await asyncio.sleep(0.01)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ends", ["reading", "gone"])
def test_an_answer_that_nobody_reads_keeps_its_places_until_it_is_read_or_its_client_gone(
    models: ServedModels, stream: bool, ends: str
) -> None:
    (base,) = models.policies
    body = {"model": base, "prompt": PROMPT, "max_tokens": 30, "stream": stream}

    async def test() -> None:
        async with working(models) as house:
            slow = [Client(house, "/v1/completions", body, reads=False) for _ in range(2)]
            await until(lambda: all(client.content or (client.status and not stream) for client in slow))
            await until(lambda: not house.worker.sequences and not house.calls)
            # All is drawn, the rows are free, and yet nobody is let in: the unread text is still here.
            assert house.present[base] == 2
            refused = Client(house, "/v1/completions", body)
            await refused.task
            assert (refused.status, json.loads(refused.content)["error"]["code"]) == (503, "server_busy")
            getattr(slow[0], ends).set()
            await slow[0].task
            assert house.present[base] == 1
            served = Client(house, "/v1/completions", body)
            await served.task
            assert served.status == 200 and house.present[base] == 1
            slow[1].reading.set()
            await slow[1].task
            assert not +house.present
            if not stream:
                assert json.loads(slow[1].content)["usage"]["completion_tokens"] == 30

    run(test)


def test_a_client_that_goes_away_half_way_gives_each_place_back_once(models: ServedModels) -> None:
    (base,) = models.policies
    body = {"model": base, "prompt": PROMPT, "max_tokens": 30, "n": 2, "stream": True}

    async def test() -> None:
        async with working(models) as house:
            client = Client(house, "/v1/completions", body, reads=False)
            # One of the two has ended, the other runs or waits.
            await until(lambda: bool(client.content))
            client.gone.set()
            await client.task
            await until(lambda: not +house.present)
            assert not house.calls and not house.worker.sequences and house.present[base] == 0

    run(test)


class HeldTokenizer(PreTrainedTokenizerFast):
    """Encodes one text only once it is allowed to."""

    allowed = threading.Event()
    HELD = "A3 B5 #1 A B C ? C"

    def __call__(self, text: str, **options: object) -> object:
        assert text != self.HELD or self.allowed.wait(WAIT_SECONDS)
        return super().__call__(text, **options)


def test_the_event_loop_goes_on_while_a_prompt_is_encoded(models: ServedModels) -> None:
    (base,) = models.policies
    slow = replace(models, tokenizer=HeldTokenizer.from_pretrained(base))

    async def test() -> None:
        async with working(slow) as house:
            held = Client(house, "/v1/completions", {"model": base, "prompt": HeldTokenizer.HELD})
            await until(lambda: held.asked)
            async with asyncio.timeout(WAIT_SECONDS / 2):
                for client in (
                    Client(house, "/health"),
                    Client(house, "/v1/completions", {"model": base, "prompt": PROMPT}),
                ):
                    await client.task
                    assert client.status == 200
            assert not held.task.done()
            HeldTokenizer.allowed.set()
            await held.task
            assert held.status == 200

    run(test)
