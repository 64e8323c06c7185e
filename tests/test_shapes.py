"""The built-in images: what they promise to those who learn from them."""

import numpy as np
import pytest
import torch
from conftest import settings

from common import datasets, shapes


def masks(variant: str) -> np.ndarray:
    """The masks of a variant, training and validation, (512,64,64)."""
    return np.stack([shapes.draw(number)[1] for number in shapes.numbers(variant)])


def occurrence(variant: str, first: int = 0) -> np.ndarray:
    """On how many images from the `first` on each figure is, background left out."""
    found = masks(variant)[first:]
    return np.array([(found == label).any((1, 2)).sum() for label in range(1, 12)])


def test_images_are_frozen():
    """Results measured on them are compared. Means, not hashes: the last bit may differ by CPU."""
    means = [round(float(shapes.draw(index)[0].mean()), 1) for index in (0, 1, 300, 600)]
    assert means == [99.5, 168.1, 89.0, 108.0]
    shares = np.bincount(masks("shapes").ravel(), minlength=12) / masks("shapes").size
    percent = [75.0, 5.0, 3.4, 2.2, 3.0, 2.5, 1.8, 1.7, 1.3, 1.5, 1.4, 1.2]
    assert [round(100 * float(share), 1) for share in shares] == percent


def test_every_class_has_an_outline_a_pattern_and_a_colour_of_its_own():
    assert len(shapes.CLASSES) == len(shapes.COLOURS) == len(set(shapes.COLOURS)) == 12
    v, u = np.mgrid[-1.2:1.2:101j, -1.2:1.2:101j]
    covers = {figure: shapes.inside(figure, u, v) for figure in shapes.FIGURES}
    for figure, cover in covers.items():
        assert 0.1 < cover.mean() < 0.6
        others = [other for other in covers if other != figure]
        overlaps = [(cover & covers[o]).sum() / (cover | covers[o]).sum() for o in others]
        assert max(overlaps) < 0.85
    patterns = {figure: pattern.kind for figure, pattern in shapes.FIGURES.items()}
    assert len(set(patterns.values())) == len(patterns)
    with pytest.raises(ValueError, match="no figure 'cube'"):
        shapes.inside("cube", u, v)
    with pytest.raises(ValueError, match="no pattern 'fur'"):
        shapes.light_and_dark(shapes.Pattern("fur"), u, v)


def test_colour_says_nothing_about_the_class():
    """Mean colours of the figures of a class differ from those of all by less than they spread."""
    figures = {label: [] for label in range(1, 12)}
    for number in shapes.numbers("shapes"):
        image, target = shapes.draw(number)
        for label in set(np.unique(target)) - {0}:
            colour = image[target == label].mean(0)
            figures[label].append(colour / colour.sum())
    everything = np.concatenate(list(figures.values()))
    for colours in figures.values():
        error = everything.std(0) / np.sqrt(len(colours))
        assert (abs(np.mean(colours, 0) - everything.mean(0)) < 4 * error).all()


def test_frequencies_fall_slowly_in_shapes_and_as_1_over_k_in_shapes_zipf():
    slow, zipf = occurrence("shapes"), occurrence("shapes-zipf")
    for variant in shapes.VARIANTS:  # or validation would say nothing about a class
        assert occurrence(variant, first=shapes.TRAIN).min() >= 10
    assert slow[:3].mean() < 3 * slow[-3:].mean()
    assert zipf[0] > 5 * zipf[-3:].mean()


@pytest.mark.parametrize("variant", shapes.VARIANTS)
def test_every_class_is_among_the_labelled_eighth(variant: str):
    data = datasets.load(settings(data=variant))
    assert (len(data.labelled), len(data.unlabelled), len(data.val)) == (32, 224, 256)
    labels = np.concatenate([np.unique(shapes.draw(item.mask)[1]) for item in data.labelled])
    assert set(labels) == set(range(12))


def test_the_variants_share_no_image():
    names = [
        {item.name for item in (*data.labelled, *data.unlabelled, *data.val)}
        for data in (datasets.load(settings(data=variant)) for variant in shapes.VARIANTS)
    ]
    assert not names[0] & names[1]


def test_drawing_leaves_the_random_generators_alone():
    np.random.seed(1)
    torch.manual_seed(1)
    first = np.random.rand(), torch.rand(()).item()
    np.random.seed(1)
    torch.manual_seed(1)
    shapes.draw.__wrapped__(17)
    assert (np.random.rand(), torch.rand(()).item()) == first
