"""AEL: the bank, what is pasted, which boxes, which pixels and weights, and who learns."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import settings

import ael
from common import InputError, datasets
from common.adaptive import (
    ConfidenceBank,
    ImagePool,
    adaptive_cutmix,
    adaptive_loss,
    box_mask,
    choose,
    choose_crops,
    classes_in,
    component_boxes,
    copy_paste,
    copy_paste_classes,
    copy_paste_step,
    label_whole,
    pasted_classes,
    sampling_rates,
)
from common.augment import normalise
from common.data import train_loader

CPU = torch.device("cpu")


def bank_of(*confidence: float) -> ConfidenceBank:
    """A bank with these confidences."""
    bank = ConfidenceBank(len(confidence), 0.9, CPU)
    bank.confidence.copy_(torch.tensor(confidence))
    return bank


# --------------------------------------------------------------------------------- confidence bank


def test_the_bank_is_the_average_probability_of_the_true_class():
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.randint(2, (2, 4, 4), generator=torch.Generator().manual_seed(1)).byte()
    target[0, 0] = 255
    bank = bank_of(0.5, 0.5, 0.5)
    bank.update(logits, target)
    probs = logits.softmax(1)
    for label in (0, 1):
        mean = probs[:, label][target == label].mean()
        assert bank.confidence[label].item() == pytest.approx(0.9 * 0.5 + 0.1 * mean.item())
    assert bank.confidence[2].item() == 0.5  # no pixel has the class: nothing is known of it


def test_as_released_a_class_that_is_not_there_loses_confidence():
    bank = ConfidenceBank(3, 0.9, CPU, as_released=True)
    before = bank.confidence.clone()
    assert before.unique().numel() == 3  # random
    bank.update(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.uint8))
    assert bank.confidence[1].item() == pytest.approx(0.9 * before[1].item())
    assert bank.confidence[0].item() == pytest.approx(0.9 * before[0].item() + 0.1 / 3)


def test_a_bank_and_a_pool_survive_a_checkpoint():
    bank, pool = bank_of(0.1, 0.9), ImagePool(4, 2, 8, CPU)
    pool.push(torch.ones(3, 3, 8, 8), torch.ones(3, 8, 8, dtype=torch.bool), torch.ones(3, 2) > 0)
    for new, old in ((bank_of(0.0, 0.0), bank), (ImagePool(4, 2, 8, CPU), pool)):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
        for name, value in old.state_dict().items():
            assert torch.equal(new.state_dict()[name], value)


def test_numbers_become_classes_by_their_probabilities():
    probs = torch.tensor([0.2, 0.0, 0.5, 0.3])
    numbers = torch.tensor([0.0, 0.1, 0.21, 0.69, 0.71, 0.9999999])
    assert choose(probs, numbers).tolist() == [0, 0, 2, 2, 3, 3]


def test_choosing_a_class_needs_nothing_that_deterministic_runs_refuse(monkeypatch):
    """On a GPU `torch.use_deterministic_algorithms` refuses cumulative sums of floats."""
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *a, **b: pytest.fail("cumsum"))
    assert choose(torch.tensor([0.5, 0.5]), torch.tensor([0.4, 0.6])).tolist() == [0, 1]


def test_shares_of_regions_lie_between_0_and_1(capsys):
    for flag in ("--region-share", "--listed-share"):
        for value in ("-0.1", "1", "nan"):
            with pytest.raises(SystemExit):
                ael.parse_args([flag, value])
            assert "--region-share and --listed-share lie in [0,1)" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- copy-paste


def test_weak_classes_are_pasted_more_often():
    bank, allowed = bank_of(0.0, 0.99, 0.0, 0.5), torch.tensor([1, 2, 3])
    drawn = torch.cat([copy_paste_classes(bank, allowed, 3, 0, t) for t in range(2000)])
    expected = torch.tensor([0.01, 1.0, 0.5]).sqrt().softmax(0)
    shares = torch.stack([(drawn == label).float().mean() for label in (1, 2, 3)])
    torch.testing.assert_close(shares, expected, atol=0.02, rtol=0)
    assert not (drawn == 0).any()


def test_all_pixels_of_the_classes_are_pasted_into_the_wanted_images():
    images, others = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    target = torch.full((2, 2, 2), 7, dtype=torch.uint8)
    theirs = torch.tensor([[[1, 2], [255, 3]], [[1, 2], [255, 3]]], dtype=torch.uint8)
    wanted = torch.tensor([True, False])
    pasted = copy_paste(images, target, others, theirs, torch.tensor([2, 3, 3]), wanted)
    assert pasted[0][0, 0].tolist() == [[0, 1], [0, 1]] and pasted[0][1].max() == 0
    assert pasted[1].tolist() == [[[7, 2], [7, 3]], [[7, 7], [7, 7]]]
    assert pasted[2].tolist() == [[[False, True], [False, True]], [[False, False], [False, False]]]


def test_what_is_pasted_onto_padding_counts():
    args = ael.parse_args(["--crop-size", "32", "-b", "8", "--device", "cpu"])
    valid = torch.ones(8, 32, 32, dtype=torch.bool)
    padded = valid.clone()
    padded[:, 20:] = False
    pixels = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)
    target = torch.full((8, 32, 32), 255, dtype=torch.uint8)
    batch_l = {"image": pixels, "valid_mask": padded, "target": target}
    batch_p = {"image": pixels, "valid_mask": valid, "target": torch.ones_like(target)}
    found = copy_paste_step(batch_l, batch_p, bank_of(0.5, 0.5), torch.tensor([1]), 0, args)
    _, target, valid_m, mask = found
    wanted = mask.flatten(1).all(1)
    assert 0 < wanted.sum() < 8 and not mask[~wanted].any()  # with chance ½
    assert valid_m[wanted].all() and torch.equal(valid_m[~wanted], padded[~wanted])
    assert (target[wanted] == 1).all() and (target[~wanted] == 255).all()


def test_the_background_is_never_pasted_and_names_are_checked():
    data = datasets.load(settings())
    args = ael.parse_args(["--device", "cpu"])
    assert pasted_classes(args, data) == list(range(1, 12))
    args.copy_paste_classes = ["ring", "bar"]
    assert [data.classes[number] for number in pasted_classes(args, data)] == ["ring", "bar"]
    args.copy_paste_classes = ["moon"]
    with pytest.raises(InputError, match="no class moon"):
        pasted_classes(args, data)


# ------------------------------------------------------------------------------- adaptive CutMix


def test_the_pool_is_a_ring():
    pool = ImagePool(5, 2, 4, CPU)
    for value in range(4):
        images = torch.full((2, 3, 4, 4), float(value))
        has = torch.tensor([[True, False], [False, value == 3]])
        pool.push(images, torch.ones(2, 4, 4, dtype=torch.bool), has)
    assert pool.images[:, 0, 0, 0].tolist() == [2, 3, 3, 1, 2]  # eight crops went round
    assert pool.filled == 5 and pool.head == 3
    numbers = torch.rand(100, 5, generator=torch.Generator().manual_seed(0))
    assert pool.find(torch.ones(100, dtype=torch.int64), numbers).unique().tolist() == [2]
    first = pool.find(torch.zeros(100, dtype=torch.int64), numbers).unique().tolist()
    assert first == [1, 4]


def test_the_pool_learns_what_the_teacher_sees_now():
    """Two passes over a crop add up, and one that is not looked at keeps what was seen in it."""
    pool, before = ImagePool(4, 3, 4, CPU), [True, False, True]
    pool.push(torch.zeros(4, 3, 4, 4), torch.ones(4, 4, 4) > 0, torch.tensor([before] * 4))
    has = [[False, True, False], [True, False, False], [False, False, True]]
    pool.learn(torch.tensor([1, 3, 3]), torch.tensor(has))
    assert pool.has.tolist() == [before, [False, True, False], before, [True, False, True]]


def test_a_class_that_no_crop_has_takes_any_crop_that_is_there():
    pool = ImagePool(8, 3, 4, CPU)
    pool.push(torch.zeros(3, 3, 4, 4), torch.ones(3, 4, 4) > 0, torch.zeros(3, 3) > 0)
    numbers = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
    found = pool.find(torch.full((200,), 2), numbers)
    assert found.unique().tolist() == [0, 1, 2]


def test_classes_in_an_image_need_a_share_of_its_pixels():
    label = torch.zeros(1, 10, 10, dtype=torch.uint8)
    label[0, 0, :2] = 1
    label[0, 1, :1] = 2
    label[0, 9] = 255
    assert classes_in(label, 4, 0.02).tolist() == [[True, True, False, False]]
    assert classes_in(label, 4, 0.0).tolist() == [[True, True, True, False]]


def test_boxes_bound_a_connected_region_of_the_class():
    label = torch.zeros(3, 16, 16, dtype=torch.uint8)
    label[0, 2:5, 3:8] = 1  # a region of 15 pixels ...
    label[0, 10, 10] = 1  # ... one of a pixel ...
    label[0, 12, 2], label[0, 13, 3] = 1, 1  # ... and one whose pixels touch at a corner
    label[1, 0:4, 0:4] = 2
    classes = torch.tensor([1, 2, 5])
    boxes, hit = component_boxes(label, classes, 64, 0.02, seed=0, iteration=3)
    assert boxes[0].tolist() == [8, 12, 20, 32] and boxes[1].tolist() == [0, 0, 16, 16]
    assert hit.tolist() == [1, 1, 0]
    top, left, bottom, right = boxes[2].tolist()  # CutMix-Seg's
    assert (bottom - top) * (right - left) == pytest.approx(64 * 64 / 2, rel=0.03)

    found = {
        tuple(component_boxes(label[:1], classes[:1], 16, 0.005, 0, t)[0][0].tolist())
        for t in range(60)
    }
    assert found == {(2, 3, 5, 8), (12, 2, 14, 4)}  # larger than 1.28 pixels


def test_boxes_become_masks():
    mask = box_mask(torch.tensor([[1, 0, 3, 2], [0, 0, 0, 0]]), 4, CPU)
    assert mask[0].int().tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert not mask[1].any()


# ------------------------------------------------------------------------------------- the loss


def test_sampling_rates_by_hand():
    bank = bank_of(0.9, 0.5, 0.0)
    torch.testing.assert_close(sampling_rates(bank, 1.0), torch.tensor([0.1, 0.5, 1.0]))
    torch.testing.assert_close(sampling_rates(bank, 0.5), torch.tensor([0.1, 0.5, 1.0]).sqrt())
    assert sampling_rates(bank_of(0.0, 0.0), 1.0).tolist() == [1, 1]


def test_the_loss_by_hand():
    """Two pixels of confidence 0.5 and 1, one below the threshold, one on padding."""
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    label = torch.tensor([[[0, 2], [255, 1]]], dtype=torch.uint8)
    confidence = torch.tensor([[[0.5, 1.0], [0.25, 0.9]]])
    valid = torch.tensor([[[True, True], [True, False]]])
    loss, kept = adaptive_loss(logits, label, confidence, valid, rates=None, gamma=2.0)
    ce = F.cross_entropy(logits, label.long(), ignore_index=255, reduction="none")[0]
    expected = (0.25 * ce[0, 0] + ce[0, 1]) / (0.25 + 1 + 0.0625)  # the unsure one's weight counts
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and kept.item() == 1
    loss, _ = adaptive_loss(logits, label, confidence, valid, rates=None, gamma=0.0)
    assert loss.item() == pytest.approx(((ce[0, 0] + ce[0, 1]) / 3).item(), rel=1e-5)
    nothing, kept = adaptive_loss(logits, label, confidence, valid & False, rates=None, gamma=2.0)
    nothing.backward()
    assert nothing.item() == 0 and kept.item() == 0 and logits.grad.abs().max() == 0


def test_what_the_student_predicts_decides_what_is_kept():
    logits = torch.zeros(1, 2, 40, 40)
    logits[:, 0, :20], logits[:, 1, 20:] = 9.0, 9.0  # the upper half is class 0
    label = torch.ones(1, 40, 40, dtype=torch.uint8)
    whole = torch.ones(1, 40, 40)
    rates = torch.tensor([0.0, 1.0])
    loss, kept = adaptive_loss(logits, label, whole, whole > 0, rates=rates, gamma=2.0)
    assert kept.item() == 0.5
    assert loss.item() == pytest.approx(0.0, abs=1e-3)  # the wrong upper half is left out
    torch.manual_seed(0)
    _, kept = adaptive_loss(
        logits, label, whole, whole > 0, rates=torch.tensor([0.3, 1.0]), gamma=2.0
    )
    assert kept.item() == pytest.approx(0.65, abs=0.03)


# ------------------------------------------------------------------------------------ an iteration


class Network(torch.nn.Module):
    """A convolution and a BatchNorm; remembers what it saw and how."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm = torch.nn.Conv2d(3, 12, 1), torch.nn.BatchNorm2d(12)
        self.seen: list[tuple[torch.Tensor, bool]] = []

    def forward(self, images: torch.Tensor, with_auxiliary: bool = False):
        self.seen.append((images, self.training))
        logits = self.norm(self.conv(images[:, :, ::4, ::4]))
        return (logits, None) if with_auxiliary else logits


