"""UniMatch and FixMatch: the loss by hand, dropped features, views, boxes, and partners."""

import functools

import pytest
import torch
from conftest import settings

import unimatch
from common import datasets
from common.augment import IGNORE, normalise
from common.cutmix import small_box_masks
from common.data import train_loader

CPU = torch.device("cpu")


def parse(*flags: str):
    return unimatch.parse_args(["--device", "cpu", "--crop-size", "32", "-b", "4", *flags])


def network(*flags: str) -> unimatch.Network:
    torch.manual_seed(0)
    return unimatch.Network.from_settings(parse("--dropout", "0", *flags), 12)


def batches(args, iteration: int = 0) -> list[dict]:
    """A labelled batch, an unlabelled one and its partner, as `main` loads them."""
    data = datasets.load(settings())
    strong = functools.partial(unimatch.add_strong_views, views=args.views)
    order = 1 if args.partner_as_released else 2
    sources = [(data.labelled, 0, None, None), (data.unlabelled, 1, strong, None)]
    sources.append((data.unlabelled, 2, strong, order))
    return [
        next(iter(train_loader(data, items, stream, args, iteration, iteration + 1, views, order)))
        for items, stream, views, order in sources
    ]


# ----------------------------------------------------------------------------------------- the loss


def test_unsure_pixels_count_in_the_mean_only_and_padded_ones_nowhere():
    """Four pixels: sure, unsure, exactly at the threshold, padded."""
    sure, unsure, even = [3.0, 0.0], [0.2, 0.0], [1.0, 0.0]
    logits = torch.tensor([[sure, unsure], [even, sure]]).permute(2, 0, 1)[None]  # (1,2,2,2)
    valid = torch.tensor([[[True, True], [True, False]]])
    threshold = torch.tensor(even).softmax(0)[0].item()
    labels, kept = unimatch.confident_labels(logits, valid, threshold)
    assert labels.tolist() == [[[0, IGNORE], [0, IGNORE]]] and kept == 2
    every, kept = unimatch.confident_labels(logits, valid, 0)
    assert every.tolist() == [[[0, 0], [0, IGNORE]]] and kept == 3

    student = torch.tensor([[[0.0, 5.0], [2.0, 7.0]], [[0.0, 0.0], [1.0, 0.0]]])[None]
    loss = unimatch.consistency_loss(student.requires_grad_(), labels, valid)
    expected = -(student[0, :, 0, 0].log_softmax(0)[0] + student[0, :, 1, 0].log_softmax(0)[0]) / 3
    torch.testing.assert_close(loss, expected)
    nothing = unimatch.consistency_loss(student, torch.full_like(labels, IGNORE), valid)
    assert nothing == 0


@pytest.mark.parametrize(
    ("flags", "views", "weights"),
    [
        ((), 2, (1 / 2, 1 / 4, 1 / 4)),
        (("--fixmatch",), 1, (1 / 2, 1 / 2, 0)),
        (("--no-fp",), 2, (1 / 2, 1 / 2, 0)),
        (("--no-second-view",), 1, (1 / 2, 1 / 4, 1 / 4)),
        (("--complementary",), 2, (1 / 2, 1 / 2, 0)),
    ],
)
def test_the_weights_of_the_losses(flags, views, weights, monkeypatch):
    args, options = parse("--conf-thresh", "0.09", *flags), []
    net = network().train()
    forward = net.forward
    monkeypatch.setattr(
        net, "forward", lambda *given, **named: options.append(named) or forward(*given, **named)
    )
    measured = unimatch.train_step(net, *batches(args), 0, args)
    assert args.views == views
    assert options[0] == {} and options[1] == ({"dropout": 0.5} if weights[2] else {})
    assert options[2] == {"complementary": args.complementary}
    assert ("loss_feature" in measured) == (weights[2] > 0)
    losses = [measured["loss_sup"], measured["loss_strong"], measured.get("loss_feature", 0)]
    total = sum(weight * loss for weight, loss in zip(weights, losses))
    torch.testing.assert_close(measured["loss"], total)
    assert measured["loss_strong"] > 0


