"""U2PL: terms against loops that follow their definitions, the memory bank, and runs."""

import copy
import math
from collections import deque
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import NATIVE, never_waiting, run, settings, write_picture
from test_scripts import same, start, wait_for, weights

import u2pl
from common import InputError, datasets, distributed
from common.adaptive import ConfidenceBank, ImagePool
from common.augment import normalise
from common.data import train_loader
from common.run import Run, place, to_device
from common.schedule import Schedule
from common.step import usual_contrast_loss

CPU = torch.device("cpu")


def bank_of(classes: int, capacity: int, channels: int = 8) -> u2pl.MemoryBank:
    """An empty memory bank on the CPU."""
    return u2pl.MemoryBank(classes, capacity, channels, CPU)


def example(seed: int = 0, classes: int = 6, n: int = 2, size: int = 12, low_size: int = 5) -> dict:
    """Random inputs of step 4, with ignored pixels in both halves and class 2 absent."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, size, size)
    target, label = (torch.randint(0, classes - 1, shape, generator=generator) for _ in range(2))
    for maps in (target, label):
        maps[maps == 2] = classes - 1
        maps[:, : size // 4] = 255
    entropy = torch.rand(n, size, size, generator=generator)
    return {
        "logits_t": 2 * torch.randn(2 * n, classes, low_size, low_size, generator=generator),
        "target_l": target.to(torch.uint8),
        "label_u": label.to(torch.uint8),
        "entropy": entropy,
        "percentiles": torch.tensor([0.3, 0.6]),
    }


def roles_by_loops(inputs: dict, args) -> torch.Tensor:
    """(3,C,P) by the definition, one pixel and class at a time."""
    logits, low, high = inputs["logits_t"], *inputs["percentiles"].tolist()
    count, classes, h, w = logits.shape
    n, size = count // 2, inputs["target_l"].shape[1]
    roles = np.zeros((3, classes, count, h, w), bool)
    for i in range(count):
        for y in range(h):
            for x in range(w):
                at = (i % n, y * size // h, x * size // w)
                label = (inputs["target_l"] if i < n else inputs["label_u"])[at].item()
                entropy = 0.0 if i < n else inputs["entropy"][at].item()
                probs = logits[i, :, y, x].softmax(0).tolist()
                if label == 255:
                    continue
                certain = entropy < high if args.anchors == "paper" else entropy <= low
                for c in range(classes):
                    rank = sum(p > probs[c] for p in probs)
                    if label == c and certain:
                        roles[0, c, i, y, x] = args.anchors == "released" or probs[c] > 0.3
                        roles[1, c, i, y, x] = probs[c] > 0.3
                    if i < n:
                        negative = label != c and (rank < args.low_rank or not args.prt)
                    else:
                        in_ranks = args.low_rank <= rank < args.high_rank
                        negative = in_ranks if args.prt else label != c
                        if args.negatives != "all":
                            negative &= (entropy >= high) == (args.negatives == "unreliable")
                    if args.negatives_as_released:
                        negative &= label == c
                    roles[2, c, i, y, x] = negative
    return torch.from_numpy(roles).flatten(2)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--negatives", "reliable"),
        ("--negatives", "all", "--high-rank", "5"),
        ("--no-prt",),
        ("--negatives-as-released", "--low-rank", "1"),
        ("--low-rank", "6"),
        ("--anchors", "paper"),
    ],
    ids=" ".join,
)
def test_anchors_positives_and_negatives_are_the_definition(flags):
    args, inputs = u2pl.parse_args(list(flags)), example()
    found = torch.stack(u2pl.pixel_roles(**inputs, **u2pl.role_flags(args)))
    expected = roles_by_loops(inputs, args)
    assert torch.equal(found, expected)
    assert expected[0].any() and expected[1].any() and not expected[1][2].any()
    if flags == ("--low-rank", "6"):  # as many classes: unlabelled pixels give none
        assert expected[2].any() and not expected[2].view(6, 4, 25)[:, 2:].any()
    if "--negatives-as-released" in flags:
        assert expected[2].any() and not expected[2].view(6, 4, 25)[:, :2].any()


@pytest.mark.parametrize(
    ("anchors", "expected_positive", "expected_anchor"),
    [
        ("released", [[1, 2], [0]], [[1], [0]]),
        ("paper", [[1], [0, 1]], [[1], [0, 1]]),
    ],
)
def test_anchors_of_class_0_in_an_example_of_2x2(anchors, expected_positive, expected_anchor):
    """The pixels are numbered 0 1 / 2 3; first those of the labelled image, then of the unlabelled.

    Labelled: 0 is of class 1; 1 and 2 of class 0, of which the teacher is sure only at 1; 3 is
    ignored.
    Unlabelled: all but the last are pseudo-labelled 0. The thresholds of H are 0.2 and 0.8: pixel 0
    has low H, 1 and 2 are reliable, but at 2 p'(0) is below δ_p = 0.3; 3 is unreliable.
    """
    sure, unsure = [0.9, 0.06, 0.04], [0.25, 0.5, 0.25]
    probs = torch.tensor([[unsure, sure, unsure, sure], [sure, sure, unsure, unsure]])
    percentiles = torch.tensor([0.2, 0.8])
    positive, anchor, _ = u2pl.pixel_roles(
        logits_t=probs.log().transpose(1, 2).reshape(2, 3, 2, 2),
        target_l=torch.tensor([[[1, 0], [0, 255]]], dtype=torch.uint8),
        label_u=torch.tensor([[[0, 0], [0, 1]]], dtype=torch.uint8),
        entropy=torch.tensor([[[0.1, 0.5], [0.7, 0.9]]]),
        percentiles=percentiles,
        anchors=anchors,
    )
    for found, expected in ((positive, expected_positive), (anchor, expected_anchor)):
        assert [image.nonzero().flatten().tolist() for image in found[0].view(2, 4)] == expected


def test_the_weight_of_the_contrast_is_what_was_published_in_one_process(capsys):
    """The release's 1, divided by its processes once more: 4 on VOC, 8 on Cityscapes."""
    published = {"voc": 1 / 4, "folder": 1 / 4, "cityscapes": 1 / 8, "shapes": 1, "camvid": 1}
    for data, weight in published.items():
        flags = ["--data", data, "--weights", "none"]
        assert u2pl.parse_args(flags).contrast_weight == weight
        assert u2pl.parse_args([*flags, "--contrast-weight", "0.1"]).contrast_weight == 0.1
    with pytest.raises(SystemExit):
        u2pl.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "default: 1; voc, and folder on a GPU, 0.25; cityscapes 0.125, with --ael 0.0125" in text


