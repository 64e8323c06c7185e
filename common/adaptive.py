"""What AEL does for the classes that a network knows least; shared by `ael.py` and `u2pl.py --ael`.

Hu et al., Semi-Supervised Semantic Segmentation via Adaptive Equalization Learning, NeurIPS 2021,
arXiv:2110.05474. `ael.py` tells the whole method, with its differences from the paper and the
released code. The released code is that of hzhupku/SemiSeg-AEL.

Random numbers come from the run's seed and the iteration, for the images of all processes, so that
they do not depend on how many processes there are; only which pixels are kept is drawn on the
device.
"""

import argparse

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from common import InputError, distributed
from common.augment import IGNORE, normalise
from common.cutmix import boxes_of_process, half_area_masks, mix, rasterise
from common.datasets import CITYSCAPES_CLASSES
from common.distributed import add_up, collect, global_mean
from common.runtime import derive_seed
from common.source import DataSource
from kernels import cross_entropy, pseudo_label

NEVER_PASTED = ("road", "sidewalk", "building", "vegetation", "sky")  # of Cityscapes, as released
# Salts of the random numbers of an iteration.
PASTE_INTO = 0xAE0
COPY_PASTE, CUTMIX_CLASS, PARTNER, COMPONENT = 0xAE1, 0xAE2, 0xAE3, 0xAE4


def draw(count: int, width: int, seed: int, iteration: int, salt: int) -> Tensor:
    """Numbers from U(0,1) for this process's images: (count,width), on the CPU."""
    generator = torch.Generator().manual_seed(derive_seed(seed, iteration, salt))
    drawn = torch.rand(count * distributed.world_size(), width, generator=generator)
    first = count * distributed.rank()
    return drawn[first : first + count]


def choose(probs: Tensor, numbers: Tensor) -> Tensor:
    """A class for each number from U(0,1), with the probabilities (C,); int64 of the same shape."""
    # Not by `cumsum`, which --deterministic refuses on a GPU.
    triangle = torch.ones(len(probs), len(probs), dtype=torch.float64, device=probs.device).tril()
    cumulative = (triangle * probs.double()).sum(1).to(probs.dtype)
    return torch.searchsorted(cumulative[:-1].contiguous(), numbers.contiguous(), right=True)


# --------------------------------------------------------------------------------- confidence bank


class ConfidenceBank:
    """How sure the student is of the true class, an average for each class over the training.

        Conf^c <- m · Conf^c + (1-m) · mean over labelled pixels of class c of p_c       [Eq. (4)]

    Args:
        classes: C.
        momentum: m.
        device: where to keep it.
        as_released: begin with U(0,1), and let a class that no pixel has count as confidence 0; a
            rare class then loses confidence because it is rare. Else begin with 0, and leave a
            class without pixels as it is.

    Attributes:
        confidence: (C,) float32 in [0,1].
    """

    def __init__(
        self, classes: int, momentum: float, device: torch.device, as_released: bool = False
    ):
        self.momentum, self.as_released = momentum, as_released
        first = torch.rand(classes) if as_released else torch.zeros(classes)
        self.confidence = first.to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {"confidence": self.confidence}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what a checkpoint has kept."""
        self.confidence.copy_(state["confidence"])

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Take in a batch.

        Args:
            logits: (N,C,h,w) of the student.
            target: (N,H,W) true labels, 255 where there is none.
        """
        # p_y = exp(-CE(z, y)) of every pixel, added up by class over the pixels of all processes.
        loss = cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
        label = target.flatten().long()
        sums = torch.zeros(2, 256, device=logits.device)
        sums[0].index_add_(0, label, (-loss.float()).exp().flatten())
        sums[1].index_add_(0, label, torch.ones_like(loss, dtype=torch.float32).flatten())
        total, count = add_up(sums)[:, : len(self.confidence)]

        mean = total / count.clamp_min(1)
        moved = self.momentum * self.confidence + (1 - self.momentum) * mean
        stays = torch.zeros_like(count, dtype=torch.bool) if self.as_released else count == 0
        self.confidence.copy_(torch.where(stays, self.confidence, moved))

    def lack(self) -> Tensor:
        """1 - Conf, (C,)."""
        return 1 - self.confidence


