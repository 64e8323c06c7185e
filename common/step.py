"""Time a whole training step with the kernels, and the usual way in their place.

    python -m common.step cps [u2pl ...] [--amp off] [--compile] [--device cpu] [--csv FILE]

Both ways train the same networks on the same random batch. The usual way interpolates the logits to
full resolution and calls PyTorch's own functions there (`kernels/usual.py`).

For U2PL it also has the data structures of the released code: percentiles by NumPy on the host,
queues of keys in the host's memory, a loop over the classes, and a class's whole queue copied to
the device to draw from it. Both ways take the same negatives, the paper's, at most as many new
ones a class and step. Both start with full banks, whose memory on the device counts.

ST's and ST++'s steps are that of `supervised`. Of AEL and PS-MT the usual way replaces labels and
losses alone: AEL's pool and its search for regions, and PS-MT's T-VAT are the same in both.

A step here is forward, backward, a plain SGD step and the teacher's average. Every step has the
same images in all roles. The loader, copies to the device, momentum, the schedule and the log are
left out.

On a GPU the share of our kernels in a step is printed, too: of the time that the GPU computes, by
PyTorch's profiler.
"""

import argparse
import copy
import csv
import datetime
import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import ael
import cps
import mean_teacher
import psmt
import supervised
import u2pl
import unimatch
from common import adaptive, losses
from common.deeplabv3plus import DeepLabV3Plus
from common.run import place
from kernels.timing import peak_cpu, time_cpu, time_gpu
from kernels.usual import (
    usual_cross_entropy,
    usual_drop,
    usual_percentile,
    usual_pseudo_label,
    usual_soft_consistency,
)

CLASSES = 21  # of VOC
LEARNING_RATE = 1e-3  # small: random labels are not to be learned
MILLISECONDS, REPEATS = 1000, 5  # for how long a GPU, and how often a CPU, repeats a step

# What stands in a method's step for the usual way: (module, name, function).
USUAL = {
    "supervised": [(losses, "cross_entropy", usual_cross_entropy)],
    "cps": [
        (cps, "pseudo_label", usual_pseudo_label),
        (losses, "cross_entropy", usual_cross_entropy),
    ],
    "mean_teacher": [
        (mean_teacher, "soft_consistency", usual_soft_consistency),
        (losses, "cross_entropy", usual_cross_entropy),
    ],
    "unimatch": [
        (unimatch, "pseudo_label", usual_pseudo_label),
        (unimatch, "cross_entropy", usual_cross_entropy),
        (losses, "cross_entropy", usual_cross_entropy),
    ],
    "u2pl": [
        (u2pl, "pseudo_label", usual_pseudo_label),
        (losses, "cross_entropy", usual_cross_entropy),
        (u2pl, "cross_entropy", usual_cross_entropy),
        (u2pl, "masked_percentile", usual_percentile),
        (u2pl, "drop_unreliable", usual_drop),
    ],
    "ael": [
        (adaptive, "pseudo_label", usual_pseudo_label),
        (adaptive, "cross_entropy", usual_cross_entropy),
        (losses, "cross_entropy", usual_cross_entropy),
    ],
    "psmt": [
        (psmt, "pseudo_label", usual_pseudo_label),
        (psmt, "cross_entropy", usual_cross_entropy),
        (losses, "cross_entropy", usual_cross_entropy),
    ],
}


class Way(NamedTuple):
    """One of the two ways to do a training step.

    Attributes:
        step: does a training step, returns its loss.
        replaced: what to put in place of what meanwhile, see `USUAL`.
        bank: the memory bank's tensors.
    """

    step: Callable[[], Tensor]
    replaced: list[tuple[object, str, object]]
    bank: list[Tensor]


