"""What the tests share: settings without a command line, and the five data sets in miniature."""

import argparse
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# Triton decides at import whether kernels are compiled or interpreted; without a GPU the tests interpret them. The variable
# goes away at once: with it every script that a test starts would interpret its kernels, too.
NATIVE = torch.cuda.is_available()
os.environ.pop("TRITON_INTERPRET", None)
if not NATIVE:
    os.environ["TRITON_INTERPRET"] = "1"
import kernels  # noqa: E402, F401

os.environ.pop("TRITON_INTERPRET", None)

from common import runtime  # noqa: E402

# The tests run side by side, a process a core: more threads would only wait for each other. Scripts that a test starts
# inherit the variable.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none, unless `-m` asks for it: then it is listed, and skipped."""
    if NATIVE or config.option.markexpr:
        return
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=needs_gpu)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@contextmanager
def never_waiting():
    """Whatever makes the host wait for the GPU is an error inside."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """Tests without the mark `gpu` run on the CPU where a GPU is visible, too; so do the scripts that they start."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def rt() -> runtime.Runtime:
    """A single process on the CPU in float32."""
    return runtime.Runtime(torch.device("cpu"), 0, 1, None, torch.amp.GradScaler("cpu", enabled=False), False)


def settings(**changes) -> argparse.Namespace:
    """What `datasets.load` and the loaders read, with the defaults of the command line."""
    values = {
        "data": "shapes", "data_dir": None, "download": False, "split": "1/8", "labelled_list": None, "extra": None,
        "extra_count": 3000, "measure_pseudo_labels": False, "seed": 0, "crop_size": 32, "scale": "0.5,1,2", "batch_size": 4,
        "workers": 0, "device": "cpu",
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


def run(*command: str, expect: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """Run a Python command line in the repository's folder and check its exit code; one that hangs fails in the end."""
    words, environment = [sys.executable, *map(str, command)], {**os.environ, **environment}
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == expect, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def write_picture(path: Path, size: tuple[int, int] = (64, 48), seed: int = 0) -> None:
    """A smooth random picture, JPEG or PNG by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BILINEAR).save(path)


def damage(path: Path) -> None:
    """An image whose header and end are whole and whose pixels are not: a PNG, whatever its name."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(path, format="PNG")
    content = bytearray(path.read_bytes())
    content[2000:2064] = bytes(64)
    path.write_bytes(content)


def write_mask(path: Path, labels: int, size: tuple[int, int] = (64, 48), seed: int = 0, extra: tuple[int, ...] = ()) -> None:
    """An indexed PNG of labels 0..labels-1, with the values of `extra` in the first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.random.default_rng(seed).integers(0, labels, (size[1], size[0])).astype(np.uint8)
    mask[0, : len(extra)] = extra
    picture = Image.fromarray(mask)
    picture.putpalette([value for index in range(256) for value in (index, 255 - index, index // 2)])
    picture.save(path)


@pytest.fixture
def camvid_tree(tmp_path: Path) -> Path:
    """Eight training pictures, of which only every 4th has a mask, and two for validation."""
    for index in range(8):
        write_picture(tmp_path / "train" / f"p{index}.png", seed=index)
        if index % 4 == 0:
            write_mask(tmp_path / "trainannot" / f"p{index}.png", 11, seed=index, extra=(11, 11))
    for index in range(2):
        write_picture(tmp_path / "val" / f"v{index}.jpg", seed=index)
        write_mask(tmp_path / "valannot" / f"v{index}.png", 12, seed=index)
    return tmp_path


@pytest.fixture
def voc_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """VOCdevkit/VOC2012 with the first pictures of the real lists, and lists cut down to them."""
    from common import datasets

    lists = tmp_path / "lists"
    (lists / "voc").mkdir(parents=True)
    real = datasets.SPLITS / "voc"
    labelled, train, val = ((real / f"{name}.txt").read_text().split() for name in ("1-8", "train", "val"))
    unlabelled = [name for name in train if name not in set(labelled)]
    for name, ids in (("1-8", labelled[:4]), ("train", labelled[:4] + unlabelled[:6]), ("val", val[:2])):
        (lists / "voc" / f"{name}.txt").write_text("\n".join(ids) + "\n")
    monkeypatch.setattr(datasets, "SPLITS", lists)
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for index, name in enumerate(labelled[:4] + unlabelled[:6] + val[:2]):
        write_picture(base / "JPEGImages" / f"{name}.jpg", seed=index)
    for index, name in enumerate(labelled[:4] + val[:2]):
        folder = "SegmentationClassAug" if index < 4 else "SegmentationClass"
        write_mask(base / folder / f"{name}.png", 21, seed=index, extra=(255, 255))
    return tmp_path


@pytest.fixture
def cityscapes_tree(tmp_path: Path) -> Path:
    """The 186 pictures of the list 1/16, five unlabelled, two for validation, three of train_extra; labelIds masks."""
    from common import datasets

    names = (datasets.SPLITS / "cityscapes" / "1-16.txt").read_text().split()
    assert names[4].startswith("aachen")
    for index, name in enumerate([*names, *(f"aachen_{i:06}_999999" for i in range(5))]):
        write_picture(tmp_path / "leftImg8bit/train" / name.split("_")[0] / f"{name}_leftImg8bit.png", (16, 8), index)
    for index, name in enumerate(names):
        path = tmp_path / "gtFine/train" / name.split("_")[0] / f"{name}_gtFine_labelIds.png"
        write_mask(path, 34, (16, 8), index)
    for index in range(2):
        write_picture(tmp_path / f"leftImg8bit/val/lindau/lindau_{index:06}_000019_leftImg8bit.png", (16, 8), index)
        write_mask(tmp_path / f"gtFine/val/lindau/lindau_{index:06}_000019_gtFine_labelIds.png", 34, (16, 8), index)
    for index in range(3):
        write_picture(tmp_path / f"leftImg8bit/train_extra/augsburg/augsburg_{index:06}_000000_leftImg8bit.png", (16, 8), index)
    return tmp_path


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """The user's own data: three classes, four labelled, six unlabelled, two for validation."""
    (tmp_path / "classes.txt").write_text("background\ncat\ndog\n")
    for part, count in (("labelled", 4), ("unlabelled", 6), ("val", 2)):
        for index in range(count):
            write_picture(tmp_path / "images" / part / f"{part}{index}.jpg", seed=index)
            if part != "unlabelled":
                write_mask(tmp_path / "masks" / part / f"{part}{index}.png", 3, seed=index)
    return tmp_path
