"""The user's own data, `--data folder`: its layout, its classes, and what is held out.

    DIR/classes.txt     a line a class, see `read_classes`
    DIR/images/         .png, .jpg, .tif, .bmp or .webp; subfolders are read, too
    DIR/masks/          a mask of the same name for each labelled image

An image with a mask is labelled, one without is not, and some of the labelled ones are held out for
validation. Or the folders say so: `images/labelled`, `images/unlabelled`, `images/val`,
`masks/labelled` and `masks/val`; of these `val` alone may be there, too. Where `images/labelled` is
there, images outside these folders are not read.
"""

import argparse
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import InputError, note
from common.augment import IGNORE
from common.images import INVALID, MASK_FORMATS, Colour, open_image
from common.source import (
    IMAGE_SUFFIXES,
    DataSource,
    Item,
    choose_labelled,
    data_dir,
    ids_at_the_start,
    images_in,
    masks_in,
    parts,
    read_lines,
    some,
    spread,
    visible_files,
    voc_colours,
    with_masks,
)

LAYOUT = "it holds classes.txt, images/ and masks/, where an image without a mask is unlabelled"
# What programs add to an image's name in that of its mask.
ENDINGS = (
    "_mask", "_masks", "-mask", "_label", "_labels", "_gt", "_seg", "_segmentation", "_L", "_m",
)  # fmt: skip
VALIDATION = ("val", "valid", "validation")  # names of the folder for validation, in any case
LOOKED_AT = 16  # masks that are decoded to find out what they hold
LOOKED_AT_PIXELS = 1_000_000  # of each, evenly spread
SUGGESTED = 40  # classes that a message suggests, at most
IGNORED = "ignored"  # the name of what is no class


def folder(args: argparse.Namespace) -> DataSource:
    """The user's own data set in `args.data_dir`.

    Raises:
        InputError: the folder has another layout, its classes do not fit its masks, or there are
            too few masks.
    """
    if not args.data_dir:
        raise InputError(f"--data folder needs --data-dir, your folder: {LAYOUT}")
    root = data_dir(args, LAYOUT)
    lines = read_classes(root / "classes.txt")
    found = find_images(root)
    masks = [item.mask for item in (*found.labelled, *found.val)]
    seen = look_at([mask for mask in masks if mask.is_file()])
    classes = class_fields(lines, seen, root / "classes.txt")

    chosen, protocol = choose_labelled(args, [item.name for item in found.labelled], None)
    said = [f"{len(found.labelled)} images with masks"]
    if args.split != "all":
        said.append(protocol)
    held: list[Item] = []
    if not found.val:
        held = hold_out(found.labelled, chosen, args)
        said.append(f"{len(held)} of them held out for validation by the seed")
    names = {item.name for item in held}
    train = [item for item in found.labelled if item.name not in names]

    fields = parts(args, train, chosen - names)
    fields["unlabelled"] += tuple(Item(name, path) for name, path in found.unlabelled.items())
    counts = f"{len(fields['labelled'])} labelled, {len(fields['unlabelled'])} unlabelled"
    fields["protocol"] = f"{', '.join(said)}: {counts}"
    return DataSource("folder", val=tuple(found.val or held), **classes, **fields)


# ------------------------------------------------------------------------------------- the layout


@dataclass
class Found:
    """The images of a folder.

    Attributes:
        labelled: images with masks.
        unlabelled: path of each image without a mask by its id.
        val: images of the folder `val`, with masks.
    """

    labelled: list[Item]
    unlabelled: dict[str, Path]
    val: list[Item]


