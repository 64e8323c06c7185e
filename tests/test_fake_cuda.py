"""A training step of every script on fake CUDA tensors: device, shapes, waits, without a GPU.

A fake tensor has a device, a shape and a type, but no memory: nothing is computed. A tensor on
the wrong device, a wrong shape, `.item()`, `if tensor:` and a boolean index all raise. The
backward pass is left out, since autograd's engine asks for a driver.
"""

import copy
import itertools
import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import ael
import cps
import mean_teacher
import psmt
import stpp
import supervised
import u2pl
import unimatch
from common import adaptive, augment
from common.deeplabv3plus import DeepLabV3Plus
from common.run import place
from kernels import set_backend

CLASSES = {"voc": 21, "cityscapes": 19}
CUDA = torch.device("cuda", 0)
U2PL = "--warmup-iters 0"


class Step(NamedTuple):
    """An iteration to try.

    Attributes:
        script: whose.
        flags: what it is started with.
        batches: how many it gets.
        more: whether it is tried with other data and types, too.
    """

    script: ModuleType
    flags: str
    batches: int
    more: bool = False


STEPS = [
    Step(supervised, "", 1),
    Step(stpp, "", 1),
    Step(cps, "", 3, more=True),
    Step(cps, "--no-cutmix", 2),
    Step(cps, "--soft", 3),
    Step(mean_teacher, "", 2, more=True),
    Step(mean_teacher, "--cutmix --colour-jitter", 3),
    Step(mean_teacher, "--classmix", 3),
    Step(mean_teacher, "--classmix labelled", 2),
    Step(unimatch, "", 3, more=True),
    Step(unimatch, "--fixmatch", 3),
    Step(unimatch, "--complementary", 3),
    Step(ael, "", 3, more=True),
    Step(ael, "--no-acm --no-aes --bank-as-released", 3),
    Step(psmt, "", 2, more=True),
    Step(psmt, "--teachers 1 --no-conf-weight --strong-aug none", 2),
    Step(u2pl, "--warmup-iters 9", 2),
    Step(u2pl, U2PL, 2, more=True),
    Step(u2pl, f"{U2PL} --cutmix-prob 1 --negatives-as-released", 2),
    Step(u2pl, f"{U2PL} --negatives reliable --no-dpa --no-prt", 2),
    Step(u2pl, f"{U2PL} --no-contrast", 2),
    Step(u2pl, f"{U2PL} --ael", 3),
    Step(u2pl, f"{U2PL} --ael --entropy-as-released --no-contrast", 3),
]
USUAL = ("voc", "bf16", "auto")
OTHER = [
    ("voc", "fp16", "auto"),
    ("voc", "bf16", "torch"),
    ("cityscapes", "off", "auto"),
    ("cityscapes", "bf16", "auto"),
]


def cases() -> list:
    """All steps at the usual setting, some at others; FAKE_CUDA=all: all steps at all settings."""
    chosen = [(step, USUAL) for step in STEPS]
    chosen += [(step, setting) for step in STEPS if step.more for setting in OTHER]
    if os.environ.get("FAKE_CUDA") == "all":
        settings = itertools.product(CLASSES, ("off", "bf16", "fp16"), ("auto", "torch"))
        chosen = list(itertools.product(STEPS, settings))
    return [
        pytest.param(step, *setting, id=" ".join((step.script.__name__, step.flags, *setting)))
        for step, setting in chosen
    ]


def on_fake_device(network: nn.Module, args) -> nn.Module:
    """Give a network made on the device `meta` fake CUDA tensors, laid out as in training."""
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for key, value in tensors.items():
                if value is not None:
                    tensors[key] = fake_tensor(value)
    return place(network, args, CUDA)


def fake_tensor(value: torch.Tensor) -> torch.Tensor:
    """A fake CUDA tensor like `value`, a parameter if that is one."""
    layout = torch.channels_last if value.ndim == 4 else torch.contiguous_format
    fake = torch.empty(value.shape, dtype=value.dtype, device=CUDA, memory_format=layout)
    return nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake


def fake_batch(args) -> dict:
    """What a loader gives and `common.run.to_device` has brought to the device."""
    shape = (args.batch_size, args.crop_size, args.crop_size)
    image = torch.zeros(*shape, 3, dtype=torch.uint8, device=CUDA)
    return {
        "image": image,
        "image_strong": image.clone(),
        "image_strong_1": image.clone(),
        "image_strong_2": image.clone(),
        "valid_mask": torch.ones(shape, dtype=torch.bool, device=CUDA),
        "target": torch.zeros(shape, dtype=torch.uint8, device=CUDA),
        "name": ["image"] * args.batch_size,
    }


