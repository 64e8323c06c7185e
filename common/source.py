"""What a data set is made of: its images and masks, files in folders, and label lists.

Which files the data sets of `--data` have stands in `datasets.py`, and for the user's own in
`folder.py`.
"""

import argparse
import hashlib
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import InputError
from common.images import DEEP_GREY, Colour, ColourTable, LabelTable, Range

Colours = tuple[Colour, ...]  # one a class

# The last two of the first line are JPEGs of another name.
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".jpe",
    ".tif", ".tiff", ".bmp", ".webp",
)  # fmt: skip
OTHER_IMAGE_SUFFIXES = (
    ".avif", ".cr2", ".dng", ".exr", ".gif", ".heic", ".heif", ".j2k", ".jp2", ".jxl", ".nef",
    ".pgm", ".pnm", ".ppm", ".tga",
)  # fmt: skip
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".webp")
JPEG_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".jpe")
# The path of an image file at the start of a line, without its suffix.
FIRST_PATH = re.compile(r"(.+?)\.(?:png|jpe?g|jfif|jpe|tiff?|bmp|webp)(?:\s|$)", re.IGNORECASE)
SPLITS = Path(__file__).parent / "splits"
AUDITED = 128  # unlabelled images on which pseudo-labels are measured


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
        label_map: the label of each value in a mask file, of the first 256 at least.
        colour_map: where masks are colour images, the label of each colour; else None.
        colour_rest: label of all other colours; None if there must be none.
        long_side: images with a longer side are shrunk to it in pixels; None for never.
        grey_range: values that become black and white in grey images of more than 8 bits.
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
    colour_map: Mapping[Colour, int] | None = None
    colour_rest: int | None = None
    long_side: int | None = None
    grey_range: Range = DEEP_GREY
    val_batch: int = 1
    published: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def label_table(self) -> LabelTable | ColourTable:
        """What reads the labels in the data set's own masks."""
        if self.colour_map is not None:
            return ColourTable(self.colour_map, self.colour_rest)
        return LabelTable(self.label_map, self.num_classes)

    @property
    def has_own_values(self) -> bool:
        """Whether its description says what masks hold, other than the numbers of the classes."""
        return self.colour_map is not None or self.label_map != tuple(range(256))

    @property
    def list_hash(self) -> str:
        """SHA-1 of the truly labelled ids, each once: tells two label lists of one size apart."""
        return sha1_of({item.name for item in self.labelled if not item.pseudo})

    @property
    def val_hash(self) -> str:
        """The same of the images for validation."""
        return sha1_of({item.name for item in self.val})


def sha1_of(names: set[str]) -> str:
    """SHA-1 of the sorted names."""
    return hashlib.sha1("\n".join(sorted(names)).encode()).hexdigest()


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


def spread(items: Sequence, count: int) -> list:
    """`count` items, or all if there are fewer, evenly spaced from the first to near the last."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


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
    fields = parts(args, train, chosen)
    counts = f"{len(fields['labelled'])} labelled, {len(fields['unlabelled'])} unlabelled"
    return fields | {"protocol": f"{protocol}: {counts}"}


def parts(args: argparse.Namespace, train: list[Item], chosen: set[str]) -> dict:
    """The `labelled`, `unlabelled` and `audit` fields of a DataSource.

    Args:
        args: the settings; read is `measure_pseudo_labels`.
        train: all training images with their masks.
        chosen: ids of the labelled ones.
    """
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
    }


def choose_labelled(
    args: argparse.Namespace, names: list[str], folder: str | None
) -> tuple[set[str], str]:
    """Choose the labelled images.

    Args:
        args: `labelled_list`, a path or None, and `split`, which may be a path, too; of a run that
            is resumed its folder, `output_dir`.
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
        labelled = ids_at_the_start(args, "labelled.txt") or labelled

    unknown = sorted(labelled - set(names))
    if unknown:
        raise InputError(f"{protocol}: {len(unknown)} ids are no training images: {some(unknown)}")
    return labelled, protocol


def ids_at_the_start(args: argparse.Namespace, file: str) -> set[str] | None:
    """The ids in RUN/FILE, of a run that is resumed; None of one that begins.

    What is every n-th image, or drawn from all, changes when an image is taken away.
    """
    if not getattr(args, "resume", False):
        return None
    run = Path(args.output_dir)
    paths = [path for path in (run / file, run / "stage-1" / file) if path.is_file()]
    # Not `read_lines`: a file's name may end with a space.
    return set(paths[0].read_text(encoding="utf-8").splitlines()) if paths else None


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
        InputError: two images of one id, names that are not UTF-8, or images of another format:
            leaving them out would go unnoticed.
    """
    files = sorted(visible_files(folder))
    refuse_unreadable_names(path for path in files if path.suffix.lower() in suffixes)
    others = [str(path) for path in files if path.suffix.lower() in refused]
    if others:
        raise InputError(f"only {', '.join(suffixes)} are read; convert or remove {some(others)}")
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


def refuse_unreadable_names(paths: Iterable[Path]) -> None:
    """Refuse names that are not UTF-8, as old archives hold them: no list could be written of them.

    Raises:
        InputError: there are such names; five are listed, with the bytes that are wrong.
    """
    shown = {str(path): str(path).encode("utf-8", "backslashreplace").decode() for path in paths}
    wrong = [text for path, text in shown.items() if text != path]
    if wrong:
        raise InputError(f"{len(wrong)} names are not UTF-8: {some(wrong)}; rename these files")


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


def with_masks(
    images: dict[str, Path], folder: Path, masks: dict[str, Path] | None = None
) -> list[Item]:
    """Each image with its mask, the file of the same id, even if that is not there.

    Args:
        images: the images' files by id.
        folder: where the masks lie.
        masks: their files by the ids of the images; None for those in `folder`.
    """
    masks = masks_in(folder) if masks is None else masks
    return [
        Item(name, path, masks.get(name, folder / f"{name}.png")) for name, path in images.items()
    ]


def masks_in(folder: Path) -> dict[str, Path]:
    """Every mask in and below a folder by its id, sorted.

    Raises:
        InputError: two masks of one id, or JPEGs, which do not keep the values of pixels.
    """
    jpegs = [path.name for path in visible_files(folder) if path.suffix.lower() in JPEG_SUFFIXES]
    if jpegs:
        raise InputError(
            f"{folder}: {some(sorted(jpegs))}: JPEG changes the values of pixels; export these "
            "masks again, as PNG"
        )
    return images_in(folder, MASK_SUFFIXES, refused=())


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
