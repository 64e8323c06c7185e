"""Where the images and masks of each data set lie, and which of the images are labelled.

To add a data set, write a function `args -> DataSource` like `camvid` below, add it to `DATASETS`
at the end, and give it a line in the `PRESETS` of each script. Only `common.compare` needs one more
line, in its `SHARED`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import InputError, shapes, source
from common.download import download_camvid, download_voc
from common.folder import folder
from common.source import (
    IMAGE_SUFFIXES,
    DataSource,
    Item,
    check_files,
    data_dir,
    divide,
    images_in,
    map_labels,
    read_list,
    voc_colours,
    with_masks,
)

CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
    "bicyclist",
)  # fmt: skip
CAMVID_COLOURS = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip
CAMVID_VOID = 11

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip

# (name, label id, colour); the position is the train id.
CITYSCAPES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic_light", 19, (250, 170, 30)),
    ("traffic_sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
CITYSCAPES_CLASSES, CITYSCAPES_LABEL_IDS, CITYSCAPES_COLOURS = zip(*CITYSCAPES)

def load(args: argparse.Namespace) -> DataSource:
    """The data set of `args.data`, whose files are all there.

    Raises:
        InputError: a folder, list or file is missing, no image is labelled, or a list names ids
            that are no training images.
    """
    data = DATASETS[args.data].source(args)
    if not data.labelled:
        raise InputError(
            f"{args.data}: the labelled set is empty; check --split and --labelled-list"
        )
    items = (*data.labelled, *data.unlabelled, *data.val, *data.audit)
    check_files(path for item in items for path in (item.image, item.mask))
    return data

# -------------------------------------------------------------------------------------- data sets


def shapes_source(args: argparse.Namespace) -> DataSource:
    """The built-in images (`common/shapes.py`), of the variant that `args.data` names.

    The masks of the unlabelled ones are always there to measure pseudo-labels with.
    """
    args = argparse.Namespace(**{**vars(args), "measure_pseudo_labels": True})
    numbers = shapes.numbers(args.data)
    items = [Item(f"shape{number:04d}", number, number) for number in numbers]
    return DataSource(
        args.data,
        shapes.CLASSES,
        shapes.COLOURS,
        val=tuple(items[shapes.TRAIN :]),
        background=0,
        val_batch=32,
        **divide(args, items[: shapes.TRAIN], None),
    )


def camvid(args: argparse.Namespace) -> DataSource:
    """CamVid in the SegNet tutorial's layout: `train/`, `trainannot/`, `val/` and `valannot/`."""
    root = data_dir(args, "add --download to fetch CamVid, or give its place with --data-dir")
    if args.download:
        download_camvid(root)

    def part(name: str) -> list[Item]:
        found = images_in(root / name)
        if not found:
            raise InputError(
                f"no images in {root / name}; "
                "CamVid's folder holds train, trainannot, val and valannot"
            )
        return with_masks(found, root / f"{name}annot")

    return DataSource(
        "camvid",
        CAMVID_CLASSES,
        CAMVID_COLOURS,
        val=tuple(part("val")),
        label_map=map_labels({CAMVID_VOID: 255}),
        val_batch=4,
        **divide(args, part("train"), None),
    )


def voc(args: argparse.Namespace) -> DataSource:
    """PASCAL VOC 2012 with SBD's masks: the 10582 images of train_aug, 1449 for validation."""
    place = "give the VOC2012 or VOCdevkit folder with --data-dir"
    root = data_dir(args, f"add --download to fetch VOC 2012 and SBD, or {place}")
    lists = source.SPLITS / "voc"
    train, val = read_list(lists / "train.txt"), read_list(lists / "val.txt")
    if args.download:
        base = voc_base(root) or root / "VOCdevkit" / "VOC2012"  # where the archive will put it
        own = (*read_list(lists / "1464.txt"), *val)
        download_voc(root, base, (*train, *val), own, voc_colours(256))
    base = voc_base(root)
    if base is None:
        raise InputError(f"no JPEGImages folder in {root}; {place}")
    augmented = {path.stem for path in (base / "SegmentationClassAug").glob("*.png")}

    def item(name: str) -> Item:
        # VOC's own 1464 training images, and those for validation, need no SBD.
        masks = "SegmentationClassAug" if name in augmented else "SegmentationClass"
        return Item(name, base / "JPEGImages" / f"{name}.jpg", base / masks / f"{name}.png")

    return DataSource(
        "voc",
        VOC_CLASSES,
        voc_colours(21),
        val=tuple(item(name) for name in val),
        background=0,
        published=True,
        **divide(args, [item(name) for name in train], "voc"),
    )