def some_steps(*flags: str, count: int = 2):
    """Some iterations of a student and a teacher that differ.

    Returns:
        The student with its gradients, the teacher, the bank, the pool, the measures of each
        iteration, and the batches of the last.
    """
    args = ael.parse_args(["--crop-size", "32", "-b", "4", "--device", "cpu", *flags])
    data = datasets.load(settings())
    student, teacher = Network(1), Network(2).requires_grad_(False).train()
    bank, pool = ConfidenceBank(12, 0.99, CPU), ImagePool(16, 12, 32, CPU)
    allowed = torch.arange(1, 12)
    loaders = [
        train_loader(data, items, stream, args, 0, count)
        for stream, items in enumerate((data.labelled, data.labelled, data.unlabelled))
    ]
    torch.manual_seed(3)
    measured = []
    for iteration, batches in enumerate(zip(*loaders)):
        student.zero_grad()
        found = ael.train_step(
            student, teacher, bank, pool, allowed, list(batches), iteration, args
        )
        found["loss"].backward()
        measured.append(found)
    return student, teacher, bank, pool, measured, batches


def test_the_student_learns_and_the_teacher_labels_in_train_mode():
    student, teacher, bank, pool, measured, _ = some_steps()
    assert all(part.grad.abs().sum() > 0 for part in student.parameters())
    assert all(part.grad is None for part in teacher.parameters())
    assert all(training for _, training in teacher.seen) and len(teacher.seen) == 4
    assert [len(images) for images, _ in teacher.seen] == [4, 8, 4, 8]  # x_l'; u1 and u2
    assert pool.filled == 8 and (bank.confidence > 0).sum() > 6
    assert 0 < measured[0]["kept"].item() <= 1 and measured[0]["pasted"].item() > 0


