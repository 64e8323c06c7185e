"""What the fused operations have in common; each one's own tests are in a file of its name.

Without a GPU Triton's interpreter runs the kernels; `pytest -m gpu` runs the same tests compiled,
on a GPU.
"""

import copy
import functools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import NATIVE, never_waiting, settings
from kernel_examples import contrast_example, example, upsampled

import cps
from common import datasets, losses
from common.data import train_loader
from common.deeplabv3plus import DeepLabV3Plus
from common.run import to_device
from kernels import (
    PseudoLabel,
    cross_entropy,
    drop_unreliable,
    masked_percentile,
    memory_contrast,
    pseudo_label,
    set_backend,
    soft_consistency,
)
from kernels.cross_entropy_full import launch as launch_full
from kernels.interpolation import axis, plan
from kernels.percentile import launch_percentile
from kernels.soft_consistency import MODES
from kernels.timing import peak_cpu


def test_too_many_pixels_in_a_cell_are_refused():
    """More than CUDA starts programs along the third axis of a grid."""
    with pytest.raises(ValueError, match=r"\(1, 1\) to \(2048, 2048\): too many pixels in a cell"):
        plan(torch.zeros(1, 2, 1, 1), (2048, 2048), True, 20)


def test_what_overflows_offsets_of_32_bits_is_refused():
    """They were computed all the same once, and memory outside the tensors was written."""

    def nothing(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")  # takes no memory

    with pytest.raises(ValueError, match="less than 2\\^31"):
        plan(nothing(1, 150, 3800, 3800), (4000, 4000), True, 20)
    with pytest.raises(ValueError, match="less than 2\\^31"):
        plan(nothing(1, 2, 9000, 9000), (46341, 46341), True, 20)
    with pytest.raises(ValueError, match="less than 2\\^31"):
        launch_full(
            nothing(1, 21, 10_400, 10_400), nothing(1, 10_400, 10_400), None, None, 255, None
        )
    values = nothing(2**31)
    with pytest.raises(ValueError, match="less than 2\\^31"):
        launch_percentile(values, nothing(2**31, dtype=torch.bool), nothing(1))


@pytest.mark.parametrize("size", [(17, 25), (5, 7)])
def test_bitwise_repeatable_and_inputs_untouched(size, where):
    impl, device = where
    logits, target = example((2, 3, 5, 7), size, device, torch.float32)
    results = []
    for _ in range(2):
        before = logits.clone()
        variable = logits.requires_grad_()
        loss = cross_entropy(variable, target, impl=impl)
        (gradient,) = torch.autograd.grad(loss, variable)
        maps = {"with_confidence": True, "with_entropy": True, "threshold": 0.5}
        labels = pseudo_label(variable, size, **maps, impl=impl)
        results.append([loss.detach(), gradient, *labels])
        found = soft_consistency(variable, before.flip(1), target != 255, impl=impl)
        (gradient,) = torch.autograd.grad(found.loss, variable)
        results[-1] += [found.loss.detach(), found.count, found.confident, gradient]
        assert torch.equal(variable, before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_around_an_operation_does_not_lower_its_precision(where):
    impl, device = where
    logits, target = example((1, 5, 5, 7), (17, 25), device, torch.float32)
    inputs, _, _ = contrast_example(2, 3, 8, 4, torch.float32, device)

    def all_of_them():
        variable = logits.detach().clone().requires_grad_()
        cross_entropy(variable, target, impl=impl).backward()
        (each,) = torch.autograd.grad(
            soft_consistency(variable, logits.flip(1), target != 255, impl=impl).loss, variable
        )
        return variable.grad, each, memory_contrast(*inputs, impl=impl)

    plain = all_of_them()
    with torch.autocast(device, torch.bfloat16):
        inside = all_of_them()
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_non_contiguous_inputs(where):
    impl, device = where
    logits, target = example((2, 3, 5, 7), (17, 25), device, torch.float32)
    turned = logits.to(memory_format=torch.channels_last)
    assert torch.equal(
        cross_entropy(turned, target, impl=impl), cross_entropy(logits, target, impl=impl)
    )
    flipped = target.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(
        cross_entropy(logits, flipped, impl=impl), cross_entropy(logits, target, impl=impl)
    )
    assert torch.equal(
        pseudo_label(turned, (17, 25), impl=impl).label,
        pseudo_label(logits, (17, 25), impl=impl).label,
    )
    valid, other = target != 255, logits.flip(1)
    mask = target > 0
    flipped = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in (valid, mask)]
    turned_other = other.to(memory_format=torch.channels_last)
    expected = soft_consistency(logits, other, valid, mask=mask, second=logits, impl=impl)
    found = soft_consistency(
        turned, turned_other, flipped[0], mask=flipped[1], second=turned, impl=impl
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [(5, 7), (2, 3)])
def test_gradcheck(size, where):
    """Interpreted along random directions: every element by itself would take two minutes."""
    impl, device = where
    gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=impl == "triton")
    logits, target = example((1, 3, 2, 3), size, device, ignored=False)
    target[:, 0, :2] = 255
    weight = torch.rand(target.shape, dtype=torch.float64, device=device)
    assert gradcheck(lambda x: cross_entropy(x, target, impl=impl), logits.requires_grad_())
    assert gradcheck(lambda x: cross_entropy(x, target, pixel_weight=weight, impl=impl), logits)
    targets, second, mask = logits.detach().flip(1), logits.detach().roll(1, 1), target == 1
    for mode in MODES:
        assert gradcheck(
            lambda x, mode=mode: (
                soft_consistency(
                    x, targets, target != 255, mode=mode, mask=mask, second=second, impl=impl
                ).loss
            ),
            logits,
        )
    (anchors, *others), _, _ = contrast_example(2, 2, 3, 4, torch.float64, device)
    assert gradcheck(lambda x: memory_contrast(x, *others, impl=impl), anchors)


