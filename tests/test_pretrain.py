"""The pretrained weights of the tiny backbone: they are those described, and worth something."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from common import InputError, pretrain, shapes
from common.augment import normalise
from common.deeplabv3plus import BLOTS, DeepLabV3Plus, TinyBackbone

COMMON = Path(pretrain.__file__).parent


def test_the_file_is_the_one_described():
    content = BLOTS.read_bytes()
    assert len(content) < 600_000
    described = re.search(r"SHA-256 `([0-9a-f]{64})`", (COMMON / "README.md").read_text())
    assert hashlib.sha256(content).hexdigest() == described.group(1)
    state = torch.load(BLOTS, weights_only=True)
    floats = {value.dtype for value in state.values() if value.is_floating_point()}
    assert floats == {torch.float16}
    assert all(value.isfinite().all() for value in state.values())


def test_portraits_are_frozen():
    """Or the command would make other weights. Means: the last bit may differ by CPU."""
    species = pretrain.draw_species(pretrain.SPECIES)
    found = [pretrain.portrait(index, species) for index in (0, 1, 40_000)]
    assert all(image.shape == (32, 32, 3) for image, _ in found)
    assert [label for _, label in found] == [13, 23, 424]
    assert [round(float(image.mean()), 1) for image, _ in found] == [79.8, 123.2, 129.6]


def test_a_portrait_shows_the_species_that_it_is_named_after():
    drawn = []

    def outline(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        drawn.append(u.shape)
        return u * u + v * v < 1

    dark = pretrain.Species(lambda u, v: np.zeros(u.shape, bool), shapes.Pattern("plain"))
    species = [dark, pretrain.Species(outline, shapes.Pattern("rings", 8))]
    labels = [pretrain.portrait(index, species)[1] for index in range(12)]
    assert len(drawn) == sum(labels) and 0 < sum(labels) < 12


def test_no_species_is_a_figure_of_the_built_in_set():
    """Nearest with the same kind of pattern: intersection over union at the best of five sizes."""
    v, u = np.mgrid[-1.3:1.3:40j, -1.3:1.3:40j]
    species = pretrain.draw_species(pretrain.SPECIES)
    for figure, pattern in shapes.FIGURES.items():
        cover = shapes.inside(figure, u, v)
        for one in (one for one in species if one.pattern.kind == pattern.kind):
            for size in (0.7, 0.85, 1.0, 1.2, 1.4):
                other = one.outline(u / size, v / size)
                assert (cover & other).sum() < 0.9 * (cover | other).sum()


def test_pretrained_features_tell_new_species_apart_better_than_random_ones():
    """Nearest neighbour by mean feature: 20 species that were not trained on, 15 portraits each."""
    rng = np.random.default_rng(99)
    patterns = [shapes.Pattern(rng.choice(shapes.KINDS), rng.uniform(3, 11)) for _ in range(20)]
    species = [pretrain.Species(shapes.blot(rng), pattern) for pattern in patterns]
    images, labels = pretrain.draw_portraits(range(50_000, 50_300), species)

    def neighbours_agree(weights: str) -> float:
        torch.manual_seed(0)
        backbone = TinyBackbone(weights, output_stride=8).eval()
        with torch.no_grad():
            features = backbone(normalise(images))[2].mean((2, 3))
        features = torch.nn.functional.normalize(features - features.mean(0))
        nearness = (features @ features.T).fill_diagonal_(-1)
        return (labels[nearness.argmax(1)] == labels).float().mean().item()

    assert neighbours_agree("blots") > 1.5 * neighbours_agree("none")


def test_weights_of_the_tiny_backbone(tmp_path):
    """Blots, none, a file, and a file of another network."""
    shipped = torch.load(BLOTS, weights_only=True)["layer4.0.conv2.weight"].float()
    network = DeepLabV3Plus("tiny", 3, "blots")
    assert torch.equal(network.backbone.layer4[0].conv2.weight, shipped)
    assert not torch.equal(DeepLabV3Plus("tiny", 3).backbone.layer4[0].conv2.weight, shipped)

    pretrain.write(TinyBackbone("none", 8), tmp_path / "mine.pt")
    mine = torch.load(tmp_path / "mine.pt", weights_only=True)["stem.0.0.weight"]
    loaded = DeepLabV3Plus("tiny", 3, str(tmp_path / "mine.pt")).backbone.stem[0][0].weight
    assert torch.equal(loaded, mine.float())
    with pytest.raises(InputError, match=r"tiny\.pt: weights of another network|missing"):
        DeepLabV3Plus("resnet18", 3, str(BLOTS))


def test_pretraining_lowers_the_loss_and_writes_weights(tmp_path, monkeypatch, capsys):
    for name, value in {"SPECIES": 5, "TRAIN": 320, "VAL": 32, "BATCH": 16}.items():
        monkeypatch.setattr(pretrain, name, value)
    pretrain.main(["--output", str(tmp_path / "tiny.pt"), "--max-iters", "200"])
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[0] == pytest.approx(np.log(5), abs=0.5)  # a fresh classifier knows nothing
    assert losses[-1] < 0.8 * losses[0]
    assert float(re.search(r"other portraits: ([\d.]+) %", printed).group(1)) > 40
    TinyBackbone(str(tmp_path / "tiny.pt"), 8)
