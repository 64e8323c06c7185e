"""COCO's or LabelMe's labels as the indexed masks of `--data folder`.

    python -m common.import_labels instances_train.json DIR
    python -m common.import_labels FOLDER_OF_LABELME_FILES DIR --images my_images

The images lie in and below DIR/images; with `--images` that becomes a link to where they are.
Written are DIR/classes.txt, DIR/masks/ID.png for each labelled image (label = index, 255 = ignored,
turned as viewers show the image) and DIR/labels.png, a page to check the labels by eye. Everything
is checked before anything is written.

Where COCO's regions overlap the smaller one is seen, since larger ones are drawn first, by their
decoded area. LabelMe's shapes are drawn in the order of their file. Images that a file lists
without any annotation may be unlabelled or may show no object: `--empty` says which.
"""

import argparse
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from common import InputError, check, figures, writing
from common.annotations import (
    BACKGROUND,
    IGNORED,
    Annotated,
    CocoRegion,
    Labels,
    bar,
    clean,
    naming,
    read,
)
from common.augment import IGNORE
from common.folder import masks_of
from common.images import TURNS, open_image
from common.masks import read_mask, write_mask
from common.source import IMAGE_SUFFIXES, images_in, masks_in, read_lines, some, voc_colours

PAGE = 24  # images on the page of labels
COLUMNS = 6
TITLE = 26  # characters above an image


# ------------------------------------------------------------------------- which classes and masks


def choose_classes(labels: Labels, args: argparse.Namespace) -> tuple[str, ...]:
    """The names for classes.txt.

    Args:
        labels: what was read.
        args: `classes`, `rest` and `empty`.

    Raises:
        InputError: unknown names, too few or too many classes, or images without objects where
            there is no background.
    """
    wanted = list(dict.fromkeys(map(clean, args.classes or labels.classes)))
    annotated = BACKGROUND in labels.annotated and (not args.classes or BACKGROUND in wanted)
    background = [BACKGROUND] if args.rest == BACKGROUND or annotated else []
    unknown = sorted(set(wanted) - set(labels.classes) - set(background))
    if unknown:
        raise InputError(f"--classes: no {some(unknown)} in the labels: {some(labels.classes)}")
    if args.empty == BACKGROUND and not background:
        raise InputError("--empty background: with --rest ignored there is no class background")
    classes = (*background, *(name for name in wanted if name != BACKGROUND))
    if not 2 <= len(classes) <= 254:
        raise InputError(
            f"{args.labels}: {len(classes)} classes ({some(list(classes))}); 2 to 254 are possible "
            "(255 means ignored); choose some with --classes"
        )
    return classes


def refuse_nothing(labels: Labels, place: Path) -> None:
    """Raise an InputError where nothing can be drawn of the labels in `place`."""
    if labels.annotated:
        return
    if labels.boxes:
        raise InputError(
            f"{place} holds boxes only (or keypoints), no segmentations; "
            "masks cannot be drawn from these"
        )
    raise InputError(f"{place} holds no annotation that can be drawn")


def is_labelled(image: Annotated, values: dict[str, int], args: argparse.Namespace) -> bool:
    """Whether an image gets a mask.

    One of which nothing can be drawn, though it is annotated, gets none: its objects would become
    background.

    Args:
        image: as the labels list it.
        values: the label of each class that is drawn.
        args: `empty` and `rest`.
    """
    if image.annotations == 0:
        return args.empty == BACKGROUND
    if args.rest == BACKGROUND:
        return bool(image.regions)  # what `--classes` leaves out is background
    return any(region.label in values for region in image.regions)


def choose_images(
    labels: Labels, values: dict[str, int], args: argparse.Namespace
) -> tuple[dict[str, Annotated], list[str]]:
    """The images that get a mask, and notes on annotations and images that are left out.

    Args:
        labels: what was read.
        values: the label of each class that is drawn.
        args: `classes`, `empty` and `rest`.

    Raises:
        InputError: the images show none of the classes.
    """
    if labels.annotated.isdisjoint(values):
        raise InputError(f"{args.labels}: no annotation of {some(args.classes)}")
    left_out: Counter[str] = Counter()
    chosen: dict[str, Annotated] = {}
    empty = without = 0
    for name, image in labels.images.items():
        left_out.update(region.label for region in image.regions if region.label not in values)
        if is_labelled(image, values, args):
            chosen[name] = image
        elif image.annotations:
            without += 1
        empty += image.annotations == 0
    return chosen, notes_on_images(left_out, empty, without, args)


