"""Checkpoints: what is saved comes back bit for bit, a reader never finds half of one, bad files are refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pte import checkpoint_files
from pte.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_adapter,
    load_checkpoint,
    load_training_state,
    save_adapter,
    save_checkpoint,
    save_training_state,
)
from pte.checkpoint_files import AdapterMetadata, check_adapter_fits, fingerprint_of_base

pytestmark = pytest.mark.system

METADATA = AdapterMetadata(options={"rank": 4, "targets": ["q_proj"]}, base_name="tiny", base_fingerprint="f" * 64)


def adapter_of(step: int, size: int = 8) -> dict[str, torch.Tensor]:
    return {"layers.0.up": torch.full((size,), float(step)), "encoder.global_tokens": torch.zeros(0, 3)}


def save_step(directory: Path, step: int, *, keep: int = 2, size: int = 8) -> Path:
    """A checkpoint whose every part says its step."""
    state = {"counters": {"step": step}, "moments": torch.full((size,), float(step))}
    return save_checkpoint(
        directory, step, adapter=adapter_of(step, size), metadata=METADATA, training_state=state, keep=keep
    )


def load_whole(directory: Path) -> Checkpoint:
    """The latest checkpoint, whose parts must all be of the step it claims."""
    path = latest_checkpoint(directory)
    assert path is not None
    checkpoint = load_checkpoint(path)
    assert set(checkpoint.adapter["layers.0.up"].tolist()) == {float(checkpoint.step)}
    assert checkpoint.training_state["counters"] == {"step": checkpoint.step}
    moments = checkpoint.training_state["moments"]
    assert isinstance(moments, torch.Tensor) and set(moments.tolist()) == {float(checkpoint.step)}
    return checkpoint


def die_in_fork(work: Callable[[], None]) -> int:
    """Runs work in a fork and returns how it ended: the exit status, or minus the signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- round trips