def find_images(root: Path) -> Found:
    """The images below a folder in either layout.

    Raises:
        InputError: no images, or none with a mask; the message says where they were looked for. Or
            two masks of one image.
    """
    images, masks = root / "images", root / "masks"
    if not images.is_dir():
        raise InputError(f"no folder {images}; {LAYOUT}")
    place = val_folder(images)
    mask_place = val_folder(masks, place)
    val = with_own_masks(images_in(images / place), masks / mask_place)
    if (images / "labelled").is_dir():
        labelled = with_own_masks(images_in(images / "labelled"), masks / "labelled")
        unlabelled = images_in(images / "unlabelled")
        note_left_out(images, ("labelled", "unlabelled", place))
    else:
        everything = without(images_in(images), place)
        labelled, unlabelled = divide_by_masks(everything, masks_of(everything, masks, mask_place))
        note_test_folder(images)

    both = sorted({item.name for item in labelled} & unlabelled.keys())
    if both:  # masks of ST are named by image
        raise InputError(
            f"{images}: labelled and unlabelled both have an image {some(both)}; rename one"
        )
    if not labelled:
        raise InputError(nothing_labelled(root))
    return Found(labelled, unlabelled, val)


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted; none if it is not there."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def val_folder(folder: Path, usual: str = "val") -> str:
    """The name of the subfolder for validation: `usual` if that is there, or none."""
    names = [name for name in subfolders(folder) if name.lower() in VALIDATION]
    return usual if usual in names or not names else names[0]


def note_test_folder(images: Path) -> None:
    """Say that images in a folder "test" are trained on, where no folders say what images are."""
    for name in subfolders(images):
        if name.lower() == "test":
            note(
                f"{images / name} is taken for images to train on; move it elsewhere if it is there"
                " to test with"
            )


def note_left_out(images: Path, roles: Sequence[str]) -> None:
    """Say how many images lie outside the subfolders `roles`, which alone are read."""
    names = [
        str(path.relative_to(images))
        for path in visible_files(images)
        if path.suffix.lower() in IMAGE_SUFFIXES and path.relative_to(images).parts[0] not in roles
    ]
    if names:
        note(
            f"{len(names)} images in {images} are in none of its folders {', '.join(roles)} and "
            f"are left out: {some(sorted(names))}"
        )


def with_own_masks(images: dict[str, Path], folder: Path) -> list[Item]:
    """Each image with its mask, even if that is not there."""
    return with_masks(images, folder, masks_of(images, folder))


def divide_by_masks(
    images: dict[str, Path], masks: dict[str, Path]
) -> tuple[list[Item], dict[str, Path]]:
    """Images with masks, and the paths of those without."""
    labelled = [Item(name, path, masks[name]) for name, path in images.items() if name in masks]
    return labelled, {name: path for name, path in images.items() if name not in masks}


def without(paths: dict[str, Path], folder: str) -> dict[str, Path]:
    """The paths whose ids do not lie in the subfolder `folder`."""
    return {name: path for name, path in paths.items() if not name.startswith(f"{folder}/")}


def masks_of(images: dict[str, Path], folder: Path, val: str = "") -> dict[str, Path]:
    """The mask of each image that has one, by the image's id.

    A mask has its image's name, or that name and one of `ENDINGS`. Masks of no image are counted
    in a note.

    Args:
        images: the images' files by id.
        folder: of the masks.
        val: a subfolder to leave out.

    Raises:
        InputError: two masks of one image, of which either could be meant.
    """
    masks = masks_in(folder)
    if val:
        masks = without(masks, val)
    found: dict[str, Path] = {}
    strangers, twice = [], []
    for mask, path in masks.items():
        names = [mask, *(mask.removesuffix(end) for end in ENDINGS if mask.endswith(end))]
        name = next((name for name in names if name in images), None)
        if name is None:
            strangers.append(path.name)
        elif name in found:
            twice.append(f"{name} ({found[name].name} and {path.name})")
        else:
            found[name] = path
    if twice:
        raise InputError(f"two masks of one image in {folder}: {some(twice)}; remove one")
    if strangers and found:
        note(f"{len(strangers)} masks in {folder} belong to no image: {some(strangers)}")
    return found


