"""The figures of a run, and those of `common.compare`.

curves.png           losses, mIoU and shares over the iterations
predictions.png      validation images: input, target, prediction
pseudo_labels.png    unlabelled images: input, truth, pseudo-labels while the training went on
reliability.png      ST++: how good predictions are by score
reliable_pixels.png  U2PL: entropy, what is left out, anchors, banks
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common import checkpoint, distributed
from common.augment import normalise
from common.data import EvalSet
from common.evaluate import device_of, evaluating, predict
from common.images import DEEP_GREY
from common.source import DataSource, Item, spread
from kernels import pseudo_label, set_backend

LONGEST = 512  # pixels of an image's longest side in a figure
NOT_CURVES = {"iteration", "epoch", "lr", "seconds", "peak_memory_mb"}
STRIP_COLUMNS = 8  # moments of the training that pseudo_labels.png shows


# ---------------------------------------------------------------------------------------- the tools


def pyplot():
    """matplotlib without a screen; imported only where a figure is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["text.parse_math"] = False  # a name may hold dollar signs
    return plt


def save(figure, path: Path) -> None:
    """Write a figure and forget it."""
    figure.savefig(path, dpi=100)
    pyplot().close(figure)


def colourise(labels: np.ndarray, colours: Sequence) -> np.ndarray:
    """(H,W) labels as (H,W,3) uint8 colours; 255 (ignored) is white."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(colours)] = colours
    return table[labels]


def shrink(pixels: np.ndarray, longest: int = LONGEST) -> np.ndarray:
    """Every n-th row and column of an image or a map, (H,W,...): no side longer than `longest`.

    A cell of a figure is some 200 dots wide; of a large image matplotlib would make floats of many
    times its size.
    """
    step = -(-max(pixels.shape[:2]) // longest)
    return pixels[::step, ::step]


def some_images(data: DataSource, items: Sequence[Item], count: int) -> list[dict]:
    """Samples of `count` images, or of all, evenly spaced."""
    part = EvalSet(data, spread(items, count))
    return [part[index] for index in range(len(part))]


@torch.no_grad()
def labels_of(network: nn.Module, sample: dict, window: int) -> np.ndarray:
    """The labels (H,W) that a network gives an image."""
    images = normalise(sample["image"][None].to(device_of(network)))
    with evaluating([network]):
        return predict(network, images, window)[0].cpu().numpy().astype(np.uint8)


def grid(
    columns: dict[str, list[np.ndarray]], data: DataSource, path: Path, side: float = 1.8
) -> None:
    """Images beside each other, a column a title, with the classes' colours below.

    Args:
        columns: title -> (H,W,3) uint8 images, one a row.
        data: classes and colours.
        path: of the PNG.
        side: width of a cell, inches; it is as high as the image that is highest for its width.
    """
    rows = len(next(iter(columns.values())))
    height = side * max(len(x) / len(x[0]) for images in columns.values() for x in images)
    size = side * len(columns), height * rows + 0.5
    figure, axes = pyplot().subplots(
        rows, len(columns), figsize=size, squeeze=False, layout="constrained"
    )
    for line, (title, images) in zip(axes.T, columns.items()):
        for axis, image in zip(line, images):
            axis.imshow(shrink(image), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_title(title, fontsize=9)
    legend(figure, data)
    save(figure, path)


def legend(figure, data: DataSource, room: float = 0.5) -> None:
    """The classes' colours, below a figure, in as many columns as its width holds.

    The figure grows where they are higher than the `room` that it has for them, in inches.
    """
    colours = np.array(data.colours) / 255
    patches = [pyplot().Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    options = {"loc": "outside lower center", "fontsize": 8}
    for columns in range(min(len(data.classes), 7), 0, -1):
        drawn = figure.legend(patches, data.classes, ncols=columns, **options)
        if columns == 1 or drawn.get_window_extent().width <= figure.bbox.width:
            break
        drawn.remove()
    height = drawn.get_window_extent().height / figure.dpi
    figure.set_figheight(figure.get_figheight() + max(0.0, height - room))


# ---------------------------------------------------------------------------------- of every run


def curves(rows: list[dict], path: Path) -> None:
    """Losses, mIoU in percent, and other measures over the iterations, from rows of metrics.csv."""
    measured = {name for row in rows for name, value in row.items() if value} - NOT_CURVES
    names = [name for name in (rows[0] if rows else ()) if name in measured]
    losses = [name for name in names if name.startswith("loss")]
    mious = [name for name in names if "miou" in name]
    others = [name for name in names if name not in (*losses, *mious)]
    panels = [
        ("training loss", losses, 1),
        ("validation mIoU, %", mious, 100),
        ("shares, %", others, 100),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return
    size = 4.6 * len(panels), 3.4
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=size, squeeze=False, layout="constrained"
    )
    for axis, (title, shown, factor) in zip(axes[0], panels):
        for name in shown:
            points = [
                (int(row["iteration"]), factor * float(row[name])) for row in rows if row[name]
            ]
            marker = "o" if len(points) < 30 else None
            axis.plot(*zip(*points), label=name, marker=marker, markersize=3)
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
        axis.legend()
    save(figure, path)


def predictions(
    network: nn.Module, data: DataSource, args: argparse.Namespace, path: Path, count: int = 6
) -> None:
    """Validation images: input, target and prediction, an image a row."""
    samples = some_images(data, data.val, count)
    columns = {"input": [], "target": [], "prediction": []}
    for sample in samples:
        labels = labels_of(network, sample, args.eval_window)
        columns["input"].append(sample["image"].numpy())
        columns["target"].append(colourise(sample["target"].numpy(), data.colours))
        columns["prediction"].append(colourise(labels, data.colours))
    grid(columns, data, path)


def read_pseudo_labels(run: Path) -> dict[str, np.ndarray]:
    """What `keep_pseudo_labels` kept: "ITERATION/NAME" -> labels (H,W)."""
    path = run / "pseudo_labels.npz"
    if not path.is_file():
        return {}
    with np.load(path) as kept:
        return dict(kept)


def keep_pseudo_labels(
    network: nn.Module, iteration: int, data: DataSource, args: argparse.Namespace, count: int = 4
) -> None:
    """Add the network's present labels of some unlabelled images to RUN/pseudo_labels.npz.

    Only images whose true masks are at hand, to be shown beside them.
    """
    if not data.audit or not distributed.is_main():
        return
    run = Path(args.output_dir)
    kept = read_pseudo_labels(run)
    for sample in some_images(data, data.audit, count):
        kept[f"{iteration}/{sample['name']}"] = labels_of(network, sample, args.eval_window)
    part = run / "pseudo_labels.part"
    with open(part, "wb") as file:
        np.savez_compressed(file, **kept)
    part.replace(run / "pseudo_labels.npz")


def pseudo_label_strip(data: DataSource, args: argparse.Namespace, count: int = 4) -> None:
    """Draw what `keep_pseudo_labels` kept, to RUN/figures/pseudo_labels.png.

    An image a row: input, truth, and the labels at some iterations.
    """
    run = Path(args.output_dir)
    kept = read_pseudo_labels(run)
    iterations = sorted({int(key.split("/")[0]) for key in kept})
    places = np.linspace(0, len(iterations) - 1, min(STRIP_COLUMNS, len(iterations))).round()
    shown = [iterations[place] for place in places.astype(int)]
    samples = [
        sample
        for sample in some_images(data, data.audit, count)
        if all(f"{iteration}/{sample['name']}" in kept for iteration in shown)
    ]  # of a run that goes on without an image the others may not have been kept before
    if not shown or not samples:
        return
    columns = {
        "input": [sample["image"].numpy() for sample in samples],
        "truth": [colourise(sample["target"].numpy(), data.colours) for sample in samples],
    }
    for iteration in shown:
        labels = [kept[f"{iteration}/{sample['name']}"] for sample in samples]
        columns[str(iteration)] = [colourise(part, data.colours) for part in labels]
    grid(columns, data, run / "figures" / "pseudo_labels.png", side=1.3)


# ------------------------------------------------------------------------------ of single methods


def reliability_figure(points: list[tuple[float, float, bool]], path: Path) -> None:
    """How good the predictions on reliable and other images are.

    Args:
        points: (reliability score, mIoU of the last checkpoint's prediction, whether reliable) of
            each image.
        path: of the PNG.
    """
    figure, axis = pyplot().subplots(figsize=(5, 3.6), layout="constrained")
    for chosen, label in ((True, "reliable"), (False, "unreliable")):
        part = [(score, 100 * miou) for score, miou, reliable in points if reliable == chosen]
        if part:
            mean = sum(miou for _, miou in part) / len(part)
            axis.scatter(*zip(*part), s=10, label=f"{label}: {len(part)}, mean {mean:.1f}")
    axis.set(xlabel="reliability score", ylabel="mIoU of the image's prediction, %")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


@torch.no_grad()
def reliable_pixels_figure(
    teacher: nn.Module, fill: Tensor | None, sure: float, data: DataSource, args: argparse.Namespace
) -> None:
    """U2PL's view of four validation images, to RUN/figures/reliable_pixels.png.

    Rows: input, prediction, entropy, and the pixels that are reliable (green) and unreliable (red)
    at α_0. Below, for each class, how full its memory bank is, and the share of the pixels
    predicted as it that qualify as anchors.

    Args:
        teacher: the network.
        fill: (C,) shares of the banks; None without them.
        sure: probability that an anchor must exceed.
        data: the data set.
        args: `alpha0` in percent, `output_dir`.
    """
    if not distributed.is_main():
        return
    samples = some_images(data, data.val, 4)
    found = []
    for sample in samples:
        with evaluating([teacher]):
            logits = teacher(normalise(sample["image"][None].to(device_of(teacher))))
        size = sample["image"].shape[:2]
        pixels = pseudo_label(logits, size, with_confidence=True, with_entropy=True)
        maps = (pixels.label, pixels.confidence, pixels.entropy)
        found.append([part[0].cpu().numpy() for part in maps])

    everywhere = np.concatenate([entropy.ravel() for *_, entropy in found])
    low, high = np.percentile(everywhere, [args.alpha0, 100 - args.alpha0])
    figure = pyplot().figure(figsize=(2.2 * len(samples), 9.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4, 1.2))
    draw_pixels(upper, samples, found, high, data, args.alpha0)
    shares = {"anchors among its pixels, %": anchor_shares(found, low, sure, len(data.classes))}
    if fill is not None:
        shares["fill of the memory bank, %"] = fill.cpu().numpy()
    draw_shares(lower, shares, data)
    save(figure, Path(args.output_dir) / "figures" / "reliable_pixels.png")


def draw_pixels(
    figure, samples: list[dict], found: list, high: float, data: DataSource, alpha: float
) -> None:
    """The upper part of `reliable_pixels_figure`: a column an image."""
    axes = figure.subplots(4, len(samples), squeeze=False)
    for column, sample, (label, _, entropy) in zip(axes.T, samples, found):
        parts = np.where((entropy >= high)[..., None], (214, 69, 65), (96, 169, 96)).astype(
            np.uint8
        )
        rows = sample["image"].numpy(), colourise(label, data.colours), entropy, parts
        for axis, image in zip(column, rows):
            axis.imshow(
                shrink(image), interpolation="nearest", vmin=0, vmax=np.log(len(data.classes))
            )
            axis.set(xticks=[], yticks=[])
    titles = ("input", "prediction", "entropy", f"highest {alpha:g} % red")
    for axis, title in zip(axes[:, 0], titles):
        axis.set_ylabel(title)


def anchor_shares(found: list, low: float, sure: float, classes: int) -> np.ndarray:
    """Share of the pixels predicted as each class that are sure and of low entropy."""
    predicted, anchors = np.zeros(classes), np.zeros(classes)
    for label, confidence, entropy in found:
        predicted += np.bincount(label.ravel(), minlength=classes)
        chosen = label[(confidence > sure) & (entropy <= low)]
        anchors += np.bincount(chosen, minlength=classes)
    return anchors / predicted.clip(1)


def draw_shares(figure, shares: dict[str, np.ndarray], data: DataSource) -> None:
    """The lower part of `reliable_pixels_figure`: a bar a class."""
    axes = figure.subplots(1, len(shares), squeeze=False)[0]
    for axis, (title, values) in zip(axes, shares.items()):
        colours = np.array(data.colours) / 255
        axis.barh(data.classes, 100 * values, color=colours, edgecolor="grey")
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9)


# ---------------------------------------------------------------------------------- of a data set


def contact_sheet(data: DataSource, path: Path, count: int = 24, columns: int = 8) -> None:
    """The first labelled images, each above its mask, and the colours of the classes.

    Args:
        data: the data set.
        path: of the PNG.
        count: images, at most.
        columns: images beside each other.
    """
    samples = EvalSet(data, data.labelled[:count])
    rows = -(-len(samples) // columns)
    size = 1.2 * columns, 2.4 * rows + 0.6
    figure, axes = pyplot().subplots(
        2 * rows, columns, figsize=size, squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for index in range(len(samples)):
        sample = samples[index]
        row, column = divmod(index, columns)
        mask = colourise(sample["target"].numpy(), data.colours)
        axes[2 * row, column].imshow(shrink(sample["image"].numpy()), interpolation="nearest")
        axes[2 * row + 1, column].imshow(shrink(mask), interpolation="nearest")
    legend(figure, data)
    save(figure, path)


# ------------------------------------------------------------------------------- of a comparison


def dots(labels: list[str], values: list[list[float]], path: Path, line: bool = True) -> None:
    """A row for each label: mIoU in percent of every seed, their mean and standard deviation.

    Args:
        labels: of the rows, from the top.
        values: of each row's seeds.
        path: of the PNG.
        line: whether a dashed line is the first row's mean, with which the others are compared.
    """
    size = 6.0, 0.9 + 0.28 * len(labels)
    figure, axis = pyplot().subplots(figsize=size, layout="constrained")
    if line:
        axis.axvline(np.mean(values[0]), color="grey", linestyle="--", linewidth=1)
    for place, seeds in enumerate(values):
        deviation = np.std(seeds, ddof=1) if len(seeds) > 1 else 0.0
        axis.scatter(seeds, [place] * len(seeds), s=12, color="tab:orange", alpha=0.8)
        axis.errorbar(np.mean(seeds), place, xerr=deviation, fmt="o", capsize=3, color="tab:blue")
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()  # in the order of the table
    axis.set_xlabel("mIoU, %: seeds, mean and standard deviation")
    axis.grid(axis="x", alpha=0.3)
    save(figure, path)


def measure_curves(curves: dict[str, dict[int, float]], measure: str, path: Path) -> None:
    """A measure in percent over the iterations, a line for each label."""
    figure, axis = pyplot().subplots(figsize=(5, 3.6), layout="constrained")
    for label, points in curves.items():
        axis.plot(list(points), list(points.values()), label=label, marker=".")
    axis.set(xlabel="iteration", ylabel=f"{measure}, %")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


def side_by_side(runs: dict[str, Path], path: Path, count: int = 5, side: float = 1.8) -> None:
    """Validation images: input, target, and the prediction of the last checkpoint of each run.

    Args:
        runs: label -> run folder; the data set is the first one's.
        path: of the PNG.
        count: images, evenly spaced.
        side: of an image in the figure, inches.
    """
    from common import datasets
    from common.predict import load_network

    first = checkpoint.read_description(next(iter(runs.values())))
    settings = argparse.Namespace(**first["args"])
    # The runs' device, or the CPU where they come from a machine with a GPU and this one has none.
    cuda = settings.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    set_backend("torch" if settings.kernels == "torch" else "auto")
    data = replace(
        datasets.load(settings),
        long_side=getattr(settings, "long_side", None),
        grey_range=first.get("grey_range", DEEP_GREY),
    )
    samples = some_images(data, data.val, count)
    columns = {
        "input": [sample["image"].numpy() for sample in samples],
        "target": [colourise(sample["target"].numpy(), data.colours) for sample in samples],
    }
    for label, folder in runs.items():
        network, _ = load_network(folder, "last", None, device)
        labels = [labels_of(network, sample, settings.eval_window) for sample in samples]
        columns[label] = [colourise(part, data.colours) for part in labels]
    grid(columns, data, path, side)
