"""Pretrained weights for the `tiny` backbone: what ImageNet is to VOC, on generated images.

    OMP_NUM_THREADS=1 python -m common.pretrain

The pretext, "blots", is image classification. A species is a random outline with a random pattern
of light and dark; there are 1000 of them. A portrait is an image of 32x32 pixels with one figure of
a species, in any colour, on any ground, under any light. The network sees portraits and the number
of their species, never a mask.

No species is a figure of the built-in set (`common/shapes.py`), and no image is shared. What is
shared is the renderer: grounds, light, blur and noise are of the same kind, and so are the kinds of
patterns, and some outlines come near. So these weights are nearer to the built-in set than
ImageNet's are to VOC.

Optimisation is AdamW under a poly learning rate, on mirrored and rescaled images with their colours
in random order. It takes about three minutes on one CPU core, and prints the accuracy on portraits
that were not trained on. The weights, 0.22 M in float16, are the file `common/tiny.pt`, the best of
three runs with other random numbers. A machine that rounds differently may give other weights, as
another seed does.
"""

import argparse
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import shapes
from common.augment import normalise, uniform
from common.deeplabv3plus import BLOTS, TinyBackbone
from common.schedule import poly

SEED = 7
SPECIES = 1000
SIZE = 32  # pixels of a portrait's side; figures are as large as those of the built-in set
TRAIN, VAL = 40_000, 2000  # portraits
BATCH = 64
LR = 4e-3
WARMUP = 50  # iterations


class Species(NamedTuple):
    """A class of the pretext: what its figures have in common."""

    outline: shapes.Outline
    pattern: shapes.Pattern


def draw_species(count: int) -> list[Species]:
    """Outlines and patterns drawn at random, always the same ones."""
    rng = np.random.default_rng([SEED])

    def pattern() -> shapes.Pattern:
        return shapes.Pattern(shapes.KINDS[rng.integers(len(shapes.KINDS))], rng.uniform(3, 11))

    return [Species(shapes.blot(rng), pattern()) for _ in range(count)]


def portrait(index: int, species: list[Species]) -> tuple[np.ndarray, int]:
    """Image `index` (32,32,3) uint8 RGB, and the number of the species that it shows."""
    rng = np.random.default_rng([SEED, 1, index])
    scene = shapes.Scene(rng, SIZE, difficulty=rng.random())
    scene.add_clutter(most=2, largest=6)

    label = int(rng.integers(len(species)))
    outline, pattern = species[label]
    u, v = scene.frame(rng.uniform(11, 21, 2), radius=rng.uniform(9, 18))
    scene.paint(outline(u, v), shapes.light_and_dark(pattern, u, v), strength=0.4)
    return scene.photograph(), label


def draw_portraits(numbers: range, species: list[Species]) -> tuple[Tensor, Tensor]:
    """Portraits (N,32,32,3) uint8 and their labels (N,) int64."""
    images, labels = zip(*(portrait(index, species) for index in numbers), strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


class Classifier(nn.Module):
    """A backbone, the mean over its last map, and a linear layer.

    Shape: images (N,3,H,W), normalised -> logits (N,classes).
    """

    def __init__(self, backbone: TinyBackbone, classes: int):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.out_channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        _, _, high = self.backbone(images)
        return self.classifier(high.mean((2, 3)))


def augment(images: Tensor) -> Tensor:
    """A batch (N,H,W,3) uint8 as the network takes it: mirrored, recoloured and rescaled by chance.

    The channels are put into random order, since colours say nothing.
    """
    if uniform(0, 1) < 0.5:
        images = images.flip(2)
    pixels = normalise(images[..., torch.randperm(3)])
    if uniform(0, 1) < 0.3:
        pixels = F.interpolate(pixels, scale_factor=uniform(0.7, 1.4), mode="bilinear")
    return pixels


def train(
    network: Classifier,
    images: Tensor,
    labels: Tensor,
    iterations: int,
    say: Callable[[int, Tensor], None],
) -> None:
    """Cross-entropy of random batches; `say` gets each iteration and its loss."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0.01)
    for iteration in range(iterations):
        rate = LR * min(1, (iteration + 1) / WARMUP) * poly(iteration, iterations)
        for group in optimizer.param_groups:
            group["lr"] = rate

        chosen = torch.randint(len(images), (BATCH,))
        logits = network(augment(images[chosen]))
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        say(iteration + 1, loss.detach())


@torch.no_grad()
def accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of portraits (N,H,W,3) whose species is named rightly."""
    network.eval()
    right = [
        (network(normalise(part)).argmax(1) == label).sum()
        for part, label in zip(images.split(BATCH), labels.split(BATCH), strict=True)
    ]
    return sum(right).item() / len(images)


def main(argv: list[str] | None = None) -> None:
    """Draw, train, measure, and write the file."""
    parser = argparse.ArgumentParser(
        prog="python -m common.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=BLOTS, help=f"default: {BLOTS}")
    parser.add_argument("--max-iters", type=int, default=6000, help="default: 6000")
    args = parser.parse_args(argv)

    began = time.perf_counter()
    torch.manual_seed(0)
    species = draw_species(SPECIES)
    images, labels = draw_portraits(range(TRAIN), species)
    seconds = time.perf_counter() - began
    print(f"{TRAIN} portraits of {SPECIES} species  {seconds:.0f} s", flush=True)

    backbone = TinyBackbone("none", output_stride=8)
    network = Classifier(backbone, SPECIES)

    def say(iteration: int, loss: Tensor) -> None:
        if iteration % 500 == 0 or iteration in (1, args.max_iters):
            seconds = time.perf_counter() - began
            step = f"iter {iteration}/{args.max_iters}"
            print(f"{step}  loss {loss:.3f}  {seconds:.0f} s", flush=True)

    train(network, images, labels, args.max_iters, say)

    share = accuracy(network, *draw_portraits(range(TRAIN, TRAIN + VAL), species))
    print(f"accuracy on {VAL} other portraits: {100 * share:.1f} %")
    write(backbone, args.output)


def write(backbone: TinyBackbone, path: Path) -> None:
    """Write the weights in float16, and print the file's size and SHA-256."""
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in backbone.state_dict().items()
    }
    torch.save(state, path)
    content = path.read_bytes()
    print(f"{path}: {len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