def nothing_labelled(root: Path) -> str:
    """Why no image of a folder is labelled."""
    roles = (root / "images" / "labelled").is_dir()
    images, masks = root / "images", root / "masks"
    if roles:
        images, masks = images / "labelled", masks / "labelled"
    names = [str(path.relative_to(images)) for path in images_in(images).values()]
    if not names:
        return f"no images in {images}; {LAYOUT}"
    found = [str(path.relative_to(masks)) for path in masks_in(masks).values()]
    if not found:
        return f"no masks in {masks}; a mask has the name of its image"
    return (
        f"none of the {len(found)} masks in {masks}, such as {found[0]}, has the name of an image "
        f"in {images}, such as {names[0]}"
    )


def hold_out(items: Sequence[Item], chosen: set[str], args: argparse.Namespace) -> list[Item]:
    """Images for validation: `val_fraction` of those with masks, at least one, drawn by the seed.

    They are taken from the images that the split leaves unlabelled if these are enough, so that no
    label is lost, and else from all.

    Args:
        items: the images with masks.
        chosen: ids of those that the split labels.
        args: `val_fraction` and `seed`; of a run that is resumed its folder, `output_dir`.

    Raises:
        InputError: there is one image with a mask only.
    """
    if len(items) < 2:
        raise InputError(
            "only one image has a mask; at least two are needed, one of them for validation "
            "(or put images for validation into images/val and masks/val)"
        )
    count = min(max(1, round(args.val_fraction * len(items))), len(items) - 1)
    spare = [item for item in items if item.name not in chosen]
    pool = spare if len(spare) >= count else list(items)
    before = ids_at_the_start(args, "val.txt")
    if before:
        return [item for item in items if item.name in before]
    order = np.random.default_rng(args.seed).permutation(len(pool))[:count]
    return [pool[index] for index in sorted(order)]


# ------------------------------------------------------------------------------------ the classes


@dataclass(frozen=True)
class Line:
    """A line of classes.txt.

    Attributes:
        name: of the class.
        numbers: what stands after it.
        rest: whether it takes all that no other line names.
    """

    name: str
    numbers: tuple[int, ...] = ()
    rest: bool = False

    @property
    def has_values(self) -> bool:
        """Whether the line says what masks hold."""
        return self.rest or bool(self.numbers)


def read_classes(path: Path) -> list[Line]:
    """The classes of a set, and what stands for them in masks, from its `classes.txt`.

    A line a class, in one of three forms, the same in all lines:

        NAME                    masks hold its number: 0 for the first line, 1 for the second
        NAME VALUE [VALUE ...]  masks hold one of these values, such as 255; up to 65535
        NAME R G B [R G B ...]  masks are colour images, and this is its colour

    Three numbers in every line are a colour where masks are RGB, and where one of these colours
    occurs in indexed masks. In the last two forms a line may begin with `ignored` in place of a
    name, for pixels of no class, and one line may end with `*` in place of numbers: it takes what
    no other line names, 255 included. Without such a line 255 is ignored where no line names it.

    Returns:
        The lines; none where there is no such file.

    Raises:
        InputError: the lines cannot be understood.
    """
    if not path.is_file():
        return []
    lines = [parse_line(line) for line in read_lines(path)]
    check_lines(lines, path)
    return lines


