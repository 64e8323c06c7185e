"""U2PL beside the authors' code: our losses and steps give the figures that theirs give.

`released/u2pl.json` holds what functions of github.com/Haochen-Wang409/U2PL at commit
ab3d2be313d4d6b2885e7a0213d4fce82a803b79 returned for the inputs that this file makes; none of their
code is needed here. To repeat it, call them on a CPU in float32 with these inputs:

    supervised  get_criterion(...)(...), on logits upsampled as train_semi.py does
    unsup       compute_unsupervised_loss(...), likewise; `kept` counts the target afterwards
    contrast    compute_contra_memobank_loss(...), once a step, always with the same bank; correct
                one-hot labels; low_mask and high_mask: label != 255 and, where unlabelled,
                entropy <= percentiles[0] and >= percentiles[1]
    steps       train_semi.train(...), one epoch of one iteration a step, with two `Small` whose
                outputs are named pred, rep and aux; configuration and optimiser as in `our_steps`
    onehot      label_onehot(...), summed over the pixels
    boxes       generate_cutout_mask([129, 129]), 20 000 times after np.random.seed(0)
    processes   the first step of `cityscapes` under DDP in 1, 2, 4 and 8 gloo processes with equal
                data, queues of 1000: lengths of the gradients of the heads' weights
    config      experiments/{pascal/1464,cityscapes/744}/ours/config.yaml, as they are
    with_AEL    train.train(...) of the branch of this name, three epochs of one iteration, with two
                `Pixelwise`; min_kept 2·KEPT, ranks 0 and 4, and what AEL draws as in
                `test_released_ael.py`, whose choices are kept with the figures

Replaced were only what needs a GPU (`Tensor.cuda` returns the tensor; one gloo process) and
chance: `torch.randint(n, size)` returns 0, 1, ..., n-1, 0, 1, ...; for `cityscapes`
`np.random.uniform` returns 0, the boxes are `BOXES`, and label_onehot is a correct one. Queues are
`CAPACITY` long. Here `in_order` takes chance away in the same way. Anchors, negatives of an anchor,
temperature and δ_p are the published 256, 50, 0.5 and 0.3. Numbers of differences are those of
u2pl.py's docstring.

Tolerances, chosen before the first comparison: 1e-5 of the value for one function in float32, 1e-4
after several steps of training.
"""

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_released import KEPT
from test_released_ael import (
    ALLOWED,
    MOMENTUM,
    choose_as_released,
    first_confidence,
)
from test_released_ael import CLASSES as AEL_CLASSES
from test_released_ael import SIZE as AEL_SIZE
from test_released_ael import step_inputs as ael_inputs
from test_u2pl import in_turn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import u2pl
from common import cutmix
from common.adaptive import ConfidenceBank, ImagePool
from common.run import Run
from common.schedule import Schedule
from kernels import pseudo_label
from u2pl import MemoryBank

FIGURES = Path(__file__).parent / "released" / "u2pl.json"
ONE_FUNCTION, SEVERAL_STEPS = 1e-5, 1e-4
CLASSES, CHANNELS, CAPACITY = 5, 16, 16
LOSSES = ("loss_sup", "loss_unsup", "loss_contrast")
SCALARS = {*LOSSES, "lr", "alpha", "student", "teacher", "apart"}
LOW_SIZE, SIZE = 9, 33  # (9-1)·4 + 1, as 129 and 513
RANKS = {"low_rank": 1, "high_rank": 4}  # 3 and 20 would leave no negatives of five classes
BOXES = ((2, 20, 5, 30), (10, 33, 0, 22))  # top, bottom, left, right, of the two images of a batch


@pytest.fixture(scope="module")
def released() -> dict:
    return json.loads(FIGURES.read_text())["figures"]


# ------------------------------------------------------------------------------------- inputs


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal float32 numbers of NumPy's frozen legacy generator."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def whole(seed: int, below: int, *shape: int) -> Tensor:
    """Whole numbers from 0 to `below`, exclusive, int64."""
    return torch.from_numpy(np.random.RandomState(seed).randint(0, below, shape, dtype=np.int64))


