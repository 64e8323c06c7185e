"""Time the operations: `python -m kernels.benchmark` on a GPU, or on a CPU with `--device cpu`.

Each operation is checked first: every provider against the first one. Then there is one row for
each operation, shape and provider:

    eager      the usual way in PyTorch: interpolate, then torch's own functions at full resolution
    autocast   the same as under autocast: logits of 16 bits are interpolated in 16 bits
    compile    the first under torch.compile, mode "max-autotune-no-cudagraphs"
    torch      the reference beside the kernel, which is what runs on a CPU
    triton     the kernel

A row gives
- the median time of a call and its 20th and 80th percentiles;
- the time from a CUDA graph, which the host's launches are not part of;
- the time that the host needs to ask for a call, without waiting for the GPU;
- the peak of the memory that the call allocates;
- the bytes that the operation must move at least, and the share of the measured copy bandwidth that
  this makes;
- the share of the bound by exponentials (16 a cycle and multiprocessor);
- whether the operation meets its gate (bf16 on an H200).

`--check` only compares, and times nothing. What disagrees with the first provider is named and not
timed; the exit status is then 1.

Gate and shares go by the graph's time where there is one, the speed-up where both have one: what
the GPU takes, without the host's calls, and with inputs that may still lie in the L2 cache. A share
of the bandwidth may therefore exceed 1.

`python -m common.step` times whole training steps.
"""

import argparse
import csv
import datetime
import functools
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import (
    PseudoLabel,
    cross_entropy,
    drop_unreliable,
    masked_percentile,
    memory_contrast,
    pseudo_label,
    soft_consistency,
)
from kernels.timing import Machine, Timing, gpu_machine, time_cpu, time_gpu, triton_version
from kernels.usual import (
    autocast_cross_entropy,
    usual_contrast,
    usual_cross_entropy,
    usual_drop,
    usual_percentile,
    usual_pseudo_label,
    usual_soft_consistency,
)

