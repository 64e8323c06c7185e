"""Where the images and masks of each data set lie, and which of the images are labelled.

To add a data set, write a function `args -> DataSource` like `camvid` below, add it to `DATASETS`
at the end, and give it a line in the `PRESETS` of each script. Only `common.compare` needs one more
line, in its `SHARED`.
"""

import argparse
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import InputError, shapes
from common.download import download_camvid, download_voc

Colours = tuple[tuple[int, int, int], ...]  # an RGB triple a class

# The last two are JPEGs of another name.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".jpe")
OTHER_IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".cr2", ".dng", ".exr", ".gif", ".heic", ".heif", ".j2k", ".jp2", ".jxl",
    ".nef", ".pgm", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
# The path of an image file at the start of a line, without its suffix.
FIRST_PATH = re.compile(r"(.+?)\.(?:png|jpe?g|jfif|jpe)(?:\s|$)", re.IGNORECASE)
SPLITS = Path(__file__).parent / "splits"
AUDITED = 128  # unlabelled images on which pseudo-labels are measured

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


@dataclass(frozen=True)
class Item:
    """One image: its id, its file, and its mask where training or evaluation may open it.

    In `shapes` a number stands for the files.

    Attributes:
        name: the id.
        image: the file.
        mask: the file of its mask, None where there is none or it must not be opened.
        pseudo: whether a network made the mask. Its values are then labels already, whatever the
            values in the data set's own masks mean.
    """

    name: str
    image: Path | int
    mask: Path | int | None = None
    pseudo: bool = False


@dataclass(frozen=True)
class DataSource:
    """A data set with its labelled, unlabelled and validation images.

    Attributes:
        name: the value of `--data`.
        classes: class names; their number is the number of logits.
        colours: an RGB triple a class, for masks and figures.
        labelled, unlabelled, val: the images; unlabelled ones carry no mask.
        audit: unlabelled images with their masks, for measuring pseudo-labels only; empty unless
            asked for.
        protocol: one line that says which label list a run uses.
        background: the class that is no object, or None.
        label_map: 256 values, the label of each value in a mask file.
        val_batch: images evaluated at once; 1 where sizes differ.
        published: whether the sets' images are those of published lists. Where they are not, the
            sets may share images, which `check` looks for.
    """

    name: str
    classes: tuple[str, ...]
    colours: Colours
    labelled: tuple[Item, ...]
    unlabelled: tuple[Item, ...]
    val: tuple[Item, ...]
    protocol: str
    audit: tuple[Item, ...] = ()
    background: int | None = None
    label_map: tuple[int, ...] = tuple(range(256))
    val_batch: int = 1
    published: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def list_hash(self) -> str:
        """SHA-1 of the truly labelled ids, each once: tells two label lists of one size apart."""
        names = {item.name for item in self.labelled if not item.pseudo}
        return hashlib.sha1("\n".join(sorted(names)).encode()).hexdigest()


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


def check_files(paths: Iterable[Path | int | None]) -> None:
    """Check that files are there; what is not a path is left out.

    Raises:
        InputError: files are missing; five are named, the rest counted.
    """
    missing = [str(path) for path in paths if isinstance(path, Path) and not path.is_file()]
    if missing:
        raise InputError(f"{len(missing)} files are missing: {some(missing)}")


def some(names: list[str], separator: str = ", ") -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return separator.join(names[:5]) + more


# ------------------------------------------------------------------------------------ label lists


def read_list(path: Path, names: Container[str] = ()) -> list[str]:
    """Image ids of a list file, a line each, in order, without repeats.

    Lines may also be paths, as other repositories write them: the id in
    "JPEGImages/ID.jpg SegmentationClass/ID.png" and in ".../ID_leftImg8bit.png ..." is ID. Where
    images lie in subfolders, it is as much of the path as makes it one of `names`.

    Args:
        path: a text file.
        names: ids that there are.

    Raises:
        InputError: no such file, or not a text file.
    """
    if not path.is_file():
        raise InputError(f"no label list at {path}")
    found = []
    for line in read_lines(path):
        candidates = image_ids(line)
        found.append(next((name for name in candidates if name in names), candidates[-1]))
    return list(dict.fromkeys(found))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty, stripped.

    The byte-order mark that some Windows programs put first is left out.

    Raises:
        InputError: not a text file in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def image_ids(line: str) -> list[str]:
    """The ids that a line of a list may mean, the most likely last.

    These are the line itself and, if it begins with the path of an image file (names may hold
    spaces), that path without its suffix and without ever more of its folders: "a/b/c.png d.png"
    gives "a/b/c", "b/c" and "c".
    """
    path = FIRST_PATH.match(line)
    if path is None:
        return [line]
    parts = path.group(1).removesuffix("_leftImg8bit").split("/")
    parts = [part for part in parts if part not in ("", ".", "..")]
    return [line, *("/".join(parts[start:]) for start in range(len(parts)))]