def test_the_mixed_image_is_u2_inside_the_box_and_u1_outside():
    student, _, _, pool, _, batches = some_steps()
    first = normalise(batches[2]["image"], batches[2]["valid_mask"])
    mixed = student.seen[-1][0]
    inside = (mixed != first).any(1)
    assert inside.any()
    for image, mask in zip(mixed, inside):
        if not mask.any():
            continue  # the box of a crop that is the same there
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        place = pool.images.float()[
            :, :, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1
        ]
        distances = (place - box).abs().flatten(1).amax(1)
        assert distances.min() < 0.01  # a crop of the pool, at the same place


class Encoder(torch.nn.Module):
    """A teacher whose label is the brightness of a pixel of stride 4, and its confidence, too."""

    def forward(self, images):
        bright = images[:, 0, ::4, ::4]
        return torch.stack([torch.zeros_like(bright), bright, -9 + 0 * bright], 1)


def test_labels_confidence_and_padding_are_mixed_as_the_images():
    """The teacher's logits tell which image a pixel is of."""
    size, count = 32, 4
    args = ael.parse_args(["--crop-size", "32", "-b", "4", "--device", "cpu"])
    pool, bank = ImagePool(16, 3, size, CPU), ConfidenceBank(3, 0.9, CPU)
    valid = torch.ones(count, size, size, dtype=torch.bool)
    pool.push(torch.full((count, 3, size, size), 5.0), valid, torch.ones(count, 3) > 0)
    dark = torch.zeros(count, size, size, 3, dtype=torch.uint8)  # below 0 when normalised
    padded = valid.clone()
    padded[:, 28:] = False
    batch = {"image": dark, "valid_mask": padded}
    looked_at = choose_crops(bank, pool, count, 3, args)[1]
    images, label, confidence, valid_m, _ = adaptive_cutmix(Encoder(), batch, bank, pool, 3, args)
    inside = images[:, 0] == 5  # of the pool's crops
    assert 0.05 < inside.float().mean() < 0.95
    assert (valid_m == (inside | padded)).all()
    assert (label[inside] == 1).float().mean() > 0.99
    assert (label[~inside & padded] == 0).all() and (label[~inside & ~padded] == 255).all()
    assert confidence[inside].mean() > 0.99 > confidence[~inside & padded].mean()
    # The pool knows what the teacher has seen: one class in the bright crops, the other in these.
    seen = torch.isin(torch.arange(count), looked_at)
    assert (pool.has[:count][seen] == torch.tensor([False, True, False])).all()
    assert pool.has[:count][~seen].all()
    assert (pool.has[count : 2 * count] == torch.tensor([True, False, False])).all()
    assert torch.equal(pool.valid_mask[count : 2 * count], padded) and pool.filled == 2 * count