# On a CPU opcheck's compiled part runs the op itself, interpreted, and so takes seconds each.
def test_opcheck(where):
    impl, device = where
    ops = torch.ops.semiseg
    logits, target = example((1, 3, 3, 5), (9, 17), device, torch.float32)
    small, small_target = example((1, 3, 3, 5), (3, 5), device, torch.float32)
    weight = torch.rand(target.shape, device=device)
    entropy = torch.rand(target.shape, device=device)
    numbers = torch.tensor([20.0, 80.0], dtype=torch.float64, device=device)
    variable = logits.detach().clone().requires_grad_()
    inputs = (variable, target, weight, None, 255, True, True, True, impl)
    torch.library.opcheck(ops.cross_entropy.default, inputs)
    torch.library.opcheck(
        ops.cross_entropy_map.default, (logits, target, None, None, 255, True, impl)
    )
    valid = target != 255
    for maps in ((True, False, None, None), (False, False, 0.5, valid)):
        torch.library.opcheck(ops.pseudo_label.default, (logits, 9, 17, True, *maps, impl))
    targets = logits.flip(1)
    for mixed in ((None, None), (valid, targets)):
        inputs = (variable, targets, valid, *mixed, "squared", 0.5, True, True, impl)
        torch.library.opcheck(ops.soft_consistency.default, inputs)
    torch.library.opcheck(ops.masked_percentile.default, (entropy, entropy > 0.2, numbers, impl))
    torch.library.opcheck(
        ops.drop_unreliable.default, (target, entropy, torch.tensor(0.5, device=device), 255, impl)
    )
    inputs, _, _ = contrast_example(2, 3, 8, 4, torch.float32, device)
    torch.library.opcheck(ops.memory_contrast.default, (*inputs, 0.5, impl))
    if impl == "triton":
        inputs = (small.requires_grad_(), small_target, None, None, 255, True)
        torch.library.opcheck(ops.cross_entropy_full.default, inputs)


def test_a_compiled_step_follows_the_chosen_backend(where):
    """A graph that was compiled for kernels failed once the references were chosen.

    Its forward pass took the reference, which makes one gradient, and its backward pass added two
    parts of one.
    """
    impl, device = where
    if impl == "torch":
        pytest.skip("kernels and references take turns")

    def step(logits, target):
        loss = cross_entropy(logits, target)
        return loss, torch.autograd.grad(loss, logits)[0]

    logits, target = example((3, 3, 3, 3), (5, 5), device, torch.float32)
    logits.requires_grad_()
    compiled = torch.compile(step, backend="aot_eager")
    try:
        for backend in ("triton", "torch", "triton"):
            set_backend(backend)
            for found, expected in zip(compiled(logits, target), step(logits, target)):
                torch.testing.assert_close(found, expected)
    finally:
        set_backend("auto")


