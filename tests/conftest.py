"""What the tests share: settings, where operations run, and the five data sets in miniature."""

import argparse
import importlib
import os
import subprocess
import sys
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# Triton decides at import whether kernels are compiled or interpreted; without a GPU the tests
# interpret them. The variable goes away at once: with it every script that a test starts would
# interpret its kernels, too.
NATIVE = torch.cuda.is_available()
os.environ.pop("TRITON_INTERPRET", None)
if not NATIVE:
    os.environ["TRITON_INTERPRET"] = "1"
import kernels  # noqa: E402, F401

os.environ.pop("TRITON_INTERPRET", None)

from common import runtime  # noqa: E402
from common.run import Run  # noqa: E402

# The tests run side by side, a process a core: more threads would only wait for each other.
# Scripts that a test starts inherit the variable.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A module for each method.
SCRIPTS = [importlib.import_module(path.stem) for path in sorted(ROOT.glob("*.py"))]
# The kernels whose programs are some cells wide.
MODULES = [
    sys.modules[f"kernels.{name}"]
    for name in ("cross_entropy", "cross_entropy_map", "pseudo_label", "soft_consistency")
]
IMPLEMENTATIONS = [
    pytest.param(("torch", "cpu"), id="torch"),
    pytest.param(
        ("triton", "cpu"),
        id="interpreted",
        marks=pytest.mark.skipif(NATIVE, reason="kernels are compiled here"),
    ),
    pytest.param(
        ("triton", "cuda"),
        id="gpu",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not NATIVE, reason="no CUDA device")],
    ),
    pytest.param(
        ("torch", "cuda"),
        id="torch-gpu",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not NATIVE, reason="no CUDA device")],
    ),
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none.

    With `-m gpu`, which asks for it, it is listed, and skipped.
    """
    if NATIVE or "gpu" in config.option.markexpr:
        return
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=needs_gpu)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(params=IMPLEMENTATIONS)
def where(request, monkeypatch) -> tuple[str, str]:
    """(impl, device).

    Interpreted kernels get wide programs, since the interpreter's time goes by their number.
    """
    impl, device = request.param
    if (impl, device) == ("triton", "cpu"):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        for module in MODULES:
            monkeypatch.setattr(module, "CELL_LANES", 256)
    return impl, device


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
    """Tests without the mark `gpu` run on the CPU where a GPU is visible, too.

    So do the scripts that they start.
    """
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Begins a run of a script, on small crops, in a folder of the test's own.

    Signals end the tests as ever, and not after the next iteration.
    """
    monkeypatch.setattr(runtime, "catch_signals", lambda: None)

    def begin(script: ModuleType, *flags: str) -> Run:
        folder = ["--output-dir", str(tmp_path / "run"), "--device", "cpu"]
        return Run(script.parse_args(["--crop-size", "32", "-b", "4", *folder, *flags]))

    return begin


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch):
    """Lets the `main` of a script do all iterations of a begun run, without evaluations.

    The networks are those that the script builds right after it has begun.
    """

    def train(script: ModuleType, run: Run) -> dict[str, dict]:
        monkeypatch.setattr(script, "Run", lambda args: run)
        nothing = defaultdict(lambda: SimpleNamespace(miou=0.0))
        monkeypatch.setattr(script, "evaluate", lambda *_, **__: nothing)
        monkeypatch.setattr(run, "audit", lambda *_: {})
        for name in ("report", "finish"):
            monkeypatch.setattr(run, name, lambda *_: None)
        torch.manual_seed(run.args.seed)
        script.main(run.args)
        return torch.load(run.checkpoint, weights_only=True)["networks"]

    return train