def divide(args: argparse.Namespace, train: list[Item], folder: str | None) -> dict:
    """Divide the training images into labelled and unlabelled ones.

    Args:
        args: the settings; read are `split`, `labelled_list` and `measure_pseudo_labels`.
        train: all training images with their masks.
        folder: see `choose_labelled`.

    Returns:
        The `labelled`, `unlabelled`, `audit` and `protocol` fields of a DataSource. Unlabelled are
        all training images that are not labelled.

    Raises:
        InputError: as `choose_labelled`.
    """
    chosen, protocol = choose_labelled(args, [item.name for item in train], folder)
    labelled = [item for item in train if item.name in chosen]
    rest = [item for item in train if item.name not in chosen]
    audit = []
    if args.measure_pseudo_labels:
        step = max(1, len(rest) // AUDITED)
        audit = rest[::step][:AUDITED]
    return {
        "labelled": tuple(labelled),
        "unlabelled": tuple(Item(item.name, item.image) for item in rest),
        "audit": tuple(audit),
        "protocol": f"{protocol}: {len(chosen)} labelled, {len(rest)} unlabelled",
    }


def choose_labelled(
    args: argparse.Namespace, names: list[str], folder: str | None
) -> tuple[set[str], str]:
    """Choose the labelled images.

    Args:
        args: `labelled_list`, a path or None, and `split`, which may be a path, too.
        names: ids of the training images.
        folder: the folder in `common/splits` whose lists `split` names. Without one, None, `split`
            is a fraction of the names.

    Returns:
        The ids, and a description of where they come from.

    Raises:
        InputError: no such list or fraction, or ids that are not among `names`.
    """
    if args.labelled_list or Path(args.split).suffix == ".txt":
        path = Path(args.labelled_list or args.split)
        labelled, protocol = set(read_list(path, set(names))), f"list {path}"
    elif args.split in ("all", "1/1"):
        labelled, protocol = set(names), "every training image labelled"
    elif folder is not None:
        labelled, protocol = published_list(args.split, folder)
    else:
        labelled, protocol = every_nth(args.split, names)

    unknown = sorted(labelled - set(names))
    if unknown:
        raise InputError(
            f"{protocol}: {len(unknown)} ids are no training images: {some(unknown)}"
        )
    return labelled, protocol


def published_list(split: str, folder: str) -> tuple[set[str], str]:
    """The ids of a list in `common/splits/FOLDER`, and where they come from.

    Raises:
        InputError: no such list; the message names those that there are.
    """
    known = {path.stem for path in (SPLITS / folder).glob("*.txt")} - {"train", "val"}
    stem = split.replace("/", "-")
    if stem not in known:
        choices = sorted(re.sub(r"1-(\d+)$", r"1/\1", name) for name in known)
        raise InputError(
            f"no split '{split}' for {folder}; choose from {', '.join(choices)}, all, "
            "or give the path of a .txt list"
        )
    ids = read_list(SPLITS / folder / f"{stem}.txt")
    return set(ids), f"list common/splits/{folder}/{stem}.txt"


def every_nth(split: str, names: list[str]) -> tuple[set[str], str]:
    """Every n-th of the sorted names for the split "1/n", and a description of that.

    Raises:
        InputError: not such a fraction.
    """
    part, _, step = split.partition("/")
    if part != "1" or not step.isdigit() or int(step) < 1:
        raise InputError(
            f"--split {split}: give a fraction such as 1/8, 'all', or the path of a .txt list"
        )
    return set(sorted(names)[:: int(step)]), f"1 in {step} of {len(names)} sorted names"


# ---------------------------------------------------------------------------------- files, labels


def data_dir(args: argparse.Namespace, hint: str) -> Path:
    """The data set's folder, `--data-dir` or data/NAME.

    Raises:
        InputError: it is not there; the message ends with `hint`, how to get it.
    """
    folder = Path(args.data_dir or f"data/{args.data}")
    if not folder.is_dir() and not args.download:
        raise InputError(f"no folder {folder}; {hint}")
    return folder


def images_in(
    folder: Path,
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
    refused: tuple[str, ...] = OTHER_IMAGE_SUFFIXES,
) -> dict[str, Path]:
    """Every image file in and below a folder by its id, sorted.

    The id is the path below the folder without the suffix, such as "a" or "street/a". Hidden files
    and folders are left out: .DS_Store, the "._a.jpg" that macOS puts beside "a.jpg", thumbnails.

    Args:
        folder: nothing is found if it is not there.
        suffixes: of the files to find, in small letters.
        refused: suffixes of files that are an error.

    Raises:
        InputError: two images of one id, or images of another format: leaving them out would go
            unnoticed.
    """
    files = sorted(visible_files(folder))
    others = [str(path) for path in files if path.suffix.lower() in refused]
    if others:
        read = ".png and .jpg (.jpeg, .jfif, .jpe)"
        raise InputError(f"only {read} are read; convert or remove {some(others)}")
    found: dict[str, Path] = {}
    twice: dict[str, None] = {}
    for path in files:
        if path.suffix.lower() in suffixes:
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                twice[f"{name} ({found[name].name} and {path.name})"] = None
            found[name] = path
    if twice:
        raise InputError(f"two images of one name in {folder}: {some(list(twice))}")
    return found


def visible_files(folder: Path) -> Iterator[Path]:
    """The files in and below a folder, hidden ones left out.

    Links are followed, but no folder is entered twice.

    Raises:
        InputError: a folder that may not be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot read {error.filename}: {error.strerror}")

    if not folder.is_dir():
        return
    entered = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        if real in entered:  # a link to a folder above
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in names if not name.startswith("."))


def with_masks(images: dict[str, Path], folder: Path) -> list[Item]:
    """Each image with its mask: the PNG of the same id in `folder`, even if that is not there."""
    masks = images_in(folder, suffixes=(".png",), refused=())
    return [
        Item(name, path, masks.get(name, folder / f"{name}.png")) for name, path in images.items()
    ]


def map_labels(mapping: dict[int, int], rest: int | None = None) -> tuple[int, ...]:
    """A table of 256 labels from `mapping`; other values keep themselves, or become `rest`."""
    return tuple(mapping.get(value, value if rest is None else rest) for value in range(256))


def voc_colours(count: int) -> Colours:
    """PASCAL VOC's colour map.

    Of a label's eight bits the lowest three become the highest ones of red, green and blue, the
    next three the second highest ones, and so on.
    """
    labels = np.arange(count)
    channels = []
    for channel in range(3):
        bits = [(labels >> (3 * place + channel)) & 1 for place in range(8)]
        values = sum(bit << (7 - place) for place, bit in enumerate(bits))
        channels.append(values.tolist())
    return tuple(zip(*channels))


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
    train, val = (read_list(SPLITS / "voc" / f"{name}.txt") for name in ("train", "val"))
    if args.download:
        base = voc_base(root) or root / "VOCdevkit" / "VOC2012"  # where the archive will put it
        download_voc(root, base, (*train, *val), voc_colours(256))
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


def folder(args: argparse.Namespace) -> DataSource:
    """The user's own data set.

    Its folder holds `classes.txt`, `images/{labelled,unlabelled,val}` and `masks/{labelled,val}`,
    where masks are indexed or grey PNGs.
    """
    layout = (
        "it holds classes.txt, images/labelled, images/unlabelled, images/val, "
        "masks/labelled and masks/val"
    )
    if not args.data_dir:
        raise InputError(f"--data folder needs --data-dir: {layout}")
    root = data_dir(args, layout)
    classes = read_classes(root / "classes.txt")

    def items(part: str) -> list[Item]:
        return with_masks(images_in(root / "images" / part), root / "masks" / part)

    labelled, val = items("labelled"), items("val")
    if not labelled or not val:
        empty = "val" if labelled else "labelled"
        raise InputError(f"no images in {root}/images/{empty} (.png, .jpg, .jpeg)")
    further = images_in(root / "images" / "unlabelled")
    both = sorted({item.name for item in labelled} & further.keys())
    if both:  # masks of ST are named by image
        raise InputError(
            f"{root}/images: labelled and unlabelled both have an image {some(both)}; rename one"
        )

    fields = divide(args, labelled, None)
    before = fields["protocol"].rsplit(", ", 1)[0]
    rest = len(fields["unlabelled"])
    fields["protocol"] = f"{before}, {rest} + {len(further)} of images/unlabelled unlabelled"
    fields["unlabelled"] += tuple(Item(name, path) for name, path in further.items())
    return DataSource(
        "folder",
        classes,
        voc_colours(len(classes)),
        val=tuple(val),
        background=0 if classes[0] == "background" else None,
        **fields,
    )


def read_classes(path: Path) -> tuple[str, ...]:
    """The class names in a file, a line each in the order of the labels.

    Raises:
        InputError: no such file, a name that stands there twice, or too few or too many classes.
    """
    if not path.is_file():
        raise InputError(f"no {path}: a class name a line, in the order of the labels")
    names = tuple(read_lines(path))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{path} names {some(twice)} twice")
    if not 2 <= len(names) <= 254:
        raise InputError(
            f"{path} names {len(names)} classes; 2 to 254 are possible (255 means ignored)"
        )
    return names


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
