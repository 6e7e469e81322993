"""Servers for tests: a real uvicorn on a free port, in a thread of this process, so that a test can look inside."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pte.checkpoint import save_adapter
from pte.config import CacheConfig, ModelConfig
from pte.serve.app import make_app
from pte.serve.body import Limits
from pte.serve.command import listen
from pte.serve.house import House
from pte.serve.models import ServedModels, load_models
from short_runs import open_short, text_model

END = "<end>"
PROMPT = "A3 B5 #1 A B C #2 C A D ? D"
WINDOW = CacheConfig(window_tokens=8, evict_tokens=2)
WAIT_SECONDS = 20


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, and an end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate([*letters, END])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


@dataclass
class Served:
    """A server that runs, and its inside."""

    house: House
    port: int
    key: str

    def client(self, kind: Callable[..., object] = openai.OpenAI) -> object:
        """The official client, which is not to try again by itself."""
        return kind(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=self.key, max_retries=0, timeout=60)

    @property
    def base(self) -> str:
        """Name of the base."""
        return next(iter(self.house.models.policies))

    def send(self, method: str, path: str, body: object = None, **headers: str) -> http.client.HTTPConnection:
        """A plain request on a connection of its own; a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body)
        connection.request(method, path, content, {"Authorization": f"Bearer {self.key}", **headers})
        return connection

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict, dict]:
        """Status, JSON and headers of the answer to a plain request."""
        connection = self.send(method, path, body, **headers)
        response = connection.getresponse()
        answer = response.status, json.loads(response.read()), dict(response.getheaders())
        connection.close()
        return answer

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Waits for something that happens in another thread."""
        end = time.monotonic() + WAIT_SECONDS
        while not holds():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.01)

    def settle(self) -> None:
        """Waits until nothing runs or waits."""
        self.wait_until(lambda: not self.house.worker.sequences and not +self.house.present)


def limits(*, slots: int = 8, max_queue: int = 64, prompt: int = 48, new: int = 64, top: int = 5) -> Limits:
    return Limits(slots=slots, max_queue=max_queue, max_prompt_tokens=prompt, max_new_tokens=new, top_logprobs=top)


def reasoner(directory: Path, *, adapters: tuple[str, ...] = (), room: Limits | None = None) -> ServedModels:
    """The embedded reasoner with a chat template, and adapters that change it, through their files."""
    path = text_model(directory)
    places = {}
    for rank, name in enumerate(adapters, start=3):
        _, session = open_short(double=False, model__path=str(path), adapter__rank=rank)
        places[name] = directory / name
        save_adapter(places[name], session.adapter_tensors(), metadata=session.metadata())
    return load_models(ModelConfig(path=str(path)), adapters=places, cache=WINDOW, limits=room or limits())


@contextmanager
def serving(models: ServedModels, *, key: str | None = None) -> Iterator[Served]:
    """Serves while the block runs."""
    failures: list[bool] = []
    house = House(models, on_failure=lambda: failures.append(True))
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(
            uvicorn.Config(make_app(house, api_key=key), log_level="warning", ws="none", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=lambda: server.run(sockets=[listening]))
        thread.start()
        served = Served(house, listening.getsockname()[1], key or "none")
        try:
            served.wait_until(lambda: server.started)
            yield served
        finally:
            server.should_exit = True
            thread.join()
    assert not failures
