"""UniMatch, FixMatch, ClassMix and DACS against figures that their released code gives.

How the figures lie in `tests/released/` and what they are compared to is as in `test_released.py`.
What was run, on a CPU:

- UniMatch and FixMatch: the body of the loop over batches in unimatch.py and fixmatch.py, from the
  partners' labels to the loss, with `Perturbed` for the network, and `obtain_cutmix_box`. The
  `min_kept` of the OHEM was KEPT times the number of images.
- ClassMix: the part of the loop in trainSSL.py from the teacher's labels to the loss, with the
  settings of configVOC.json and a teacher in eval mode (difference 6 of mean_teacher.py).
- DACS: the same part of trainUDA.py with the settings of configUDA.json, but without jitter and
  blur, and again a teacher in eval mode.

In the last two the threshold 0.968 was CONFIDENT, since toys are sure of little. The tolerances are
those of `test_released.py`.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_released import KEPT, Toy, assert_law, assert_tensors, gradients, step_inputs

import mean_teacher
import unimatch
from common import augment
from common.cutmix import class_masks, draw_small_box, rasterise

RELEASED = Path(ROOT, "tests", "released")
UNIMATCH, CLASSMIX, DACS = (
    json.loads((RELEASED / f"{name}.json").read_text()) for name in ("unimatch", "classmix", "dacs")
)
CONFIDENT = 0.9  # the threshold in the steps of ClassMix and DACS


class Perturbed(Toy):
    """A `Toy` whose dropped features have fixed factors, so that nothing is random."""

    def forward(self, images: torch.Tensor, dropout: float | None = None, complementary=False):
        features = self.conv(images[:, :, ::4, ::4])
        if dropout is None:
            return self.norm(features)
        assert dropout == 0.5
        factors = torch.tensor([0.0, 2.0, 2.0, 0.0, 1.0])[:, None, None]
        return self.norm(torch.cat([features, factors * features])).chunk(2)


def unimatch_inputs() -> tuple[list[dict], list[torch.Tensor], Perturbed]:
    """Labelled batch, unlabelled batch, partner (3 images of 32x32 each), two masks, a network.

    Two of the unlabelled images have padding.
    """
    draw = np.random.RandomState(8)

    def images() -> torch.Tensor:
        return torch.from_numpy(draw.randint(0, 256, (3, 32, 32, 3)).astype(np.uint8))

    valid_mask = torch.ones(3, 32, 32, dtype=torch.bool)
    target = draw.randint(0, 5, (3, 32, 32)).astype(np.uint8)
    target[:2, :5] = 255
    labelled = {"image": images(), "valid_mask": valid_mask, "target": torch.from_numpy(target)}
    views = ("image", "image_strong_1", "image_strong_2")
    unlabelled = [{view: images() for view in views} for _ in range(2)]
    for index, batch in enumerate(unlabelled):
        batch["valid_mask"] = valid_mask.clone()
        batch["valid_mask"][index, 20:, :] = False
    masks = [torch.from_numpy(draw.rand(3, 32, 32) < share) for share in (0.4, 0.2)]
    return [labelled, *unlabelled], masks, Perturbed(draw)


def small_box_samples(masks: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of boxes, of which there may be none, in masks (N,S,S); shares of the side S."""
    side = masks.shape[1]
    happened = masks.any((1, 2))
    rows, columns = masks[happened].any(2), masks[happened].any(1)
    height, width = rows.sum(1) / side, columns.sum(1) / side
    top, left = rows.argmax(1) / side, columns.argmax(1) / side
    area, aspect = height * width, np.log(height / width)
    return {
        "there": happened, "area": area, "area squared": area**2, "height": height, "width": width,
        "log aspect": aspect, "log aspect squared": aspect**2,
        "top": top, "top squared": top**2, "left": left, "left squared": left**2,
        "area times top": area * top,
    }  # fmt: skip


def first_two(batches: list[dict]) -> None:
    """Two images a batch, in place, and no ignored pixel: what the release of DACS can do."""
    for batch in batches:
        for key, value in batch.items():
            batch[key] = value[:2]
    target = batches[0]["target"]
    target[target == 255] = 3


# ------------------------------------------------------------------------------ UniMatch, FixMatch


@pytest.mark.parametrize("name", UNIMATCH["steps"])
def test_a_step_of_unimatch_has_the_losses_and_gradients_of_the_release(name: str, monkeypatch):
    theirs = UNIMATCH["steps"][name]
    method, data = name.split()
    flags = ["--fixmatch"] if method == "FixMatch" else []
    args = unimatch.parse_args(["--crop-size", "32", "-b", "3", "--device", "cpu", *flags])
    args.conf_thresh = theirs["conf_thresh"]
    args.ohem = (0.7, KEPT) if data == "cityscapes" else None

    batches, masks, network = unimatch_inputs()
    monkeypatch.setattr(unimatch, "small_box_masks", lambda *given: masks[given[4] - 1])
    measured = unimatch.train_step(network, *batches, 0, args)
    measured["loss"].backward()
    losses = {"loss", "loss_sup", "loss_strong", "loss_feature", "confident"} & set(theirs)
    assert set(measured) == losses
    for key in losses:
        assert measured[key].item() == pytest.approx(theirs[key], rel=1e-5)
    assert theirs["confident"] == 1 if args.conf_thresh == 0 else 0.1 < theirs["confident"] < 0.9
    assert_tensors(gradients(network), theirs["gradients"])
    assert_tensors(dict(network.named_buffers()), theirs["statistics"])


