"""Cropping and batching.

Which files belong to a data set stands in `datasets.py`, how a file is read in `images.py`, and
what is checked before training in `check.py`.

A training sample is decided by (seed, stream, epoch, position) alone. It is the same whatever the
number of workers or processes, and a run that resumes at iteration k asks for exactly the samples
that iteration k would have got.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common import InputError, check, checkpoint, datasets, distributed, shapes
from common.augment import IGNORE, WeakAugment, Window, fit, scale_rule
from common.images import (
    Box,
    Drawn,
    ImageFile,
    LabelTable,
    Range,
    Shrunk,
    naming_if_too_large,
    open_mask,
    open_shrunk,
    working_size,
)
from common.runtime import derive_seed, ignore_interrupts
from common.source import DataSource, Item

BATCH_IMAGES = 8  # of `equal_size_loader`, at most
BATCH_PIXELS = 2_000_000  # of `equal_size_loader`, in all images of a batch


class Key(NamedTuple):
    """Which sample: image `index`, at `position` of the shuffled list of `epoch`."""

    index: int
    epoch: int
    position: int


class StreamSampler(Sampler):
    """Batches of `Key`s from shuffled lists of all images, one list (an epoch) after another.

    A global batch takes the next `batch * world` positions and rank r the r-th share of them, so
    that the samples of an iteration do not depend on the number of processes. A list shorter than a
    batch simply comes round again.

    Args:
        count: number of images.
        batch: images a process and iteration.
        seed: the run's.
        stream: number of the random stream; streams are shuffled independently.
        start: first iteration.
        stop: one past the last.
        rank: number of this process.
        world: number of processes.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        seed: int,
        stream: int,
        start: int,
        stop: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.count, self.batch = count, batch
        self.seed, self.stream = seed, stream
        self.start, self.stop = start, stop
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        orders: dict[int, list[int]] = {}  # epoch -> shuffled list
        for iteration in range(self.start, self.stop):
            first = (iteration * self.world + self.rank) * self.batch
            keys = []
            for number in range(first, first + self.batch):
                epoch, position = divmod(number, self.count)
                if epoch not in orders:
                    orders = {key: order for key, order in orders.items() if key >= epoch - 1}
                    orders[epoch] = self.shuffled(epoch)
                keys.append(Key(orders[epoch][position], epoch, position))
            yield keys

    def shuffled(self, epoch: int) -> list[int]:
        """The numbers of all images in the order of an epoch."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.stream, epoch))
        return torch.randperm(self.count, generator=generator).tolist()


Opened = ImageFile | Drawn | Shrunk


def read(item: Item, data: DataSource) -> tuple[Opened, Opened | None]:
    """The image and the mask of an item, opened and maybe not yet decoded.

    Both are shrunk where the image is larger than the data set wants. A pseudo-mask was made from
    the shrunk image and has its size.

    Raises:
        InputError: a file that cannot be read, or a mask that does not fit the image.
    """
    if isinstance(item.image, int):
        pixels, target = shapes.draw(item.image)
        image, mask = Drawn(pixels), Drawn(target) if isinstance(item.mask, int) else None
    else:
        image, mask = open_shrunk(item.image, data.long_side, data.grey_range), None
    if not isinstance(item.mask, Path):
        return image, mask
    if isinstance(image, Shrunk) and not item.pseudo:
        return image, Shrunk(open_mask(item.mask, image.file), image.size)
    return image, open_mask(item.mask, image)


class Labels:
    """Looks up the labels of masks.

    The values or colours of a data set's own masks are mapped; the values of a pseudo-mask are
    labels already.
    """

    def __init__(self, data: DataSource):
        self.own = data.label_table()
        self.pseudo = LabelTable(range(256), data.num_classes)

    def of(self, item: Item, mask: Opened, box: Box | None = None) -> Tensor:
        """Labels (H,W) uint8 in an item's mask, or in its part under `box`.

        Raises:
            InputError: a value or colour that is neither a class nor ignored.
        """
        table = self.pseudo if item.pseudo else self.own
        return torch.from_numpy(table.read(mask, box))


def load_data(args: argparse.Namespace) -> DataSource:
    """The data set of `args.data`, with the checks of `datasets.load` and of `check`.

    Raises:
        InputError: what `datasets.load` and `check` raise, or a crop too large.
    """
    data = replace(datasets.load(args), long_side=args.long_side)
    looks = check.files(data)
    check.note_unread(looks)
    data = replace(data, grey_range=known_grey_range(args) or check.grey_range(data, looks))
    check.masks(data)
    check.note_shared_images(data)

    def sizes_of(*items: Item) -> set[tuple[int, int]]:
        files = [item.image for item in items if isinstance(item.image, Path)]
        drawn = {(shapes.SIZE, shapes.SIZE)} if len(files) < len(items) else set()
        return drawn | {working_size(looks[file].size, data.long_side) for file in files}

    longest = max(max(size) for size in sizes_of(*data.labelled, *data.val))
    if args.crop_size > 2 * longest:
        raise InputError(
            f"--crop-size {args.crop_size} is more than twice the images' longest side, {longest}; "
            "lower it"
        )
    if len(sizes_of(*data.val, *data.audit)) > 1:
        data = replace(data, val_batch=1)
    return data


def known_grey_range(args: argparse.Namespace) -> Range | None:
    """That of a run which is resumed: images may have been taken away since.

    While the first stage of ST or ST++ trains, it alone has one.
    """
    if not getattr(args, "resume", False):
        return None
    run = Path(args.output_dir)
    for folder in (run, run / "stage-1"):
        if (folder / "args.json").is_file():
            found = checkpoint.read_description(folder).get("grey_range")
            if found:
                return tuple(found)
    return None


class TrainSet(Dataset):
    """Randomly cropped images; its indices are `Key`s.

    A sample is a dict:
        image       (crop,crop,3) uint8 RGB
        valid_mask  (crop,crop) bool, False on the padding at the right and the bottom
        name        the image's id
        target      (crop,crop) uint8, 255 where ignored or padded; of labelled images alone

    Args:
        data: the data set.
        items: its images to train on.
        augment: draws the windows.
        seed: the run's.
        stream: number of the random stream.
        strong: gets the sample and its item and returns the sample to use.
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
        self.data, self.items = data, items
        self.augment, self.strong = augment, strong
        self.seed, self.stream = seed, stream
        self.labels = Labels(data)

    def __getitem__(self, key: Key) -> dict:
        item = self.items[key.index]
        seed = derive_seed(self.seed, self.stream, key.epoch, key.position)
        with naming_if_too_large(item.image), torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would reseed CUDA too, and dropout with it, when there
            # are no workers.
            torch.default_generator.manual_seed(seed)
            image, mask = read(item, self.data)
            window = self.augment.draw(*image.size)
            sample = {"name": item.name, **crop_image(image, window, self.augment.crop)}
            if mask is not None:
                sample["target"] = crop_target(mask, item, self.labels, window, self.augment.crop)
            if self.strong:
                sample = self.strong(sample, item)
        return sample