def supervised_inputs() -> dict[str, Tensor]:
    """Logits and auxiliary logits (2,C,9,9), target (2,33,33) with 4 ignored rows."""
    target = whole(2, CLASSES, 2, SIZE, SIZE)
    target[0, :4] = 255
    size = (2, CLASSES, LOW_SIZE, LOW_SIZE)
    return {"logits": 3 * normal(0, *size), "auxiliary": 3 * normal(1, *size), "target": target}


def unsup_inputs(padding: bool) -> dict[str, Tensor]:
    """Logits of student and teacher (2,C,9,9), label (2,33,33); with `padding` 10 rows are 255."""
    label = whole(5, CLASSES, 2, SIZE, SIZE)
    if padding:
        label[1, :10] = 255
    size = (2, CLASSES, LOW_SIZE, LOW_SIZE)
    return {"logits": 2 * normal(3, *size), "logits_t": 2 * normal(4, *size), "label": label}


def contrast_inputs(step: int, absent: int | None = None) -> dict[str, Tensor]:
    """A step of the contrast with 2 + 2 images of 7x7; class `absent` is relabelled as the last."""
    seed, size = 10 * (step + 1), 7
    label = whole(seed, CLASSES, 4, size, size)
    label[0, 0] = 255
    if absent is not None:
        label[label == absent] = CLASSES - 1
    return {
        "features": normal(seed + 1, 4, CHANNELS, size, size),
        "features_t": normal(seed + 2, 4, CHANNELS, size, size),
        "logits_t": 2 * normal(seed + 3, 4, CLASSES, size, size),
        "target_l": label[:2],
        "label_u": label[2:],
        "entropy": normal(seed + 4, 2, size, size),
        "percentiles": torch.tensor([-0.3, 0.3]),
    }


def step_inputs(iteration: int, count: int) -> tuple[dict, dict]:
    """A labelled batch with a few ignored pixels and an unlabelled one, `count` images each."""
    batches = []
    for seed in (100 + 2 * iteration, 101 + 2 * iteration):
        image = whole(seed, 256, count, SIZE, SIZE, 3).to(torch.uint8)
        valid_mask = torch.ones(count, SIZE, SIZE, dtype=torch.bool)
        batches.append({"image": image, "valid_mask": valid_mask})
    target = whole(500 + iteration, CLASSES, count, SIZE, SIZE)
    target[:, 8:10, :20] = 255
    batches[0]["target"] = target
    return tuple(batches)


