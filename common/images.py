"""One image or mask file: opening, turning as EXIF says, decoding, and the labels in a mask.

Everything that reads an image file of the user does it here, so that training, evaluation and
prediction see the same pixels, and every file that cannot be read ends in one line that names it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, decode_png, read_file

from common import InputError
from common.augment import IGNORE

# PIL tries no other: it would start Ghostscript for an EPS file, whatever the file's name.
FORMATS = ("PNG", "JPEG")
INVALID = 254  # in a `LabelTable`: no class has this number, since there are at most 254 classes
# torchvision gives PIL's very pixels in less time. The PNG decoder of newer versions ends the
# process on a damaged file (a segmentation fault in 0.29.1); that of 0.26 raises an error.
FAST_DECODERS = {"JPEG": decode_jpeg}
if tuple(map(int, torchvision.__version__.split(".")[:2])) <= (0, 26):
    FAST_DECODERS["PNG"] = decode_png
TAIL = 4096  # bytes at a file's end that are searched for its end marker

# left, top, right, bottom in pixels; the last two are one past the end
Box = tuple[int, int, int, int]

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
        # torch reports a lack of main memory as a plain RuntimeError.
        of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if of_memory or "allocate memory" in str(error):
            raise InputError(f"{path}: too large for this machine's memory") from None
        raise


@dataclass
class ImageFile:
    """A file whose header is read and whose pixels are not yet decoded.

    Attributes:
        path: the file.
        header: PIL's image.
        orientation: EXIF's, 1 (upright) to 8.
    """

    path: Path
    header: Image.Image
    orientation: int

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) as the file stores it."""
        return self.header.size

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as viewers show it, after the turn that EXIF asks for."""
        width, height = self.stored_size
        return (height, width) if self.orientation >= 5 else (width, height)

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
                return torch.from_numpy(np.array(self._part(to_rgb(self.header), box)))
            if box is None:
                return pixels
            left, top, right, bottom = box
            return pixels[top:bottom, left:right]

    def values(self, box: Box | None = None) -> np.ndarray:
        """The values of a mask, upright, or those under `box`: (H,W) uint8.

        Raises:
            InputError: broken, in colour, with fewer than 8 bits of grey, or with values above 255.
        """
        tile = self.header.tile
        if tile and tile[0].args in ("L;2", "L;4"):  # PIL would stretch these values to 0..255
            raise InputError(
                f"{self.path}: the mask has fewer than 8 bits a pixel; "
                "save it as an indexed or an 8-bit grey PNG"
            )
        with naming(self.path, "decoded"):
            self.header.load()
            values = np.array(self._part(self.header, box))
        if values.ndim == 3:
            return one_channel(values, self.header.mode, self.path)
        if values.dtype == bool:
            return values.astype(np.uint8)
        if values.dtype != np.uint8:
            refuse_labels(values[(values < 0) | (values > 255)], "0 to 255", self.path)
        return values.astype(np.uint8, copy=False)

    def check_end(self) -> None:
        """Look for the marker at the file's end, which a file that was cut off has lost.

        Where none is found among the last bytes the file is decoded to be sure, since some cameras
        append data of their own.

        Raises:
            InputError: the file is truncated.
        """
        marker = b"IEND" if self.header.format == "PNG" else b"\xff\xd9"
        with naming(self.path, "decoded"):
            with open(self.path, "rb") as file:
                file.seek(max(0, file.seek(0, 2) - TAIL))
                found = marker in file.read()
            if not found:
                self.header.load()

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


def open_image(path: Path, formats: Sequence[str] = FORMATS) -> ImageFile:
    """An image whose header is read and whose pixels are not yet decoded.

    Raises:
        InputError: not a file of one of these formats; the message names it.
    """
    try:
        with naming(path, "read"):
            header = Image.open(path, formats=formats)
            return ImageFile(path, header, exif_orientation(header))
    except InputError as error:
        if "cannot identify image file" in str(error):
            names = " or ".join(formats)
            raise InputError(
                f"{path}: cannot be read (no {names} file, whatever its name says)"
            ) from None
        raise


def open_mask(path: Path, image: ImageFile | Drawn) -> ImageFile:
    """The mask of an image, whose header is read.

    Raises:
        InputError: not a PNG, or not of the image's size.
    """
    mask = open_image(path, ("PNG",))
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
    """
    try:
        orientation = Image.Image.getexif(header).get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever a broken block makes PIL raise
        return 1
    return orientation if orientation in TURNS else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode to 8-bit RGB; 16-bit grey is scaled, not clipped, as PIL's `convert` would."""
    if image.mode.startswith("I"):
        high_byte = np.asarray(image).astype(np.uint32) >> 8
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
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


def refuse_labels(values: np.ndarray, possible: str, path: Path) -> None:
    """Raise an InputError that lists `values`, if there are any."""
    if values.size:
        found = ", ".join(map(str, np.unique(values)[:8]))
        raise InputError(f"{path}: labels {found} in the mask; {possible} are possible")


class LabelTable:
    """The label of each value that a mask may hold.

    Args:
        labels: label of each of the 256 values.
        num_classes: at most 254.
    """

    def __init__(self, labels: Sequence[int], num_classes: int):
        self.num_classes = num_classes
        self.bytes = bytes(
            label if label < num_classes or label == IGNORE else INVALID for label in labels
        )

    def look_up(self, values: np.ndarray, path: Path | None) -> np.ndarray:
        """Labels of values, both uint8 of one shape; a new, writable array.

        Raises:
            InputError: a label that is neither a class nor 255; names the file and the values.
        """
        # bytearray.translate takes a third of the time of numpy's indexing.
        looked_up = bytearray(values.tobytes()).translate(self.bytes)
        labels = np.frombuffer(looked_up, np.uint8).reshape(values.shape)
        wrong = labels == INVALID
        if wrong.any():
            refuse_labels(values[wrong], f"0 to {self.num_classes - 1} and 255 (ignored)", path)
        return labels
