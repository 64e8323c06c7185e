"""Time the operations: `python -m kernels.benchmark` on a GPU, `--device cpu` for the references on a CPU.

Each operation is checked first: every provider against the first one. Then one row for each operation, shape and provider:

    eager      the usual way in PyTorch: interpolate, then torch's own functions at full resolution
    compile    the same under torch.compile
    triton     the kernel (on a CPU "torch", the reference)

with the median time and its 20th and 80th percentiles, the time from a CUDA graph (without launches by the host), the peak of
the memory that the call allocates, the bytes that the operation must move at least and the share of the measured copy
bandwidth that this makes, the share of the bound by exponentials (16 a cycle and multiprocessor), and whether the operation
meets its gate (bf16 on an H200, by the graph's time: what the GPU takes, without the host's calls).

`--step cps` times a whole training step, once with this package and once the usual way.
"""

import argparse
import csv
import datetime
import functools
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import PseudoLabel, cross_entropy, drop_unreliable, masked_percentile, pseudo_label

SHAPES = ["8x21x129x129:513x513", "4x19x193x193:769x769", "8x21x128x128:512x512", "4x19x200x200:800x800"]
CPU_SHAPES = ["2x21x129x129:513x513", "4x11x48x48:192x192"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PERCENTILES = [5.0, 20.0, 40.0, 60.0, 80.0, 95.0]
COLUMNS = [
    "op", "shape", "dtype", "provider", "median_us", "p20_us", "p80_us", "graph_us", "speedup", "peak_mb", "least_mb",
    "bandwidth_share", "exponentials_share", "gate_us", "gate", "gpu", "driver", "torch", "triton", "date",
]  # fmt: skip


class Shape(NamedTuple):
    """Logits (n,c,h,w) for labels (n,height,width)."""

    n: int
    c: int
    h: int
    w: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.n}x{self.c}x{self.h}x{self.w}:{self.height}x{self.width}"

    @property
    def pixels(self) -> int:
        """Of the labels of the whole batch."""
        return self.n * self.height * self.width


class Op(NamedTuple):
    """An operation to time.

    Attributes:
        providers: name -> a function of no arguments that returns tensors to compare.
        least_bytes: that must be moved: inputs once, outputs once.
        exponentials: that must be computed.
        gate_us: time on an H200 that the kernel must not exceed; None without one.
        tolerance: of the comparison, relative to the largest value.
    """

    providers: dict[str, Callable[[], tuple[Tensor, ...]]]
    least_bytes: float
    exponentials: float
    gate_us: float | None
    tolerance: float


def usual_cross_entropy(
    logits: Tensor, target: Tensor, *, ignore_index: int = 255, reduction: str = "mean", impl: str = ""
) -> Tensor:
    """Interpolate to full resolution, unless there already, then torch's cross-entropy, which wants int64 labels."""
    full = logits.float()
    if logits.shape[2:] != target.shape[1:]:
        full = F.interpolate(full, target.shape[1:], mode="bilinear", align_corners=True)
    return F.cross_entropy(full, target.long(), ignore_index=ignore_index, reduction=reduction)


def usual_pseudo_label(
    logits: Tensor, size: tuple[int, int], *, with_confidence: bool = False, with_entropy: bool = False, impl: str = ""
) -> PseudoLabel:
    """Interpolate to full resolution, then softmax, max and entropy."""
    full = F.interpolate(logits.detach().float(), size, mode="bilinear", align_corners=True)
    if not with_confidence and not with_entropy:
        return PseudoLabel(full.argmax(1).to(torch.uint8), None, None)
    probs = full.softmax(1)
    confidence, label = probs.max(1)
    entropy = -(probs * probs.clamp_min(1e-12).log()).sum(1)
    return PseudoLabel(label.to(torch.uint8), confidence, entropy)


def usual_percentile(values: Tensor, valid_mask: Tensor, q: list[float]) -> Tensor:
    """To the host and numpy, as the released code of U2PL does."""
    return torch.from_numpy(np.percentile(values[valid_mask].cpu().numpy(), q)).float().to(values.device)


