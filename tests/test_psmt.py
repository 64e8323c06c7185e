"""PS-MT: what the teachers say, which of them changes, the perturbation, the losses, the boxes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import settings
from torch import nn

import psmt
from common import InputError, adversarial, datasets
from common.adversarial import direction
from common.augment import normalise
from common.data import train_loader
from common.deeplabv3plus import DeepLabV3Plus, MeanLogits
from common.predict import load_network

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------ the perturbation


class Decoder(nn.Module):
    """Two convolutions with a BatchNorm, frozen, of a chosen type."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
        )
        self.layers.to(dtype).eval().requires_grad_(False)

    def forward(self, features):
        return 3 * self.layers(features)


def exact_direction(decoder: nn.Module, at: torch.Tensor, xi: float, d: torch.Tensor):
    """g / ‖g‖ for each image, in float64."""
    exact = copy.deepcopy(decoder).double()
    at, d = at.double(), d.double().requires_grad_()
    target = exact(at).softmax(1)
    moved = exact(at + xi * d).log_softmax(1)
    gradient = torch.autograd.grad(F.kl_div(moved, target, reduction="sum"), d)[0]
    return gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def compared(xi: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Length of r, and its cosine with the exact direction, for four images."""
    decoder = Decoder(0)
    at = 3 * torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    r = direction(decoder, at, xi, epsilon=2.0)
    torch.manual_seed(2)
    d = adversarial.unit_length(torch.rand_like(at) - 0.5)
    exact = exact_direction(decoder, at, xi, d)
    cosine = F.cosine_similarity(r.double().flatten(1), exact.flatten(1))
    return r.flatten(1).norm(dim=1), cosine


def test_the_direction_is_that_of_float64():
    length, cosine = compared(0.1)
    torch.testing.assert_close(length, torch.full((4,), 2.0))
    assert cosine.min() > 0.99


def test_the_released_step_is_lost_in_float32():
    """ξ = 1e-6: what comes out is rounding. The exact direction exists all the same."""
    _, cosine = compared(1e-6)
    assert cosine.abs().max() < 0.5


def test_the_direction_moves_predictions_more_than_a_random_one():
    decoder = Decoder(0)
    at = torch.randn(8, 6, 8, 8, generator=torch.Generator().manual_seed(1))
    target = decoder(at).softmax(1)

    def divergence(r: torch.Tensor) -> float:
        return F.kl_div(decoder(at + r).log_softmax(1), target, reduction="sum").item()

    torch.manual_seed(0)
    random = 2 * adversarial.unit_length(torch.randn_like(at))
    assert divergence(direction(decoder, at, 0.1, 2.0)) > 5 * divergence(random)


def test_the_direction_leaves_no_trace():
    decoder = Decoder(0)
    before = copy.deepcopy(decoder.state_dict())
    at = torch.randn(2, 6, 8, 8, requires_grad=True)
    r = direction(decoder, at, 0.1, 2.0)
    assert not r.requires_grad and at.grad is None
    assert all(part.grad is None for part in decoder.parameters())
    assert all(torch.equal(value, before[key]) for key, value in decoder.state_dict().items())


def test_a_gradient_that_overflows_gives_no_step_and_leaves_the_other_images_alone():
    vectors = torch.ones(4, 2, 3)
    vectors[1, 0, 0], vectors[2, 0, 0], vectors[3] = math.inf, math.nan, 0
    found = adversarial.unit_length(vectors)
    torch.testing.assert_close(found[0], torch.full((2, 3), 6**-0.5))
    assert (found[1:] == 0).all()


def test_nothing_to_move_gives_no_step():
    constant = nn.Conv2d(6, 4, 1).requires_grad_(False)
    nn.init.zeros_(constant.weight)
    r = direction(constant, torch.randn(2, 6, 4, 4), 0.1, 2.0)
    assert (r == 0).all()


def test_batchnorm_is_frozen_while_the_direction_is_sought():
    teachers = [psmt.Network("tiny", 5, output_stride=8).train() for _ in range(2)]
    for teacher in teachers:
        teacher.requires_grad_(False)
    before = copy.deepcopy([teacher.state_dict() for teacher in teachers])
    features = torch.randn(2, 80, 8, 8)
    r = psmt.teachers_direction(teachers, 0.1)(features)
    torch.testing.assert_close(r.flatten(1).norm(dim=1), torch.full((2,), 2.0))
    for teacher, state in zip(teachers, before):
        assert teacher.decoder.training
        assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())


# ------------------------------------------------------------------------------------ the teachers


def test_of_the_other_teacher_the_highest_logits_count():
    active = torch.zeros(1, 4, 1, 1)
    other = torch.tensor([4.0, 1.0, 3.0, 2.0]).view(1, 4, 1, 1)
    found = psmt.strict_mean(active, other, kept=2).flatten().tolist()
    assert found == [2.0, 0.0, 1.5, 0.0]
    assert psmt.strict_mean(active, other).flatten().tolist() == [2.0, 0.5, 1.5, 1.0]


def test_the_ramp_is_a_cosine():
    assert psmt.cosine_ramp(0, 12) == 0 and psmt.cosine_ramp(12, 12) == 1
    assert psmt.cosine_ramp(6, 12) == pytest.approx(0.5)
    assert psmt.cosine_ramp(3, 12) == pytest.approx(0.5 - math.sqrt(0.5) / 2)
    assert psmt.cosine_ramp(0, 0) == 1 and psmt.cosine_ramp(99, 12) == 1


def test_boxes_have_one_size_a_batch_and_lie_in_the_image():
    sides, orders = [], []
    for iteration in range(300):
        boxes, order = psmt.beta_boxes(4, 64, 0, iteration)
        assert boxes.min() >= 0 and boxes.max() <= 64 and boxes.shape == (4, 1, 4)
        assert sorted(order.tolist()) == [0, 1, 2, 3]
        heights = (boxes[..., 2] - boxes[..., 0]).flatten()
        sides.append(heights.max().item())
        orders.append(tuple(order.tolist()))
    # λ ~ Beta(4,4) has mean ½; of clipped boxes the largest is seldom clipped
    assert 0.55 * 64 < sum(sides) / len(sides) < 0.75 * 64
    assert len(set(orders)) == 24


def test_the_loss_by_hand():
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    label = torch.tensor([[[0, 2], [1, 1]]], dtype=torch.uint8)
    confidence = torch.tensor([[[0.7, 0.9], [0.5, 0.8]]])
    valid = torch.tensor([[[True, True], [True, False]]])
    loss, share = psmt.confidence_weighted(logits, label, confidence, valid, 0.6)
    ce = F.cross_entropy(logits, label.long(), reduction="none")[0]
    expected = (0.7 * ce[0, 0] + 0.9 * ce[0, 1]) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert share.item() == pytest.approx(2 / 3)
    loss, _ = psmt.confidence_weighted(logits, label, confidence, valid, 0.6, weighted=False)
    assert loss.item() == pytest.approx(((ce[0, 0] + ce[0, 1]) / 2).item(), rel=1e-5)
    nothing, share = psmt.confidence_weighted(logits, label, confidence, valid, 0.95)
    nothing.backward()
    assert nothing.item() == 0 and share.item() == 0 and logits.grad.abs().max() == 0


# ------------------------------------------------------------------------------------ an iteration


def one_step(*flags: str, active: int = 0):
    """The losses of an iteration after the warm-up, with gradients; networks and batches."""
    args = psmt.parse_args(["--crop-size", "32", "-b", "4", "--device", "cpu", *flags])
    data = datasets.load(settings())
    torch.manual_seed(0)
    student = psmt.Network("tiny", 12, output_stride=8, dropout=0.0).train()
    teachers = [psmt.Network("tiny", 12, output_stride=8, dropout=0.0).train() for _ in range(2)]
    for teacher in teachers:
        teacher.requires_grad_(False)
    batch_l, batch_u = (
        next(iter(train_loader(data, items, stream, args, 0, 1, psmt.strong_view)))
        for stream, items in enumerate((data.labelled, data.unlabelled))
    )
    args.conf_thresh = 0.0  # fresh networks are sure of nothing
    measured = psmt.train_step(
        student, teachers[: args.teachers], active, batch_l, batch_u, 0.3, 5, args
    )
    measured["loss"].backward()
    return student, teachers, measured, args


def test_the_student_learns_and_the_teachers_do_not():
    student, teachers, measured, _ = one_step()
    grads = [part.grad for part in student.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert all(part.grad is None for teacher in teachers for part in teacher.parameters())
    assert measured["loss_sup"].item() == pytest.approx(math.log(12), abs=0.5)
    assert measured["confident"].item() == 1 and 0 <= measured["agreement"].item() <= 1
    total = measured["loss_sup"] + 0.3 * measured["loss_unsup"]  # w(t) of `one_step`
    torch.testing.assert_close(measured["loss"], total)


def test_the_active_teacher_decides_what_is_not_among_the_highest():
    first, second = (one_step(active=active)[2]["loss_unsup"].item() for active in (0, 1))
    assert first != second


class Encoder(nn.Module):
    """A teacher whose label is the brightness of a pixel of stride 4, and its confidence, too."""

    def forward(self, images):
        bright = images[:, 0, ::4, ::4]
        return torch.stack([torch.zeros_like(bright), bright, -9 + 0 * bright], 1)


def test_labels_confidence_and_padding_are_mixed_as_the_images():
    """Half of the images are dark, and the teacher's labels tell which."""
    flags = "--crop-size 32 -b 4 --device cpu --strong-aug none"
    args = psmt.parse_args(flags.split())
    pixels = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)
    pixels[4:] = 255
    valid = torch.ones(8, 32, 32, dtype=torch.bool)
    valid[:4, 28:] = False
    batch = {"image": pixels, "image_strong": pixels, "valid_mask": valid}
    for iteration in range(8):
        images, label, confidence, valid_m, _ = psmt.label_and_mix(
            [Encoder(), Encoder()], 0, batch, iteration, args
        )
        bright = images[:, 0] > 1
        assert (label[bright] == 1).float().mean() > 0.95
        dark = ~bright & valid_m
        assert (label[dark] == 0).float().mean() > 0.95
        assert not valid_m[:4][images[:4, 0] == 0].any()  # padding of dark images
        assert confidence[bright].mean() > confidence[dark].mean()


