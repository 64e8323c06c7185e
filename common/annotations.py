"""Labels of COCO and LabelMe: which regions an annotated image has, and how each is drawn.

COCO's segmentations are polygons or run-length encodings (RLE), decoded by COCO's own code.
LabelMe's shapes are drawn as LabelMe draws them.
"""

import base64
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from common import InputError
from common.source import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES, some, visible_files

BACKGROUND = "background"
IGNORED = "__ignore__"  # LabelMe's name for regions that do not count
SPECIAL = (BACKGROUND, IGNORED)
WITHOUT_AREA = ("point", "points", "line", "linestrip")  # LabelMe's shapes that are left out
# Points of a shape; polygons have 3 or more.
POINTS = {"circle": 2, "mask": 2, "oriented_rectangle": 4, "rectangle": 2}
# Pixels from the corner: coordinates farther off are a mistake, and cost much memory to draw.
FARTHEST = 100_000

Size = tuple[int, int]  # width, height


# ---------------------------------------------------------------------------- regions of an image


@dataclass
class CocoRegion:
    """A region as COCO describes it.

    Attributes:
        label: its class.
        place: what errors call it.
        segmentation: a list of polygons [x, y, x, y, ...] in pixels, or a dict, the RLE. `check`
            makes polygons an RLE, which takes less memory.
    """

    label: str
    place: str
    segmentation: list | dict

    @property
    def area(self) -> int:
        """Pixels, known after `check`."""
        return int(coco_masks().area(self.segmentation))

    def check(self, size: Size) -> None:
        """Make sure that it can be drawn.

        Raises:
            ValueError: it cannot.
        """
        width, height = size
        if isinstance(self.segmentation, list):
            parts = coco_masks().frPyObjects(self.segmentation, height, width)
            self.segmentation = coco_masks().merge(parts)
            return
        if self.segmentation.get("size") != [height, width]:
            found = self.segmentation.get("size")
            raise ValueError(f"an RLE of [height, width] {found} instead of {[height, width]}")
        counts = self.segmentation.get("counts")
        lengths = run_lengths(counts) if isinstance(counts, str) else counts
        check_run_lengths(lengths, width * height)
        if lengths is counts:
            self.segmentation = coco_masks().frPyObjects(self.segmentation, height, width)

    def mask(self, size: Size) -> np.ndarray:
        """Which pixels belong to it: (H,W) bool. It is checked."""
        return coco_masks().decode(self.segmentation).astype(bool)


@dataclass
class LabelMeRegion:
    """A shape as LabelMe describes it.

    Attributes:
        label: its class.
        place: what errors call it.
        kind: LabelMe's `shape_type`.
        points: pairs x, y in pixels.
        stencil: of the kind "mask": a PNG in base64.
    """

    label: str
    place: str
    kind: str
    points: list[tuple[float, float]]
    stencil: str | None = None

    def check(self, size: Size) -> None:
        """Make sure that it can be drawn.

        Raises:
            ValueError: it cannot.
        """
        if self.kind == "mask":
            self._stencil()

    def mask(self, size: Size) -> np.ndarray:
        """Which pixels belong to it: (H,W) bool, as LabelMe draws it. It is checked."""
        canvas = Image.new("L", size)
        if self.kind == "mask":
            left, top = (round(value) for value in self.points[0])
            canvas.paste(self._stencil(), (left, top))
        else:
            self._draw(ImageDraw.Draw(canvas))
        return np.array(canvas, dtype=bool)

    def _draw(self, drawing: ImageDraw.ImageDraw) -> None:
        """Draw what is no mask. PIL's shapes include their outline."""
        if self.kind == "rectangle":
            columns, rows = zip(*self.points)  # the corners may be any two
            drawing.rectangle((min(columns), min(rows), max(columns), max(rows)), 1, 1)
        elif self.kind == "circle":
            (x, y), rim = self.points
            radius = math.dist((x, y), rim)
            drawing.ellipse((x - radius, y - radius, x + radius, y + radius), 1, 1)
        else:
            drawing.polygon(self.points, 1, 1)

    def _stencil(self) -> Image.Image:
        """The pixels of a "mask", mode L, 0 and 1, from the upper left one of its two points.

        Raises:
            ValueError: not a PNG of one channel.
        """
        try:
            content = base64.b64decode(self.stencil, validate=True)
            values = np.array(Image.open(io.BytesIO(content), formats=("PNG",)))
        except Exception as error:  # whatever a broken file makes PIL raise
            raise ValueError(f"its mask is no PNG in base64 ({error})") from None
        if values.ndim != 2:
            raise ValueError("its mask is in colour")
        (left, top), (right, bottom) = self.points
        if right < left or bottom < top:
            raise ValueError("its first point is not the upper left corner")
        if all(value.is_integer() for value in (left, top, right, bottom)):
            # LabelMe cuts the pixels off at whole corners, which are included.
            values = values[: int(bottom - top) + 1, : int(right - left) + 1]
        return Image.fromarray((values != 0).astype(np.uint8))


