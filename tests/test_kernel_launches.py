"""What each operation asks of a GPU, counted without one: launches, memory, waits of the host.

The operations run on tensors in the host's memory. Their Triton kernels do not run: each launch
leaves its name among the events of PyTorch's profiler, beside the operators that launch kernels
of their own on a GPU. What an operator does differently on a GPU, this does not see.
"""

import ast
import gc
import sys
import weakref

import pytest
import torch
from conftest import ROOT
from torch._subclasses import FakeTensorMode

from kernels import (
    cross_entropy,
    drop_unreliable,
    masked_percentile,
    memory_contrast,
    pseudo_label,
    soft_consistency,
    timing,
)
from kernels.contrast import memory_contrast_reference
from kernels.cross_entropy import cross_entropy_reference
from kernels.cross_entropy_map import cross_entropy_map_reference
from kernels.percentile import drop_unreliable_reference, masked_percentile_reference
from kernels.pseudo_label import pseudo_label_reference
from kernels.soft_consistency import MODES, soft_consistency_reference

N, C, NODES, OUTPUTS = 2, 21, 33, 129
LOGITS = N * C * NODES * NODES  # numbers in the head's logits
PIXELS = N * OUTPUTS * OUTPUTS

# Whatever these call on a CPU, on a GPU it is one kernel.
ONE_LAUNCH = {"copy_", "fill_", "zero_", "sum", "mul", "div", "_foreach_add_"}
NO_LAUNCH = {
    "empty", "empty_like", "empty_strided", "new_empty", "resize_", "view", "view_as",
    "_unsafe_view",
    "reshape", "as_strided", "expand", "select", "slice", "unbind", "detach", "alias", "transpose",
    "permute", "squeeze", "unsqueeze", "result_type", "to", "contiguous",
}  # fmt: skip
WAITS = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal"}