def notes_on_images(
    left_out: Counter[str], empty: int, without: int, args: argparse.Namespace
) -> list[str]:
    """Sentences on what `choose_images` counted."""
    notes = []
    if left_out:
        counts = [f"{name} {count}" for name, count in left_out.most_common()]
        notes.append(
            f"{left_out.total()} annotations of other classes are left out: {some(counts)}"
        )
    if empty and args.empty == BACKGROUND:
        notes.append(f"{empty} images without any annotation are background (--empty)")
    elif empty:
        notes.append(
            f"{empty} images without any annotation get no mask; where they show no object, "
            "give --empty background"
        )
    if without:
        notes.append(f"{without} images get no mask, since none of their annotations can be drawn")
    return notes


# --------------------------------------------------------------------------------------- drawing


def fit(image: Annotated, path: Path) -> bool:
    """Compare the size of the labels with that of the image, and turn the mask where it must be.

    Args:
        image: its `size` and `turn` are set.
        path: the image's file.

    Returns:
        Whether the image is turned in a way that leaves its size, so that no one can tell whether
        its labels are turned as well.

    Raises:
        InputError: the image cannot be read, or has another size.
    """
    file = open_image(path)
    with file.header:
        upright, stored = file.size, file.stored_size
    if image.size in (None, upright):
        image.size = upright
        return file.orientation != 1 and upright == stored
    if image.size != stored:
        labels, found = ("{}x{}".format(*size) for size in (image.size, upright))
        raise InputError(f"{path}: the image has {found} pixels, its labels {labels}")
    image.turn = TURNS[file.orientation]
    return False


def prepare(chosen: dict[str, Annotated], images: dict[str, Path]) -> list[str]:
    """Check that every image's mask can be drawn, and put COCO's regions in order.

    Returns:
        Notes.

    Raises:
        InputError: a size or a region is wrong; the message names it.
    """
    doubtful = 0
    for name, image in bar(chosen.items(), "check"):
        doubtful += fit(image, images[name])
        for region in image.regions:
            with naming(f"{image.origin}: {region.place}"):
                region.check(image.size)
        if image.regions and isinstance(image.regions[0], CocoRegion):
            image.regions.sort(key=lambda region: region.area, reverse=True)
    if not doubtful:
        return []
    return [
        f"{doubtful} images are turned by EXIF without a change of size; their labels are taken "
        "to be those of the image as viewers show it"
    ]


def draw(image: Annotated, values: dict[str, int], rest: int) -> np.ndarray:
    """The upright mask of an image, (H,W) uint8.

    Args:
        image: `prepare` has checked it.
        values: the label of each class; others are left out.
        rest: the label of pixels without any annotation.
    """
    width, height = image.size
    labels = np.full((height, width), rest, np.uint8)
    for region in image.regions:
        if region.label in values:
            labels[region.mask(image.size)] = values[region.label]
    if image.turn is None:
        return labels
    return np.array(Image.fromarray(labels).transpose(image.turn))


def write_masks(
    chosen: dict[str, Annotated], values: dict[str, int], rest: int, folder: Path
) -> np.ndarray:
    """Draw and write the masks, one after the other.

    Returns:
        (256,) pixels of each label.

    Raises:
        InputError: the disk is full or the folder cannot be written to.
    """
    colours = voc_colours(256)
    pixels = np.zeros(256, np.int64)
    for name, image in bar(chosen.items(), "write"):
        # An image that is known to show no object holds nothing that could be ignored.
        labels = draw(image, values, rest if image.annotations else 0)
        write_mask(folder / f"{name}.png", torch.from_numpy(labels), colours)
        pixels += np.bincount(labels.ravel(), minlength=256)
    return pixels


