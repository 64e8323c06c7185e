"""The strip of pseudo-labels: what is kept, what is drawn, and what a run without an image does."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import settings
from PIL import Image

from common import datasets, figures, shapes


class Constant(torch.nn.Module):
    """Gives every pixel one label."""

    def __init__(self, label: int):
        super().__init__()
        self.scores = torch.nn.Parameter(torch.eye(6)[label])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scores.view(1, 6, 1, 1).expand(len(images), 6, 16, 16)


def test_pseudo_labels_are_kept_by_image_and_drawn_beside_the_truth(tmp_path):
    data = datasets.load(settings())
    args = SimpleNamespace(output_dir=str(tmp_path), eval_window=0)
    (tmp_path / "figures").mkdir()
    figures.pseudo_label_strip(data, args)  # nothing kept: nothing drawn
    assert not (tmp_path / "figures" / "pseudo_labels.png").exists()
    for label in range(3):
        figures.keep_pseudo_labels(Constant(label), 10 * label, data, args)
    kept = figures.read_pseudo_labels(tmp_path)
    shown = [item.name for item in figures.spread(data.audit, 4)]
    assert set(kept) == {f"{iteration}/{name}" for iteration in (0, 10, 20) for name in shown}
    assert all((kept[f"20/{name}"] == 2).all() for name in shown)
    figures.pseudo_label_strip(data, args)
    drawn = Image.open(tmp_path / "figures" / "pseudo_labels.png")
    assert drawn.width > 400


def test_an_image_that_is_gone_does_not_shift_the_others(tmp_path, monkeypatch):
    """Found wrong once: labels kept by their place stood beside another image afterwards."""
    data = datasets.load(settings())
    args = SimpleNamespace(output_dir=str(tmp_path), eval_window=0)
    (tmp_path / "figures").mkdir()
    figures.keep_pseudo_labels(Constant(1), 5, data, args)
    fewer = replace(data, audit=data.audit[:1] + data.audit[2:])
    columns = {}
    monkeypatch.setattr(figures, "grid", lambda given, *_, **__: columns.update(given))
    figures.pseudo_label_strip(fewer, args)
    known = {item.name for item in figures.spread(data.audit, 4)}
    both = [item for item in figures.spread(fewer.audit, 4) if item.name in known]
    assert len(columns["5"]) == len(columns["input"]) == len(both) > 0
    first = figures.some_images(fewer, both, 1)[0]
    assert np.array_equal(columns["input"][0], first["image"].numpy())


def test_a_contact_sheet_shows_images_above_their_masks(tmp_path, monkeypatch):
    """All of few images, in rows, and the empty places of the last row left empty."""
    data = datasets.load(settings())
    shown = []
    monkeypatch.setattr(figures, "save", lambda figure, _: shown.append(figure))
    figures.contact_sheet(data, tmp_path / "sheet.png", count=5, columns=3)
    axes = np.array(shown[0].axes).reshape(4, 3)
    assert [len(axis.images) for axis in axes.flat] == [1] * 3 * 2 + [1, 1, 0] * 2
    image, target = shapes.draw(data.labelled[4].image)
    assert np.array_equal(axes[2, 1].images[0].get_array(), image)
    assert np.array_equal(axes[3, 1].images[0].get_array(), np.array(shapes.COLOURS)[target])
    names = [text.get_text() for text in shown[0].legends[0].get_texts()]
    assert names == list(shapes.CLASSES)
    figures.pyplot().close(shown[0])


@pytest.mark.parametrize("count", [12, 150])
def test_many_classes_leave_images_their_size(count: int, monkeypatch):
    """Found wrong once: the colours of 150 classes lay over the images."""
    shown = []
    monkeypatch.setattr(figures, "save", lambda figure, _: shown.append(figure))
    names = tuple(f"class {number}" for number in range(count))
    data = SimpleNamespace(classes=names, colours=datasets.voc_colours(count))
    images = [np.zeros((60, 80, 3), np.uint8)] * 4
    figures.grid({"input": images, "target": images, "model": images}, data, "unused.png")
    (figure,) = shown
    figure.canvas.draw()
    below = figure.legends[0].get_window_extent().y1
    for axis in figure.axes:
        box = axis.get_window_extent()
        assert box.y0 > below and box.width > 0.8 * 1.8 * figure.dpi
    figures.pyplot().close(figure)


@pytest.mark.parametrize("width", [2.0, 5.4, 8.0])
def test_a_legend_is_as_wide_as_its_figure_at_most(width: float):
    """Found wrong once: below three narrow columns both its ends were cut off."""
    figure = figures.pyplot().figure(figsize=(width, 2.0), layout="constrained")
    figures.legend(figure, datasets.load(settings()))
    (drawn,) = figure.legends
    assert len(drawn.get_texts()) == 12
    assert drawn.get_window_extent().width <= figure.bbox.width
    figures.pyplot().close(figure)