def test_an_adapter_comes_back_bit_for_bit_with_its_metadata(tmp_path: Path) -> None:
    tensors = {
        "float32": torch.randn(3, 5),
        "bfloat16": torch.randn(4).bfloat16(),
        "transposed": torch.randn(3, 5).T,
        "empty": torch.zeros(0, 128),
        "scalar": torch.tensor(3.0),
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    tensors["shared"] = tensors["float32"][1:]
    save_adapter(tmp_path / "new" / "adapter", tensors, metadata=METADATA)
    loaded, metadata = load_adapter(tmp_path / "new" / "adapter")
    assert metadata == METADATA
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        same = loaded[name].contiguous().flatten().view(torch.uint8), tensor.contiguous().flatten().view(torch.uint8)
        assert torch.equal(*same), name
    described = json.loads((tmp_path / "new" / "adapter" / "adapter_config.json").read_text())
    assert described["base_name"] == "tiny" and set(described["versions"]) == {"pte", "torch", "transformers"}


def test_the_adapter_file_alone_is_enough_to_load(tmp_path: Path) -> None:
    save_adapter(tmp_path, adapter_of(3), metadata=METADATA)
    (tmp_path / "adapter.safetensors").rename(tmp_path / "mine.safetensors")
    tensors, metadata = load_adapter(tmp_path / "mine.safetensors")
    assert torch.equal(tensors["layers.0.up"], adapter_of(3)["layers.0.up"]) and metadata == METADATA


def test_an_optimizer_resumes_bit_for_bit(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(3)
        linear = torch.nn.Linear(4, 3)
        return linear, torch.optim.AdamW(linear.parameters(), lr=0.1, betas=(0.8, 0.95))

    def step(linear: torch.nn.Linear, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        optimizer.zero_grad()
        linear(torch.randn(5, 4, generator=generator)).square().sum().backward()
        optimizer.step()

    generator, stream = torch.Generator().manual_seed(5), random.Random(7)
    linear, optimizer = make()
    for _ in range(3):
        step(linear, optimizer, generator)
    state = {"optimizer": optimizer.state_dict(), "torch_rng": generator.get_state(), "rng": stream.getstate()}
    save_training_state(tmp_path, state)
    weights = {name: value.clone() for name, value in linear.state_dict().items()}
    for _ in range(3):
        step(linear, optimizer, generator)

    again, optimizer_again = make()
    again.load_state_dict(weights)
    loaded = load_training_state(tmp_path)
    assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    optimizer_again.load_state_dict(loaded["optimizer"])
    generator_again = torch.Generator()
    generator_again.set_state(loaded["torch_rng"])
    for _ in range(3):
        step(again, optimizer_again, generator_again)
    assert torch.equal(again.weight, linear.weight) and torch.equal(again.bias, linear.bias)
    stream_again = random.Random()
    stream_again.setstate(loaded["rng"])
    assert stream_again.random() == stream.random()


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.sampled_from(["<tensor>", "<tuple>", "<items>"]), inner, max_size=3)
        | st.dictionaries(st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(state=st.dictionaries(st.text(max_size=4), TREES, max_size=3))
def test_any_tree_of_plain_values_comes_back_with_its_types(
    tmp_path_factory: pytest.TempPathFactory, state: dict
) -> None:
    directory = tmp_path_factory.mktemp("tree")
    save_training_state(directory, state)
    assert repr(load_training_state(directory)) == repr(state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"a": {"b": [object()]}},
            r"a\['b'\]\[0\] must be a tensor or a plain value, got object; save what it",
        ),
        ({"a": {1.5: 0}}, "a must have keys of str or int, got 1.5; use a number or a name"),
        ({"a": {True: 0}}, "a must have keys of str or int, got True"),
    ],
)
def test_a_state_that_json_cannot_hold_is_refused_by_its_place(tmp_path: Path, state: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        save_training_state(tmp_path, state)
    with pytest.raises(TypeError, match=message):
        save_checkpoint(tmp_path / "run", 1, adapter={}, metadata=METADATA, training_state=state)
    assert list((tmp_path / "run").iterdir()) == []


# --- one whole checkpoint, whatever happens


def test_the_latest_checkpoint_is_the_last_saved_and_old_ones_go(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (1, 2, 10, 11):
        assert save_step(tmp_path, step).name == f"step-{step:06d}"
        assert load_whole(tmp_path).step == step
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000010", "step-000011"]
    save_step(tmp_path, 12, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000012"]
    assert load_adapter(tmp_path)[0]["layers.0.up"][0] == 12


def test_saving_a_step_again_replaces_it_and_pruning_never_takes_the_latest(tmp_path: Path) -> None:
    for _ in range(3):
        save_step(tmp_path, 5, keep=1)
        assert load_whole(tmp_path).step == 5
        assert len(list_checkpoints(tmp_path)) == 1
    save_step(tmp_path, 3, keep=1)
    assert load_whole(tmp_path).step == 3 and len(list_checkpoints(tmp_path)) == 1


def test_an_adapter_is_found_in_the_run_that_made_it(tmp_path: Path) -> None:
    save_step(tmp_path / "run" / "checkpoints", 4)
    assert load_adapter(tmp_path / "run")[0]["layers.0.up"][0] == 4


@pytest.fixture
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote, so flushing is left out, which costs most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


KILLED_BEFORE = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open")


@pytest.mark.parametrize("saved_step", [2, 1], ids=["the next step", "the same step again"])
def test_killed_before_any_system_call_of_a_save_the_old_or_the_new_checkpoint_is_whole(
    tmp_path: Path, unflushed: None, saved_step: int
) -> None:
    """Every moment in turn: the n-th call kills the process with SIGKILL, until a save runs to its end."""
    found = []
    for deadly in range(1, 200):
        directory = tmp_path / str(deadly)
        save_step(directory, 0, keep=2)
        save_step(directory, 1, keep=2)
        ended = die_in_fork(lambda n=deadly, d=directory: kill_at_call(n, lambda: save_step(d, saved_step, keep=2)))
        assert ended in (0, -signal.SIGKILL)
        found.append(load_whole(directory).step)
        save_step(directory, 3, keep=1)
        assert load_whole(directory).step == 3
        assert sorted(path.name for path in directory.iterdir()) == ["latest", "step-000003"], "leftovers are removed"
        if ended == 0:
            break
    assert ended == 0 and deadly > 10
    assert set(found) == {1, saved_step} and found == sorted(found)


def test_killed_before_any_system_call_of_a_save_the_old_or_the_new_adapter_is_whole(
    tmp_path: Path, unflushed: None
) -> None:
    found = []
    for deadly in range(1, 200):
        directory = tmp_path / str(deadly)
        save_adapter(directory, adapter_of(1), metadata=METADATA)
        replace = lambda d=directory: save_adapter(d, adapter_of(2), metadata=METADATA)  # noqa: E731
        ended = die_in_fork(lambda n=deadly, work=replace: kill_at_call(n, work))
        found.append(load_adapter(directory)[0]["layers.0.up"][0].item())
        if ended == 0:
            break
    assert ended == 0 and set(found) == {1.0, 2.0}


def test_a_reader_in_the_middle_of_an_adapter_reads_the_old_one_to_its_end(tmp_path: Path) -> None:
    save_adapter(tmp_path, adapter_of(1), metadata=METADATA)
    before = (tmp_path / "adapter.safetensors").read_bytes()
    with open(tmp_path / "adapter.safetensors", "rb", buffering=0) as reader:
        start = reader.read(100)
        save_adapter(tmp_path, adapter_of(2), metadata=METADATA)
        assert start + reader.read() == before


def kill_at_call(deadly: int, work: Callable[[], object]) -> None:
    """Runs work in this process and kills the process before the n-th call that changes the disk."""
    calls = 0

    def counted(function: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in KILLED_BEFORE:
        setattr(os, name, counted(getattr(os, name)))
    work()


def test_killed_while_the_bytes_are_written_the_last_checkpoint_is_whole(tmp_path: Path, unflushed: None) -> None:
    save_step(tmp_path, 0, size=100_000)
    steps, delays = [0], random.Random(1)

    def save_for_ever() -> None:
        for step in range(steps[-1] + 1, 10_000):
            save_step(tmp_path, step, size=100_000)

    for _ in range(10):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever()
            finally:
                os._exit(1)
        time.sleep(delays.uniform(0.01, 0.08))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        steps.append(load_whole(tmp_path).step)
    assert steps == sorted(steps) and steps[-1] > 0


def test_a_disk_that_fills_up_at_any_flush_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path, 1)
    flush, failures = os.fsync, 0
    for failing in range(1, 50):
        calls = 0

        def full(descriptor: int, at: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        before = latest_checkpoint(tmp_path)
        try:
            save_step(tmp_path, 1 + failing, keep=1)
            break
        except OSError as error:
            failures += 1
            assert error.errno == errno.ENOSPC
            assert "No space left on device" in str(error) and "resume" in str(error)
            assert f"last good checkpoint is {before}" in str(error)
        monkeypatch.setattr(os, "fsync", flush)
        assert load_whole(tmp_path).step in (1, 1 + failing)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing unfinished stays"
    monkeypatch.setattr(os, "fsync", flush)
    assert failures >= 6 and load_whole(tmp_path).step == 1 + failing


def test_a_write_that_the_system_cuts_short_leaves_the_last_checkpoint_and_the_last_adapter(tmp_path: Path) -> None:
    """A file-size limit: the write stops in the middle, as on a full disk."""
    save_step(tmp_path / "run", 1)
    save_adapter(tmp_path / "adapter", adapter_of(1), metadata=METADATA)

    def save_beyond_the_limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        with pytest.raises(OSError, match="could not save a checkpoint .* last good checkpoint is .*step-000001"):
            save_step(tmp_path / "run", 2, size=100_000)
        with pytest.raises(OSError, match="last good checkpoint is what was there before"):
            save_adapter(tmp_path / "adapter", adapter_of(2, 100_000), metadata=METADATA)

    assert die_in_fork(save_beyond_the_limit) == 0
    assert load_whole(tmp_path / "run").step == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["latest", "step-000001"]
    assert load_adapter(tmp_path / "adapter")[0]["layers.0.up"][0] == 1
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter.safetensors",
        "adapter_config.json",
    ]


# --- bad files and bad fits


def test_any_single_changed_or_missing_byte_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    stream = random.Random(0)
    for name in ("adapter.safetensors", "training.safetensors", "training.json"):
        good = (path / name).read_bytes()
        places = [*range(0, len(good), 37), *(stream.randrange(len(good)) for _ in range(10))]
        for place in places:
            (path / name).write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            with pytest.raises(ValueError, match="corrupt|must be|only safetensors"):
                load_checkpoint(path)
        for length in (0, 1, 7, 8, 9, len(good) // 2, len(good) - 1):
            (path / name).write_bytes(good[:length])
            with pytest.raises(ValueError, match="corrupt or truncated|corrupt, truncated"):
                load_checkpoint(path)
        (path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
            load_checkpoint(path)
        (path / name).write_bytes(good)
    assert load_whole(tmp_path).step == 1


class Explosive:
    def __reduce__(self) -> tuple:
        return sys.exit, ("a pickle was executed",)


def test_a_pickle_is_refused_unread_wherever_it_is_offered(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"only safetensors are read, got 'adapter_model.bin' .*; a pickle can"):
        load_adapter(tmp_path)
    with pytest.raises(ValueError, match="only safetensors are read"):
        load_adapter(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="only safetensors are read"):
        load_adapter(tmp_path / "absent.pt")
    for content in (pickle.dumps(Explosive()), (tmp_path / "adapter_model.bin").read_bytes()):
        (tmp_path / "adapter.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="only safetensors are read, got a pickle in"):
            load_adapter(tmp_path)


def test_missing_foreign_and_future_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="adapter.safetensors is missing: there is nothing to load; check"):
        load_adapter(tmp_path)
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_adapter(tmp_path / "nowhere")
    save_file({"lora_A": torch.ones(2)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="must be adapter tensors written by pte, got other safetensors"):
        load_adapter(tmp_path)
    with pytest.raises(ValueError, match="path must be a step directory, got"):
        load_checkpoint(tmp_path)
    monkeypatch.setattr(checkpoint_files, "FORMAT_VERSION", 2)
    future = AdapterMetadata(options={}, base_name="b", base_fingerprint="f", format_version=2)
    path = save_checkpoint(tmp_path, 1, adapter={}, metadata=future, training_state={})
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"must have format version 1, got 2; read it with pte \d"):
        load_adapter(path)
    with pytest.raises(ValueError, match="training.json must have format version 1, got 2; resume with the version"):
        load_training_state(path)


def test_files_of_two_saves_are_not_mixed(tmp_path: Path) -> None:
    first, second = save_step(tmp_path, 1), save_step(tmp_path, 2)
    (second / "training.json").write_bytes((first / "training.json").read_bytes())
    with pytest.raises(ValueError, match="not of the same save as training.safetensors"):
        load_checkpoint(second)


def test_a_pointer_to_nothing_and_senseless_arguments_are_refused(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    for name in ("step-000009", "../elsewhere", ""):
        (tmp_path / "latest").write_text(name)
        with pytest.raises(ValueError, match="latest must name a checkpoint beside it, got"):
            latest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="keep must be at least 1 checkpoint, got 0; use 2"):
        save_step(tmp_path, 1, keep=0)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        save_step(tmp_path, -1)


def test_an_adapter_of_another_base_or_rank_is_refused() -> None:
    check_adapter_fits(METADATA, base_name="moved/tiny", base_fingerprint="f" * 64, options={"rank": 4})
    with pytest.raises(ValueError, match=r"trained on the loaded base 'big' \(fingerprint gggggggggggg\), got one"):
        check_adapter_fits(METADATA, base_name="big", base_fingerprint="g" * 64)
    with pytest.raises(ValueError, match=r"adapter.rank must be that of the adapter that is loaded \(4\), got 8; set"):
        check_adapter_fits(METADATA, base_name="tiny", base_fingerprint="f" * 64, options={"rank": 8})
    with pytest.raises(ValueError, match="adapter.kind must be"):
        check_adapter_fits(METADATA, base_name="tiny", base_fingerprint="f" * 64, options={"kind": "lora"})


def test_a_fingerprint_tells_bases_apart_and_knows_one_in_either_dtype() -> None:
    weights = {"k_proj": torch.randn(8, 8)}
    config = {"hidden_size": 8, "_name_or_path": "a", "dtype": "float32", "transformers_version": "5.17"}
    fingerprint = fingerprint_of_base(config, weights)
    moved = {"hidden_size": 8, "_name_or_path": "b", "dtype": "bfloat16", "transformers_version": "5.23"}
    assert fingerprint_of_base(moved, {"k_proj": weights["k_proj"].bfloat16()}) == fingerprint
    assert fingerprint_of_base({**config, "hidden_size": 16}, weights) != fingerprint
    assert fingerprint_of_base(config, {"v_proj": weights["k_proj"]}) != fingerprint
    tuned = weights["k_proj"].clone()
    tuned[3, 3] *= 1.01
    assert fingerprint_of_base(config, {"k_proj": tuned}) != fingerprint
