"""Which images to label next: those that a trained network knows least, as different as can be.

    python -m common.label_next runs/cps-folder-all-seed0 my_images/images --count 20

writes into RUN/label_next, or --output:

    label_next.csv      all images, the chosen ones first, in the order in which to label them
    label_next.png      the first chosen ones with what the network makes of them

1. Every image gets the mean entropy of its predictions, in nats, H = mean_pixels -Σ_c p_c log p_c.
2. Where ST or ST++ has kept checkpoints, it also gets its stability, s = Σ_{j<K} mIoU(M_j, M_K) of
   the labels M_j that checkpoint j gives it (ST++, arXiv:2106.05095, which trusts stable images).
   The images are ranked by both, and the mean rank is their uncertainty.
3. Of the 5 · COUNT most uncertain images COUNT are chosen one after another: first the most
   uncertain one, then always the one whose features differ most from those of all chosen ones
   (the greedy k-centre algorithm). So of the frames of a film few are chosen.

This is no method of a paper, and nothing is claimed for it beyond common sense. Step 1 is entropy
sampling, the oldest rule of active learning. Step 2 turns ST++'s selection around. Step 3 is the
greedy algorithm of core-sets (Sener and Savarese, arXiv:1708.00489), there on all images, and
measured from the labelled ones, too. That uncertain images are found first and different ones among
them second is the idea of suggestive annotation (Yang et al., arXiv:1706.04737), which takes the
variance of several networks and covers all images instead.
"""

import argparse
import csv
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common import InputError, note, writing
from common.deeplabv3plus import MeanLogits
from common.evaluate import image_miou
from common.figures import colourise, legend, pyplot, save, shrink
from common.predict import (
    Files,
    Predictions,
    add_network_flags,
    find_images,
    load_checkpoint,
    predict_all,
    predict_batch,
    start,
)
from kernels import pseudo_label

POOL = 5  # times as many uncertain images as are wanted, to choose different ones from
SHOWN = 24  # images in label_next.png, at most


# ------------------------------------------------------------------------------------ uncertainty


def stability_networks(run: Path, description: dict, device: torch.device) -> list[nn.Module]:
    """The checkpoints of the first stage of ST or ST++, in order; none of other methods."""
    paths = sorted((run / "stage-1").glob("checkpoint-*.pt"))
    networks = [load_checkpoint(path, description, None, device) for path in paths]
    return networks if len(networks) > 1 else []


def stability(labels: list[Tensor], num_classes: int) -> Tensor:
    """s = Σ_{j<K} mIoU(M_j, M_K) of K label maps (N,H,W), in order: (N,) float64 in [0,K-1]."""
    *earlier, last = labels
    return sum(image_miou(label, last, num_classes) for label in earlier)


