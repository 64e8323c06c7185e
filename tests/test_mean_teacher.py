"""Mean Teacher and CutMix-Seg: the losses by hand, who learns, and the average against torch's."""

import copy
import math

import pytest
import torch
from conftest import settings

import mean_teacher
from common import datasets
from common.augment import normalise
from common.cutmix import class_masks
from common.data import train_loader
from common.deeplabv3plus import DeepLabV3Plus

CPU = torch.device("cpu")
ITERATION = 5  # of `one_step`


class Network(torch.nn.Module):
    """A convolution and a BatchNorm; remembers what it saw and how."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm = torch.nn.Conv2d(3, 12, 1), torch.nn.BatchNorm2d(12)
        self.seen: list[tuple[torch.Tensor, bool]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append((images, self.training))
        return self.norm(self.conv(images[:, :, ::4, ::4]))


def one_step(*flags: str):
    """The losses of a student and a teacher that differ, at iteration 5.

    Returns:
        The networks with the student's gradients, the networks before, the measures, the labelled
        batch, the unlabelled ones, and the settings.
    """
    args = mean_teacher.parse_args(["--crop-size", "32", "-b", "4", *flags])
    data = datasets.load(settings())
    strong = mean_teacher.student_view if args.colour_jitter else None
    sources = [(data.labelled, 0, strong if args.classmix == "labelled" else None)]
    sources += [(data.unlabelled, 1, strong), (data.unlabelled, 2, strong)]
    mixes = args.cutmix or args.classmix
    batch_l, *batches_u = (
        next(iter(train_loader(data, items, stream, args, ITERATION, ITERATION + 1, further)))
        for items, stream, further in sources[: 3 if mixes and args.classmix != "labelled" else 2]
    )
    networks = {
        "teacher": Network(2).requires_grad_(False).train(not mixes),
        "student": Network(1),
    }
    before = copy.deepcopy(networks)
    both = networks["student"], networks["teacher"]
    torch.manual_seed(3)
    if mixes:
        inputs = (*both, batch_l, batches_u, args.unsup_weight, ITERATION, args)
        step = mean_teacher.classmix_step if args.classmix else mean_teacher.cutmix_step
        measured = step(*inputs)
    else:
        inputs = (*both, batch_l, *batches_u, args.unsup_weight, args)
        measured = mean_teacher.noise_step(*inputs)
    measured["loss"].backward()
    return networks, before, measured, batch_l, batches_u, args


def probabilities(network: Network, images: torch.Tensor) -> torch.Tensor:
    """Its softmax at the images' size."""
    logits = torch.nn.functional.interpolate(
        network(images), (32, 32), mode="bilinear", align_corners=True
    )
    return logits.softmax(1)


def logits_of(first: float, second: float) -> torch.Tensor:
    """(1,2,1,2) logits of two pixels whose class 0 has these probabilities."""
    probs = torch.tensor([[[[first, second]], [[1 - first, 1 - second]]]])
    return probs.log()


def test_squared_distance_and_confidence_by_hand():
    student, teacher = logits_of(0.5, 0.9).requires_grad_(), logits_of(0.98, 0.1)
    both = torch.tensor([[[True, True]]])
    distance, confident = mean_teacher.squared_distance(student, teacher, both, 0.97)
    assert distance.item() == pytest.approx((2 * 0.48**2 + 2 * 0.8**2) / 2)
    assert confident.item() == 0.5

    one = torch.tensor([[[True, False]]])
    distance, confident = mean_teacher.squared_distance(student, teacher, one, 0.97)
    assert distance.item() == pytest.approx(2 * 0.48**2)
    assert confident.item() == 1

    # The second pixel reads the teacher's other image.
    mixed = {"mask": torch.tensor([[[False, True]]]), "second": logits_of(0.3, 0.99)}
    distance, confident = mean_teacher.squared_distance(student, teacher, both, 0.97, **mixed)
    assert distance.item() == pytest.approx((2 * 0.48**2 + 2 * 0.09**2) / 2)
    assert confident.item() == 1

    nothing, confident = mean_teacher.squared_distance(student, teacher, both & False, 0.97)
    nothing.backward()
    assert nothing.item() == 0 and confident.item() == 0 and student.grad.abs().max() == 0


