"""Reading, cropping and batching. Which files belong to which data set stands in `datasets.py`.

A training sample is decided by (seed, stream, epoch, position) alone: the same whatever the number of workers or processes,
and a run that resumes at iteration k asks for exactly the samples that iteration k would have got.

    python -m common.data --benchmark     pictures a second and core, against the usual PIL pipeline
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_png, read_file

from common import InputError, datasets, shapes
from common.augment import IGNORE, IMAGENET_MEAN, IMAGENET_STD, ScaleFrom, WeakAugment, Window, cut, scale_rule
from common.datasets import DataSource, Item
from common.runtime import Runtime, derive_seed, ignore_interrupts

IDENTITY = np.arange(256, dtype=np.uint8)  # for masks whose values are labels


class Key(NamedTuple):
    """Which sample: picture `index`, at `position` of the shuffled list of `epoch`."""

    index: int
    epoch: int
    position: int


class StreamSampler(Sampler):
    """Batches of `Key`s for iterations `start` to `stop`: shuffled lists of `count` pictures, one after another, without end.

    A global batch takes the next `batch * world` positions and rank r the r-th share of them, so that the samples of an
    iteration do not depend on the number of processes, and a list shorter than a batch simply comes round again.
    """

    def __init__(self, count: int, batch: int, seed: int, stream: int, start: int, stop: int, rank: int = 0, world: int = 1):
        self.count, self.batch, self.seed, self.stream = count, batch, seed, stream
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        orders: dict[int, list[int]] = {}
        for iteration in range(self.start, self.stop):
            first = (iteration * self.world + self.rank) * self.batch
            keys = []
            for number in range(first, first + self.batch):
                epoch, position = divmod(number, self.count)
                if epoch not in orders:
                    orders = {key: value for key, value in orders.items() if key >= epoch - 1}
                    generator = torch.Generator().manual_seed(derive_seed(self.seed, self.stream, epoch))
                    orders[epoch] = torch.randperm(self.count, generator=generator).tolist()
                keys.append(Key(orders[epoch][position], epoch, position))
            yield keys


def open_picture(path: Path) -> Image.Image:
    """A picture, opened but not yet decoded.

    Raises:
        InputError: not a picture; the message names the file.
    """
    try:
        return Image.open(path)
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({error})") from None


def to_rgb(picture: Image.Image, path: Path | None = None) -> Image.Image:
    """Decode to 8-bit RGB; 16-bit grey is scaled, not clipped.

    Raises:
        InputError: the file is truncated or broken; the message names it.
    """
    try:
        if picture.mode.startswith("I"):  # 16-bit grey: PIL's convert would clip everything above 255
            return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
        picture.load()
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path or picture}: cannot be decoded ({error})") from None


def decode(picture: Image.Image, path: Path | None) -> Image.Image | torch.Tensor:
    """The 8-bit RGB picture: of PIL, or (H,W,3) pixels of an RGB PNG, which torchvision decodes faster than PIL.

    Raises:
        InputError: the file is truncated or broken; the message names it.
    """
    if path is None or picture.format != "PNG" or picture.mode != "RGB":
        return to_rgb(picture, path)
    try:
        pixels = decode_png(read_file(str(path)), ImageReadMode.RGB)
    except RuntimeError as error:
        raise InputError(f"{path}: cannot be decoded ({error})") from None
    return pixels.permute(1, 2, 0) if pixels.dtype == torch.uint8 else to_rgb(picture, path)  # PIL for 16 bits a channel


def open_mask(path: Path, size: tuple[int, int], table: np.ndarray, num_classes: int) -> Image.Image:
    """A mask as a grey PIL picture of labels: values mapped by `table`, checked against the picture's `size` and the classes.

    Raises:
        InputError: unreadable, of another size, in colour, or with a label that is neither below `num_classes` nor 255.
    """
    mask = open_picture(path)
    if mask.size != size:
        raise InputError(f"{path}: the mask has {mask.width}x{mask.height} pixels, its picture {size[0]}x{size[1]}")
    if mask.mode not in ("P", "L", "1") and not mask.mode.startswith("I"):
        raise InputError(f"{path}: the mask is {mask.mode}; one value a pixel is expected (indexed or grey PNG), not colours")
    if mask.tile and mask.tile[0].args in ("L;2", "L;4"):  # PIL would stretch these values to 0..255
        raise InputError(f"{path}: the mask has fewer than 8 bits a pixel; save it as an indexed or an 8-bit grey PNG")
    try:
        values = np.asarray(mask)
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be decoded ({error})") from None
    labels = table[values.clip(0, 255)] if values.dtype != bool else values.astype(np.uint8)
    bad = (labels >= num_classes) & (labels != IGNORE) | (values > 255)
    if bad.any():
        found = ", ".join(map(str, np.unique(values[bad])[:8]))
        raise InputError(f"{path}: labels {found} in the mask; 0 to {num_classes - 1} and 255 (ignored) are possible")
    return Image.fromarray(labels)


def read(item: Item, data: DataSource, table: np.ndarray) -> tuple[Image.Image, Image.Image | None]:
    """Picture (opened, maybe not decoded) and mask of an item."""
    table = IDENTITY if item.pseudo else table
    if isinstance(item.image, int):
        pixels, target = shapes.draw(item.image)
        picture = Image.fromarray(pixels)
        mask = Image.fromarray(target) if isinstance(item.mask, int) else None
    else:
        picture, mask = open_picture(item.image), None
    return picture, open_mask(item.mask, picture.size, table, data.num_classes) if isinstance(item.mask, Path) else mask


def load_data(args: argparse.Namespace, rt: Runtime) -> DataSource:
    """The data set of `args.data`, with the checks of `datasets.load` and a look at some of its pictures and masks.

    Raises:
        InputError: what `datasets.load` and `read` raise, masks of 0 and 255 alone, or a crop too large.
    """
    data = datasets.load(args)
    table = np.array(data.label_map, np.uint8)
    found, largest = set(), 0
    for items in (data.labelled, data.val):  # a wrong validation mask would otherwise show after an epoch
        for item in items[:: max(1, len(items) // 16)]:
            picture, mask = read(item, data, table)
            found |= set(np.unique(np.asarray(mask)).tolist())
            largest = max(largest, *picture.size)
    if found == {0, IGNORE}:
        raise InputError(
            f"{data.name}: the masks hold only 0 and 255; 255 means ignored, labels are 0 to {data.num_classes - 1}"
        )
    if args.crop_size > 2 * largest:
        raise InputError(f"--crop-size {args.crop_size} is more than twice the pictures' longest side, {largest}; lower it")
    files = [item.image for item in (*data.val, *data.audit) if isinstance(item.image, Path)]
    if data.val_batch > 1 and len({open_picture(path).size for path in files}) > 1:
        data = replace(data, val_batch=1)
    return data


class TrainSet(Dataset):
    """Randomly cropped pictures.

    A sample is a dict: `image` (crop,crop,3) uint8 RGB, `valid_mask` (crop,crop) bool, False on the padding at the right
    and the bottom, `name`, and, of labelled pictures, `target` (crop,crop) uint8 with 255 where ignored or padded. `strong`
    gets the sample and its item and returns the sample to use.
    """

    def __init__(
        self,
        data: DataSource,
        items: tuple[Item, ...],
        augment: WeakAugment,
        seed: int,
        stream: int,
        strong: Callable[[dict, Item], dict] | None = None,
    ):
        self.data, self.items, self.augment, self.seed, self.stream, self.strong = data, items, augment, seed, stream, strong
        self.table = np.array(data.label_map, np.uint8)

    def __getitem__(self, key: Key) -> dict:
        item = self.items[key.index]
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would reseed CUDA too, and dropout with it, when there are no workers.
            torch.default_generator.manual_seed(derive_seed(self.seed, self.stream, key.epoch, key.position))
            picture, mask = read(item, self.data, self.table)
            window = self.augment.draw(*picture.size)
            path = item.image if isinstance(item.image, Path) else None
            sample = {"name": item.name, **crop_sample(picture, mask, window, self.augment.crop, path)}
            if self.strong:
                sample = self.strong(sample, item)
        return sample


def crop_sample(picture: Image.Image, mask: Image.Image | None, window: Window, crop: int, path: Path | None = None) -> dict:
    """Cut `window` out of picture and mask and pad to `crop`; see `TrainSet` for the result."""
    width, height = window.size
    left, top, right, bottom = window.box
    window_image = window
    if 2 * width <= right - left + 1 and 2 * height <= bottom - top + 1:
        if picture.draft(
            "RGB", (max(1, picture.width // 2), max(1, picture.height // 2))
        ):  # JPEG only: skips most of the decoding
            window_image = replace(window, box=(left // 2, top // 2, (right + 1) // 2, (bottom + 1) // 2))
    part = cut(decode(picture, path), window_image, "bilinear")
    image, valid_mask = torch.zeros(crop, crop, 3, dtype=torch.uint8), torch.zeros(crop, crop, dtype=torch.bool)
    image[:height, :width] = part
    valid_mask[:height, :width] = True
    sample = {"image": image, "valid_mask": valid_mask}
    if mask is not None:
        sample["target"] = torch.full((crop, crop), IGNORE, dtype=torch.uint8)
        sample["target"][:height, :width] = cut(mask, window, "nearest-exact")
    return sample


class EvalSet(Dataset):
    """Whole pictures: `image` (H,W,3) uint8, `name`, and `target` (H,W) uint8 with 255 where ignored, if there is a mask."""

    def __init__(self, data: DataSource, items: tuple[Item, ...]):
        self.data, self.items, self.table = data, items, np.array(data.label_map, np.uint8)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        item = self.items[index]
        picture, mask = read(item, self.data, self.table)
        picture = to_rgb(picture, item.image)
        sample = {"image": torch.from_numpy(np.array(picture)), "name": item.name}
        return sample if mask is None else {**sample, "target": torch.from_numpy(np.array(mask))}


def _loader(dataset: Dataset, args: argparse.Namespace, **options) -> DataLoader:
    """A DataLoader that never draws from the global random generator and whose workers leave Ctrl-C to the main process."""
    extra = {"prefetch_factor": 4, "persistent_workers": True} if args.workers else {}
    return DataLoader(
        dataset, num_workers=args.workers, pin_memory=args.device.startswith("cuda"), generator=torch.Generator(),
        worker_init_fn=ignore_interrupts, **extra, **options,
    )  # fmt: skip


def train_loader(
    data: DataSource,
    items: tuple[Item, ...],
    stream: int,
    args: argparse.Namespace,
    rt: Runtime,
    start: int,
    stop: int,
    strong: Callable[[dict, Item], dict] | None = None,
) -> DataLoader:
    """Batches of `items` for iterations `start` to `stop`.

    Args:
        data: the data set.
        items: labelled or unlabelled pictures.
        stream: number of the random stream; loaders with different numbers are independent shuffles and augmentations.
        args: `crop_size`, `scale`, `batch_size`, `seed`, `workers`, `device`.
        rt: the process (rank and world size).
        start: first iteration.
        stop: one past the last.
        strong: further augmentation of a sample, see `TrainSet`.
    """
    if not items:
        raise InputError(
            f"{data.protocol}: no unlabelled picture is left for this method; use supervised.py, or a smaller --split"
        )
    augment = WeakAugment(args.crop_size, scale_rule(args.scale))
    dataset = TrainSet(data, items, augment, args.seed, stream, strong)
    sampler = StreamSampler(len(items), args.batch_size, args.seed, stream, start, stop, rt.rank, rt.world)
    return _loader(dataset, args, batch_sampler=sampler)


def eval_loader(data: DataSource, items: tuple[Item, ...], args: argparse.Namespace, rt: Runtime) -> DataLoader:
    """This process's share of whole pictures, none twice: rank r takes every world-th picture."""
    return _loader(EvalSet(data, items[rt.rank :: rt.world]), args, batch_size=data.val_batch)


