"""`pte serve`: from the user's settings to a server that runs until it is told to end.

Decides: what is checked before anything is loaded, that the address is taken before the models are, and how the server
ends. Does not know: requests.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Literal

import uvicorn

from pte.config_policy import CacheConfig, ModelConfig
from pte.serve.app import make_app
from pte.serve.body import Limits
from pte.serve.house import House
from pte.serve.models import load_models, named_adapters

if TYPE_CHECKING:
    from rich.console import Console

KEY_VARIABLE = "PTE_API_KEY"
GRACE_SECONDS = 5
"""How long streams may go on after the server was told to end."""
LEAST = {"slots": 1, "max_queue": 0, "max_prompt_tokens": 1, "max_new_tokens": 1, "top_logprobs": 0}
LARGEST_PORT = 65535


@dataclass(frozen=True)
class ServeSettings:
    """What a server is started with.

    Args:
        adapters: NAME=PATH or PATH.
        model: Path or hub name of the base.
        host: Address to listen at.
        port: 0 for a free one.
        slots: Sequences of each model that run at once.
        max_queue: Sequences of each model that may wait.
        max_prompt_tokens: Longest prompt.
        max_new_tokens: Longest completion.
        top_logprobs: Likeliest tokens that are recorded in the place of every token.
        api_key: What clients must send; None for the environment's, or none.
        dtype: Of the base.
        device: Of the base.
        trust_remote_code: Run code that the checkpoint brings along.
        allow_beyond_trained_positions: Run past the positions that the base was trained on.
        cache: The window of all models.

    Raises:
        ValueError: A limit or the port is out of range.
    """

    adapters: tuple[str, ...]
    model: str
    host: str
    port: int
    slots: int
    max_queue: int
    max_prompt_tokens: int
    max_new_tokens: int
    top_logprobs: int
    api_key: str | None
    dtype: Literal["float32", "bfloat16", "float16", "float8"]
    device: str
    trust_remote_code: bool
    allow_beyond_trained_positions: bool
    cache: CacheConfig

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}; leave it out for the default")
        if not 0 <= self.port <= LARGEST_PORT:
            raise ValueError(f"port must be from 0 (any free one) to {LARGEST_PORT}, got {self.port}; use 8000")

    @property
    def limits(self) -> Limits:
        """What there is room for."""
        return Limits(
            slots=self.slots,
            max_queue=self.max_queue,
            max_prompt_tokens=self.max_prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            top_logprobs=self.top_logprobs,
        )

    @property
    def base(self) -> ModelConfig:
        """How the base is loaded."""
        return ModelConfig(
            path=self.model,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            allow_beyond_trained_positions=self.allow_beyond_trained_positions,
        )

    @property
    def key(self) -> str | None:
        """The key that clients must send, or None.

        Raises:
            ValueError: It is empty.
        """
        key = os.environ.get(KEY_VARIABLE) if self.api_key is None else self.api_key
        if key is not None and not key.strip():
            raise ValueError(f"the API key must not be empty, got {key!r}; unset {KEY_VARIABLE} for a server without")
        return None if key is None else key.strip()


def serve(settings: ServeSettings, console: Console) -> None:
    """Serves until it is interrupted.

    Raises:
        ValueError, FileNotFoundError, OSError: Something is missing, does not fit, or the address is taken.
        RuntimeError: An engine has failed.
    """
    key, adapters, base = settings.key, named_adapters(settings.adapters), settings.base
    listening = listen(settings.host, settings.port)
    with listening:
        models = load_models(base, adapters=adapters, cache=settings.cache, limits=settings.limits)
        failed: list[bool] = []

        def on_failure() -> None:
            failed.append(True)
            server.should_exit = True

        app = make_app(House(models, on_failure=on_failure), api_key=key)
        server = AnnouncedServer(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS, ws="none"),
            console,
            lines=announcement(settings.host, listening.getsockname()[1], names=list(models.policies), key=key),
        )
        # uvicorn raises the interrupt again once it has ended; not where the process was started with it ignored.
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
        if failed:
            raise RuntimeError("an engine failed and the server ended; the reason is in the log above")
        console.print("stopped")


class AnnouncedServer(uvicorn.Server):
    """Says where it listens, once it does.

    Args:
        config: Of uvicorn.
        console: Where to.
        lines: What to say.
    """

    def __init__(self, config: uvicorn.Config, console: Console, *, lines: list[str]) -> None:
        super().__init__(config)
        self.console = console
        self.lines = lines

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts, then says so."""
        await super().startup(sockets)
        if self.started:
            for line in self.lines:
                self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def announcement(host: str, port: int, *, names: list[str], key: str | None) -> list[str]:
    """Where the server listens, what it serves, and whether everybody may use it."""
    address = f"[{host}]" if ":" in host else host
    lines = [f"serving {', '.join(names)} at http://{address}:{port}/v1; Ctrl-C ends it"]
    if key is None and not is_loopback(host):
        lines.append(f"warning: whoever reaches {host} may use this server; set --api-key or {KEY_VARIABLE}")
    return lines


def is_loopback(host: str) -> bool:
    """True when only this machine reaches an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address.

    Raises:
        OSError: The address is taken, or not of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(
            f"host and port must be free and of this machine, got {host}:{port} ({error.strerror or error}); choose "
            f"another --port or --host"
        ) from error