def usual_drop(label: Tensor, entropy: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and count."""
    label = label.masked_fill(entropy >= threshold, 255)
    return label, (label != 255).sum()


def with_gradient(loss: Callable[..., Tensor], logits: Tensor, target: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Loss and its gradient."""
    value = loss(logits, target, **options)
    return value.detach(), *torch.autograd.grad(value, logits)


def operations(shape: Shape, dtype: torch.dtype, device: torch.device, gates: dict[str, float]) -> dict[str, Op]:
    """The operations on random inputs of a shape; smooth logits, a tenth of the labels ignored."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.height, shape.width)
    torch._dynamo.reset()  # or the compiler gives up after eight shapes
    half = dtype != torch.float32
    # As the networks give them: channels_last on CUDA, so that the kernels' copy to planes is in the time.
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    logits = (3 * torch.randn(shape[:4], generator=generator)).to(device, dtype, memory_format=memory_format).requires_grad_()
    target = torch.randint(0, shape.c, (shape.n, *size), generator=generator, dtype=torch.uint8)
    target[:, : shape.height // 10] = 255
    target = target.to(device)
    impl = "triton" if device.type == "cuda" else "torch"
    every = {"with_confidence": True, "with_entropy": True}
    found = pseudo_label(logits, size, **every, impl=impl)
    valid = target != 255
    threshold = masked_percentile(found.entropy, valid, 80.0, impl=impl).reshape(())
    item, low, full = logits.element_size(), shape.n * shape.c * shape.h * shape.w, shape.pixels * shape.c

    def providers(usual: Callable, kernel: Callable, compiled: bool = True) -> dict[str, Callable]:
        fast = {"compile": functools.partial(torch.compile(usual.func, dynamic=False), *usual.args, **usual.keywords)}
        return {"eager": usual, **(fast if compiled and device.type == "cuda" else {}), impl: kernel}

    part = functools.partial
    ops = {
        "cross_entropy": Op(
            {
                "eager": part(with_gradient, usual_cross_entropy, logits, target),
                "compile": part(with_gradient, torch.compile(usual_cross_entropy, dynamic=False), logits, target),
                impl: part(with_gradient, cross_entropy, logits, target, impl=impl),
            },
            2 * low * item + shape.pixels,
            2 * full,
            gates.get("cross_entropy"),
            2e-2 if half else 2e-5,
        ),
        "pseudo_label": Op(
            providers(part(usual_pseudo_label, logits, size, **every), part(pseudo_label, logits, size, **every, impl=impl)),
            low * item + 9 * shape.pixels,
            full,
            gates.get("pseudo_label"),
            1e-3,
        ),
        "label alone": Op(
            providers(part(usual_pseudo_label, logits, size), part(pseudo_label, logits, size, impl=impl)),
            low * item + shape.pixels,
            0,
            None,
            1e-3,
        ),
        "percentile": Op(
            providers(
                part(usual_percentile, found.entropy, valid, PERCENTILES),
                part(masked_percentile, found.entropy, valid, PERCENTILES, impl=impl),
                compiled=False,
            ),
            5 * shape.pixels,
            0,
            gates.get("percentile"),
            1e-6,
        ),
        "drop_unreliable": Op(
            providers(
                part(usual_drop, found.label, found.entropy, threshold),
                part(drop_unreliable, found.label, found.entropy, threshold, impl=impl),
            ),
            6 * shape.pixels,
            0,
            None,
            0,
        ),
    }
    if device.type != "cuda":
        del ops["cross_entropy"].providers["compile"]
        return ops
    large = F.interpolate(logits.detach().float(), size, mode="bilinear", align_corners=True).to(dtype).requires_grad_()
    ops["cross_entropy_full"] = Op(
        {
            "eager": part(with_gradient, usual_cross_entropy, large, target),
            "compile": part(with_gradient, torch.compile(usual_cross_entropy, dynamic=False), large, target),
            impl: part(with_gradient, cross_entropy, large, target, impl=impl),
        },
        3 * full * item + shape.pixels,
        2 * full,
        gates.get("cross_entropy_full"),
        2e-2 if half else 2e-5,
    )
    return ops


def tensors(result: object) -> list[Tensor]:
    """The tensors of a result."""
    return [result] if isinstance(result, Tensor) else [each for each in result if each is not None]


def check(name: str, op: Op) -> None:
    """Exit unless all providers agree with the first; labels may differ at ties, in one pixel of a thousand."""
    expected = tensors(next(iter(op.providers.values()))())
    for provider, function in op.providers.items():
        for i, (found, wanted) in enumerate(zip(tensors(function()), expected, strict=True)):
            if wanted.dtype == torch.uint8:
                wrong = (found != wanted).double().mean().item()
                limit = 1e-3
            else:
                wrong = (found.double() - wanted.double()).abs().max().item()
                limit = op.tolerance * max(wanted.double().abs().max().item(), 1e-30)
            if not wrong <= limit:
                sys.exit(f"{name}: {provider}'s result {i} is off by {wrong:.2e}, more than {limit:.2e}")


class Machine(NamedTuple):
    """What the rows say of the device; bandwidth in bytes a second, exponentials a second."""

    gpu: str
    driver: str
    bandwidth: float
    exponentials: float


def gpu_machine() -> Machine:
    """Measure a copy, and ask nvidia-smi for clock and driver."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        driver, clock = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
        clock = float(clock)
    except (OSError, ValueError, subprocess.CalledProcessError):
        driver, clock = "unknown", float("nan")
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median") / 1e3
    properties = torch.cuda.get_device_properties(0)
    exponentials = properties.multi_processor_count * 16 * clock * 1e6
    return Machine(properties.name, driver, 2 * source.numel() / seconds, exponentials)


class Timing(NamedTuple):
    """Seconds: median, 20th and 80th percentile, and from a CUDA graph; bytes at the peak."""

    median: float
    low: float
    high: float
    graph: float | None
    peak: int | None


def time_gpu(function: Callable, capture: bool) -> Timing:
    """By Triton's own benchmark, which clears the L2 cache between calls; with `capture` also as a CUDA graph.

    Only what can be captured may ask for it: a failed capture leaves the random generator unusable.
    """
    import triton

    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    median, low, high = (ms / 1e3 for ms in triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8]))
    graph = triton.testing.do_bench_cudagraph(function, return_mode="median") / 1e3 if capture else None
    return Timing(median, low, high, graph, peak)


