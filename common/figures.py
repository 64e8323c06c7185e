"""The figures of a run: curves, predictions, ST++'s reliability, U2PL's pixels; and those of `common.compare`."""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import checkpoint
from common.augment import normalise
from common.data import EvalSet
from common.datasets import DataSource
from common.evaluate import predict
from common.runtime import Runtime
from kernels import pseudo_label

LONGEST = 512  # pixels of an image's longest side in a figure
NOT_CURVES = {"iteration", "epoch", "lr", "seconds", "peak_memory_mb"}


def pyplot():
    """matplotlib without a screen; imported only where a figure is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def curves(rows: list[dict], path: Path) -> None:
    """Losses, mIoU in percent, and the method's other measures over the iterations, from the rows of metrics.csv."""
    plt = pyplot()
    names = [name for name in (rows[0] if rows else {}) if name not in NOT_CURVES and any(row[name] for row in rows)]
    losses = [name for name in names if name.startswith("loss")]
    others = [name for name in names if name not in losses and "miou" not in name]
    panels = [
        ("training loss", losses, 1),
        ("validation mIoU, %", [name for name in names if "miou" in name], 100),
        ("shares, %", others, 100),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.4), squeeze=False, layout="constrained")
    for axis, (title, shown, factor) in zip(axes[0], panels):
        for name in shown:
            points = [(int(row["iteration"]), factor * float(row[name])) for row in rows if row[name]]
            axis.plot(*zip(*points), label=name, marker="o" if len(points) < 30 else None, markersize=3)
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def colourise(labels: np.ndarray, colours: tuple) -> np.ndarray:
    """(H,W) labels as (H,W,3) uint8 colours; 255 (ignored) is white."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(colours)] = colours
    return table[labels]


def some_pictures(data: DataSource, count: int) -> list[dict]:
    """`count` samples, or all, spread evenly over the validation pictures."""
    items = data.val[:: max(1, len(data.val) // count)][:count]
    part = EvalSet(data, items)
    return [part[index] for index in range(len(items))]


def shrink(pixels: np.ndarray, longest: int = LONGEST) -> np.ndarray:
    """Every n-th row and column of an image or a map, (H,W,...): no side longer than `longest`.

    A cell of a figure is some 200 dots wide; of a large image matplotlib would make floats of many
    times its size.
    """
    step = -(-max(pixels.shape[:2]) // longest)
    return pixels[::step, ::step]


@torch.no_grad()
def predictions(
    network: nn.Module, data: DataSource, args: argparse.Namespace, rt: Runtime, path: Path, count: int = 6
) -> None:
    """A row of `count` validation pictures each: input, target, prediction."""
    plt = pyplot()
    samples = some_pictures(data, count)
    rows = [[], [], []]
    was_training = network.training
    network.eval()
    for sample in samples:
        labels = predict(network, normalise(sample["image"][None].to(rt.device)), args.eval_window, args.kernels)[0]
        image, target, labels = (
            shrink(part.cpu().numpy()) for part in (sample["image"], sample["target"], labels)
        )
        shown = image, colourise(target, data.colours), colourise(labels, data.colours)
        for row, picture in zip(rows, shown):
            row.append(picture)
    network.train(was_training)
    figure, axes = plt.subplots(3, len(samples), figsize=(2.2 * len(samples), 5.6), squeeze=False, layout="constrained")
    for line, title, row in zip(axes, ("input", "target", "prediction"), rows):
        for axis, picture in zip(line, row):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title)
    legend(figure, data)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def legend(figure, data: DataSource) -> None:
    """The classes' colours, below a figure."""
    patches = [pyplot().Rectangle((0, 0), 1, 1, color=np.array(colour) / 255) for colour in data.colours]
    figure.legend(patches, data.classes, loc="outside lower center", ncols=min(len(data.classes), 7), fontsize=8)


def bars(labels: list[str], values: list[list[float]], path: Path) -> None:
    """Means of the mIoU in percent as bars, with the standard deviation and every seed's value as a dot."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(1.6 + 0.9 * len(labels), 3.8), layout="constrained")
    for place, seeds in enumerate(values):
        spread = np.std(seeds, ddof=1) if len(seeds) > 1 else 0.0
        axis.bar(place, np.mean(seeds), yerr=spread, capsize=4, color="tab:blue", alpha=0.7)
        axis.scatter([place] * len(seeds), seeds, s=10, color="black", zorder=3)
    lowest, highest = min(map(min, values)), max(map(max, values))
    axis.set_ylim(max(0.0, lowest - 2 * (highest - lowest) - 1), highest + 0.3 * (highest - lowest) + 1)
    axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
    axis.set_ylabel("mIoU, % (axis cut)")
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def measure_curves(runs: dict[str, list[Path]], measure: str, path: Path) -> None:
    """A column of metrics.csv over the iterations, in percent: the mean over the files of each label."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for label, files in runs.items():
        points: dict[int, list[float]] = {}
        for file in files:
            with open(file, newline="") as text:
                for row in csv.DictReader(text):
                    if row[measure]:
                        points.setdefault(int(row["iteration"]), []).append(100 * float(row[measure]))
        axis.plot(*zip(*((iteration, np.mean(points[iteration])) for iteration in sorted(points))), label=label, marker=".")
    axis.set(xlabel="iteration", ylabel=f"{measure}, %")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


