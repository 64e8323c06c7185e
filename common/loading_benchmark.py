"""Images that one core loads in a second: the code here against the usual PIL pipeline.

    python -m common.loading_benchmark

prints a table for images and crops of VOC's and of Cityscapes' sizes, without and with masks. The
images are noise that compresses as photographs do, written to a temporary folder.
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.augment import IMAGENET_MEAN, IMAGENET_STD, ScaleFrom, WeakAugment
from common.data import Key, TrainSet
from common.source import DataSource, Item

SCALES = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)  # CPS's
MASK_SLOPE = 3.0  # of the noise whose levels are the classes: masks of 3 and 25 kB


class Case(NamedTuple):
    """Images to load.

    Attributes:
        label: what stands in the table.
        size: (width, height) in pixels.
        crop: side of the crop, pixels.
        suffix: "jpg" or "png".
        slope: how steeply the spectrum falls, see `noise`; chosen so that files are as large as the
            data set's own.
        classes: in a mask.
    """

    label: str
    size: tuple[int, int]
    crop: int
    suffix: str
    slope: float
    classes: int


CASES = (
    Case("VOC 500x375 JPEG, crop 321", (500, 375), 321, "jpg", 1.0, 3),
    Case("Cityscapes 2048x1024 PNG, crop 769", (2048, 1024), 769, "png", 1.6, 8),
    Case("Cityscapes 2048x1024 JPEG, crop 769", (2048, 1024), 769, "jpg", 1.6, 8),
)


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
        self.dataset.items = (item,)
        self.dataset.augment = WeakAugment(crop, ScaleFrom((factor,)))
        return self.dataset[Key(index=0, epoch=0, position=self.calls)]


def write_items(folder: Path, case: Case) -> list[Item]:
    """Four images of a case with masks, as files."""
    items = []
    for index in range(4):
        image, mask = folder / f"{index}.{case.suffix}", folder / f"mask{index}.png"
        pixels = 255 * noise(*case.size, 3, index, case.slope)
        Image.fromarray(pixels.astype(np.uint8)).save(image, quality=90)

        levels = noise(*case.size, 1, index, MASK_SLOPE)[..., 0]
        labels = (case.classes * levels).clip(max=case.classes - 1)
        Image.fromarray(labels.astype(np.uint8)).save(mask)
        items.append(Item(str(index), image, mask))
    return items


def noise(width: int, height: int, channels: int, seed: int, slope: float) -> np.ndarray:
    """Values in [0,1], (H,W,channels), whose spectrum falls as that of photographs does.

    A frequency f has the amplitude f^-slope.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency += 1 / math.hypot(width, height)
    spectrum = np.fft.rfft2(rng.normal(size=(channels, height, width))) / frequency**slope
    field = np.fft.irfft2(spectrum, s=(height, width)).transpose(1, 2, 0)
    return (field - field.min()) / np.ptp(field)


def benchmark(count: int = 24, rounds: int = 5) -> None:
    """Print images a second of both ways on one core, without and with masks.

    Args:
        count: images a round.
        rounds: whose median is printed.
    """
    torch.set_num_threads(1)
    ours = OurPipeline()
    threads = f"{torch.get_num_threads()} thread on {os.cpu_count()} cores"
    print(f"images a second of processor time, {threads}, median of {rounds} x {count}")
    print(f"{'images':<37}{'':<12}{'usual':>8}{'here':>8}{'ratio':>8}")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            labelled = write_items(Path(folder), case)
            unlabelled = [replace(item, mask=None) for item in labelled]
            for kind, items in (("unlabelled", unlabelled), ("labelled", labelled)):
                slow, fast = rates((usual_pipeline, ours), items, case.crop, count, rounds)
                numbers = f"{slow:>8.1f}{fast:>8.1f}{fast / slow:>7.2f}x"
                print(f"{case.label:<37}{kind:<12}{numbers}", flush=True)


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    benchmark()
