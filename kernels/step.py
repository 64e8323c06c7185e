"""`python -m kernels.benchmark --step cps|u2pl`: a whole training step with the kernels, and the usual way in their place.

For U2PL the usual way has the data structures of the released code: percentiles by NumPy on the host, queues of keys in the
host's memory, a loop over the classes, and a class's whole queue copied to the device to draw from it. Both ways take the same
negatives, the paper's, at most as many new ones a class and step, and start with full banks, which count as memory.
"""

import functools
import importlib
from contextlib import ExitStack
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.timing import peak_cpu, time_cpu, time_gpu
from kernels.usual import usual_cross_entropy, usual_drop, usual_percentile, usual_pseudo_label


def usual_contrast_loss(features: Tensor, features_t: Tensor, roles: tuple[Tensor, ...], queues, rt, impl: str = "") -> tuple:
    """`u2pl.contrast_loss` the usual way; `queues.lists` holds a (keys,D) float32 tensor on the host for each class."""
    import u2pl

    vectors, vectors_t = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (features, features_t))
    loss, present = 0.0, 0
    for c, (member, candidate, negative) in enumerate(zip(*roles)):
        if member.sum() == 0:
            continue
        present += 1
        positive = vectors_t[member].float().mean(0)
        new = vectors_t[negative]
        new = new[torch.randperm(len(new), device=new.device)[: u2pl.PUSHED]].float().cpu()
        queues.lists[c] = torch.cat([queues.lists[c], new])[-u2pl.CAPACITY :]
        pixels = vectors[candidate].float()
        if len(pixels) == 0 or len(queues.lists[c]) == 0:
            continue
        anchors = pixels[torch.randint(len(pixels), (u2pl.ANCHORS,), device=pixels.device)]
        bank = queues.lists[c].to(pixels.device)
        rows = torch.randint(len(bank), (u2pl.ANCHORS * u2pl.NEGATIVES,), device=pixels.device)
        others = torch.cat([positive.expand(u2pl.ANCHORS, 1, -1), bank[rows].view(u2pl.ANCHORS, u2pl.NEGATIVES, -1)], 1)
        similarity = F.cosine_similarity(anchors[:, None], others, dim=2) / u2pl.TEMPERATURE
        loss = loss + F.cross_entropy(similarity, torch.zeros(len(similarity), dtype=torch.long, device=pixels.device))
    return loss / present if present > 1 else 0 * features.sum(), roles[1].sum() / roles[1].shape[1]


def patches(method: str, script: ModuleType) -> list[tuple[object, str, object]]:
    """What to put in place of what, for the usual way."""
    from common import losses

    places = [(script, "pseudo_label", usual_pseudo_label), (losses, "cross_entropy", usual_cross_entropy)]
    if method == "cps":
        return places
    return [
        *places,
        (script, "cross_entropy", usual_cross_entropy),
        (script, "masked_percentile", lambda values, valid_mask, q, impl: usual_percentile(values, valid_mask, q)),
        (script, "drop_unreliable", lambda label, entropy, threshold, **_: usual_drop(label, entropy, threshold)),
        (script, "contrast_loss", usual_contrast_loss),
    ]


def compare_steps(method: str, device: torch.device) -> None:
    """Time a training step of `method` on random pictures: with the kernels, and with the usual way in their place."""
    # The one place where a kernel's file needs the scripts, and only when asked for.
    script = importlib.import_module(method)
    from common import runtime

    cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = cuda  # as in training
    size, count, backbone = (512, 8, "resnet50") if cuda else (128, 2, "resnet18")
    flags = ["--data", "voc", "--weights", "none", "--backbone", backbone, "--crop-size", str(size), "-b", str(count)]
    flags += ["--max-iters", "1000"] + (["--warmup-iters", "0"] if method == "u2pl" else [])
    args = script.parse_args([*flags, "--device", device.type, "--amp", "bf16" if cuda else "off"])
    amp = torch.bfloat16 if cuda else None
    rt = runtime.Runtime(device, 0, 1, amp, torch.amp.GradScaler(device.type, enabled=False), False)
    data = SimpleNamespace(num_classes=21, background=0, unlabelled=range(1000))
    torch.manual_seed(0)
    networks = {name: rt.place(network).train() for name, network in script.build_networks(args, data, rt).items()}
    optimizer = torch.optim.SGD([p for f in networks.values() for p in f.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8),
        "valid_mask": torch.ones(count, size, size, dtype=torch.bool),
        "target": torch.randint(0, 21, (count, size, size), generator=generator, dtype=torch.uint8),
    }
    batches = [{key: value.to(device) for key, value in batch.items()}] * (3 if method == "cps" else 2)
    usual_networks, lists, keys = dict(networks), [], []
    if method == "u2pl":
        bank = networks["bank"]
        bank.keys.copy_(F.normalize(torch.randn(bank.keys.shape, generator=generator), dim=2))
        bank.filled.fill_(bank.keys.shape[1])
        lists, keys = list(bank.keys.float().cpu()), [bank.keys]
        usual_networks["bank"] = SimpleNamespace(lists=lists, keys=bank.keys, filled=bank.filled)

    def step(networks: dict) -> Tensor:
        return script.train_step(networks, optimizer, batches, 0, args, data, rt)["loss"]

    print(f"step of {method}: {backbone}, {count} + {count} pictures of {size} x {size}, {device.type}")
    timings, peaks = {}, {}
    for name in ("usual", "kernels", "usual again", "kernels again"):
        with ExitStack() as stack:
            if method == "u2pl":  # every pixel may be an anchor: untrained networks are sure of nothing
                stack.enter_context(mock.patch.object(script, "SURE", 0.0))
            for place in patches(method, script) if name.startswith("usual") else ():
                stack.enter_context(mock.patch.object(*place))
            held = lists if name.startswith("usual") else keys
            call = functools.partial(step, usual_networks if name.startswith("usual") else networks)
            timings[name] = time_gpu(call, capture=False, milliseconds=5000) if cuda else time_cpu(call, 5)
            peaks[name] = timings[name].peak if cuda else peak_cpu(call)
            peaks[name] += sum(keys.nbytes for keys in held if keys.device.type == device.type)
        print(f"{name:14}{1e3 * timings[name].median:9.1f} ms, peak {peaks[name] / 1e9:.3f} GB", flush=True)
    usual, kernels = ([way, f"{way} again"] for way in ("usual", "kernels"))
    time = sum(timings[name].median for name in usual) / sum(timings[name].median for name in kernels)
    memory = sum(peaks[name] for name in usual) / sum(peaks[name] for name in kernels)
    print(f"usual / kernels: time {time:.2f}, memory of step and bank {memory:.2f}")
