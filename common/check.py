"""What is looked at before training starts: every file's header, some masks, images in two sets.

A broken file would otherwise end a run after hours, and masks that mean something else would never
be noticed.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import InputError, distributed, note
from common.augment import IGNORE
from common.images import DEEP_GREY, ColourTable, LabelTable, Range, open_image, open_mask
from common.source import DataSource, Item, some, spread

THREADS = 8  # files waited for at once: a network disk is slow to answer; 1000 take 0.1 s of a core
PORTION = 64  # files that a thread gets at a time, at most
BAR_FROM = 10_000  # files that take seconds: then a bar says how far it is
END = 65_536  # bytes at both ends of a file that are compared before all of them are
VALUES = 10_000  # of an image that are looked at for the range of its grey
OUTLIERS = 0.1  # percent of them at each end that do not count
MASKS = 128  # of each set that are decoded: 0.4 ms each at VOC's size, 13 ms at Cityscapes'

Size = tuple[int, int]  # width, height


class Look(NamedTuple):
    """What an image's header says.

    Attributes:
        size: as viewers show it.
        deep_grey: whether it is grey with more than 8 bits.
        deep_colour: whether it has 16 bits a channel, but is in colour or has alpha.
        lost_bands: whether it is a TIFF of more bands than are read.
    """

    size: Size
    deep_grey: bool
    deep_colour: bool
    lost_bands: bool


def files(data: DataSource) -> dict[Path, Look]:
    """Read the header and the end of every image and mask; each process reads its share.

    Returns:
        What each image's header says.

    Raises:
        InputError: files that cannot be read, masks that have not their image's size; five are
            named, the rest counted.
    """
    everything = (*data.unlabelled, *data.labelled, *data.val, *data.audit)
    items = {item.image: item for item in everything if isinstance(item.image, Path)}
    return _all_or_error(_look, list(items.values()))


def _look(item: Item) -> Look:
    """The header of an image whose file, and whose mask's file, looks whole."""
    image = open_image(item.image)
    with image.header:
        look = Look(image.size, image.deep_grey, image.deep_colour, image.lost_bands)
        if isinstance(item.mask, Path):
            mask = open_mask(item.mask, image)
            with mask.header:
                mask.check_end()
        image.check_end()
    return look


def note_unread(looks: dict[Path, Look]) -> None:
    """Print a line where images hold more than is read of them: bits or bands.

    Of images in colour, or with alpha, of 16 bits a channel the higher 8 are read, so that an image
    of a 12-bit camera is almost black; there is no range for these as `grey_range` finds one for
    grey.

    Args:
        looks: what `files` returned.
    """
    deep = [str(path) for path, look in looks.items() if look.deep_colour]
    if deep:
        note(
            f"of {len(deep)} images with 16 bits a channel, in colour or with alpha, the higher 8 "
            f"are read; if these look dark, save them with 8 bits, or as plain grey: {some(deep)}"
        )
    more = [str(path) for path, look in looks.items() if look.lost_bands]
    if more:
        note(
            f"{len(more)} TIFFs have more bands than are read, the first of grey or the first "
            f"three of colour: {some(more)}"
        )


def grey_range(data: DataSource, looks: dict[Path, Look]) -> Range:
    """The values that become black and white where grey images have more than 8 bits.

    A 16-bit file seldom uses all of its 65536 values: a camera or microscope of 12 bits gives 4096,
    and divided by 256 its images would be almost black. So the range is the set's own: the lowest
    and the highest of the values in up to 128 training images, spread evenly, but for the 0.1 % at
    each end, so that a few hot pixels do not decide it.

    Args:
        data: the data set.
        looks: what `files` returned.

    Raises:
        InputError: one of these images cannot be decoded.
    """
    items = [
        item
        for item in (*data.labelled, *data.unlabelled)
        if isinstance(item.image, Path) and looks[item.image].deep_grey
    ]
    if not items:
        return DEEP_GREY
    chosen = spread(items, MASKS)
    found = _all_or_error(lambda item: some_values(item.image), chosen)
    return range_of(np.concatenate(list(found.values())), chosen[0].image)


def range_of(values: np.ndarray, path: Path) -> Range:
    """The lowest and the highest of some values, but for the outliers.

    Raises:
        InputError: there are none; the message names the file `path`.
    """
    if not len(values):
        raise InputError(f"{path}: no pixel has a value that is a number")
    low, high = np.percentile(values, (OUTLIERS, 100 - OUTLIERS))
    return float(low), float(high)


