"""Compile the kernels ahead of time and read off what they cost, without a GPU.

    python -m kernels.aot [--target sm_90] [--dtype bf16]

The public functions are called with the shapes of the presets, on empty tensors in the host's
memory. Their launches do not run: each is compiled as it would be on a GPU of the target, and
listed once. One row a compiled kernel: registers a thread, bytes spilled to local memory, stack,
shared memory, and how many instructions a warp issues for each of its pixels and classes (for
kernels over a flat map: for each value; for the contrast: for each negative). These come from the
disassembled cubin: the bodies of the loops over the classes, divided by the pixels of a lane and by
how often the compiler unrolled the loop, or for kernels without a loop the whole program.

For sm_90 the last columns bound a launch's time on an H200 from below: the largest of the time to
issue the instructions, the time for which they keep each of the arithmetic units busy, and the time
to move the tensors once, from memory and not from the L2 cache; and which of these it is. A row of
the bank counts as often as it is drawn. The bound counts a lane's empty places: a cell
of 128 -> 512 has 16 pixels, in 20 places. The mixed consistency counts as if no program read both
tensors of targets; one that does takes twice as long. The bound leaves out the instructions outside
the loops over the classes (some 3 a pixel and class), most lanes that idle, whatever does not
overlap, and the launches around the kernel. It takes the clock to be 1.755 GHz: at 1.98 GHz, to
which an H200 may boost, all but the bound of the bandwidth is 11 % lower. It is an estimate, not a
measurement.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels import (
    cross_entropy,
    drop_unreliable,
    masked_percentile,
    memory_contrast,
    pseudo_label,
    soft_consistency,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# (batch, classes, nodes, outputs): VOC and Cityscapes, each at an odd crop and at the even one of
# CPS; CamVid.
SHAPES = [
    (8, 21, 129, 513),
    (8, 21, 128, 512),
    (4, 19, 193, 769),
    (4, 19, 200, 800),
    (8, 11, 81, 321),
]

BYTES_PER_SECOND = 4.8e12  # memory bandwidth in NVIDIA's data sheet of the H200
# Of an H200's 132 multiprocessors, each with 4 schedulers that issue one a cycle.
CYCLES_PER_SECOND = 132 * 4 * 1.755e9

# Instruction -> the unit of its scheduler that it keeps busy, and for how many cycles; all others
# are comparisons, moves and integer operations, 2 cycles. A multiprocessor of sm_90 does 128 float
# multiply-adds, 64 integer ones, 64 comparisons or integer operations, or 16 exponentials a cycle,
# that is 4, 2, 2 and 0.5 warps. Source: CUDA C++ Programming Guide, "Throughput of Native
# Arithmetic Instructions", capability 9.0.
UNITS = {
    "FFMA": ("multiply-add", 1),
    "FADD": ("multiply-add", 1),
    "FMUL": ("multiply-add", 1),
    "IMAD": ("multiply-add", 2),
    "MUFU": ("exponential", 8),
}
OTHERS = ("compare", 2)
# First letters of what loads, stores, exchanges, jumps or waits, or belongs to the unit for whole
# warps.
NO_ARITHMETIC = (
    "LD", "ST", "SHFL", "ATOM", "RED", "BRA", "BSYNC", "BSSY", "BAR", "WARPSYNC", "U", "S2", "EXIT",
    "CALL",
)  # fmt: skip


class Use(NamedTuple):
    """A call of a public function whose launches the table shows.

    Attributes:
        name: what is computed and for which shape.
        call: calls the function, and its backward pass.
    """

    name: str
    call: Callable[[], object]


class Launch(NamedTuple):
    """A launch that did not run: the kernel, what Triton compiled, the grid, the arguments."""

    kernel: str
    compiled: object
    grid: tuple[int, ...]
    arguments: dict[str, object]


class NoGPU:
    """What Triton asks of a driver before it compiles; there is no GPU behind it."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        """Triton keeps what it has compiled by this name."""
        return self.target

    def get_current_stream(self, device: str) -> int:
        """Nothing runs in it."""
        return 0


@contextmanager
def dry_run(target: str) -> Iterator[list[Launch]]:
    """Inside, the launches of the public functions are compiled for `target` and listed, not run.

    Tensors in the host's memory are taken for the GPU's. For kernels that are compiled, that is
    where TRITON_INTERPRET has not been set when `kernels` was imported.
    """
    launches = []
    run = JITFunction.run

    def compile_only(kernel, *values, grid, warmup, **options):
        if TARGETS[target].backend == "hip":
            options.pop("maxnreg", None)  # as `register_limit` does on such a machine
        compiled = run(kernel, *values, grid=grid, warmup=True, **options)
        arguments = {**dict(zip(kernel.arg_names, values)), **options}
        launches.append(Launch(kernel.__name__, compiled, grid, arguments))
        return compiled

    with (
        mock.patch.object(triton.runtime.driver, "_active", NoGPU(target)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.dict(
            os.environ, TRITON_INTERPRET="1"
        ),  # so that the kernels are chosen for the host's tensors, too
    ):
        yield launches


def uses(dtype: torch.dtype, shapes: list[tuple[int, int, int, int]] = SHAPES) -> list[Use]:
    """The calls that the table shows.

    All options at the first two shapes, at the others what the scripts use.
    """
    found = []
    for index, (n, classes, nodes, outputs) in enumerate(shapes):
        found += uses_at(dtype, n, classes, nodes, outputs, every=index < 2)
    for n, classes in ((8, 21), (1, 150)):
        logits, target = inputs(dtype, n, classes, 513, 513)
        call = with_backward(cross_entropy, logits, target)
        found.append(Use(f"full size, {classes} classes", call))

    values, valid, label = (
        torch.empty(8, 513, 513),
        torch.ones(8, 513, 513, dtype=torch.bool),
        inputs(dtype, 8, 2, 1, 513)[1],
    )
    queries = [5.0, 20.0, 40.0, 60.0, 80.0, 95.0]
    found.append(Use("percentile, 6 queries", lambda: masked_percentile(values, valid, queries)))
    found.append(Use("drop_unreliable", lambda: drop_unreliable(label, values, 0.5)))
    for width in (256, 64):
        anchors = torch.empty(19, 256, width, dtype=dtype).requires_grad_()
        bank = torch.empty(19, 30_000, width, dtype=torch.float16)
        positives = torch.empty(19, width)
        rows, order = (
            torch.zeros(19, 256, 50, dtype=torch.int32),
            torch.zeros(19, dtype=torch.int32),
        )
        call = with_backward(memory_contrast, anchors, positives, bank, rows, order)
        found.append(Use(f"memory_contrast, {width} features", call))
    return found


def uses_at(
    dtype: torch.dtype, n: int, classes: int, nodes: int, outputs: int, every: bool
) -> list[Use]:
    """The calls on interpolated logits of one shape."""
    logits, target = inputs(dtype, n, classes, nodes, outputs)
    size, shape = (outputs, outputs), f"{nodes}->{outputs}"
    weights = {"pixel_weight": torch.empty(target.shape), "class_weight": torch.empty(classes)}
    targets, second = torch.empty_like(logits), torch.empty_like(logits)
    mask = torch.ones(target.shape, dtype=torch.bool)
    mixed = {"mask": mask, "second": second}

    def consistency(x: Tensor, **options) -> Tensor:
        return soft_consistency(x, targets, mask, **options).loss

    found = [
        Use(f"cross_entropy {shape}", with_backward(cross_entropy, logits, target)),
        Use(f"  map of losses {shape}", lambda: cross_entropy(logits, target, reduction="none")),
        Use(f"pseudo_label {shape}", lambda: pseudo_label(logits, size)),
        Use(f"  and entropy {shape}", lambda: pseudo_label(logits, size, with_entropy=True)),
        Use(f"soft_consistency {shape}", with_backward(consistency, logits)),
    ]
    if every:
        maps = {"with_confidence": True, "with_entropy": True}
        found += [
            Use(f"  and confidence {shape}", lambda: pseudo_label(logits, size, **maps)),
            Use(
                f"cross_entropy, weighted {shape}",
                with_backward(cross_entropy, logits, target, **weights),
            ),
            Use(f"  without gradient {shape}", lambda: cross_entropy(logits.detach(), target)),
            Use(
                f"  thresholded {shape}",
                lambda: pseudo_label(logits, size, threshold=0.5, valid_mask=mask),
            ),
            Use(f"  mixed {shape}", with_backward(consistency, logits, **mixed)),
            Use(
                f"  cross-entropy {shape}",
                with_backward(consistency, logits, mode="cross_entropy"),
            ),
            Use(f"  kl {shape}", with_backward(consistency, logits, mode="kl")),
            Use(f"  loss alone {shape}", lambda: consistency(logits.detach())),
        ]
    return found


def inputs(
    dtype: torch.dtype, n: int, classes: int, nodes: int, outputs: int
) -> tuple[Tensor, Tensor]:
    """Logits with gradient, whose values nobody reads, and labels."""
    logits = torch.empty(n, classes, nodes, nodes, dtype=dtype).requires_grad_()
    return logits, torch.zeros(n, outputs, outputs, dtype=torch.uint8)


def with_backward(
    loss: Callable[..., Tensor], variable: Tensor, *others: Tensor, **options
) -> Callable[[], object]:
    """A call of `loss` and of its backward pass."""
    return lambda: torch.autograd.grad(loss(variable, *others, **options).sum(), variable)


class Cost(NamedTuple):
    """What a cubin says.

    Attributes:
        registers, spilled, stack, shared: registers a thread; the others in bytes.
        instructions: issued for each pixel and class (or value, or negative), by a warp for 32 at
            once.
        cycles: for which the same keep each unit of `UNITS` busy.
    """

    registers: int
    spilled: int
    stack: int
    shared: int
    instructions: float
    cycles: dict[str, float]


def cost(launch: Launch) -> Cost:
    """Read the cubin of a launch on an NVIDIA target."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(launch.compiled.asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", cubin)
        code = disassembled(tool("nvdisasm", "-c", cubin))
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    shared = launch.compiled.metadata.shared
    counts = instructions(launch, code)
    cycles = dict.fromkeys(("multiply-add", "compare", "exponential"), 0.0)
    for instruction, count in counts.items():
        if not instruction.startswith(NO_ARITHMETIC):
            unit, busy = UNITS.get(instruction, OTHERS)
            cycles[unit] += count * busy
    return Cost(registers, local, stack, shared, sum(counts.values()), cycles)