def test_the_help_lists_the_settings_with_and_without_ael(capsys):
    """Found wrong once: with --ael it listed those without."""
    args = u2pl.parse_args(["--ael", "--data", "cityscapes", "--weights", "none"])
    assert (args.method, args.contrast_weight, args.head_lr_mult) == ("u2pl-ael", 0.0125, 10.0)
    for flags, weight in ([], "0.125"), (["--ael"], "0.0125"):
        with pytest.raises(SystemExit):
            u2pl.parse_args([*flags, "--help"])
        assert f"contrast_weight {weight}," in " ".join(capsys.readouterr().out.split())


def test_the_contrast_is_the_definition(monkeypatch):
    """Loops over classes, anchors and negatives give the same loss and gradient as tensors.

    They are told what was drawn at random.
    """
    roles = u2pl.pixel_roles(**example())
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(4, 8, 5, 5, generator=generator, requires_grad=True)
    features_t = torch.randn(4, 8, 5, 5, generator=generator)
    bank, drawn = bank_of(6, 128), {}
    choose, draw = u2pl.choose, u2pl.MemoryBank.draw
    note = lambda name, value: drawn.setdefault(name, value)  # noqa: E731
    monkeypatch.setattr(u2pl, "choose", lambda *a: note("anchors", choose(*a)))
    monkeypatch.setattr(u2pl.MemoryBank, "draw", lambda *a: note("rows", draw(*a)))
    loss, share = u2pl.contrast_loss(features, features_t, roles, bank)
    rows, (chosen, available) = drawn["rows"], drawn["anchors"]

    members, candidates, negatives = roles
    vectors, vectors_t = (x.permute(0, 2, 3, 1).reshape(-1, 8) for x in (features, features_t))
    total, present = 0.0, 0
    for c in range(6):
        pixels = [p for p in range(100) if members[c, p]]
        if not pixels:
            assert c == 2
            continue
        present += 1
        positive = vectors_t[pixels].mean(0)
        new = [vectors_t[p] for p in range(100) if negatives[c, p]]
        keys = {tuple(F.normalize(vector, dim=0).half().tolist()) for vector in new}
        assert keys == {tuple(key.tolist()) for key in bank.keys[c, : bank.filled[c]]} and keys
        assert candidates[c, chosen[c]].all()
        assert available[c] == candidates[c].sum() > 0 and rows[c].max() < bank.filled[c]
        for a in range(u2pl.ANCHORS):
            anchor = vectors[chosen[c, a]]
            drawn_keys = bank.keys[c, rows[c, a].long()].float()
            similarity = [F.cosine_similarity(anchor, positive, dim=0)]
            similarity += list(F.cosine_similarity(anchor[None], drawn_keys))
            exponentials = (torch.stack(similarity) / 0.5).exp()
            total = total - (exponentials[0] / exponentials.sum()).log() / u2pl.ANCHORS
    assert present == 5
    torch.testing.assert_close(loss, total / present, rtol=1e-5, atol=0)
    assert share.item() == pytest.approx(candidates.sum().item() / 100)
    found, expected = (torch.autograd.grad(x, features)[0] for x in (loss, total / present))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_an_empty_bank_absent_classes_and_nothing_valid_weigh_nothing():
    features = torch.randn(4, 8, 5, 5, requires_grad=True)
    roles = [torch.zeros(3, 100, dtype=torch.bool) for _ in range(3)]
    loss, _ = u2pl.contrast_loss(features, features.detach(), roles, bank_of(3, 16))
    loss.backward()
    assert loss.item() == 0 and features.grad.abs().max() == 0
    # One class alone: 0. Two, of which one has an empty bank: half the mean of the other.
    for present in (1, 2):
        roles = [torch.zeros(3, 100, dtype=torch.bool) for _ in range(3)]
        for c in range(present):
            roles[0][c, 10 * c : 10 * c + 10] = roles[1][c, 10 * c : 10 * c + 10] = True
        roles[2][0, 50:] = True
        features.grad = None
        bank = bank_of(3, 16)
        torch.manual_seed(0)
        loss, _ = u2pl.contrast_loss(features, features.detach(), roles, bank)
        loss.backward()
        reached = features.grad.permute(0, 2, 3, 1).reshape(100, 8).abs().sum(1) > 0
        assert bank.filled.tolist() == [16, 0, 0]
        assert loss.item() == 0 if present == 1 else loss.item() > 1  # about log(51)/2
        assert not reached[10:].any() and reached[:10].any() == (present == 2)