class Small(nn.Module):
    """A convolution of stride 4, BatchNorm, ReLU, and a 1x1 convolution for each head."""

    def __init__(self, auxiliary: bool):
        super().__init__()
        self.feature_channels = CHANNELS
        self.backbone = nn.Sequential(nn.Conv2d(3, 12, 3, 4, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.classifier = nn.Conv2d(12, CLASSES, 1)
        self.representation = nn.Conv2d(12, CHANNELS, 1)
        self.auxiliary = nn.Conv2d(12, CLASSES, 1) if auxiliary else None
        convolutions = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        for seed, convolution in enumerate(convolutions):
            weight = 0.4 * normal(900 + seed, *convolution.weight.shape)
            convolution.weight.data = weight - weight.mean(1, keepdim=True)  # no favourite class
            convolution.bias.data = 0.1 * normal(950 + seed, *convolution.bias.shape)

    def head_modules(self) -> list[nn.Module]:
        return [head for name, head in self.named_children() if name != "backbone"]

    def forward(self, images: Tensor, return_features: bool = False):
        x = self.backbone(images)
        if not return_features:
            return self.classifier(x)
        auxiliary = self.auxiliary and self.auxiliary(x)
        return self.classifier(x), self.representation(x), auxiliary


def length(network: nn.Module) -> float:
    """The Euclidean length of all parameters and running statistics together."""
    numbers = [x.double().flatten() for x in network.state_dict().values() if x.is_floating_point()]
    return torch.cat(numbers).norm().item()


def apart(student: nn.Module, teacher: nn.Module) -> float:
    """The Euclidean distance of two networks' parameters."""
    pairs = zip(student.parameters(), teacher.parameters())
    return torch.cat([(a - b).detach().double().flatten() for a, b in pairs]).norm().item()


# -------------------------------------------------------------------------- chance taken away


def first_of(candidates: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """`u2pl.choose_once` without chance: the first `most` candidates."""
    order = candidates.int().sort(dim=1, descending=True, stable=True).indices
    return order[:, :most], candidates.sum(1).clamp_max(most)


def oldest_first(bank: MemoryBank, anchors: int, negatives: int) -> Tensor:
    """`MemoryBank.draw` without chance: the keys one after the other, the oldest first."""
    drawn = torch.arange(anchors * negatives) % bank.filled.clamp_min(1)[:, None]
    oldest = (bank.head - bank.filled)[:, None]
    rows = (oldest + drawn) % bank.keys.shape[1]
    return rows.view(-1, anchors, negatives).int()


@pytest.fixture
def in_order(monkeypatch):
    monkeypatch.setattr(u2pl, "choose", in_turn)
    monkeypatch.setattr(u2pl, "choose_once", first_of)
    monkeypatch.setattr(MemoryBank, "draw", oldest_first)


def small_bank() -> MemoryBank:
    """A bank of `CAPACITY` keys a class, on the CPU."""
    return MemoryBank(CLASSES, CAPACITY, CHANNELS, torch.device("cpu"))


def precise_bank() -> MemoryBank:
    """A small bank in float32; float16 keys (difference 5) would hide what else differs."""
    bank = small_bank()
    bank.keys = bank.keys.float()
    return bank


def as_released(*flags: str):
    """Settings with the release's rule for negatives (difference 1)."""
    ranks = [f"--{name.replace('_', '-')}={value}" for name, value in RANKS.items()]
    return u2pl.parse_args(["--negatives-as-released", *ranks, *flags])


def close(found: Tensor | float, expected: float, tolerance: float = ONE_FUNCTION) -> None:
    found = found.item() if isinstance(found, Tensor) else found
    assert found == pytest.approx(expected, rel=tolerance, abs=1e-12)


# -------------------------------------------------------------------------- L_s, L_u, L_c


@pytest.mark.parametrize("kind", ["plain", "ohem 100", "ohem 1000", "ohem 1080"])
def test_the_supervised_loss_is_the_released_one(kind, released):
    """1000 of 1089 pixels an image exceed those below 0.7; 1080 exceed the valid ones."""
    inputs, figures = supervised_inputs(), released["supervised"][kind]
    logits, auxiliary = inputs["logits"].requires_grad_(), inputs["auxiliary"].requires_grad_()
    target = inputs["target"].to(torch.uint8)
    if kind == "plain":
        loss = u2pl.supervised_loss(logits, None, target, None, 0.0)
    else:
        loss = u2pl.supervised_loss(logits, auxiliary, target, (0.7, int(kind.split()[1])), 0.4)
    loss.backward()
    close(loss, figures["loss"])
    close(logits.grad.norm(), figures["gradient"])
    if kind != "plain":
        close(auxiliary.grad.norm(), figures["gradient_auxiliary"])


@pytest.mark.parametrize("alpha", [20.0, 7.0])
@pytest.mark.parametrize("padding", [False, True])
def test_the_unsupervised_loss_is_the_released_one(alpha, padding, released):
    """Padding counts nowhere (difference 10): the release has it in the numerator of the weight."""
    figures = released["unsup"][f"alpha {alpha:g}, padding {padding}"]
    inputs = unsup_inputs(padding)
    logits, label = inputs["logits"].requires_grad_(), inputs["label"].to(torch.uint8)
    size = label.shape[1:]
    entropy = pseudo_label(inputs["logits_t"], size, with_entropy=True).entropy
    gamma = u2pl.entropy_percentiles(entropy, label, alpha)[1]
    loss, kept = u2pl.unsup_loss(logits, label, entropy, gamma)
    loss.backward()
    valid = (label != 255).sum().item()
    assert round(kept.item() * valid) == figures["kept"]
    assert padding == (valid < label.numel())
    close(loss * label.numel() / valid, figures["loss"])
    close(logits.grad.norm() * label.numel() / valid, figures["gradient"])


def roles_of(inputs: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Positives, anchors and negatives under the release's rule for negatives (difference 1)."""
    names = ("logits_t", "target_l", "label_u", "entropy", "percentiles")
    flags = u2pl.role_flags(as_released())
    return u2pl.pixel_roles(*(inputs[name] for name in names), **flags)


def contrast_step(inputs: dict, bank: MemoryBank) -> tuple[Tensor, Tensor, list[int]]:
    """L_c, its gradient's length, and the new keys of each class."""
    features = inputs["features"].requires_grad_()
    roles = roles_of(inputs)
    loss, _ = u2pl.contrast_loss(features, inputs["features_t"], roles, bank)
    loss.backward()
    return loss.detach(), features.grad.norm(), roles[2].sum(1).tolist()


def test_three_steps_of_the_contrast_are_the_released_ones(released, in_order):
    """Every class is present, so that the fault of pairing (difference 4a) changes nothing."""
    bank, offered = precise_bank(), [0] * CLASSES
    for step, figures in enumerate(released["contrast"]["all present"]):
        loss, gradient, new_keys = contrast_step(contrast_inputs(step), bank)
        assert new_keys == figures["new_keys"]
        assert bank.filled.tolist() == figures["filled"]
        close(loss, figures["loss"])
        close(gradient, figures["gradient"])
        offered = [sum(pair) for pair in zip(offered, new_keys)]
    assert max(offered) > CAPACITY  # old keys went


def test_float16_keys_change_the_contrast_by_less_than_a_thousandth(released, in_order):
    """Difference 5."""
    bank = small_bank()
    for step, figures in enumerate(released["contrast"]["all present"]):
        loss, gradient, _ = contrast_step(contrast_inputs(step), bank)
        close(loss, figures["loss"], 1e-3)
        close(gradient, figures["gradient"], 1e-3)


def test_the_release_pairs_class_i_with_the_bank_of_the_ith_class_present(released, in_order):
    """Difference 4a. With class 1 absent, the released figure is ours after the same mistake."""
    (figures,) = released["contrast"]["class 1 absent"]
    inputs = contrast_inputs(0, absent=1)
    loss, _, new_keys = contrast_step(inputs, precise_bank())
    assert new_keys == figures["new_keys"] and new_keys[1] == 0
    assert abs(loss.item() / figures["loss"] - 1) > 0.1

    roles = roles_of(inputs)
    present = roles[0].any(1).nonzero().flatten()
    assert present.tolist() == [0, 2, 3, 4]
    positive, anchor = torch.zeros_like(roles[0]), torch.zeros_like(roles[1])
    for i, c in enumerate(present):  # class i uses the bank of class c
        positive[c], anchor[c] = roles[0][i], roles[1][i]
    features, mistaken, bank = inputs["features"], (positive, anchor, roles[2]), precise_bank()
    loss, _ = u2pl.contrast_loss(features, inputs["features_t"], mistaken, bank)
    counted = positive.any(1).sum()  # class 1 has no pixels: 3 of the 4 that the release divides by
    close(loss * counted / len(present), figures["loss"])


def test_the_release_gives_the_first_image_the_labels_of_all(released):
    """Difference 4b, from the sums over pixels of its one-hot labels (image, class)."""
    labels = whole(7, CLASSES, 3, 6, 6)
    labels[0, 0], labels[1, 1] = 255, 255
    onehot = F.one_hot(labels.masked_fill(labels == 255, 0), CLASSES).bool()
    together = onehot.any(0)  # an ignored pixel of any image counts as class 0
    together[labels[0] == 255] = False
    released_sums = torch.tensor(released["onehot"])
    assert released_sums[0].tolist() == together.sum((0, 1)).tolist()
    assert released_sums[1:].max() == 0


# -------------------------------------------------------------------------- whole steps


class Steps(Run):
    """What `u2pl.main` needs around its loop, on the inputs of the released steps.

    Attributes:
        steps: what `released["steps"]` holds of each iteration.
    """

    def __init__(self, args: Namespace, count: int):
        self.args, self.count, self.device = args, count, torch.device("cpu")
        self.data = SimpleNamespace(num_classes=CLASSES, labelled=None, unlabelled=None, val=None)
        self.schedule = Schedule(args, count, processes=1)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.steps, self.alphas = [], [0.0]

    def place(self, network: nn.Module) -> nn.Module:
        return network

    def parallel(self, network: nn.Module) -> nn.Module:
        return network

    def keep(self, result: str, **parts) -> None:
        self.parts = parts
        self.scheduler = LambdaLR(parts["optimizer"], self.schedule.factor)

    def say(self, text: str) -> None:
        pass

    def batches(self, items, stream: int) -> None:
        pass

    def iterations(self, *loaders):
        for iteration in range(self.schedule.total):
            batch_l, batch_u = step_inputs(iteration, self.count)
            batch_l["target"] = batch_l["target"].to(torch.uint8)
            yield iteration, (batch_l, batch_u)

    def evaluates(self) -> bool:
        return False

    def log(self, measures: dict[str, Tensor]) -> None:
        student, teacher, bank = (self.parts[name] for name in ("student", "teacher", "bank"))
        step = {name: measures[name].item() for name in LOSSES}
        step.update(lr=self.scheduler.get_last_lr()[0], alpha=self.alphas[-1])
        step.update(student=length(student), teacher=length(teacher))
        step.update(apart=apart(student, teacher), filled=bank.filled.tolist())
        self.steps.append(step)
        self.scheduler.step()

    def finish(self, results: dict, measured: dict) -> None:
        pass


def our_steps(kind: str, monkeypatch) -> list[dict]:
    """What `released["steps"]` holds, from our `main`."""
    voc = kind == "voc"
    count, warm_up, total = (1, 1, 7) if voc else (2, 0, 5)
    flags = [f"--max-iters={total}", f"--warmup-iters={warm_up}", "--ema-decay=0.7"]
    flags += [f"--cutmix-prob={0 if voc else 1}", "--contrast-weight=1"]
    flags += ["--lr=0.01", f"--head-lr-mult={10 if voc else 1}", "--weight-decay=1e-3"]
    args = as_released(*flags)
    args.decay_norm = True
    if not voc:
        args.ohem, args.aux_weight = (0.7, 300), 0.4

    run = Steps(args, count)
    masks = torch.stack([box_mask(box) for box in BOXES])
    percentiles = u2pl.entropy_percentiles
    record = lambda *a: run.alphas.append(a[2]) or percentiles(*a)  # noqa: E731
    replaced = {
        "Run": lambda args: run,
        "Network": lambda *_: Small(not voc),
        "MemoryBank": lambda *_: precise_bank(),
        "wide_box_masks": lambda *_: masks,
        "entropy_percentiles": record,
        "validate": lambda *_: ({}, {}),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(u2pl, name, value)
    u2pl.main(args)
    return run.steps


def box_mask(box: tuple[int, int, int, int]) -> Tensor:
    """(33,33) bool, True inside the box."""
    top, bottom, left, right = box
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize("kind", ["voc", "cityscapes"])
def test_training_steps_are_the_released_ones(kind, released, monkeypatch, in_order):
    """Losses, α_e, learning rate, bank and networks after each step, m = min(1 - 1/t, 0.7).

    voc: 1 + 1 images, a warm-up of one step, then six; the head learns 10 times as fast. One image
    has no others whose labels it could get (difference 4b).
    cityscapes: 2 + 2 images, always cut and mixed, OHEM and the auxiliary head, five steps; the
    release's one-hot labels are mended (difference 4b).
    One step is an epoch, so that α_e is the same (difference 7) and the teacher is made the student
    where both are equal anyway (4c). Both networks start alike, so that after the warm-up, in which
    the teacher is not compared, its statistics are the student's (8).
    """
    figures = released["steps"][kind]
    found = our_steps(kind, monkeypatch)
    for step, expected in zip(found, figures, strict=True):
        assert step["filled"] == expected["filled"]
        in_warm_up = expected["alpha"] == 0
        compared = SCALARS - {"teacher", "apart"} if in_warm_up else SCALARS
        for name in compared:
            close(step[name], expected[name], SEVERAL_STEPS)
    last = figures[-1]
    assert last["loss_contrast"] > 1 and last["loss_unsup"] > 0.1 and last["apart"] > 0.01
    assert min(last["filled"]) > 0


def test_the_presets_weigh_the_contrast_as_the_released_processes_do(released):
    """Difference 3. With n processes instead of one, the gradient of the feature head, which learns
    from the contrast alone, is n times as small; that of the classifier, which learns from L_s and
    L_u, stays."""
    by_processes = {int(n): figures for n, figures in released["processes"].items()}
    for n, figures in by_processes.items():
        close(figures["feature_head"] / by_processes[1]["feature_head"], 1 / n, SEVERAL_STEPS)
        close(figures["classifier"] / by_processes[1]["classifier"], 1, SEVERAL_STEPS)
    for data, processes in (("voc", 4), ("cityscapes", 8)):
        share = by_processes[processes]["feature_head"] / by_processes[1]["feature_head"]
        close(u2pl.PRESETS[data]["contrast_weight"], share, SEVERAL_STEPS)


# -------------------------------------------------------------------------- with --ael


class Pixelwise(nn.Module):
    """1x1 convolutions without BatchNorm: the prediction for a pixel is that of its colour.

    So images may go through it together or one after another, and what it says of a mixed image is
    mixed from what it says of both (difference 13).
    """

    def __init__(self, seed: int):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU())
        widths = {"classifier": AEL_CLASSES, "representation": CHANNELS, "auxiliary": AEL_CLASSES}
        for name, width in widths.items():
            self.add_module(name, nn.Conv2d(12, width, 1))
        for offset, parameter in enumerate(self.parameters()):
            parameter.data = normal(seed + offset, *parameter.shape)

    def forward(self, images: Tensor, return_features: bool = False):
        x = self.backbone(images)
        if not return_features:
            return self.classifier(x)
        return self.classifier(x), self.representation(x), self.auxiliary(x)


def single_images(iteration: int) -> tuple[list[dict], Tensor]:
    """A labelled image, one to paste from and one u1, a batch each; and u2."""
    batches, other = ael_inputs(10 + iteration)  # all classes are in each
    return [{key: value[-1:] for key, value in batch.items()} for batch in batches], other


def test_steps_with_ael_are_those_of_the_released_branch(released, monkeypatch, in_order):
    """One labelled and one mixed image a step, which is an epoch of ten in all.

    The labels of the lowest entropy go (difference 11). The contrast begins with the second step.
    """
    args = as_released("--ael", "--entropy-as-released", "--device", "cpu")
    args.low_rank = 0  # the pseudo-label, or no pixel would be a negative of it (difference 1)
    args.ohem, args.aux_weight, args.contrast_weight = (0.7, 2 * KEPT), 0.4, 0.1
    student, teacher = Pixelwise(700), Pixelwise(720).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    cpu = torch.device("cpu")
    weak = u2pl.Equalisation(
        ConfidenceBank(AEL_CLASSES, MOMENTUM, cpu, as_released=True),
        ImagePool(4, AEL_CLASSES, AEL_SIZE, cpu),
        ALLOWED,
    )
    weak.bank.confidence.copy_(first_confidence())
    keys = MemoryBank(AEL_CLASSES, 4 * CAPACITY, CHANNELS, cpu)  # a step brings more than CAPACITY
    keys.keys = keys.keys.float()

    for iteration, expected in enumerate(released["with_AEL"]["steps"]):
        batches, other = single_images(iteration)
        choose_as_released(monkeypatch, expected, iteration, weak.pool, other)
        networks = student, teacher.train()
        step = u2pl.ael_step(*networks, keys, weak, batches, iteration, 10, args)
        optimizer.zero_grad()
        step["loss"].backward()
        optimizer.step()
        u2pl.ema_update(teacher, student, min(1 - 1 / (iteration + 1), 0.99))

        tolerance = SEVERAL_STEPS if iteration else ONE_FUNCTION
        for name in LOSSES:
            close(step[name], expected[name], tolerance)
        total = sum(expected[name] for name in LOSSES[:2]) + 0.1 * expected["loss_contrast"]
        close(step["loss"], total, tolerance)
        for ours, theirs in zip(weak.bank.confidence, expected["confidence"], strict=True):
            close(ours, theirs, tolerance)
        assert keys.filled.tolist() == expected["filled"]
        close(length(student), expected["student"], tolerance)
        close(length(teacher), expected["teacher"], tolerance)
    assert released["with_AEL"]["steps"][0]["loss_contrast"] == 0 < expected["loss_contrast"]


# -------------------------------------------------------------------------- boxes, sizes, settings


def test_boxes_have_the_released_law(released):
    """20 000 boxes of 129 pixels, in shares of the side: mean and deviation of width, height and
    area, and of the place of the corner where 0 and 1 are the edges that the box leaves it. Within
    five standard errors of the two means' difference and half a pixel (difference 7)."""
    generator = torch.Generator().manual_seed(0)
    boxes = cutmix.draw_boxes(20_000, 1, (0.5, 0.5), 129, generator, even_width=True)
    top, left, bottom, right = boxes[:, 0].double().T / 129
    ours = {
        "width": right - left,
        "height": bottom - top,
        "area": (right - left) * (bottom - top),
        "left": left / (1 - right + left).clamp_min(1e-9),
        "top": top / (1 - bottom + top).clamp_min(1e-9),
    }
    for name, values in ours.items():
        mean, deviation = released["boxes"][name]
        allowed = 5 * deviation * (2 / 20_000) ** 0.5 + 0.5 / 129
        assert abs(values.mean().item() - mean) < allowed
        assert abs(values.std().item() - deviation) < allowed


SIZES = [(513, 129), (769, 193), (321, 81), (64, 16), (33, 9)]


@pytest.mark.parametrize(("size", "low_size"), SIZES)
def test_maps_are_scaled_down_as_interpolate_does(size, low_size):
    """The release takes `F.interpolate(mode="nearest")`."""
    maps = whole(8, 256, 1, size, size)
    low = (low_size, low_size)
    expected = F.interpolate(maps[None].float(), size=low, mode="nearest")[0].long()
    assert torch.equal(u2pl.nearest(maps, low), expected)


@pytest.mark.parametrize("data", ["voc", "cityscapes"])
def test_presets_are_the_released_configurations(data, released):
    config = released["config"][data]
    dataset, trainer, network = (config[part] for part in ("dataset", "trainer", "net"))
    sgd = trainer["optimizer"]["kwargs"]
    processes = {"voc": 4, "cityscapes": 8}[data]  # a comment beside the learning rate says so
    args = u2pl.parse_args(["--data", data, "--weights", "none"])

    assert (args.epochs, args.lr) == (trainer["epochs"], sgd["lr"])
    assert args.weight_decay == sgd["weight_decay"] and args.decay_norm
    assert args.head_lr_mult == (10 if "pascal" in dataset["type"] else 1)  # as main() asks
    assert sgd["momentum"] == 0.9 and trainer["lr_scheduler"]["kwargs"]["power"] == 0.9
    assert args.batch_size == dataset["batch_size"] * processes
    assert [args.crop_size] * 2 == dataset["train"]["crop"]["size"]
    assert args.scale == "half-or-double" and dataset["train"]["rand_resize"] == [0.5, 2.0]
    assert args.warmup_epochs == trainer.get("sup_only_epoch", 1)
    assert args.ema_decay == network["ema_decay"]

    # layer2 halves the resolution, layer3 and layer4 keep it
    keeps = network["encoder"]["kwargs"]["replace_stride_with_dilation"]
    assert args.output_stride == 8 and keeps == [False, True, True]
    assert args.aux_weight == network.get("aux_loss", {"loss_weight": 0})["loss_weight"]
    if data == "cityscapes":
        ohem = config["criterion"]["kwargs"]
        assert args.ohem == (ohem["thresh"], ohem["min_kept"] // dataset["batch_size"])
    else:
        assert args.ohem is None and config["criterion"]["type"] == "CELoss"

    contrast, unsup = trainer["contrastive"], trainer["unsupervised"]
    assert (args.low_rank, args.high_rank) == (contrast["low_rank"], contrast["high_rank"])
    assert args.alpha0 == contrast["low_entropy_threshold"] == 100 - unsup["drop_percent"]
    assert u2pl.ANCHORS == contrast["num_queries"] and u2pl.NEGATIVES == contrast["num_negatives"]
    assert u2pl.TEMPERATURE == contrast["temperature"]
    assert u2pl.SURE == contrast["current_class_threshold"]