@pytest.fixture
def kernels_that_do_not_run(monkeypatch):
    """Launches only leave their names; nothing is checked that is checked on a CPU alone."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    jit = pytest.importorskip("triton.runtime.jit")

    def only_note(kernel, *_, grid, warmup, **__):
        with torch.profiler.record_function(f"triton::{kernel.fn.__name__}"):
            pass

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for kind in (interpreter.InterpretedFunction, jit.JITFunction):
        monkeypatch.setattr(kind, "run", only_note)
    for name in ("cross_entropy", "cross_entropy_map", "cross_entropy_full"):
        monkeypatch.setattr(sys.modules[f"kernels.{name}"], "check_labels", lambda *_: None)


def launches(call) -> list[str]:
    """Names of the kernels that a call would launch on a GPU, in order.

    Fails if the host would wait for one of them.
    """
    call()  # makes and keeps the tables
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = []

    def visit(event):
        space, _, name = event.name.rpartition("::")
        assert name not in WAITS, f"{name} waits for the GPU"
        if space == "triton" or name in ONE_LAUNCH:
            names.append(name)
        elif event.cpu_children:
            for child in sorted(event.cpu_children, key=lambda each: each.time_range.start):
                visit(child)
        elif space == "aten" and name not in NO_LAUNCH:
            names.append(name)

    for event in sorted(profile.events(), key=lambda each: each.time_range.start):
        if event.cpu_parent is None:
            visit(event)
    return names


def labels() -> torch.Tensor:
    """(N,H,W) uint8."""
    return torch.zeros(N, OUTPUTS, OUTPUTS, dtype=torch.uint8)


def logits(size: int = NODES) -> torch.Tensor:
    """(N,C,h,w) as a network gives them under autocast: bfloat16, channels_last."""
    values = torch.zeros(N, C, size, size, dtype=torch.bfloat16)
    return values.to(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x[0])]
)
def test_a_wait_of_the_host_is_seen(wait):
    with pytest.raises(AssertionError, match="waits for the GPU"):
        launches(lambda: wait(torch.ones(3)))


@pytest.mark.parametrize("reduction, divides", [("sum", []), ("mean", ["div"])])
def test_cross_entropy_launches_three_kernels_forward_and_two_backward(
    reduction, divides, kernels_that_do_not_run
):
    """Backward: a one, the gradient of the loss, and the sum; for the mean also a quotient."""
    x, target = logits(), labels()
    found = launches(lambda: torch.autograd.grad(cross_entropy(x, target, reduction=reduction), x))
    forward = ["copy_", "cross_entropy_kernel", "sum_kernel"]
    assert found == [*forward, "fill_", *divides, "add_parts_kernel"]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_full_size_cross_entropy_launches_two_kernels_forward_and_two_backward(
    reduction, kernels_that_do_not_run
):
    x, target = logits(OUTPUTS).detach().contiguous().requires_grad_(), labels()
    found = launches(lambda: torch.autograd.grad(cross_entropy(x, target, reduction=reduction), x))
    assert found == ["full_size_kernel", "sum_kernel", "fill_", "full_size_kernel"]


def test_losses_without_gradient_launch_no_more_than_they_return(kernels_that_do_not_run):
    x, target = logits().detach(), labels()
    assert launches(lambda: cross_entropy(x, target)) == ["copy_", "forward_kernel", "sum_kernel"]
    found = launches(lambda: cross_entropy(x, target, reduction="none"))
    assert found == ["copy_", "forward_kernel"]


def test_pseudo_label_launches_a_copy_and_one_kernel(kernels_that_do_not_run):
    x, size = logits(), (OUTPUTS, OUTPUTS)
    found = launches(lambda: pseudo_label(x, size, with_confidence=True, with_entropy=True))
    assert found == ["copy_", "pseudo_label_kernel"]


def test_thresholded_labels_take_one_more_launch_for_their_number(kernels_that_do_not_run):
    x, size, valid = logits(), (OUTPUTS, OUTPUTS), labels() == 0
    found = launches(lambda: pseudo_label(x, size, threshold=0.9, valid_mask=valid))
    assert found == ["copy_", "pseudo_label_kernel", "sum"]


def consistency_inputs() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """logits, targets and the valid pixels; and what mixes the targets."""
    valid = labels() == 0
    return [logits(), logits().detach(), valid], {"mask": valid, "second": logits().detach()}


def test_soft_consistency_launches_the_copies_two_kernels_and_two_backward(
    kernels_that_do_not_run,
):
    """Backward: a one, the gradient of the loss, and the sum."""
    inputs, mixed = consistency_inputs()
    kernels = ["soft_consistency_kernel", "consistency_sum_kernel"]
    backward = ["fill_", "add_parts_kernel"]

    def both(**options):
        return torch.autograd.grad(soft_consistency(*inputs, **options).loss, inputs[0])

    assert launches(both) == ["copy_"] * 2 + kernels + backward
    assert launches(lambda: both(**mixed)) == ["copy_"] * 3 + kernels + backward
    without = [inputs[0].detach(), *inputs[1:]]
    assert launches(lambda: soft_consistency(*without)) == ["copy_"] * 2 + kernels


@pytest.mark.parametrize("queries", [[20.0], [20.0, 80.0], [5.0, 20.0, 40.0, 60.0, 80.0, 95.0]])
def test_percentile_launches_the_same_few_kernels_for_one_query_and_for_six(
    queries, kernels_that_do_not_run
):
    values, valid = torch.zeros(PIXELS), torch.ones(PIXELS, dtype=torch.bool)
    found = launches(lambda: masked_percentile(values, valid, queries))
    numbers_and_counts = ["zero_", "_foreach_add_", "zero_"]
    passes = ["count_kernel", "descend_kernel"] * 4 + ["successor_kernel", "finish_kernel"]
    assert found == numbers_and_counts + passes


def test_drop_unreliable_launches_one_kernel_and_a_sum(kernels_that_do_not_run):
    label, entropy, threshold = labels(), torch.zeros(N, OUTPUTS, OUTPUTS), torch.tensor(0.5)
    found = launches(lambda: drop_unreliable(label, entropy, threshold))
    assert found == ["drop_unreliable_kernel", "sum"]


def contrast_inputs() -> list[torch.Tensor]:
    """anchors, positives, bank, indices, classes."""
    rows, order = torch.zeros(3, 8, 5, dtype=torch.int32), torch.arange(3, dtype=torch.int32)
    bank = torch.zeros(3, 40, 16, dtype=torch.float16)
    return [torch.zeros(3, 8, 16, requires_grad=True), torch.zeros(3, 16), bank, rows, order]


def test_memory_contrast_launches_one_kernel_forward_and_one_backward(kernels_that_do_not_run):
    inputs, upstream = contrast_inputs(), torch.ones(3, 8)
    found = launches(lambda: torch.autograd.grad(memory_contrast(*inputs), inputs[0], upstream))
    assert found == ["memory_contrast_kernel", "mul"]


def test_cross_entropy_needs_memory_for_a_copy_and_two_parts_of_a_gradient(kernels_that_do_not_run):
    """Forward: the copy of channels_last in bfloat16, and the parts in float32.

    Backward: the parts again, and the result in bfloat16.
    """
    x, target = logits(), labels()

    def forward():
        return cross_entropy(x, target)

    def both():
        return torch.autograd.grad(forward(), x)

    both()  # makes and keeps the tables
    partial_sums = 16 * 2 * N * ((NODES // 2 + 1) * (NODES + 1) // 31 + 1)
    assert timing.peak_cpu(forward) <= (2 + 8) * LOGITS + partial_sums + 100
    assert timing.peak_cpu(both) <= (8 + 2) * LOGITS + partial_sums + 100


def test_soft_consistency_needs_memory_for_the_copies_and_two_parts_of_a_gradient(
    kernels_that_do_not_run,
):
    """As the cross-entropy, with one copy more, of the targets; mixed another one."""
    inputs, mixed = consistency_inputs()

    def forward(**options):
        return soft_consistency(*inputs, **options)

    def both(**options):
        return torch.autograd.grad(forward(**options).loss, inputs[0])

    both()  # makes and keeps the tables
    partial_sums = 24 * 2 * N * ((NODES // 2 + 1) * (NODES + 1) // 31 + 1)
    assert timing.peak_cpu(forward) <= (2 * 2 + 8) * LOGITS + partial_sums + 100
    assert timing.peak_cpu(lambda: forward(**mixed)) <= (3 * 2 + 8) * LOGITS + partial_sums + 100
    assert timing.peak_cpu(both) <= (2 * 2 + 8) * LOGITS + partial_sums + 100


def test_full_size_cross_entropy_needs_memory_for_a_map_and_the_gradient(kernels_that_do_not_run):
    x, target = logits(OUTPUTS).detach().contiguous().requires_grad_(), labels()

    def both():
        return torch.autograd.grad(cross_entropy(x, target), x)

    partial_sums = 16 * N * (OUTPUTS * OUTPUTS // 128 + 1)
    assert timing.peak_cpu(both) <= 4 * PIXELS + 2 * C * PIXELS + partial_sums + 100


class NoGradient(torch.autograd.Function):
    """Passes a value on, and tells whatever made it that nothing depends on it."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        return None