def settings(**changes) -> argparse.Namespace:
    """What `datasets.load` and the loaders read, with the defaults of the command line."""
    values = {
        "data": "shapes", "data_dir": None, "download": False, "split": "1/8",
        "labelled_list": None, "extra": None, "extra_count": 3000, "measure_pseudo_labels": False,
        "seed": 0, "crop_size": 32, "scale": "0.5,1,2", "batch_size": 4, "workers": 0,
        "device": "cpu", "long_side": None, "val_fraction": 0.2,
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


def run(*command: str, expect: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """Run a Python command line in the repository's folder and check its exit code.

    One that hangs fails in the end.
    """
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=600,
    )
    printed = f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert result.returncode == expect, printed
    return result


def write_picture(path: Path, size: tuple[int, int] = (64, 48), seed: int = 0) -> None:
    """A smooth random image, JPEG or PNG by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BILINEAR).save(path)


def damage(path: Path) -> None:
    """An image whose header and end are whole, its pixels not: a PNG, whatever its name."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")
    content = bytearray(path.read_bytes())
    content[2000:2064] = bytes(64)
    path.write_bytes(content)


def write_mask(
    path: Path,
    labels: int,
    size: tuple[int, int] = (64, 48),
    seed: int = 0,
    extra: tuple[int, ...] = (),
) -> None:
    """An indexed PNG of labels 0..labels-1, with the values of `extra` in the first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.random.default_rng(seed).integers(0, labels, (size[1], size[0])).astype(np.uint8)
    mask[0, : len(extra)] = extra
    image = Image.fromarray(mask)
    colours = [(index, 255 - index, index // 2) for index in range(256)]
    image.putpalette([value for colour in colours for value in colour])
    image.save(path)


@pytest.fixture
def camvid_tree(tmp_path: Path) -> Path:
    """Eight training images, of which only every 4th has a mask, and two for validation."""
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
    """VOCdevkit/VOC2012 with the first images of the real lists, and lists cut down to them."""
    from common import source

    lists = tmp_path / "lists"
    (lists / "voc").mkdir(parents=True)
    real = source.SPLITS / "voc"
    labelled, train, val = (
        (real / f"{name}.txt").read_text().split() for name in ("1-8", "train", "val")
    )
    known = set(labelled)
    unlabelled = [name for name in train if name not in known]
    labelled, unlabelled, val = labelled[:4], unlabelled[:6], val[:2]
    lists_of = {"1-8": labelled, "train": labelled + unlabelled, "val": val, "1464": labelled[:1]}
    for name, ids in lists_of.items():
        (lists / "voc" / f"{name}.txt").write_text("\n".join(ids) + "\n")
    monkeypatch.setattr(source, "SPLITS", lists)
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for index, name in enumerate(labelled + unlabelled + val):
        write_picture(base / "JPEGImages" / f"{name}.jpg", seed=index)
    for index, name in enumerate(labelled + val):
        folder = "SegmentationClassAug" if index < 4 else "SegmentationClass"
        write_mask(base / folder / f"{name}.png", 21, seed=index, extra=(255, 255))
    return tmp_path


@pytest.fixture
def cityscapes_tree(tmp_path: Path) -> Path:
    """Cityscapes in small images, with masks of labelIds.

    The 186 images of the list 1/16, five unlabelled, two for validation, three of train_extra.
    """
    from common import source

    def image(name: str, part: str, seed: int) -> None:
        city = name.split("_")[0]
        path = tmp_path / "leftImg8bit" / part / city / f"{name}_leftImg8bit.png"
        write_picture(path, (16, 8), seed)

    def mask(name: str, part: str, seed: int) -> None:
        city = name.split("_")[0]
        path = tmp_path / "gtFine" / part / city / f"{name}_gtFine_labelIds.png"
        write_mask(path, 34, (16, 8), seed)

    names = (source.SPLITS / "cityscapes" / "1-16.txt").read_text().split()
    assert names[4].startswith("aachen")
    for index, name in enumerate([*names, *(f"aachen_{i:06}_999999" for i in range(5))]):
        image(name, "train", index)
    for index, name in enumerate(names):
        mask(name, "train", index)
    for index in range(2):
        image(f"lindau_{index:06}_000019", "val", index)
        mask(f"lindau_{index:06}_000019", "val", index)
    for index in range(3):
        image(f"augsburg_{index:06}_000000", "train_extra", index)
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
