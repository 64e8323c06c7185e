"""BatchNorm over several processes against PyTorch's in one process with all images."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import NATIVE, never_waiting
from torch import nn

from common.sync_batch_norm import SyncBatchNorm, convert

IMAGES = 6
WORLD = 2
CASES = [
    (dtype, layout)
    for dtype in (torch.float64, torch.float32)
    for layout in (torch.contiguous_format, torch.channels_last)
]


def small_network() -> nn.Module:
    """Two norms, one of them nested, with other parameters and statistics than a new one has."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU())
    network = nn.Sequential(inner, nn.BatchNorm2d(5, eps=1e-3, momentum=0.3))
    for norm in (inner[1], network[1]):
        nn.init.uniform_(norm.weight, -1, 2)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return network


def example(dtype: torch.dtype, layout: torch.memory_format) -> tuple[torch.Tensor, torch.Tensor]:
    """Images far from mean 0, the second half unlike the first, and the gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, 8, 7, generator=generator, dtype=torch.float64) + 10
    images[IMAGES // 2 :] *= 3
    gradient = torch.randn(IMAGES, 5, 6, 5, generator=generator, dtype=torch.float64)
    return images.to(dtype).contiguous(memory_format=layout), gradient.to(dtype)


def results(network: nn.Module, images: torch.Tensor, gradient: torch.Tensor) -> dict:
    """Output and gradients of a training step, running statistics after two forward passes."""
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.no_grad():  # as a teacher in train mode does
        network(images * 0.5)
    output = network(images)
    output.backward(gradient)
    return {
        "output": output.detach(),
        "input": images.grad,
        "parameters": {name: parameter.grad for name, parameter in network.named_parameters()},
        "buffers": dict(network.named_buffers()),
        "evaluated": network.eval()(images).detach(),
    }


def share(rank: int, folder: str) -> None:
    """Process `rank` with its part of the images, in all cases."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=WORLD)
    mine = slice(rank * IMAGES // WORLD, (rank + 1) * IMAGES // WORLD)
    found = []
    for dtype, layout in CASES:
        images, gradient = example(dtype, layout)
        network = convert(small_network().to(dtype))
        found.append(results(network, images[mine], gradient[mine]))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    atol = tolerance * theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=atol)


def test_two_processes_normalise_as_one_does(tmp_path: Path):
    mp.spawn(share, (str(tmp_path),), nprocs=WORLD)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for (dtype, layout), first, second in zip(CASES, *parts):
        one = results(small_network().to(dtype), *example(dtype, layout))
        for name in ("output", "input", "evaluated"):
            close(torch.cat([first[name], second[name]]), one[name], dtype)
        for name, gradient in one["parameters"].items():
            close(first["parameters"][name] + second["parameters"][name], gradient, dtype)
        for name, buffer in one["buffers"].items():
            assert torch.equal(first["buffers"][name], second["buffers"][name])
            close(first["buffers"][name], buffer, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="no CUDA device")
def test_on_a_gpu_it_computes_the_same_and_never_waits(tmp_path: Path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        for layout in (torch.contiguous_format, torch.channels_last):
            images, gradient = (part.cuda() for part in example(torch.float32, layout))
            theirs = results(small_network().cuda(), images, gradient)
            ours = results(convert(small_network().cuda()), images, gradient)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            norm = convert(nn.Sequential(nn.BatchNorm2d(3))).cuda()
            with never_waiting():
                norm(images.requires_grad_()).sum().backward()
    finally:
        dist.destroy_process_group()


def test_conversion_keeps_names_values_and_mode():
    network = small_network().eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    converted = convert(network)
    after = converted.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    norms = [module for module in converted.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(type(norm) is SyncBatchNorm and not norm.training for norm in norms)
    assert [(norm.eps, norm.momentum) for norm in norms] == [(1e-5, 0.1), (1e-3, 0.3)]
