"""`pte serve` as a user starts and ends it, and what it refuses before any work."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from pte.arguments import ServeArguments
from pte.cli import main, parse
from pte.serve.command import ServeSettings, announcement, listen
from pte.serve.models import named_adapters
from served import PROMPT, limits, reasoner

pytestmark = pytest.mark.system

ROOM = ["--max-prompt-tokens", "48", "--max-new-tokens", "32", "--slots", "2", "--top-logprobs", "0"]
WINDOW = ["--window-tokens", "8", "--evict-tokens", "2"]


def refused(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says when it refuses."""
    assert main(["serve", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("pte serve: ") and err.count("\n") == 1
    return err


def test_the_command_serves_until_it_is_interrupted_and_ends_cleanly(tmp_path: Path) -> None:
    path = reasoner(tmp_path, adapters=("math",)).policies.keys()
    base = next(iter(path))
    words = ["serve", f"sums={tmp_path / 'math'}", "--model", base, "--port", "0", *ROOM, *WINDOW]
    server = subprocess.Popen(
        [sys.executable, "-m", "pte", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PTE_API_KEY": "secret", "OMP_NUM_THREADS": "1"},
    )
    try:
        line = server.stdout.readline()
        found = re.fullmatch(rf"serving {re.escape(base)}, sums at http://127.0.0.1:(\d+)/v1; Ctrl-C ends it\n", line)
        assert found, line + server.stderr.read()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{found.group(1)}/v1", api_key="secret", max_retries=0)
        answer = client.completions.create(model="sums", prompt=PROMPT, max_tokens=12, temperature=0)
        assert answer.usage.completion_tokens == 12
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=30)
        assert (server.returncode, out) == (0, "stopped\n") and "Traceback" not in err
    finally:
        server.kill()


def test_flags_become_settings_and_the_default_is_this_machine_alone() -> None:
    parsed = parse(
        "serve",
        [
            "a=x",
            "y/b",
            "--model",
            "m",
            "--policy",
            "sinks",
            "--window-tokens",
            "16",
            "--evict-tokens",
            "4",
            "--slots",
            "3",
            "--max-queue",
            "5",
        ],
    )
    assert isinstance(parsed, ServeArguments)
    settings = ServeSettings(**vars(parsed))
    assert (settings.adapters, settings.host, settings.port, settings.key) == (("a=x", "y/b"), "127.0.0.1", 8000, None)
    assert (settings.cache.policy, settings.cache.window_tokens, settings.base.path) == ("sinks", 16, "m")
    assert settings.limits == limits(slots=3, max_queue=5, prompt=1024, new=4096, top=20)


def test_every_command_of_the_server_s_page_parses() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    lines = re.findall(r"^ +pte serve (.*)$", page, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        assert isinstance(parse("serve", line.split()), ServeArguments)


def test_the_key_comes_from_the_flag_then_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTE_API_KEY", " from the environment ")
    assert ServeSettings(**vars(ServeArguments(api_key="flag"))).key == "flag"
    assert ServeSettings(**vars(ServeArguments())).key == "from the environment"
    monkeypatch.setenv("PTE_API_KEY", "")
    with pytest.raises(ValueError, match="the API key must not be empty"):
        _ = ServeSettings(**vars(ServeArguments())).key


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--slots", "0"], "slots must be at least 1, got 0; leave it out for the default"),
        (["--max-queue", "-1"], "max_queue must be at least 0, got -1"),
        (["--port", "70000"], "port must be from 0 (any free one) to 65535, got 70000; use 8000"),
        (["--api-key", " "], "the API key must not be empty"),
        (["a=x", "a=y"], "adapters must have different names, got 'a' twice; write NAME=PATH"),
        (["=x"], "an adapter must be NAME=PATH or PATH, got '=x'"),
        (["embedded=x"], "an adapter must not have the name of the base, got 'embedded'; write NAME=PATH"),
        (["--device", "tpu"], "device must be 'cpu', 'mps', 'cuda' or 'cuda:<index>', got 'tpu'"),
        (["a=/nowhere"], "/nowhere"),
        (["--model", "embedded"], "prompt plus completion must stay within the model's 2048 trained positions, got 10"),
        (["--host", "192.0.2.1"], "host and port must be free and of this machine, got 192.0.2.1:0"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_line(
    capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    port = [] if "--port" in words else ["--port", "0"]
    said = refused(*words, *port, capsys=capsys)
    assert text in said


def test_an_address_that_is_taken_is_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        said = refused("--model", "/nowhere", "--port", str(port), capsys=capsys)
    assert f"host and port must be free and of this machine, got 127.0.0.1:{port}" in said and "--port" in said


def test_without_its_extra_the_command_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    expected = 'pte serve needs fastapi, which this environment lacks; pip install -e ".[serve]" in the checkout'
    assert expected in refused(capsys=capsys)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["runs/math/pte", "code=runs/code"], {"pte": "runs/math/pte", "code": "runs/code"}),
        (["runs/a=b/pte"], {"pte": "runs/a=b/pte"}),
        (["x=runs/a=b"], {"x": "runs/a=b"}),
    ],
)
def test_an_adapter_is_named_by_the_user_or_by_its_path(words: list[str], names: dict[str, str]) -> None:
    assert {name: str(path) for name, path in named_adapters(words).items()} == names


def test_a_server_that_everybody_reaches_without_a_key_warns() -> None:
    assert len(announcement("127.0.0.1", 80, names=["m"], key=None)) == 1
    assert len(announcement("::1", 80, names=["m"], key=None)) == 1
    assert len(announcement("0.0.0.0", 80, names=["m"], key="k")) == 1
    first, warning = announcement("0.0.0.0", 80, names=["m", "n"], key=None)
    assert first == "serving m, n at http://0.0.0.0:80/v1; Ctrl-C ends it"
    assert warning == "warning: whoever reaches 0.0.0.0 may use this server; set --api-key or PTE_API_KEY"


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_an_ipv6_address_can_be_listened_at() -> None:
    try:
        listening = listen("::1", 0)
    except OSError:
        pytest.skip("no IPv6 loopback here")
    with listening:
        assert listening.family == socket.AF_INET6