def test_the_bank_is_a_queue_for_each_class():
    bank, queues = bank_of(3, 7, 4), [deque(maxlen=7) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        keys = torch.randn(3, 5, 4, generator=generator)
        counts = torch.randint(0, 6, (3,), generator=generator)
        counts[2] = 0
        bank.push(keys, counts)
        for c in range(3):
            queues[c].extend(tuple(key.half().tolist()) for key in keys[c, : counts[c]])
            oldest, next_one = int(bank.head[c] - bank.filled[c]), int(bank.head[c])
            held = [tuple(bank.keys[c, at % 7].tolist()) for at in range(oldest, next_one)]
            assert held == list(queues[c])
    assert bank.filled.tolist() == [7, 7, 0]
    rows = bank.draw(11, 50)
    assert rows.shape == (3, 11, 50) and rows.dtype == torch.int32 and rows[2].max() == 0
    assert set(rows[0].flatten().tolist()) == set(range(7))


def test_choosing_is_uniform_and_only_among_the_candidates():
    candidates = torch.zeros(3, 40, dtype=torch.bool)
    candidates[0, [3, 17, 39]] = candidates[1, 5] = True
    chosen, number = u2pl.choose(candidates, 9000)
    assert number.tolist() == [3, 1, 0] and set(chosen[1].tolist()) == {5}
    assert all(abs((chosen[0] == at).double().mean().item() - 1 / 3) < 0.02 for at in (3, 17, 39))
    once, count = u2pl.choose_once(candidates, 8)
    assert count.tolist() == [3, 1, 0]
    assert set(once[0, :3].tolist()) == {3, 17, 39} and once[1, 0] == 5
    often = torch.zeros(40)
    candidates[0] = True
    for _ in range(2000):
        picked, _ = u2pl.choose_once(candidates[:1], 8)
        assert len(set(picked[0].tolist())) == 8
        often[picked[0]] += 1
    assert (often / 2000 - 8 / 40).abs().max() < 0.05


def test_reliable_pixels_and_their_loss_are_the_definition():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 9, 9, generator=generator)
    label = torch.randint(0, 4, (2, 9, 9), generator=generator).to(torch.uint8)
    label[:, :3] = 255
    entropy = torch.rand(2, 9, 9, generator=generator)
    entropy[0, 0] = 7.0  # padding: counts nowhere
    valid = label != 255
    percentiles = u2pl.entropy_percentiles(entropy, label, 17.0)
    expected = np.percentile(entropy[valid].double().numpy(), [17.0, 83.0])
    torch.testing.assert_close(percentiles.double(), torch.from_numpy(expected), rtol=1e-6, atol=0)

    loss, kept = u2pl.unsup_loss(logits, label, entropy, percentiles[1])
    each = F.cross_entropy(logits, label.long(), ignore_index=255, reduction="none")
    reliable = valid & (entropy < percentiles[1])
    weighted = each[reliable].mean() * valid.sum() / reliable.sum()
    assert kept.item() == pytest.approx((reliable.sum() / valid.sum()).item())
    assert loss.item() == pytest.approx(weighted.item(), rel=1e-5)

    nothing = torch.full_like(label, 255)
    percentiles = u2pl.entropy_percentiles(entropy, nothing, 17.0)
    loss, kept = u2pl.unsup_loss(logits.requires_grad_(), nothing, entropy, percentiles[1])
    loss.backward()
    assert percentiles.isnan().all() and loss.item() == 0 and kept.item() == 0
    assert logits.grad.abs().max() == 0