def class_fields(lines: list[Line], seen: "Seen", path: Path) -> dict:
    """The classes of a set, and the label of each value or colour in its masks.

    Args:
        lines: of classes.txt.
        seen: what some masks hold.
        path: of classes.txt, for messages.

    Returns:
        Those of the fields `classes`, `colours`, `background`, `label_map`, `colour_map` and
        `colour_rest` of a DataSource that are not the default.

    Raises:
        InputError: there is no such file, or the masks hold something else; the message suggests
            what the file could hold.
    """
    if not lines:
        raise InputError(
            f"no {path}: a class a line, NAME, NAME VALUE or NAME R G B, and 'ignored' in place of "
            f"a name for pixels of no class{suggest(seen)}"
        )
    names = tuple(line.name for line in lines if line.name != IGNORED or not line.has_values)
    background = 0 if names[0] == "background" else None
    fields = {"classes": names, "colours": voc_colours(len(names)), "background": background}
    if not any(line.has_values for line in lines):
        check_plain(seen, names, path)
        return fields
    labels = {name: number for number, name in enumerate(names)} | {IGNORED: IGNORE}
    if are_colours(lines, seen):
        chosen = colour_fields(lines, labels, path)
        note_absent(lines, {line.name: set(triples(line)) for line in lines}, seen.colours, path)
        return fields | chosen
    if seen.coloured and not seen.grey:
        raise InputError(
            f"{path}: {seen.example()} is a mask in colours; give each class its colour, "
            f"NAME R G B{suggest(seen, names)}"
        )
    chosen = {"label_map": value_map(lines, labels, path)}
    note_absent(lines, {line.name: set(line.numbers) for line in lines}, seen.values(), path)
    return fields | chosen


def are_colours(lines: list[Line], seen: "Seen") -> bool:
    """Whether the numbers of all lines are colours.

    Indexed masks have both, the numbers and the colours of their palette. Then they are colours if
    one of these is among the colours that occur.
    """
    if not all(line.rest or len(line.numbers) % 3 == 0 for line in lines):
        return False
    listed = {colour for line in lines for colour in triples(line)}
    return seen.rgb or bool(listed & seen.colours)


def triples(line: Line) -> list[Colour]:
    """The numbers of a line as colours."""
    return list(zip(*[iter(line.numbers)] * 3))


def note_absent(lines: list[Line], named: dict[str, set], seen: set, path: Path) -> None:
    """Say which classes occur in none of the masks that were looked at: a number may be wrong.

    `ignored *` is left out: it stands there in case that something else occurs.

    Args:
        lines: of classes.txt.
        named: the values or colours of each line, by its name.
        seen: those that occur.
        path: of classes.txt.
    """
    others = seen.difference(*named.values())
    wanted = [line for line in lines if line.name != IGNORED or not line.rest]
    absent = [
        line.name for line in wanted if not (others if line.rest else seen & named[line.name])
    ]
    if absent and seen:
        note(f"{path}: none of the masks that were looked at holds {some(absent)}")


def parse_line(text: str) -> Line:
    """A line: words, and the numbers or the `*` behind them."""
    words = re.sub(r"(?<=\d),", " ", text).split()  # commas between numbers
    if len(words) > 1 and words[-1] == "*":
        if any(word.isdecimal() for word in words[1:-1]):
            raise InputError(f"'{text}': numbers or *, not both")
        return Line(" ".join(words[:-1]), rest=True)
    count = len(words)
    while count > 1 and words[count - 1].isdecimal():
        count -= 1
    return Line(" ".join(words[:count]), tuple(map(int, words[count:])))


def check_lines(lines: list[Line], path: Path) -> None:
    """Refuse lines that contradict each other.

    Raises:
        InputError: some lines have values and others none, names or values stand twice, or there
            are too few or too many classes.
    """
    with_values = [line.name for line in lines if line.has_values]
    without = [line.name for line in lines if not line.has_values]
    if with_values and without:
        raise InputError(
            f"{path}: {some(with_values)} with values and {some(without)} without; give all "
            "classes values or none (a number that belongs to a name is joined with '_')"
        )
    twice = [name for name, count in Counter(line.name for line in lines).items() if count > 1]
    if twice:
        more = "; the values of a class stand in one line" if with_values else ""
        raise InputError(f"{path} names {some(twice)} twice{more}")
    if sum(line.rest for line in lines) > 1:
        raise InputError(f"{path}: more than one line ends with *")
    count = len(lines) - (IGNORED in with_values)
    if not 2 <= count <= 254:
        raise InputError(
            f"{path} names {count} classes; 2 to 254 are possible (255 means ignored); "
            "what is no object is a class, too, such as background"
        )