SHAPES = [
    "8x21x129x129:513x513",
    "4x19x193x193:769x769",
    "8x21x128x128:512x512",
    "4x19x200x200:800x800",
]
CPU_SHAPES = ["2x21x129x129:513x513", "4x11x48x48:192x192"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PERCENTILES = [5.0, 20.0, 40.0, 60.0, 80.0, 95.0]
COLUMNS = [
    "op", "shape", "dtype", "provider", "median_us", "p20_us", "p80_us", "graph_us", "host_us",
    "speedup", "peak_mb", "least_mb", "bandwidth_share", "exponentials_share", "gate_us", "gate",
    "gpu", "driver", "torch", "triton", "date",
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
        """Label pixels of the whole batch."""
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


def with_gradient(
    loss: Callable[..., Tensor], variable: Tensor, *inputs: Tensor, **options
) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient of its sum."""
    value = loss(variable, *inputs, **options)
    total = value if value.ndim == 0 else value.sum()
    return value.detach(), *torch.autograd.grad(total, variable)


class Inputs(NamedTuple):
    """Random inputs of a shape.

    Attributes:
        shape: their shape.
        logits: (n,c,h,w) with gradient.
        target: (n,height,width) uint8; a tenth is ignored.
        found: labels, confidence and entropy of the logits.
        impl: what runs the kernels' side of the comparison.
    """

    shape: Shape
    logits: Tensor
    target: Tensor
    found: PseudoLabel
    impl: str

    @property
    def size(self) -> tuple[int, int]:
        """Of the labels."""
        return self.shape.height, self.shape.width

    @property
    def tolerance(self) -> float:
        """Of a loss and its gradient, relative to the largest value."""
        return 2e-5 if self.logits.dtype == torch.float32 else 2e-2


def random_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The inputs of a shape, on the device."""
    generator = torch.Generator().manual_seed(0)
    cuda, size = device.type == "cuda", (shape.height, shape.width)
    # As the networks give them: channels_last on CUDA, so that the kernels' copy to planes is in
    # the time.
    layout = torch.channels_last if cuda else torch.contiguous_format
    logits = 3 * torch.randn(shape[:4], generator=generator)
    logits = logits.to(device, dtype, memory_format=layout).requires_grad_()
    target = torch.randint(0, shape.c, (shape.n, *size), generator=generator, dtype=torch.uint8)
    target[:, : shape.height // 10] = 255
    impl = "triton" if cuda else "torch"
    found = pseudo_label(logits, size, with_confidence=True, with_entropy=True, impl=impl)
    return Inputs(shape, logits, target.to(device), found, impl)


def contrast_inputs(classes: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Inputs of U2PL's sizes: 256 anchors a class, 50 negatives an anchor, 256 features.

    On a CPU the bank has 2000 keys a class.
    """
    options = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    capacity = 30_000 if device.type == "cuda" else 2000
    anchors = torch.randn(classes, 256, 256, **options).to(dtype).requires_grad_()
    positives = torch.randn(classes, 256, **options)
    bank = F.normalize(torch.randn(classes, capacity, 256, **options), dim=2).half()
    indices = torch.randint(0, capacity, (classes, 256, 50), dtype=torch.int32, **options)
    return [anchors, positives, bank, indices, torch.arange(classes, device=device).int()]


def providers(
    usual: Callable, kernel: Callable, *inputs, impl: str, compiled: bool = True, **options
) -> dict[str, Callable]:
    """The providers of an operation without gradient."""
    found = {"eager": usual}
    if impl == "triton" and compiled:
        found["compile"] = compiled_usual(usual)
    for each in ("torch", "triton")[: 2 if impl == "triton" else 1]:
        found[each] = functools.partial(kernel, impl=each)
    return {name: functools.partial(call, *inputs, **options) for name, call in found.items()}


def both_ways(
    usual: Callable, kernel: Callable, *inputs: Tensor, impl: str, autocast: Callable | None = None
) -> dict[str, Callable]:
    """The providers of a loss with its gradient; only the loss is compiled."""
    losses = {"eager": usual}
    if autocast:
        losses["autocast"] = autocast
    losses |= providers(usual, kernel, impl=impl)
    return {name: functools.partial(with_gradient, loss, *inputs) for name, loss in losses.items()}


def compiled_usual(usual: Callable) -> Callable:
    """The usual way at torch.compile's best; its CUDA graphs are left to the benchmark."""
    return torch.compile(usual, dynamic=False, mode="max-autotune-no-cudagraphs")


def cross_entropy_op(inputs: Inputs, gates: dict[str, float]) -> Op:
    """Cross-entropy with its gradient."""
    shape, logits = inputs.shape, inputs.logits
    autocast = autocast_cross_entropy if logits.dtype.itemsize == 2 else None
    pair = usual_cross_entropy, cross_entropy
    return Op(
        both_ways(*pair, logits, inputs.target, impl=inputs.impl, autocast=autocast),
        least_bytes=2 * logits.nbytes + shape.pixels,
        exponentials=2 * shape.pixels * shape.c,
        gate_us=gates.get("cross_entropy"),
        tolerance=inputs.tolerance,
    )


def pseudo_label_op(inputs: Inputs, gates: dict[str, float]) -> Op:
    """Labels with confidence and entropy."""
    shape, logits = inputs.shape, inputs.logits
    every = {"with_confidence": True, "with_entropy": True}
    return Op(
        providers(usual_pseudo_label, pseudo_label, logits, inputs.size, impl=inputs.impl, **every),
        least_bytes=logits.nbytes + 9 * shape.pixels,
        exponentials=shape.pixels * shape.c,
        gate_us=gates.get("pseudo_label"),
        tolerance=1e-3,
    )


def label_op(inputs: Inputs, gates: dict[str, float]) -> Op:
    """Labels alone."""
    return Op(
        providers(usual_pseudo_label, pseudo_label, inputs.logits, inputs.size, impl=inputs.impl),
        least_bytes=inputs.logits.nbytes + inputs.shape.pixels,
        exponentials=0,
        gate_us=None,
        tolerance=1e-3,
    )


def threshold_op(inputs: Inputs, gates: dict[str, float]) -> Op:
    """Labels of the valid pixels whose confidence reaches a threshold, and their number."""
    shape, logits = inputs.shape, inputs.logits
    options = {"threshold": 0.8, "valid_mask": inputs.target != 255}
    return Op(
        providers(
            usual_pseudo_label, pseudo_label, logits, inputs.size, impl=inputs.impl, **options
        ),
        least_bytes=logits.nbytes + 2 * shape.pixels,
        exponentials=shape.pixels * shape.c,
        gate_us=None,
        tolerance=1e-3,
    )


def consistency_op(inputs: Inputs, gates: dict[str, float], mixed: bool = False) -> Op:
    """The squared distance of two networks' probabilities with its gradient; `mixed` by a mask."""
    shape, logits, valid = inputs.shape, inputs.logits, inputs.target != 255
    targets = logits.detach().roll(1, 1)  # each class has the logits of its neighbour
    mixture, tensors = {}, 3  # what is read and written of the logits' size
    if mixed:  # in a quarter of each image the pixels read other targets
        mask = torch.zeros_like(valid)
        mask[:, : shape.height // 2, : shape.width // 2] = True
        mixture, tensors = {"mask": mask, "second": targets.roll(1, 1)}, 4

    def loss_of(consistency: Callable) -> Callable[..., Tensor]:
        def loss(x: Tensor, **options) -> Tensor:
            return consistency(x, targets, valid, **mixture, **options).loss

        return loss

    usual, kernel = loss_of(usual_soft_consistency), loss_of(soft_consistency)
    return Op(
        both_ways(usual, kernel, logits, impl=inputs.impl),
        least_bytes=tensors * logits.nbytes + (2 if mixed else 1) * shape.pixels,
        exponentials=6 * shape.pixels * shape.c,
        gate_us=None,
        tolerance=inputs.tolerance,
    )


def percentile_op(inputs: Inputs, gates: dict[str, float]) -> Op:
    """Six percentiles of the entropy."""
    maps = (inputs.found.entropy, inputs.target != 255, PERCENTILES)
    return Op(
        providers(usual_percentile, masked_percentile, *maps, impl=inputs.impl, compiled=False),
        least_bytes=5 * inputs.shape.pixels,
        exponentials=0,
        gate_us=gates.get("percentile"),
        tolerance=1e-6,
    )


def drop_op(inputs: Inputs, gates: dict[str, float]) -> Op:
    """U2PL's mask of the pixels whose entropy is among the highest fifth."""
    label, entropy = inputs.found.label, inputs.found.entropy
    valid = inputs.target != 255
    threshold = masked_percentile(entropy, valid, 80.0, impl=inputs.impl).reshape(())
    return Op(
        providers(usual_drop, drop_unreliable, label, entropy, threshold, impl=inputs.impl),
        least_bytes=6 * inputs.shape.pixels,
        exponentials=0,
        gate_us=None,
        tolerance=0,
    )


def contrast_op(inputs: Inputs, gates: dict[str, float]) -> Op:
    """The contrast of U2PL with its gradient; of the shape it takes the classes alone."""
    classes, logits = inputs.shape.c, inputs.logits
    tensors = contrast_inputs(classes, logits.dtype, logits.device)
    return Op(
        both_ways(usual_contrast, memory_contrast, *tensors, impl=inputs.impl),
        least_bytes=classes * 256 * (50 * (256 * 2 + 4) + 256 * (logits.element_size() + 4)),
        exponentials=classes * 256 * 51,
        # The same whatever the size of the crop.
        gate_us=GATES["memory_contrast"] if gates and classes == 19 else None,
        tolerance=inputs.tolerance,
    )


def full_size_op(inputs: Inputs, gates: dict[str, float]) -> Op:
    """Cross-entropy of logits at full resolution, with its gradient."""
    shape, logits = inputs.shape, inputs.logits
    large = F.interpolate(logits.detach().float(), inputs.size, mode="bilinear", align_corners=True)
    large = large.to(logits.dtype).contiguous().requires_grad_()
    return Op(
        both_ways(usual_cross_entropy, cross_entropy, large, inputs.target, impl=inputs.impl),
        least_bytes=3 * large.nbytes + shape.pixels,
        exponentials=2 * shape.pixels * shape.c,
        gate_us=gates.get("cross_entropy_full"),
        tolerance=inputs.tolerance,
    )


# What --op chooses from.
OPERATIONS = {
    "cross_entropy": cross_entropy_op,
    "pseudo_label": pseudo_label_op,
    "label alone": label_op,
    "thresholded label": threshold_op,
    "soft_consistency": consistency_op,
    "mixed consistency": functools.partial(consistency_op, mixed=True),
    "percentile": percentile_op,
    "drop_unreliable": drop_op,
    "memory_contrast": contrast_op,
    "cross_entropy_full": full_size_op,  # on a GPU only: on a CPU there is only torch's own
}
# Microseconds on an H200, at the shapes of VOC and Cityscapes; CPS's own crops may take half as
# much again.
GATES = {
    "cross_entropy": 70,
    "pseudo_label": 45,
    "percentile": 80,
    "cross_entropy_full": 105,
    "memory_contrast": 85,
}
LEAST_SPEEDUP = {"cross_entropy": 4}  # over eager, part of its gate


def tensors(result: object) -> list[Tensor]:
    """The tensors of a result."""
    return [result] if isinstance(result, Tensor) else [each for each in result if each is not None]


def disagreement(found: object, expected: object, tolerance: float) -> str:
    """What two providers' results differ in; empty where they agree.

    Labels may differ at ties, in one pixel of a thousand.
    """
    for i, (one, other) in enumerate(zip(tensors(found), tensors(expected), strict=True)):
        if other.dtype == torch.uint8:
            wrong, limit = (one != other).double().mean().item(), 1e-3
        else:
            wrong = (one.double() - other.double()).abs().max().item()
            limit = tolerance * max(other.double().abs().max().item(), 1e-30)
        if not wrong <= limit:
            return f"result {i} is off by {wrong:.2e}, more than {limit:.2e}"
    return ""


def agreeing(name: str, op: Op, wanted: list[str]) -> dict[str, Callable]:
    """The wanted providers that agree with the first; the others are named."""
    expected, found = None, {}
    for provider, function in op.providers.items():
        if expected is not None and wanted and provider not in wanted:
            continue
        try:
            result = function()
            expected = result if expected is None else expected
            # Interpolated in 16 bits.
            tolerance = (4 if provider == "autocast" else 1) * op.tolerance
            reason = disagreement(result, expected, tolerance)
        except RuntimeError as error:  # memory, or a compiler's
            reason = str(error).splitlines()[0]
        if reason:
            print(f"{name}: {provider}: {reason}", flush=True)
        elif not wanted or provider in wanted:
            found[provider] = function
    return found


def rows_of(
    name: str, op: Op, shape: Shape, dtype: str, right: dict[str, Callable], machine: Machine
) -> list[dict]:
    """Time one operation: one row a provider."""
    cuda = machine.gpu != "CPU"
    rows, eager = [], None
    for provider, function in right.items():
        capture = not (name == "percentile" and provider == "eager")  # that one goes to the host
        timing = time_gpu(function, capture) if cuda else time_cpu(function)
        if provider == "eager":
            eager = timing
        row = {"op": name, "shape": shape, "dtype": dtype, "provider": provider}
        row |= times_of(timing) | shares_of(op, timing, machine, cuda)
        row |= verdict(name, op.gate_us if provider == "triton" else None, timing, eager)
        row |= {"gpu": machine.gpu, "driver": machine.driver, "torch": torch.__version__}
        row |= {"triton": triton_version(), "date": datetime.date.today().isoformat()}
        rows.append(row)
        print_row(row)
    return rows


def times_of(timing: Timing) -> dict[str, str]:
    """Columns of times and of the peak of memory."""
    return {
        "median_us": f"{1e6 * timing.median:.1f}",
        "p20_us": f"{1e6 * timing.low:.1f}",
        "p80_us": f"{1e6 * timing.high:.1f}",
        "graph_us": f"{1e6 * timing.graph:.1f}" if timing.graph else "",
        "host_us": f"{1e6 * timing.host:.1f}" if timing.host else "",
        "peak_mb": "" if timing.peak is None else f"{timing.peak / 1e6:.1f}",
    }


def shares_of(op: Op, timing: Timing, machine: Machine, cuda: bool) -> dict[str, str]:
    """Columns of the least traffic, and of the shares of what the machine can do."""
    best = timing.graph or timing.median
    found = {"least_mb": f"{op.least_bytes / 1e6:.1f}"}
    found |= {"bandwidth_share": "", "exponentials_share": ""}
    if cuda:
        found["bandwidth_share"] = f"{op.least_bytes / best / machine.bandwidth:.3f}"
        if op.exponentials:
            found["exponentials_share"] = f"{op.exponentials / best / machine.exponentials:.3f}"
    return found


def verdict(
    name: str, gate_us: float | None, timing: Timing, eager: Timing | None
) -> dict[str, object]:
    """Columns of the speed-up over eager, and of the gate.

    Both times are those of a graph, or neither is.
    """
    speedup = None
    if eager:
        graphs = timing.graph and eager.graph
        speedup = eager.graph / timing.graph if graphs else eager.median / timing.median
    found = {"speedup": f"{speedup:.2f}" if speedup else "", "gate_us": "", "gate": ""}
    if gate_us:
        fast = 1e6 * (timing.graph or timing.median) <= gate_us
        fast = fast and (speedup is None or speedup >= LEAST_SPEEDUP.get(name, 0))
        found |= {"gate_us": gate_us, "gate": "met" if fast else "missed"}
    return found


# Column -> its title and width in what is printed.
PRINTED = {
    "op": ("op", -20),
    "shape": ("shape", -24),
    "dtype": ("type", -6),
    "provider": ("provider", -9),
    "median_us": ("median us", 11),
    "p20_us": ("20 %", 11),
    "p80_us": ("80 %", 11),
    "graph_us": ("graph us", 10),
    "host_us": ("host us", 9),
    "speedup": ("speedup", 9),
    "peak_mb": ("peak MB", 10),
    "gate": ("gate", 8),
}


def print_row(row: dict[str, object]) -> None:
    """Print the columns of `PRINTED`."""
    cells = []
    for column, (_, width) in PRINTED.items():
        text = str(row[column])
        cells.append(text.ljust(-width) if width < 0 else text.rjust(width))
    print("".join(cells), flush=True)


def parse_shape(text: str) -> Shape:
    """`NxCxhxw:HxW`."""
    if not re.fullmatch(r"\d+(x\d+){3}:\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text}: give NxCxhxw:HxW, such as {SHAPES[0]}")
    return Shape(*map(int, re.split("[x:]", text)))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.benchmark",
        description="Time the operations against the usual way.",
    )
    add = parser.add_argument
    add("--op", choices=["all", *OPERATIONS], default="all", help="(default: all)")
    add("--dtype", choices=list(DTYPES), help="of the logits (default: bf16, on a CPU fp32)")
    shapes = f"(default: {' '.join(SHAPES)})"
    add("--shape", type=parse_shape, nargs="+", metavar="NxCxhxw:HxW", help=shapes)
    every = "of eager,autocast,compile,torch,triton (default: all)"
    add("--provider", type=lambda text: text.split(","), default=[], help=every)
    add("--check", action="store_true", help="compare the providers' results, time nothing")
    add("--csv", metavar="FILE", help="write the rows there, with machine and versions in each")
    add("--plot", metavar="FILE", help="draw the times as bars")
    add("--rows", metavar="FILE", help="time nothing: draw what an earlier --csv has written there")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="(default: cuda)")
    args = parser.parse_args()
    if args.device == "cpu" and args.op == "cross_entropy_full":
        parser.error(
            "--op cross_entropy_full: on a CPU that is torch's own cross-entropy, "
            "nothing to compare"
        )
    if args.rows and not args.plot:
        parser.error("--rows is for --plot")
    known = ["eager", "autocast", "torch"]
    known += ["compile", "triton"] if args.device == "cuda" else []
    if not set(args.provider) <= set(known):
        given = ",".join(args.provider)
        parser.error(f"--provider {given}: of {','.join(known)} on {args.device}")
    return args


def gates_of(shape: Shape, dtype: str, machine: Machine) -> dict[str, float]:
    """The gates that hold for a shape; none but for bf16 on an H200."""
    if "H200" not in machine.gpu or dtype != "bf16" or str(shape) not in SHAPES:
        return {}
    relaxed = 1 if str(shape) in SHAPES[:2] else 1.5
    return {name: limit * relaxed for name, limit in GATES.items()}


def main() -> None:
    """Time what the command line asks for."""
    args = parse_args()
    if args.rows:
        with open(args.rows, newline="", encoding="utf-8") as file:
            plot(list(csv.DictReader(file)), args.plot)
        return
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        print("no CUDA device is visible: nothing timed (--device cpu times the references)")
        return
    dtype = args.dtype or ("bf16" if cuda else "fp32")
    machine = gpu_machine() if cuda else Machine("CPU", "", 0, 0)
    if cuda:
        versions = f"torch {torch.__version__}, triton {triton_version()}"
        bandwidth = f"copy {machine.bandwidth / 1e12:.2f} TB/s"
        print(f"{machine.gpu}, driver {machine.driver}, {versions}, {bandwidth}")
    else:
        print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if not args.check:
        print_row({column: title for column, (title, _) in PRINTED.items()})

    rows, wrong = [], 0
    for shape in args.shape or map(parse_shape, SHAPES if cuda else CPU_SHAPES):
        torch._dynamo.reset()  # or the compiler gives up after eight shapes
        gates = gates_of(shape, dtype, machine)
        inputs = random_inputs(shape, DTYPES[dtype], torch.device(args.device))
        for name, operation in OPERATIONS.items():
            if args.op in ("all", name) and (cuda or name != "cross_entropy_full"):
                op = operation(inputs, gates)
                right = agreeing(name, op, args.provider)
                wrong += len(set(args.provider or op.providers) & set(op.providers)) - len(right)
                if args.check:
                    print(f"{shape} {dtype} {name}: {', '.join(right)} agree", flush=True)
                    continue
                rows += rows_of(name, op, shape, dtype, right, machine)
                if args.csv:
                    write_rows(rows, args.csv)
    if args.plot:
        plot(rows, args.plot)
    if wrong:
        sys.exit(f"{wrong} results are wrong or missing; they are named above")


def write_rows(rows: list[dict], path: str) -> None:
    """What has been found until now, so that a benchmark that is cut off leaves it."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: list[dict], path: str) -> None:
    """Bars of the time of a call, from the graph where there is one; an axis for each shape."""
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(f"{row['shape']}, {row['dtype']}" for row in rows))
    providers = dict.fromkeys(row["provider"] for row in rows)
    colours = {provider: f"C{i}" for i, provider in enumerate(providers)}
    figure, axes = plt.subplots(
        len(shapes), 1, figsize=(10, 3 * len(shapes)), squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[:, 0], shapes, strict=True):
        times = {
            (row["op"], row["provider"]): float(row["graph_us"] or row["median_us"])
            for row in rows
            if f"{row['shape']}, {row['dtype']}" == shape
        }
        draw_bars(axis, times, colours)
        axis.set(title=shape, ylabel="time (µs)", yscale="log")
    figure.legend(
        [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()],
        colours,
        loc="outside lower center",
        ncols=len(colours),
    )
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_bars(axis, times: dict[tuple[str, str], float], colours: dict[str, str]) -> None:
    """A group of bars for each operation, a colour for each provider.

    Args:
        axis: of matplotlib.
        times: (operation, provider) -> microseconds.
        colours: provider -> colour.
    """
    width = 0.8 / len(colours)
    ops = list(dict.fromkeys(op for op, _ in times))
    for place, op in enumerate(ops):
        here = [provider for provider in colours if (op, provider) in times]
        for i, provider in enumerate(here):
            at = place + (i - (len(here) - 1) / 2) * width
            axis.bar(at, times[op, provider], width, color=colours[provider])
    axis.set_xticks(range(len(ops)), ops, rotation=20, ha="right")


if __name__ == "__main__":
    main()
