"""U2PL: every term against loops that follow its definition, the memory bank against lists, and runs that are killed."""

import copy
import math
from collections import deque
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
from common import InputError, datasets, runtime
from common.augment import normalise
from kernels.step import usual_contrast_loss


def example(seed: int = 0, classes: int = 6, n: int = 2, size: int = 12, low_size: int = 5) -> dict:
    """Random inputs of step 4, with ignored pixels in both halves and class 2 absent."""
    generator = torch.Generator().manual_seed(seed)
    target, label = (torch.randint(0, classes - 1, (n, size, size), generator=generator) for _ in range(2))
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
                        negative = args.low_rank <= rank < args.high_rank if args.prt else label != c
                        negative &= {"unreliable": entropy >= high, "reliable": entropy < high, "all": True}[args.negatives]
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
    found = torch.stack(u2pl.pixel_roles(**inputs, args=args))
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

    Labelled: 0 is of class 1; 1 and 2 of class 0, of which the teacher is sure only at 1; 3 is ignored.
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
        args=u2pl.parse_args(["--anchors", anchors]),
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
    assert "voc and folder 0.25, cityscapes 0.125, else 1; the paper: 0.1" in text


def test_the_contrast_is_the_definition(rt, monkeypatch):
    """Random draws are noted; loops over classes, anchors and negatives give the same loss and gradient."""
    args, inputs = u2pl.parse_args([]), example()
    roles = u2pl.pixel_roles(**inputs, args=args)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(4, 8, 5, 5, generator=generator, requires_grad=True)
    features_t = torch.randn(4, 8, 5, 5, generator=generator)
    bank, drawn = u2pl.MemoryBank(6, 128, 8), []
    choose, draw = u2pl.choose, u2pl.MemoryBank.draw
    monkeypatch.setattr(u2pl, "choose", lambda *a: drawn.append(choose(*a)) or drawn[-1])
    monkeypatch.setattr(u2pl.MemoryBank, "draw", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    loss, share = u2pl.contrast_loss(features, features_t, roles, bank, rt, "torch")
    rows, (chosen, available) = sorted(drawn, key=lambda each: isinstance(each, tuple))

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
        keys = {tuple(F.normalize(vectors_t[p], dim=0).half().tolist()) for p in range(100) if negatives[c, p]}
        assert keys == {tuple(key.tolist()) for key in bank.keys[c, : bank.filled[c]]} and keys
        assert candidates[c, chosen[c]].all() and available[c] == candidates[c].sum() > 0 and rows[c].max() < bank.filled[c]
        for a in range(u2pl.ANCHORS):
            anchor = vectors[chosen[c, a]]
            similarity = [F.cosine_similarity(anchor, positive, dim=0)]
            similarity += list(F.cosine_similarity(anchor[None], bank.keys[c, rows[c, a].long()].float()))
            exponentials = (torch.stack(similarity) / 0.5).exp()
            total = total - (exponentials[0] / exponentials.sum()).log() / u2pl.ANCHORS
    assert present == 5
    torch.testing.assert_close(loss, total / present, rtol=1e-5, atol=0)
    assert share.item() == pytest.approx(candidates.sum().item() / 100)
    torch.testing.assert_close(*(torch.autograd.grad(x, features)[0] for x in (loss, total / present)), rtol=1e-4, atol=1e-7)


def test_an_empty_bank_absent_classes_and_nothing_valid_weigh_nothing(rt):
    features = torch.randn(4, 8, 5, 5, requires_grad=True)
    roles = [torch.zeros(3, 100, dtype=torch.bool) for _ in range(3)]
    loss, _ = u2pl.contrast_loss(features, features.detach(), roles, u2pl.MemoryBank(3, 16, 8), rt, "torch")
    loss.backward()
    assert loss.item() == 0 and features.grad.abs().max() == 0
    for present in (1, 2):  # one class alone: 0; two, of which one has an empty bank: half the mean of the other
        roles = [torch.zeros(3, 100, dtype=torch.bool) for _ in range(3)]
        for c in range(present):
            roles[0][c, 10 * c : 10 * c + 10] = roles[1][c, 10 * c : 10 * c + 10] = True
        roles[2][0, 50:] = True
        features.grad = None
        bank = u2pl.MemoryBank(3, 16, 8)
        torch.manual_seed(0)
        loss, _ = u2pl.contrast_loss(features, features.detach(), roles, bank, rt, "torch")
        loss.backward()
        reached = features.grad.permute(0, 2, 3, 1).reshape(100, 8).abs().sum(1) > 0
        assert bank.filled.tolist() == [16, 0, 0]
        assert loss.item() == 0 if present == 1 else loss.item() > 1  # about log(51)/2
        assert not reached[10:].any() and reached[:10].any() == (present == 2)


def test_the_bank_is_a_queue_for_each_class(rt):
    bank, queues = u2pl.MemoryBank(3, 7, 4), [deque(maxlen=7) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        keys, counts = torch.randn(3, 5, 4, generator=generator), torch.randint(0, 6, (3,), generator=generator)
        counts[2] = 0
        bank.push(keys, counts, rt)
        for c in range(3):
            queues[c].extend(tuple(key.half().tolist()) for key in keys[c, : counts[c]])
            start = int(bank.head[c] - bank.filled[c])
            held = [tuple(bank.keys[c, at % 7].tolist()) for at in range(start, start + int(bank.filled[c]))]
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
    assert count.tolist() == [3, 1, 0] and set(once[0, :3].tolist()) == {3, 17, 39} and once[1, 0] == 5
    often = torch.zeros(40)
    candidates[0] = True
    for _ in range(2000):
        picked, _ = u2pl.choose_once(candidates[:1], 8)
        assert len(set(picked[0].tolist())) == 8
        often[picked[0]] += 1
    assert (often / 2000 - 8 / 40).abs().max() < 0.05


def test_reliable_pixels_and_their_loss_are_the_definition(rt):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 9, 9, generator=generator)
    label = torch.randint(0, 4, (2, 9, 9), generator=generator).to(torch.uint8)
    label[:, :3] = 255
    entropy = torch.rand(2, 9, 9, generator=generator)
    entropy[0, 0] = 7.0  # padding: counts nowhere
    valid = label != 255
    percentiles = u2pl.entropy_percentiles(entropy, label, 17.0, rt, "torch")
    expected = np.percentile(entropy[valid].double().numpy(), [17.0, 83.0])
    torch.testing.assert_close(percentiles.double(), torch.from_numpy(expected), rtol=1e-6, atol=0)
    loss, kept = u2pl.unsup_loss(logits, label, entropy, percentiles[1], rt, "torch")
    each = F.cross_entropy(logits, label.long(), ignore_index=255, reduction="none")
    reliable = valid & (entropy < percentiles[1])
    assert kept.item() == pytest.approx((reliable.sum() / valid.sum()).item())
    assert loss.item() == pytest.approx((each[reliable].mean() * valid.sum() / reliable.sum()).item(), rel=1e-5)
    nothing = torch.full_like(label, 255)
    percentiles = u2pl.entropy_percentiles(entropy, nothing, 17.0, rt, "torch")
    loss, kept = u2pl.unsup_loss(logits.requires_grad_(), nothing, entropy, percentiles[1], rt, "torch")
    loss.backward()
    assert percentiles.isnan().all() and loss.item() == 0 and kept.item() == 0 and logits.grad.abs().max() == 0


def prepared(rt, *flags: str):
    """Networks, two batches and settings of a step on the built-in data; a corner of every picture is padding."""
    args = u2pl.parse_args(["--crop-size", "32", "-b", "2", "--dropout", "0", "--warmup-iters", "0", *flags])
    data = datasets.load(settings())
    torch.manual_seed(0)
    networks = u2pl.build_networks(args, data, rt)
    batches = list(next(u2pl.load_batches(args, data, rt, 0, 1)))
    for batch in batches:
        batch["valid_mask"][:, 20:, 24:] = False
    batches[0]["target"][~batches[0]["valid_mask"]] = 255
    return networks, batches, args, data


def test_a_step_is_the_five_of_the_docstring(rt, monkeypatch):
    flags = ("--cutmix-prob", "1", "--max-iters", "100", "--contrast-weight", "0.3", "--ema-decay", "0.9")
    networks, batches, args, data = prepared(rt, *flags)
    with torch.no_grad():  # a teacher that differs
        for parameter in networks["teacher"].parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    before = copy.deepcopy(networks)
    given = []
    contrast = u2pl.contrast_loss
    monkeypatch.setattr(u2pl, "contrast_loss", lambda *a: given.append(a) or contrast(*a))
    optimizer = torch.optim.SGD(networks["student"].parameters(), lr=0.1)
    measured = u2pl.train_step(networks, optimizer, batches, 40, args, data, rt)

    batch_l, batch_u = batches
    images_u = normalise(batch_u["image"], batch_u["valid_mask"])
    up = lambda x: F.interpolate(x, (32, 32), mode="bilinear", align_corners=True)  # noqa: E731
    with torch.no_grad():
        label = up(before["teacher"](images_u)).argmax(1)  # eval mode, unmixed
        label[~batch_u["valid_mask"]] = 255
        mask = u2pl.wide_box_masks(2, 32, rt, args.seed, 40)
        assert 0.45 < mask.float().mean() < 0.55
        images_u = torch.where(mask[:, None], images_u.flip(0), images_u)  # of two pictures the next is the other
        label = torch.where(mask, label.flip(0), label)
        images = torch.cat([normalise(batch_l["image"], batch_l["valid_mask"]), images_u])
        logits_t, features_t, _ = before["teacher"].train()(images, return_features=True)
        logits, features, _ = before["student"](images, return_features=True)
        probs = up(logits_t)[2:].softmax(1)
        entropy = torch.special.entr(probs).sum(1)
    alpha = 0.2 * 0.6  # 20 % · (1 - 40/100)
    low, gamma = torch.quantile(entropy[label != 255].double(), torch.tensor([alpha, 1 - alpha], dtype=torch.float64))
    assert (label == 255).any()
    reliable = (label != 255) & (entropy < gamma)
    loss_sup = F.cross_entropy(up(logits[:2]), batch_l["target"].long(), ignore_index=255)
    each = F.cross_entropy(up(logits[2:]), label, ignore_index=255, reduction="none")
    loss_unsup = each[reliable].mean() * (label != 255).sum() / reliable.sum()
    torch.testing.assert_close(measured["loss_sup"], loss_sup, rtol=1e-5, atol=0)
    torch.testing.assert_close(measured["loss_unsup"], loss_unsup, rtol=1e-3, atol=0)  # a pixel on the edge of γ
    torch.testing.assert_close(measured["kept"], reliable.sum() / (label != 255).sum(), rtol=0, atol=2e-3)
    torch.testing.assert_close(given[0][0], features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(given[0][1], features_t, rtol=1e-4, atol=1e-4)
    thresholds = torch.stack([low, gamma]).float()
    expected = u2pl.pixel_roles(logits_t, batch_l["target"], label.to(torch.uint8), entropy, thresholds, args)
    for found, wanted in zip(given[0][2], expected):  # but for pixels on an edge
        assert wanted.any() and (found != wanted).float().mean() < 2e-3
    assert measured["loss_contrast"] > 0 and measured["fill"] > 0
    torch.testing.assert_close(
        measured["loss"], measured["loss_sup"] + measured["loss_unsup"] + 0.3 * measured["loss_contrast"]
    )
    assert all(parameter.grad is None for parameter in networks["teacher"].parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in networks["student"].parameters())
    decay = 0.9  # below 1 - 1/41
    for teacher, old, student in zip(*(f.parameters() for f in (networks["teacher"], before["teacher"], networks["student"]))):
        torch.testing.assert_close(teacher, decay * old + (1 - decay) * student, rtol=1e-4, atol=1e-6)


def test_the_average_warms_up(rt):
    networks, batches, args, data = prepared(rt)
    before = copy.deepcopy(networks["teacher"])
    with torch.no_grad():
        for parameter in networks["student"].parameters():
            parameter.add_(torch.randn_like(parameter))
    optimizer = torch.optim.SGD(networks["student"].parameters(), lr=1e-9)
    u2pl.train_step(networks, optimizer, batches, 1, args, data, rt)  # t = 2: half and half
    for teacher, old, student in zip(*(f.parameters() for f in (networks["teacher"], before, networks["student"]))):
        torch.testing.assert_close(teacher, (old + student) / 2, rtol=1e-4, atol=1e-5)


def test_in_the_warm_up_the_teacher_is_a_copy_and_not_the_student(rt):
    networks, batches, args, data = prepared(rt, "--warmup-iters", "1")
    optimizer = torch.optim.SGD(networks["student"].parameters(), lr=0.1)
    measured = u2pl.train_step(networks, optimizer, batches, 0, args, data, rt)
    assert measured["loss"] == measured["loss_sup"] and measured["loss_contrast"] == 0
    assert same({"n": networks["teacher"].state_dict()}, {"n": networks["student"].state_dict()})
    assert networks["bank"].filled.max() == 0
    u2pl.train_step(networks, optimizer, batches, 1, args, data, rt)  # t = 1: α = 0, the student after its step
    for teacher, student in zip(networks["teacher"].parameters(), networks["student"].parameters()):
        assert teacher is not student and torch.equal(teacher, student)
    assert networks["bank"].filled.max() > 0
    args = u2pl.parse_args(["--data", "voc", "--weights", "none"])
    assert u2pl.phases(args, SimpleNamespace(unlabelled=range(9259)), rt) == (578, 80 * 578)
    with pytest.raises(InputError, match="nothing of 578 iterations is left after a warm-up of 578"):
        args = u2pl.parse_args(["--data", "voc", "--weights", "none", "--epochs", "1"])
        u2pl.build_networks(args, SimpleNamespace(unlabelled=range(9259)), rt)
    with pytest.raises(SystemExit):
        u2pl.parse_args(["--max-iters", "100"])  # the warm-up of shapes is 200


def test_ablation_flags_change_what_they_say(rt, monkeypatch):
    networks, batches, args, data = prepared(rt, "--no-contrast", "--no-dpa", "--alpha0", "30", "--cutmix-prob", "0")
    assert "bank" not in networks and networks["student"].representation is None
    optimizer = torch.optim.SGD(networks["student"].parameters(), lr=0.1)
    measured = u2pl.train_step(networks, optimizer, batches, 1399, args, data, rt)
    assert measured["loss_contrast"] == 0 and measured["kept"].item() == pytest.approx(0.7, abs=0.005)
    networks, batches, args, data = prepared(rt, "--alpha0", "30")
    measured = u2pl.train_step(networks, optimizer, batches, 700, args, data, rt)
    assert measured["kept"].item() == pytest.approx(0.85, abs=0.005)


def test_cityscapes_has_ohem_an_auxiliary_head_and_window(rt):
    args = u2pl.parse_args(["--data", "cityscapes", "--backbone", "resnet18", "--weights", "none"])
    assert (args.ohem, args.aux_weight, args.eval_window, args.warmup_epochs) == ((0.7, 50_000), 0.4, 769, 0)
    network = u2pl.Network(args, 19).eval()
    logits, features, auxiliary = network(torch.zeros(1, 3, 64, 64), return_features=True)
    assert (logits.shape, features.shape, auxiliary.shape) == ((1, 19, 16, 16), (1, 256, 16, 16), (1, 19, 8, 8))
    target = torch.randint(0, 19, (1, 64, 64))
    args.ohem = None
    expected = sum(
        weight * F.cross_entropy(F.interpolate(x, (64, 64), mode="bilinear", align_corners=True), target)
        for weight, x in ((1, logits), (0.4, auxiliary))
    )
    torch.testing.assert_close(u2pl.supervised_loss(logits, auxiliary, target, args, rt), expected)


def test_the_bank_for_voc_fits_and_few_classes_are_announced(rt):
    with torch.device("meta"):
        assert 300e6 < u2pl.MemoryBank(21, u2pl.CAPACITY, 256).keys.nbytes <= 350e6
    data = datasets.load(settings())
    notes = u2pl.build_networks(u2pl.parse_args(["--low-rank", "6"]), data, rt)["bank"].notes
    assert notes[0] == "memory bank: 6 classes x 30000 keys of 64, torch.float16: 23 MB"
    assert "no class of 6 has rank 6: unlabelled pictures give no negatives" in notes[1]
    assert len(u2pl.build_networks(u2pl.parse_args([]), data, rt)["bank"].notes) == 1


SHORT = ("--max-iters", "8", "--eval-iters", "4", "--log-interval", "1", "--save-interval", "2", "-b", "2", "--crop-size", "32",
         "--warmup-iters", "1", "--device", "cpu")  # fmt: skip


def test_killed_with_a_part_filled_bank_and_resumed(tmp_path):
    run("u2pl.py", *SHORT, "--output-dir", tmp_path / "whole")
    process = start("u2pl.py", *SHORT, "--output-dir", tmp_path / "killed")
    wait_for(process, "iter      7/8")
    process.kill()
    process.wait()
    bank = weights(tmp_path / "killed")["bank"]
    assert 0 < bank["filled"].max() < bank["keys"].shape[1]
    assert run("u2pl.py", "--resume", tmp_path / "killed").stdout.count("resumed at iteration 6") == 1
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert "bank" not in torch.load(tmp_path / "whole" / "best.pt", weights_only=True)["networks"]
    assert (tmp_path / "whole" / "figures" / "reliable_pixels.png").is_file()
    write_picture(tmp_path / "pictures" / "one.png")
    result = run("-m", "common.predict", tmp_path / "whole", tmp_path / "pictures")
    assert "1 pictures predicted" in result.stdout


# --------------------------------------------------------------------------------------------------------- two processes


def process_of(rank: int, world: int) -> runtime.Runtime:
    return runtime.Runtime(torch.device("cpu"), rank, world, None, torch.amp.GradScaler("cpu", enabled=False), False)


def in_turn(candidates: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`u2pl.choose` without chance: the candidates one after the other."""
    number = candidates.sum(1)
    wanted = torch.arange(count) % number.clamp_min(1)[:, None] + 1
    return torch.searchsorted(candidates.cumsum(1), wanted).clamp_max(candidates.shape[1] - 1), number


def terms(rt: runtime.Runtime, inputs: dict, features: torch.Tensor, features_t: torch.Tensor) -> dict:
    """What must not depend on how the pictures are divided, with nothing left to chance."""
    args = u2pl.parse_args([])
    percentiles = u2pl.entropy_percentiles(inputs["entropy"], inputs["label_u"], 20.0, rt, "torch")
    n = len(inputs["label_u"])
    unsup, kept = u2pl.unsup_loss(inputs["logits_t"][n:], inputs["label_u"], inputs["entropy"], percentiles[1], rt, "torch")
    members, _, negatives = u2pl.pixel_roles(**{**inputs, "percentiles": percentiles}, args=args)
    candidates = torch.zeros_like(members)
    if rt.rank == 0:
        candidates[:5, 7] = True
    if rt.rank == 1 or rt.world == 1:  # class 0 has anchors in both
        candidates[0, 7 + 25 * (rt.world == 1)] = True
    bank = u2pl.MemoryBank(6, 500, 8)
    bank.draw = lambda anchors, negatives: torch.zeros(6, anchors, negatives, dtype=torch.int32)
    bank.push(torch.ones(6, 1, 8), torch.ones(6, dtype=torch.int64) * (rt.rank == 0), rt)
    with mock.patch.object(u2pl, "choose", in_turn):
        contrast, _ = u2pl.contrast_loss(features, features_t, (members, candidates, negatives), bank, rt, "torch")
    (gradient,) = torch.autograd.grad(contrast, features)
    held = [sorted(map(tuple, bank.keys[c, : bank.filled[c]].tolist())) for c in range(6)]
    return {"percentiles": percentiles, "unsup": unsup, "kept": kept, "contrast": contrast.detach(), "gradient": gradient,
            "bank": held}  # fmt: skip


def shared_inputs() -> tuple[dict, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = example(n=2)
    del inputs["percentiles"]
    inputs["label_u"][0, :7] = 255  # processes with different numbers of valid pixels
    return inputs, torch.randn(4, 8, 5, 5, generator=generator), torch.randn(4, 8, 5, 5, generator=generator)


def terms_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    inputs, *features = shared_inputs()
    mine = {name: value[rank::2] for name, value in inputs.items()}
    student, teacher = (x[rank::2].clone() for x in features)
    result = terms(process_of(rank, 2), mine, student.requires_grad_(), teacher)
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_do_what_one_does_with_the_doubled_batch(tmp_path):
    mp.spawn(terms_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    inputs, student, teacher = shared_inputs()
    one = terms(process_of(0, 1), inputs, student.requires_grad_(), teacher)
    for name in ("percentiles", "kept"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], one[name])
    for name in ("unsup", "contrast"):  # DDP averages
        torch.testing.assert_close((first[name] + second[name]) / 2, one[name], rtol=1e-5, atol=0)
    assert first["bank"] == second["bank"] == one["bank"]
    torch.testing.assert_close(first["gradient"] / 2, one["gradient"][0::2], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(second["gradient"] / 2, one["gradient"][1::2], rtol=1e-4, atol=1e-7)
    assert all(each["gradient"].abs().max() > 0 for each in (first, second)) and math.isfinite(one["contrast"].item())


def steps_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rt = process_of(rank, 2)
    networks, batches, args, data = prepared(rt, "--warmup-iters", "1")
    callables = {**networks, "student": rt.wrap(networks["student"])}
    optimizer = torch.optim.SGD(networks["student"].parameters(), lr=0.1)
    for iteration, batches in enumerate(u2pl.load_batches(args, data, rt, 0, 4)):
        measured = u2pl.train_step(callables, optimizer, list(batches), iteration, args, data, rt)
    parameters = [p.detach() for name in ("student", "teacher") for p in networks[name].parameters()]
    torch.save([*parameters, *networks["bank"].buffers(), measured["kept"]], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_keep_equal_networks_and_banks(tmp_path):
    """Through DDP, whose gradients must reach every parameter in the warm-up and after it."""
    mp.spawn(steps_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[-3].max() > 0  # filled


def test_the_usual_way_of_the_benchmark_is_the_same_loss(rt):
    """One candidate and one key a class leave nothing to chance; a second class has an empty queue, a third is absent."""
    features = torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    roles = [torch.zeros(4, 100, dtype=torch.bool) for _ in range(3)]
    for c, (member, candidate, negative) in enumerate(((10, 11, 50), (20, 21, 60), (30, 31, None))):
        roles[0][c, [member, candidate]] = roles[1][c, candidate] = True
        if negative:
            roles[2][c, negative] = True
    bank = u2pl.MemoryBank(4, 16, 8)
    queues = SimpleNamespace(lists=[torch.zeros(0, 8) for _ in range(4)])
    ours, share = u2pl.contrast_loss(features, features, roles, bank, rt, "torch")
    theirs, usual_share = usual_contrast_loss(features, features, roles, queues, rt)
    assert ours > 0 and share == usual_share == 0.03
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="no CUDA device")
def test_contrast_at_the_size_of_voc_never_waits_for_the_gpu(rt):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 21, 129, 129, generator=generator).cuda()
    features = torch.randn(32, 256, 129, 129, dtype=torch.bfloat16, device="cuda").requires_grad_()
    target = torch.randint(0, 21, (16, 513, 513), generator=generator, dtype=torch.uint8).cuda()
    entropy = torch.rand(16, 513, 513, device="cuda")
    bank, args = u2pl.MemoryBank(21, u2pl.CAPACITY, 256).cuda(), u2pl.parse_args([])

    def step():
        percentiles = u2pl.entropy_percentiles(entropy, target, 20.0, rt, "auto")
        roles = u2pl.pixel_roles(logits, target, target, entropy, percentiles, args)
        loss, _ = u2pl.contrast_loss(features, features.detach(), roles, bank, rt, "auto")
        loss.backward()

    step()
    with never_waiting():
        step()


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="no CUDA device")
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_training_step_never_waits_for_the_gpu(amp):
    rt = runtime.Runtime(torch.device("cuda"), 0, 1, amp, torch.amp.GradScaler("cuda", enabled=False), False)
    networks, batches, args, data = prepared(rt, "--device", "cuda", "--warmup-iters", "4")
    args.ohem = (0.7, 100)
    batches = [rt.to_device(batch) for batch in batches]
    optimizer = torch.optim.SGD(networks["student"].parameters(), lr=0.1, momentum=0.9)
    for iteration in (0, 4, 5, 6):  # compiles, and uploads tables
        u2pl.train_step(networks, optimizer, batches, iteration, args, data, rt)
    with never_waiting():
        for iteration in range(3, 8):  # the warm-up's last; then with CutMix and without
            u2pl.train_step(networks, optimizer, batches, iteration, args, data, rt)


def test_images_to_mix_have_the_layout_of_a_gpu(rt, monkeypatch):
    """There `normalise` gives channels_last; the next images of the batch must not be laid out anew."""
    networks, batches, args, _ = prepared(rt, "--cutmix-prob", "1")
    plain = normalise(batches[1]["image"]).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(u2pl, "normalise", lambda *_: plain)
    mixed = []
    monkeypatch.setattr(u2pl, "mix", lambda mask, *parts: mixed.append(parts) or parts[0])
    images, _ = u2pl.label_and_mix(networks["teacher"], batches[1], 0, args, rt)
    assert torch.equal(images, plain.roll(-1, 0)) and mixed[0][1] is plain
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in mixed[0])