def test_the_average_is_that_of_torch():
    student = Network(1)
    teacher = copy.deepcopy(student)
    averaged = torch.optim.swa_utils.AveragedModel(
        student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    averaged.update_parameters(student)  # the first call copies
    for step in range(4):
        generator = torch.Generator()
        with torch.no_grad():
            for parameter in student.parameters():
                generator.manual_seed(step)
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        student(torch.randn(2, 3, 8, 8))
        mean_teacher.ema_update(teacher, student, 0.9, buffers=True)
        averaged.update_parameters(student)
    for ours, theirs in zip(teacher.parameters(), averaged.module.parameters()):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(teacher.norm.running_mean, averaged.module.norm.running_mean)
    assert teacher.norm.num_batches_tracked == student.norm.num_batches_tracked


@pytest.mark.parametrize("buffers", [True, False])
def test_the_average_by_hand(buffers: bool):
    student, teacher = Network(1), Network(2)
    student(torch.randn(2, 3, 8, 8))
    before = copy.deepcopy(teacher)
    mean_teacher.ema_update(teacher, student, 0.75, buffers)
    torch.testing.assert_close(
        teacher.conv.weight, 0.75 * before.conv.weight + 0.25 * student.conv.weight
    )
    mean = 0.25 * student.norm.running_mean if buffers else torch.zeros(12)
    torch.testing.assert_close(teacher.norm.running_mean, mean)


@pytest.mark.parametrize(
    "flags", [("--noise-std", "0"), ("--cutmix",), ("--classmix",), ("--classmix", "labelled")]
)
def test_a_step_gives_the_student_a_gradient_and_the_teacher_none(flags):
    networks, _, measured, *_ = one_step(*flags)
    assert all(p.grad.abs().max() > 0 for p in networks["student"].conv.parameters())
    assert all(parameter.grad is None for parameter in networks["teacher"].parameters())
    assert all(math.isfinite(value.item()) for value in measured.values())


@pytest.mark.parametrize("flags", [("--noise-std", "0"), ("--cutmix",), ("--classmix",)])
def test_the_student_learns_and_the_teacher_follows(flags, begin, train, monkeypatch):
    """After each iteration the teacher is the average of its old self and the stepped student."""
    calls, modes = [], set()

    def note(teacher, student, decay: float, buffers: bool) -> None:
        old = copy.deepcopy(teacher.state_dict())
        ema_update(teacher, student, decay, buffers)
        modes.add(teacher.training)
        calls.append((old, *copy.deepcopy([student.state_dict(), teacher.state_dict()]), decay))

    ema_update = mean_teacher.ema_update
    monkeypatch.setattr(mean_teacher, "ema_update", note)
    run = begin(mean_teacher, "--max-iters", "3", "--ema-decay", "0.6", *flags)
    start = DeepLabV3Plus.from_settings(run.args, run.data.num_classes).state_dict()
    kept = train(mean_teacher, run)

    mixes = mean_teacher.kind(run.args) != "noise"
    assert modes == {not mixes}
    assert [decay for *_, decay in calls] == [0, 1 / 2, 0.6]  # min(1 - 1/(t+1), 0.6)
    name, statistics = "classifier.weight", "backbone.stem.0.1.running_mean"
    assert torch.equal(calls[0][0][name], start[name])  # the teacher starts as the student does
    assert torch.equal(calls[0][2][name], calls[0][1][name])  # the first average is the student
    previous = start
    for old, student, teacher, decay in calls:
        assert not torch.equal(student[name], previous[name])  # the optimiser's step comes first
        torch.testing.assert_close(teacher[name], decay * old[name] + (1 - decay) * student[name])
        mean = decay * old[statistics] + (1 - decay) * student[statistics]
        if not mixes:  # the teacher keeps statistics of its own
            mean = old[statistics]
        torch.testing.assert_close(teacher[statistics], mean)
        previous = student
    assert torch.equal(kept["teacher"][name], calls[-1][2][name])
    assert torch.equal(kept["student"][name], calls[-1][1][name])


def test_a_mean_teacher_step_is_the_definition():
    flags = ("--noise-std", "0", "--unsup-weight", "7")
    networks, before, measured, batch_l, (batch_u,), _ = one_step(*flags)
    assert [training for _, training in networks["teacher"].seen] == [True, True]
    images = [normalise(batch["image"], batch["valid_mask"]) for batch in (batch_l, batch_u)]
    valid = torch.cat([batch_l["valid_mask"], batch_u["valid_mask"]])
    maps = {
        name: torch.cat([probabilities(network, x) for x in images])
        for name, network in before.items()
    }
    squares = (maps["student"] - maps["teacher"]).square()
    squares = squares.permute(0, 2, 3, 1)[valid]  # (pixels, classes)
    torch.testing.assert_close(measured["loss_unsup"], squares.mean())
    torch.testing.assert_close(measured["loss"], measured["loss_sup"] + 7 * squares.mean())


def test_the_weight_is_ramped_up_as_in_the_release():
    """exp(-5 (1 - t)²) at t = 0, 1/2, 1 and later; without a ramp-up 1 from the start."""
    factors = [mean_teacher.ramp_up(done, total=100, share=0.4) for done in (0, 20, 40, 90)]
    assert factors == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])
    assert mean_teacher.ramp_up(0, total=100, share=0) == 1