def places(launch: Launch) -> int:
    """Pixels (or negatives) that a lane (or a warp) handles in each turn of a loop.

    0 for a kernel without loops over classes or negatives.
    """
    arguments = launch.arguments
    if "ROWS" in arguments:
        return arguments["ROWS"] * arguments["COLUMNS"]
    if "KEEP" in arguments:
        return 0 if arguments["KEEP"] else 1
    return arguments.get("TOGETHER", 0)


def instructions(launch: Launch, code: "Disassembly") -> dict[str, float]:
    """How many instructions of each name a warp issues for each unit of `work`."""
    counts = dict.fromkeys((name(line) for line in code.lines), 0.0)
    count = places(launch)
    if count:
        networks = 2 if "targets_ptr" in launch.arguments else 1
        for body in class_loops(code):
            for line in body:
                counts[name(line)] += 1 / unrolled(body, count, networks) / count
        return counts

    arguments = launch.arguments
    of_lane = (
        arguments["C"]
        if "KEEP" in arguments
        else arguments.get("BLOCK", 1) / (32 * arguments.get("num_warps", 4))
    )
    for line in code.lines:
        counts[name(line)] += 1 / of_lane
    return counts


def work(launch: Launch) -> float:
    """Pixels times classes (or values, or 32 times negatives) that the lanes of a launch handle.

    0 where the code's length says nothing of the time: for the small kernels, and for the
    percentile's later passes, whose code holds two branches of which a block takes one.
    """
    arguments = launch.arguments
    programs = launch.grid[0] * (launch.grid[1] if len(launch.grid) > 1 else 1)
    if "ROWS" in arguments:
        return cell_tiles(arguments) * places(launch) * arguments["C"]
    if "TOGETHER" in arguments:
        turns = triton.cdiv(arguments["M"], arguments["TOGETHER"])
        return programs * 32 * turns * arguments["TOGETHER"]
    if "KEEP" in arguments:
        return programs * arguments["LANES"] * arguments["C"]
    if launch.kernel.endswith("sum_kernel") or arguments.get("PASS", 0) > 0:
        return 0
    return programs * arguments.get("BLOCK", 0)