def prepared(*flags: str, device: torch.device = CPU) -> SimpleNamespace:
    """Networks, bank, two batches and settings of a step on the built-in data.

    A corner of every image is padding.
    """
    small = ["--crop-size", "32", "-b", "2", "--dropout", "0", "--warmup-iters", "0"]
    args = u2pl.parse_args([*small, "--device", device.type, *flags])
    data = datasets.load(settings())
    torch.manual_seed(0)
    student = place(u2pl.Network(args, data.num_classes), args, device)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    bank = None
    if args.contrast:
        channels = student.feature_channels
        bank = u2pl.MemoryBank(data.num_classes, u2pl.CAPACITY, channels, device)
    lists = (data.labelled, data.unlabelled)
    batch_l, batch_u = (
        next(iter(train_loader(data, items, stream, args, 0, 1)))
        for stream, items in enumerate(lists)
    )
    for batch in (batch_l, batch_u):
        batch["valid_mask"][:, 20:, 24:] = False
    batch_l["target"][~batch_l["valid_mask"]] = 255
    return SimpleNamespace(
        student=student,
        teacher=teacher,
        bank=bank,
        batch_l=to_device(batch_l, device),
        batch_u=to_device(batch_u, device),
        args=args,
    )


def do_step(parts: SimpleNamespace, iteration: int, total: int = 900) -> dict[str, torch.Tensor]:
    """A training step after the warm-up; 900 iterations are the preset of shapes."""
    given = (parts.student, parts.teacher, parts.bank, parts.batch_l, parts.batch_u)
    return u2pl.train_step(*given, iteration, total, parts.args)


