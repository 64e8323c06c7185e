"""mIoU from one confusion matrix over the whole validation set, kept on the device and summed over processes."""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.augment import IGNORE, normalise
from common.data import eval_loader
from common.datasets import DataSource
from common.deeplabv3plus import full_softmax
from common.runtime import Runtime
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


def update(confusion_matrix: Tensor, target: Tensor, prediction: Tensor) -> None:
    """Count (target, prediction) pairs into `confusion_matrix` (C,C), in place; pixels whose target is 255 do not count."""
    classes = confusion_matrix.shape[0]
    pairs = torch.where(target == IGNORE, classes * classes, target.long() * classes + prediction)
    confusion_matrix += torch.bincount(pairs.flatten(), minlength=classes * classes + 1)[:-1].view(classes, classes)


def scores(confusion_matrix: Tensor) -> Scores:
    """IoU = TP / (TP + FP + FN) a class, its mean, and pixel accuracy."""
    matrix = confusion_matrix.cpu().double()
    right = matrix.diag()
    union = matrix.sum(0) + matrix.sum(1) - right
    iou = torch.where(union > 0, right / union, torch.nan)
    return Scores(confusion_matrix.cpu(), iou, iou.nanmean().item(), (right.sum() / matrix.sum().clamp_min(1)).item())


def image_miou(label_1: Tensor, label_2: Tensor, num_classes: int) -> Tensor:
    """Mean IoU between two label maps for each picture, over the classes that occur in either.

    Args:
        label_1, label_2: (N,H,W) labels below `num_classes`; pixels where the first is 255 do not count.
        num_classes: C.

    Returns:
        (N,) float64 in [0,1].
    """
    count, cells = len(label_1), num_classes * num_classes
    picture = torch.arange(count, device=label_1.device)[:, None, None]
    pairs = picture * cells + label_1.long() * num_classes + label_2
    pairs = torch.where(label_1 == IGNORE, count * cells, pairs)
    matrix = torch.bincount(pairs.flatten(), minlength=count * cells + 1)[:-1].view(count, num_classes, num_classes).double()
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
    """Softmax maps (N,C,H,W) float32 of images (N,3,H,W); with a `window` in pixels, summed over overlapping windows.

    A sum of softmaxes has the same argmax as their average. The released CPS adds logits instead.
    """
    height, width = images.shape[2:]
    if not window or (height <= window and width <= window):
        return full_softmax(network(images), (height, width))
    total = None
    for top in starts(height, window):
        for left in starts(width, window):
            part = probabilities(network, images[:, :, top : top + window, left : left + window])
            if total is None:
                total = part.new_zeros(*part.shape[:2], height, width)
            total[:, :, top : top + window, left : left + window] += part
    return total


def predict(network: nn.Module, images: Tensor, window: int = 0, impl: str = "auto") -> Tensor:
    """Labels (N,H,W) of images (N,3,H,W), from whole pictures or sliding windows."""
    if window and (images.shape[2] > window or images.shape[3] > window):
        return probabilities(network, images, window).argmax(1)
    return pseudo_label(network(images), images.shape[2:], impl=impl).label


@torch.no_grad()
def evaluate(
    networks: dict[str, nn.Module],
    loader: Iterable[dict],
    num_classes: int,
    rt: Runtime,
    window: int = 0,
    average: bool = False,
    impl: str = "auto",
) -> dict[str, Scores]:
    """Score each network, and with `average` the mean of their probabilities, over all pictures of `loader`.

    Args:
        networks: name -> network; evaluated in eval mode and put back into the mode they had.
        loader: batches with `image` (N,H,W,3) uint8 and `target` (N,H,W); this process's share.
        num_classes: C.
        rt: the process; matrices are summed over all.
        window: side of the sliding window in pixels, 0 for whole pictures.
        average: add an entry "average".
        impl: passed to the kernels.

    Returns:
        name -> Scores, the same on every process.

    Raises:
        Stopped: a signal arrived; the checkpoint before the evaluation is the one to resume from.
    """
    modes = {name: network.training for name, network in networks.items()}
    names = [*networks, *(["average"] if average else [])]
    matrices = torch.zeros(len(names), num_classes, num_classes, dtype=torch.int64, device=rt.device)
    for network in networks.values():
        network.eval()
    tuned, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # pictures of many sizes
    try:
        for batch in loader:
            rt.check_signal()
            batch = rt.to_device(batch)
            images = normalise(batch["image"])
            with rt.autocast():
                if average:
                    maps = [probabilities(network, images, window) for network in networks.values()]
                    predictions = [part.argmax(1) for part in (*maps, sum(maps))]
                else:
                    predictions = [predict(network, images, window, impl) for network in networks.values()]
            for matrix, prediction in zip(matrices, predictions):
                update(matrix, batch["target"], prediction)
    finally:
        torch.backends.cudnn.benchmark = tuned
        for name, network in networks.items():
            network.train(modes[name])
    matrices = rt.add_up(matrices)
    return {name: scores(matrix) for name, matrix in zip(names, matrices)}


def validate(
    networks: dict[str, nn.Module],
    data: DataSource,
    args: argparse.Namespace,
    rt: Runtime,
    *,
    average: bool = False,
    audit: bool = False,
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Score networks on the validation pictures as the settings say.

    Args:
        networks: name -> network, the method's result first.
        data: the data set.
        args: `eval_window`, `kernels`, and what the loader reads.
        rt: the process.
        average: see `evaluate`.
        audit: where masks of unlabelled pictures are at hand to measure with, measure the first network's labels of these.

    Returns:
        name -> Scores, and {"pseudo_accuracy": share of right pixels} or {}.
    """

    def on(items, shown, average):
        loader = eval_loader(data, items, args, rt)
        return evaluate(shown, loader, data.num_classes, rt, args.eval_window, average, args.kernels)

    results = on(data.val, networks, average)
    if not audit or not data.audit:
        return results, {}
    first = next(iter(networks))
    return results, {"pseudo_accuracy": on(data.audit, {first: networks[first]}, False)[first].accuracy}
