"""What surrounds the kernels: compilation ahead of time, benchmark, whole steps, the lesson."""

import argparse
import csv
import functools
import itertools
import re
from pathlib import Path

import pytest
import torch
from conftest import NATIVE, run
from kernel_examples import upsampled

import cps
import kernels
import mean_teacher
import psmt
import u2pl
import unimatch
from common import adaptive, losses, step
from kernels import benchmark, cross_entropy
from kernels.timing import Timing

OTHER_TARGETS = [pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "gfx942")]


@pytest.mark.parametrize("target", ["sm_90", *OTHER_TARGETS])
def test_compiled_ahead_of_time_within_the_ceilings(target):
    """At most 128 registers, nothing spilled, no stack, for all launches at the presets' shapes.

    And that every kernel compiles, which the interpreter does not show. With at most 96 registers
    20 instead of 16 programs of the cross-entropy share a multiprocessor.
    """
    lines = run("-m", "kernels.aot", "--target", target).stdout.splitlines()
    if target == "gfx942":
        assert len(lines) > 20 and all(line.endswith("compiles") for line in lines[1:])
        return
    stored = (Path(kernels.__file__).parent / "results" / "bounds-sm_90.txt").read_text()
    if target == "sm_90" and lines[0] == stored.splitlines()[0]:  # of this version of Triton
        # kernels/README.md shows a part of it.
        again = "python -m kernels.aot > kernels/results/bounds-sm_90.txt"
        assert stored.splitlines() == lines, again
    costs = {line[:54].strip(): list(map(int, line[54:].split()[:4])) for line in lines[2:]}
    assert len(costs) > 50
    for name, (registers, spilled, stack, shared) in costs.items():
        assert registers <= 128 and spilled == 0 and stack == 0 and shared <= 16384, name
    for shape in ("129->513", "128->512", "193->769", "200->800", "81->321"):
        for call in (
            "cross_entropy", "  map of losses", "pseudo_label", "  and entropy", "soft_consistency",
        ):  # fmt: skip
            start = f"{call} {shape}".strip()
            assert any(name.startswith(start) for name in costs), start
        for name, (registers, *_) in costs.items():
            if name.startswith(f"cross_entropy {shape}"):
                assert registers <= (112 if shape in ("128->512", "200->800") else 96), name
            if "soft_consistency" in name:
                assert registers <= 112, name
    if target == "sm_90":
        # Loads of several values at once, also where 16 does not divide their number.
        each = {line[:54].strip(): float(line.split()[-3]) for line in lines if "add_parts" in line}
        assert len(each) >= 3 and max(each.values()) < 9, each


def printed(values):
    """Lines of numbers as kernels/README.md has them."""
    return "\n".join("".join(f"{value:8.3f}" for value in row) for row in values)