def test_a_step_is_what_the_docstring_says(monkeypatch):
    """Steps 1 to 6."""
    parts = prepared("--cutmix-prob", "1", "--contrast-weight", "0.3")
    with torch.no_grad():  # a teacher that differs
        for parameter in parts.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for network in (parts.student, parts.teacher):  # sure of some pixels, or none were anchors
            network.classifier.weight.mul_(10)
    before = copy.deepcopy(parts)
    given = []
    contrast = u2pl.contrast_loss
    monkeypatch.setattr(u2pl, "contrast_loss", lambda *a: given.append(a) or contrast(*a))
    measured = do_step(parts, 40, total=100)
    measured["loss"].backward()

    batch_l, batch_u = parts.batch_l, parts.batch_u
    images_u = normalise(batch_u["image"], batch_u["valid_mask"])
    up = lambda x: F.interpolate(x, (32, 32), mode="bilinear", align_corners=True)  # noqa: E731
    with torch.no_grad():
        label = up(before.teacher(images_u)).argmax(1)  # eval mode, unmixed
        label[~batch_u["valid_mask"]] = 255
        mask = u2pl.wide_box_masks(2, 32, parts.args.seed, 40, CPU)
        assert 0.45 < mask.float().mean() < 0.55
        # Of two images the next is the other.
        images_u = torch.where(mask[:, None], images_u.flip(0), images_u)
        label = torch.where(mask, label.flip(0), label)
        images = torch.cat([normalise(batch_l["image"], batch_l["valid_mask"]), images_u])
        logits_t, features_t, _ = before.teacher.train()(images, return_features=True)
        logits, features, _ = before.student(images, return_features=True)
        probs = up(logits_t)[2:].softmax(1)
        entropy = torch.special.entr(probs).sum(1)
    alpha = 0.2 * 0.6  # 20 % · (1 - 40/100)
    shares = torch.tensor([alpha, 1 - alpha], dtype=torch.float64)
    low, gamma = torch.quantile(entropy[label != 255].double(), shares)
    assert (label == 255).any()
    reliable = (label != 255) & (entropy < gamma)
    share = reliable.sum() / (label != 255).sum()
    loss_sup = F.cross_entropy(up(logits[:2]), batch_l["target"].long(), ignore_index=255)
    each = F.cross_entropy(up(logits[2:]), label, ignore_index=255, reduction="none")
    loss_unsup = each[reliable].mean() / share
    torch.testing.assert_close(measured["loss_sup"], loss_sup, rtol=1e-5, atol=0)
    # A pixel may lie on the edge of γ.
    torch.testing.assert_close(measured["loss_unsup"], loss_unsup, rtol=1e-3, atol=0)
    torch.testing.assert_close(measured["kept"], share, rtol=0, atol=2e-3)

    torch.testing.assert_close(given[0][0], features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(given[0][1], features_t, rtol=1e-4, atol=1e-4)
    thresholds = torch.stack([low, gamma]).float()
    label = label.to(torch.uint8)
    expected = u2pl.pixel_roles(logits_t, batch_l["target"], label, entropy, thresholds)
    for found, wanted in zip(given[0][2], expected):  # but for pixels on an edge
        assert wanted.any() and (found != wanted).float().mean() < 2e-3
    assert measured["loss_contrast"] > 0 and measured["fill"] > 0
    total = measured["loss_sup"] + measured["loss_unsup"] + 0.3 * measured["loss_contrast"]
    torch.testing.assert_close(measured["loss"], total)
    assert all(parameter.grad is None for parameter in parts.teacher.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in parts.student.parameters())


# ------------------------------------------------------------------------------------- with --ael


def test_labels_are_dropped_by_entropy_in_either_direction():
    entropy = torch.tensor([[[0.1, 0.2, 0.3, 0.4, 0.5]]])
    label = torch.tensor([[[0, 1, 2, 3, 4]]], dtype=torch.uint8)
    percentiles = torch.tensor([0.2, 0.4])
    highest = u2pl.drop_by_entropy(label, entropy, percentiles, lowest=False)
    assert highest.flatten().tolist() == [0, 1, 2, 255, 255]  # the paper's: H < γ stays
    lowest = u2pl.drop_by_entropy(label, entropy, percentiles, lowest=True)
    assert lowest.flatten().tolist() == [255, 1, 2, 3, 4]  # the most certain go, as released


def with_ael(*flags: str) -> tuple[SimpleNamespace, u2pl.Equalisation, list[dict]]:
    """`prepared` with what AEL remembers; and the labelled images stand for those to paste from."""
    parts = prepared("--ael", *flags)
    weak = u2pl.Equalisation(
        ConfidenceBank(12, 0.99, CPU), ImagePool(8, 12, 32, CPU), torch.arange(1, 12)
    )
    batches = [parts.batch_l, parts.batch_l, parts.batch_u]
    with torch.no_grad():  # a teacher that differs
        for parameter in parts.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return parts, weak, batches


def ael_step(parts, weak, batches, iteration: int) -> dict[str, torch.Tensor]:
    """A step with --ael of 900 iterations."""
    state = parts.student, parts.teacher, parts.bank
    return u2pl.ael_step(*state, weak, batches, iteration, 900, parts.args)


def test_with_ael_the_student_learns_and_both_memories_fill(monkeypatch):
    monkeypatch.setattr(u2pl, "SURE", 0.0)  # a fresh network is sure of nothing
    parts, weak, batches = with_ael("--contrast-weight", "0.3")
    early = ael_step(parts, weak, batches, 89)
    assert early["loss_contrast"].item() == 0 and parts.bank.filled.sum() == 0
    assert weak.pool.filled == 2 and weak.bank.confidence.max() > 0
    measured = ael_step(parts, weak, batches, 90)  # a tenth of 900
    assert measured["loss_contrast"].item() > 0 and parts.bank.filled.sum() > 0
    total = sum(measured[name] for name in ("loss_sup", "loss_unsup"))
    total = total + 0.3 * measured["loss_contrast"]
    torch.testing.assert_close(measured["loss"], total)
    measured["loss"].backward()
    assert all(part.grad.abs().sum() > 0 for part in parts.student.classifier.parameters())
    assert all(part.grad is None for part in parts.teacher.parameters())


def test_the_direction_of_the_entropy_changes_the_loss():
    losses = []
    for flags in ((), ("--entropy-as-released",)):
        parts, weak, batches = with_ael("--no-contrast", *flags)
        torch.manual_seed(1)
        losses.append(ael_step(parts, weak, batches, 100)["loss_unsup"].item())
    assert losses[0] != losses[1]


def test_the_released_weight_with_ael_and_flags_that_go_together(capsys):
    args = u2pl.parse_args(["--ael", "--data", "cityscapes", "--device", "cpu", "-j", "0"])
    assert args.contrast_weight == pytest.approx(0.1 / 8)
    assert args.output_dir == "runs/u2pl-ael-cityscapes-1-8-seed0"
    with pytest.raises(SystemExit):
        u2pl.parse_args(["--entropy-as-released"])
    assert "goes with --ael" in capsys.readouterr().err


@pytest.fixture
def traced(begin, train, monkeypatch):
    """Trains with a warm-up of two iterations and gives what each later one found and did.

    The first list has the states of teacher, student and bank before each step after the warm-up.
    The second has the teacher's parameters before the average, the student's, m, and the teacher's
    after it. The networks of the last checkpoint come third.
    """

    def traced(*flags: str) -> tuple[list[tuple], list[tuple], dict]:
        steps, averages = [], []
        step, average = u2pl.train_step, u2pl.ema_update

        def noted_step(student, teacher, bank, *rest):
            steps.append(copy.deepcopy((teacher.state_dict(), student.state_dict(), bank.filled)))
            return step(student, teacher, bank, *rest)

        def noted_average(teacher, student, decay):
            old, new = ([p.detach().clone() for p in f.parameters()] for f in (teacher, student))
            average(teacher, student, decay)
            averages.append((old, new, decay, copy.deepcopy(list(teacher.parameters()))))

        monkeypatch.setattr(u2pl, "train_step", noted_step)
        monkeypatch.setattr(u2pl, "ema_update", noted_average)
        monkeypatch.setattr(u2pl, "reliable_pixels_figure", lambda *_: None)
        networks = train(u2pl, begin(u2pl, "--warmup-iters", "2", *flags))
        return steps, averages, networks

    return traced


def test_the_average_warms_up(traced):
    """m = min(1 - 1/t, 0.6) at t = 1, 2, ..., of the student after its step."""
    _, averages, networks = traced("--max-iters", "6", "--ema-decay", "0.6")
    assert [decay for _, _, decay, _ in averages] == [0, 1 / 2, 0.6, 0.6]
    for old, student, m, teacher in averages:
        for was, new, now in zip(old, student, teacher, strict=True):
            torch.testing.assert_close(now, m * was + (1 - m) * new, rtol=1e-4, atol=1e-6)
    names = [name for name, _ in u2pl.Network(u2pl.parse_args([]), 6).named_parameters()]
    for name, student in zip(names, averages[-1][1], strict=True):
        assert torch.equal(student, networks["student"][name])


def test_in_the_warm_up_the_teacher_is_a_copy_and_not_the_student(traced):
    steps, averages, _ = traced("--max-iters", "4")
    teacher, student, filled = steps[0]
    assert same({"n": teacher}, {"n": student}) and filled.max() == 0
    teacher, student, filled = steps[1]  # t = 1: m = 0, the student after its step
    assert filled.max() > 0
    _, student, m, teacher = averages[0]
    assert m == 0 and all(torch.equal(a, b) for a, b in zip(teacher, student, strict=True))
    _, student, _, teacher = averages[1]
    assert not all(torch.equal(a, b) for a, b in zip(teacher, student, strict=True))


def test_a_warm_up_step_is_the_supervised_loss_alone():
    parts = prepared()
    measured = u2pl.warm_up_step(parts.student, parts.batch_l, parts.args)
    assert measured["loss"] == measured["loss_sup"] > 0 and measured["loss_contrast"] == 0
    assert list(measured) == list(do_step(parts, 0))  # the columns of metrics.csv


def test_the_warm_up_of_voc_is_an_epoch_and_never_the_whole_run():
    args = u2pl.parse_args(["--data", "voc", "--weights", "none"])
    schedule = Schedule(args, 9259, processes=1)
    assert (u2pl.warm_up_length(args, schedule), schedule.total) == (578, 80 * 578)
    args = u2pl.parse_args(["--data", "voc", "--weights", "none", "--epochs", "1"])
    refused = "nothing of 578 iterations is left after a warm-up of 578"
    with pytest.raises(InputError, match=refused):
        u2pl.warm_up_length(args, Schedule(args, 9259, processes=1))
    with pytest.raises(SystemExit):
        u2pl.parse_args(["--max-iters", "200"])  # as many as the warm-up of shapes


def test_ablation_flags_change_what_they_say():
    flags = ("--no-contrast", "--no-dpa", "--alpha0", "30", "--cutmix-prob", "0")
    parts = prepared(*flags)
    assert parts.student.representation is None
    measured = do_step(parts, 899)
    assert measured["loss_contrast"] == 0
    assert measured["kept"].item() == pytest.approx(0.7, abs=0.005)
    measured = do_step(prepared("--alpha0", "30"), 450)
    assert measured["kept"].item() == pytest.approx(0.85, abs=0.005)


def test_without_the_contrast_no_bank_is_kept(begin, train, monkeypatch):
    monkeypatch.setattr(u2pl, "reliable_pixels_figure", lambda *_: None)
    run = begin(u2pl, "--warmup-iters", "0", "--max-iters", "1", "--no-contrast")
    train(u2pl, run)
    assert "bank" not in run.states and run.networks["student"].representation is None


def test_cityscapes_has_ohem_an_auxiliary_head_and_window():
    flags = ["--data", "cityscapes", "--backbone", "resnet18", "--weights", "none"]
    args = u2pl.parse_args(flags)
    assert (args.ohem, args.aux_weight, args.warmup_epochs) == ((0.7, 50_000), 0.4, 0)
    assert args.eval_window == 769
    network = u2pl.Network(args, 19).eval()
    found = network(torch.zeros(1, 3, 64, 64), return_features=True)
    shapes = [(1, 19, 16, 16), (1, 256, 16, 16), (1, 19, 8, 8)]
    assert [part.shape for part in found] == shapes
    logits, _, auxiliary = found
    target = torch.randint(0, 19, (1, 64, 64))
    up = lambda x: F.interpolate(x, (64, 64), mode="bilinear", align_corners=True)  # noqa: E731
    expected = sum(
        weight * F.cross_entropy(up(x), target) for weight, x in ((1, logits), (0.4, auxiliary))
    )
    loss = u2pl.supervised_loss(logits, auxiliary, target, None, args.aux_weight)
    torch.testing.assert_close(loss, expected)


def announced(*flags: str) -> list[str]:
    """What a run on the built-in data says about its settings."""
    said = []
    run = SimpleNamespace(
        args=u2pl.parse_args(list(flags)), data=datasets.load(settings()), say=said.append
    )
    u2pl.announce(run, bank_of(12, u2pl.CAPACITY, 64), 50)
    return said


def test_the_bank_for_voc_fits_and_few_classes_are_announced():
    bank = u2pl.MemoryBank(21, u2pl.CAPACITY, 256, torch.device("meta"))
    assert 300e6 < bank.keys.nbytes <= 350e6
    said = announced("--low-rank", "12")
    assert said[0] == "warm-up: 50 iterations on labelled images alone"
    assert said[1] == "memory bank: 12 classes x 30000 keys of 64, torch.float16: 46 MB"
    assert said[2] == "no class of 12 has rank 12: unlabelled images give no negatives"
    assert len(announced()) == 2


SHORT = (
    "--max-iters", "8", "--eval-iters", "4", "--log-interval", "1", "--save-interval", "2",
    "-b", "2", "--crop-size", "32", "--warmup-iters", "1", "--device", "cpu",
)  # fmt: skip


def bank_in(folder) -> dict[str, torch.Tensor]:
    """The memory bank of a run's last checkpoint."""
    return torch.load(folder / "last.pt", weights_only=True)["states"]["bank"]


def test_killed_with_a_part_filled_bank_and_resumed(tmp_path):
    run("u2pl.py", *SHORT, "--output-dir", tmp_path / "whole")
    process = start("u2pl.py", *SHORT, "--output-dir", tmp_path / "killed")
    wait_for(process, "iter      7/8")
    process.kill()
    process.wait()
    bank = bank_in(tmp_path / "killed")
    assert 0 < bank["filled"].max() < bank["keys"].shape[1]
    resumed = run("u2pl.py", "--resume", tmp_path / "killed").stdout
    assert resumed.count("resumed at iteration 6") == 1
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert same(weights(whole), weights(killed))
    assert same({"bank": bank_in(whole)}, {"bank": bank_in(killed)})
    best = torch.load(whole / "best.pt", weights_only=True)
    assert set(best["networks"]) == {"teacher", "student"} and "states" not in best
    assert (tmp_path / "whole" / "figures" / "reliable_pixels.png").is_file()
    write_picture(tmp_path / "images" / "one.png")
    result = run("-m", "common.predict", tmp_path / "whole", tmp_path / "images")
    assert "1 images predicted" in result.stdout


# ------------------------------------------------------------------------------------ two processes


def in_turn(candidates: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`u2pl.choose` without chance: the candidates one after the other."""
    number = candidates.sum(1)
    wanted = torch.arange(count) % number.clamp_min(1)[:, None] + 1
    found = torch.searchsorted(candidates.cumsum(1), wanted)
    return found.clamp_max(candidates.shape[1] - 1), number


def terms(inputs: dict, features: torch.Tensor, features_t: torch.Tensor) -> dict:
    """What must not depend on how the images are divided, with nothing left to chance."""
    rank, alone = distributed.rank(), not distributed.together()
    logits_t, label, entropy = (inputs[name] for name in ("logits_t", "label_u", "entropy"))
    percentiles = u2pl.entropy_percentiles(entropy, label, 20.0)
    unsup, kept = u2pl.unsup_loss(logits_t[len(label) :], label, entropy, percentiles[1])
    members, _, negatives = u2pl.pixel_roles(**inputs, percentiles=percentiles)
    candidates = torch.zeros_like(members)
    if rank == 0:
        candidates[:5, 7] = True
    if rank == 1 or alone:  # class 0 has anchors in both
        candidates[0, 7 + 25 * alone] = True
    bank = bank_of(6, 500)
    bank.draw = lambda anchors, negatives: torch.zeros(6, anchors, negatives, dtype=torch.int32)
    bank.push(torch.ones(6, 1, 8), torch.ones(6, dtype=torch.int64) * (rank == 0))
    with mock.patch.object(u2pl, "choose", in_turn):
        roles = (members, candidates, negatives)
        contrast, _ = u2pl.contrast_loss(features, features_t, roles, bank)
    (gradient,) = torch.autograd.grad(contrast, features)
    held = [sorted(map(tuple, bank.keys[c, : bank.filled[c]].tolist())) for c in range(6)]
    return {
        "percentiles": percentiles,
        "unsup": unsup,
        "kept": kept,
        "contrast": contrast.detach(),
        "gradient": gradient,
        "bank": held,
    }


def shared_inputs() -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Inputs of `terms` for two images of each kind."""
    generator = torch.Generator().manual_seed(3)
    inputs = example(n=2)
    del inputs["percentiles"]
    inputs["label_u"][0, :7] = 255  # processes with different numbers of valid pixels
    features, features_t = (torch.randn(4, 8, 5, 5, generator=generator) for _ in range(2))
    return inputs, features, features_t


def meet(rank: int, folder: str) -> None:
    """Join the other of two processes."""
    torch.set_num_threads(1)
    method = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=2)


def terms_worker(rank: int, folder: str) -> None:
    """Compute `terms` for every second image."""
    meet(rank, folder)
    inputs, *features = shared_inputs()
    mine = {name: value[rank::2] for name, value in inputs.items()}
    student, teacher = (x[rank::2].clone() for x in features)
    result = terms(mine, student.requires_grad_(), teacher)
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_do_what_one_does_with_the_doubled_batch(tmp_path):
    mp.spawn(terms_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    inputs, student, teacher = shared_inputs()
    one = terms(inputs, student.requires_grad_(), teacher)
    for name in ("percentiles", "kept"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], one[name])
    for name in ("unsup", "contrast"):  # DDP averages
        average = (first[name] + second[name]) / 2
        torch.testing.assert_close(average, one[name], rtol=1e-5, atol=0)
    assert first["bank"] == second["bank"] == one["bank"]
    for rank, each in enumerate((first, second)):
        expected = one["gradient"][rank::2]
        torch.testing.assert_close(each["gradient"] / 2, expected, rtol=1e-4, atol=1e-7)
        assert each["gradient"].abs().max() > 0
    assert math.isfinite(one["contrast"].item())


def training_worker(rank: int, folder: str) -> None:
    """Train four iterations, the first of them warm-up, without evaluations."""
    meet(rank, folder)
    flags = ["--warmup-iters", "1", "--max-iters", "4", "--output-dir", f"{folder}/run"]
    small = ["--crop-size", "32", "-b", "2", "--dropout", "0", "--device", "cpu"]
    run = Run(u2pl.parse_args([*flags, *small]))
    kept, log = [], run.log
    run.log = lambda measured: kept.append(measured["kept"]) or log(measured)
    nothing = lambda *_, **__: mock.MagicMock()  # noqa: E731
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(u2pl, "validate", lambda *_: ({}, {})))
        stack.enter_context(mock.patch.object(u2pl, "Run", lambda args: run))
        stack.enter_context(mock.patch.multiple(run, report=nothing, finish=nothing))
        u2pl.main(run.args)
    parameters = [p.detach() for network in run.networks.values() for p in network.parameters()]
    bank = list(run.states["bank"].state_dict().values())
    torch.save([*parameters, *bank, torch.stack(kept)], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_keep_equal_networks_and_banks(tmp_path):
    """Through DDP, whose gradients must reach every parameter in the warm-up and after it."""
    mp.spawn(training_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    *_, filled, _, kept = first
    assert filled.max() > 0 and kept.tolist()[0] == 0 < min(kept.tolist()[1:])


def test_the_usual_way_of_the_benchmark_is_the_same_loss():
    """One candidate and one key a class leave nothing to chance.

    A second class has an empty queue, a third is absent.
    """
    features = torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    roles = [torch.zeros(4, 100, dtype=torch.bool) for _ in range(3)]
    for c, (member, candidate, negative) in enumerate(((10, 11, 50), (20, 21, 60), (30, 31, None))):
        roles[0][c, [member, candidate]] = roles[1][c, candidate] = True
        if negative:
            roles[2][c, negative] = True
    queues = SimpleNamespace(lists=[torch.zeros(0, 8) for _ in range(4)])
    ours, share = u2pl.contrast_loss(features, features, roles, bank_of(4, 16))
    theirs, usual_share = usual_contrast_loss(features, features, roles, queues)
    assert ours > 0 and share == usual_share == 0.03
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=0)


def test_images_to_mix_have_the_layout_of_a_gpu(monkeypatch):
    """There `normalise` gives channels_last; the next images must not be laid out anew."""
    parts = prepared("--cutmix-prob", "1")
    plain = normalise(parts.batch_u["image"]).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(u2pl, "normalise", lambda *_: plain)
    mixed = []
    monkeypatch.setattr(u2pl, "mix", lambda mask, *given: mixed.append(given) or given[0])
    images, _ = u2pl.label_and_mix(parts.teacher, parts.batch_u, 0, parts.args)
    assert torch.equal(images, plain.roll(-1, 0)) and mixed[0][1] is plain
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in mixed[0])


