"""`python -m kernels.benchmark --step cps`: a whole training step with the kernels, and the usual way in their place."""

from types import SimpleNamespace
from unittest import mock

import torch

from kernels.timing import time_cpu, time_gpu
from kernels.usual import usual_cross_entropy, usual_pseudo_label


def step_cps(device: torch.device) -> None:
    """Time a training step of CPS with CutMix on random pictures: with the kernels, and with the usual way in their place."""
    # The one place where a kernel's file needs the scripts, and only when asked for.
    import cps
    from common import losses, runtime

    cuda = device.type == "cuda"
    size, count, backbone = (512, 8, "resnet50") if cuda else (128, 2, "resnet18")
    flags = ["--data", "voc", "--weights", "none", "--backbone", backbone, "--crop-size", str(size), "-b", str(count)]
    args = cps.parse_args([*flags, "--device", device.type, "--amp", "bf16" if cuda else "off"])
    amp = torch.bfloat16 if cuda else None
    rt = runtime.Runtime(device, 0, 1, amp, torch.amp.GradScaler(device.type, enabled=False), False)
    data = SimpleNamespace(num_classes=21, background=0)
    networks = {name: rt.place(network).train() for name, network in cps.build_networks(args, data, rt).items()}
    optimizer = torch.optim.SGD([p for network in networks.values() for p in network.parameters()], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8),
        "valid_mask": torch.ones(count, size, size, dtype=torch.bool),
        "target": torch.randint(0, 21, (count, size, size), generator=generator, dtype=torch.uint8),
    }
    batch = {key: value.to(device) for key, value in batch.items()}

    def step() -> None:
        cps.train_step(networks, optimizer, [batch] * 3, 0, args, data, rt)

    usual = (
        mock.patch.object(cps, "pseudo_label", usual_pseudo_label),
        mock.patch.object(losses, "cross_entropy", usual_cross_entropy),
    )
    print(f"step of CPS: {backbone}, {count} pictures of {size} x {size}, {device.type}")
    timings = {}
    for name in ("usual", "kernels", "usual again", "kernels again"):
        if name.startswith("usual"):
            with usual[0], usual[1]:
                timings[name] = time_gpu(step, capture=False) if cuda else time_cpu(step, 5)
        else:
            timings[name] = time_gpu(step, capture=False) if cuda else time_cpu(step, 5)
        peak = f", peak {timings[name].peak / 1e9:.2f} GB" if cuda else ""
        print(f"{name:14}{1e3 * timings[name].median:9.1f} ms{peak}", flush=True)
    ratio = (timings["usual"].median + timings["usual again"].median) / (
        timings["kernels"].median + timings["kernels again"].median
    )
    print(f"usual / kernels: {ratio:.2f}")