def time_cpu(function: Callable, repeats: int = 9) -> Timing:
    """Repeated calls after one to warm up."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    low, *_, high = statistics.quantiles(seconds, n=5)
    return Timing(statistics.median(seconds), low, high, None, None)


def rows_of(name: str, op: Op, shape: Shape, dtype: str, wanted: list[str], machine: Machine, cuda: bool) -> list[dict]:
    """Check and time one operation: one row a provider."""
    check(name, op)
    rows, eager = [], None
    for provider, function in op.providers.items():
        if wanted and provider not in wanted:
            continue
        capture = not (name == "percentile" and provider == "eager")  # that one goes to the host
        timing = time_gpu(function, capture) if cuda else time_cpu(function)
        best = timing.graph or timing.median
        eager = timing.median if provider == "eager" else eager
        gate = op.gate_us if provider == "triton" else None
        row = {
            "op": name, "shape": shape, "dtype": dtype, "provider": provider, "median_us": f"{1e6 * timing.median:.1f}",
            "p20_us": f"{1e6 * timing.low:.1f}", "p80_us": f"{1e6 * timing.high:.1f}",
            "graph_us": f"{1e6 * timing.graph:.1f}" if timing.graph else "",
            "speedup": f"{eager / timing.median:.2f}" if eager else "",
            "peak_mb": "" if timing.peak is None else f"{timing.peak / 1e6:.1f}", "least_mb": f"{op.least_bytes / 1e6:.1f}",
            "bandwidth_share": f"{op.least_bytes / best / machine.bandwidth:.3f}" if cuda else "",
            "exponentials_share": f"{op.exponentials / best / machine.exponentials:.3f}" if cuda and op.exponentials else "",
            "gate_us": gate or "", "gate": "" if not gate else "met" if 1e6 * best <= gate else "missed",
            "gpu": machine.gpu, "driver": machine.driver, "torch": torch.__version__, "triton": triton_version(),
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        rows.append(row)
        shown = f"{name:20}{shape!s:24}{dtype:6}{provider:9}{row['median_us']:>11}{row['p20_us']:>11}{row['p80_us']:>11}"
        print(shown + f"{row['graph_us']:>10}{row['speedup']:>9}{row['peak_mb']:>10}{row['gate']:>8}", flush=True)
    return rows


def triton_version() -> str:
    """Or a dash where it is not installed."""
    try:
        import triton
    except ImportError:
        return "-"
    return triton.__version__


GATES = {  # microseconds on an H200, at the shapes of VOC and Cityscapes; CPS's own crops may take half as much again
    "cross_entropy": 70,
    "pseudo_label": 45,
    "percentile": 80,
    "cross_entropy_full": 105,
}


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


def parse_shape(text: str) -> Shape:
    """`NxCxhxw:HxW`."""
    if not re.fullmatch(r"\d+(x\d+){3}:\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text}: give NxCxhxw:HxW, such as {SHAPES[0]}")
    return Shape(*map(int, re.split("[x:]", text)))


def main() -> None:
    """Time what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.benchmark", description="Time the operations against the usual way."
    )
    names = ["all", *GATES, "label alone", "drop_unreliable"]
    parser.add_argument("--op", choices=names, default="all", help="(default: all)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the logits (default: bf16, on a CPU fp32)")
    parser.add_argument("--shape", type=parse_shape, nargs="+", metavar="NxCxhxw:HxW", help=f"(default: {' '.join(SHAPES)})")
    parser.add_argument("--provider", type=lambda text: text.split(","), default=[], help="eager,compile,triton (default: all)")
    parser.add_argument("--csv", metavar="FILE", help="write the rows there, with the machine and versions in each")
    parser.add_argument("--plot", metavar="FILE", help="draw the medians as bars")
    parser.add_argument("--step", choices=["cps"], help="time a whole training step instead")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(default: cuda)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible: nothing timed (--device cpu times the references)")
        return
    device = torch.device(args.device)
    if args.step:
        step_cps(device)
        return
    cuda = args.device == "cuda"
    dtype = args.dtype or ("bf16" if cuda else "fp32")
    machine = gpu_machine() if cuda else Machine("CPU", "", 0, 0)
    if cuda:
        print(
            f"{machine.gpu}, driver {machine.driver}, torch {torch.__version__}, triton {triton_version()}, "
            f"copy {machine.bandwidth / 1e12:.2f} TB/s"
        )
    else:
        print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}")
    head = f"{'op':20}{'shape':24}{'type':6}{'provider':9}{'median us':>11}{'20 %':>11}{'80 %':>11}"
    print(head + f"{'graph us':>10}{'speedup':>9}{'peak MB':>10}{'gate':>8}")
    rows = []
    for shape in args.shape or map(parse_shape, SHAPES if cuda else CPU_SHAPES):
        relaxed = 1 if str(shape) in SHAPES[:2] else 1.5
        gated = "H200" in machine.gpu and dtype == "bf16" and str(shape) in SHAPES
        gates = {name: limit * relaxed for name, limit in GATES.items()} if gated else {}
        for name, op in operations(shape, DTYPES[dtype], device, gates).items():
            if args.op in ("all", name):
                rows += rows_of(name, op, shape, dtype, args.provider, machine, cuda)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    if args.plot:
        plot(rows, args.plot)


def plot(rows: list[dict], path: str) -> None:
    """Bars of the medians, an axis for each shape."""
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(str(row["shape"]) for row in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(6 * len(shapes), 4), squeeze=False, layout="constrained")
    for axis, shape in zip(axes[0], shapes, strict=True):
        here = [row for row in rows if str(row["shape"]) == shape]
        ops = list(dict.fromkeys(row["op"] for row in here))
        providers = list(dict.fromkeys(row["provider"] for row in here))
        for i, provider in enumerate(providers):
            heights = [
                next((float(r["median_us"]) for r in here if (r["op"], r["provider"]) == (op, provider)), 0) for op in ops
            ]
            axis.bar(np.arange(len(ops)) + i * 0.8 / len(providers), heights, 0.8 / len(providers), label=provider)
        axis.set(title=shape, ylabel="median (µs)", yscale="log")
        axis.set_xticks(np.arange(len(ops)) + 0.4 - 0.4 / len(providers), ops, rotation=30, ha="right")
        axis.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