# -------------------------------------------------------------------------------------------- a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="no CUDA device")
def test_contrast_at_the_size_of_voc_never_waits_for_the_gpu():
    generator, cuda = torch.Generator().manual_seed(0), torch.device("cuda")
    logits = torch.randn(32, 21, 129, 129, generator=generator).cuda()
    features = torch.randn(32, 256, 129, 129, dtype=torch.bfloat16, device=cuda).requires_grad_()
    shape = (16, 513, 513)
    target = torch.randint(0, 21, shape, generator=generator, dtype=torch.uint8).cuda()
    entropy = torch.rand(shape, device=cuda)
    bank = u2pl.MemoryBank(21, u2pl.CAPACITY, 256, cuda)

    def step():
        percentiles = u2pl.entropy_percentiles(entropy, target, 20.0)
        roles = u2pl.pixel_roles(logits, target, target, entropy, percentiles)
        loss, _ = u2pl.contrast_loss(features, features.detach(), roles, bank)
        loss.backward()

    step()
    with never_waiting():
        step()


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="no CUDA device")
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_training_step_never_waits_for_the_gpu(amp):
    parts = prepared("--amp", amp, device=torch.device("cuda"))
    parts.args.ohem = (0.7, 100)
    optimizer = torch.optim.SGD(parts.student.parameters(), lr=0.1, momentum=0.9)

    def step(iteration: int) -> None:
        if iteration < 4:
            measured = u2pl.warm_up_step(parts.student, parts.batch_l, parts.args)
        else:
            measured = do_step(parts, iteration)
        optimizer.zero_grad(set_to_none=True)
        measured["loss"].backward()
        optimizer.step()
        if iteration < 4:
            parts.teacher.load_state_dict(parts.student.state_dict())
        else:
            u2pl.ema_update(parts.teacher, parts.student, 0.9)

    for iteration in (0, 4, 5, 6):  # compiles, and uploads tables
        step(iteration)
    with never_waiting():
        for iteration in range(3, 8):  # the warm-up's last; then with CutMix and without
            step(iteration)