def measure(
    files: Files,
    network: nn.Module,
    others: list[nn.Module],
    description: dict,
    device: torch.device,
    args: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Entropy, and stability where there are checkpoints, of each image that can be read."""
    window = description["args"]["eval_window"]
    classes = len(description["classes"])

    @torch.no_grad()
    def predict(images: Tensor, size: tuple[int, int]) -> Predictions:
        found = predict_batch(network, images, images.shape[2:], window)
        if others:
            labels = [pseudo_label(other(images), images.shape[2:]).label for other in others]
            found.extra = stability(labels, classes)
        return found

    found: dict[str, dict[str, float]] = {}
    hidden = not sys.stderr.isatty()
    with tqdm(total=len(files), unit="image", dynamic_ncols=True, disable=hidden) as bar:
        for samples, images, predicted in predict_all(files, args, device, predict):
            bar.update(len(samples))
            if images is None:
                note_unread(samples)
                continue
            values = predicted.extra.tolist() if others else [None] * len(samples)
            for sample, entropy, value in zip(samples, predicted.mean_entropy.tolist(), values):
                found[sample["name"]] = {"mean_entropy": entropy, "stability": value}
    return found


def note_unread(samples: list[dict]) -> None:
    """Say which images are left out, and why."""
    for sample in samples:
        print(f"note: left out: {sample['error']}", file=sys.stderr)


def uncertainty(measured: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean rank of each image by entropy and by lack of stability, from 0 to 1 (the highest).

    Args:
        measured: `mean_entropy` of each image, and its `stability` or None.
    """
    names = list(measured)
    ranks = [rank([measured[name]["mean_entropy"] for name in names])]
    stable = [measured[name]["stability"] for name in names]
    if None not in stable:
        ranks.append(rank([-value for value in stable]))
    means = torch.stack(ranks).mean(0)
    return dict(zip(names, means.tolist()))


def rank(values: list[float]) -> Tensor:
    """The place of each value in rising order, over the last place; equal values share theirs."""
    tensor = torch.tensor(values, dtype=torch.float64)
    ordered = tensor.sort().values
    first = torch.searchsorted(ordered, tensor, right=False)
    last = torch.searchsorted(ordered, tensor, right=True) - 1
    return (first + last) / 2 / max(1, len(values) - 1)


# ---------------------------------------------------------------------------------------- choosing


def look_closer(
    files: Files, network: nn.Module, window: int, device: torch.device, args: argparse.Namespace
) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Features of images, and what is drawn of them; `window` is that of the run's evaluation.

    Returns:
        name -> (F,) float32, the mean of the deepest features over the image; and name -> `image`
        and `label`, made small for a figure.
    """
    backbone = network.members[0].backbone if isinstance(network, MeanLogits) else network.backbone

    @torch.no_grad()
    def predict(images: Tensor, size: tuple[int, int]) -> Predictions:
        found = predict_batch(network, images, images.shape[2:], window)
        found.extra = backbone(images)[-1].float().mean((2, 3))
        return found

    features, shown = {}, {}
    for samples, images, predicted in predict_all(files, args, device, predict):
        if images is None:
            note_unread(samples)
            continue
        for index, sample in enumerate(samples):
            features[sample["name"]] = predicted.extra[index]
            shown[sample["name"]] = {
                "image": shrink(images[index].numpy(), 256),
                "label": shrink(predicted.label[index].numpy(), 256),
            }
    return features, shown


def spread_out(features: Tensor, count: int) -> tuple[list[int], list[float | None]]:
    """Greedy k-centre: the first, then always the one that is farthest from all chosen ones.

    Args:
        features: (N,F), the most uncertain image first.
        count: how many to choose.

    Returns:
        Their places, and the distance of each to the nearest one that was chosen before it:
        1 - cosine, from 0 to 2, None for the first.

    Source: Sener and Savarese, arXiv:1708.00489, Algorithm 1.
    """
    directions = F.normalize(features, dim=1)
    chosen, distances = [0], [None]
    nearest = 1 - directions @ directions[0]  # of each to the chosen ones
    while len(chosen) < min(count, len(features)):
        nearest[chosen] = -1.0
        place = int(nearest.argmax())
        chosen.append(place)
        distances.append(nearest[place].item())
        nearest = torch.minimum(nearest, 1 - directions @ directions[place])
    return chosen, distances


# ----------------------------------------------------------------------------------------- writing


def write_table(
    path: Path,
    chosen: dict[str, float | None],
    measured: dict[str, dict[str, float]],
    score: dict[str, float],
) -> None:
    """Write label_next.csv: the chosen images in order, then the others by falling uncertainty."""
    rest = sorted(set(score) - set(chosen), key=lambda name: (-score[name], name))
    columns = ["order", "image", "uncertainty", "mean_entropy", "stability", "distance"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for order, name in enumerate([*chosen, *rest], start=1):
            numbers = score[name], measured[name]["mean_entropy"], measured[name]["stability"]
            values = [*numbers, chosen.get(name)]
            written = ["" if value is None else f"{value:.4f}" for value in values]
            writer.writerow([order if name in chosen else "", name, *written])


def draw(path: Path, chosen: list[str], shown: dict[str, dict], description: dict) -> None:
    """Draw the first chosen images, each above the network's labels, in the order of choice."""
    columns = 6
    names = chosen[:SHOWN]
    rows = -(-len(names) // columns)
    figure, axes = pyplot().subplots(
        2 * rows, columns, figsize=(2 * columns, 3.4 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for place, name in enumerate(names):
        row, column = divmod(place, columns)
        painted = colourise(shown[name]["label"], description["colours"])
        axes[2 * row, column].imshow(shown[name]["image"], interpolation="nearest")
        axes[2 * row + 1, column].imshow(painted, interpolation="nearest")
        axes[2 * row, column].set_title(f"{place + 1}  {name[-24:]}", fontsize=7)
    classes = SimpleNamespace(classes=description["classes"], colours=description["colours"])
    legend(figure, classes)
    save(figure, path)


# --------------------------------------------------------------------------------- the command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("images", type=Path, metavar="IMAGES", help="a folder of images")
    parser.add_argument(
        "--count", type=int, default=20, metavar="N", help="images to choose (default: 20)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/label_next")
    add_network_flags(parser)
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f"--count {args.count}: at least 1")
    return args


def without_known(found: dict[str, Path], run: Path) -> dict[str, Path]:
    """The images that are neither labelled nor for validation in a run, by their files."""
    path = run / "files_with_masks.txt"
    known = set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set()
    if known and not any(map(os.path.exists, known)):
        note(
            f"the run's images are no longer where they were, such as {min(known)}: "
            "some of those below may have masks"
        )
    left = {name: path for name, path in found.items() if str(path.resolve()) not in known}
    if not left:
        raise InputError("all of these images have masks in the run already")
    if len(left) < len(found):
        print(f"{len(found) - len(left)} of {len(found)} images have masks in the run: left out")
    return left


def main(argv: list[str] | None = None) -> None:
    """Choose images, and write the table and the figure.

    Raises:
        InputError: no such run, or no image to choose from.
    """
    args = parse_args(argv)
    device, network, description = start(args)
    output = args.output or args.run / "label_next"
    paths = without_known(find_images(args.images, output), args.run)

    # 1 and 2. Uncertainty of each image.
    others = stability_networks(args.run, description, device)
    by = f"entropy and stability over {len(others)} checkpoints" if others else "entropy"
    print(f"looking at {len(paths)} images: {by}")
    measured = measure(Files(paths, description), network, others, description, device, args)
    if not measured:
        raise InputError(f"none of the images in {args.images} can be read")
    score = uncertainty(measured)

    # 3. Different ones among the most uncertain.
    ranked = sorted(score, key=lambda name: (-score[name], name))
    pool = ranked[: POOL * args.count]
    files = Files({name: paths[name] for name in pool}, description)
    window = description["args"]["eval_window"]
    features, shown = look_closer(files, network, window, device, args)
    names = [name for name in pool if name in features]
    if not names:
        raise InputError("none of the most uncertain images fits into memory as a whole")
    places, distances = spread_out(torch.stack([features[name] for name in names]), args.count)
    chosen = {names[place]: distance for place, distance in zip(places, distances)}

    with writing(output):
        write_table(output / "label_next.csv", chosen, measured, score)
        draw(output / "label_next.png", list(chosen), shown, description)
    print(f"{len(chosen)} images to label next: {output}/label_next.csv and label_next.png")


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        print(f"label_next: error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("label_next: stopped", file=sys.stderr)
        sys.exit(130)