def test_teachers_label_without_dropout():
    network = psmt.Network("tiny", 5, output_stride=8, dropout=0.5)
    psmt.without_dropout(network.eval())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(images), network(images))  # nothing is drawn
    assert network.decoder.training and not network.aspp.project[1].training


def test_a_warm_up_must_leave_something(begin, monkeypatch):
    with pytest.raises(InputError, match="nothing of 8 iterations is left after a warm-up of 16"):
        trained_run(begin, monkeypatch, "--warmup-epochs", "2")


def test_flags_change_what_they_name():
    losses = {}
    changes = "--no-vat", "--no-conf-weight", "--strong-aug none", "--teachers 1"
    for flags in ((), *(tuple(change.split()) for change in changes)):
        losses[flags] = one_step(*flags)[2]
    usual = losses[()]
    for flags, measured in losses.items():
        assert (measured["loss_unsup"].item() != usual["loss_unsup"].item()) == bool(flags)
    assert losses[("--no-conf-weight",)]["loss_sup"].item() == usual["loss_sup"].item()
    # The weights κ of fresh networks are near 1/12.
    assert losses[("--no-conf-weight",)]["loss_unsup"] > 3 * usual["loss_unsup"]
    assert losses[("--teachers", "1")]["agreement"].item() == 1


@pytest.mark.parametrize(
    ("which", "labelled", "unlabelled"),
    [
        ("both", True, True),
        ("labelled", True, False),
        ("unlabelled", False, True),
        ("none", False, False),
    ],
)
def test_the_student_sees_strong_views_of_what_the_flag_names(
    which: str, labelled: bool, unlabelled: bool
):
    strong = one_step("--strong-aug", "both")[2]
    weak = one_step("--strong-aug", "none")[2]
    measured = one_step("--strong-aug", which)[2]
    assert strong["loss_sup"] != weak["loss_sup"] and strong["loss_unsup"] != weak["loss_unsup"]
    assert measured["loss_sup"] == (strong if labelled else weak)["loss_sup"]
    assert measured["loss_unsup"] == (strong if unlabelled else weak)["loss_unsup"]