def crop_image(image: Opened, window: Window, crop: int) -> dict:
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


def crop_target(mask: Opened, item: Item, labels: Labels, window: Window, crop: int) -> Tensor:
    """`target` of a sample: the labels under the window, padded with 255 to `crop`.

    Only these are looked up, not the whole mask.
    """
    width, height = window.size
    target = torch.full((crop, crop), IGNORE, dtype=torch.uint8)
    part = labels.of(item, mask, window.box)
    target[:height, :width] = fit(part, window, "nearest-exact")
    return target


class EvalSet(Dataset):
    """Whole images.

    A sample is a dict of `image` (H,W,3) uint8 RGB, `name`, and, if there is a mask, `target` (H,W)
    uint8 with 255 where ignored.
    """

    def __init__(self, data: DataSource, items: tuple[Item, ...]):
        self.data, self.items, self.labels = data, items, Labels(data)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        item = self.items[index]
        with naming_if_too_large(item.image):
            image, mask = read(item, self.data)
            sample = {"image": image.pixels(), "name": item.name}
            if mask is not None:
                sample["target"] = self.labels.of(item, mask)
        return sample


def new_loader(dataset: Dataset, args: argparse.Namespace, **options) -> DataLoader:
    """A DataLoader that never draws from the global random generator.

    Its workers leave Ctrl-C to the main process. Of the settings it reads `workers` and `device`.
    """
    if args.workers:
        options |= {"prefetch_factor": 4, "persistent_workers": True}
    return DataLoader(
        dataset,
        num_workers=args.workers,
        pin_memory=args.device.startswith("cuda"),
        generator=torch.Generator(),
        worker_init_fn=ignore_interrupts,
        **options,
    )