@torch.no_grad()
def side_by_side(runs: dict[str, Path], path: Path, count: int = 5) -> None:
    """A page of `count` validation pictures: input, target, and the prediction of the last checkpoint of each run."""
    from common import datasets
    from common.predict import load_network

    plt = pyplot()
    settings = argparse.Namespace(**checkpoint.read_description(next(iter(runs.values())))["args"])
    # The runs' device, or the CPU where they come from a machine with a GPU and this one has none.
    device = torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")
    impl = "torch" if settings.kernels == "torch" else "auto"
    networks = {label: load_network(folder, "last", None, device) for label, folder in runs.items()}
    data = datasets.load(settings)
    samples = some_pictures(data, count)
    figure, axes = plt.subplots(
        len(samples), 2 + len(runs), figsize=(1.7 * (2 + len(runs)), 1.8 * len(samples)), squeeze=False, layout="constrained"
    )
    for line, sample in zip(axes, samples):
        target = colourise(shrink(sample["target"].numpy()), data.colours)
        shown = {"input": shrink(sample["image"].numpy()), "target": target}
        for label, (network, _) in networks.items():
            labels = predict(network, normalise(sample["image"][None].to(device)), settings.eval_window, impl)[0]
            shown[label] = colourise(shrink(labels.cpu().numpy()), data.colours)
        for axis, (label, picture) in zip(line, shown.items()):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if line[0] is axes[0, 0]:
                axis.set_title(label, fontsize=8)
    legend(figure, data)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def reliability_figure(points: list[tuple[float, float, bool]], path: Path) -> None:
    """How good the predictions on reliable and other pictures are.

    Args:
        points: (reliability score, mIoU of the last checkpoint's prediction, whether reliable) of each picture.
        path: of the PNG.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for chosen, label in ((True, "reliable"), (False, "unreliable")):
        part = [(score, 100 * miou) for score, miou, reliable in points if reliable == chosen]
        if part:
            mean = sum(miou for _, miou in part) / len(part)
            axis.scatter(*zip(*part), s=10, label=f"{label}: {len(part)}, mean {mean:.1f}")
    axis.set(xlabel="reliability score", ylabel="mIoU of the picture's prediction, %")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


@torch.no_grad()
def reliable_pixels_figure(
    teacher: nn.Module, fill: torch.Tensor | None, sure: float, data: DataSource, args: argparse.Namespace, rt: Runtime
) -> None:
    """U2PL's view of four validation pictures, to RUN/figures/reliable_pixels.png.

    Rows: input, prediction, entropy, and the pixels that are reliable (green) and unreliable (red) at α_0. Below, for each
    class, how full its memory bank is, and the share of the pixels predicted as it that qualify as anchors.

    Args:
        teacher: in eval mode.
        fill: (C,) shares of the banks; None without them.
        sure: probability that an anchor must exceed.
        data: the data set.
        args: `alpha0` in percent, `kernels`, `output_dir`.
        rt: the process.
    """
    plt = pyplot()
    samples = some_pictures(data, 4)
    found = []
    for sample in samples:
        with rt.autocast():
            logits = teacher.eval()(normalise(sample["image"][None].to(rt.device)))
        size = sample["image"].shape[:2]
        result = pseudo_label(logits, size, with_confidence=True, with_entropy=True, impl=args.kernels)
        found.append([part[0].cpu().numpy() for part in result])
    low, high = np.percentile(np.concatenate([entropy.ravel() for *_, entropy in found]), [args.alpha0, 100 - args.alpha0])
    predicted = np.zeros(len(data.classes))
    anchors = predicted.copy()
    figure = plt.figure(figsize=(2.2 * len(samples), 9.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4, 1.2))
    axes = upper.subplots(4, len(samples), squeeze=False)
    for column, sample, (label, confidence, entropy) in zip(axes.T, samples, found):
        parts = np.where((entropy >= high)[..., None], (214, 69, 65), (96, 169, 96)).astype(np.uint8)
        for axis, image in zip(column, (sample["image"].numpy(), colourise(label, data.colours), entropy, parts)):
            axis.imshow(shrink(image), interpolation="nearest", vmin=0, vmax=np.log(len(data.classes)))
            axis.set(xticks=[], yticks=[])
        predicted += np.bincount(label.ravel(), minlength=len(predicted))
        anchors += np.bincount(label[(confidence > sure) & (entropy <= low)], minlength=len(predicted))
    for axis, title in zip(axes[:, 0], ("input", "prediction", "entropy", f"highest {args.alpha0:g} % red")):
        axis.set_ylabel(title)
    shares = {"anchors among its pixels, %": anchors / predicted.clip(1)}
    if fill is not None:
        shares["fill of the memory bank, %"] = fill.cpu()
    for axis, (title, values) in zip(lower.subplots(1, len(shares), squeeze=False)[0], shares.items()):
        axis.barh(data.classes, 100 * np.asarray(values), color=np.array(data.colours) / 255, edgecolor="grey")
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9)
    figure.savefig(Path(args.output_dir) / "figures" / "reliable_pixels.png", dpi=100)
    plt.close(figure)
