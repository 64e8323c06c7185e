"""AEL beside the authors' code: our losses, bank, boxes and steps give the figures of theirs.

How the figures lie in `tests/released/` and what they are compared to is as in `test_released.py`.
What was run, on a CPU in float32, with `.cuda()` returning its tensor and one process:

    steps       train.train(...), one epoch of STEPS iterations, with `TwoHeads` whose logits are
                interpolated to the images as ModelBuilder does, an optimiser as in `our_steps` and
                a constant rate. Both unlabelled images of a batch were u1, so that it does not
                matter which of them is taken, and the image that the data set gives for any index
                was u2. The momentum of the bank was MOMENTUM, the threshold of "pascal"
                CONFIDENT, since toys are sure of little, and `min_kept` of the OHEM 2·KEPT.
                `torch.rand(h, w)` returned CHANCE[t] in iteration t. Classes to paste, classes of
                the boxes and the boxes are those that came; they are kept with the figures. The
                auxiliary head's statistics, which nothing uses, are left out: the release runs it
                on mixed images, too.
    loss        Criterion_cons(gamma=1.5, sample=True, gamma2=0.5), likewise with CHANCE[0]
    regions     generate_cutmix(...), 400 times after random.seed(0): the boxes that came
    boxes       init_cutmix(96), 20 000 times after np.random.seed(0)
    drawn       the probabilities that sample_from_bank and train give to np.random.choice
    listed      update_cutmix_bank(...): which classes each image is listed for
    config      experiments/{pascal_4,cityscapes_2}/config.yaml, as they are

The bank is compared with --bank-as-released (difference 1 of ael.py), and boxes of regions at the
same resolution (difference 4). Tolerances, chosen before the first comparison: 1e-5 of the value
for one function in float32, 1e-4 after several steps of training.
"""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_released import KEPT, assert_law
from torch import Tensor, nn

import ael
from common import adaptive, augment
from common.adaptive import (
    ConfidenceBank,
    ImagePool,
    adaptive_loss,
    choose_crops,
    classes_in,
    component_boxes,
    copy_paste_classes,
    sampling_rates,
)
from common.augment import normalise
from common.cutmix import half_area_masks

RELEASED = json.loads((ROOT / "tests" / "released" / "ael.json").read_text())
ONE_FUNCTION, SEVERAL_STEPS = 1e-5, 1e-4
CPU = torch.device("cpu")
CLASSES, SIZE, STEPS = 12, 32, 3
MOMENTUM, CONFIDENT = 0.9, 0.5
ALLOWED = torch.tensor([3, 4, 5, 6, 7, 9, 11])  # what the release may paste of twelve classes
ABSENT = 11  # the class that no labelled pixel of iteration 1 has
CHANCE = torch.from_numpy(np.random.RandomState(30).rand(STEPS, SIZE, SIZE).astype(np.float32))

# ------------------------------------------------------------------------------ rules of the inputs


class TwoHeads(nn.Module):
    """Two heads of a convolution of every fourth pixel and a BatchNorm, as `Toy`."""

    def __init__(self, seed: int):
        super().__init__()
        draw = np.random.RandomState(seed)
        self.head, self.auxiliary = (
            nn.Sequential(nn.Conv2d(3, CLASSES, 1, bias=False), nn.BatchNorm2d(CLASSES))
            for _ in range(2)
        )
        for parameter in self.parameters():
            parameter.data = 2 * torch.from_numpy(draw.standard_normal(parameter.shape)).float()

    def forward(self, images: Tensor, with_auxiliary: bool = False):
        pixels = images[:, :, ::4, ::4]
        if not with_auxiliary:
            return self.head(pixels)
        return self.head(pixels), self.auxiliary(pixels)


def step_inputs(iteration: int) -> tuple[list[dict], Tensor]:
    """Two labelled images, two to paste from, one u1; and one u2, (1,3,32,32) float16.

    Something is pasted into the second labelled image alone.
    """
    draw = np.random.RandomState(40 + iteration)
    batches = []
    for count in (2, 2, 1, 1):
        image = torch.from_numpy(draw.randint(0, 256, (count, SIZE, SIZE, 3)).astype(np.uint8))
        target = torch.from_numpy(draw.randint(0, CLASSES, (count, SIZE, SIZE)).astype(np.uint8))
        if iteration == 1:
            target[target == ABSENT] = 0
        target[0, :4] = 255
        valid_mask = torch.ones(count, SIZE, SIZE, dtype=torch.bool)
        batches.append({"image": image, "target": target, "valid_mask": valid_mask})
    *batches, other = batches
    return batches, normalise(other["image"], other["valid_mask"]).half()


def first_confidence() -> Tensor:
    """The bank's first confidences (C,)."""
    return torch.from_numpy(np.random.RandomState(31).rand(CLASSES).astype(np.float32))


