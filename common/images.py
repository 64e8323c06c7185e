"""One image or mask file: opening, turning as EXIF says, decoding, shrinking, and the labels in it.

Everything that reads an image file of the user does it here, so that training, evaluation and
prediction see the same pixels, and every file that cannot be read ends in one line that names it.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, decode_png, read_file

from common import InputError, lacks_memory
from common.augment import IGNORE

# PIL tries no other: it would start Ghostscript for an EPS file, whatever the file's name.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "WEBP")  # JPEG changes the values
INVALID = 254  # in a `LabelTable`: no class has this number, since there are at most 254 classes
# torchvision gives PIL's very pixels in less time. The PNG decoder of newer versions ends the
# process on a damaged file (a segmentation fault in 0.29.1); that of 0.26 raises an error.
FAST_DECODERS = {"JPEG": decode_jpeg}
if tuple(map(int, torchvision.__version__.split(".")[:2])) <= (0, 26):
    FAST_DECODERS["PNG"] = decode_png
TAIL = 4096  # bytes at a file's end that are searched for its end marker
# MPO is a JPEG that holds further ones, as those of phones do; PIL tells the two apart.
END_MARKERS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "GIF": b";"}
BITS, SAMPLES = 258, 277  # tags of a TIFF file: bits of each channel, and how many there are
TIFF_BEGINS = (b"II*\0", b"MM\0*")  # the first bytes of a TIFF file
# Tags of a TIFF file: where its parts begin, and how many bytes each has.
STRIP_OFFSETS, STRIP_COUNTS, TILE_OFFSETS, TILE_COUNTS = 273, 279, 324, 325

# left, top, right, bottom in pixels; the last two are one past the end
Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]  # red, green, blue
Range = tuple[float, float]  # values of deep grey images that become black and white
DEEP_GREY: Range = (0, 65535)  # of 16 bits

# What undoes each EXIF orientation. 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def naming(path: Path, doing: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into an InputError "PATH: cannot be DOING (reason)".

    On a broken file PIL and torchvision raise OSError, SyntaxError, ValueError, RuntimeError,
    struct.error and more.
    """
    try:
        with naming_if_too_large(path):
            yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: cannot be {doing} ({reason})") from None


