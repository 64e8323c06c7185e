"""Our functions against figures that the authors' released code gives for the same inputs.

The figures lie in `tests/released/`, one file a release, with its repository and commit. To repeat
them, check the commit out and feed its functions with the inputs that the rules below make: all
come from numpy's RandomState, whose numbers never change. What was run, on a CPU:

- CPS: the body of the loop `for idx in pbar` of each experiment's train.py, with a `Toy` for each
  branch, one process, and `min_kept` of the OHEM set to KEPT for each image; `group_weight`,
  `WarmUpPolyLR`, `ProbOhemCrossEntropy2d`, `hist_info` and `compute_score`, `BoxMaskGenerator` with
  the arguments of config.py, and the positions of the windows in `Evaluator.scale_process`.
- Mean Teacher of the CPS authors: likewise; `ema_decay` was 1 for the loss, and the average was
  taken by `_update_ema_variables` with 0.99.
- CutMix-Seg: the body of the loop over labelled batches in train_seg_semisup_mask_mt.py.
- ST++: `train` (for the schedule), `select_reliable`, `meanIOU`, `cutout`, the lines that augment
  an unlabelled image in `SemiDataset.__getitem__`, and those that set its defaults in main.py.

`.cuda()` returned its tensor, `all_reduce` did nothing, and the branches upsampled their logits, as
the released networks do. A law is given as [mean, standard error] of a statistic over 10 000 draws
or more; the tests ask that ours be within four standard errors of both together. Everything else
agrees to 1e-5 in float32 and 1e-6 in float64. The tolerances were chosen before the figures were
seen.
"""

import json
import types

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

import cps
import mean_teacher
import stpp
import supervised
from common import augment, cutmix
from common.deeplabv3plus import DeepLabV3Plus, parameter_groups
from common.evaluate import image_miou, scores, starts, update
from common.losses import hard_pixels, labelled_loss, mean_cross_entropy
from common.schedule import Schedule

CPS, CUTMIX_SEG, STPP = (
    json.loads((ROOT / "tests" / "released" / f"{name}.json").read_text())
    for name in ("cps", "cutmix_seg", "stpp")
)
KEPT = 200  # pixels an image that OHEM keeps in the steps below
EXPERIMENTS = {  # of CPS -> preset
    "voc CPS": "voc",
    "voc CPS+CutMix": "voc",
    "city CPS": "cityscapes",
    "city CPS+CutMix": "cityscapes",
}

# ------------------------------------------------------------------------------ rules of the inputs


class Toy(nn.Module):
    """A 1x1 convolution of every fourth pixel and a BatchNorm, which tells forward passes apart."""

    def __init__(self, random: np.random.RandomState):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5)
        for parameter in (self.conv.weight, self.norm.weight, self.norm.bias):
            parameter.data = 2 * torch.from_numpy(random.standard_normal(parameter.shape)).float()
        self.norm.running_mean += torch.from_numpy(random.standard_normal(5)).float()
        self.norm.running_var += torch.from_numpy(random.rand(5)).float()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(images[:, :, ::4, ::4]))


def step_inputs() -> tuple[list[dict], torch.Tensor, list[Toy]]:
    """Labelled, first and second unlabelled batch (3 images of 32x32), a mask, two networks."""
    random = np.random.RandomState(1)
    images = [random.randint(0, 256, (3, 32, 32, 3)).astype(np.uint8) for _ in range(3)]
    target = random.randint(0, 5, (3, 32, 32)).astype(np.uint8)
    target[:2, :5] = 255
    mask = torch.from_numpy(random.rand(3, 32, 32) < 0.4)
    networks = [Toy(random), Toy(random)]
    valid_mask = torch.ones(3, 32, 32, dtype=torch.bool)  # no padding: the releases let it count
    batches = [{"image": torch.from_numpy(pixels), "valid_mask": valid_mask} for pixels in images]
    batches[0]["target"] = torch.from_numpy(target)
    return batches, mask, networks