@pytest.fixture
def fake_gpu(monkeypatch):
    """What else PyTorch asks of a GPU; and the kernels' backend as it was."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)  # networks are there already
    yield
    set_backend("auto")


def networks_of(script, args, classes: int) -> list[nn.Module]:
    """A script's networks, as its `main` makes them, on the device `meta`."""
    with torch.device("meta"):
        if script is u2pl:
            first = u2pl.Network(args, classes).train()
        elif script is ael:
            first = ael.Network(args, classes).train()
        elif script is psmt:
            first = psmt.Network.from_settings(args, classes).train()
        elif script is unimatch:
            first = unimatch.Network.from_settings(args, classes).train()
        else:
            first = DeepLabV3Plus.from_settings(args, classes).train()
        if script is cps:
            return [first, DeepLabV3Plus.from_settings(args, classes).train()]
        if script in (ael, mean_teacher, psmt, u2pl):
            return [first, copy.deepcopy(first).requires_grad_(False)]
    return [first]


def step_of(script, networks: list, batches: list[dict], args, classes: int) -> Callable:
    """What an iteration of a script's `main` does, without the optimiser's step.

    Returns:
        A function of the iteration that returns its measures.
    """
    batch_l, *batches_u = batches
    background = 0 if args.data == "voc" else None
    bank = None
    if script is u2pl and args.contrast:
        bank = u2pl.MemoryBank(classes, u2pl.CAPACITY, networks[0].feature_channels, CUDA)
    memory = []
    if script is ael or (script is u2pl and args.ael):
        memory = [
            ael.ConfidenceBank(classes, args.bank_momentum, CUDA),
            ael.ImagePool(args.pool, classes, args.crop_size, CUDA),
            torch.arange(1, classes, device=CUDA),
        ]

    def step(iteration: int) -> dict[str, torch.Tensor]:
        if script is cps:
            return cps.train_step(*networks, batch_l, batches_u, iteration, args, background)
        if script in (supervised, stpp):
            return script.train_step(*networks, batch_l, args)
        if script is unimatch:
            return unimatch.train_step(*networks, batch_l, *batches_u, iteration, args)
        assert script in (ael, mean_teacher, psmt, u2pl), f"add a step of {script.__name__} here"
        student, teacher = networks
        if script is ael:
            measured = ael.train_step(student, teacher, *memory, batches, iteration, args)
            ael.ema_update(teacher, student, args.ema_decay)
            return measured
        if script is psmt:
            teachers = [teacher] * args.teachers
            inputs = (student, teachers, 0, batch_l, *batches_u, 1.0, iteration, args)
            measured = psmt.train_step(*inputs)
            psmt.ema_update(teacher, student, args.ema_decay)
            return measured
        if script is mean_teacher:
            kind = mean_teacher.kind(args)
            if kind != "noise":
                inputs = (student, teacher, batch_l, batches_u, args.unsup_weight, iteration, args)
                measured = getattr(mean_teacher, f"{kind}_step")(*inputs)
            else:
                inputs = (student, teacher, batch_l, *batches_u, args.unsup_weight, args)
                measured = mean_teacher.noise_step(*inputs)
            mean_teacher.ema_update(teacher, student, args.ema_decay, kind != "noise")
            return measured
        if iteration < args.warmup_iters:
            return u2pl.warm_up_step(student, batch_l, args)
        if args.ael:
            weak = u2pl.Equalisation(*memory)
            inputs = (student, teacher, bank, weak, batches, iteration, args.max_iters, args)
            return u2pl.ael_step(*inputs)
        inputs = (student, teacher, bank, batch_l, *batches_u, iteration, args.max_iters, args)
        measured = u2pl.train_step(*inputs)
        u2pl.ema_update(teacher, student, args.ema_decay)
        return measured

    return step


def leave_out_what_needs_values(monkeypatch) -> None:
    """AEL's regions, which the host finds, and the gradient inside a step of PS-MT."""

    def no_regions(label, classes, size, *_):
        return torch.zeros(len(label), 4, dtype=torch.int64), torch.zeros(len(label))

    monkeypatch.setattr(adaptive, "component_boxes", no_regions)
    monkeypatch.setattr(psmt, "direction", lambda of, at, *_: torch.zeros_like(of(at)[:, :1]) + at)


@pytest.mark.parametrize(("tried", "data", "amp", "kernels"), cases())
def test_a_step_stays_on_the_device_and_never_waits(
    tried, data, amp, kernels, fake_gpu, monkeypatch, tmp_path
):
    script = tried.script
    shared = f"--data {data} --weights none --backbone resnet18 -b 2 -j 0 --max-iters 100"
    command = [*shared.split(), *tried.flags.split(), "--data-dir", str(tmp_path), "--amp", amp]
    args = script.parse_args([*command, "--device", "cpu"])
    args.device = "cuda"
    set_backend(kernels)
    classes = CLASSES[data]
    networks = networks_of(script, args, classes)
    with FakeTensorMode():
        mean, std = torch.zeros(3, device=CUDA), torch.ones(3, device=CUDA)
        monkeypatch.setattr(augment, "_statistics", lambda device: (mean, std))
        leave_out_what_needs_values(monkeypatch)
        networks = [on_fake_device(network, args) for network in networks]
        batches = [fake_batch(args) for _ in range(tried.batches)]
        step = step_of(script, networks, batches, args, classes)
        steps = [step(iteration) for iteration in (0, 1)]
    for measured in steps:
        assert all(value.device == CUDA and value.shape == () for value in measured.values())
        assert measured["loss"].requires_grad and measured["loss"].dtype == torch.float32