def loss_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (2,C,32,32), labels (2,32,32), some of them 255, confidences and a bank (C,)."""
    draw = np.random.RandomState(32)
    logits = 2 * torch.from_numpy(draw.standard_normal((2, CLASSES, SIZE, SIZE))).float()
    label = torch.from_numpy(draw.randint(0, CLASSES, (2, SIZE, SIZE)).astype(np.uint8))
    label[1, 5:15] = 255
    confidence = torch.from_numpy(draw.rand(2, SIZE, SIZE)).float()
    return logits, label, confidence, first_confidence()


def label_map() -> Tensor:
    """(1,32,32) uint8: regions of class 5, some of a few pixels, some that touch at a corner."""
    draw = np.random.RandomState(33)
    coarse = draw.randint(3, 8, (16, 16)).repeat(2, 0).repeat(2, 1)
    coarse[draw.rand(SIZE, SIZE) < 0.1] = 5
    return torch.from_numpy(coarse.astype(np.uint8))[None]


# ------------------------------------------------------------------------------------------- steps


def choose_as_released(
    monkeypatch, chosen: dict, iteration: int, pool: ImagePool, other: Tensor
) -> None:
    """From now on classes, boxes and pixels are those of the release, and u2 is `other`.

    Something is pasted into the last image of a batch.
    """
    pool.push(other, torch.ones(1, SIZE, SIZE, dtype=torch.bool), torch.ones(1, CLASSES) > 0)
    place = ((pool.head - 1) % len(pool.images))[None]

    def into_the_last(count: int, *_) -> Tensor:
        numbers = torch.full((count, 1), 0.9)  # below ½ something is pasted
        numbers[-1] = 0.1
        return numbers

    pasted, box = torch.tensor(chosen["pasted classes"]), torch.tensor([chosen["box"]])
    given = {
        "draw": into_the_last,
        "copy_paste_classes": lambda *_: pasted,
        "choose_crops": lambda *_: (torch.tensor([chosen["class"]]), place),
        "component_boxes": lambda *_: (box, torch.ones(1)),
    }
    for function, replaced in given.items():
        monkeypatch.setattr(adaptive, function, replaced)
    chance = 1 - CHANCE[iteration]  # the release keeps a pixel whose number is above 1 - s
    monkeypatch.setattr(torch, "rand", lambda size, device: chance.expand(size))


def our_steps(name: str, theirs: list[dict], monkeypatch):
    """STEPS iterations with the choices of the release.

    Returns:
        The measures and the confidences of each iteration, the student and the teacher.
    """
    args = ael.parse_args(["--crop-size", str(SIZE), "-b", "2", "--device", "cpu"])
    args.ohem, args.aux_weight, args.labelled_consistency = (0.7, KEPT), 0.4, True
    args.conf_thresh = CONFIDENT if name == "pascal" else 0.0
    student, teacher = TwoHeads(1), TwoHeads(2).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    bank = ConfidenceBank(CLASSES, MOMENTUM, CPU, as_released=True)
    bank.confidence.copy_(first_confidence())
    pool = ImagePool(4, CLASSES, SIZE, CPU)

    found = []
    for iteration, chosen in enumerate(theirs):
        batches, other = step_inputs(iteration)
        choose_as_released(monkeypatch, chosen, iteration, pool, other)
        measured = ael.train_step(student, teacher, bank, pool, ALLOWED, batches, iteration, args)
        optimizer.zero_grad()
        measured["loss"].backward()
        optimizer.step()
        ael.ema_update(teacher, student, min(1 - 1 / (iteration + 1), args.ema_decay))
        found.append((measured, bank.confidence.clone()))
    return found, student, teacher


@pytest.mark.parametrize("name", RELEASED["steps"])
def test_steps_have_the_losses_the_bank_and_the_networks_of_the_release(name: str, monkeypatch):
    theirs = RELEASED["steps"][name]
    found, student, teacher = our_steps(name, theirs["iterations"], monkeypatch)
    for index, ((ours, confidence), expected) in enumerate(zip(found, theirs["iterations"])):
        close = {"rel": SEVERAL_STEPS if index else ONE_FUNCTION}
        for key in ("loss", "loss_sup", "loss_unsup"):
            assert ours[key].item() == pytest.approx(expected[key], **close)
        assert confidence.tolist() == pytest.approx(expected["confidence"], **close)
        assert 0 < ours["pasted"].item() < 0.5 and 0.2 < ours["kept"].item() < 0.9
    for ours, expected in ((student, theirs["student"]), (teacher, theirs["teacher"])):
        for key, values in expected.items():
            state = ours.state_dict()[key].flatten()
            largest = max(map(abs, values))
            assert state.tolist() == pytest.approx(values, abs=SEVERAL_STEPS * largest), key


# --------------------------------------------------------------------------------------- functions


def test_the_loss_is_the_released_one(monkeypatch):
    logits, label, confidence, known = loss_inputs()
    bank = ConfidenceBank(CLASSES, MOMENTUM, CPU)
    bank.confidence.copy_(known)
    monkeypatch.setattr(torch, "rand", lambda size, device: (1 - CHANCE[0]).expand(size))
    logits.requires_grad_()
    loss, kept = adaptive_loss(
        logits, label, confidence, label >= 0, rates=sampling_rates(bank, 0.5), gamma=1.5
    )
    loss.backward()
    assert loss.item() == pytest.approx(RELEASED["loss"]["value"], rel=ONE_FUNCTION)
    assert kept.item() == pytest.approx(RELEASED["loss"]["kept"], rel=ONE_FUNCTION)
    length = logits.grad.norm().item()
    assert length == pytest.approx(RELEASED["loss"]["length of the gradient"], rel=ONE_FUNCTION)


@pytest.mark.parametrize("share", RELEASED["regions"])
def test_boxes_bound_the_regions_that_the_release_finds(share: str):
    label, classes = label_map(), torch.tensor([5])
    boxes = set()
    for iteration in range(400):
        box, hit = component_boxes(label, classes, SIZE, float(share), 0, iteration)
        assert hit.item() == 1
        boxes.add(tuple(box[0].tolist()))
    assert boxes == set(map(tuple, RELEASED["regions"][share]))


def test_boxes_without_a_region_have_the_released_law():
    masks = torch.cat([half_area_masks(50, 96, 0, iteration, CPU) for iteration in range(400)])
    sides = [masks.any(axis).sum(1).numpy() / 96 for axis in (2, 1)]
    first = [masks.any(axis).int().argmax(1).numpy() / 96 for axis in (2, 1)]
    height, width = sides
    samples = {
        "height": height, "height squared": height**2, "width": width, "area": height * width,
        "top": first[0], "top squared": first[0] ** 2, "left": first[1],
        "height times top": height * first[0],
    }  # fmt: skip
    assert_law(RELEASED["boxes"], samples)


def test_classes_are_drawn_with_the_released_probabilities(monkeypatch):
    """The release draws classes to paste from those of ALLOWED."""
    given = []
    monkeypatch.setattr(adaptive, "choose", lambda probs, numbers: given.append(probs) or numbers)
    bank = ConfidenceBank(CLASSES, MOMENTUM, CPU)
    bank.confidence.copy_(first_confidence())
    args = ael.parse_args(["--device", "cpu"])
    pool = ImagePool(4, CLASSES, SIZE, CPU)
    monkeypatch.setattr(pool, "find", lambda *_: None)
    choose_crops(bank, pool, 1, 0, args)
    assert given.pop().tolist() == pytest.approx(RELEASED["drawn"]["box"], rel=ONE_FUNCTION)
    monkeypatch.setattr(adaptive, "choose", lambda probs, numbers: given.append(probs) or 0)
    copy_paste_classes(bank, ALLOWED, 3, 0, 0)
    assert given.pop().tolist() == pytest.approx(RELEASED["drawn"]["paste"], rel=ONE_FUNCTION)


@pytest.mark.parametrize("share", RELEASED["listed"])
def test_crops_are_listed_for_the_classes_that_the_release_lists_them_for(share: str):
    logits, *_ = loss_inputs()
    logits[:, 3] += 2
    ours = classes_in(logits.argmax(1).to(torch.uint8), CLASSES, float(share))
    assert ours.int().tolist() == RELEASED["listed"][share]


@pytest.mark.parametrize(("name", "data"), [("pascal_4", "voc"), ("cityscapes_2", "cityscapes")])
def test_the_presets_are_the_released_configurations(name: str, data: str):
    theirs, ours = RELEASED["config"][name], ael.PRESETS[data]
    dataset, processes = theirs["dataset"], 8
    acm, acp = dataset["train"]["acm"], dataset["acp"]
    rate = theirs["trainer"]["optimizer"]["kwargs"]
    assert ours["crop_size"] == dataset["train"]["crop"]["size"][0]
    assert ours["batch_size"] == processes * dataset["batch_size"]
    assert ours["epochs"] == theirs["trainer"]["epochs"]
    assert ours["lr"] == pytest.approx(rate["lr"] / processes)
    assert ours["weight_decay"] == pytest.approx(rate["weight_decay"] * processes)
    assert ours["conf_thresh"] == theirs["criterion"].get("threshold", 0)
    ohem = theirs["criterion"]["kwargs"]
    assert ours["ohem"] == (ohem["thresh"], ohem["min_kept"] / dataset["batch_size"])
    assert ours["aux_weight"] == theirs["net"]["aux_loss"]["loss_weight"]
    assert ours["bank_momentum"] == acp["momentum"] and ours["copy_classes"] == acp["number"]
    assert ours["region_share"] == acm["area_thresh"]
    assert ours["listed_share"] == acm.get("area_thresh2", acm["area_thresh"])
    assert acm["no_pad"] and acm["no_slim"] and acp["prob"] == 0.5
    args = ael.parse_args(["--device", "cpu"])
    assert args.gamma == theirs["criterion"]["cons"]["gamma"]
    assert args.ema_decay == theirs["net"]["ema_decay"]
    assert augment.scale_rule(ours["paste_scale"]) is not None