def cell_tiles(arguments: dict[str, object]) -> float:
    """How many tiles of cells the lanes pass over: of each as many as its pixels fill."""
    rows, columns = (
        torch.ceil(arguments[f"first_{axis}_ptr"].diff() / arguments[constant])
        for axis, constant in (("y", "ROWS"), ("x", "COLUMNS"))
    )
    lanes = 1.0
    if "gradient_ptr" in arguments:  # the last lane of a program repeats a cell
        lanes = arguments["LANES"] / (arguments["LANES"] - 1)
    return len(arguments["logits_ptr"]) * (rows.sum() * columns.sum()).item() * lanes


def traffic(launch: Launch) -> int:
    """Bytes of a launch's tensors, each moved once.

    Of a memory bank only the rows count that the indices name.
    """
    arguments = launch.arguments
    sizes = {key: value.nbytes for key, value in arguments.items() if isinstance(value, Tensor)}
    if "bank_ptr" in sizes:
        row = arguments["D"] * arguments["bank_ptr"].element_size()
        sizes["bank_ptr"] = min(sizes["bank_ptr"], arguments["indices_ptr"].numel() * row)
    return sum(sizes.values())


def bound(launch: Launch, found: Cost) -> tuple[float, str]:
    """Seconds that a launch takes an H200 at least, and why: issue, a unit, or the bandwidth."""
    warps = work(launch) / 32
    seconds = {name: warps * cycles / CYCLES_PER_SECOND for name, cycles in found.cycles.items()}
    seconds["issue"] = warps * found.instructions / CYCLES_PER_SECOND
    seconds["bandwidth"] = traffic(launch) / BYTES_PER_SECOND
    largest = max(seconds, key=seconds.get)
    return seconds[largest], largest