def test_the_worked_example_of_the_lesson_is_what_the_operations_compute(where):
    """kernels/README.md: four numbers in, 25 out, one gradient collapsed to four."""
    impl, device = where
    lesson = (Path(kernels.__file__).parent / "README.md").read_text()
    nodes = torch.tensor([[0.0, 4.0], [8.0, 4.0]], device=device)
    logits = torch.stack([torch.zeros_like(nodes), nodes])[None].requires_grad_()
    target = torch.tensor([0, 0, 1, 1, 1], dtype=torch.uint8, device=device).expand(1, 5, 5)

    z = upsampled(logits.detach(), (5, 5))[0, 1]
    for row in z.tolist():
        assert "".join(f"{value:6.1f}" for value in row).strip() in lesson
    of_pixels = torch.sigmoid(z) - target[0]  # of class 1
    assert printed(of_pixels.tolist()) in lesson

    loss = cross_entropy(logits, target, reduction="sum", impl=impl)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert f"summed over the 25 pixels, is {loss:.3f}." in lesson
    first, second = (printed([row]).strip() for row in gradient[0, 1].tolist())
    assert re.search(rf"gradient of the nodes +{first}\n +{second}\n", lesson)

    weight = [0, 0.25, 0.5, 0.75, 0]  # of a position's second node
    for i, j in ((1, 1), (1, 2), (2, 1), (2, 2)):
        corners = torch.zeros(2, 2, dtype=torch.float64)
        for y, x in itertools.product(range(5), range(5)):
            if (y // 4 + 1, x // 4 + 1) == (i, j):
                down = torch.tensor([1 - weight[y], weight[y]], dtype=torch.float64)
                right = torch.tensor([1 - weight[x], weight[x]], dtype=torch.float64)
                corners += of_pixels[y, x].cpu() * torch.outer(down, right)
        numbers = " +".join(f"{value:.3f}" for value in corners.flatten().tolist())
        assert re.search(rf"cell \({i},{j}\) +{numbers}\n", lesson), numbers


def test_the_bytes_that_the_lesson_counts_add_up():
    lesson = (Path(kernels.__file__).parent / "README.md").read_text()
    low, pixels = 8 * 21 * 129 * 129, 8 * 513 * 513
    full, labels, chosen = 4 * 21 * pixels, 8 * pixels, 4 * pixels
    moved = [
        ("x = logits.float()", 2 * low, 4 * low),
        ("z = F.interpolate", 4 * low, full),
        ("t = target.long()", pixels, labels),
        ("log_p = z.log_softmax", full, full),
        ("loss = F.nll_loss", labels + chosen, 0),
        ("backward of nll_loss", labels, full + chosen),
        ("backward of log_softmax", 2 * full, full),
        ("backward of interpolate", full, 4 * low),
        ("backward of float", 4 * low, 2 * low),
    ]
    for line, reads, writes in moved:
        numbers = rf"{reads / 1e6:.1f} +{writes / 1e6:.1f}"
        assert re.search(rf"^{re.escape(line)}.* {numbers}", lesson, re.MULTILINE), line
    reads, writes = (sum(column) for column in list(zip(*moved))[1:])
    total = f"together {(reads + writes) / 1e9:.2f} GB"
    assert re.search(rf"{reads / 1e6:.1f} +{writes / 1e6:.1f} +{total}", lesson)
    copies = 4 * low + 10 * low  # to planes; the sum of two parts, scaled
    least, most = 2 * low + pixels + 8 * low, 6 * 2 * low + pixels + 8 * low
    found = f"moves {(copies + least) / 1e6:.0f} to {(copies + most) / 1e6:.0f} MB"
    assert found in lesson.replace("\n", " ")


def test_the_benchmark_checks_and_times_every_operation(tmp_path):
    command = ("-m", "kernels.benchmark", "--device", "cpu")
    run(
        *command,
        "--shape",
        "1x3x9x9:33x33",
        "--csv",
        tmp_path / "rows.csv",
        "--plot",
        tmp_path / "bars.png",
    )
    rows = list(csv.DictReader(open(tmp_path / "rows.csv")))
    assert {(row["op"], row["provider"]) for row in rows} == {
        (op, provider)
        for op in set(benchmark.OPERATIONS) - {"cross_entropy_full"}
        for provider in ("eager", "torch")
    }
    assert all(float(row["median_us"]) > 0 and row["gate"] == "" for row in rows)
    again = ("--rows", tmp_path / "rows.csv", "--plot", tmp_path / "again.png")
    assert run(*command, *again).stdout == ""
    bars = [(tmp_path / name).read_bytes() for name in ("bars.png", "again.png")]
    assert len(bars[0]) > 5000 and bars[0] == bars[1]
    assert "nothing to compare" in run(*command, "--op", "cross_entropy_full", expect=2).stderr
    assert "NxCxhxw:HxW" in run(*command, "--shape", "3x9", expect=2).stderr
    small = ("--shape", "1x3x9x9:33x33", "--op", "label alone")
    assert "label alone: eager, torch agree" in run(*command, *small, "--check").stdout
    assert (
        "--provider triton: of eager,autocast,torch"
        in run(*command, "--provider", "triton", expect=2).stderr
    )
    if not NATIVE:
        assert "no CUDA device" in run("-m", "kernels.benchmark").stdout


def test_a_speed_up_compares_times_of_one_kind():
    """Found wrong once: without a graph of the one, it was divided by the other's with a graph."""
    kernel = Timing(8.0, 8.0, 8.0, graph=6.0)
    with_graph, without = Timing(16.0, 16.0, 16.0, graph=3.0), Timing(80.0, 80.0, 80.0)
    assert benchmark.verdict("sum", None, kernel, with_graph)["speedup"] == "0.50"
    assert benchmark.verdict("sum", None, kernel, without)["speedup"] == "10.00"
    assert benchmark.verdict("sum", 7e6, kernel, None)["gate"] == "met"


def test_the_benchmark_names_what_disagrees_and_times_the_rest(capsys):
    providers = {"eager": lambda: torch.ones(3), "wrong": lambda: 2 * torch.ones(3)}
    providers |= {"right": lambda: torch.ones(3), "nan": lambda: torch.ones(3) / 0 * 0}
    op = benchmark.Op(providers, least_bytes=1, exponentials=0, gate_us=None, tolerance=1e-3)
    assert list(benchmark.agreeing("sum", op, [])) == ["eager", "right"]
    printed = capsys.readouterr().out
    assert "sum: wrong: result 0 is off by 1.00e+00" in printed and "sum: nan: " in printed
    assert list(benchmark.agreeing("sum", op, ["right"])) == ["right"]


@pytest.mark.parametrize("method", step.WAYS)
def test_whole_steps_run_both_ways(method, monkeypatch, capsys):
    """Both ways do the same work: no term of the loss is missing in one of them.

    Their losses differ by dropout and by what the contrast draws.
    """
    found = []

    def call_once(call, _):
        found.append(call().item())
        return Timing(1.0, 1.0, 1.0)

    monkeypatch.setattr(step, "time_cpu", call_once)
    monkeypatch.setattr(step, "peak_cpu", lambda _: 10)
    monkeypatch.setattr("u2pl.CAPACITY", 100)
    step.compare_steps(method, argparse.Namespace(device="cpu", amp=None, compile=False))
    assert len(found) == 4 and max(found) < 1.2 * min(found)
    assert "usual / kernels: time 1.00" in capsys.readouterr().out


@pytest.mark.parametrize("method", step.WAYS)
def test_the_usual_step_calls_no_kernel(method, monkeypatch):
    """Else a comparison would time the same thing twice."""
    called = []
    monkeypatch.setattr(step, "peak_cpu", lambda _: 10)
    monkeypatch.setattr("u2pl.CAPACITY", 100)
    for module in (adaptive, cps, mean_teacher, psmt, u2pl, unimatch, losses):
        for name in kernels.__all__:
            if callable(getattr(module, name, None)):
                noted = functools.partial(note_call, called, getattr(kernels, name))
                monkeypatch.setattr(module, name, noted)

    def call_once(call, _):
        called.clear()
        call()
        calls.append(len(called))
        return Timing(1.0, 1.0, 1.0)

    calls = []
    monkeypatch.setattr(step, "time_cpu", call_once)
    step.compare_steps(method, argparse.Namespace(device="cpu", amp=None, compile=False))
    usual, with_kernels = calls[0::2], calls[1::2]
    least = {"supervised": 1, "mean_teacher": 2, "cutmix_seg": 2, "psmt": 3}.get(method, 4)
    assert usual == [0, 0] and min(with_kernels) >= least


def note_call(called, function, *args, **options):
    """Call a function after its name has been noted."""
    called.append(function.__name__)
    return function(*args, **options)