def test_the_first_losses_are_those_of_flat_probabilities():
    """A fresh classifier knows nothing: ln C each, once every pixel counts."""
    args = parse("--conf-thresh", "0", "--weights", "none")
    fresh = network("--weights", "none").train()
    fresh.classifier.weight.data.mul_(1e-3)
    fresh.classifier.bias.data.zero_()
    measured = unimatch.train_step(fresh, *batches(args), 0, args)
    for name in ("loss_sup", "loss_strong", "loss_feature"):
        assert measured[name].item() == pytest.approx(torch.tensor(12.0).log().item(), abs=0.05)
    assert measured["confident"] == 1


def test_labels_teach_the_views_and_the_views_not_the_labels():
    """No gradient reaches the weak view through the labels that it gives."""
    seen = []

    class Recording(unimatch.Network):
        def forward(self, images, *given, **options):
            images = images.requires_grad_()
            seen.append(images)
            return super().forward(images, *given, **options)

    args = parse("--conf-thresh", "0.09", "--fixmatch")
    torch.manual_seed(0)
    net = Recording.from_settings(parse("--dropout", "0"), 12).train()
    # Statistics of their own, or BatchNorm would tie the images of a batch to each other.
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True: None
    measured = unimatch.train_step(net, *batches(args), 0, args)
    measured["loss"].backward()
    partner, both, strong = seen
    assert partner.grad is None  # labelled without gradient
    assert both.grad[:4].abs().max() > 0 and strong.grad.abs().max() > 0
    assert both.grad[4:].abs().max() == 0


# ------------------------------------------------------------------------------ perturbed features


def test_without_dropping_both_logits_are_alike_and_with_it_the_clean_ones_stay(monkeypatch):
    net, images = network().eval(), torch.randn(2, 3, 32, 32)
    plain = net(images)
    clean, same = net(images, dropout=0.0)
    torch.testing.assert_close(clean, plain)
    torch.testing.assert_close(same, plain)

    widths = []

    def drop(features: torch.Tensor, rate: float, *others) -> torch.Tensor:
        if rate:  # that of the head is 0
            widths.append((features.shape[1], rate))
        return dropout2d(features, rate, *others)

    dropout2d = torch.nn.functional.dropout2d
    monkeypatch.setattr(unimatch.F, "dropout2d", drop)
    clean, dropped = net(images, dropout=0.5)
    torch.testing.assert_close(clean, plain)
    assert (dropped - plain).abs().max() > 0.1 * plain.abs().max()
    assert widths == [(24, 0.5), (96, 0.5)]  # both kinds of features of `tiny`


def test_complementary_masks_add_up_and_leave_half_of_the_images_whole():
    torch.manual_seed(0)
    few, many = unimatch.complementary_masks(6, (300, 500), torch.zeros(1))
    assert few.shape == (12, 300, 1, 1) and many.shape == (12, 500, 1, 1)
    whole = []
    for masks in (few, many):
        first, second = masks[:6, :, 0, 0], masks[6:, :, 0, 0]
        assert (first + second == 2).all()
        whole.append((first == 1).all(1))
        dropped = first[~whole[-1]]
        assert set(dropped.unique().tolist()) == {0, 2}
        error = 0.5 / dropped.numel() ** 0.5
        assert abs((dropped == 0).double().mean().item() - 0.5) < 4 * error
    assert whole[0].sum() == 3 and torch.equal(*whole)


# ------------------------------------------------------------------------------ views and partners


def test_the_views_differ_and_the_weak_one_is_untouched():
    args = parse()
    _, batch, _ = batches(args)
    weak = batches(parse("--fixmatch"))[1]
    assert torch.equal(batch["image"], weak["image"])  # whatever views follow
    assert "image_strong_2" not in weak
    views = [batch[name] for name in ("image", "image_strong_1", "image_strong_2")]
    for index, one in enumerate(views):
        for other in views[:index]:
            assert not torch.equal(one, other)


def test_the_partner_is_another_image_and_as_released_the_same_in_another_window():
    _, batch, partner = batches(parse())
    assert batch["name"] != partner["name"]
    _, batch, partner = batches(parse("--partner-as-released"))
    assert batch["name"] == partner["name"]
    assert not torch.equal(batch["image"], partner["image"])