def test_published_weights_are_the_presets():
    """But for two that were chosen on the built-in set."""
    for data, ramp_up, of_cutmix in (("shapes", 0.4, 5), ("voc", 0, 1)):
        args = mean_teacher.parse_args(["--data", data, "--device", "cpu"])
        assert (args.unsup_weight, args.ramp_up) == (100, ramp_up)
        for flag, weight, threshold in (("--cutmix", of_cutmix, 0.97), ("--classmix", 1, 0.968)):
            args = mean_teacher.parse_args([flag, "--data", data, "--device", "cpu"])
            assert (args.unsup_weight, args.ramp_up, args.conf_thresh) == (weight, 0, threshold)


def test_a_run_ramps_its_weight_up(begin, train, monkeypatch):
    weights = []
    step = mean_teacher.noise_step
    monkeypatch.setattr(
        mean_teacher, "noise_step", lambda *given: weights.append(given[-2]) or step(*given)
    )
    run = begin(mean_teacher, "--max-iters", "4", "--unsup-weight", "7", "--ramp-up", "0.5")
    train(mean_teacher, run)
    assert weights == pytest.approx([7 * math.exp(-5), 7 * math.exp(-1.25), 7, 7])


def test_a_cutmix_step_is_the_definition():
    flags = ("--cutmix", "--conf-thresh", "0.12", "--unsup-weight", "5")
    networks, before, measured, _, (u0, u1), args = one_step(*flags)
    assert measured["loss"] == measured["loss_sup"] + 5 * measured["loss_unsup"]
    mask = mean_teacher.half_area_masks(4, 32, args.seed, ITERATION, CPU)
    images = [normalise(batch["image"], batch["valid_mask"]) for batch in (u0, u1)]
    mixed = torch.where(mask[:, None], images[1], images[0])
    torch.testing.assert_close(networks["student"].seen[1][0], mixed)
    assert [training for _, training in networks["teacher"].seen] == [False, False]

    outside, inside = (probabilities(before["teacher"], x) for x in images)
    targets = torch.where(mask[:, None], inside, outside)
    valid = torch.where(mask, u1["valid_mask"], u0["valid_mask"])
    squares = (probabilities(before["student"], mixed) - targets).square().sum(1)[valid].mean()
    share = (targets.amax(1) >= 0.12)[valid].double().mean()
    assert 0 < share < 1
    assert measured["loss_unsup"].item() == pytest.approx((squares * share).item(), rel=1e-5)
    assert measured["confident"].item() == pytest.approx(share.item())


def test_noise_differs_between_student_and_teacher():
    networks, _, _, batch_l, *_ = one_step("--noise-std", "0.5")
    clean = normalise(batch_l["image"], batch_l["valid_mask"])
    seen = [networks[name].seen[0][0] - clean for name in ("student", "teacher")]
    assert all(noise.std().item() == pytest.approx(0.5, rel=0.05) for noise in seen)
    assert abs((seen[0] * seen[1]).mean().item()) < 0.02