def value_map(lines: list[Line], labels: dict[str, int], path: Path) -> tuple[int, ...]:
    """The label of each value, of 256 values or 65536.

    Raises:
        InputError: a value stands in two lines, or is above 65535.
    """
    numbers = [number for line in lines for number in line.numbers]
    refuse_repeats(numbers, path)
    if max(numbers, default=0) > 65535:
        raise InputError(f"{path}: the value {max(numbers)} is above 65535")
    rest = next((labels[line.name] for line in lines if line.rest), INVALID)
    table = [rest] * (256 if max(numbers, default=0) < 256 and rest == INVALID else 65536)
    if rest == INVALID:
        table[IGNORE] = IGNORE
    for line in lines:
        for number in line.numbers:
            table[number] = labels[line.name]
    return tuple(table)


def colour_fields(lines: list[Line], labels: dict[str, int], path: Path) -> dict:
    """The fields of a DataSource whose masks are colour images.

    Raises:
        InputError: a colour stands in two lines, or has a value above 255.
    """
    of_class = {line.name: triples(line) for line in lines}
    everything = [colour for colours in of_class.values() for colour in colours]
    refuse_repeats(everything, path)
    too_large = [colour for colour in everything if max(colour) > 255]
    if too_large:
        raise InputError(f"{path}: {some(list(map(written, too_large)))}: a colour is 0 to 255")
    classes = [name for name, label in labels.items() if label != IGNORE]
    colours = [of_class[name][0] if of_class[name] else (0, 0, 0) for name in classes]
    return {
        "colours": tuple(colours),
        "colour_map": {
            colour: labels[name] for name, colours in of_class.items() for colour in colours
        },
        "colour_rest": next((labels[line.name] for line in lines if line.rest), None),
    }


def refuse_repeats(numbers: Sequence, path: Path) -> None:
    """Refuse values or colours that stand twice."""
    twice = [number for number, count in Counter(numbers).items() if count > 1]
    if twice:
        raise InputError(f"{path}: {some(list(map(written, twice)))} more than once")


def written(number: int | Colour) -> str:
    """A value or a colour as classes.txt has it."""
    return " ".join(map(str, number)) if isinstance(number, tuple) else str(number)


# ------------------------------------------------------------------------------ what masks hold


@dataclass
class Seen:
    """What some masks hold.

    Attributes:
        pixels: how many pixels have each value, or each colour where a mask is a colour image.
        places: a mask that holds it.
        colours: the colours that occur, those of palettes included.
        coloured: whether `pixels` counts colours.
        grey: whether all of these colours are grey.
        rgb: whether a mask is a colour image, without a palette or a GIF.
    """

    pixels: Counter
    places: dict[int | Colour, Path]
    colours: set[Colour]
    coloured: bool
    grey: bool
    rgb: bool

    def values(self) -> set[int]:
        """The values that occur; of colours, those of grey ones."""
        return {key[0] if isinstance(key, tuple) else key for key in self.pixels}

    def example(self) -> Path:
        """A mask with the last of the values or colours: the highest, or one that is not grey."""
        keys = [key for key in self.pixels if isinstance(key, tuple) and len(set(key)) > 1]
        return self.places[max(keys or self.pixels)]