def test_images_and_labels_are_mixed_by_the_same_boxes(monkeypatch):
    """The network sees s_k' inside M_k; the targets there are the partner's labels."""
    args = parse("--conf-thresh", "0.09")
    made, seen, learnt, labelled = [], [], [], []

    def boxes(*given) -> torch.Tensor:
        made.append(small_box_masks(*given))
        made[-1][:, 3:9, 4:20] = True  # at least there
        return made[-1]

    def note(images, *given, **options):
        seen.append(images)
        return forward(images, *given, **options)

    def loss(logits, target, valid_mask):
        learnt.append((target, valid_mask))
        return consistency_loss(logits, target, valid_mask)

    def label(*given) -> tuple:
        labelled.append(confident_labels(*given))
        return labelled[-1]

    net = network().train()
    forward, consistency_loss = net.forward, unimatch.consistency_loss
    confident_labels = unimatch.confident_labels
    monkeypatch.setattr(unimatch, "confident_labels", label)
    monkeypatch.setattr(net, "forward", note)
    monkeypatch.setattr(unimatch, "small_box_masks", boxes)
    monkeypatch.setattr(unimatch, "consistency_loss", loss)
    _, batch, partner = given = batches(args)
    unimatch.train_step(net, *given, 0, args)

    assert len(made) == 2 and not torch.equal(*made)
    for view, mask, shown, (target, valid) in zip((1, 2), made, seen[2].chunk(2), learnt):
        inside, outside = (
            normalise(part[f"image_strong_{view}"], part["valid_mask"]) for part in (partner, batch)
        )
        assert torch.equal(shown, torch.where(mask[:, None], inside, outside))
        expected = torch.where(mask, partner["valid_mask"], batch["valid_mask"])
        assert torch.equal(valid, expected)
        assert (target[~valid] == IGNORE).all()
    (pseudo_partner, _), (pseudo, _) = labelled
    assert not torch.equal(pseudo, pseudo_partner)
    for mask, (target, _) in zip(made, learnt):
        assert torch.equal(target[mask], pseudo_partner[mask])
        assert torch.equal(target[~mask], pseudo[~mask])
    assert torch.equal(learnt[2][0], pseudo)  # of L_fp, unmixed


def test_the_partner_is_labelled_in_eval_mode_and_the_network_left_in_train_mode(monkeypatch):
    args = parse()
    net, modes = network().train(), []
    forward = net.forward
    monkeypatch.setattr(
        net,
        "forward",
        lambda *given, **options: modes.append(net.training) or forward(*given, **options),
    )
    unimatch.train_step(net, *batches(args), 0, args)
    assert modes == [False, True, True] and net.training


def test_a_run_learns_and_is_named_after_its_method(begin, train):
    run = begin(unimatch, "--max-iters", "2")
    start = unimatch.Network.from_settings(run.args, 12).state_dict()
    kept = train(unimatch, run)["model"]
    assert not torch.equal(kept["classifier.weight"], start["classifier.weight"])
    assert parse().output_dir == "runs/unimatch-shapes-1-8-seed0"
    assert parse("--fixmatch").output_dir == "runs/unimatch-fixmatch-shapes-1-8-seed0"
    assert parse("--no-fp", "--partner-as-released").method == "unimatch-nofp-samepartner"


@pytest.mark.parametrize(
    ("flags", "threshold"),
    [
        ((), 0.7),
        (("--fixmatch",), 0.95),
        (("--no-second-view",), 0.7),
        (("--fixmatch", "--conf-thresh", "0.5"), 0.5),
        (("--data", "voc"), 0.95),
    ],
)
def test_the_threshold_is_that_of_data_set_and_method(flags, threshold: float):
    assert parse(*flags).conf_thresh == threshold


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--conf-thresh", "1.5"), "--conf-thresh lies in [0,1]"),
        (("--feature-dropout", "1"), "--feature-dropout in [0,1)"),
        (("--complementary", "--no-second-view"), "--complementary needs both strong views"),
        (("--fixmatch", "--no-fp"), "--fixmatch goes without"),
        (("--no-fp", "--no-second-view"), "is --fixmatch"),
    ],
)
def test_what_cannot_work_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse(*flags)
    assert message in capsys.readouterr().err