# -------------------------------------------------------------------------------------- copy-paste


def copy_paste_classes(
    bank: ConfidenceBank, allowed: Tensor, count: int, seed: int, iteration: int
) -> Tensor:
    """The classes to paste in an iteration: (count,) int64 of those `allowed`, with repetition.

        probability of class c = softmax over the allowed classes of sqrt(1 - Conf^c)

    Source: the release; the paper's Eq. (9) has no square root.

    Args:
        bank: of the confidences.
        allowed: (A,) int64, the classes that may be pasted.
        count: K.
        seed: the run's.
        iteration: iterations done.
    """
    probs = bank.lack()[allowed].clamp_min(0).sqrt().softmax(0)
    generator = torch.Generator().manual_seed(derive_seed(seed, iteration, COPY_PASTE))
    numbers = torch.rand(count, generator=generator)  # the same on all processes
    return allowed[choose(probs, numbers.to(allowed.device, non_blocking=True))]


def copy_paste(
    images: Tensor, target: Tensor, from_images: Tensor, from_target: Tensor, classes: Tensor,
    wanted: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Paste all pixels of some classes of other labelled images, at the same place.

    Args:
        images, target: (N,3,H,W) and (N,H,W), to paste into.
        from_images, from_target: of the same shapes, to paste from.
        classes: (K,) the classes.
        wanted: (N,) bool, which images get something.

    Returns:
        Images, labels, and (N,H,W) bool, what was pasted.
    """
    mask = (from_target[..., None] == classes).any(-1) & wanted[:, None, None]
    pasted = torch.where(mask[:, None], from_images, images)
    return pasted, torch.where(mask, from_target, target), mask


def pasted_classes(args: argparse.Namespace, data: DataSource) -> list[int]:
    """Numbers of the classes that copy-paste may draw.

    Raises:
        InputError: a name that is no class.
    """
    names = args.copy_paste_classes
    if names is None:
        left_out = NEVER_PASTED if data.classes == CITYSCAPES_CLASSES else ()
        return [
            number
            for number, name in enumerate(data.classes)
            if number != data.background and name not in left_out
        ]
    unknown = [name for name in names if name not in data.classes]
    if unknown:
        raise InputError(f"--copy-paste-classes: no class {', '.join(unknown)}")
    return [data.classes.index(name) for name in names]


def copy_paste_step(
    batch_l: dict,
    batch_p: dict,
    bank: ConfidenceBank,
    allowed: Tensor,
    iteration: int,
    args: argparse.Namespace,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The labelled images, with something pasted into each with chance ½.

    Args:
        batch_l: labelled images.
        batch_p: labelled images to paste from.
        bank: of the confidences.
        allowed: (A,) the classes that may be pasted.
        iteration: iterations done, for the choice of classes and images.
        args: `acp`, `copy_classes`, `seed`.

    Returns:
        Images (N,3,H,W), labels (N,H,W), valid_mask (N,H,W), and what was pasted (N,H,W) bool.
    """
    images, target = normalise(batch_l["image"], batch_l["valid_mask"]), batch_l["target"]
    if not args.acp:
        return images, target, batch_l["valid_mask"], torch.zeros_like(batch_l["valid_mask"])
    classes = copy_paste_classes(bank, allowed, args.copy_classes, args.seed, iteration)
    numbers = draw(len(images), 1, args.seed, iteration, PASTE_INTO)[:, 0]
    wanted = (numbers < 0.5).to(images.device, non_blocking=True)
    from_images = normalise(batch_p["image"], batch_p["valid_mask"])
    pasted = copy_paste(images, target, from_images, batch_p["target"], classes, wanted)
    images, target, mask = pasted
    return images, target, batch_l["valid_mask"] | mask, mask


# ------------------------------------------------------------------------------- adaptive CutMix


class ImagePool:
    """The last unlabelled crops, and which classes the teacher has seen in each.

    The release reads images of the whole data set again, in the middle of a training step. Here the
    crops of the last iterations stay on the device, those of all processes on each of them.

    Args:
        capacity: P, crops.
        classes: C.
        size: side of the crops, pixels.
        device: where to keep them.

    Attributes:
        images: (P,3,size,size) float16, normalised.
        valid_mask: (P,size,size) bool, False on padding.
        has: (P,C) bool, whether the teacher has seen a class in a crop.
        filled: () int64, how many crops there are.
        head: () int64, where the next one goes.
    """

    def __init__(self, capacity: int, classes: int, size: int, device: torch.device):
        self.images = torch.zeros(capacity, 3, size, size, dtype=torch.float16, device=device)
        self.valid_mask = torch.zeros(capacity, size, size, dtype=torch.bool, device=device)
        self.has = torch.zeros(capacity, classes, dtype=torch.bool, device=device)
        self.filled = torch.zeros((), dtype=torch.int64, device=device)
        self.head = torch.zeros((), dtype=torch.int64, device=device)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what a checkpoint has kept."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])

    def push(self, images: Tensor, valid_mask: Tensor, has: Tensor) -> None:
        """Add crops of every process; the oldest make room.

        Args:
            images: (N,3,H,W), normalised; those of all processes are at most P.
            valid_mask: (N,H,W).
            has: (N,C) bool.
        """
        capacity = len(self.images)
        images = torch.cat(collect(images.to(self.images.dtype)))
        at = (self.head + torch.arange(len(images), device=self.head.device)) % capacity
        self.images[at] = images
        self.valid_mask[at] = torch.cat(collect(valid_mask))
        self.has[at] = torch.cat(collect(has))
        self.head.copy_((self.head + len(images)) % capacity)
        self.filled.copy_((self.filled + len(images)).clamp_max(capacity))

    def learn(self, places: Tensor, has: Tensor) -> None:
        """Take over what the teacher sees now in the crops at some places, of every process.

        Where it sees a class in one of two passes over a crop, the crop has it.

        Args:
            places: (N,) int64.
            has: (N,C) bool.
        """
        places, has = torch.cat(collect(places)), torch.cat(collect(has))
        counts = torch.zeros(self.has.shape, device=has.device)
        counts.index_add_(0, places, has.to(counts.dtype))
        looked_at = torch.zeros(len(self.has), device=has.device)
        looked_at[places] = 1.0
        self.has.copy_(torch.where(looked_at[:, None] > 0, counts > 0, self.has))

    def find(self, classes: Tensor, numbers: Tensor) -> Tensor:
        """Places of crops that hold the wanted classes; of any crop where none does.

        Args:
            classes: (N,) a class for each image.
            numbers: (N,P) from U(0,1), which decide between the crops.

        Returns:
            (N,) int64. While the pool is empty it is 0.
        """
        there = torch.arange(len(self.images), device=self.filled.device) < self.filled  # (P,)
        fits = self.has[:, classes].T & there  # (N,P)
        fits = torch.where(fits.any(1, keepdim=True), fits, there)
        return numbers.masked_fill(~fits, -1.0).argmax(1)


def nearest(maps: Tensor, size: torch.Size) -> Tensor:
    """Maps (N,H,W) at a lower resolution (h,w), by nearest neighbour."""
    (h, w), (full_h, full_w) = size, maps.shape[1:]
    rows = torch.arange(h, device=maps.device) * full_h // h
    columns = torch.arange(w, device=maps.device) * full_w // w
    return maps[:, rows[:, None], columns]


def classes_in(label: Tensor, classes: int, share: float) -> Tensor:
    """Whether each class has at least `share` of the pixels of each label map.

    Args:
        label: (N,h,w) labels, 255 where there is none.
        classes: C.
        share: of all pixels, those without a label included.

    Returns:
        (N,C) bool.
    """
    flat = label.flatten(1).long()
    counts = torch.zeros(len(label), 256, device=label.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype))
    counts = counts[:, :classes]
    return (counts >= share * flat.shape[1]) & (counts > 0)