def trained_run(begin, monkeypatch, *flags: str):
    """A short run of `main`; which teachers changed in each iteration, and the run."""
    run = begin(psmt, "--warmup-epochs", "0.25", "--max-iters", "8", *flags)
    run.schedule.per_epoch = 2
    changed, networks = [], {}

    def parts():
        mean = run.networks["teachers"]
        return [member.classifier.weight.detach().clone() for member in mean.members]

    def log(measured):
        now = parts()
        before = networks.get("before", now)
        changed.append([not torch.equal(old, new) for old, new in zip(before, now)])
        networks["before"] = now
        original(measured)

    original = run.log
    monkeypatch.setattr(psmt, "Run", lambda args: run)
    monkeypatch.setattr(psmt, "validate", lambda *_: ({}, {}))
    monkeypatch.setattr(run, "finish", lambda *_: None)
    monkeypatch.setattr(run, "log", log)
    monkeypatch.setattr(run, "evaluates", lambda: False)
    torch.manual_seed(0)
    psmt.main(run.args)
    return changed, run


def test_teachers_take_turns_after_the_warm_up(begin, monkeypatch):
    """32 labelled images in batches of 4: a quarter of an epoch is two iterations."""
    changed, run = trained_run(begin, monkeypatch)
    assert changed[1] == [True, True]  # both learn
    turns = [[True, False]] * 2 + [[False, True]] * 2 + [[True, False]] * 2
    assert changed[2:] == turns
    for member in run.networks["teachers"].members:
        assert not any(part.requires_grad for part in member.parameters())