def train_loader(
    data: DataSource,
    items: Sequence[Item],
    stream: int,
    args: argparse.Namespace,
    start: int,
    stop: int,
    strong: Callable[[dict, Item], dict] | None = None,
    order: int | None = None,
    scale: str | None = None,
) -> DataLoader:
    """This process's batches of `items` for iterations `start` to `stop`.

    Args:
        data: the data set.
        items: labelled or unlabelled images.
        stream: number of the random stream; loaders with different numbers are independent shuffles
            and augmentations.
        args: `crop_size`, `scale`, `batch_size`, `seed`, `workers`, `device`.
        start: first iteration.
        stop: one past the last.
        strong: further augmentation of a sample, see `TrainSet`.
        order: number of the stream whose shuffles to follow, None for its own: the batches then
            have the images of that stream in other windows.
        scale: rule of the random scale, None for that of `args`.

    Raises:
        InputError: there are no items.
    """
    if not items:
        raise InputError(
            f"{data.protocol}: no unlabelled image is left for this method; "
            "use supervised.py, or a smaller --split"
        )
    augment = WeakAugment(args.crop_size, scale_rule(scale or args.scale))
    dataset = TrainSet(data, items, augment, args.seed, stream, strong)
    rank, world = distributed.rank(), distributed.world_size()
    order = stream if order is None else order
    sampler = StreamSampler(len(items), args.batch_size, args.seed, order, start, stop, rank, world)
    return new_loader(dataset, args, batch_sampler=sampler)


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This process's share of images, none twice: rank r takes every world-th one."""
    return items[distributed.rank() :: distributed.world_size()]


def eval_loader(data: DataSource, items: Sequence[Item], args: argparse.Namespace) -> DataLoader:
    """This process's share of whole images."""
    return new_loader(EvalSet(data, share(items)), args, batch_size=data.val_batch)


def equal_size_loader(
    data: DataSource,
    items: Sequence[Item],
    args: argparse.Namespace,
    *,
    pixels: int = BATCH_PIXELS,
    shared: bool = True,
) -> DataLoader:
    """Whole images in batches of one size: up to 8 of them, and up to `pixels` in all.

    Args:
        data: the data set.
        items: the images.
        args: `workers` and `device`.
        pixels: of all images of a batch, at most; one image may have more.
        shared: whether the processes share the images; else each gets all of them.
    """
    mine = share(items) if shared else items
    groups: dict[tuple[int, int], list[int]] = {}
    for index, item in enumerate(mine):
        drawn = isinstance(item.image, int)
        size = (shapes.SIZE, shapes.SIZE)
        if not drawn:
            size = open_shrunk(item.image, data.long_side, data.grey_range).size
        groups.setdefault(size, []).append(index)
    batches = []
    for (width, height), group in groups.items():
        count = min(BATCH_IMAGES, max(1, pixels // (width * height)))
        batches += [group[start : start + count] for start in range(0, len(group), count)]
    return new_loader(EvalSet(data, mine), args, batch_sampler=batches)