def component_boxes(
    label: Tensor, classes: Tensor, size: int, share: float, seed: int, iteration: int
) -> tuple[Tensor, Tensor]:
    """For each image the bounding box of a random connected region of its class.

    Regions are found at the resolution of the label map. They are 8-connected, and those with no
    more than `share` of the pixels do not count. An image without one gets CutMix-Seg's box of half
    its area.

    Args:
        label: (N,h,w) labels; brought to the host, which waits for the device.
        classes: (N,) a class for each image.
        size: side of the images, pixels.
        share: of the pixels of the label map.
        seed: the run's.
        iteration: iterations done.

    Returns:
        (N,4) int64 on the CPU: top, left, bottom, right in pixels of the images, the last two
        exclusive; and (N,) float32, 1 where the box is that of a region.
    """
    maps, wanted = label.cpu().numpy(), classes.tolist()
    numbers = draw(len(maps), 1, seed, iteration, COMPONENT)[:, 0].tolist()
    boxes = boxes_of_process(len(maps), size, seed, iteration)[:, 0].clone()  # CutMix-Seg's
    hit = torch.zeros(len(maps))
    for index, (labels, chosen, number) in enumerate(zip(maps, wanted, numbers)):
        regions, count = ndimage.label(labels == chosen, structure=np.ones((3, 3)))
        pixels = np.bincount(regions.ravel(), minlength=count + 1)[1:]
        large = np.flatnonzero(pixels > share * labels.size)
        if len(large):
            region = large[int(number * len(large))]
            rows, columns = ndimage.find_objects(regions)[region]
            box = torch.tensor([rows.start, columns.start, rows.stop, columns.stop])
            boxes[index] = (box * size / len(labels)).round().long()
            hit[index] = 1
    return boxes, hit