def test_colour_jitter_reaches_the_student_alone():
    networks, _, _, _, (u0, u1), args = one_step("--cutmix", "--colour-jitter")
    assert not torch.equal(u0["image"], u0["image_strong"])
    clean = [normalise(batch["image"], batch["valid_mask"]) for batch in (u0, u1)]
    shown = [images for images, _ in networks["teacher"].seen]
    assert all(any(torch.equal(x, images) for images in shown) for x in clean)
    mask = mean_teacher.half_area_masks(4, 32, args.seed, ITERATION, CPU)
    u0, u1 = (normalise(batch["image_strong"], batch["valid_mask"]) for batch in (u0, u1))
    torch.testing.assert_close(networks["student"].seen[1][0], torch.where(mask[:, None], u1, u0))


def label_and_confidence(network: Network, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """argmax and maximum of its softmax; 255 on padding."""
    probs = probabilities(network, normalise(batch["image"], batch["valid_mask"]))
    confidence, label = probs.max(1)
    return label.masked_fill(~batch["valid_mask"], 255), confidence


def test_a_classmix_step_is_the_definition():
    flags = ("--classmix", "--conf-thresh", "0.12", "--unsup-weight", "5")
    networks, before, measured, _, (u0, u1), args = one_step(*flags)
    assert measured["loss"] == measured["loss_sup"] + 5 * measured["loss_unsup"]
    (label_0, sure_0), (label_1, sure_1) = (
        label_and_confidence(before["teacher"], batch) for batch in (u0, u1)
    )
    mask = class_masks(label_1.to(torch.uint8), 12, args.seed, ITERATION)
    assert mask.any() and not mask[~u1["valid_mask"]].any()
    images = [normalise(batch["image"], batch["valid_mask"]) for batch in (u0, u1)]
    mixed = torch.where(mask[:, None], images[1], images[0])
    torch.testing.assert_close(networks["student"].seen[1][0], mixed)
    assert [training for _, training in networks["teacher"].seen] == [False, False]

    target = torch.where(mask, label_1, label_0)
    valid = target != 255
    sure = torch.where(mask, sure_1, sure_0)[valid] >= 0.12
    log_probs = probabilities(before["student"], mixed).log().permute(0, 2, 3, 1)[valid]
    ce = torch.nn.functional.nll_loss(log_probs, target[valid])
    assert 0 < sure.double().mean() < 1
    torch.testing.assert_close(measured["confident"], sure.float().mean())
    torch.testing.assert_close(measured["loss_unsup"], sure.float().mean() * ce)
    torch.testing.assert_close(measured["pasted"], mask[valid].float().mean())


def test_pasted_true_labels_weigh_one_and_the_rest_the_share_of_confident_pixels():
    flags = ("--classmix", "labelled", "--conf-thresh", "0.12")
    networks, before, measured, batch_l, (u0,), args = one_step(*flags)
    label_0, sure_0 = label_and_confidence(before["teacher"], u0)
    mask = class_masks(batch_l["target"], 12, args.seed, ITERATION, round_up=True)
    assert len(networks["teacher"].seen) == 1  # true labels need no teacher
    assert not mask[batch_l["target"] == 255].any()

    share = (sure_0[u0["valid_mask"]] >= 0.12).float().mean()
    target = torch.where(mask, batch_l["target"].long(), label_0)
    valid = target != 255
    inside, outside = (normalise(batch["image"], batch["valid_mask"]) for batch in (batch_l, u0))
    mixed = torch.where(mask[:, None], inside, outside)
    log_probs = probabilities(before["student"], mixed).log().permute(0, 2, 3, 1)[valid]
    ce = torch.nn.functional.nll_loss(log_probs, target[valid], reduction="none")
    weight = torch.where(mask[valid], 1.0, share)
    assert 0 < share < 1
    torch.testing.assert_close(measured["confident"], share)
    torch.testing.assert_close(measured["loss_unsup"], (weight * ce).mean())


@pytest.mark.parametrize("flags", [("--cutmix", "--classmix"), ("--colour-jitter",)])
def test_flags_that_do_not_go_together_are_refused(flags):
    with pytest.raises(SystemExit):
        mean_teacher.parse_args([*flags, "--device", "cpu"])