def test_the_released_step_vanishes_in_a_trained_network(begin, monkeypatch):
    """ξ = 1e-6 on features of a network that has learnt for a while: length and direction.

    The release divides the gradient by its length + 1e-8, which is far above the length.
    """
    _, run = trained_run(begin, monkeypatch, "--max-iters", "60", "--warmup-epochs", "5")
    student = run.networks["student"].eval()
    teachers = [copy.deepcopy(net).eval() for net in run.networks["teachers"].members]
    exact = [copy.deepcopy(net).double() for net in teachers]
    batch = next(iter(train_loader(run.data, run.data.unlabelled, 1, run.args, 0, 1)))
    with torch.no_grad():
        low, _, high = student.backbone(normalise(batch["image"], batch["valid_mask"]))
        features = student.fuse(low, high)
    torch.manual_seed(0)
    d = adversarial.unit_length(torch.rand_like(features) - 0.5)

    def gradient(networks: list, at: torch.Tensor, xi: float) -> torch.Tensor:
        step = d.to(at.dtype).requires_grad_()
        target = (sum(net.decode(at) for net in networks) / 2).softmax(1)
        moved = sum(net.decode(at + xi * step) for net in networks) / 2
        divergence = F.kl_div(moved.log_softmax(1), target, reduction="sum")
        return torch.autograd.grad(divergence, step)[0].double().flatten(1)

    found = {}
    for xi in (1e-6, 0.1):
        g, true = gradient(teachers, features, xi), gradient(exact, features.double(), xi)
        length = g.norm(dim=1)
        released = 2 * length / (length + 1e-8)
        found[xi] = F.cosine_similarity(g, true).abs(), released
    assert found[1e-6][0].max() < 0.1 and found[1e-6][1].max() < 0.02
    assert found[0.1][0].min() > 0.99 and found[0.1][1].min() > 1.9


def test_the_average_includes_batchnorm():
    student, teacher = (psmt.Network("tiny", 3, output_stride=8) for _ in range(2))
    for value in student.buffers():
        if value.is_floating_point():
            value.fill_(4.0)
    psmt.ema_update(teacher, student, 0.75)
    means = [value for name, value in teacher.named_buffers() if "running_mean" in name]
    assert means and all(torch.allclose(value, torch.ones_like(value)) for value in means)


def test_the_result_is_the_mean_of_the_logits_and_can_be_predicted_with(begin, monkeypatch):
    _, run = trained_run(begin, monkeypatch)
    run.save()
    mean = run.networks["teachers"].eval()
    loaded, _ = load_network(run.book.folder, "last", None, CPU)
    assert isinstance(loaded, MeanLogits) and isinstance(loaded.members[0], DeepLabV3Plus)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = (mean.members[0](images) + mean.members[1](images)) / 2
        torch.testing.assert_close(loaded(images), expected)