def test_compiles_without_a_graph_break(where):
    impl, device = where
    logits, target = example((1, 3, 3, 5), (9, 17), device, torch.float32)
    inputs, _, _ = contrast_example(2, 3, 8, 4, torch.float32, device)
    others = [each.detach() for each in inputs[1:]]

    def step(logits, target):
        anchors = logits.flatten()[:24].view(2, 3, 4).repeat(1, 1, 2)
        contrast = memory_contrast(anchors, *others, impl=impl).mean()
        found = pseudo_label(logits, target.shape[1:], with_entropy=True, impl=impl)
        threshold = masked_percentile(found.entropy, target != 255, 80.0, impl=impl)
        label, count = drop_unreliable(found.label, found.entropy, threshold, impl=impl)
        sure = pseudo_label(logits, (9, 17), threshold=0.4, valid_mask=target != 255, impl=impl)
        soft = soft_consistency(logits, logits.flip(1), sure.label != 255, impl=impl)
        contrast = contrast + soft.loss / soft.count
        count = count + sure.kept + soft.confident
        full = cross_entropy(logits, target[:, :3, :5], impl=impl)
        return cross_entropy(logits, target, impl=impl) + cross_entropy(
            logits, label, impl=impl
        ) + full + contrast, count

    eager, count = step(logits.requires_grad_(), target)
    (expected,) = torch.autograd.grad(eager, logits)
    loss, compiled_count = torch.compile(step, fullgraph=True, backend="aot_eager")(logits, target)
    torch.testing.assert_close(loss, eager)
    assert torch.equal(count, compiled_count)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="no CUDA device")
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_no_operation_waits_for_the_gpu(impl):
    logits, target = example((2, 5, 9, 9), (33, 33), "cuda", torch.float32)
    target = target.to(torch.uint8)

    def step():
        found = pseudo_label(logits, (33, 33), with_entropy=True, impl=impl)
        thresholds = masked_percentile(found.entropy, target != 255, [20.0, 80.0], impl=impl)
        label, _ = drop_unreliable(found.label, found.entropy, thresholds[1], impl=impl)
        (
            cross_entropy(logits, label, impl=impl) + cross_entropy(logits, target, impl=impl)
        ).backward()
        sure = pseudo_label(logits, (33, 33), threshold=0.4, valid_mask=target != 255, impl=impl)
        options = {"mask": sure.label == 0, "second": logits.roll(1, 1), "impl": impl}
        soft_consistency(logits, logits.flip(1), target != 255, **options).loss.backward()

    logits.requires_grad_()
    step()  # compiles, and uploads the tables
    with never_waiting():
        step()


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="no CUDA device")
def test_peak_memory_is_a_fraction_of_full_resolution_logits():
    logits, target = example((4, 21, 65, 65), (257, 257), "cuda", torch.bfloat16)
    target, logits = target.to(torch.uint8), logits.requires_grad_()
    full = 4 * 21 * 257 * 257 * 4
    for _ in range(2):
        logits.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        label = pseudo_label(logits, (257, 257)).label
        cross_entropy(logits, target).backward()
        peak = torch.cuda.max_memory_allocated() - before
    assert label.shape == target.shape and peak < 2 * full / 8  # kept: the labels and the gradient


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    "nodes, outputs", [(129, 513), (128, 512), (1, 7), (7, 1), (5, 5), (11, 5), (3, 50), (65, 513)]
)
def test_axis_interpolates_as_torch_does(nodes, outputs, align_corners):
    values = torch.randn(nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(
        values[None, None], outputs, mode="linear", align_corners=align_corners
    )[0, 0]
    found = axis(nodes, outputs, align_corners, torch.float64, torch.device("cpu"))
    cell = torch.repeat_interleave(torch.arange(nodes + 1), found.first.diff())
    low, high = values[(cell - 1).clamp(min=0)], values[cell.clamp(max=nodes - 1)]
    torch.testing.assert_close(low + (high - low) * found.weight, expected)
    assert found.slots == found.first.diff().max()


def test_what_the_operations_refuse(monkeypatch):
    logits, target = example((2, 5, 5, 7), (17, 25))
    with pytest.raises(ValueError, match="label 7"):
        cross_entropy(logits, torch.full_like(target, 7), impl="torch")
    with pytest.raises(ValueError, match="label -1"):
        cross_entropy(logits, torch.full_like(target, -1), impl="torch")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a GPU"):
        cross_entropy(logits, target, impl="triton")
    with pytest.raises(ValueError, match="impl"):
        pseudo_label(logits, impl="cuda")
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy(logits, target, reduction="average")
    with pytest.raises(ValueError, match="pixel_weight"):
        cross_entropy(logits, target, pixel_weight=torch.ones(2, 5, 7))
    with pytest.raises(ValueError, match="class_weight"):
        cross_entropy(logits, target, class_weight=torch.ones(4))
    with pytest.raises(ValueError, match="254"):
        pseudo_label(torch.zeros(1, 255, 2, 2))
    with pytest.raises(ValueError, match="size"):
        pseudo_label(logits, (0, 9))
    valid = target != 255
    for options, message in (
        ({"threshold": 1.5}, "in \\[0,1\\]"),
        ({"valid_mask": valid}, "needs a threshold"),
        ({"threshold": 0.5, "valid_mask": valid[:1]}, "valid_mask must be"),
        ({"threshold": 0.5, "valid_mask": target}, "valid_mask must be"),
    ):
        with pytest.raises(ValueError, match=message):
            pseudo_label(logits, (17, 25), **options)
    for changes, message in (
        ({"mode": "squares"}, "mode"),
        ({"threshold": -0.1}, "in \\[0,1\\]"),
        ({"logits": logits[0]}, "254"),
        ({"targets": logits[:, :2]}, "targets"),
        ({"valid_mask": valid[:1]}, "valid_mask"),
        ({"valid_mask": target}, "valid_mask"),
        ({"mask": valid}, "go together"),
        ({"second": logits}, "go together"),
        ({"mask": valid, "second": logits[:1]}, "second"),
        ({"mask": valid, "second": logits.float()}, "second"),
        ({"mask": valid[:, :5], "second": logits}, "mask"),
        ({"mask": target, "second": logits}, "mask"),
    ):
        inputs = {"logits": logits, "targets": logits, "valid_mask": valid}
        with pytest.raises(ValueError, match=message):
            soft_consistency(**{**inputs, **changes})
    inputs, _, _ = contrast_example(2, 3, 8, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match="do not fit"):
        memory_contrast(*inputs[:3], inputs[3][..., 0], inputs[4])
    # Without negatives there is nothing to tell apart.
    assert memory_contrast(*inputs[:3], inputs[3][..., :0], inputs[4]).eq(0).all()


def test_the_reference_holds_one_full_resolution_tensor_at_most():
    """Largest live allocation of one call, in full-resolution float32 logits of its one image."""
    logits, target = example((1, 21, 65, 65), (257, 257), dtype=torch.float32)
    full = 21 * 257 * 257 * 4
    logits.requires_grad_()

    naive = peak_cpu(
        lambda: F.cross_entropy(
            upsampled(logits.float(), (257, 257)).float(), target, ignore_index=255
        ).backward()
    )
    assert naive > 2 * full  # the measurement sees what it should
    assert peak_cpu(lambda: cross_entropy(logits, target, impl="torch").backward()) < 1.9 * full
    assert (
        peak_cpu(lambda: pseudo_label(logits, (257, 257), with_entropy=True, impl="torch"))
        < 1.9 * full
    )


def test_training_with_kernels_follows_training_without(where):
    """Three steps of CPS: losses and updates agree with those of plain PyTorch at full resolution.

    Each step starts from the same weights: left alone, training from scratch would amplify the last
    bits within a few steps.
    """
    impl, device = where
    args = cps.parse_args(["--crop-size", "32", "-b", "2", "--device", "cpu"])
    data = datasets.load(settings())
    torch.manual_seed(0)
    networks = [
        DeepLabV3Plus.from_settings(args, data.num_classes).to(device).train() for _ in range(2)
    ]
    plain = copy.deepcopy(networks)
    optimizers = [torch.optim.SGD(parameters_of(each), lr=0.001) for each in (networks, plain)]
    loaders = [
        train_loader(data, items, stream, args, 0, 3)
        for items, stream in ((data.labelled, 0), (data.unlabelled, 1), (data.unlabelled, 2))
    ]

    def step_of(networks, optimizer, iteration, batches):
        """Loss, and the change of all parameters in one vector."""
        before = [p.detach().clone() for p in parameters_of(networks)]
        torch.manual_seed(iteration)  # dropout
        batch_l, *batches_u = batches
        loss = cps.train_step(*networks, batch_l, batches_u, iteration, args, data.background)[
            "loss"
        ]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        changes = [p.detach() - old for p, old in zip(parameters_of(networks), before)]
        return loss, torch.cat([change.flatten() for change in changes])

    set_backend(impl)
    try:
        for iteration, batches in enumerate(zip(*loaders)):
            batches = [to_device(batch, torch.device(device)) for batch in batches]
            for network, copied in zip(networks, plain):
                copied.load_state_dict(network.state_dict())
            found, change = step_of(networks, optimizers[0], iteration, batches)
            with plain_operations():
                expected, wanted = step_of(plain, optimizers[1], iteration, batches)
            # A label that falls to the other side of a tie changes the mean over 2 x 32 x 32 pixels
            # by up to 1 in 1000.
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
            assert (change - wanted).norm() < 0.02 * wanted.norm()
        assert iteration == 2
    finally:
        set_backend("auto")


def parameters_of(networks):
    """The parameters of several networks."""
    return [parameter for network in networks for parameter in network.parameters()]


@contextmanager
def plain_operations():
    """The two operations of CPS by torch at full resolution."""

    def naive_cross_entropy(logits, target, ignore_index, reduction):
        logits = upsampled(logits, target.shape[1:]).float()
        options = {"ignore_index": ignore_index, "reduction": reduction}
        return F.cross_entropy(logits, target.long(), **options)

    def naive_pseudo_label(logits, size):
        return PseudoLabel(upsampled(logits, size).argmax(1).to(torch.uint8), None, None)

    with (
        mock.patch.object(cps, "pseudo_label", naive_pseudo_label),
        mock.patch.object(losses, "cross_entropy", naive_cross_entropy),
    ):
        yield