def box_mask(boxes: Tensor, size: int, device: torch.device) -> Tensor:
    """Masks (N,size,size) bool, True inside the boxes (N,4)."""
    return rasterise(boxes[:, None].to(device, non_blocking=True), size)


def choose_crops(
    bank: ConfidenceBank, pool: ImagePool, count: int, iteration: int, args: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """A class for each image, and the place of a crop that has it in the pool: (N,) int64 each.

    While the pool is empty, in the first iteration, each image is mixed with the one before it in
    the batch instead.
    """
    device = pool.images.device
    numbers = draw(count, 1, args.seed, iteration, CUTMIX_CLASS)[:, 0]
    classes = choose(bank.lack().softmax(0), numbers.to(device, non_blocking=True))
    numbers = draw(count, len(pool.images), args.seed, iteration, PARTNER)
    return classes, pool.find(classes, numbers.to(device, non_blocking=True))


@torch.no_grad()
def teacher_labels(logits: Tensor, valid_mask: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """ŷ and κ of the teacher's logits, (N,H,W) both; ŷ is uint8, and 255 where κ is too low."""
    found = pseudo_label(logits, valid_mask.shape[1:], with_confidence=True)
    unsure = (found.confidence < threshold) | ~valid_mask
    return found.label.masked_fill(unsure, IGNORE), found.confidence


@torch.no_grad()
def label_whole(
    teacher: nn.Module, images: Tensor, valid_mask: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """ŷ and κ, (N,H,W), and the labels at the resolution of the logits, (N,h,w) uint8.

    The latter are 255 on padding, and there alone.
    """
    logits = teacher(images)  # (N,C,h,w)
    low = logits.argmax(1).to(torch.uint8)
    low = low.masked_fill(~nearest(valid_mask, low.shape[1:]), IGNORE)
    return *teacher_labels(logits, valid_mask, threshold), low


@torch.no_grad()
def adaptive_cutmix(
    teacher: nn.Module,
    batch_u: dict,
    bank: ConfidenceBank,
    pool: ImagePool,
    iteration: int,
    args: argparse.Namespace,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mixed images, and the teacher's labels of them.

    Args:
        teacher: the network that labels.
        batch_u: unlabelled images u1.
        bank: of the confidences.
        pool: of the crops of earlier iterations; these are added to it.
        iteration: iterations done, for classes, crops and boxes.
        args: `acm`, `conf_thresh`, `listed_share`, `region_share`, `seed`.

    Returns:
        x_m, (N,3,H,W); ŷ_m, (N,H,W) uint8; κ_m, (N,H,W); valid_mask, (N,H,W); and the share of the
        boxes that bound a region of their class, a scalar.
    """
    first, valid_1 = normalise(batch_u["image"], batch_u["valid_mask"]), batch_u["valid_mask"]
    count, size, device = len(first), first.shape[2], first.device
    empty = pool.filled == 0

    # c ~ softmax(1 - Conf), and a crop u2 in which the teacher has seen it
    classes, places = choose_crops(bank, pool, count, iteration, args)
    second = torch.where(empty, first.roll(1, 0), pool.images[places].to(first.dtype))
    valid_2 = torch.where(empty, valid_1.roll(1, 0), pool.valid_mask[places])

    # The teacher labels both, whole.
    both = torch.cat([first, second]), torch.cat([valid_1, valid_2])
    labels, confidence, low = label_whole(teacher, *both, args.conf_thresh)

    # M bounds a region of c in ŷ(u2)
    found = torch.zeros((), device=device)
    if args.acm:
        boxes, hit = component_boxes(
            low[count:], classes, size, args.region_share, args.seed, iteration
        )
        mask, found = box_mask(boxes, size, device), hit.mean().to(device)
    else:
        mask = half_area_masks(count, size, args.seed, iteration, device)

    # The pool learns what the teacher sees in u2, and gets u1.
    seen = classes_in(low, len(bank.confidence), args.listed_share)  # (2N,C)
    pool.learn(places, torch.where(empty, pool.has[places], seen[count:]))
    pool.push(first, valid_1, seen[:count])

    # x_m = M·u2 + (1-M)·u1, and labels, confidences and valid pixels alike
    parts = (
        (second, first),
        (labels[count:], labels[:count]),
        (confidence[count:], confidence[:count]),
    )
    images_m, label_m, conf_m = (mix(mask, inside, outside) for inside, outside in parts)
    return images_m, label_m, conf_m, mix(mask, valid_2, valid_1), found


# ------------------------------------------------------------------------------------- the loss


def sampling_rates(bank: ConfidenceBank, exponent: float) -> Tensor:
    """s^c = ((1 - Conf^c) / max_k (1 - Conf^k))^β, (C,) in [0,1].

    Source: adaptive equalisation sampling, section 3.4, where β is not stated; 1 in the release.
    """
    lack = bank.lack().clamp_min(0)
    return (lack / lack.max().clamp_min(1e-12)) ** exponent


def adaptive_loss(
    logits: Tensor,
    label: Tensor,
    confidence: Tensor,
    valid_mask: Tensor,
    *,
    rates: Tensor | None,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the teacher's labels, where sampling and confidence decide what counts.

        kept = 1 with probability s^c, where c is what the student predicts
        w = κ^γ · kept,   loss = Σ w · CE(z, ŷ) / Σ w                          [Eq. (10) to (12)]

    A pixel whose label is 255 adds nothing to the loss, but its weight counts, as released.

    Args:
        logits: (N,C,h,w) of the student.
        label: (N,H,W) of the teacher, 255 where it is not sure enough.
        confidence: κ, (N,H,W), the teacher's highest probability.
        valid_mask: (N,H,W), False on padding, which counts nowhere.
        rates: s, (C,); None keeps all pixels.
        gamma: γ; 0 gives all pixels the same weight.

    Returns:
        The loss over the pixels of all processes, and the share of valid pixels that are kept.
    """
    kept = valid_mask
    if rates is not None:
        predicted = pseudo_label(logits.detach(), label.shape[1:]).label
        keeps = torch.rand(label.shape, device=label.device) < rates[predicted.long()]
        kept = valid_mask & keeps
    weight = kept * confidence**gamma
    total = cross_entropy(logits, label, ignore_index=IGNORE, pixel_weight=weight, reduction="sum")
    share = add_up(kept.sum()) / add_up(valid_mask.sum()).clamp_min(1)
    return global_mean(total, weight.sum(), least=1e-12), share