@contextmanager
def naming_if_too_large(path: Path | int) -> Iterator[None]:
    """Turn a lack of memory inside into an InputError that names the image; other errors pass."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if lacks_memory(error):
            raise InputError(f"{path}: too large for this machine's memory") from None
        raise


@dataclass
class ImageFile:
    """A file whose header is read and whose pixels are not yet decoded.

    Attributes:
        path: the file.
        header: PIL's image.
        orientation: EXIF's, 1 (upright) to 8.
        grey_range: what becomes black and white in a grey image of more than 8 bits.
    """

    path: Path
    header: Image.Image
    orientation: int
    grey_range: Range = DEEP_GREY

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) as the file stores it."""
        return self.header.size

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as viewers show it, after the turn that EXIF asks for."""
        width, height = self.stored_size
        return (height, width) if self.orientation >= 5 else (width, height)

    @property
    def deep_grey(self) -> bool:
        """Whether it is grey with more than 8 bits: 16-bit PNG or TIFF, or a TIFF of floats."""
        return self.header.mode.startswith(("I", "F"))

    @property
    def deep_colour(self) -> bool:
        """Whether it has 16 bits a channel and is no plain grey; PIL keeps the higher 8 of them.

        To be asked before the pixels are decoded, which makes PIL forget it.
        """
        if self.deep_grey:
            return False
        if self.header.format == "TIFF":
            return max(self.header.tag_v2.get(BITS, (8,))) > 8
        tile = self.header.tile
        return self.header.format == "PNG" and bool(tile) and tile[0].args.endswith(";16B")

    @property
    def lost_bands(self) -> bool:
        """Whether it is a TIFF of more bands than are read: one of grey, or three of colour."""
        if self.header.format != "TIFF":
            return False
        read = 3 if self.header.mode == "RGBX" else len(self.header.getbands())
        return self.header.tag_v2.get(SAMPLES, 1) > read

    @property
    def coloured(self) -> bool:
        """Whether a mask's pixels are colours and no values.

        The numbers in a GIF are none: programs number its palette anew when they write it. So those
        of a grey palette are its greys, and any other palette makes colours.
        """
        if self.header.format == "GIF":
            with naming(self.path, "decoded"):
                used = self.header.convert("RGB").getcolors(256)
            return any(len(set(colour)) > 1 for _, colour in used)
        return self.header.mode in ("RGB", "RGBA")

    def halve(self) -> bool:
        """Decode at half the size from now on, if that is possible; returns whether it is.

        It is for JPEGs, and skips most of their decoding.
        A turned image of odd size is not halved: its pairs of pixels start at the other end.
        """
        width, height = self.stored_size
        if self.orientation != 1 and (width % 2 or height % 2):
            return False
        return self.header.draft("RGB", (max(1, width // 2), max(1, height // 2))) is not None

    def pixels(self, box: Box | None = None) -> Tensor:
        """The upright image, or its part under `box`, as (H,W,3) uint8 RGB.

        Raises:
            InputError: the file is truncated or broken, or too large for the memory.
        """
        with naming(self.path, "decoded"):
            pixels = self._decode_fast()
            if pixels is None:
                upright = self._part(to_rgb(self.header, self.grey_range), box)
                return torch.from_numpy(np.array(upright))
            if box is None:
                return pixels
            left, top, right, bottom = box
            return pixels[top:bottom, left:right]

    def shrunk_pixels(self, size: tuple[int, int]) -> Tensor:
        """The upright image at a smaller size (width, height), antialiased: (H,W,3) uint8 RGB.

        Raises:
            InputError: as `pixels`.
        """
        with naming(self.path, "decoded"):
            stored = size[::-1] if self.orientation >= 5 else size
            self.header.draft("RGB", stored)  # a JPEG at a size between the two, in less time
            upright = self._part(to_rgb(self.header, self.grey_range), None)
            return torch.from_numpy(np.array(upright.resize(size, Image.Resampling.BILINEAR)))

    def deep_values(self) -> np.ndarray:
        """The values of a grey image of more than 8 bits: (H,W), of the file's own type.

        Raises:
            InputError: it cannot be decoded.
        """
        with naming(self.path, "decoded"):
            return np.asarray(self.header)

    def values(self, box: Box | None = None) -> np.ndarray:
        """The values of a mask, upright, or those under `box`: (H,W) uint8, or uint16 if above 255.

        Raises:
            InputError: broken, in colour, with fewer than 8 bits of grey, or with other values than
                whole numbers from 0 to 65535.
        """
        tile = self.header.tile
        if tile and tile[0].args in ("L;2", "L;4"):  # PIL would stretch these values to 0..255
            raise InputError(
                f"{self.path}: the mask has fewer than 8 bits a pixel; "
                "save it as an indexed or an 8-bit grey PNG"
            )
        with naming(self.path, "decoded"):
            header = self.header
            if header.format == "GIF":  # see `coloured`
                header = header.convert("RGB")
            header.load()
            values = np.array(self._part(header, box))
        if values.ndim == 3:
            return one_channel(values, header.mode, self.path)
        if values.dtype in (bool, np.uint8):
            return values.astype(np.uint8, copy=False)
        impossible = (values < 0) | (values > 65535) | (values != np.floor(values))
        refuse_labels(values[impossible], "whole numbers from 0 to 65535", self.path)
        return values.astype(np.uint16 if (values > 255).any() else np.uint8)

    def colours(self, box: Box | None = None) -> np.ndarray:
        """The colours of a mask, upright, or those under `box`: (H,W,3) uint8 RGB.

        An indexed mask has those of its palette; alpha is left out.

        Raises:
            InputError: broken.
        """
        with naming(self.path, "decoded"):
            return np.array(self._part(self.header.convert("RGB"), box))

    def check_end(self) -> None:
        """Look for what a file that was cut off has lost: its end marker, or some of its bytes.

        Where no marker is found among the last bytes the file is decoded to be sure, since some
        cameras append data of their own.

        Raises:
            InputError: the file is truncated.
        """
        marker = END_MARKERS.get(self.header.format)
        with naming(self.path, "decoded"):
            with open(self.path, "rb") as file:
                length = file.seek(0, 2)
                file.seek(max(0, length - TAIL))
                whole = marker in file.read() if marker else self._needed_bytes() <= length
            if not whole:
                self.header.load()

    def _needed_bytes(self) -> int:
        """How long a TIFF, BMP or WebP file says it is, at least."""
        if self.header.format == "TIFF":
            tags = self.header.tag_v2
            starts = tags.get(STRIP_OFFSETS) or tags.get(TILE_OFFSETS) or ()
            counts = tags.get(STRIP_COUNTS) or tags.get(TILE_COUNTS) or ()
            return max((start + count for start, count in zip(starts, counts)), default=0)
        with open(self.path, "rb") as file:
            head = file.read(8)
        if self.header.format == "BMP":
            return int.from_bytes(head[2:6], "little")
        return int.from_bytes(head[4:8], "little") + 8

    def _decode_fast(self) -> Tensor | None:
        """(H,W,3) uint8 by torchvision: PIL's very pixels in less time.

        None for what torchvision decodes otherwise: turned, halved, other than 8-bit RGB, broken.
        """
        drafted = getattr(self.header, "decoderconfig", ())
        if self.orientation != 1 or self.header.mode != "RGB" or drafted:
            return None
        decoder = FAST_DECODERS.get(self.header.format)
        try:
            pixels = decoder and decoder(read_file(str(self.path)), ImageReadMode.RGB)
        except (RuntimeError, UnicodeError):  # PIL succeeds, or says what is wrong
            return None
        if pixels is None or pixels.dtype != torch.uint8:  # 16 bits a channel
            return None
        return pixels.permute(1, 2, 0)

    def _part(self, image: Image.Image, box: Box | None) -> Image.Image:
        """The upright image, or its part under `box`."""
        if self.orientation in TURNS:
            image = image.transpose(TURNS[self.orientation])
        return image.crop(box) if box else image


@dataclass
class Drawn:
    """An image or a mask that is no file, with the methods of `ImageFile` that a sample needs.

    Attributes:
        array: (H,W,3) or (H,W) uint8.
    """

    array: np.ndarray
    path: None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        height, width = self.array.shape[:2]
        return width, height

    def halve(self) -> bool:
        """No: there is nothing to decode."""
        return False

    def values(self, box: Box | None = None) -> np.ndarray:
        """The array, or its part under `box`."""
        left, top, right, bottom = box or (0, 0, *self.size)
        return self.array[top:bottom, left:right]

    def pixels(self, box: Box | None = None) -> Tensor:
        """As `values`, as a tensor of its own."""
        return torch.from_numpy(self.values(box).copy())


@dataclass
class Shrunk:
    """An image or a mask at a smaller size, with the methods of `ImageFile` that a sample needs.

    Attributes:
        file: the file, decoded as a whole.
        size: (width, height) to shrink it to.
    """

    file: ImageFile
    size: tuple[int, int]

    @property
    def path(self) -> Path:
        """The file's."""
        return self.file.path

    def halve(self) -> bool:
        """No: its boxes are those of the smaller size already."""
        return False

    def pixels(self, box: Box | None = None) -> Tensor:
        """The image, or its part under `box`, as (H,W,3) uint8 RGB, antialiased."""
        left, top, right, bottom = box or (0, 0, *self.size)
        return self.file.shrunk_pixels(self.size)[top:bottom, left:right]

    def values(self, box: Box | None = None) -> np.ndarray:
        """The values of a mask, each that of the nearest pixel, or those under `box`."""
        return self._nearest(self.file.values(), box)

    def colours(self, box: Box | None = None) -> np.ndarray:
        """The colours of a mask, each that of the nearest pixel, or those under `box`."""
        return self._nearest(self.file.colours(), box)

    def _nearest(self, array: np.ndarray, box: Box | None) -> np.ndarray:
        """The pixels of an array (H,W,...) that lie under the centres of those of the box."""
        left, top, right, bottom = box or (0, 0, *self.size)
        width, height = self.size
        rows = (np.arange(top, bottom) + 0.5) * array.shape[0] / height
        columns = (np.arange(left, right) + 0.5) * array.shape[1] / width
        return array[np.ix_(rows.astype(int), columns.astype(int))]