def confident_logits() -> tuple[torch.Tensor, torch.Tensor]:
    """(4,6,16,16) float64 logits, mostly right, and labels; the second image has five of these."""
    random = np.random.RandomState(2)
    logits, target = 2 * random.standard_normal((4, 6, 16, 16)), random.randint(0, 6, (4, 16, 16))
    logits += 4 * np.eye(6)[target].transpose(0, 3, 1, 2)
    target[0, :10] = 255
    target[1] = 255
    target[1, 0, :5] = 1
    return torch.from_numpy(logits), torch.from_numpy(target).to(torch.uint8)


def label_maps() -> tuple[torch.Tensor, torch.Tensor]:
    """Five masks and predictions of seven classes: one occurs nowhere, one is only predicted."""
    random = np.random.RandomState(3)
    truth, guess = random.randint(0, 7, (5, 20, 30)), random.randint(0, 7, (5, 20, 30))
    truth[truth == 6] = 255
    guess[guess == 6] = 0
    truth[truth == 5] = 0
    truth[0, :5] = 255
    guess[random.rand(5, 20, 30) < 0.5] = 0
    return torch.from_numpy(truth).to(torch.uint8), torch.from_numpy(guess).to(torch.uint8)


def three_predictions() -> list[torch.Tensor]:
    """Label maps (7,15,20) of three checkpoints; the later the image, the more they differ."""
    random = np.random.RandomState(6)
    last = random.randint(0, 4, (7, 3, 4)).repeat(5, 1).repeat(5, 2)
    maps = []
    for share in (0.5, 0.2):
        noisy = last.copy()
        where = random.rand(*last.shape) < share * np.arange(1, 8)[:, None, None] / 4
        noisy[where] = random.randint(0, 21, where.sum())
        maps.append(noisy)
    return [torch.from_numpy(part) for part in (*maps, last)]


def coloured_blocks() -> np.ndarray:
    """An image (32,32,3) uint8 of coloured blocks with noise."""
    random = np.random.RandomState(7)
    coarse = random.randint(0, 256, (8, 8, 3)).repeat(4, 0).repeat(4, 1)
    return np.clip(coarse + random.randint(-20, 21, (32, 32, 3)), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------- how to compare


def assert_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, list[float]]) -> None:
    """Equal to 1e-5 of the largest entry of each tensor (float32)."""
    for name, values in theirs.items():
        expected = torch.tensor(values)
        difference = (ours[name].flatten() - expected).abs().max()
        assert difference <= 1e-5 * expected.abs().max(), f"{name}: {difference}"