def some_values(path: Path) -> np.ndarray:
    """Some 10 000 values of a deep grey image, from all over it, without what is no number."""
    values = open_image(path).deep_values().ravel()
    values = values[:: max(1, len(values) // VALUES)]
    return values[np.isfinite(values)].astype(np.float64)


def masks(data: DataSource) -> None:
    """Decode up to 128 masks of the labelled set, and as many for validation, spread evenly.

    The others are looked up as they are loaded, crop by crop.

    Raises:
        InputError: a mask cannot be decoded or holds other labels, or all of a set hold only 0
            and 255; with `--data folder`, where a set may be a handful of images, all of both.
    """
    table = data.label_table()
    some_labels = False
    suspicious: dict[str, Path] = {}
    for part, items in (("labelled", data.labelled), ("validation", data.val)):
        chosen = [item for item in spread(items, MASKS) if isinstance(item.mask, Path)]
        found = _all_or_error(lambda item: _content(item, table), chosen)
        ignored = [item.mask for item in chosen if found[item.image][1]]
        if any(labels for labels, _ in found.values()):
            some_labels = True
        elif ignored and not data.has_own_values:
            suspicious[part] = ignored[0]
    for part, mask in suspicious.items():
        if data.name == "folder" and some_labels:
            note(f"the masks of the {part} images hold only the first class and ignored pixels")
            continue
        change = "convert the objects' pixels to 1"
        if data.name == "folder":
            change = "give each class its values in classes.txt, NAME VALUE"
        raise InputError(
            f"{data.name}: the masks of the {part} images hold only 0 and 255, such as {mask}; "
            f"labels are 0 to {data.num_classes - 1} and 255 means ignored: {change}"
        )


def _content(item: Item, table: LabelTable | ColourTable) -> tuple[bool, bool]:
    """Whether a mask holds labels above 0, and whether it holds ignored pixels."""
    labels = table.read(open_mask(item.mask, open_image(item.image)))
    ignored = labels == IGNORE
    return bool(((labels != 0) & ~ignored).any()), bool(ignored.any())


def _all_or_error(work: Callable[[Item], object], items: list[Item]) -> dict[Path, object]:
    """`work` of each item by its image, in threads and shared among the processes.

    Raises:
        InputError: `work` raised one; all are reported together.
    """

    def attempt(item: Item) -> tuple[Path, object]:
        try:
            return item.image, work(item)
        except InputError as error:
            return item.image, error

    mine = items[distributed.rank() :: distributed.world_size()]
    hidden = len(items) < BAR_FROM or not distributed.is_main() or not sys.stderr.isatty()
    bar = tqdm(in_threads(attempt, mine), "check files", len(mine), leave=False, disable=hidden)
    found = distributed.merge(dict(bar))
    errors = [str(result) for result in found.values() if isinstance(result, InputError)]
    if len(errors) > 1:
        raise InputError(f"{len(errors)} images or masks cannot be used: {some(errors, '; ')}")
    if errors:
        raise InputError(errors[0])
    return found


def in_threads(work: Callable, items: Sequence) -> Iterator:
    """`work` of each item, in order, on threads.

    A thread gets a portion of many items at a time: to hand one over costs as much as to read a
    header.
    """
    length = max(1, min(PORTION, len(items) // (4 * THREADS)))
    portions = [items[start : start + length] for start in range(0, len(items), length)]
    with ThreadPoolExecutor(THREADS) as pool:
        for results in pool.map(lambda portion: [work(item) for item in portion], portions):
            yield from results


# ---------------------------------------------------------------- images that stand in two sets


class Set(NamedTuple):
    """One of the three sets: what it is called, and its images by id."""

    title: str
    images: dict[str, Path]


def note_shared_images(data: DataSource) -> None:
    """Print a line for each two of the sets that share images, by content or by name.

    Contents are compared where the sets are not those of published lists.
    """
    if not distributed.is_main():
        return

    def of(title: str, items: Iterable[Item]) -> Set:
        return Set(title, {item.name: item.image for item in items if isinstance(item.image, Path)})

    labelled = of("labelled", data.labelled)
    unlabelled = of("unlabelled", data.unlabelled)
    val = of("validation", data.val)
    contents = {} if data.published else same_contents((labelled, unlabelled, val))
    for one, other in ((labelled, val), (unlabelled, val), (labelled, unlabelled)):
        note = shared(one, other, contents)
        if note:
            print(f"note: {note}", file=sys.stderr)


def shared(one: Set, other: Set, contents: dict[Path, str]) -> str | None:
    """A sentence on the images that two sets share; None where they share none.

    Args:
        one, other: the sets.
        contents: a hash of the images that may be alike.
    """
    theirs = {contents[path] for path in other.images.values() if path in contents}
    same_content = [path.name for path in one.images.values() if contents.get(path) in theirs]
    same_name = [
        path.name
        for name, path in one.images.items()
        if name in other.images and contents.get(path) not in theirs
    ]
    if not same_content and not same_name:
        return None
    alone = f", {len(same_name)} by name alone" if same_name else ""
    examples = " and ".join((same_content + same_name)[:2])
    count = len(same_content) + len(same_name)
    images = "image stands" if count == 1 else "images stand"
    sets = f"the {one.title} and the {other.title} set"
    return f"{count} {images} in both {sets}{alone}, such as {examples}"


def same_contents(sets: Iterable[Set]) -> dict[Path, str]:
    """SHA-1 of the files that may be alike: of another's size in bytes, and with its two ends.

    Files without compression are often of one size: all of them would be read whole at every start.
    """
    lengths = {path: path.stat().st_size for part in sets for path in part.images.values()}
    doubtful = not_alone(lengths)
    ends = not_alone(dict(zip(doubtful, in_threads(_hash_of_ends, doubtful))))
    hashes = in_threads(lambda path: hashlib.sha1(path.read_bytes()).hexdigest(), ends)
    return dict(zip(ends, hashes))


def not_alone(values: dict[Path, object]) -> list[Path]:
    """The files whose value another one has, too."""
    often = Counter(values.values())
    return [path for path, value in values.items() if often[value] > 1]


def _hash_of_ends(path: Path) -> tuple[int, str]:
    """A file's size in bytes, and the SHA-1 of its first and last bytes."""
    with open(path, "rb") as file:
        head = file.read(END)
        length = file.seek(0, 2)
        file.seek(max(0, length - END))
        return length, hashlib.sha1(head + file.read()).hexdigest()
