"""Compile the kernels ahead of time and read off what they cost: `python -m kernels.aot [--target sm_90]`. Needs no GPU.

One row a kernel and shape: registers a thread, bytes spilled to local memory, stack, shared memory, and the instructions that a
warp issues for each of its pixels and classes (for kernels over a flat map: for each value; for the contrast: for each
negative). The latter two come from the disassembled cubin: the bodies of the loops over the classes, divided by the pixels of a
lane and by how often the compiler unrolled the loop, or for kernels without a loop the whole program. The bound is the time to
issue them all on an H200, 132 multiprocessors x 4 warp instructions a cycle at 1.755 GHz: a floor that no run can beat,
not a measurement.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.contrast import TOGETHER, memory_contrast_kernel
from kernels.cross_entropy import cross_entropy_kernel
from kernels.cross_entropy_full import KEPT_CLASSES, full_size_kernel
from kernels.cross_entropy_full import LANES as FULL_SIZE_LANES
from kernels.cross_entropy_map import forward_kernel
from kernels.interpolation import CELL_LANES, plan
from kernels.percentile import BLOCK, count_kernel, descend_kernel, drop_unreliable_kernel, finish_kernel, successor_kernel
from kernels.pseudo_label import pseudo_label_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ISSUED_PER_SECOND = 132 * 4 * 1.755e9  # warp instructions on an H200


class Case(NamedTuple):
    """A kernel with the types and constants of one use.

    Attributes:
        name: what is computed and for which shape.
        kernel: the Triton function.
        types: Triton's type of each argument that is neither a constant nor None.
        constants: the compile-time arguments; pointers that are None too.
        warps: of a program.
        pixels: that a lane keeps at a time, for kernels with loops over the classes.
        work: (pixels or values, classes) of the shape in `name`, for the bound.
        per_lane: pixels times classes (or values) that a lane handles, for kernels without a loop; else 0.
    """

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    warps: int
    pixels: int
    work: float
    per_lane: float = 0


def cases(logits: str = "bf16") -> list[Case]:
    """The uses that the table shows: the shapes of VOC and of CPS's crops, loss, labels, percentile."""
    sizes = {name: "i32" for name in "hwHW"}
    tables = {"first_y_ptr": "*i32", "weight_y_ptr": "*fp32", "first_x_ptr": "*i32", "weight_x_ptr": "*fp32"}
    none = {name: None for name in ("pixel_weight_ptr", "class_weight_ptr")}
    found = []
    add = found.append
    for nodes, outputs in ((129, 513), (128, 512), (65, 513)):
        name = f"{nodes}->{outputs}"
        shape, weighted_shape = (shape_constants(nodes, outputs, max_pixels) for max_pixels in (20, 16))
        # A lane of 5 columns of 128 -> 512 has 4.02 pixels on average: the work of its empty places counts, too.
        slots = {"128->512": 5 / (outputs / nodes)}.get(name, 1.0)
        work = 8 * outputs**2 * 21 * slots
        types = {"logits_ptr": f"*{logits}", "target_ptr": "*u8", "partial_ptr": "*fp32", **tables, **sizes}
        pixels = shape["ROWS"] * shape["COLUMNS"]
        forward = {**no_row_parts(shape), **none, "IGNORE": 255, "loss_ptr": None}
        gradient = {**shape, **none, "IGNORE": 255, "ODD": True}
        with_gradient = {**types, "gradient_ptr": "*fp32"}
        add(Case(f"cross_entropy {name}", cross_entropy_kernel, with_gradient, gradient, 1, pixels, work))
        add(Case(f"  even rows {name}", cross_entropy_kernel, with_gradient, {**gradient, "ODD": False}, 1, pixels, work))
        # With weights a lane holds one value more a pixel, and so fewer pixels.
        weighted = {**weighted_shape, "IGNORE": 255, "ODD": True}
        with_weights = {**with_gradient, "pixel_weight_ptr": "*fp32", "class_weight_ptr": "*fp32"}
        pixels_weighted = weighted["ROWS"] * weighted["COLUMNS"]
        add(Case(f"  weighted {name}", cross_entropy_kernel, with_weights, weighted, 1, pixels_weighted, work))
        add(Case(f"  without gradient {name}", forward_kernel, types, forward, 1, pixels, work))
        with_map = {k: v for k, v in forward.items() if k != "loss_ptr"}
        add(Case(f"  map of losses {name}", forward_kernel, {**types, "loss_ptr": "*fp32"}, with_map, 1, pixels, work))
        label = no_row_parts(shape)
        maps = {"logits_ptr": f"*{logits}", "label_ptr": "*u8", **tables, **sizes}
        both = {**maps, "confidence_ptr": "*fp32", "entropy_ptr": "*fp32"}
        add(Case(f"pseudo_label {name}, all maps", pseudo_label_kernel, both, label, 1, pixels, work))
        no_maps = {"confidence_ptr": None, "entropy_ptr": None}
        add(Case(f"  label alone {name}", pseudo_label_kernel, maps, {**label, **no_maps}, 1, pixels, work))
    for classes in (21, 150):
        types = {"logits_ptr": f"*{logits}", "target_ptr": "*u8", "denominator_ptr": "*fp32", "pixels": "i32"}
        full = {"C": classes, "IGNORE": 255, "KEEP": classes <= KEPT_CLASSES, "ACC": tl.float32, "LANES": FULL_SIZE_LANES}
        forward = {**full, **none, "upstream_ptr": None, "gradient_ptr": None}
        backward = {**full, **none, "partial_ptr": None}
        work, each = 8 * 513 * 513 * classes, classes if classes <= KEPT_CLASSES else 0
        name = f"full size, {classes} classes"
        add(Case(name, full_size_kernel, {**types, "partial_ptr": "*fp32"}, forward, 4, 1, work, each))
        types = {**types, "upstream_ptr": "*fp32", "gradient_ptr": f"*{logits}"}
        add(Case(f"{name}, backward", full_size_kernel, types, backward, 4, 1, work))
    maps = {"values_ptr": "*fp32", "valid_ptr": "*u8", "state_ptr": "*i32", "n": "i32"}
    n, each = 8 * 513 * 513, BLOCK / (4 * 32)
    for number in (0, 1):
        constants = {"Q": 6, "PASS": number, "BLOCK": BLOCK}
        types = {**maps, "counts_ptr": "*i32"}
        # The later passes' code holds two branches, of which a block takes one: its length says nothing about time.
        add(Case(f"percentile, 6 queries, pass {number + 1}", count_kernel, types, constants, 4, 1, 0 if number else n, each))
    types = {**maps, "above_ptr": "*i32"}
    add(Case("percentile, 6 queries, pass 5", successor_kernel, types, {"Q": 6, "BLOCK": BLOCK}, 4, 1, n, each))
    types = {"q_ptr": "*fp64", "counts_ptr": "*i32", "state_ptr": "*i32"}
    add(Case("percentile, descend", descend_kernel, types, {"Q": 6, "PASS": 1}, 4, 1, 0))
    types = {**types, "above_ptr": "*i32", "result_ptr": "*fp32"}
    add(Case("percentile, interpolation", finish_kernel, types, {}, 4, 1, 0))
    types = {
        "label_ptr": "*u8",
        "entropy_ptr": "*fp32",
        "threshold_ptr": "*fp32",
        "result_ptr": "*u8",
        "kept_ptr": "*i32",
        "n": "i32",
    }
    add(Case("drop_unreliable", drop_unreliable_kernel, types, {"IGNORE": 255, "BLOCK": BLOCK}, 4, 1, n, each))
    types = {
        "anchors_ptr": f"*{logits}", "positives_ptr": "*fp32", "bank_ptr": "*fp16", "indices_ptr": "*i32",
        "classes_ptr": "*i32", "loss_ptr": "*fp32", "gradient_ptr": "*fp32", "capacity": "i32", "A": "i32",
        "inverse_temperature": "fp32",
    }  # fmt: skip
    for width in (256, 64):
        constants = {"M": 50, "D": width, "WIDTH": width, "TOGETHER": TOGETHER, "ACC": tl.float32}
        turns = triton.cdiv(50, TOGETHER)
        work = 19 * 256 * turns * TOGETHER * 32  # a warp a negative
        add(Case(f"memory_contrast, {width} features", memory_contrast_kernel, types, constants, 1, TOGETHER, work))
    return found


