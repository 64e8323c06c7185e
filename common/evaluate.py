"""mIoU from one confusion matrix over the whole validation set.

The matrix is kept on the device and summed over processes at the end.
"""

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from common.augment import IGNORE, normalise
from common.data import eval_loader
from common.deeplabv3plus import full_softmax
from common.runtime import check_signal
from common.source import DataSource, Item
from kernels import pseudo_label


@dataclass(frozen=True)
class Scores:
    """Results of one network.

    Attributes:
        confusion_matrix: (C,C) int64, rows target, columns prediction.
        iou: (C,) float64 fractions; NaN for a class absent from both prediction and target.
        miou: mean of `iou` over the classes that occur.
        accuracy: share of the counted pixels that are right.
    """

    confusion_matrix: Tensor
    iou: Tensor
    miou: float
    accuracy: float

    def miou_of_rarest(self, count: int) -> float:
        """Mean IoU of the `count` classes with the fewest pixels in the targets.

        Classes that occur in neither prediction nor target do not count; NaN if none does.
        """
        pixels = self.confusion_matrix.sum(1)
        rarest = pixels.argsort(stable=True)[:count]
        return self.iou[rarest].nanmean().item()


def update(confusion_matrix: Tensor, target: Tensor, prediction: Tensor) -> None:
    """Count pairs of target and prediction into a confusion matrix, in place.

    Args:
        confusion_matrix: (C,C) int64, rows target, columns prediction.
        target: labels of any shape; pixels where they are 255 do not count.
        prediction: labels of the same shape.
    """
    classes = confusion_matrix.shape[0]
    cells = classes * classes
    pairs = target.long() * classes + prediction
    pairs = torch.where(target == IGNORE, cells, pairs)  # one cell more, which is left out
    counts = torch.bincount(pairs.flatten(), minlength=cells + 1)[:-1]
    confusion_matrix += counts.view(classes, classes)


def scores(confusion_matrix: Tensor) -> Scores:
    """IoU of each class, its mean, and pixel accuracy, of a confusion matrix (C,C).

        IoU_c = TP / (TP + FP + FN),    accuracy = Σ_c TP / all pixels
    """
    matrix = confusion_matrix.cpu().double()
    right = matrix.diag()
    union = matrix.sum(0) + matrix.sum(1) - right
    iou = torch.where(union > 0, right / union, torch.nan)
    accuracy = right.sum() / matrix.sum().clamp_min(1)
    return Scores(confusion_matrix.cpu(), iou, iou.nanmean().item(), accuracy.item())


def image_miou(label_1: Tensor, label_2: Tensor, num_classes: int) -> Tensor:
    """Mean IoU between two label maps for each image, over the classes that occur in either.

    Args:
        label_1: (N,H,W) labels below `num_classes`; pixels where it is 255 do not count.
        label_2: (N,H,W) labels below `num_classes`.
        num_classes: C.

    Returns:
        (N,) float64 in [0,1].
    """
    count, cells = len(label_1), num_classes * num_classes
    number = torch.arange(count, device=label_1.device)[:, None, None]  # of the image
    pairs = number * cells + label_1.long() * num_classes + label_2
    pairs = torch.where(label_1 == IGNORE, count * cells, pairs)  # one cell more, left out
    counts = torch.bincount(pairs.flatten(), minlength=count * cells + 1)[:-1]
    matrix = counts.view(count, num_classes, num_classes).double()

    right = matrix.diagonal(dim1=1, dim2=2)
    union = matrix.sum(1) + matrix.sum(2) - right
    return torch.where(union > 0, right / union, torch.nan).nanmean(1)


def starts(length: int, window: int) -> list[int]:
    """Left edges of windows that cover `length`, the last one flush with the end.

    The stride is 2/3 of the window, rounded up. Source: the released CPS.
    """
    if length <= window:
        return [0]
    stride = math.ceil(window * 2 / 3)
    return [*range(0, length - window, stride), length - window]


def probabilities(network: nn.Module, images: Tensor, window: int = 0) -> Tensor:
    """Softmax maps of images, from whole images or summed over overlapping windows.

    A sum of softmaxes has the same argmax as their average. The released CPS adds logits instead.

    Args:
        network: gives logits at any resolution.
        images: (N,3,H,W).
        window: side of the windows in pixels, 0 for whole images.

    Returns:
        (N,C,H,W) float32.
    """
    height, width = images.shape[2:]
    if not window or (height <= window and width <= window):
        return full_softmax(network(images), (height, width))
    total = None
    for top in starts(height, window):
        for left in starts(width, window):
            rows, columns = slice(top, top + window), slice(left, left + window)
            part = probabilities(network, images[:, :, rows, columns])
            if total is None:
                total = part.new_zeros(*part.shape[:2], height, width)
            total[:, :, rows, columns] += part
    return total


