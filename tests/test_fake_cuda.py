"""A training step of every script on fake CUDA tensors: its device, shapes and waits, without a GPU.

A fake tensor has a device, a shape and a type, but no memory: nothing is computed. A tensor on the
wrong device, a wrong shape, `.item()`, `if tensor:` and a boolean index all raise. The backward pass
is left out, since autograd's engine asks for a driver.
"""

import itertools
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import cps
import mean_teacher
import stpp
import supervised
import u2pl
from common import augment, runtime

CLASSES = {"voc": 21, "cityscapes": 19}
DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
U2PL = "--warmup-iters 0"
# Script, flags, batches of a step.
STEPS = [
    (supervised, "", 1),
    (stpp, "", 1),
    (cps, "", 3),
    (cps, "--no-cutmix", 2),
    (cps, "--soft", 3),
    (mean_teacher, "", 2),
    (mean_teacher, "--cutmix --colour-jitter", 3),
    (u2pl, "--warmup-iters 9", 2),
    (u2pl, U2PL, 2),
    (u2pl, f"{U2PL} --cutmix-prob 1 --negatives-as-released", 2),
    (u2pl, f"{U2PL} --negatives reliable --no-dpa --no-prt", 2),
    (u2pl, f"{U2PL} --no-contrast", 2),
]
USUAL = ("voc", "bf16", "auto")
OTHER = [
    ("voc", "fp16", "auto"),
    ("voc", "bf16", "torch"),
    ("cityscapes", "off", "auto"),
    ("cityscapes", "bf16", "auto"),
]


def cases() -> list:
    """All steps at the usual setting, three at others; FAKE_CUDA=all: all steps at all settings."""
    chosen = [(step, USUAL) for step in STEPS]
    chosen += [(STEPS[index], setting) for index in (2, 5, 8) for setting in OTHER]
    if os.environ.get("FAKE_CUDA") == "all":
        settings = itertools.product(CLASSES, DTYPES, ("auto", "torch"))
        chosen = list(itertools.product(STEPS, settings))
    return [
        pytest.param(*step, *setting, id=" ".join((step[0].__name__, step[1], *setting)))
        for step, setting in chosen
    ]


def place_on_fake_device(network: nn.Module) -> None:
    """Give a network made on the device `meta` fake CUDA tensors, in the layout that `Runtime.place` gives it."""
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for key, value in tensors.items():
                if value is None:
                    continue
                layout = torch.channels_last if value.ndim == 4 else torch.contiguous_format
                fake = torch.empty(value.shape, dtype=value.dtype, device="cuda", memory_format=layout)
                if isinstance(value, nn.Parameter):
                    fake = nn.Parameter(fake, value.requires_grad)
                tensors[key] = fake


def fake_batch(args, classes: int) -> dict:
    """What a loader gives and `Runtime.to_device` has brought to the device."""
    shape = (args.batch_size, args.crop_size, args.crop_size)
    image = torch.zeros(*shape, 3, dtype=torch.uint8, device="cuda")
    return {
        "image": image,
        "image_strong": image.clone(),
        "valid_mask": torch.ones(shape, dtype=torch.bool, device="cuda"),
        "target": torch.zeros(shape, dtype=torch.uint8, device="cuda"),
        "name": ["image"] * args.batch_size,
    }


@pytest.fixture
def fake_gpu(monkeypatch):
    """What else PyTorch asks of a GPU."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)  # networks are there already


@pytest.mark.parametrize(("script", "flags", "count", "data", "amp", "kernels"), cases())
def test_a_step_stays_on_the_device_and_never_waits(
    script, flags, count, data, amp, kernels, fake_gpu, monkeypatch, tmp_path
):
    shared = f"--data {data} --weights none --backbone resnet18 -b 2 -j 0 --max-iters 100"
    command = [*shared.split(), *flags.split(), "--data-dir", str(tmp_path), "--amp", amp]
    args = script.parse_args([*command, "--device", "cpu"])
    args.kernels, args.device, args.stage, args.run = kernels, "cuda", 2, str(tmp_path)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    rt = runtime.Runtime(torch.device("cuda", 0), 0, 1, DTYPES[amp], scaler, False)
    losses = []
    monkeypatch.setattr(runtime.Runtime, "step", lambda self, loss, optimizer: losses.append(loss))
    classes = CLASSES[data]
    source = SimpleNamespace(
        num_classes=classes,
        background=0 if data == "voc" else None,
        labelled=range(1000),
        unlabelled=range(1000),
    )
    with torch.device("meta"):
        networks = {name: f.train() for name, f in script.build_networks(args, source, rt).items()}
    with FakeTensorMode():
        mean, std = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
        monkeypatch.setattr(augment, "_statistics", lambda device: (mean, std))
        for network in networks.values():
            place_on_fake_device(network)
        batches = [fake_batch(args, classes) for _ in range(count)]
        for iteration in (0, 1):
            measured = script.train_step(networks, None, batches, iteration, args, source, rt)
    assert all(value.device == rt.device and value.shape == () for value in measured.values())
    assert len(losses) == 2
    assert all(loss.requires_grad and loss.dtype == torch.float32 for loss in losses)