def tool(name: str, *arguments: object) -> str:
    """Output of one of the CUDA tools that come with Triton."""
    return subprocess.run(
        [TOOLS / name, *map(str, arguments)], capture_output=True, text=True, check=True
    ).stdout


class Disassembly(NamedTuple):
    """Instructions in order, and the index that each label points to."""

    lines: list[str]
    labels: dict[str, int]


def disassembled(code: str) -> Disassembly:
    """Parse the output of nvdisasm."""
    lines, labels = [], {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_[\w.]+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            if not instruction[1].startswith("NOP"):
                lines.append(instruction[1])
    return Disassembly(lines, labels)


def class_loops(code: Disassembly) -> list[list[str]]:
    """Bodies of the innermost loops: from the target of each backward jump to the jump."""
    spans = []
    for end, line in enumerate(code.lines):
        if jump := re.search(r"\bBRA\b.*`\((\.L_[\w.]+)\)", line):
            start = code.labels.get(jump[1], end)
            if start < end and not any(start <= other < end for other, _ in spans):
                spans.append((start, end))
    return [code.lines[start : end + 1] for start, end in spans]


def name(line: str) -> str:
    """Of an instruction, without its predicate and its modifiers."""
    return re.sub(r"^@!?U?P\w+ ", "", line).split()[0].split(".")[0]


def unrolled(body: list[str], pixels: int, networks: int) -> int:
    """How many classes one turn of a loop handles.

    Each pixel takes one maximum or one exponential a class; up to two exponentials where a loop
    makes the probabilities of two `networks`. Were a loop over one of two networks unrolled twice,
    its instructions would count double; with Triton 3.6.0 none is.
    """
    maxima = sum(name(line) == "FMNMX" for line in body)
    exponentials = sum("MUFU.EX2" in line for line in body)
    return max(maxima // pixels, exponentials // (networks * pixels), 1)


def launches_of(use: Use, target: str) -> dict[str, Launch]:
    """Name in the table -> the launches of a call, each compiled variant once."""
    with dry_run(target) as launches:
        use.call()
    found = {}
    for launch in launches:
        if not any(launch.compiled is other.compiled for other in found.values()):
            number = sum(launch.kernel == other.kernel for other in found.values())
            kernel = launch.kernel.removesuffix("_kernel")
            found[f"{kernel} {number + 1}" if number else kernel] = launch
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description="Registers, memory and instructions of the kernels, without a GPU."
    )
    parser.add_argument(
        "--target",
        choices=list(TARGETS),
        default="sm_90",
        help="architecture (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="bf16", help="of the logits (default: %(default)s)"
    )
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: with it kernels are interpreted, not compiled")
    target, cuda = args.target, TARGETS[args.target].backend == "cuda"
    print(
        f"{target}, {args.dtype} logits, Triton {triton.__version__}; "
        "bound: of a launch on an H200, an estimate"
    )
    if cuda:
        head = f"{'call':34}{'kernel':20}{'registers':>10}{'spilled':>9}{'stack':>7}{'shared':>8}"
        print(head + f"{'instructions':>14}{'bound (us)':>12}  by")
    seen = []
    for use in uses(DTYPES[args.dtype], SHAPES if cuda else SHAPES[:1]):
        for kernel, launch in launches_of(use, target).items():
            if any(launch.compiled is other for other in seen):
                continue
            seen.append(launch.compiled)
            print(f"{use.name:34}{kernel:20}" + (row(launch, target) if cuda else "compiles"))


def row(launch: Launch, target: str) -> str:
    """The numbers of a launch; the bound for sm_90 only."""
    found = cost(launch)
    text = f"{found.registers:>10}{found.spilled:>9}{found.stack:>7}{found.shared:>8}"
    if not work(launch):
        return text + f"{'-':>14}{'-':>12}  -"
    text += f"{found.instructions:>14.1f}"
    if target != "sm_90":
        return text + f"{'-':>12}  -"
    seconds, what = bound(launch, found)
    return text + f"{1e6 * seconds:>12.1f}  {what}"


if __name__ == "__main__":
    main()