def averaged_probabilities(
    network: nn.Module, images: Tensor, window: int, scales: Sequence[float]
) -> Tensor:
    """The mean of the softmax maps over scales, each with its mirror image: (N,C,H,W) float32.

    Args:
        network: gives logits at any resolution.
        images: (N,3,H,W).
        window: as in `probabilities`.
        scales: factors of the images' size; 1 is the image itself.
    """
    height, width = images.shape[2:]
    total = 0
    for scale in scales:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        scaled = F.interpolate(images, size, mode="bilinear", antialias=scale < 1)
        for mirrored in (False, True):
            probs = probabilities(network, scaled.flip(3) if mirrored else scaled, window)
            probs = probs.flip(3) if mirrored else probs
            probs = probs / probs.sum(1, keepdim=True)  # overlapping windows have added up
            total = total + F.interpolate(probs, (height, width), mode="bilinear")
    return total / (2 * len(scales))


def predict(network: nn.Module, images: Tensor, window: int = 0) -> Tensor:
    """Labels (N,H,W) of images (N,3,H,W), from whole images or sliding windows."""
    if window and (images.shape[2] > window or images.shape[3] > window):
        return probabilities(network, images, window).argmax(1)
    return pseudo_label(network(images), images.shape[2:]).label


@contextmanager
def evaluating(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Networks in eval mode, and put back into the mode they had.

    cuDNN does not search for its fastest algorithm meanwhile: it would for each size of image.
    """
    modes = [(network, network.training) for network in networks]
    tuned = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        for network, _ in modes:
            network.eval()
        yield
    finally:
        torch.backends.cudnn.benchmark = tuned
        for network, training in modes:
            network.train(training)


def device_of(network: nn.Module) -> torch.device:
    """Where a network's parameters are."""
    return next(network.parameters()).device


@torch.no_grad()
def evaluate(
    networks: dict[str, nn.Module],
    items: Sequence[Item],
    data: DataSource,
    args: argparse.Namespace,
    average: bool = False,
) -> dict[str, Scores]:
    """Score networks over images with masks.

    Args:
        networks: name -> network, on one device.
        items: the images, such as `data.val`; every process takes its share.
        data: the data set.
        args: `eval_window` in pixels, 0 for whole images; and what the loader reads.
        average: also score the mean of their probabilities, as "average".

    Returns:
        name -> Scores, the same on every process.

    Raises:
        Stopped: a signal arrived; the checkpoint before the evaluation is the one to resume from.
    """
    device = device_of(next(iter(networks.values())))
    names = [*networks, "average"] if average else [*networks]
    shape = len(names), data.num_classes, data.num_classes
    matrices = torch.zeros(shape, dtype=torch.int64, device=device)
    with evaluating(networks.values()):
        for batch in eval_loader(data, items, args):
            check_signal()
            images, target = normalise(batch["image"].to(device)), batch["target"].to(device)
            predictions = predict_all(networks.values(), images, args.eval_window, average)
            for matrix, prediction in zip(matrices, predictions):
                update(matrix, target, prediction)
    matrices = distributed.add_up(matrices)
    return {name: scores(matrix) for name, matrix in zip(names, matrices)}


def predict_all(
    networks: Iterable[nn.Module], images: Tensor, window: int, average: bool
) -> list[Tensor]:
    """Labels (N,H,W) by each network, and with `average` by the mean of their probabilities."""
    if not average:
        return [predict(network, images, window) for network in networks]
    maps = [probabilities(network, images, window) for network in networks]
    return [probs.argmax(1) for probs in (*maps, sum(maps))]


def pseudo_accuracy(
    network: nn.Module, data: DataSource, args: argparse.Namespace
) -> dict[str, float]:
    """How many of a network's labels of unlabelled images are right.

    This is measured on the images whose true masks are at hand, `data.audit`; nothing is trained on
    these masks.

    Returns:
        {"pseudo_accuracy": share of right pixels in [0,1]}, or {} where no true masks are at hand.
    """
    if not data.audit:
        return {}
    result = evaluate({"network": network}, data.audit, data, args)["network"]
    return {"pseudo_accuracy": result.accuracy}