def shape_constants(nodes: int, outputs: int, max_pixels: int) -> dict[str, object]:
    """The constants with which the launches compile a cell kernel for 21 classes and square maps."""
    walk = plan(torch.empty(1, 21, nodes, nodes), (outputs, outputs), True, max_pixels)
    return {
        "C": 21, "RATIO": walk.ratio, "ROWS": walk.rows, "COLUMNS": walk.columns, "ROW_PARTS": walk.row_parts,
        "COLUMN_PARTS": walk.column_parts, "ACC": tl.float32, "LANES": CELL_LANES,
    }  # fmt: skip


def no_row_parts(constants: dict[str, object]) -> dict[str, object]:
    """Without ROW_PARTS, for the kernels whose parts are programs."""
    return {name: value for name, value in constants.items() if name != "ROW_PARTS"}


def compile_case(case: Case, target: str) -> object:
    """Compile for a target; returns Triton's compiled kernel. Raises whatever the compiler does."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    options = {"num_warps": case.warps}
    weighted = "class_weight_ptr" not in case.constants
    if case.kernel is cross_entropy_kernel and (weighted or not case.constants["RATIO"]) and TARGETS[target].backend == "cuda":
        options["maxnreg"] = 128  # as `register_limit` in the launch
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=TARGETS[target], options=options)


class Cost(NamedTuple):
    """What a cubin says. `instructions`: issued for each pixel and class (or value)."""

    registers: int
    spilled: int
    stack: int
    shared: int
    instructions: float


def cost(case: Case, target: str) -> Cost:
    """Compile for an NVIDIA target and read the cubin."""
    compiled = compile_case(case, target)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", cubin)
        code = tool("nvdisasm", "-c", cubin)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    instructions = disassembled(code)
    if case.per_lane:
        count = len(instructions.lines) / case.per_lane
    else:
        count = sum(map(lambda body: len(body) / unrolled(body, case.pixels), class_loops(instructions))) / case.pixels
    return Cost(registers, local, stack, compiled.metadata.shared, count)


def tool(name: str, *arguments: object) -> str:
    """Output of one of the CUDA tools that come with Triton."""
    return subprocess.run([TOOLS / name, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


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


def unrolled(body: list[str], pixels: int) -> int:
    """How many classes one turn of a loop handles: each pixel takes one maximum, or one exponential, or one comparison."""
    names = [re.sub(r"^@!?U?P\w+ ", "", line).split()[0].split(".")[:2] for line in body]
    marks = (sum(name[0] == "FMNMX" for name in names), sum(name == ["MUFU", "EX2"] for name in names))
    return max(max(marks) // pixels, 1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Registers, memory and instructions of the kernels, without a GPU.")
    parser.add_argument("--target", choices=list(TARGETS), default="sm_90", help="architecture (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="of the logits (default: %(default)s)"
    )
    args = parser.parse_args()
    print(f"{args.target}, {args.dtype} logits, Triton {triton.__version__}; bound: issue time on an H200, batch of 8")
    if TARGETS[args.target].backend != "cuda":
        for case in cases(args.dtype):
            compile_case(case, args.target)
            print(f"{case.name:34} compiles")
        return
    print(f"{'kernel':34}{'registers':>10}{'spilled':>9}{'stack':>7}{'shared':>8}{'instructions':>14}{'bound (us)':>12}")
    for case in cases(args.dtype):
        found = cost(case, args.target)
        bound = f"{1e6 * case.work / 32 * found.instructions / ISSUED_PER_SECOND:.1f}" if case.work else "-"
        count = f"{found.instructions:.1f}" if case.work else "-"
        print(f"{case.name:34}{found.registers:>10}{found.spilled:>9}{found.stack:>7}{found.shared:>8}{count:>14}{bound:>12}")


if __name__ == "__main__":
    main()
