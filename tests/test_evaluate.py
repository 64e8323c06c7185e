"""IoU by hand, absent classes, ignored pixels, sliding windows."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import settings, write_picture
from PIL import Image

from common.evaluate import (
    evaluate,
    predict,
    probabilities,
    pseudo_accuracy,
    scores,
    starts,
    update,
)
from common.source import DataSource, Item


def confusion(target: list, prediction: list, classes: int) -> torch.Tensor:
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    labels = [torch.tensor(values, dtype=torch.uint8) for values in (target, prediction)]
    update(matrix, *labels)
    return matrix


def test_iou_by_hand():
    matrix = confusion([[0, 0], [1, 255]], [[0, 1], [1, 1]], 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    result = scores(matrix)
    assert result.iou[:2].tolist() == [0.5, 0.5]
    assert math.isnan(result.iou[2])  # in neither prediction nor target: left out of the mean
    assert result.miou == 0.5
    assert result.accuracy == 2 / 3


def test_a_class_that_is_only_predicted_counts_as_zero():
    assert scores(confusion([[0, 0]], [[0, 2]], 3)).miou == (0.5 + 0) / 2


def test_the_rarest_classes_are_those_with_the_fewest_pixels_in_the_targets():
    matrix = torch.diag(torch.tensor([9, 3, 5, 0]))
    matrix[1, 0] = 1  # class 1: 4 pixels, of which 3 are right; IoU 3/4
    matrix[0, 2] = 1  # class 2: 5 pixels; IoU 5/6
    result = scores(matrix)
    assert result.miou_of_rarest(2) == pytest.approx(3 / 4)  # class 3 occurs nowhere
    assert result.miou_of_rarest(3) == pytest.approx((3 / 4 + 5 / 6) / 2)
    assert math.isnan(result.miou_of_rarest(1))


def test_a_rare_class_that_is_often_predicted_is_rare():
    result = scores(torch.tensor([[2, 0], [6, 4]]))  # predicted are 8 and 4 pixels
    assert result.miou_of_rarest(1) == pytest.approx(2 / 8)


def test_label_254_does_not_wrap_around():
    matrix = confusion([[253, 0]], [[253, 253]], 254)
    assert matrix[253, 253] == 1 and matrix[0, 253] == 1 and matrix.sum() == 2


def test_windows_cover_everything_with_overlap():
    for length in (5, 9, 10, 11, 64, 100, 1024, 2048):
        for window in (9, 64, 769):
            edges = starts(length, window)
            covered = {pixel for left in edges for pixel in range(left, min(left + window, length))}
            assert covered == set(range(length))
            assert all(right - left <= math.ceil(window * 2 / 3) for left, right in pairwise(edges))
            assert edges[-1] == max(0, length - window)


class Pointwise(torch.nn.Module):
    """Logits that depend on nothing but the pixel: windows and whole images must then agree."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images[:, :1], -images[:, :1], images[:, 1:2]], dim=1)


def test_sliding_window_agrees_with_the_whole_image_for_a_pointwise_network():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 40, 56)
    whole = probabilities(Pointwise(), images)
    summed = probabilities(Pointwise(), images, window=24)
    torch.testing.assert_close(summed / summed.sum(1, keepdim=True), whole)
    assert torch.equal(predict(Pointwise(), images, 24), whole.argmax(1))
    assert torch.equal(predict(Pointwise(), images).long(), whole.argmax(1))


def test_overlapping_windows_add_up():
    """The sum over classes is how many windows lie on a pixel; of the last one alone it is 1."""
    summed = probabilities(Pointwise(), torch.randn(1, 3, 40, 56), window=24).sum(1)[0]
    windows = torch.zeros(40, 56)
    for top in (0, 16):
        for left in (0, 16, 32):
            windows[top : top + 24, left : left + 24] += 1
    torch.testing.assert_close(summed, windows)


class Coarse(torch.nn.Module):
    """Logits at a quarter of the resolution."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 4 * images[:, :, ::4, ::4]


def test_whole_images_and_their_probabilities_are_interpolated_alike():
    """Labels come from a kernel, and with windows, scales or an average from the softmax maps."""
    images = torch.randn(2, 3, 29, 41, generator=torch.Generator().manual_seed(0))
    probs = probabilities(Coarse(), images)
    best = probs.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(predict(Coarse(), images)[clear].long(), probs.argmax(1)[clear])
    torch.testing.assert_close(probs[..., ::4, ::4], Coarse()(images).softmax(1))


class Constant(torch.nn.Module):
    """The same probabilities everywhere."""

    def __init__(self, probs: list[float]):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probs).log().view(1, -1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(images), -1, 4, 4)


@pytest.fixture
def ones(tmp_path: Path) -> DataSource:
    """Two classes; an image of which every pixel is of class 1."""
    write_picture(tmp_path / "image.png", (16, 16))
    Image.new("L", (16, 16), 1).save(tmp_path / "mask.png")
    item = Item("image", tmp_path / "image.png", tmp_path / "mask.png")
    colours = ((0, 0, 0), (255, 255, 255))
    return DataSource("ones", ("zero", "one"), colours, (), (), (item,), "one image", (item,))


def test_average_is_of_probabilities_and_modes_come_back(ones: DataSource):
    first, second = Constant([0.55, 0.45]).train(), Constant([0.2, 0.8]).eval()
    networks, args = {"a": first, "b": second}, settings(eval_window=0)
    results = evaluate(networks, ones.val, ones, args, average=True)
    assert [results[name].accuracy for name in ("a", "b", "average")] == [0.0, 1.0, 1.0]
    assert first.training and not second.training
    results = evaluate(networks, ones.val, ones, args)
    assert [scores.accuracy for scores in results.values()] == [0.0, 1.0]


class Narrow(Constant):
    """Sure of class 1 in images of at most 8 pixels a side, of class 0 in larger ones."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images)
        return logits if max(images.shape[2:]) <= 8 else logits.flip(1)


@pytest.mark.parametrize("average", [False, True])
def test_an_evaluation_slides_the_window_that_is_asked_for(ones: DataSource, average: bool):
    network = Narrow([0.2, 0.8])
    for window, accuracy in ((0, 0.0), (8, 1.0), (12, 0.0)):
        args = settings(eval_window=window)
        found = evaluate({"a": network}, ones.val, ones, args, average)
        assert {scores.accuracy for scores in found.values()} == {accuracy}


def test_pseudo_accuracy_is_measured_where_true_masks_are_at_hand(ones: DataSource):
    network, args = Constant([0.2, 0.8]), settings(eval_window=0)
    assert pseudo_accuracy(network, ones, args) == {"pseudo_accuracy": 1.0}
    assert pseudo_accuracy(network, replace(ones, audit=()), args) == {}
