"""One process: devices, compilers, seeds and signals."""

import argparse
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import settings

import cps
from common import InputError, datasets, distributed, runtime
from common.augment import ScaleFrom, WeakAugment
from common.data import Key, TrainSet


def test_seeds_of_different_lengths_differ():
    assert runtime.derive_seed(0, 1, 5) != runtime.derive_seed(0, 1, 5, 0)


def test_sampling_leaves_other_devices_generators_alone(monkeypatch):
    data = datasets.load(settings())
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("reseeded CUDA"))
    TrainSet(data, data.labelled, WeakAugment(32, ScaleFrom((1.0,))), 0, 0)[Key(0, 0, 0)]


def test_too_little_main_memory_ends_a_run_in_one_line(capsys):
    """PyTorch reports it as a plain RuntimeError."""

    def main(args):
        torch.empty(2**60)

    with pytest.raises(SystemExit) as end:
        runtime.launch(main, argparse.Namespace(output_dir="runs/x", debug=False))
    assert end.value.code == 1
    assert "stopped: too little memory; try a smaller -b" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="another"):
        runtime.launch(mock.Mock(side_effect=RuntimeError("another")), argparse.Namespace())


def test_unmarked_tests_see_no_gpu():
    """Those marked `gpu` alone may use it: a script's default device is the GPU if there is one."""
    assert cps.parse_args([]).device == "cpu"
    command = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.strip() == "False"


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
    failed = subprocess.CalledProcessError(1, ["gcc", "a very long command"])
    for error, reason in (
        (RuntimeError("no driver\nand more"), r"\(no driver\)"),
        (failed, r"\(the C compiler's error is above\)"),
    ):
        driver = mock.Mock()
        type(driver).active = mock.PropertyMock(side_effect=error)
        monkeypatch.setattr(triton.runtime, "driver", driver)
        with pytest.raises(InputError, match=rf"{reason}.*python3-dev.*--kernels torch$"):
            runtime.check_compiler(args, torch.device("cuda"))


def test_a_signal_that_arrives_while_processes_ask_each_other_is_not_lost(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(runtime, "_arrived", [])
    monkeypatch.setattr(distributed, "together", lambda: True)

    def meanwhile(tensor, op):  # after this process has said that it has none
        runtime._arrived.append(15)

    monkeypatch.setattr(distributed.dist, "all_reduce", meanwhile)
    assert runtime.signal_anywhere(cpu) is None
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor, op: None)
    assert runtime.signal_anywhere(cpu) == 15


def test_finding_the_device_leaves_cudnns_search_as_it_is(monkeypatch):
    """Found wrong once: ST's labelling asks for the device where the search has been put off."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    args = argparse.Namespace(device="cuda", deterministic=False)
    assert runtime.find_device(args) == torch.device("cuda", 0)
    assert torch.backends.cudnn.benchmark is False