def working_size(size: tuple[int, int], long_side: int | None) -> tuple[int, int]:
    """(width, height) of an image whose long side is shrunk to `long_side` if it is longer."""
    if not long_side or max(size) <= long_side:
        return size
    factor = long_side / max(size)
    width, height = (max(1, round(factor * side)) for side in size)
    return width, height


def open_shrunk(path: Path, long_side: int | None, grey_range: Range) -> ImageFile | Shrunk:
    """An image, shrunk if it has a longer side than `long_side`; nothing is decoded yet.

    Raises:
        InputError: as `open_image`.
    """
    image = open_image(path, grey_range=grey_range)
    size = working_size(image.size, long_side)
    return image if size == image.size else Shrunk(image, size)


def open_image(
    path: Path, formats: Sequence[str] = FORMATS, grey_range: Range = DEEP_GREY
) -> ImageFile:
    """An image whose header is read and whose pixels are not yet decoded.

    Raises:
        InputError: not a file of one of these formats; the message names it.
    """
    try:
        with naming(path, "read"):
            header = Image.open(path, formats=formats)
            return ImageFile(path, header, exif_orientation(header), grey_range)
    except InputError as error:
        if "cannot identify image file" in str(error):
            raise InputError(f"{path}: cannot be read ({unknown_kind(path, formats)})") from None
        if "decompression bomb" in str(error):
            most = 2 * Image.MAX_IMAGE_PIXELS // 1_000_000
            raise InputError(
                f"{path}: more than {most} million pixels; cut it into smaller images"
            ) from None
        raise


