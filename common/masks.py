"""Label maps as indexed PNGs in a data set's colours."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common import InputError
from common.images import open_image


def write_mask(path: Path, labels: Tensor, colours: list | tuple) -> None:
    """Write labels as an indexed PNG; whole or not at all.

    Args:
        path: the file; its folder is made.
        labels: (H,W), the values in the file.
        colours: an RGB triple a class, the palette.

    Raises:
        InputError: the disk is full or the folder cannot be written to.
    """
    image = Image.fromarray(labels.to(torch.uint8).numpy())
    image.putpalette([value for colour in colours for value in colour])
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(part, format="PNG")
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from None


def read_mask(path: Path) -> Tensor:
    """Labels (H,W) uint8 of a mask that `write_mask` wrote.

    Raises:
        InputError: it cannot be read.
    """
    return torch.from_numpy(open_image(path, ("PNG",)).values())
