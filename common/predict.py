"""Masks for a folder of images, with the network of a run.

    python -m common.predict runs/cps-folder-all-seed0 my_images/images
    python -m common.predict runs/cps-folder-all-seed0 holiday --overlay off --uncertainty --tta

writes into RUN/predictions, or --output:

    masks/NAME.png       indexed PNG in the data set's colours, label = index, of the image's size
    overlays/NAME.jpg    the image half covered by the mask's colours, or both side by side; of a
                         large image as the network has seen it, shrunk
    entropy/NAME.png     with --uncertainty: black is certain, white an equal chance of all classes
    predictions.csv      a line an image: its file, mean entropy and confidence, and the share of
                         each class

Images are turned as EXIF says. Those in subfolders are found too; what is written of them lies in
subfolders of the same names. A file that was predicted before by the same checkpoint and with the
same flags is skipped, so that a stopped call goes on where it was.

The means in predictions.csv are taken at the resolution of the network's logits, a quarter of the
image's: at full resolution they would take almost as long again as the labels.
"""

import argparse
import csv
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from common import InputError, checkpoint, cli, note, writing
from common.augment import normalise
from common.data import BATCH_IMAGES, BATCH_PIXELS, new_loader
from common.deeplabv3plus import DeepLabV3Plus, MeanLogits
from common.evaluate import averaged_probabilities, probabilities
from common.figures import colourise
from common.images import (
    DEEP_GREY,
    Shrunk,
    naming_if_too_large,
    open_image,
    open_shrunk,
)
from common.masks import write_mask
from common.source import IMAGE_SUFFIXES, images_in, refuse_unreadable_names
from kernels import pseudo_label, set_backend

LOOK_AHEAD = 256  # images whose sizes are read at once, to put those of one size into batches
WAITING_PIXELS = 16_000_000  # of images that may wait for being written
# Of shared memory for each process that reads images: four batches in flight, RGB, of as many
# pixels as a large photograph has.
WORKER_BYTES = 4 * 3 * 16_000_000
TTA_SCALES = "0.75,1,1.25"
ORIGIN = ("file", "modified")
MEASURES = ("mean_entropy", "mean_confidence")


def load_network(
    run: Path, which: str, name: str | None, device: torch.device
) -> tuple[nn.Module, dict]:
    """The network of a run in eval mode, and the run's description (args.json).

    Args:
        run: the run's folder.
        which: "best" or "last".
        name: a network of the checkpoint, None for the method's result.
        device: where to put it.

    Raises:
        InputError: no run there, or no such network.
    """
    description = checkpoint.read_description(run)
    return load_checkpoint(run / f"{which}.pt", description, name, device), description


def load_checkpoint(
    path: Path, description: dict, name: str | None, device: torch.device
) -> nn.Module:
    """A network of a checkpoint in eval mode, None for the method's result.

    Raises:
        InputError: no checkpoint there, or no such network.
    """
    content = checkpoint.read(path)
    name = name or content["result"]
    args = description["args"]
    classes = len(description["classes"])
    state = content["networks"].get(name, {})

    def build() -> DeepLabV3Plus:
        return DeepLabV3Plus(args["backbone"], classes, "none", args["output_stride"])

    # PS-MT's result is the mean of its teachers.
    members = {key.split(".")[1] for key in state if key.startswith("members.")}
    network = MeanLogits([build() for _ in members]) if members else build()
    if state:
        # A method may have trained further heads, such as U2PL's features: not needed here.
        wanted = network.state_dict().keys()
        content["networks"][name] = {key: state[key] for key in state if key in wanted}
    checkpoint.load_networks(content, {name: network}, path)
    return network.to(device).eval()


# ------------------------------------------------------------------------------ reading in batches


