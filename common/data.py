"""Cropping and batching.

Which files belong to a data set stands in `datasets.py`, how a file is read in `images.py`, and
what is checked before training in `check.py`.

A training sample is decided by (seed, stream, epoch, position) alone: the same whatever the number of workers or processes,
and a run that resumes at iteration k asks for exactly the samples that iteration k would have got.

    python -m common.data --benchmark     images a second and core, against the usual PIL pipeline
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common import InputError, check, datasets, shapes
from common.augment import IGNORE, IMAGENET_MEAN, IMAGENET_STD, ScaleFrom, WeakAugment, Window, fit, scale_rule
from common.datasets import DataSource, Item
from common.images import Drawn, ImageFile, LabelTable, naming_if_too_large, open_image, open_mask
from common.runtime import Runtime, derive_seed, ignore_interrupts


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


def read(item: Item) -> tuple[ImageFile | Drawn, ImageFile | Drawn | None]:
    """The image and the mask of an item, opened and maybe not yet decoded."""
    if isinstance(item.image, int):
        pixels, target = shapes.draw(item.image)
        image, mask = Drawn(pixels), Drawn(target) if isinstance(item.mask, int) else None
    else:
        image, mask = open_image(item.image), None
    return image, open_mask(item.mask, image) if isinstance(item.mask, Path) else mask


class Labels:
    """Looks up the labels of masks.

    The values of a data set's own masks are mapped; those of a pseudo-mask are labels already.
    """

    def __init__(self, data: DataSource):
        self.own = LabelTable(data.label_map, data.num_classes)
        self.pseudo = LabelTable(range(256), data.num_classes)

    def of(self, item: Item, values: np.ndarray) -> Tensor:
        """Labels (H,W) uint8 of the values in an item's mask.

        Raises:
            InputError: a label that is neither a class nor 255.
        """
        table = self.pseudo if item.pseudo else self.own
        return torch.from_numpy(table.look_up(values, item.mask))


def load_data(args: argparse.Namespace, rt: Runtime) -> DataSource:
    """The data set of `args.data`, with the checks of `datasets.load` and of `check`.

    Raises:
        InputError: what `datasets.load` and `check` raise, or a crop too large.
    """
    data = datasets.load(args)
    sizes = check.files(data, rt)
    check.masks(data, rt)
    check.note_shared_images(data, rt)

    def sizes_of(*items: Item) -> set[tuple[int, int]]:
        return {sizes.get(item.image, (shapes.SIZE, shapes.SIZE)) for item in items}

    largest = max(max(size) for size in sizes_of(*data.labelled, *data.val))
    if args.crop_size > 2 * largest:
        raise InputError(f"--crop-size {args.crop_size} is more than twice the pictures' longest side, {largest}; lower it")
    if len(sizes_of(*data.val, *data.audit)) > 1:
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
        self.items, self.augment, self.seed, self.stream, self.strong = items, augment, seed, stream, strong
        self.labels = Labels(data)

    def __getitem__(self, key: Key) -> dict:
        item = self.items[key.index]
        with naming_if_too_large(item.image), torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would reseed CUDA too, and dropout with it, when there are no workers.
            torch.default_generator.manual_seed(derive_seed(self.seed, self.stream, key.epoch, key.position))
            image, mask = read(item)
            window = self.augment.draw(*image.size)
            sample = {"name": item.name, **crop_image(image, window, self.augment.crop)}
            if mask is not None:
                sample["target"] = crop_target(mask, item, self.labels, window, self.augment.crop)
            if self.strong:
                sample = self.strong(sample, item)
        return sample


def crop_image(image: ImageFile | Drawn, window: Window, crop: int) -> dict:
    """`image` and `valid_mask` of a sample: the window of an image, padded to `crop`."""
    width, height = window.size
    left, top, right, bottom = box = window.box
    if 2 * width <= right - left + 1 and 2 * height <= bottom - top + 1 and image.halve():
        box = left // 2, top // 2, (right + 1) // 2, (bottom + 1) // 2
    pixels = torch.zeros(crop, crop, 3, dtype=torch.uint8)
    pixels[:height, :width] = fit(image.pixels(box), window, "bilinear")
    valid_mask = torch.zeros(crop, crop, dtype=torch.bool)
    valid_mask[:height, :width] = True
    return {"image": pixels, "valid_mask": valid_mask}


def crop_target(
    mask: ImageFile | Drawn, item: Item, labels: Labels, window: Window, crop: int
) -> Tensor:
    """`target` of a sample: the labels under the window, padded with 255 to `crop`.

    Only these are looked up, not the whole mask.
    """
    width, height = window.size
    values = fit(torch.from_numpy(mask.values(window.box)), window, "nearest-exact")
    target = torch.full((crop, crop), IGNORE, dtype=torch.uint8)
    target[:height, :width] = labels.of(item, values.numpy())
    return target


class EvalSet(Dataset):
    """Whole images: `image` (H,W,3) uint8, `name`, and `target` (H,W) uint8 with 255 where ignored, if there is a mask."""

    def __init__(self, data: DataSource, items: tuple[Item, ...]):
        self.items, self.labels = items, Labels(data)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        item = self.items[index]
        with naming_if_too_large(item.image):
            image, mask = read(item)
            sample = {"image": image.pixels(), "name": item.name}
            if mask is not None:
                sample["target"] = self.labels.of(item, mask.values())
        return sample


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
        size = open_image(item.image).size if isinstance(item.image, Path) else (shapes.SIZE, shapes.SIZE)
        groups.setdefault(size, []).append(index)
    batches = []
    for (width, height), group in groups.items():
        count = min(8, max(1, pixels // (width * height)))
        batches += [group[start : start + count] for start in range(0, len(group), count)]
    return _loader(EvalSet(data, mine), args, batch_sampler=batches)


# ------------------------------------------------------------------------------------------------------------ benchmark

# Name, (width, height), crop, suffix, slope of the spectrum, classes in a
# mask. The slopes give the sets' own file sizes.
BENCHMARKS = (
    ("VOC 500x375 JPEG, crop 321", (500, 375), 321, "jpg", 1.0, 3),
    ("Cityscapes 2048x1024 PNG, crop 769", (2048, 1024), 769, "png", 1.6, 8),
    ("Cityscapes 2048x1024 JPEG, crop 769", (2048, 1024), 769, "jpg", 1.6, 8),
)
MASK_SLOPE = 3.0  # of the noise whose levels are the classes: masks of 3 and 25 kB
SCALES = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)  # CPS's


def usual_pipeline(item: Item, crop: int, factor: float) -> tuple[Tensor, ...]:
    """What most code bases do: decode, resize the whole image, crop, normalise on the CPU."""
    from torchvision.transforms.v2 import functional as tv

    image = Image.open(item.image).convert("RGB")
    size = round(image.width * factor), round(image.height * factor)
    left, top = (int(torch.randint(max(0, side - crop) + 1, ())) for side in size)
    box = left, top, left + crop, top + crop
    image = image.resize(size, Image.Resampling.BILINEAR).crop(box)
    tensor = tv.to_dtype(tv.pil_to_tensor(image), torch.float32, scale=True)
    tensor = tv.normalize(tensor, list(IMAGENET_MEAN), list(IMAGENET_STD))
    if item.mask is None:
        return (tensor,)
    mask = Image.open(item.mask).resize(size, Image.Resampling.NEAREST).crop(box)
    return tensor, torch.from_numpy(np.array(mask)).long()


class OurPipeline:
    """What `TrainSet` does with an item; normalising is left to the device."""

    def __init__(self):
        data = DataSource("benchmark", tuple("abcdefgh"), (), (), (), (), "benchmark")
        self.dataset = TrainSet(data, (), WeakAugment(1, ScaleFrom((1.0,))), seed=0, stream=0)
        self.calls = 0

    def __call__(self, item: Item, crop: int, factor: float) -> dict:
        self.calls += 1
        self.dataset.items, self.dataset.augment = (item,), WeakAugment(crop, ScaleFrom((factor,)))
        return self.dataset[Key(index=0, epoch=0, position=self.calls)]


def write_items(
    folder: Path, size: tuple[int, int], suffix: str, slope: float, classes: int
) -> list[Item]:
    """Four images with masks, as files."""
    items = []
    for index in range(4):
        image, mask = folder / f"{index}.{suffix}", folder / f"mask{index}.png"
        pixels = 255 * noise(*size, 3, index, slope)
        Image.fromarray(pixels.astype(np.uint8)).save(image, quality=90)
        labels = (classes * noise(*size, 1, index, MASK_SLOPE)[..., 0]).clip(max=classes - 1)
        Image.fromarray(labels.astype(np.uint8)).save(mask)
        items.append(Item(str(index), image, mask))
    return items


def noise(width: int, height: int, channels: int, seed: int, slope: float) -> np.ndarray:
    """Values in [0,1], (H,W,channels), whose spectrum falls as that of photographs does."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency += 1 / math.hypot(width, height)
    spectrum = np.fft.rfft2(rng.normal(size=(channels, height, width))) / frequency**slope
    field = np.fft.irfft2(spectrum, s=(height, width)).transpose(1, 2, 0)
    return (field - field.min()) / np.ptp(field)