def coco_masks() -> ModuleType:
    """COCO's own code for masks; imported only where it is needed.

    Raises:
        InputError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError:
        raise InputError("COCO's labels need pycocotools: pip install pycocotools") from None
    return mask


def run_lengths(counts: str) -> list[int]:
    """The run lengths in the string of a compressed RLE.

    A character holds five bits of a number, the lowest first, and says whether more follow. From
    the fourth on a number is the difference to the last but one.
    """
    lengths: list[int] = []
    value = bits = 0
    for character in counts:
        group = ord(character) - 48
        value |= (group & 31) << bits
        bits += 5
        if group & 32:
            continue
        if group & 16:  # negative
            value -= 1 << bits
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = bits = 0
    return lengths


def check_run_lengths(lengths: object, pixels: int) -> None:
    """Make sure that runs fill an image: where they end early COCO's code leaves pixels undefined.

    Raises:
        ValueError: they do not.
    """
    if not isinstance(lengths, list):
        raise ValueError('an RLE without "counts"')
    if not all(isinstance(length, int) and length >= 0 for length in lengths):
        raise ValueError("an RLE whose counts are no whole numbers")
    if sum(lengths) != pixels:
        raise ValueError(f"an RLE of {sum(lengths)} pixels instead of {pixels}")


def check_coordinates(values: Sequence) -> None:
    """Make sure that coordinates, a list or a list of pairs, are numbers in a possible range.

    Raises:
        ValueError: they are not.
    """
    # A comparison with NaN is false.
    if not (np.abs(np.asarray(values, np.float64)) < FARTHEST).all():
        raise ValueError("coordinates that are no numbers, or far off the image")


# ---------------------------------------------------------------------------------- what was read


@dataclass
class Annotated:
    """An image that a labels file lists.

    Attributes:
        origin: the file that lists it.
        title: what messages call it.
        size: as the file says; None where it says nothing. `fit` sets it.
        regions: what is drawn, in this order.
        annotations: how many the file holds, those without an area included.
        turn: of the drawn mask, so that it is upright; None for none.
    """

    origin: Path
    title: str
    size: Size | None
    regions: list[CocoRegion] | list[LabelMeRegion] = field(default_factory=list)
    annotations: int = 0
    turn: Image.Transpose | None = None


@dataclass
class Labels:
    """The content of a labels file, or of a folder of them.

    Attributes:
        classes: names in order, without background and ignored.
        images: by the ids of their files.
        notes: sentences on what was left out or changed.
        boxes: annotations that have a box or keypoints alone.
    """

    classes: list[str]
    images: dict[str, Annotated]
    notes: list[str] = field(default_factory=list)
    boxes: int = 0

    @property
    def annotated(self) -> set[str]:
        """Names of which there are regions."""
        return {region.label for image in self.images.values() for region in image.regions}


def read(place: Path, images: dict[str, Path], folder: Path) -> Labels:
    """Read COCO's or LabelMe's labels; the content tells which.

    Args:
        place: a file, or a folder with LabelMe's.
        images: the images' files by id.
        folder: where these lie.

    Raises:
        InputError: nothing there, a file of another kind, a broken one, or images that are missing.
    """
    if place.is_dir():
        files = [path for path in visible_files(place) if path.suffix.lower() == ".json"]
        if not files:
            raise InputError(f"no .json in {place}")
        return read_labelme(sorted(files), place, images, folder)
    content = read_json(place)
    if kind_of(content, place) == "LabelMe":
        return read_labelme([place], place.parent, images, folder)
    return read_coco(place, content, images, folder)


def read_json(path: Path) -> object:
    """The content of a JSON file.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def kind_of(content: object, path: Path) -> str:
    """Whose labels a file holds: "COCO" or "LabelMe".

    Raises:
        InputError: neither.
    """
    keys = content.keys() if isinstance(content, dict) else ()
    if "shapes" in keys:
        return "LabelMe"
    if {"images", "annotations", "categories"} <= set(keys):
        return "COCO"
    raise InputError(
        f'{path}: neither labels of COCO ("images", "annotations" and "categories") '
        'nor of LabelMe ("shapes")'
    )


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Turn what a wrong value in a file raises into an InputError that begins with `place`."""
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{place}: {error}") from None


def bar(items: Iterable, title: str) -> Iterable:
    """The items, with a progress bar on a terminal."""
    return tqdm(items, title, leave=False, disable=not sys.stderr.isatty())


def entry(record: object, key: str, kinds: type | tuple[type, ...]) -> Any:
    """A value of a JSON object.

    Raises:
        ValueError: there is none of these kinds.
    """
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kinds):
        raise ValueError(f'"{key}" is missing or of another kind')
    return value


def size_of(record: dict, width: str, height: str) -> Size | None:
    """(width, height) under these keys; None where the file does not say.

    Raises:
        ValueError: not two positive numbers.
    """
    if record.get(width) is None and record.get(height) is None:
        return None
    size = int(entry(record, width, (int, float))), int(entry(record, height, (int, float)))
    if min(size) < 1:
        raise ValueError(f'"{width}" and "{height}" must be positive')
    return size


# ------------------------------------------------------------------------------------ class names


def clean(name: str | int) -> str:
    """A class name for classes.txt, where values may follow a name: without spaces."""
    joined = re.sub(r"\s+", "_", str(name).strip())
    return BACKGROUND if joined.lower() in (BACKGROUND, "_background_") else joined


def check_names(names: Iterable[str | int], place: Path) -> list[str]:
    """Notes on names that `clean` changes.

    Raises:
        InputError: one is empty, or two that differ become the same.
    """
    origins: dict[str, str] = {}
    changed = []
    counts = Counter(map(str, names))
    for name in counts:
        cleaned = clean(name)
        if not cleaned:
            raise InputError(f"{place}: a class has no name")
        other = origins.setdefault(cleaned, name)
        if other != name and cleaned not in SPECIAL:
            raise InputError(
                f"{place}: classes '{other}' and '{name}' both become {cleaned}; rename one"
            )
        if cleaned not in (name, BACKGROUND):
            changed.append(cleaned)
    notes = []
    if changed:
        notes.append(f'spaces in class names became "_": {some(changed)}')
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        notes.append(f"categories of one name are one class: {some(repeated)}")
    return notes


# --------------------------------------------------------------------------- where the images are


def tails(path: str) -> list[str]:
    """The ids that the path of an image may mean, the longest first.

    "a/b/c.png" gives "a/b/c", "b/c" and "c". Steps upwards are left out.
    """
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if not parts:
        return []
    suffix = Path(parts[-1]).suffix
    if suffix.lower() in (*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES, ".json"):
        parts[-1] = parts[-1].removesuffix(suffix)
    return ["/".join(parts[start:]) for start in range(len(parts))]


def find(path: str, by_tail: dict[str, list[str]]) -> str | None:
    """The id of the image with this path; None if there is none, or more than one.

    Nothing but ids is looked up: no path leads to another file.

    Args:
        path: as a labels file writes it.
        by_tail: the ids that end with a path.
    """
    for tail in tails(path):
        found = by_tail.get(tail, [])
        if tail in found:
            return tail
        if found:
            return found[0] if len(found) == 1 else None
    return None


def assign(
    listed: list[tuple[Annotated, list[str]]], images: dict[str, Path], folder: Path
) -> dict[str, Annotated]:
    """The images that labels list, by the ids of their files.

    Args:
        listed: each with the paths that it may have, the likeliest first.
        images: the images' files by id.
        folder: where these lie.

    Raises:
        InputError: some have no file, or two have one.
    """
    by_tail: dict[str, list[str]] = {}
    for name in images:
        for tail in tails(f"{name}.png"):
            by_tail.setdefault(tail, []).append(name)
    found: dict[str, Annotated] = {}
    missing, twice = [], []
    for image, paths in listed:
        name = next(filter(None, (find(path, by_tail) for path in paths)), None)
        if name is None:
            missing.append(image.title)
        elif name in found:
            twice.append(f"{found[name].title} and {image.title} ({images[name].name})")
        else:
            found[name] = image
    if missing:
        raise InputError(
            f"{len(missing)} images of the labels are not in {folder}, or more than one there has "
            f"their name: {some(missing)}; where they lie elsewhere, say so with --images"
        )
    if twice:
        raise InputError(f"labels that lead to one image in {folder}: {some(twice)}")
    return found


# ------------------------------------------------------------------------------------------- COCO


def read_coco(path: Path, content: dict, images: dict[str, Path], folder: Path) -> Labels:
    """The labels in a COCO file; its classes are all its categories, by their ids.

    Entries of one `file_name` are one image.

    Raises:
        InputError: the file is broken, or images are missing.
    """
    with naming(path):
        names = coco_categories(content)
        listed, by_id = coco_images(path, content)
        records = entry(content, "annotations", list)
    skipped: Counter[str] = Counter()
    for record in records:
        with naming(f"{path}: annotation {record.get('id') if isinstance(record, dict) else ''}"):
            image = by_id.get(entry(record, "image_id", (int, str)))
            name = names.get(entry(record, "category_id", (int, str)))
            if image is None or name is None:
                raise ValueError("of an image or a category that the file does not list")
            image.annotations += 1
            segmentation = coco_segmentation(record.get("segmentation"), skipped)
            if segmentation:
                place = f"annotation {record.get('id')}"
                image.regions.append(CocoRegion(clean(name), place, segmentation))
    notes = check_names(names.values(), path)
    if skipped["boxes"]:
        notes.append(
            f"{skipped['boxes']} annotations without a segmentation (boxes or keypoints) "
            "are left out"
        )
    if skipped["short"]:
        notes.append(f"{skipped['short']} polygons of fewer than 3 points are left out")
    classes = dict.fromkeys(clean(name) for name in names.values())
    found = assign([(image, [image.title]) for image in listed], images, folder)
    return Labels([name for name in classes if name not in SPECIAL], found, notes, skipped["boxes"])


def coco_categories(content: dict) -> dict[int | str, str | int]:
    """The names of the categories by their ids, sorted.

    Raises:
        ValueError: a category without one of them, or two with one id.
    """
    names: dict[int | str, str | int] = {}
    for record in entry(content, "categories", list):
        key = entry(record, "id", (int, str))
        if key in names:
            raise ValueError(f"two categories have the id {key}")
        names[key] = entry(record, "name", (str, int))
    return dict(sorted(names.items()))


def coco_images(path: Path, content: dict) -> tuple[list[Annotated], dict[int | str, Annotated]]:
    """The images that a file lists, and the same by their ids.

    Raises:
        ValueError: an image without a name or an id, or two that contradict each other.
    """
    by_path: dict[str, Annotated] = {}
    by_id: dict[int | str, Annotated] = {}
    for record in entry(content, "images", list):
        title = entry(record, "file_name", str)
        key = entry(record, "id", (int, str))
        size = size_of(record, "width", "height")
        name = next(iter(tails(title)), "")
        image = by_path.setdefault(name, Annotated(path, title, size))
        if image.size != size:
            raise ValueError(f"two entries for {title} have different sizes")
        if by_id.setdefault(key, image) is not image:
            raise ValueError(f"{image.title} and {by_id[key].title} have the same id {key}")
    return list(by_path.values()), by_id


def coco_segmentation(segmentation: object, skipped: Counter[str]) -> list | dict | None:
    """What can be drawn of an annotation; None if nothing can.

    Args:
        segmentation: as the file holds it.
        skipped: is added to: "boxes", annotations without one, and "short", polygons of fewer than
            3 points.

    Raises:
        ValueError: neither polygons nor an RLE.
    """
    if not segmentation:
        skipped["boxes"] += 1
        return None
    if isinstance(segmentation, dict):
        return segmentation
    if not isinstance(segmentation, list) or not all(isinstance(p, list) for p in segmentation):
        raise ValueError("its segmentation is neither a list of polygons nor an RLE")
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    skipped["short"] += len(segmentation) - len(polygons)
    for polygon in polygons:
        if len(polygon) % 2:
            raise ValueError("a polygon with an odd number of coordinates")
        check_coordinates(polygon)
    return polygons


# ---------------------------------------------------------------------------------------- LabelMe


def read_labelme(files: list[Path], place: Path, images: dict[str, Path], folder: Path) -> Labels:
    """The labels in LabelMe's files; the classes are the labels that are drawn, sorted.

    Args:
        files: one an image.
        place: the folder that holds them.
        images: the images' files by id.
        folder: where these lie.

    Raises:
        InputError: a file is broken or of another kind, or images are missing.
    """
    listed = []
    names: set[str] = set()
    skipped: Counter[str] = Counter()
    for path in bar(files, "read"):
        content = read_json(path)
        if kind_of(content, path) == "COCO":
            raise InputError(f"{path}: COCO's labels in a folder; give the file itself")
        with naming(path):
            image = labelme_image(path, content, names, skipped)
        listed.append((image, labelme_paths(path, content, place, folder)))
    notes = check_names(sorted(names), place)
    short = skipped.pop("short", 0)
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        notes.append(f"{skipped.total()} shapes without an area are left out: {kinds}")
    if short:
        notes.append(f"{short} polygons of fewer than 3 points are left out")
    classes = sorted({clean(name) for name in names}.difference(SPECIAL))
    return Labels(classes, assign(listed, images, folder), notes)


def labelme_image(path: Path, content: dict, names: set[str], skipped: Counter[str]) -> Annotated:
    """What a LabelMe file holds. The image that it may embed is not looked at.

    Args:
        path: of the file.
        content: of the file.
        names: labels are added as they stand in the file.
        skipped: shapes without an area are added by their kind, and "short" polygons.

    Raises:
        ValueError: a shape is broken or of an unknown kind.
    """
    image = Annotated(path, str(path), size_of(content, "imageWidth", "imageHeight"))
    for number, shape in enumerate(entry(content, "shapes", list), start=1):
        image.annotations += 1
        points = entry(shape, "points", list)
        kind = str(shape.get("shape_type") or "polygon")  # old files hold polygons alone
        if kind in WITHOUT_AREA:
            skipped[kind] += 1
            continue
        if kind == "polygon" and len(points) < 3:
            skipped["short"] += 1
            continue
        name = str(entry(shape, "label", (str, int)))
        names.add(name)
        region = LabelMeRegion(clean(name), f"shape {number}", kind, points, shape.get("mask"))
        with naming(f"{path}: {region.place}"):
            region.points = labelme_points(kind, points)
        image.regions.append(region)
    return image


def labelme_points(kind: str, points: list) -> list[tuple[float, float]]:
    """The points of a shape that has an area.

    Raises:
        ValueError: an unknown kind of shape, or not as many pairs of numbers as it needs.
    """
    if kind not in (*POINTS, "polygon"):
        raise ValueError(f"unknown shape_type {kind}")
    pairs = [(float(x), float(y)) for x, y in points]
    check_coordinates(pairs)
    if len(pairs) != POINTS.get(kind, len(pairs)):
        raise ValueError(f"a {kind} of {len(pairs)} points")
    return pairs


def labelme_paths(path: Path, content: dict, place: Path, folder: Path) -> list[str]:
    """The paths of the image of a LabelMe file, the likeliest first.

    These are its own beside the images, its own in the folder of labels, and the one that it names.
    """
    paths = [path.relative_to(place).as_posix()]
    real, images = path.resolve(), folder.resolve()
    if real.is_relative_to(images):
        paths.insert(0, real.relative_to(images).as_posix())
    named = content.get("imagePath")
    return [*paths, named] if isinstance(named, str) else paths