def test_padding_has_no_class():
    """A crop would be listed for the class that a teacher sees in the grey around it."""
    valid = torch.ones(1, 32, 32, dtype=torch.bool)
    valid[:, :, 20:] = False
    label, _, low = label_whole(Encoder(), torch.ones(1, 3, 32, 32), valid, 0.0)
    for found, mask in ((label, valid), (low, valid[:, ::4, ::4])):
        assert (found[mask] == 1).all() and (found[~mask] == 255).all()


def test_the_teacher_is_the_average():
    student, teacher = Network(1), Network(2)
    before = teacher.conv.weight.clone()
    mean = teacher.norm.running_mean.clone()
    student.norm.running_mean.fill_(9.0)
    ael.ema_update(teacher, student, 0.75)
    torch.testing.assert_close(teacher.conv.weight, 0.75 * before + 0.25 * student.conv.weight)
    assert torch.equal(teacher.norm.running_mean, mean)  # statistics of its own


def test_sampling_and_weights_reach_the_loss(monkeypatch):
    """The rates are those of the bank after this batch, and γ is the flag's."""
    given = []

    def noted(*inputs, rates, gamma):
        given.append((rates, gamma))
        return adaptive_loss(*inputs, rates=rates, gamma=gamma)

    monkeypatch.setattr(ael, "adaptive_loss", noted)
    _, _, bank, *_ = some_steps("--gamma", "1.5", "--labelled-consistency", count=1)
    torch.testing.assert_close(given[0][0], sampling_rates(bank, 1.0))
    assert given[0][1] == given[1][1] == 1.5
    some_steps("--no-aes", "--no-drw", count=1)
    assert given[2:] == [(None, 0.0)]