def benchmark(count: int = 24, rounds: int = 5) -> None:
    """Print images a second of both ways on one core, without and with masks.

    The images are noise that compresses as photographs do.
    """
    torch.set_num_threads(1)
    ours = OurPipeline()
    threads = f"{torch.get_num_threads()} thread on {os.cpu_count()} cores"
    print(f"images a second of processor time, {threads}, median of {rounds} x {count}")
    print(f"{'images':<37}{'':<12}{'usual':>8}{'here':>8}{'ratio':>8}")
    for label, size, crop, suffix, slope, classes in BENCHMARKS:
        with tempfile.TemporaryDirectory() as folder:
            labelled = write_items(Path(folder), size, suffix, slope, classes)
            unlabelled = [replace(item, mask=None) for item in labelled]
            for kind, items in (("unlabelled", unlabelled), ("labelled", labelled)):
                slow, fast = rates((usual_pipeline, ours), items, crop, count, rounds)
                numbers = f"{slow:>8.1f}{fast:>8.1f}{fast / slow:>7.2f}x"
                print(f"{label:<37}{kind:<12}{numbers}", flush=True)


def rates(
    ways: tuple[Callable, ...], items: list[Item], crop: int, count: int, rounds: int
) -> list[float]:
    """Items a second of each way of loading.

    The median over rounds, in which the ways take turns on the same scales.
    """
    found: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        factors = [ScaleFrom(SCALES)(0, 0) for _ in range(count)]
        for way, values in zip(ways, found):
            began = time.process_time()  # what other programs take from the machine does not count
            for index, factor in enumerate(factors):
                way(items[index % len(items)], crop, factor)
            values.append(count / (time.process_time() - began))
    return [float(np.median(values)) for values in found]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--benchmark", action="store_true", help="measure loading speed and print a table")
    benchmark() if parser.parse_args().benchmark else parser.print_help()