def unknown_kind(path: Path, formats: Sequence[str]) -> str:
    """Why PIL finds no image in a file."""
    with open(path, "rb") as file:
        if file.read(4) in TIFF_BEGINS:
            return (
                "a kind of TIFF that PIL does not know, such as 64-bit floats; "
                "save it as grey or RGB of 8 or 16 bits"
            )
    *others, last = formats
    names = f"{', '.join(others)} or {last}" if others else last
    return f"no {names} file, whatever its name says"


def open_mask(path: Path, image: ImageFile | Drawn | Shrunk) -> ImageFile:
    """The mask of an image, whose header is read.

    Raises:
        InputError: not of a format that keeps values, or not of the image's size.
    """
    mask = open_image(path, MASK_FORMATS)
    if mask.size == image.size:
        return mask
    found, wanted = ("{}x{}".format(*size) for size in (mask.size, image.size))
    if isinstance(image, ImageFile) and mask.size == image.stored_size:
        raise InputError(
            f"{path}: the mask has the size of the image before its EXIF rotation, "
            f"{found} instead of {wanted}; "
            f"turn it as viewers show {image.path.name} (EXIF orientation {image.orientation})"
        )
    raise InputError(f"{path}: the mask has {found} pixels, its image {wanted}")


def exif_orientation(header: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or where EXIF is broken, as viewers do.

    Not `header.getexif()`: for a PNG without EXIF that decodes the whole file.
    A TIFF PIL turns by itself.
    """
    if header.format == "TIFF":
        return 1
    try:
        orientation = Image.Image.getexif(header).get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever a broken block makes PIL raise
        return 1
    return orientation if orientation in TURNS else 1


def to_rgb(image: Image.Image, grey_range: Range = DEEP_GREY) -> Image.Image:
    """Decode to 8-bit RGB; grey of more bits is scaled, not clipped, as PIL's `convert` would.

    Args:
        image: what PIL opened.
        grey_range: values that become 0 and 255 where the image is deep grey.
    """
    if image.mode.startswith(("I", "F")):
        low, high = grey_range
        values = (np.asarray(image, np.float32) - low) * (255 / max(high - low, 1e-12))
        grey = np.nan_to_num(values).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def one_channel(values: np.ndarray, mode: str, path: Path) -> np.ndarray:
    """The one value a pixel of a grey mask that was saved in colour: (H,W,channels) -> (H,W).

    Alpha is left out.

    Raises:
        InputError: red, green and blue differ.
    """
    colours = values[..., :3] if mode in ("RGB", "RGBA") else values[..., :1]
    grey = colours[..., :1]
    if mode not in ("RGB", "RGBA", "LA") or (colours != grey).any():
        raise InputError(
            f"{path}: the mask is {mode}; one value a pixel is expected (indexed or grey PNG), "
            "not colours"
        )
    return np.ascontiguousarray(grey[..., 0])


def refuse_labels(values: np.ndarray, possible: str, path: Path | None) -> None:
    """Raise an InputError that lists `values`, if there are any."""
    if values.size:
        found = ", ".join(f"{value:g}" for value in np.unique(values)[:8])
        raise InputError(f"{path}: labels {found} in the mask; {possible} are possible")


def spans(values: Sequence[int]) -> str:
    """Ascending numbers as text, neighbours joined: 0, 7 to 9, 255."""
    parts = []
    for _, neighbours in itertools.groupby(enumerate(values), lambda pair: pair[1] - pair[0]):
        first, *others = (value for _, value in neighbours)
        parts.append(f"{first} to {others[-1]}" if others else f"{first}")
    return ", ".join(parts)


class LabelTable:
    """The label of each value that a mask may hold.

    Args:
        labels: label of each of the first values, 256 at least; a mask may not hold others.
        num_classes: at most 254.
    """

    def __init__(self, labels: Sequence[int], num_classes: int):
        self.num_classes = num_classes
        self.bytes = bytes(
            label if label < num_classes or label == IGNORE else INVALID for label in labels
        )

    def read(self, mask: ImageFile | Drawn | Shrunk, box: Box | None = None) -> np.ndarray:
        """Labels (H,W) uint8 in a mask, or in its part under `box`; a new, writable array.

        Raises:
            InputError: the mask cannot be read, or a value has no label.
        """
        return self.look_up(mask.values(box), mask.path)

    def look_up(self, values: np.ndarray, path: Path | None) -> np.ndarray:
        """Labels of values, uint8 or uint16, as an array of uint8 of the same shape.

        Raises:
            InputError: a label that is neither a class nor 255; names the file and the values.
        """
        if values.dtype == np.uint8:
            # bytearray.translate takes a third of the time of numpy's indexing.
            looked_up = bytearray(values.tobytes()).translate(self.bytes[:256])
            labels = np.frombuffer(looked_up, np.uint8).reshape(values.shape)
        else:
            table = np.full(65536, INVALID, np.uint8)
            table[: len(self.bytes)] = np.frombuffer(self.bytes, np.uint8)
            labels = table[values]
        wrong = labels == INVALID
        if wrong.any():
            refuse_labels(values[wrong], self.possible(), path)
        return labels

    def possible(self) -> str:
        """The values that a mask may hold, for messages."""
        if self.bytes[: self.num_classes] == bytes(range(self.num_classes)):
            return f"0 to {self.num_classes - 1} and 255 (ignored)"
        return spans([value for value, label in enumerate(self.bytes) if label != INVALID])


class ColourTable:
    """The label of each colour that a mask may hold.

    Args:
        colours: (R,G,B) -> label.
        rest: label of every other colour; None if there must be none.
    """

    def __init__(self, colours: Mapping[Colour, int], rest: int | None = None):
        self.table = table_of_colours(tuple(colours.items()), INVALID if rest is None else rest)

    def read(self, mask: ImageFile | Shrunk, box: Box | None = None) -> np.ndarray:
        """Labels (H,W) uint8 in a mask, or in its part under `box`; a new, writable array.

        Raises:
            InputError: the mask cannot be read, or a colour has no label.
        """
        colours = mask.colours(box).astype(np.int32)
        packed = colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]
        labels = self.table[packed]
        wrong = labels == INVALID
        if wrong.any():
            found, counts = np.unique(colours[wrong], axis=0, return_counts=True)
            often = found[counts.argsort()[::-1][:8]].tolist()
            listed = ", ".join(" ".join(map(str, colour)) for colour in often)
            raise InputError(
                f"{mask.path}: colours {listed} in the mask ({wrong.mean():.2%} of its pixels) "
                "belong to no class; a line 'ignored *' leaves out what no other line names"
            )
        return labels


@lru_cache(1)
def table_of_colours(colours: tuple[tuple[Colour, int], ...], rest: int) -> np.ndarray:
    """Label of every colour, at 65536 · red + 256 · green + blue: 16 MB, the same for all readers.

    Looking up is faster than comparing with one colour after another.
    """
    table = np.full(1 << 24, rest, np.uint8)
    for (red, green, blue), label in colours:
        table[red << 16 | green << 8 | blue] = label
    return table