def gradients(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def assert_law(theirs: dict[str, list[float]], samples: dict[str, np.ndarray]) -> None:
    """Means of `samples` within four standard errors, theirs and ours together."""
    for name, (mean, error) in theirs.items():
        ours = np.asarray(samples[name], dtype=np.float64)
        both = np.hypot(error, ours.std() / len(ours) ** 0.5)
        assert abs(ours.mean() - mean) <= 4 * both, f"{name}: {ours.mean()}, not {mean} ± {both}"


# -------------------------------------------------------------------------------- CPS, Mean Teacher


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_step_of_cps_has_the_losses_and_gradients_of_the_release(name, monkeypatch):
    """Labels, mixing, both directions and λ. The labelled loss of "city" is OHEM."""
    theirs, preset = CPS["steps"][name], cps.PRESETS[EXPERIMENTS[name]]
    mixes = name.endswith("CutMix")
    args = cps.parse_args(["--crop-size", "32", "-b", "3", *([] if mixes else ["--no-cutmix"])])
    args.cps_weight = preset["cps_weight"]["cutmix" if mixes else "plain"]
    args.ohem = preset["ohem"] and (preset["ohem"][0], KEPT)
    assert args.cps_weight == theirs["cps_weight"]

    batches, mask, networks = step_inputs()
    monkeypatch.setattr(cps, "xor_box_masks", lambda *_: mask)
    batch_l, *batches_u = batches if mixes else batches[:2]
    measured = cps.train_step(*networks, batch_l, batches_u, 0, args, background=None)
    measured["loss"].backward()
    loss_cps = args.cps_weight * measured["loss_unsup"].item()

    assert measured["loss_sup"].item() == pytest.approx(theirs["loss_sup"], rel=1e-5)
    assert loss_cps == pytest.approx(theirs["loss_cps"], rel=1e-5)
    assert measured["loss"].item() == pytest.approx(theirs["loss"], rel=1e-5)
    for ours, expected in zip(networks, theirs["gradients"]):
        assert_tensors(gradients(ours), expected)
    # With CutMix BatchNorm's statistics see the batches in another order (difference 8 of cps.py).
    for ours, expected in zip(networks, theirs.get("statistics", [])):
        assert_tensors(dict(ours.named_buffers()), expected)


@pytest.mark.parametrize("kept", [5, 60, 250])
def test_hard_pixels_are_those_of_the_released_ohem(kept):
    """Chosen among the images of a process: one each on the release's 8 GPUs (difference 5)."""
    logits, target = confident_logits()
    theirs = CPS["ohem"][str(kept)]
    for index, expected in enumerate(theirs["each"]):
        one = slice(index, index + 1)
        loss = labelled_loss(logits[one], target[one], (0.7, kept))
        assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss = labelled_loss(logits, target, (0.7, kept))
    assert loss.item() == pytest.approx(theirs["batch"], rel=1e-6)
    few = hard_pixels(logits[1:2], target[1:2], 0.7, 60)
    assert torch.equal(few, target[1:2])  # fewer valid pixels than must be kept: all stay


def test_the_mean_is_over_the_pixels_of_all_processes_where_the_release_averages_their_means():
    """Difference 4 of cps.py: the same only if the processes have as many valid pixels."""
    logits, target = confident_logits()
    first, second = CPS["two processes"]
    counts = [(target[part] != 255).sum().item() for part in (slice(0, 2), slice(2, 4))]
    expected = (counts[0] * first + counts[1] * second) / sum(counts)
    ours = mean_cross_entropy(logits, target).item()
    assert ours == pytest.approx(expected, rel=1e-6)
    assert abs(ours - (first + second) / 2) > 0.01


def test_a_step_of_mean_teacher_has_the_losses_and_gradients_of_the_cps_authors():
    """Without noise; the teacher as it is before the average (difference 1 of mean_teacher.py)."""
    theirs = CPS["mean teacher"]
    args = mean_teacher.parse_args(["--crop-size", "32", "-b", "3", "--noise-std", "0"])
    args.unsup_weight = mean_teacher.PRESETS["voc"]["unsup_weight"]["noise"]
    assert (args.unsup_weight, args.ema_decay) == (theirs["unsup_weight"], theirs["ema_decay"])

    batches, _, (student, teacher) = step_inputs()
    teacher.requires_grad_(False)
    measured = mean_teacher.noise_step(student, teacher, *batches[:2], args.unsup_weight, args)
    measured["loss"].backward()
    assert measured["loss_sup"].item() == pytest.approx(theirs["loss_sup"], rel=1e-5)
    loss_unsup = args.unsup_weight * measured["loss_unsup"].item()
    assert loss_unsup == pytest.approx(theirs["loss_unsup"], rel=1e-5)
    assert_tensors(gradients(student), theirs["gradients"])

    _, _, (student, teacher) = step_inputs()
    mean_teacher.ema_update(teacher, student, 0.99, buffers=False)
    assert_tensors(teacher.state_dict(), theirs["average"])


def test_a_step_of_cutmix_seg_is_that_of_the_release(monkeypatch):
    """Losses, share of confident pixels, the student's gradients, and the teacher afterwards."""
    theirs = CUTMIX_SEG["step"]
    args = mean_teacher.parse_args(["--cutmix", "--crop-size", "32", "-b", "3"])
    args.unsup_weight = mean_teacher.PRESETS["voc"]["unsup_weight"]["cutmix"]
    args.conf_thresh = theirs["conf_thresh"]

    batches, mask, (student, teacher) = step_inputs()
    monkeypatch.setattr(mean_teacher, "half_area_masks", lambda *_: mask)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    teacher.requires_grad_(False).eval()
    batch_l, *batches_u = batches
    inputs = (student, teacher, batch_l, batches_u, args.unsup_weight, 200, args)
    measured = mean_teacher.cutmix_step(*inputs)
    measured["loss"].backward()
    optimizer.step()
    mean_teacher.ema_update(teacher, student, args.ema_decay, buffers=True)
    for name in ("loss_sup", "loss_unsup", "confident"):
        assert measured[name].item() == pytest.approx(theirs[name], rel=1e-5)
    assert 0.1 < theirs["confident"] < 0.9
    assert_tensors(gradients(student), theirs["gradients"])
    assert_tensors(teacher.state_dict(), theirs["teacher"])


# ------------------------------------------------------------------------ schedules and constants


def schedule(total: int) -> Schedule:
    settings = {"batch_size": 1, "max_iters": total, "eval_iters": 1, "save_interval": 1}
    return Schedule(types.SimpleNamespace(**settings), 1, 1)


def test_the_learning_rate_of_cps_is_the_released_one_and_the_same_for_backbone_and_head():
    network = DeepLabV3Plus("tiny", 5, output_stride=8)
    mult = cps.PRESETS["voc"]["head_lr_mult"]
    groups = parameter_groups(network, 0.0025, mult, 4e-4, cps.PRESETS["voc"]["decay_norm"])
    ours = schedule(1000)
    for iteration, expected in CPS["poly"].items():
        for group in groups:
            assert group["lr"] * ours.factor(int(iteration)) == pytest.approx(expected, rel=1e-6)


def test_the_learning_rates_of_stpp_are_the_released_ones():
    """Twelve steps of the optimiser: [backbone, head] before each."""
    network = DeepLabV3Plus("tiny", 5, output_stride=8)
    preset = stpp.PRESETS["voc"]
    head, decay_all = preset["head_lr_mult"], preset["decay_norm"]
    groups = parameter_groups(network, preset["lr"], head, preset["weight_decay"], decay_all)
    optimizer = torch.optim.SGD(groups, lr=preset["lr"], momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(12).factor)
    assert all(group["weight_decay"] == 1e-4 for group in groups)
    for backbone, released_head in STPP["poly"]:
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([backbone, backbone, released_head, released_head], rel=1e-6)
        optimizer.step()
        scheduler.step()


def test_cps_decays_the_parameters_that_the_release_decays():
    network = DeepLabV3Plus("tiny", 5, output_stride=8)
    groups = parameter_groups(network, 1.0, 1.0, 4e-4, cps.PRESETS["voc"]["decay_norm"])
    decays = {id(p): group["weight_decay"] > 0 for group in groups for p in group["params"]}
    kinds = {nn.Conv2d: "conv", nn.BatchNorm2d: "norm"}
    checked = 0
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            assert decays[id(parameter)] == CPS["decay"][f"{kinds[type(module)]}.{name}"]
            checked += 1
    assert checked == len(decays)


@pytest.mark.parametrize("name", CPS["configurations"])
def test_the_presets_are_the_released_configurations_rescaled_to_one_process(name):
    theirs, data = CPS["configurations"][name], "voc" if name.startswith("voc") else "cityscapes"
    processes = theirs["GPUS"]
    # The release multiplies the rate by the number of processes on VOC alone, and divides the
    # gradient by it once more than an average would (difference 4 of cps.py).
    rate = theirs["lr"] * (processes if data == "voc" else 1)
    for script in (cps, mean_teacher, supervised):
        preset = script.PRESETS[data]
        assert preset["lr"] == pytest.approx(rate / processes)
        assert preset["weight_decay"] == pytest.approx(theirs["weight_decay"] * processes)
        assert preset["batch_size"] == theirs["batch_size"]
        assert preset["crop_size"] == theirs["image_height"]
        assert preset["epochs"]["1/8"] == theirs["nepochs"]
        assert augment.scale_rule(preset["scale"]).factors == tuple(theirs["train_scale_array"])


@pytest.mark.parametrize(("name", "data"), [("pascal", "voc"), ("cityscapes", "cityscapes")])
def test_the_presets_of_stpp_are_the_released_configurations(name, data):
    theirs, ours = STPP["configurations"][name], stpp.PRESETS[data]
    for setting in ("epochs", "crop_size", "batch_size"):
        assert ours[setting] == theirs[setting]
    assert [ours["lr"], ours["lr"] * ours["head_lr_mult"]] == pytest.approx(theirs["lr"])
    assert [ours["weight_decay"]] * 2 == theirs["weight_decay"]
    rule = augment.scale_rule(ours["scale"])
    assert [rule.low, rule.high] == theirs["long side"]


# --------------------------------------------------------------------------------------- evaluation


def test_miou_from_a_confusion_matrix_is_that_of_cps_and_stpp():
    truth, guess = label_maps()
    matrix = torch.zeros(7, 7, dtype=torch.int64)
    for target, prediction in zip(truth, guess):
        update(matrix, target, prediction)
    ours, theirs = scores(matrix), CPS["miou"]
    expected = [np.nan if value is None else value for value in theirs["iou"]]
    assert ours.iou.tolist() == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert ours.miou == pytest.approx(theirs["miou"], rel=1e-6)
    assert ours.miou == pytest.approx(STPP["miou"], rel=1e-6)
    assert ours.accuracy == pytest.approx(theirs["accuracy"], rel=1e-6)


def test_windows_lie_where_those_of_cps_lie():
    """Their places only: the release sums logits over them (difference 6 of cps.py)."""
    for name, (tops, lefts) in CPS["windows"].items():
        size, window = name.split()
        height, width = map(int, size.split("x"))
        assert starts(height, int(window)) == tops and starts(width, int(window)) == lefts


def test_the_reliability_of_stpp_is_twice_the_released_score_and_ranks_alike():
    """Difference 2 of stpp.py: the release divides the sum over two checkpoints by two."""
    maps, theirs = three_predictions(), STPP["reliability"]
    for index, expected in enumerate(zip(*theirs["miou"])):
        ours = image_miou(maps[index], maps[2], 21)
        assert ours.tolist() == pytest.approx(list(expected), rel=1e-6)
    ours = stpp.reliability(maps, 21)
    assert ours.tolist() == pytest.approx([sum(pair) for pair in theirs["miou"]], rel=1e-6)
    ranked = [str(index) for index in ours.argsort(descending=True).tolist()]
    assert ranked == theirs["reliable"] + theirs["rest"]


# --------------------------------------------------------------------------- laws of masks, colours


def mask_statistics(masks: np.ndarray) -> dict[str, np.ndarray]:
    """Of masks (N,64,64): area, and the share of each of 4x4 cells."""
    share = masks.mean((1, 2))
    cells = masks.reshape(-1, 4, 16, 4, 16).mean((2, 4))
    named = {f"cell {i}{j}": cells[:, i, j] for i in range(4) for j in range(4)}
    return {"area": share, "area squared": share**2, **named}


def draw_masks(draw) -> np.ndarray:
    cpu = torch.device("cpu")
    return torch.cat([draw(500, 64, 3, iteration, cpu) for iteration in range(10)]).numpy()


def test_the_boxes_of_cps_have_the_released_law():
    masks = draw_masks(cutmix.xor_box_masks)
    samples = mask_statistics(masks)
    samples["uncovered rows"] = (~masks.any(2)).mean(1)
    samples["edges"] = (masks[:, 1:] != masks[:, :-1]).mean((1, 2))
    assert_law(CPS["law of the masks"], samples)


def test_the_box_of_cutmix_seg_has_the_released_law():
    masks = draw_masks(cutmix.half_area_masks)
    height, width = masks.any(2).sum(1) / 64, masks.any(1).sum(1) / 64
    top, left = masks.any(2).argmax(1) / 64, masks.any(1).argmax(1) / 64
    samples = {
        **mask_statistics(masks),
        "height": height, "height squared": height**2, "width": width, "width squared": width**2,
        "log aspect squared": np.log(height / width) ** 2,
        "top": top, "top squared": top**2, "left": left,
    }  # fmt: skip
    assert_law(CUTMIX_SEG["law of the masks"], samples)


def colour_measures(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Of images (...,32,32,3): each answers to one of the changes more than to others."""
    luminance = pixels @ np.array([0.299, 0.587, 0.114])
    mean, deviation = luminance.mean((-2, -1)), luminance.std((-2, -1))
    return {
        "brightness": mean,
        "contrast": deviation / mean,
        "saturation": (pixels.max(-1) - pixels.min(-1)).mean((-2, -1)) / deviation,
        "sharpness": np.abs(np.diff(luminance, axis=-1)).mean((-2, -1)) / deviation,
    }


def colour_statistics(images: np.ndarray, source: np.ndarray) -> dict[str, np.ndarray]:
    """Of images (N,32,32,3) made from `source`; a spread is a squared distance to the source's."""
    images, source = images.astype(np.float64), source.astype(np.float64)
    chroma, chroma_0 = (pixels - pixels.mean(-1, keepdims=True) for pixels in (images, source))
    lengths = np.sqrt((chroma**2).sum((1, 2, 3)) * (chroma_0**2).sum())
    samples = {
        "unchanged": (images == source).all((1, 2, 3)),
        "grey": (images.max(3) == images.min(3)).all((1, 2)),
        "hue": (chroma * chroma_0).sum((1, 2, 3)) / np.maximum(lengths, 1),  # cosine of its turn
        "distance": np.abs(images - source).mean((1, 2, 3)),
    }
    original = colour_measures(source)
    for name, ours in colour_measures(images).items():
        samples |= {name: ours, f"{name} spread": (ours - original[name]) ** 2}
    return samples


@pytest.mark.parametrize(
    ("module", "change", "theirs"),
    [
        (augment, augment.colour_jitter_and_blur, STPP),
        (mean_teacher, mean_teacher.colour_jitter, CUTMIX_SEG),
    ],
    ids=["ST++, UniMatch", "CutMix-Seg"],
)
def test_the_colours_have_the_released_law(module, change, theirs):
    """For ST++ and UniMatch with another blur filter (difference 6 of either)."""
    torch.manual_seed(4)
    source = coloured_blocks()
    images = np.stack([change(torch.from_numpy(source)).numpy() for _ in range(1500)])
    assert_law(theirs["law of the colours"], colour_statistics(images, source))
    # The law says less about contrast and saturation than about the rest.
    (jitter,) = module.COLOURS.transforms[0].transforms
    for name, expected in theirs["ranges of the jitter"].items():
        assert list(getattr(jitter, name)) == pytest.approx(expected)


def cutout_samples(draws: int, side: int) -> dict[str, np.ndarray]:
    """Statistics of the boxes that `cutout` cuts out of a square image, shares of its side."""
    torch.manual_seed(5)
    target = torch.zeros(side, side, dtype=torch.uint8)
    pixels = target[..., None].expand(-1, -1, 3)
    cut = [stpp.cutout(pixels, target) for _ in range(draws)]
    inside = np.stack([label.numpy() == 255 for _, label in cut])
    happened = inside.any((1, 2))
    values = np.concatenate([image.numpy()[box] for (image, _), box in zip(cut[:500], inside)])
    rows, columns = inside[happened].any(2), inside[happened].any(1)
    height, width = rows.sum(1) / side, columns.sum(1) / side
    top, left = rows.argmax(1) / side, columns.argmax(1) / side
    area, aspect = height * width, np.log(height / width)
    return {
        "cut": happened, "area": area, "area squared": area**2, "height": height, "width": width,
        "log aspect": aspect, "log aspect squared": aspect**2,
        "top": top, "top squared": top**2, "left": left, "left squared": left**2,
        "area times top": area * top, "value": values.flatten(),
    }  # fmt: skip


def test_the_cutout_of_stpp_has_the_released_law():
    samples = cutout_samples(6000, 96)
    assert_law(STPP["law of Cutout"], samples)
    assert [samples["value"].min(), samples["value"].max()] == STPP["range of Cutout's values"]


def test_the_mean_area_of_a_cutout_follows_from_its_law():
    """A box of height h and width w fits at (1-h)(1-w) of the corners, which weighs its area."""
    area, aspect = np.meshgrid(np.linspace(0.02, 0.4, 801), np.linspace(0.3, 1 / 0.3, 801))
    height, width = np.sqrt(area * aspect), np.sqrt(area / aspect)
    fits = np.clip(1 - height, 0, None) * np.clip(1 - width, 0, None)
    expected = (area * fits).sum() / fits.sum()
    assert expected == pytest.approx(0.14, abs=0.005)
    mean, error = STPP["law of Cutout"]["area"]  # boxes of whole pixels are a little smaller
    assert -4 * error - 0.008 < mean - expected < 4 * error