class Files(Dataset):
    """Image files as samples: `name`, `path`, `image` (H,W,3) uint8, and `size`.

    The size is the file's own (height, width); the image may be shrunk, as the run shrinks images.
    A sample of a file that cannot be read has `error` in place of the last two.

    Args:
        paths: name -> file.
        description: the run's.
    """

    def __init__(self, paths: dict[str, Path], description: dict):
        self.names, self.paths = list(paths), list(paths.values())
        self.long_side = description["args"].get("long_side")
        self.grey_range = tuple(description.get("grey_range") or DEEP_GREY)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        path = self.paths[index]
        sample = {"name": self.names[index], "path": path}
        try:
            with naming_if_too_large(path):
                image = open_shrunk(path, self.long_side, self.grey_range)
                width, height = image.file.size if isinstance(image, Shrunk) else image.size
                return {**sample, "image": image.pixels(), "size": (height, width)}
        except InputError as error:
            return {**sample, "error": str(error)}


class EqualSizes(Sampler):
    """Numbers of images of one size, as many as a batch may have.

    Not all sizes are read before the first batch: a folder may hold 100 000 files.
    """

    def __init__(self, files: Files):
        self.files = files
        self.told = False  # of grey that the run has not seen

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.files), LOOK_AHEAD):
            groups: dict[tuple[int, int], list[int]] = {}
            for index in range(start, min(start + LOOK_AHEAD, len(self.files))):
                groups.setdefault(self.size_of(index), []).append(index)
            for size, group in groups.items():
                width, height = size  # the maps have the file's size
                count = min(BATCH_IMAGES, max(1, BATCH_PIXELS // max(1, width * height)))
                yield from (group[i : i + count] for i in range(0, len(group), count))

    def size_of(self, index: int) -> tuple[int, int]:
        """(width, height) of a file; (0, 0) if it cannot be read."""
        try:
            image = open_image(self.files.paths[index])
        except InputError:
            return 0, 0
        with image.header:
            if image.deep_grey and self.files.grey_range == DEEP_GREY and not self.told:
                self.told = True
                note(
                    f"the run saw no grey of more than 8 bits, so that in images such as "
                    f"{image.path} 0 is black and 65535 white; if these look dark, save them with "
                    "8 bits"
                )
            return image.size


def collate(samples: list[dict]) -> tuple[list[dict], list[dict], Tensor | None]:
    """Samples without their images, broken ones apart, and the images (N,H,W,3); None for none."""
    broken = [sample for sample in samples if "error" in sample]
    whole = [sample for sample in samples if "error" not in sample]
    images = [sample.pop("image") for sample in whole]
    return whole, broken, torch.stack(images) if images else None


# ------------------------------------------------------------------------------------- predicting


@dataclass
class Predictions:
    """What is predicted of a batch of images; on the CPU once `ready` has happened.

    Attributes:
        label: (N,H,W) uint8.
        mean_entropy: (N,) nats, means over the image.
        mean_confidence: (N,) in [0,1].
        entropy: (N,H,W) nats, None if it was not asked for.
        extra: (N,...), what else a caller has measured of each image.
        ready: on CUDA, the event after the copies.
    """

    label: Tensor
    mean_entropy: Tensor
    mean_confidence: Tensor
    entropy: Tensor | None = None
    extra: Tensor | None = None
    ready: torch.cuda.Event | None = None

    def to_cpu(self) -> "Predictions":
        """A copy on the CPU; on CUDA the host goes on meanwhile."""
        found = {
            name: value.to("cpu", non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        if self.label.is_cuda:
            found["ready"] = torch.cuda.Event()
            found["ready"].record()
        return Predictions(**found)


@torch.no_grad()
def predict_batch(
    network: nn.Module,
    images: Tensor,
    size: tuple[int, int],
    window: int = 0,
    scales: tuple[float, ...] = (),
    with_entropy: bool = False,
) -> Predictions:
    """Labels and uncertainty of images of one size.

    Args:
        network: in eval mode.
        images: (N,3,H,W), normalised.
        size: (height, width) of the maps; the images may have been shrunk.
        window: of the sliding windows in pixels, 0 for whole images.
        scales: of the test-time augmentation, each with its mirror image; none for no augmentation.
        with_entropy: whether maps of entropy are wanted.
    """
    if scales:
        logits = logarithm(averaged_probabilities(network, images, window, scales))
    elif window and max(images.shape[2:]) > window:
        logits = logarithm(probabilities(network, images, window))
    else:
        logits = network(images)
    log_probs = logits.float().log_softmax(1)  # at the logits' own resolution
    probs = log_probs.exp()
    pixels = pseudo_label(logits, size, with_entropy=with_entropy)
    return Predictions(
        label=pixels.label,
        mean_entropy=-(probs * log_probs).sum(1).mean((1, 2)),
        mean_confidence=probs.amax(1).mean((1, 2)),
        entropy=pixels.entropy if with_entropy else None,
    )


def logarithm(probs: Tensor) -> Tensor:
    """Logits of probabilities, none of them infinite."""
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()


Batch = tuple[list[dict], Tensor | None, Predictions | None]


def predict_all(
    files: Files,
    args: argparse.Namespace,
    device: torch.device,
    predict: Callable[[Tensor, tuple[int, int]], Predictions],
) -> Iterator[Batch]:
    """Samples, images (N,H,W,3) and predictions, batch by batch.

    A batch is handed out when the next one is under way, so that a GPU does not wait for the host.
    Samples that cannot be predicted come alone, with `error`, without images and predictions.

    Args:
        files: the images.
        args: `workers` and `device`.
        device: the network's.
        predict: predicts images (N,3,H,W), with maps of a size (height, width).
    """
    before: Batch | None = None
    for whole, broken, images in load(files, args):
        for batch in predict_or_split(whole, images, device, predict):
            if batch[2] is None:
                broken += batch[0]
                continue
            if before is not None:
                yield ready(before)
            before = batch
        if broken:
            yield broken, None, None
    if before is not None:
        yield ready(before)


def load(
    files: Files, args: argparse.Namespace
) -> Iterator[tuple[list[dict], list[dict], Tensor | None]]:
    """The batches of `collate`.

    Raises:
        InputError: a process that reads images was killed.
    """
    loader = new_loader(files, args, batch_sampler=EqualSizes(files), collate_fn=collate)
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise InputError(f"{reason} Too little memory, most likely: fewer of them (-j)") from None


def predict_or_split(
    samples: list[dict],
    images: Tensor | None,
    device: torch.device,
    predict: Callable[[Tensor, tuple[int, int]], Predictions],
) -> Iterator[Batch]:
    """A batch with its predictions; image by image where the memory does not suffice for all.

    An image that is too large by itself comes with `error` and without predictions.
    """
    if not samples:
        return
    try:
        with naming_if_too_large(samples[0]["path"]):
            inputs = normalise(images.to(device, non_blocking=True))
            yield samples, images, predict(inputs, samples[0]["size"]).to_cpu()
    except InputError as error:
        if len(samples) == 1:
            yield [{**samples[0], "error": str(error)}], None, None
            return
        for index, sample in enumerate(samples):
            yield from predict_or_split([sample], images[index : index + 1], device, predict)


def ready(batch: Batch) -> Batch:
    """A batch whose predictions have arrived on the CPU."""
    event = batch[2].ready
    if event is not None:
        event.synchronize()
    return batch


# ---------------------------------------------------------------------------------------- writing


class Output:
    """The folder of predictions, and what is known of those that are there.

    Args:
        folder: it is made.
        description: the run's.
        settings: what the predictions depend on; others' are made anew.
        args: `overlay` and `uncertainty`.

    Raises:
        InputError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, description: dict, settings: dict, args: argparse.Namespace):
        self.folder, self.args, self.settings = folder, args, settings
        self.classes, self.colours = description["classes"], description["colours"]
        self.background = 0 if self.classes[0] == "background" else None
        about = ["image", *ORIGIN, *MEASURES]
        shares = [f"class {name}" if name in about else name for name in self.classes]
        self.columns = [*about, *shares]
        self.table, self.memory = folder / "predictions.csv", folder / "settings.json"
        self.rows: dict[str, dict] = {}
        with writing(folder):
            for part in self.parts():
                (folder / part).mkdir(parents=True, exist_ok=True)
            known = self.memory.read_text(encoding="utf-8") if self.memory.is_file() else "{}"
            if json.loads(known) == settings:
                self.rows = read_rows(self.table, self.columns)

    def begin(self, left: dict[str, Path]) -> None:
        """Write the lines of the images that stay as they are; those of `left` will follow."""
        with writing(self.table):
            checkpoint.write(self.settings, self.memory)
            self.file = open(self.table, "w", newline="", buffering=1, encoding="utf-8")
            self.writer = csv.DictWriter(self.file, self.columns)
            self.writer.writeheader()
            self.writer.writerows(row for name, row in self.rows.items() if name not in left)

    def parts(self) -> dict[str, str]:
        """The subfolders that are written, and the suffix of their files."""
        found = {"masks": ".png"}
        if self.args.overlay != "off":
            found["overlays"] = ".jpg"
        if self.args.uncertainty:
            found["entropy"] = ".png"
        return found

    def path(self, part: str, name: str) -> Path:
        """A file of an image."""
        return self.folder / part / f"{name}{self.parts()[part]}"

    def has(self, name: str, image: Path) -> bool:
        """Whether all of an image was written by the same settings, and the file is the same."""
        row = self.rows.get(name)
        if row is None or {key: row[key] for key in ORIGIN} != origin(image):
            return False
        return all(self.path(part, name).is_file() for part in self.parts())

    def write(self, name: str, image: Tensor, label: Tensor, entropy: Tensor | None) -> None:
        """Write the files of an image; on a thread of its own."""
        write_mask(self.path("masks", name), label, self.colours)
        if self.args.overlay != "off":
            shown = overlay(image, label, self.colours, self.args.overlay, self.background)
            self.save(shown, "overlays", name)
        if entropy is not None:
            grey = entropy * (255 / math.log(len(self.classes)))
            self.save(grey.round().clamp(0, 255).byte().numpy(), "entropy", name)

    def save(self, pixels: np.ndarray, part: str, name: str) -> None:
        """Write an image file.

        Raises:
            InputError: the disk is full or the folder cannot be written to.
        """
        path = self.path(part, name)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=90)

    def add(self, sample: dict, found: Predictions, index: int) -> None:
        """Write an image's line of predictions.csv, after its files."""
        label = found.label[index]
        shares = torch.bincount(label.flatten(), minlength=len(self.classes)) / label.numel()
        measures = found.mean_entropy[index].item(), found.mean_confidence[index].item()
        values = [f"{value:.4f}" for value in (*measures, *shares.tolist())]
        line = [sample["name"], *origin(sample["path"]).values(), *values]
        with writing(self.table):
            self.writer.writerow(dict(zip(self.columns, line)))


def origin(path: Path) -> dict[str, str]:
    """Which file an image is, and when it was written: other folders have the same names."""
    when = datetime.fromtimestamp(path.stat().st_mtime).isoformat(sep=" ")
    return dict(zip(ORIGIN, (str(path.resolve()), when)))


def read_rows(path: Path, columns: list[str]) -> dict[str, dict]:
    """The whole lines of predictions.csv by image; none where there is no such file."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != columns:
            return {}
        return {row["image"]: row for row in reader if None not in row.values()}


def overlay(
    image: Tensor, label: Tensor, colours: list, kind: str, background: int | None = None
) -> np.ndarray:
    """An image half covered by the colours of its labels, or both side by side: uint8 RGB.

    Args:
        image: (h,w,3) uint8.
        label: (H,W), at least as large; the overlay has the size of the image.
        colours: an RGB triple a class.
        kind: "half" or "side-by-side".
        background: the class that covers nothing.
    """
    height, width = image.shape[:2]
    rows = torch.arange(height) * label.shape[0] // height
    columns = torch.arange(width) * label.shape[1] // width
    label = label[rows][:, columns]
    painted = colourise(label.numpy(), colours)
    if kind == "side-by-side":
        return np.concatenate([image.numpy(), painted], 1)
    half = image.numpy() // 2 + painted // 2
    if background is None:
        return half
    return np.where((label == background).numpy()[..., None], image.numpy(), half)


def write_all(batches: Iterator[Batch], output: Output, bar: tqdm) -> list[str]:
    """Write all predictions on threads of their own, and return what could not be predicted."""
    failed = []
    waiting: deque[tuple[Future, dict, Predictions, int]] = deque()
    pixels = 0  # of the images that wait

    def settle(limit: int) -> None:
        """Enter what is written, and wait until at most `limit` pixels are left to be."""
        nonlocal pixels
        while waiting and (pixels > limit or waiting[0][0].done()):
            future, sample, found, index = waiting.popleft()
            future.result()
            output.add(sample, found, index)
            pixels -= found.label[index].numel()
            bar.update()

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for samples, images, found in batches:
            if found is None:
                failed += [sample["error"] for sample in samples]
                bar.update(len(samples))
                continue
            for index, sample in enumerate(samples):
                entropy = found.entropy[index] if found.entropy is not None else None
                job = sample["name"], images[index], found.label[index], entropy
                waiting.append((pool.submit(output.write, *job), sample, found, index))
                pixels += found.label[index].numel()
            settle(WAITING_PIXELS)
        settle(0)
    return failed


# --------------------------------------------------------------------------------- the command line


def find_images(place: Path, output: Path) -> dict[str, Path]:
    """The image file `place`, or every image in and below the folder `place`, by its id.

    Of a data folder, which holds classes.txt and images/, it is those of its images/: its masks are
    no images. What lies in `output` is left out: it may be the overlays of an earlier call.

    Raises:
        InputError: nothing there, no image, or a name that is not UTF-8.
    """
    refuse_unreadable_names([place])
    if not os.path.exists(place):  # Path.exists raises where a folder may not be entered
        raise InputError(f"no file or folder {place}")
    if not place.is_dir():
        return {place.stem: place}
    if (place / "classes.txt").is_file() and (place / "images").is_dir():
        place = place / "images"
    found = images_in(place)
    if output.resolve().is_relative_to(place.resolve()):
        found = {
            name: path
            for name, path in found.items()
            if output.resolve() not in path.resolve().parents
        }
    if not found:
        raise InputError(f"no {', '.join(IMAGE_SUFFIXES)} in {place}")
    return found


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "images", type=Path, metavar="IMAGES", help="a folder of images, or one image"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/predictions")
    parser.add_argument(
        "--overlay",
        choices=["off", "half", "side-by-side"],
        default="half",
        help="images to look at (default: half)",
    )
    parser.add_argument(
        "--uncertainty", action="store_true", help="write a map of the entropy of each image"
    )
    parser.add_argument(
        "--tta",
        nargs="?",
        const=TTA_SCALES,
        metavar="SCALES",
        help="test-time augmentation: the mean of the probabilities over these scales, each with "
        f"its mirror image (default scales: {TTA_SCALES})",
    )
    parser.add_argument("--overwrite", action="store_true", help="predict again what is there")
    add_network_flags(parser)
    args = parser.parse_args(argv)
    try:
        args.scales = tuple(float(scale) for scale in (args.tta or "").split(",") if scale)
        if not all(0.05 <= scale <= 20 for scale in args.scales):
            raise ValueError
    except ValueError:
        parser.error(f"--tta {args.tta}: scales such as {TTA_SCALES}")
    return args


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """Which network, and what it is computed with."""
    parser.add_argument(
        "--checkpoint",
        choices=["best", "last"],
        default="last",
        help="default: last, the result",
    )
    parser.add_argument("--network", metavar="NAME", help="default: the method's result network")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "-j",
        "--workers",
        type=cli.not_negative,
        metavar="N",
        help="processes that read images (default: none on a CPU, else up to 8)",
    )


def start(args: argparse.Namespace) -> tuple[torch.device, nn.Module, dict]:
    """The device, the run's network and its description.

    Raises:
        InputError: no such device, run or network.
    """
    device = find_device(args.device)
    fill_workers(args, device)
    network, description = load_network(args.run, args.checkpoint, args.network, device)
    if device.type == "cuda":
        network = network.to(memory_format=torch.channels_last)
    if description["args"]["kernels"] == "torch":
        set_backend("torch")  # a machine that trained so may have no C compiler
    return device, network, description


def fill_workers(args: argparse.Namespace, device: torch.device) -> None:
    """Choose how many processes read images, as many as shared memory holds batches for.

    Raises:
        InputError: --workers asks for more.
    """
    memory = cli.shared_memory()
    fits = int(min(memory / WORKER_BYTES, 8))
    if args.workers is None:
        args.workers = min(fits, os.cpu_count() or 1) if device.type == "cuda" else 0
    if args.workers > fits and args.workers * WORKER_BYTES > memory:
        raise InputError(
            f"-j {args.workers}: /dev/shm has {memory / 1e6:.0f} MB, enough for -j {fits}; "
            "a container needs a larger --shm-size"
        )


def find_device(name: str) -> torch.device:
    """The device `name`, tried out; a GPU becomes the current one.

    Raises:
        InputError: there is no such device.
    """
    try:
        device = torch.empty(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # events are recorded on the current one's stream
        return device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None


def main(argv: list[str] | None = None) -> None:
    """Predict every image.

    One that cannot be read is named at the end and does not stop the others.

    Raises:
        InputError: nothing to predict, no such run, or images that could not be predicted.
    """
    args = parse_args(argv)
    device, network, description = start(args)
    window = description["args"]["eval_window"]
    folder = args.output or args.run / "predictions"
    found = find_images(args.images, folder)
    path = args.run / f"{args.checkpoint}.pt"
    settings = {
        "checkpoint": str(path.resolve()),
        "written": path.stat().st_mtime_ns,
        "network": args.network,
        "scales": list(args.scales),
        "overlay": args.overlay,
        "uncertainty": args.uncertainty,
    }
    output = Output(folder, description, settings, args)
    left = {
        name: image
        for name, image in found.items()
        if args.overwrite or not output.has(name, image)
    }
    output.begin(left)

    def predict(images: Tensor, size: tuple[int, int]) -> Predictions:
        return predict_batch(network, images, size, window, args.scales, args.uncertainty)

    begun = time.monotonic()
    batches = predict_all(Files(left, description), args, device, predict)
    hidden = not sys.stderr.isatty()
    with tqdm(total=len(left), unit="image", dynamic_ncols=True, disable=hidden) as bar:
        failed = write_all(batches, output, bar)
    report(len(left) - len(failed), len(found) - len(left), time.monotonic() - begun, output)
    if failed:
        raise InputError(f"{len(failed)} could not be predicted: " + "; ".join(failed))


def report(predicted: int, skipped: int, seconds: float, output: Output) -> None:
    """Print how many images were predicted, how fast, and where the results are."""
    rate = f" in {seconds:.1f} s ({predicted / seconds:.1f} a second)" if predicted else ""
    there = f", {skipped} were there already (--overwrite for all)" if skipped else ""
    print(f"{predicted} images predicted{rate}{there}")
    for part in output.parts():
        print(f"  {output.folder / part}")
    print(f"  {output.table}")


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        print(f"predict: error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("predict: stopped; the same command goes on with what is left", file=sys.stderr)
        sys.exit(130)