def test_flags_leave_parts_out():
    everything = some_steps()[4][-1]
    assert some_steps("--no-acp")[4][-1]["pasted"].item() == 0
    assert some_steps("--no-aes")[4][-1]["kept"].item() == 1
    assert some_steps("--no-acm")[4][-1]["found"].item() == 0
    for flag in ("--no-drw", "--labelled-consistency", "--no-acm"):
        assert some_steps(flag)[4][-1]["loss"].item() != everything["loss"].item()
    # The term on labelled images is added.
    alone = some_steps("--no-aes")[4][0]
    both = some_steps("--labelled-consistency", "--no-aes")[4][0]
    assert alone["loss_unsup"].item() < both["loss_unsup"].item()
    assert alone["loss_sup"].item() == both["loss_sup"].item()


def test_the_first_iteration_mixes_with_the_batch_itself():
    _, teacher, *_ = some_steps(count=1)
    images = teacher.seen[1][0]
    assert torch.equal(images[4:], images[:4].roll(1, 0))


def test_a_fresh_students_loss_is_that_of_chance(begin, monkeypatch):
    """ln 12 on labelled images; and all pixels are kept, since no class is known."""
    run = begin(ael, "--max-iters", "1")
    measured = {}
    monkeypatch.setattr(ael, "Run", lambda args: run)
    monkeypatch.setattr(ael, "validate", lambda *_: ({}, {}))
    monkeypatch.setattr(run, "finish", lambda *_: None)
    monkeypatch.setattr(run, "log", measured.update)
    ael.main(run.args)
    assert measured["loss_sup"].item() == pytest.approx(2.485, abs=0.35)
    assert measured["kept"].item() == 1
