"""Checkpoints and descriptions that survive, or say what is wrong with them."""

import argparse
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from common import InputError, checkpoint, distributed, runtime

ARGS = argparse.Namespace(seed=0, lr=0.1, resume=True, eval_only=False, output_dir="runs/here")


def small_state() -> tuple[dict, dict]:
    """A network and an optimiser that has made a step."""
    network = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {"model": network}, {"optimizer": optimizer}


def save(path, iteration: int, networks: dict, states: dict) -> None:
    """Write last.pt as a run does."""
    checkpoint.save(path, checkpoint.header(iteration, ARGS, networks, "model"), states)


def test_networks_optimisers_and_random_numbers_come_back(tmp_path):
    networks, states = small_state()
    torch.rand(3)
    save(tmp_path / "last.pt", 7, networks, states)
    expected = torch.rand(3)
    weight = networks["model"].weight.clone()
    momentum = states["optimizer"].state_dict()["state"][0]["momentum_buffer"].clone()
    networks, states = small_state()
    assert checkpoint.resume(tmp_path / "last.pt", ARGS, networks, states) == 7
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(networks["model"].weight, weight)
    found = states["optimizer"].state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(found, momentum)


def test_each_process_goes_on_with_random_numbers_of_its_own(tmp_path, monkeypatch):
    """Dropout would be the same on all of them otherwise, at the start or after a resume."""
    path, (networks, states) = tmp_path / "last.pt", small_state()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)

    def drawn(rank: int) -> torch.Tensor:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        checkpoint.resume(path, ARGS, networks, states)
        return torch.rand(4)

    fresh = [drawn(rank) for rank in (0, 1)]
    assert not torch.equal(*fresh) and torch.equal(fresh[0], drawn(0))

    def state(seed: int) -> dict:
        torch.manual_seed(seed)
        return checkpoint.random_state()

    monkeypatch.setattr(distributed, "gather", lambda mine: [state(5), state(6)])
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    save(path, 1, networks, states)
    for rank, seed in ((0, 5), (1, 6)):
        found = drawn(rank)
        torch.manual_seed(seed)
        assert torch.equal(found, torch.rand(4))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    networks, states = small_state()
    save(tmp_path / "last.pt", 1, networks, states)

    def full(content, file):
        file.write(b"half a check")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    message = r"cannot write .*last\.pt: .*No space left.* untouched"
    with pytest.raises(InputError, match=message):
        save(tmp_path / "last.pt", 2, networks, states)
    assert checkpoint.read(tmp_path / "last.pt")["iteration"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_one_process_writes_and_the_new_file_is_on_the_disk_before_the_old_one_goes(
    tmp_path, monkeypatch
):
    networks, states = small_state()
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    save(tmp_path / "last.pt", 1, networks, states)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(distributed, "is_main", lambda: True)
    calls, replace = [], Path.replace

    def replaced(part: Path, target: Path) -> None:
        calls.append("replace")
        replace(part, target)

    monkeypatch.setattr(checkpoint.os, "fsync", lambda number: calls.append("fsync"))
    monkeypatch.setattr(Path, "replace", replaced)
    save(tmp_path / "last.pt", 1, networks, states)
    assert calls == ["fsync", "replace"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
def test_a_write_that_fails_halfway_says_why(tmp_path):
    """torch.save turns the failure into a RuntimeError that does not mention the disk."""
    import resource

    _, states = small_state()
    networks = {"model": nn.Linear(200, 200)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*last\.pt: File too large"):
            save(tmp_path / "last.pt", 1, networks, states)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_gpu_is_not_taken_for_one_of_the_disk(tmp_path, monkeypatch):
    networks, states = small_state()

    def fail(content, file):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        save(tmp_path / "last.pt", 1, networks, states)
    assert list(tmp_path.iterdir()) == []


def test_wrong_checkpoints_are_named(tmp_path):
    networks, states = small_state()
    path = tmp_path / "last.pt"
    save(path, 1, networks, states)
    content = checkpoint.read(path)
    message = r"last\.pt: does not fit this network: size mismatch for weight"
    with pytest.raises(InputError, match=message):
        checkpoint.load_networks(content, {"model": nn.Linear(3, 2)}, path)
    with pytest.raises(InputError, match="holds model, not 'student'"):
        checkpoint.load_networks(content, {"student": nn.Linear(2, 2)}, path)
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"cut\.pt: not a checkpoint"):
        checkpoint.read(tmp_path / "cut.pt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt: not a checkpoint of this version"):
        checkpoint.read(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("done", "together", "saved"), [(0, False, False), (5, True, False), (5, False, True)]
)
def test_a_file_that_cannot_be_read_ends_a_run_after_a_checkpoint(
    done: int, together: bool, saved: bool, monkeypatch
):
    """With nothing done there is nothing to keep; one of several processes cannot save alone."""
    monkeypatch.setattr(distributed, "together", lambda: together)
    from_worker = "Caught InputError in DataLoader worker process 0.\nInputError: a.jpg: broken"
    message = "InputError: a.jpg: broken"
    if saved:
        message = r"^a\.jpg: broken; saved at iteration 5: .*--resume runs/here$"
    calls = []
    with pytest.raises(InputError, match=message):
        with checkpoint.saved_first(lambda: calls.append(done), done, ARGS):
            raise InputError(from_worker)
    assert bool(calls) == saved


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore"), "Killed"),
        (ConnectionResetError(104, "Connection reset by peer"), "is gone .*reset by peer"),
    ],
)
def test_a_killed_loader_worker_ends_a_run_after_a_checkpoint(error: Exception, message: str):
    """The connection to it may break before the loader knows that it is dead."""
    calls = []
    with pytest.raises(runtime.WorkerDied, match=f"^DataLoader worker .*{message}"):
        with checkpoint.saved_first(lambda: calls.append(9), 9, ARGS):
            raise error
    assert calls == [9]


def test_an_error_of_the_program_saves_nothing():
    """Nothing is known of the state then."""
    calls = []
    with pytest.raises(RuntimeError, match="shapes"):
        with checkpoint.saved_first(lambda: calls.append(10), 10, ARGS):
            raise RuntimeError("shapes differ")
    assert not calls


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{}", "it is not JSON"),
        (b"{", "it is not JSON"),
        (b"[1]", "it holds no settings"),
        (b'{"args": {"lr": 1}}', "it holds no settings"),
        (b'{"args": {"method": "cps"}}', "it has no protocol"),
    ],
)
def test_damaged_descriptions_are_named(content: bytes, message: str, tmp_path):
    (tmp_path / "args.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"args\.json is damaged: {message}"):
        checkpoint.read_description(tmp_path, "protocol")