def voc_base(root: Path) -> Path | None:
    """The VOC2012 folder in, at or below `root`."""
    candidates = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    return next((path for path in candidates if (path / "JPEGImages").is_dir()), None)


def cityscapes(args: argparse.Namespace) -> DataSource:
    """Cityscapes' fine masks: `leftImg8bit/` and `gtFine/`.

    The masks are those of labelTrainIds if there are any, else those of labelIds. `--extra coarse`
    adds unlabelled images of train_extra.
    """
    root = data_dir(
        args,
        "Cityscapes needs a registration at cityscapes-dataset.com; "
        "give the folder of leftImg8bit and gtFine with --data-dir",
    )
    train, val = cityscapes_images(root, "train"), cityscapes_images(root, "val")
    if not train or not val:
        raise InputError(
            f"no images *_leftImg8bit.png in {root}/leftImg8bit/train/CITY or val/CITY"
        )
    has_train_ids = any((root / "gtFine" / "train").glob("*/*_gtFine_labelTrainIds.png"))
    kind = "labelTrainIds" if has_train_ids else "labelIds"

    def items(part: str, found: dict[str, Path]) -> list[Item]:
        masks = root / "gtFine" / part
        return [
            Item(name, path, masks / path.parent.name / f"{name}_gtFine_{kind}.png")
            for name, path in found.items()
        ]

    fields = divide(args, items("train", train), "cityscapes")
    if args.extra == "coarse":
        fields["unlabelled"] += cityscapes_extra(args, root)
        fields["protocol"] += f" + {args.extra_count} of train_extra"
    label_map = tuple(range(256))
    if not has_train_ids:
        train_ids = {label: index for index, label in enumerate(CITYSCAPES_LABEL_IDS)}
        label_map = map_labels(train_ids, rest=255)
    return DataSource(
        "cityscapes",
        CITYSCAPES_CLASSES,
        CITYSCAPES_COLOURS,
        val=tuple(items("val", val)),
        label_map=label_map,
        published=True,
        **fields,
    )


def cityscapes_images(root: Path, part: str) -> dict[str, Path]:
    """The images leftImg8bit/PART/CITY/ID_leftImg8bit.* by their ids, sorted."""
    found = sorted((root / "leftImg8bit" / part).glob("[!.]*/[!.]*_leftImg8bit.*"))
    return {
        path.stem.removesuffix("_leftImg8bit"): path
        for path in found
        if path.suffix.lower() in IMAGE_SUFFIXES
    }


def cityscapes_extra(args: argparse.Namespace, root: Path) -> tuple[Item, ...]:
    """`extra_count` images of train_extra, without masks, chosen at random by the seed.

    Raises:
        InputError: there are fewer.
    """
    found = cityscapes_images(root, "train_extra")
    if len(found) < args.extra_count:
        raise InputError(
            f"--extra-count {args.extra_count}: only {len(found)} images "
            f"in {root}/leftImg8bit/train_extra"
        )
    rng = np.random.default_rng(args.seed)
    chosen = rng.choice(len(found), args.extra_count, replace=False)
    names = list(found)
    return tuple(Item(names[index], found[names[index]]) for index in sorted(chosen))

class DataSet(NamedTuple):
    """What the command line must know of a data set.

    Attributes:
        source: makes the `DataSource` from the settings.
        split: the default of `--split`.
        workers: the default of `--workers`; None for as many as the machine has cores, up to 4.
        download: whether `--download` can fetch it.
        extra: whether `--extra` can add unlabelled images.
    """

    source: Callable[[argparse.Namespace], DataSource]
    split: str = "1/8"
    workers: int | None = None
    download: bool = False
    extra: bool = False


DATASETS = {
    "shapes": DataSet(shapes_source, workers=0),  # drawn once: worker processes only cost time
    "shapes-zipf": DataSet(shapes_source, workers=0),
    "camvid": DataSet(camvid, download=True),
    "voc": DataSet(voc, download=True),
    "cityscapes": DataSet(cityscapes, extra=True),
    "folder": DataSet(folder, split="all"),
}