def settings(method: str, asked: argparse.Namespace) -> argparse.Namespace:
    """The method's settings: on a GPU VOC's with crops of 512 pixels, on a CPU small ones.

    Args:
        method: a key of `WAYS`.
        asked: the command line.
    """
    device = torch.device(asked.device)
    cuda = device.type == "cuda"
    size, count, backbone = (512, 8, "resnet50") if cuda else (128, 2, "resnet18")
    flags = ["--data", "voc", "--weights", "none", "--backbone", backbone, "--max-iters", "1000"]
    flags += ["--crop-size", str(size), "-b", str(count)]
    flags += ["--device", device.type, "--amp", asked.amp or ("bf16" if cuda else "off")]
    flags += ["--compile"] if asked.compile else []
    if method == "cutmix_seg":
        return mean_teacher.parse_args([*flags, "--cutmix"])
    if method == "u2pl":
        return u2pl.parse_args([*flags, "--warmup-iters", "0"])
    scripts = {each.__name__: each for each in (supervised, cps, mean_teacher, unimatch, ael, psmt)}
    return scripts[method].parse_args(flags)


def random_batch(args: argparse.Namespace, device: torch.device) -> dict[str, Tensor]:
    """What a loader gives, on the device: images, labels, no padding."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, args.crop_size, args.crop_size)
    batch = {
        "image": torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8),
        "valid_mask": torch.ones(shape, dtype=torch.bool),
        "target": torch.randint(0, CLASSES, shape, generator=generator, dtype=torch.uint8),
    }
    return {key: value.to(device) for key, value in batch.items()}


def trained(network: torch.nn.Module, args: argparse.Namespace) -> torch.nn.Module:
    """The callable to train through, as in `Run.parallel`."""
    return torch.compile(network) if args.compile else network


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """The optimiser's step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def supervised_ways(args: argparse.Namespace, device: torch.device) -> tuple[Way, Way]:
    """A step of SupOnly: the usual way, and with the kernels."""
    network = place(DeepLabV3Plus.from_settings(args, CLASSES), args, device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    batch, network = random_batch(args, device), trained(network, args)

    def step() -> Tensor:
        loss = supervised.train_step(network, batch, args)["loss"]
        update(optimizer, loss)
        return loss

    return Way(step, USUAL["supervised"], []), Way(step, [], [])


def cps_ways(args: argparse.Namespace, device: torch.device) -> tuple[Way, Way]:
    """A step of CPS: the usual way, and with the kernels."""
    f1, f2 = (
        place(DeepLabV3Plus.from_settings(args, CLASSES), args, device).train() for _ in range(2)
    )
    optimizer = torch.optim.SGD([*f1.parameters(), *f2.parameters()], lr=LEARNING_RATE)
    batch, f1, f2 = random_batch(args, device), trained(f1, args), trained(f2, args)

    def step() -> Tensor:
        loss = cps.train_step(f1, f2, batch, [batch, batch], 0, args, background=0)["loss"]
        update(optimizer, loss)
        return loss

    return Way(step, USUAL["cps"], []), Way(step, [], [])


def mean_teacher_ways(args: argparse.Namespace, device: torch.device) -> tuple[Way, Way]:
    """A step of Mean Teacher, or with `cutmix` of CutMix-Seg: the usual way, and the kernels'."""
    student = place(DeepLabV3Plus.from_settings(args, CLASSES), args, device).train()
    teacher = copy.deepcopy(student).requires_grad_(False).train(not args.cutmix)
    optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
    batch = random_batch(args, device)
    both = trained(student, args), teacher, batch

    def step() -> Tensor:
        if args.cutmix:
            inputs = (*both, [batch, batch], args.unsup_weight, 0, args)
            loss = mean_teacher.cutmix_step(*inputs)["loss"]
        else:
            loss = mean_teacher.noise_step(*both, batch, args.unsup_weight, args)["loss"]
        update(optimizer, loss)
        mean_teacher.ema_update(teacher, student, args.ema_decay, args.cutmix)
        return loss

    return Way(step, USUAL["mean_teacher"], []), Way(step, [], [])


def unimatch_ways(args: argparse.Namespace, device: torch.device) -> tuple[Way, Way]:
    """A step of UniMatch: the usual way, and with the kernels."""
    network = place(unimatch.Network.from_settings(args, CLASSES), args, device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    batch, network = random_batch(args, device), trained(network, args)
    views = {f"image_strong_{view}": batch["image"] for view in range(1, args.views + 1)}
    unlabelled = {**batch, **views}
    # Untrained networks are sure of nothing: every pixel has a label.
    args.conf_thresh = 0.0

    def step() -> Tensor:
        loss = unimatch.train_step(network, batch, unlabelled, unlabelled, 0, args)["loss"]
        update(optimizer, loss)
        return loss

    return Way(step, USUAL["unimatch"], []), Way(step, [], [])


def u2pl_ways(args: argparse.Namespace, device: torch.device) -> tuple[Way, Way]:
    """A step of U2PL: the usual way, and with the kernels; each with a full bank of its own."""
    student = place(u2pl.Network(args, CLASSES), args, device).train()
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
    batch = random_batch(args, device)

    bank = u2pl.MemoryBank(CLASSES, u2pl.CAPACITY, student.feature_channels, device)
    generator = torch.Generator().manual_seed(0)
    bank.keys.copy_(F.normalize(torch.randn(bank.keys.shape, generator=generator), dim=2))
    bank.filled.fill_(u2pl.CAPACITY)
    # `keys` and `filled` are what the step's measures read.
    queues = SimpleNamespace(
        lists=list(bank.keys.float().cpu()), keys=bank.keys, filled=bank.filled
    )

    learner = trained(student, args)

    def step(bank) -> Tensor:
        measured = u2pl.train_step(learner, teacher, bank, batch, batch, 0, args.max_iters, args)
        update(optimizer, measured["loss"])
        u2pl.ema_update(teacher, student, args.ema_decay)
        return measured["loss"]

    # Every pixel may be an anchor: untrained networks are sure of nothing.
    sure = (u2pl, "SURE", 0.0)
    contrast = (u2pl, "contrast_loss", usual_contrast_loss)
    return (
        Way(lambda: step(queues), [*USUAL["u2pl"], contrast, sure], queues.lists),
        Way(lambda: step(bank), [sure], [bank.keys]),
    )


def ael_ways(args: argparse.Namespace, device: torch.device) -> tuple[Way, Way]:
    """A step of AEL: the usual way, and with the kernels; both change the same bank and pool."""
    student = place(ael.Network(args, CLASSES), args, device).train()
    teacher = copy.deepcopy(student).requires_grad_(False).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
    batch, learner = random_batch(args, device), trained(student, args)
    bank = adaptive.ConfidenceBank(CLASSES, args.bank_momentum, device)
    pool = adaptive.ImagePool(args.pool, CLASSES, args.crop_size, device)
    allowed = torch.arange(1, CLASSES, device=device)
    # Untrained networks are sure of nothing: every pixel has a label.
    args.conf_thresh = 0.0

    def step() -> Tensor:
        batches = [batch, batch, batch]
        loss = ael.train_step(learner, teacher, bank, pool, allowed, batches, 0, args)["loss"]
        update(optimizer, loss)
        ael.ema_update(teacher, student, args.ema_decay)
        return loss

    return Way(step, USUAL["ael"], []), Way(step, [], [])


def psmt_ways(args: argparse.Namespace, device: torch.device) -> tuple[Way, Way]:
    """A step of PS-MT with two teachers: the usual way, and with the kernels."""
    student = place(psmt.Network.from_settings(args, CLASSES), args, device).train()
    teachers = [copy.deepcopy(student).requires_grad_(False).train() for _ in range(args.teachers)]
    optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
    batch, learner = random_batch(args, device), trained(student, args)
    batch["image_strong"] = batch["image"]
    # Untrained networks are sure of nothing: every pixel has a label.
    args.conf_thresh = 0.0

    def step() -> Tensor:
        weight, active, iteration = args.unsup_weight, 0, 0
        measured = psmt.train_step(learner, teachers, active, batch, batch, weight, iteration, args)
        loss = measured["loss"]
        update(optimizer, loss)
        psmt.ema_update(teachers[0], student, args.ema_decay)
        return loss

    return Way(step, USUAL["psmt"], []), Way(step, [], [])


def usual_contrast_loss(
    features: Tensor, features_t: Tensor, roles: tuple[Tensor, Tensor, Tensor], queues
) -> tuple[Tensor, Tensor]:
    """`u2pl.contrast_loss` the usual way.

    Args:
        features, features_t, roles: as there.
        queues: its attribute `lists` holds for each class a tensor (keys,D) float32 on the host.
    """
    # (P,D), P the pixels of all images
    vectors, vectors_t = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (features, features_t))
    loss, present = 0.0, 0
    for c, (member, candidate, negative) in enumerate(zip(*roles)):
        if member.sum() == 0:
            continue
        present += 1
        positive = vectors_t[member].float().mean(0)

        # New negatives enter the queue.
        new = vectors_t[negative]
        new = new[torch.randperm(len(new), device=new.device)[: u2pl.PUSHED]].float().cpu()
        queues.lists[c] = torch.cat([queues.lists[c], new])[-u2pl.CAPACITY :]

        # The contrast of the class's anchors.
        pixels = vectors[candidate].float()
        if len(pixels) == 0 or len(queues.lists[c]) == 0:
            continue
        loss = loss + usual_class_contrast(pixels, positive, queues.lists[c])
    candidates = roles[1]
    share = candidates.sum() / candidates.shape[1]
    return loss / present if present > 1 else 0 * features.sum(), share


def usual_class_contrast(pixels: Tensor, positive: Tensor, queue: Tensor) -> Tensor:
    """The mean contrast of a class's anchors.

    Args:
        pixels: (P,D), the features to draw anchors from.
        positive: (D,).
        queue: (keys,D) on the host.
    """
    device = pixels.device
    anchors = pixels[torch.randint(len(pixels), (u2pl.ANCHORS,), device=device)]
    bank = queue.to(device)
    rows = torch.randint(len(bank), (u2pl.ANCHORS * u2pl.NEGATIVES,), device=device)
    negatives = bank[rows].view(u2pl.ANCHORS, u2pl.NEGATIVES, -1)
    others = torch.cat([positive.expand(u2pl.ANCHORS, 1, -1), negatives], 1)  # (A,1+M,D)
    similarity = F.cosine_similarity(anchors[:, None], others, dim=2) / u2pl.TEMPERATURE
    target = torch.zeros(len(similarity), dtype=torch.long, device=device)
    return F.cross_entropy(similarity, target)


WAYS = {
    "supervised": supervised_ways,
    "unimatch": unimatch_ways,
    "cps": cps_ways,
    "mean_teacher": mean_teacher_ways,
    "cutmix_seg": mean_teacher_ways,
    "u2pl": u2pl_ways,
    "ael": ael_ways,
    "psmt": psmt_ways,
}


class Found(NamedTuple):
    """What was measured of a way.

    Attributes:
        seconds: median of a step.
        low, high: its 20th and 80th percentile.
        peak: bytes of a step's peak, with the bank's on the device.
        busy: seconds of a step in which the GPU computes or copies; None on a CPU.
        share: of our kernels in them; None on a CPU.
    """

    seconds: float
    low: float
    high: float
    peak: int
    busy: float | None = None
    share: float | None = None


def measure(way: Way, device: torch.device) -> Found:
    """Time a way's step."""
    with ExitStack() as stack:
        for place_and_function in way.replaced:
            stack.enter_context(mock.patch.object(*place_and_function))
        if device.type == "cuda":
            timing = time_gpu(way.step, capture=False, milliseconds=MILLISECONDS)
            peak, gpu = timing.peak, busy_and_share(way.step)
        else:
            timing = time_cpu(way.step, REPEATS)
            peak, gpu = peak_cpu(way.step), (None, None)
    bank = sum(keys.nbytes for keys in way.bank if keys.device.type == device.type)
    return Found(timing.median, timing.low, timing.high, peak + bank, *gpu)


def busy_and_share(step: Callable[[], Tensor]) -> tuple[float, float]:
    """Seconds that a GPU computes or copies in a step, and the share of our Triton kernels."""
    options = {"activities": [torch.profiler.ProfilerActivity.CUDA], "acc_events": True}
    with torch.profiler.profile(**options) as profile:
        step()
        torch.cuda.synchronize()
    names = kernel_names()
    ours = every = 0.0  # microseconds
    for event in profile.key_averages():
        every += event.self_device_time_total
        if event.key in names:
            ours += event.self_device_time_total
    return every / 1e6, ours / every


def kernel_names() -> set[str]:
    """Names of our Triton kernels, as a profiler shows them."""
    modules = [module for key, module in sys.modules.items() if key.startswith("kernels.")]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def compare_steps(method: str, asked: argparse.Namespace) -> list[dict[str, object]]:
    """Time a training step of `method` both ways, twice in turn, and print what was found.

    Returns:
        A row for each of the four, for a table.
    """
    args, device = settings(method, asked), torch.device(asked.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as in training
    torch._dynamo.reset()
    torch.manual_seed(0)
    usual, kernels = WAYS[method](args, device)

    count, size = args.batch_size, args.crop_size
    images = f"{count} + {count} images" if method != "supervised" else f"{count} images"
    how = f"{device.type}, amp {args.amp}" + (", compiled" if args.compile else "")
    print(f"step of {method}: {args.backbone}, {images} of {size} x {size}, {how}")
    found: dict[str, list[Found]] = {"usual": [], "kernels": []}
    for _ in range(2):
        for name, way in (("usual", usual), ("kernels", kernels)):
            found[name].append(measure(way, device))
            print_measured(name, found[name][-1])
    usual_times, times = ([each.seconds for each in found[name]] for name in found)
    usual_peaks, peaks = ([each.peak for each in found[name]] for name in found)
    time, memory = sum(usual_times) / sum(times), sum(usual_peaks) / sum(peaks)
    print(f"usual / kernels: time {time:.2f}, memory of step and bank {memory:.2f}", flush=True)

    settled = {"method": method, "backbone": args.backbone, "batch_size": count, "crop_size": size}
    settled |= {"amp": args.amp, "compile": args.compile, "torch": torch.__version__}
    settled |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}
    settled |= {"date": datetime.date.today().isoformat()}
    pairs = [(name, each) for name, several in found.items() for each in several]
    return [settled | {"way": name} | each._asdict() for name, each in pairs]


def print_measured(name: str, found: Found) -> None:
    """A line."""
    spread = f"{1e3 * found.low:.1f} to {1e3 * found.high:.1f}"
    line = f"{name:14}{1e3 * found.seconds:9.1f} ms ({spread}), peak {found.peak / 1e9:.3f} GB"
    if found.share is not None:
        line += f", GPU busy {1e3 * found.busy:.1f} ms, our kernels {100 * found.share:.1f} % of it"
    print(line, flush=True)


def main() -> None:
    """Time what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m common.step",
        description="Time a whole training step with the kernels, and the usual way.",
    )
    add = parser.add_argument
    add("methods", choices=list(WAYS), nargs="+", metavar="method", help=", ".join(WAYS))
    add("--device", choices=["cuda", "cpu"], default="cuda", help="(default: cuda)")
    add("--amp", choices=["off", "bf16", "fp16"], help="(default: bf16, on a CPU off)")
    add("--compile", action="store_true", help="torch.compile the networks that are trained")
    add("--csv", metavar="FILE", help="write a row a measurement there")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible: nothing timed (--device cpu times a small step)")
        return
    rows = []
    for method in asked.methods:
        rows += compare_steps(method, asked)
        if asked.csv:
            with open(asked.csv, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