def look_at(masks: Sequence[Path]) -> Seen:
    """Decode some masks, spread evenly.

    Those that cannot be read are left out: `check` names them all.
    """
    pixels: Counter = Counter()
    places: dict[int | Colour, Path] = {}
    colours: set[Colour] = set()
    rgb = False
    for path in spread(masks, LOOKED_AT):
        try:
            mask = open_image(path, MASK_FORMATS)
            found = None if mask.coloured else values_in(mask.values())
            in_rgb = colours_in(mask.colours())
        except InputError:
            continue
        colours |= set(in_rgb)
        rgb = rgb or mask.coloured
        found = found or in_rgb
        pixels.update(found)
        places = dict.fromkeys(found, path) | places
    if rgb:  # values of other masks are grey colours
        keys = {key: key if isinstance(key, tuple) else (key,) * 3 for key in pixels}
        places = {keys[key]: path for key, path in places.items()}
        pixels = sum((Counter({keys[key]: count}) for key, count in pixels.items()), Counter())
    coloured = any(isinstance(key, tuple) for key in pixels)
    grey = all(len(set(key)) == 1 for key in pixels if isinstance(key, tuple))
    return Seen(pixels, places, colours, coloured, grey, rgb)


def some_pixels(array: np.ndarray) -> np.ndarray:
    """Pixels of an array (H,W,...), evenly spread: a large mask has millions."""
    flat = array.reshape(array.shape[0] * array.shape[1], -1)
    return flat[:: -(-len(flat) // LOOKED_AT_PIXELS)]


def values_in(array: np.ndarray) -> dict[int, int]:
    """How often each value occurs in some pixels of a mask (H,W)."""
    values, counts = np.unique(some_pixels(array), return_counts=True)
    return dict(zip(values.tolist(), counts.tolist()))


def colours_in(array: np.ndarray) -> dict[Colour, int]:
    """How often each colour occurs in some pixels of a mask (H,W,3)."""
    red, green, blue = some_pixels(array).astype(np.int64).T
    packed, counts = np.unique(red << 16 | green << 8 | blue, return_counts=True)
    keys = [(value >> 16, value >> 8 & 255, value & 255) for value in packed.tolist()]
    return dict(zip(keys, counts.tolist()))


def check_plain(seen: Seen, names: Sequence[str], path: Path) -> None:
    """Refuse masks that hold something else than the numbers of the classes.

    Raises:
        InputError: they hold colours, 0 and 255 alone, or other values; the message suggests the
            lines of classes.txt.
    """
    if seen.coloured and not seen.grey:
        raise InputError(
            f"{path}: {seen.example()} is a mask in colours; "
            f"give each class its colour, NAME R G B{suggest(seen, names)}"
        )
    values = seen.values()
    if values == {0, 255} or values == {255}:
        raise InputError(
            f"{path}: masks such as {seen.example()} hold 0 and 255 alone, and 255 means ignored; "
            f"give each class its values{suggest(seen, names)}"
        )
    others = sorted(value for value in values if value >= len(names) and value != IGNORE)
    if others:
        raise InputError(
            f"{path}: masks such as {seen.example()} hold {some(list(map(str, others)))}, "
            f"but {len(names)} classes have the labels 0 to {len(names) - 1}; "
            f"give each class its values{suggest(seen, names)}"
        )


def suggest(seen: Seen, names: Sequence[str] = ()) -> str:
    """Lines that classes.txt could hold, by what masks hold; colours by falling number of pixels.

    Empty where nothing was seen, or too much to be classes.
    """
    ranked = [key for key, _ in seen.pixels.most_common()]
    if seen.coloured:
        keys = [key for key in ranked if isinstance(key, tuple)]
        keys = sorted(key[0] for key in keys) if seen.grey else keys
    else:
        keys = sorted(ranked)
    if not keys:
        return ""
    if len(keys) > SUGGESTED:
        return (
            f" ({len(keys)} different ones were found in masks such as {seen.example()}: "
            "edges that were smoothed, or images that are no masks?)"
        )
    if not names and len(keys) == 2:
        names = ("background", "object")
    lines = []
    for number, key in enumerate(keys):
        ignored = key == IGNORE and len(keys) > 2
        name = names[number] if number < len(names) else f"class_{number}"
        lines.append(f"{IGNORED if ignored else name} {written(key)}")
    return ". By the masks it could be:\n" + "\n".join(lines)