def draw_page(
    names: list[str], images: dict[str, Path], folder: Path, classes: tuple[str, ...]
) -> list[str]:
    """Draw FOLDER/labels.png: some images, evenly spread, under their masks' colours.

    Args:
        names: ids of the labelled images.
        images: files by id.
        folder: the data set's.
        classes: their names.

    Returns:
        Notes on images that cannot be decoded.

    Raises:
        InputError: the page cannot be written.
    """
    places = np.linspace(0, len(names) - 1, min(PAGE, len(names))).round().astype(int)
    colours = voc_colours(len(classes))
    blends, notes = {}, []
    for name in (names[place] for place in places):
        try:
            pixels = figures.shrink(shown_pixels(images[name]))
        except InputError as error:
            notes.append(str(error))
            continue
        mask = read_mask(folder / "masks" / f"{name}.png").numpy()
        blends[name] = pixels // 2 + figures.colourise(figures.shrink(mask), colours) // 2
    if blends:
        save_page(blends, classes, folder / "labels.png")
    return notes


def shown_pixels(path: Path) -> np.ndarray:
    """The pixels of an image, (H,W,3) uint8; grey of more than 8 bits by its own range.

    Raises:
        InputError: it cannot be decoded.
    """
    image = open_image(path)
    if image.deep_grey:
        image.grey_range = check.range_of(check.some_values(path), path)
    return image.pixels().numpy()


