"""Checkpoints that survive, losses that are not finite, and two processes against one."""

import argparse
import dataclasses
import errno
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT, settings

import cps
import mean_teacher
import stpp
import supervised
import u2pl
from common import InputError, checkpoint, cli, datasets, report, runtime
from common.augment import ScaleFrom, WeakAugment
from common.data import Key, TrainSet, eval_loader
from common.evaluate import evaluate


def small_state() -> tuple[dict, dict]:
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {"model": network}, {"optimizer": optimizer}


def test_random_generators_come_back(rt, tmp_path):
    networks, states = small_state()
    args = argparse.Namespace(seed=0, lr=0.1)
    for draw in (random.random, np.random.rand, lambda: torch.rand(3)):
        draw()
    checkpoint.save(tmp_path / "last.pt", 7, args, networks, states, rt)
    expected = random.random(), np.random.rand(), torch.rand(3).tolist()
    assert checkpoint.resume(tmp_path / "last.pt", args, networks, states, rt) == 7
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected


def test_a_full_disk_leaves_the_old_checkpoint(rt, tmp_path, monkeypatch):
    networks, states = small_state()
    args = argparse.Namespace(seed=0)
    checkpoint.save(tmp_path / "last.pt", 1, args, networks, states, rt)

    def full(content, file):
        file.write(b"half a check")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"cannot write .*last\.pt: .*No space left.* untouched"):
        checkpoint.save(tmp_path / "last.pt", 2, args, networks, states, rt)
    assert checkpoint.read(tmp_path / "last.pt")["iteration"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
def test_a_write_that_fails_halfway_says_why(rt, tmp_path):
    """torch.save turns the failure into a RuntimeError that does not mention the disk."""
    networks, states = small_state()
    networks["model"] = torch.nn.Linear(200, 200)
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*last\.pt: File too large"):
            checkpoint.save(tmp_path / "last.pt", 1, argparse.Namespace(seed=0), networks, states, rt)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_gpu_is_not_taken_for_one_of_the_disk(rt, tmp_path, monkeypatch):
    networks, states = small_state()

    def fail(content, file):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        checkpoint.save(tmp_path / "last.pt", 1, argparse.Namespace(seed=0), networks, states, rt)
    assert list(tmp_path.iterdir()) == []


def test_wrong_checkpoints_are_named(rt, tmp_path):
    networks, states = small_state()
    checkpoint.save(tmp_path / "last.pt", 1, argparse.Namespace(seed=0), networks, states, rt)
    content = checkpoint.read(tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"last\.pt: does not fit this network: size mismatch for weight"):
        checkpoint.load_networks(content, {"model": torch.nn.Linear(3, 2)}, tmp_path / "last.pt")
    with pytest.raises(InputError, match="holds model, not 'student'"):
        checkpoint.load_networks(content, {"student": torch.nn.Linear(2, 2)}, tmp_path / "last.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:500])
    with pytest.raises(InputError, match=r"cut\.pt: not a checkpoint"):
        checkpoint.read(tmp_path / "cut.pt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt: not a checkpoint of this version"):
        checkpoint.read(tmp_path / "other.pt")


def test_a_loss_that_is_not_finite_names_iteration_and_pictures(rt):
    rt.check_finite(torch.tensor(1.0), 4, ["a", "b"])
    with pytest.raises(runtime.NotFinite, match=r"nan at iteration 5; its pictures: c, d"):
        rt.check_finite(torch.tensor(math.nan), 5, ["c", "d"])


def test_what_ends_the_loading_of_a_batch_saves_first(rt, tmp_path):
    networks, states = small_state()
    args = argparse.Namespace(seed=0, output_dir="runs/here")
    path = tmp_path / "last.pt"
    from_worker = InputError("Caught InputError in DataLoader worker process 0.\nInputError: a.jpg: broken")
    for iteration, world, saved in ((0, 1, False), (5, 2, False), (5, 1, True)):
        message = r"^a\.jpg: broken; saved at iteration 5: .*--resume runs/here$" if saved else "InputError: a.jpg: broken"
        with pytest.raises(InputError, match=message):
            with checkpoint.saved_first(path, iteration, args, networks, states, dataclasses.replace(rt, world=world)):
                raise from_worker
        assert path.exists() == saved
    killed = "DataLoader worker (pid 7) is killed by signal: Killed. \nmore"
    with pytest.raises(runtime.WorkerDied, match="is killed by signal: Killed"):
        with checkpoint.saved_first(path, 9, args, networks, states, rt):
            raise RuntimeError(killed)
    assert checkpoint.read(path)["iteration"] == 9
    with pytest.raises(RuntimeError, match="shapes"):
        with checkpoint.saved_first(path, 10, args, networks, states, rt):
            raise RuntimeError("shapes differ")
    assert checkpoint.read(path)["iteration"] == 9  # an error of the program itself: nothing is known of the state


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


# ------------------------------------------------------------------------------------------------------- the run's folder


def test_a_killed_run_leaves_no_lock_behind_in_its_loader_workers(tmp_path):
    """Found wrong once: workers inherited the lock, and outlived their parent by seconds."""
    code = (
        "import os, sys, time; from pathlib import Path; from common.report import claim\n"
        "held = claim(Path(sys.argv[1]))\n"
        "child = os.fork()\n"
        "if child == 0: os.close(1); os.close(2); time.sleep(60); os._exit(0)\n"
        "print(child, flush=True); os.kill(os.getpid(), 9)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], cwd=ROOT, capture_output=True, text=True)
    worker = int(result.stdout)
    try:
        assert report.claim(tmp_path / "run") is not None
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    assert report.claim(tmp_path / "run") is not None
    assert "has no locks" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["log.txt", "figures", "pseudo_masks/1/a.part"])
def test_symbolic_links_in_a_run_folder_are_refused(name: str, tmp_path):
    """Writing through them would leave the folder."""
    outside, path = tmp_path / "outside", tmp_path / "run" / name
    outside.write_text("precious")
    path.parent.mkdir(parents=True)
    path.symlink_to(outside if "." in name else tmp_path)
    with pytest.raises(InputError, match=f"{name} is a symbolic link"):
        report.claim(tmp_path / "run")
    assert outside.read_text() == "precious"


def test_a_signal_that_arrives_while_processes_ask_each_other_is_not_lost(monkeypatch):
    rt = runtime.Runtime(torch.device("cpu"), 0, 2, None, torch.amp.GradScaler("cpu", enabled=False), False)
    monkeypatch.setattr(runtime.dist, "all_reduce", lambda tensor, op: setattr(rt, "signal", 15))  # after `asked` was made
    assert not any(rt.stopping() for _ in range(10)) and rt.signal == 15
    monkeypatch.setattr(runtime.dist, "all_reduce", lambda tensor, op: None)
    assert [rt.stopping() for _ in range(10)] == [False] * 9 + [True]


def test_the_scripts_main_is_the_same_line_for_line():
    import inspect

    for script in (supervised, mean_teacher, stpp, u2pl):
        assert inspect.getsource(script.main) == inspect.getsource(cps.main)


def test_the_window_is_the_crop_and_a_users_list_has_no_published_schedule():
    args = cps.parse_args(["--data", "cityscapes", "--crop-size", "512"])
    assert args.eval_window == 512
    args = cps.parse_args(["--data", "voc", "--labelled-list", "my92.txt"])
    assert (args.split, args.epochs, args.max_iters) == ("my92.txt", None, 39_000)
    assert args.output_dir == "runs/cps-voc-my92-seed0"


def test_a_preset_that_processes_cannot_share_is_said_so(monkeypatch, capsys):
    for world, batch, said in (
        (4, 2, ""),
        (3, 2, "note: 3 processes with 2 pictures each, not 8 in all"),
        (8, 2, "not 8 in all"),
    ):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert cps.parse_args([]).batch_size == batch
        printed = capsys.readouterr().err
        assert said in printed if said else not printed


def test_workers_need_shared_memory(monkeypatch, capsys):
    """PyTorch's workers wait forever where /dev/shm is full, as in a container with little of it."""
    monkeypatch.setattr(cli, "shared_memory", lambda: 1e6)
    command = ["--data", "camvid", "--weights", "none"]
    assert cps.parse_args(command).workers == 0
    assert "note: /dev/shm has 1 MB" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cps.parse_args([*command, "-j", "1"])
    assert "which has 1; use -j 0, or start the container with --shm-size" in capsys.readouterr().err
    monkeypatch.setattr(cli, "shared_memory", lambda: math.inf)
    assert cps.parse_args([*command, "-j", "1"]).workers == 1


def test_seeds_of_different_lengths_differ():
    assert runtime.derive_seed(0, 1, 5) != runtime.derive_seed(0, 1, 5, 0)


def test_sampling_leaves_other_devices_generators_alone(monkeypatch):
    data = datasets.load(settings())
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("reseeded CUDA"))
    TrainSet(data, data.labelled, WeakAugment(32, ScaleFrom((1.0,))), 0, 0)[Key(0, 0, 0)]


def test_presets_are_complete():
    for script in (cps, mean_teacher, stpp, supervised, u2pl):
        assert set(script.PRESETS) == set(cli.DATA_DEFAULTS) == set(datasets.DATASETS)


def test_help_shows_every_default(capsys):
    for script in (cps, mean_teacher, stpp, supervised, u2pl):
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        shown = " ".join(capsys.readouterr().out.split())
        for key, value in {**script.PRESETS["voc"], **script.PRESETS["shapes"]}.items():
            assert value is None or f"{key} {value}" in shown


def test_epochs_give_the_papers_iterations():
    for split, labelled in (("1/16", 662), ("1/8", 1323), ("1/4", 2646), ("1/2", 5291)):
        args = cps.parse_args(["--data", "voc", "--split", split, "--weights", "none"])
        assert 39_000 <= cli.Schedule(args, 10582 - labelled, 1).total <= 39_700
    args = cps.parse_args(["--data", "voc", "--split", "183"])
    assert cli.Schedule(args, 10582 - 183, 1).total == 39_000


def test_unmarked_tests_see_no_gpu():
    """Those marked `gpu` alone may use it: a script's default device is the GPU where there is one."""
    assert cps.parse_args([]).device == "cpu"
    command = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("flags", "environment", "refused"),
    [
        ([], {"PATH": ""}, "no gcc or clang: install gcc or clang, or give --kernels torch"),
        ([], {"CC": "nowhere/cc"}, "there is no nowhere/cc: install"),
        (["--kernels", "torch"], {"PATH": ""}, None),
        (["--kernels", "torch", "--compile"], {"PATH": ""}, "torch and leave --compile out"),
    ],
)
def test_a_gpu_without_a_c_compiler_is_told_at_the_start(flags, environment, refused, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = cps.parse_args([*flags, "--device", "cpu"])
    runtime.check_compiler(args, torch.device("cpu"))  # needs none
    if refused is None:
        runtime.check_compiler(args, torch.device("cuda"))
        return
    with pytest.raises(InputError, match=refused):
        runtime.check_compiler(args, torch.device("cuda"))


def test_a_triton_that_does_not_start_is_told_in_one_line(monkeypatch):
    """As with a compiler but without Python's headers."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    args = cps.parse_args(["--device", "cpu"])
    for error, reason in (
        (RuntimeError("no driver\nand more"), r"\(no driver\)"),
        (subprocess.CalledProcessError(1, ["gcc", "a very long command"]), r"\(the C compiler's error is above\)"),
    ):
        driver = mock.Mock()
        type(driver).active = mock.PropertyMock(side_effect=error)
        monkeypatch.setattr(triton.runtime, "driver", driver)
        with pytest.raises(InputError, match=rf"{reason}.*python3-dev.*--kernels torch$"):
            runtime.check_compiler(args, torch.device("cuda"))


def test_a_first_step_that_fp16_leaves_out_counts_and_does_not_warn(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    args = cps.parse_args(["--device", "cpu", "--amp", "fp16"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rt = runtime.start(args)
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / 10)
        rt.step(1e38 * weight.sum(), optimizer)  # times the scale: infinite
        scheduler.step()
    assert weight.item() == 1 and scheduler.last_epoch == 1
    assert scheduler.get_last_lr() == [0.9]


# --------------------------------------------------------------------------------------------------------- two processes


def gradients(rank: int, world: int, flags: list[str], batch: int) -> dict:
    """Loss, gradient and BatchNorm's statistics after one real CPS step, and an evaluation."""
    rt = runtime.Runtime(torch.device("cpu"), rank, world, None, torch.amp.GradScaler("cpu", enabled=False), False)
    args = cps.parse_args(["--crop-size", "32", "--dropout", "0", "-b", str(batch), *flags])
    data = datasets.load(settings())
    torch.manual_seed(0)
    networks = cps.build_networks(args, data, rt)
    callables = {name: rt.wrap(network) for name, network in networks.items()}
    optimizer = torch.optim.SGD([p for network in networks.values() for p in network.parameters()], lr=0.0)
    batches = list(next(cps.load_batches(args, data, rt, 0, 1)))
    if rank == 0:
        batches[0]["target"][0, :20] = 255  # ranks with different numbers of valid pixels
    measured = cps.train_step(callables, optimizer, batches, 0, args, data, rt)
    loss = rt.add_up(measured["loss"].detach()) / world
    weights = {f"{name}.{key}": p.grad.clone() for name, network in networks.items() for key, p in network.named_parameters()}
    buffers = ((f"{name}.{key}", value) for name, f in networks.items() for key, value in f.named_buffers())
    statistics = {name: value.clone() for name, value in buffers}
    score = evaluate({"n": networks["model_1"]}, eval_loader(data, data.val[:33], args, rt), data.num_classes, rt)["n"]
    return {"loss": loss, "gradients": weights, "statistics": statistics, "matrix": score.confusion_matrix}


def worker(rank: int, flags: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(gradients(rank, 2, flags, batch=2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("flags", [[], ["--no-cutmix"], ["--soft"]])
def test_two_processes_do_what_one_does_with_the_doubled_batch(flags: list[str], tmp_path):
    mp.spawn(worker, (flags, str(tmp_path)), nprocs=2)
    two = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    one = gradients(0, 1, flags, batch=4)
    torch.testing.assert_close(two[0]["loss"], one["loss"], rtol=1e-5, atol=0)
    for name, gradient in one["gradients"].items():
        assert torch.equal(two[0]["gradients"][name], two[1]["gradients"][name])
        torch.testing.assert_close(two[0]["gradients"][name], gradient, rtol=1e-3, atol=5e-5 * gradient.abs().max().item())
    for name, value in one["statistics"].items():
        assert torch.equal(two[0]["statistics"][name], two[1]["statistics"][name])
        torch.testing.assert_close(two[0]["statistics"][name], value, rtol=1e-4, atol=1e-5)
    assert torch.equal(two[0]["matrix"], one["matrix"]) and torch.equal(two[1]["matrix"], one["matrix"])


def signals_worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rt = runtime.Runtime(torch.device("cpu"), rank, 2, None, torch.amp.GradScaler("cpu", enabled=False), False)
    rt.signal = 15 if rank == 1 else None
    answers = [rt.stopping() for _ in range(10)]
    assert answers == [False] * 9 + [True]  # the rank without a signal stops in the same iteration
    torch.distributed.destroy_process_group()


def test_signals_are_agreed_upon(tmp_path):
    mp.spawn(signals_worker, (str(tmp_path),), nprocs=2)