def test_the_small_boxes_have_the_released_law():
    generator = random.Random(4)
    boxes = torch.tensor([draw_small_box(96, generator) for _ in range(8000)])
    masks = rasterise(boxes[:, None], 96).numpy()
    assert_law(UNIMATCH["law of the boxes"], small_box_samples(masks))


@pytest.mark.parametrize(("name", "data"), [("pascal", "voc"), ("cityscapes", "cityscapes")])
def test_the_presets_of_unimatch_are_the_released_configurations(name: str, data: str):
    theirs, ours = UNIMATCH["configurations"][name], unimatch.PRESETS[data]
    for setting in ("crop_size", "epochs", "lr", "conf_thresh"):
        assert ours[setting] == theirs[setting]
    assert ours["head_lr_mult"] == theirs["lr_multi"]
    assert ours["batch_size"] == 4 * theirs["batch_size"]  # on 4 GPUs
    assert augment.scale_rule(ours["scale"]) == augment.ScaleBetween(0.5, 2.0)
    assert ours["dropout"] == 0 and ours["decay_norm"] and ours["weight_decay"] == 1e-4


# --------------------------------------------------------------------------------- ClassMix, DACS


def classmix_step(flags: list[str], batches: list[dict], chosen: list[list[int]], monkeypatch):
    """Measures and student of a step of `batches` whose class masks choose these classes."""
    given = []

    def masks(labels: torch.Tensor, *others, **options) -> torch.Tensor:
        given.append((labels, others[0], options))
        return torch.stack([torch.isin(x, torch.tensor(c)) for x, c in zip(labels, chosen)])

    monkeypatch.setattr(mean_teacher, "class_masks", masks)
    args = mean_teacher.parse_args(["--crop-size", "32", "-b", "3", "--device", "cpu", *flags])
    args.conf_thresh = CONFIDENT
    _, _, (student, teacher) = step_inputs()
    teacher.requires_grad_(False).eval()
    batch_l, *batches_u = batches
    measured = mean_teacher.classmix_step(student, teacher, batch_l, batches_u, 1.0, 0, args)
    measured["loss"].backward()
    return measured, student, given


def test_a_step_of_classmix_has_the_losses_and_gradients_of_the_release(monkeypatch):
    """There each image is pasted into the next one of its batch."""
    theirs = CLASSMIX["step"]
    batches, _, _ = step_inputs()
    pasted = batches[1]
    into = {key: value.roll(-1, 0) for key, value in pasted.items()}
    batches = [batches[0], into, pasted]
    chosen = theirs["chosen classes"]
    measured, student, ((labels, classes, options),) = classmix_step(
        ["--classmix"], batches, chosen, monkeypatch
    )
    for name in ("loss", "loss_sup", "loss_unsup", "confident"):
        assert measured[name].item() == pytest.approx(theirs[name], rel=1e-5)
    assert 0.1 < theirs["confident"] < 0.9
    assert_tensors(gradients(student), theirs["gradients"])
    assert [x.unique().tolist() for x in labels] == theirs["classes"] and classes == 5
    assert not options["round_up"]
    assert_as_many_classes(labels, chosen, round_up=False)


def test_a_step_of_dacs_has_the_losses_and_gradients_of_the_release(monkeypatch):
    """There the first image of the labelled batch is pasted into the first unlabelled one, ..."""
    theirs = DACS["step"]
    batches, _, _ = step_inputs()
    first_two(batches)
    chosen = theirs["chosen classes"]
    measured, student, ((labels, _, options),) = classmix_step(
        ["--classmix", "labelled"], batches[:2], chosen, monkeypatch
    )
    for name in ("loss", "loss_sup", "loss_unsup", "confident"):
        assert measured[name].item() == pytest.approx(theirs[name], rel=1e-5)
    assert_tensors(gradients(student), theirs["gradients"])
    assert torch.equal(labels, batches[0]["target"]) and options["round_up"]
    assert_as_many_classes(labels, chosen, round_up=True)


def assert_as_many_classes(labels: torch.Tensor, chosen: list[list[int]], round_up: bool) -> None:
    """Our masks choose as many classes of each image as the release did."""
    masks = class_masks(labels, 5, seed=0, iteration=0, round_up=round_up)
    ours = [len(image[mask].unique()) for image, mask in zip(labels, masks)]
    assert ours == [len(classes) for classes in chosen]
