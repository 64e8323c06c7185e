"""Time the operations: `python -m kernels.benchmark` on a GPU, `--device cpu` for the references on a CPU.

Each operation is checked first: every provider against the first one. Then one row for each operation, shape and provider:

    eager      the usual way in PyTorch: interpolate, then torch's own functions at full resolution
    compile    the same under torch.compile
    triton     the kernel (on a CPU "torch", the reference)

with the median time and its 20th and 80th percentiles, the time from a CUDA graph (without launches by the host), the peak of
the memory that the call allocates, the bytes that the operation must move at least and the share of the measured copy
bandwidth that this makes, the share of the bound by exponentials (16 a cycle and multiprocessor), and whether the operation
meets its gate (bf16 on an H200). Gate, speed-up and shares go by the graph's time where there is one: what the GPU takes,
without the host's calls, and with inputs that may still lie in the L2 cache: a share of the bandwidth may exceed 1.

`--step cps` or `--step u2pl` times a whole training step, once with this package and once the usual way.
"""

import argparse
import csv
import datetime
import functools
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cross_entropy, drop_unreliable, masked_percentile, memory_contrast, pseudo_label
from kernels.step import compare_steps
from kernels.timing import Machine, gpu_machine, time_cpu, time_gpu, triton_version
from kernels.usual import usual_contrast, usual_cross_entropy, usual_drop, usual_percentile, usual_pseudo_label

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


def with_gradient(loss: Callable[..., Tensor], variable: Tensor, *inputs: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient of its sum."""
    value = loss(variable, *inputs, **options)
    total = value if value.ndim == 0 else value.sum()
    return value.detach(), *torch.autograd.grad(total, variable)


def contrast_inputs(classes: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """U2PL's sizes: 256 anchors a class, 50 negatives an anchor, 256 features; on a CPU a bank of 2000 keys a class."""
    generator = torch.Generator().manual_seed(0)
    capacity = 30_000 if device.type == "cuda" else 2000
    anchors, positives = (torch.randn(*shape, 256, generator=generator) for shape in ((classes, 256), (classes,)))
    bank = F.normalize(torch.randn(classes, capacity, 256, generator=generator), dim=2).half()
    indices = torch.randint(0, capacity, (classes, 256, 50), generator=generator, dtype=torch.int32)
    anchors = anchors.to(device, dtype).requires_grad_()
    return [anchors, *(x.to(device) for x in (positives, bank, indices, torch.arange(classes, dtype=torch.int32)))]


def operations(
    shape: Shape, dtype: torch.dtype, device: torch.device, gates: dict[str, float], wanted: str = "all"
) -> dict[str, Op]:
    """The operations on random inputs of a shape; smooth logits, a tenth of the labels ignored.

    The inputs of `memory_contrast` and `cross_entropy_full`, which are large, are made only if `wanted` is theirs or "all".
    """
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

    def both_ways(usual: Callable, kernel: Callable, *inputs: Tensor) -> dict[str, Callable]:
        """The providers of a loss with its gradient; only the loss is compiled."""
        fast = {"compile": torch.compile(usual, dynamic=False)} if device.type == "cuda" else {}
        losses = {"eager": usual, **fast, impl: part(kernel, impl=impl)}
        return {name: part(with_gradient, loss, *inputs) for name, loss in losses.items()}

    part = functools.partial
    ops = {
        "cross_entropy": Op(
            both_ways(usual_cross_entropy, cross_entropy, logits, target),
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
    if wanted in ("all", "memory_contrast"):
        contrast = contrast_inputs(shape.c, dtype, device)
        ops["memory_contrast"] = Op(
            both_ways(usual_contrast, memory_contrast, *contrast),
            shape.c * 256 * (50 * (256 * 2 + 4) + 256 * (item + 4)),
            shape.c * 256 * 51,
            GATES["memory_contrast"] if gates and shape.c == 19 else None,  # whatever the size of the crop
            2e-2 if half else 2e-5,
        )
    if wanted in ("all", "cross_entropy_full") and device.type == "cuda":  # on a CPU there is only torch's own
        large = F.interpolate(logits.detach().float(), size, mode="bilinear", align_corners=True).to(dtype).contiguous()
        ops["cross_entropy_full"] = Op(
            both_ways(usual_cross_entropy, cross_entropy, large.requires_grad_(), target),
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
        eager = best if provider == "eager" else eager
        gate = op.gate_us if provider == "triton" else None
        fast = gate and 1e6 * best <= gate and (eager is None or eager / best >= LEAST_SPEEDUP.get(name, 0))
        row = {
            "op": name, "shape": shape, "dtype": dtype, "provider": provider, "median_us": f"{1e6 * timing.median:.1f}",
            "p20_us": f"{1e6 * timing.low:.1f}", "p80_us": f"{1e6 * timing.high:.1f}",
            "graph_us": f"{1e6 * timing.graph:.1f}" if timing.graph else "",
            "speedup": f"{eager / best:.2f}" if eager else "",
            "peak_mb": "" if timing.peak is None else f"{timing.peak / 1e6:.1f}", "least_mb": f"{op.least_bytes / 1e6:.1f}",
            "bandwidth_share": f"{op.least_bytes / best / machine.bandwidth:.3f}" if cuda else "",
            "exponentials_share": f"{op.exponentials / best / machine.exponentials:.3f}" if cuda and op.exponentials else "",
            "gate_us": gate or "", "gate": "" if not gate else "met" if fast else "missed",
            "gpu": machine.gpu, "driver": machine.driver, "torch": torch.__version__, "triton": triton_version(),
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        rows.append(row)
        shown = f"{name:20}{shape!s:24}{dtype:6}{provider:9}{row['median_us']:>11}{row['p20_us']:>11}{row['p80_us']:>11}"
        print(shown + f"{row['graph_us']:>10}{row['speedup']:>9}{row['peak_mb']:>10}{row['gate']:>8}", flush=True)
    return rows


GATES = {  # microseconds on an H200, at the shapes of VOC and Cityscapes; CPS's own crops may take half as much again
    "cross_entropy": 70,
    "pseudo_label": 45,
    "percentile": 80,
    "cross_entropy_full": 105,
    "memory_contrast": 85,
}


LEAST_SPEEDUP = {"cross_entropy": 4}  # over eager, part of its gate


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
    parser.add_argument("--step", choices=["cps", "u2pl"], help="time a whole training step instead")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(default: cuda)")
    args = parser.parse_args()
    if args.device == "cpu" and args.op == "cross_entropy_full":
        parser.error("--op cross_entropy_full: on a CPU that is torch's own cross-entropy, nothing to compare")
    known = ["eager", "compile", "triton"] if args.device == "cuda" else ["eager", "torch"]
    if not set(args.provider) <= set(known):
        parser.error(f"--provider {','.join(args.provider)}: of {','.join(known)} on {args.device}")
    if args.step and (args.csv or args.plot or args.dtype or args.shape or args.provider or args.op != "all"):
        parser.error("--step takes --device alone: its shapes and types are fixed")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible: nothing timed (--device cpu times the references)")
        return
    device = torch.device(args.device)
    if args.step:
        compare_steps(args.step, device)
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
        for name, op in operations(shape, DTYPES[dtype], device, gates, args.op).items():
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
