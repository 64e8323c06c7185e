"""Masks: areas, bounds, XOR, whole classes, and independence of the number of processes."""

import pytest
import torch

from common import distributed
from common.augment import IGNORE
from common.cutmix import (
    class_masks,
    draw_boxes,
    half_area_masks,
    mix,
    rasterise,
    small_box_masks,
    wide_box_masks,
    xor_box_masks,
)

CPU = torch.device("cpu")


def test_the_half_area_box_covers_half_and_stays_inside():
    masks = half_area_masks(200, 128, seed=1, iteration=3, device=CPU)
    share = masks.float().mean((1, 2))
    assert (share - 0.5).abs().max() < 0.01  # sides are rounded to pixels
    heights = masks.any(2).sum(1)
    assert heights.min() >= 63 and heights.max() <= 128
    assert heights.float().std() > 10  # the aspect really varies


def test_the_wide_box_covers_half_and_its_width_is_uniform():
    masks = wide_box_masks(400, 128, seed=1, iteration=3, device=CPU)
    assert (masks.float().mean((1, 2)) - 0.5).abs().max() < 0.01
    widths = masks.any(1).sum(1).float() / 128
    assert widths.min() < 0.52 and widths.max() > 0.98
    assert abs(widths.mean().item() - 0.75) < 0.03  # of U(1/2, 1)
    assert abs(widths.std().item() - 0.5 / 12**0.5) < 0.02


def test_boxes_stay_inside_and_reach_every_edge():
    boxes = draw_boxes(500, 3, (0.25, 0.5), 64, torch.Generator().manual_seed(0))
    assert boxes.min() == 0 and boxes.max() == 64
    sides = boxes[..., 2:] - boxes[..., :2]
    assert (sides > 0).all()
    area = sides.prod(-1) / 64**2
    assert 0.25 / 3 - 0.02 < area.min() and area.max() < 0.5 / 3 + 0.02


def test_overlapping_boxes_cancel():
    boxes = torch.tensor([[[0, 0, 4, 4], [2, 2, 6, 6], [2, 2, 4, 4]]])
    mask = rasterise(boxes, 6)[0]
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[:4, :4] ^= True
    expected[2:6, 2:6] ^= True
    expected[2:4, 2:4] ^= True
    assert torch.equal(mask, expected)
    assert mask[2, 2]  # three boxes: odd
    two = rasterise(boxes[:, :2], 6)[0]
    assert not two[2:4, 2:4].any() and two.sum() == 2 * 16 - 2 * 4


def test_masks_change_with_iteration_and_seed_and_not_with_processes(monkeypatch):
    whole = xor_box_masks(8, 32, seed=5, iteration=7, device=CPU)
    assert not torch.equal(whole, xor_box_masks(8, 32, seed=5, iteration=8, device=CPU))
    assert not torch.equal(whole, xor_box_masks(8, 32, seed=6, iteration=7, device=CPU))
    halves = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        halves.append(xor_box_masks(4, 32, seed=5, iteration=7, device=CPU))
    assert torch.equal(whole, torch.cat(halves))


def test_mix_takes_each_pixel_from_the_right_image():
    mask = torch.tensor([[[True, False], [False, True]]])
    inside, outside = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    assert torch.equal(mix(mask, inside, outside), mask[:, None].float().expand(1, 3, 2, 2))
    assert mix(mask, inside[:, 0], outside[:, 0]).tolist() == [[[1, 0], [0, 1]]]


def test_half_of_the_images_have_a_small_box_and_views_and_iterations_differ():
    masks = [small_box_masks(400, 64, 1, iteration=0, view=view, device=CPU) for view in (1, 2)]
    for mask in masks:
        there = mask.any((1, 2))
        assert abs(there.double().mean().item() - 0.5) < 3 * 0.5 / 400**0.5
        area = mask[there].double().mean((1, 2))
        assert 0.01 < area.min() and area.max() <= 0.4  # of whole pixels
        height, width = mask[there].any(2).sum(1), mask[there].any(1).sum(1)
        assert torch.equal(height * width, mask[there].sum((1, 2)))  # a box, nothing else
        # U(0.3, 1/0.3), but for the fraction of a pixel that either side loses
        aspect = (height + 1).double() / width
        assert aspect.min() > 0.3 and (height.double() / (width + 1)).max() < 1 / 0.3
    assert not torch.equal(*masks)
    later = small_box_masks(400, 64, seed=1, iteration=1, view=1, device=CPU)
    assert not torch.equal(masks[0], later)


@pytest.mark.parametrize("round_up", [False, True])
def test_class_masks_choose_half_of_the_classes_whole_and_never_what_is_ignored(round_up: bool):
    """Images with 1, 2, 3 and 5 classes, and one where everything is ignored."""
    labels = torch.full((5, 4, 6), IGNORE, dtype=torch.uint8)
    for image, classes in enumerate(([7], [0, 11], [1, 2, 3], [2, 4, 6, 8, 10])):
        values = torch.tensor(classes, dtype=torch.uint8)
        labels[image, 1:] = values.repeat(18)[:18].view(3, 6)
    expected = [1, 1, 2, 3, 0] if round_up else [0, 1, 1, 2, 0]
    found = set()
    for iteration in range(40):
        mask = class_masks(labels, 12, seed=3, iteration=iteration, round_up=round_up)
        assert not mask[labels == IGNORE].any()
        chosen = [x[m].unique().tolist() for x, m in zip(labels, mask)]
        assert [len(classes) for classes in chosen] == expected
        for x, m, classes in zip(labels, mask, chosen):  # whole classes, never parts
            assert torch.equal(m, torch.isin(x, torch.tensor(classes, dtype=torch.uint8)))
        found |= {tuple(chosen[2])}
    assert len(found) == 3  # each single class, or each pair, comes in its turn


def test_small_boxes_and_class_masks_do_not_depend_on_the_number_of_processes(monkeypatch):
    labels = torch.randint(0, 12, (8, 6, 6), dtype=torch.uint8)
    boxes = small_box_masks(8, 32, seed=2, iteration=5, view=1, device=CPU)
    classes = class_masks(labels, 12, seed=2, iteration=5)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        mine = slice(4 * rank, 4 * rank + 4)
        part = small_box_masks(4, 32, seed=2, iteration=5, view=1, device=CPU)
        assert torch.equal(part, boxes[mine])
        assert torch.equal(class_masks(labels[mine], 12, seed=2, iteration=5), classes[mine])