def test_a_loss_that_nothing_depends_on_gets_no_gradient_made_of_zeros(kernels_that_do_not_run):
    x, full, contrast = logits(), logits(OUTPUTS), contrast_inputs()
    results = [
        (cross_entropy(x, labels()), x),
        (cross_entropy(full, labels()), full),
        (memory_contrast(*contrast), contrast[0]),
        (soft_consistency(x, x.detach(), labels() == 0).loss, x),
    ]
    for loss, variable in results:
        total = NoGradient.apply(loss).sum()
        assert torch.autograd.grad(total, variable, allow_unused=True) == (None,)


def test_the_peak_of_memory_is_not_lowered_by_garbage_of_the_call_before(monkeypatch):
    """A first backward pass may leave a cycle of references.

    Collected during the second call, it hid as many of that one's bytes.
    """
    live, peak = set(), [0]

    class Block:
        """100 bytes on the GPU, which refer to themselves."""

        def __init__(self) -> None:
            self.itself = self
            live.add(id(self))
            weakref.finalize(self, live.discard, id(self))
            peak[0] = max(peak[0], 100 * len(live))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100 * len(live))
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 100 * len(live))
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    calls = []

    def call():
        if calls:
            gc.collect()  # whenever Python thinks it is time
        calls.append(None)
        Block()

    gc.disable()
    try:
        assert timing.peak_gpu(call) == 100
    finally:
        gc.enable()


def test_the_references_neither_wait_for_the_gpu_nor_mix_it_with_the_host():
    """On tensors that say they are on a GPU and hold nothing: reading a value raises."""
    with FakeTensorMode():
        x = torch.empty(2, 5, 9, 9, device="cuda")
        target = torch.empty(2, 33, 33, dtype=torch.uint8, device="cuda")
        weight, entropy = (
            torch.empty(2, 33, 33, device="cuda"),
            torch.empty(2, 33, 33, device="cuda"),
        )
        queries = torch.empty(2, dtype=torch.float64, device="cuda")
        found = [
            *cross_entropy_reference(x, target, weight, None, 255, True, True),
            *cross_entropy_reference(x, target[:, :9, :9], None, None, 255, True, True),
            cross_entropy_map_reference(x, target, weight, None, 255, True),
            *pseudo_label_reference(x, (33, 33), True, True, True, None, None),
            *pseudo_label_reference(x, (33, 33), True, False, False, 0.5, target != 255),
            *(
                each
                for mode in MODES
                for each in soft_consistency_reference(
                    x, x, target != 255, target == 1, x, mode, 0.5, True, True
                )
            ),
            masked_percentile_reference(entropy, target != 255, queries),
            masked_percentile_reference(entropy[:0], target[:0] != 255, queries),
            *drop_unreliable_reference(target, entropy, queries[0], 255),
            *memory_contrast_reference(*(each.to("cuda") for each in contrast_inputs()), 0.5),
        ]
    assert all(each.device.type == "cuda" for each in found)


def test_every_launch_is_made_on_the_device_of_its_tensors():
    """Triton launches on the current device, which need not be that of the tensors."""
    found = {}
    for path in (ROOT / "kernels").glob("*.py"):
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            called = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
            names = [ast.unparse(each.value) for each in called if isinstance(each, ast.Subscript)]
            if any(name.endswith("_kernel") for name in names):
                guards = [ast.unparse(each) for each in function.decorator_list]
                found[f"{path.stem}.{function.name}"] = guards == ["on_its_device"]
    assert len(found) > 8 and all(found.values()), found