def save_page(blends: dict[str, np.ndarray], classes: tuple[str, ...], path: Path) -> None:
    """Write images, (H,W,3) uint8 by their ids, beside each other above the classes' colours.

    Raises:
        InputError: the page cannot be written.
    """
    rows = -(-len(blends) // COLUMNS)
    tallest = max(blend.shape[0] / blend.shape[1] for blend in blends.values())
    cell = 1.75 * min(tallest, 1.2) + 0.25  # inches, with the title
    figure, axes = figures.pyplot().subplots(
        rows, COLUMNS, figsize=(11, rows * cell + 0.2), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, blend) in zip(axes.flat, blends.items()):
        axis.imshow(blend, interpolation="nearest")
        title = name if len(name) <= TITLE else "…" + name[1 - TITLE :]
        axis.set_title(title, fontsize=6, parse_math=False)
    data = SimpleNamespace(classes=classes, colours=voc_colours(len(classes)))
    figures.legend(figure, data, room=0)
    with writing(path):
        figures.save(figure, path)


# --------------------------------------------------------------------------------- files, messages


def image_folder(folder: Path, given: Path | None) -> Path:
    """Where the images lie: DIR/images, or what `--images` gives.

    Args:
        folder: DIR.
        given: the flag's value, None without it.

    Raises:
        InputError: there is no such folder, or DIR/images is another one.
    """
    link = folder / "images"
    if given is None:
        if not os.path.isdir(link):  # Path.is_dir raises where a folder may not be entered
            raise InputError(f"no folder {link}; put the images there or give --images FOLDER")
        return link
    if not os.path.isdir(given):
        raise InputError(f"--images: no folder {given}")
    if folder.resolve().is_relative_to(given.resolve()):
        raise InputError(f"--images {given}: {folder} lies in it; give a folder of images alone")
    if link.is_symlink() or link.exists():
        if link.resolve() != given.resolve():
            raise InputError(f"{link} is there and is another folder than --images {given}")
    return given


def link_images(folder: Path, place: Path) -> None:
    """Make DIR/images a link to the images where they lie elsewhere.

    Raises:
        InputError: the system cannot.
    """
    link = folder / "images"
    if link.exists():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        link.symlink_to(place.resolve(), target_is_directory=True)
    except (OSError, NotImplementedError) as error:
        raise InputError(
            f"cannot make {link} a link to {place} ({error}); copy the images to {link}"
        ) from None


def refuse_overwriting(folder: Path, classes: tuple[str, ...], names: Iterable[str]) -> None:
    """Raise an InputError where other classes, or masks of these names, are there already."""
    path = folder / "classes.txt"
    if path.is_file() and tuple(read_lines(path)) != classes:
        raise InputError(
            f"{path} names other classes than {some(list(classes))}; give --classes as they stand "
            "there, or --overwrite"
        )
    masks = (folder / "masks" / f"{name}.png" for name in names)
    there = [str(mask) for mask in masks if mask.exists()]
    if there:
        raise InputError(f"{len(there)} masks are there already: {some(there)}; give --overwrite")


def refuse_second_masks(folder: Path, masks: dict[str, Path], names: Iterable[str]) -> None:
    """Raise an InputError where an image would get a second mask: `--data folder` refuses two.

    Args:
        folder: the data set's.
        masks: those that are there, by the ids of their images.
        names: ids of the images that get a mask, NAME.png.
    """
    others = [
        str(masks[name])
        for name in names
        if name in masks and masks[name] != folder / "masks" / f"{name}.png"
    ]
    if others:
        raise InputError(
            f"{len(others)} images have a mask already, of another name: {some(others)}; "
            "remove these first"
        )


def refuse_mixing(folder: Path, classes: tuple[str, ...], names: Iterable[str]) -> None:
    """Raise an InputError where masks of other classes would stay: their labels would be wrong."""
    path = folder / "classes.txt"
    if not path.is_file() or tuple(read_lines(path)) == classes:
        return
    written = {folder / "masks" / f"{name}.png" for name in names}
    stay = sorted(str(mask) for mask in masks_in(folder / "masks").values() if mask not in written)
    if stay:
        raise InputError(
            f"{path} has other classes, and {len(stay)} masks of these would stay: {some(stay)}; "
            "remove them first"
        )


def write_classes(path: Path, classes: tuple[str, ...]) -> None:
    """Write classes.txt, whole or not at all.

    Raises:
        InputError: the disk is full or the folder cannot be written to.
    """
    part = path.with_suffix(".part")
    with writing(path):
        part.write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
        part.replace(path)


def summary(
    count: int, classes: tuple[str, ...], pixels: np.ndarray, notes: list[str], folder: Path
) -> str:
    """What is printed at the end.

    Args:
        count: of the masks.
        classes: their names.
        pixels: (256,) of each label.
        notes: on what was left out or changed.
        folder: the data set's.
    """
    shares = 100 * pixels / pixels.sum()
    rows = [(name, shares[index]) for index, name in enumerate(classes)]
    if pixels[IGNORE]:
        rows.append(("(ignored)", shares[IGNORE]))
    width = max(len(name) for name, _ in rows)
    lines = [f"{count} masks of {len(classes)} classes in {folder}/masks; share of pixels in %:"]
    lines += [f"  {name:{width}} {share:6.2f}" for name, share in rows]
    lines += [f"note: {note}" for note in notes]
    lines.append(f"look at {folder}/labels.png, then train:")
    lines.append(f"  python cps.py --data folder --data-dir {shlex.quote(str(folder))}")
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "labels",
        type=Path,
        metavar="LABELS",
        help="a .json of COCO or LabelMe, or a folder of LabelMe's",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the data folder")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="where the images lie, if that is not DIR/images, which becomes a link to it",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="only these, in this order, after background; default: all",
    )
    parser.add_argument(
        "--rest",
        choices=[BACKGROUND, "ignored"],
        default=BACKGROUND,
        help="what pixels without any annotation are; default: background",
    )
    parser.add_argument(
        "--empty",
        choices=["unlabelled", BACKGROUND],
        default="unlabelled",
        help="what images without any annotation are; default: unlabelled, without a mask",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace masks and classes.txt that are there"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Import the labels.

    Raises:
        InputError: labels or images cannot be used, or something would be overwritten.
    """
    args = parse_args(argv)
    place = image_folder(args.folder, args.images)
    images = images_in(place)
    if not images:
        raise InputError(f"no {', '.join(IMAGE_SUFFIXES)} in {place}")
    labels = read(args.labels, images, place)
    refuse_nothing(labels, args.labels)
    classes = choose_classes(labels, args)
    values = {name: index for index, name in enumerate(classes)} | {IGNORED: IGNORE}
    chosen, notes = choose_images(labels, values, args)
    notes = [*labels.notes, *notes, *prepare(chosen, images)]
    refuse_second_masks(args.folder, masks_of(images, args.folder / "masks"), chosen)
    if not args.overwrite:
        refuse_overwriting(args.folder, classes, chosen)
    refuse_mixing(args.folder, classes, chosen)

    link_images(args.folder, place)
    write_classes(args.folder / "classes.txt", classes)
    rest = 0 if args.rest == BACKGROUND else IGNORE
    pixels = write_masks(chosen, values, rest, args.folder / "masks")
    notes += draw_page(list(chosen), images, args.folder, classes)
    print(summary(len(chosen), classes, pixels, notes, args.folder))


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        print(f"import_labels: error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("import_labels: stopped; --overwrite begins anew", file=sys.stderr)
        sys.exit(130)