def equal_size_loader(
    data: DataSource, items: tuple[Item, ...], args: argparse.Namespace, rt: Runtime, pixels: int = 2_000_000
) -> DataLoader:
    """This process's share of whole pictures, as `eval_loader`, in batches of one size: up to 8, and up to `pixels` in all."""
    mine = items[rt.rank :: rt.world]
    groups: dict[tuple[int, int], list[int]] = {}
    for index, item in enumerate(mine):
        size = open_picture(item.image).size if isinstance(item.image, Path) else (shapes.SIZE, shapes.SIZE)
        groups.setdefault(size, []).append(index)
    batches = []
    for (width, height), group in groups.items():
        count = min(8, max(1, pixels // (width * height)))
        batches += [group[start : start + count] for start in range(0, len(group), count)]
    return _loader(EvalSet(data, mine), args, batch_sampler=batches)


# ------------------------------------------------------------------------------------------------------------ benchmark


def usual_pipeline(path: Path, crop: int, factor: float) -> torch.Tensor:
    """What most code bases do: decode, resize the whole picture, crop, float tensor, normalise on the CPU."""
    from torchvision.transforms.v2 import functional as tv

    picture = Image.open(path).convert("RGB")
    picture = picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.BILINEAR)
    left, top = (int(torch.randint(max(0, side - crop) + 1, ())) for side in picture.size)
    picture = picture.crop((left, top, left + crop, top + crop))
    tensor = tv.to_dtype(tv.pil_to_tensor(picture), torch.float32, scale=True)
    return tv.normalize(tensor, list(IMAGENET_MEAN), list(IMAGENET_STD))


def our_pipeline(path: Path, crop: int, factor: float) -> dict:
    """What `TrainSet` does with an unlabelled picture; normalising is left to the device."""
    picture = open_picture(path)
    return crop_sample(picture, None, WeakAugment(crop, ScaleFrom((factor,))).draw(*picture.size), crop, path)


def benchmark(count: int = 24, rounds: int = 5) -> None:
    """Print pictures per second and core of both ways, on pictures with the spectrum of photographs (1/f noise)."""
    torch.set_num_threads(1)
    scale = ScaleFrom((0.5, 0.75, 1.0, 1.5, 1.75, 2.0))
    print(f"{'pictures':<34}{'usual':>10}{'here':>10}{'ratio':>8}    (a second and core, median of {rounds} x {count})")
    for label, (width, height), crop, suffix, slope in (  # slopes that give the sets' own file sizes
        ("VOC 500x375 JPEG, crop 321", (500, 375), 321, "jpg", 1.0),
        ("Cityscapes 2048x1024 PNG, crop 769", (2048, 1024), 769, "png", 1.6),
        ("Cityscapes 2048x1024 JPEG, crop 769", (2048, 1024), 769, "jpg", 1.6),
    ):
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{index}.{suffix}" for index in range(4)]
            for index, path in enumerate(paths):
                natural_picture(width, height, index, slope).save(path, quality=90)
            rates: dict = {usual_pipeline: [], our_pipeline: []}
            for _ in range(rounds):  # taking turns, so that neither has the quieter machine
                factors = [scale(width, height) for _ in range(count)]  # the same for both
                for work in rates:
                    began = time.perf_counter()
                    for index, factor in enumerate(factors):
                        work(paths[index % len(paths)], crop, factor)
                    rates[work].append(count / (time.perf_counter() - began))
            slow, fast = (float(np.median(values)) for values in rates.values())
            print(f"{label:<34}{slow:>10.1f}{fast:>10.1f}{fast / slow:>7.2f}x")


def natural_picture(width: int, height: int, seed: int, slope: float) -> Image.Image:
    """A picture whose spectrum falls with frequency as that of photographs does, so that it compresses alike."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / math.hypot(width, height)
    noise = np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency**slope
    field = np.fft.irfft2(noise, s=(height, width)).transpose(1, 2, 0)
    return Image.fromarray(((field - field.min()) / np.ptp(field) * 255).astype(np.uint8))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--benchmark", action="store_true", help="measure loading speed and print a table")
    benchmark() if parser.parse_args().benchmark else parser.print_help()
