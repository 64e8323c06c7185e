"""The settings of `--data folder`, chosen from the images and the device.

A published schedule does not fit a dozen photographs on a laptop, nor ten thousand scans on a GPU.
So the settings of the method come from one of its presets, and what depends on images and device is
chosen here: network, working size, crop, scales, length, evaluation. Each choice is a flag, too,
and the run prints it with its reason.
"""

import argparse
import os
from pathlib import Path
from statistics import median

import torch

from common import InputError
from common.folder import val_folder
from common.images import open_image, working_size
from common.source import images_in, spread

MEASURED = 1000  # images whose headers are read, spread evenly; 0.1 s

# On 468 images of 480x360 pixels, which gives 1170 iterations, `supervised.py` took 6 minutes and
# `cps.py` 19, one thread each, on two busy cores.
SMALL = {"long_side": 512, "crop": 192, "epochs": 20, "least": 1000, "most": 4000, "evaluations": 4}
# On a GPU: the crop of VOC, and lengths between a tenth of its schedule and the whole of it.
LARGE = {
    "long_side": 2048, "crop": 512, "epochs": 60, "least": 4000, "most": 40_000, "evaluations": 10,
}  # fmt: skip

Reasons = dict[str, str]  # of settings


def own_preset(args: argparse.Namespace, presets: dict[str, dict]) -> tuple[dict, list[str]]:
    """The preset of a method for the images in `args.data_dir`.

    Args:
        args: the flags; those that are not given are None.
        presets: the method's; taken are those of `shapes` for the small network, and those of
            `folder` for the others.

    Returns:
        The preset, and a line for each choice with its reason. Where there are no images, or none
        that can be read, it is the preset of `folder` as it is: what is wrong is said when the data
        set is loaded.
    """
    images = images_of(Path(args.data_dir) / "images") if args.data_dir else []
    sizes = sizes_of(spread(images, MEASURED))
    if not sizes:
        return dict(presets["folder"]), []

    cuda = args.device.startswith("cuda") if args.device else torch.cuda.is_available()
    small = args.backbone == "tiny" if args.backbone else not cuda
    rules = SMALL if small else LARGE
    preset = dict(presets["shapes" if small else "folder"])
    device = "a GPU" if cuda else "a CPU"
    told = f"for {len(images)} images, up to {longest(sizes)}, on {device}; each is a flag, too"
    reasons = {"backbone": "which a CPU trains in minutes" if small else "since there is a GPU"}
    reasons |= choose_size(args, preset, rules, sizes)
    reasons |= choose_length(args, preset, rules, len(images))
    chosen = [
        f"{name} {preset[name]}, {reason}"
        for name, reason in reasons.items()
        if getattr(args, name) is None
    ]
    return preset, [told, *chosen]


def images_of(folder: Path) -> list[Path]:
    """The images that `--data folder` reads: those in the folders of roles, or all."""
    roles: tuple[str, ...] = (".",)
    if os.path.isdir(folder / "labelled"):  # Path.is_dir raises where a folder may not be entered
        roles = "labelled", "unlabelled", val_folder(folder)
    return [path for role in roles for path in images_in(folder / role).values()]


def sizes_of(images: list[Path]) -> list[tuple[int, int]]:
    """(width, height) of each image that can be read."""
    sizes = []
    for path in images:
        try:
            sizes.append(open_image(path).size)
        except InputError:
            pass  # named with all others when the data set is loaded
    return sizes


def longest(sizes: list[tuple[int, int]]) -> str:
    """The largest of some sizes, as WIDTHxHEIGHT."""
    return "{}x{}".format(*max(sizes, key=max))


def choose_size(
    args: argparse.Namespace, preset: dict, rules: dict, sizes: list[tuple[int, int]]
) -> Reasons:
    """Working size, crop, scales and output stride, which are put into the preset."""
    long_side = rules["long_side"] if max(map(max, sizes)) > rules["long_side"] else None
    preset["long_side"] = long_side
    reasons = {}
    if long_side:
        reasons["long_side"] = "to which larger images are shrunk, for speed"

    working = [working_size(size, args.long_side or long_side) for size in sizes]
    short = median(min(size) for size in working)
    fits = short // 32 * 32 if short >= 64 else -(-short // 32) * 32  # small images are padded
    crop = int(min(rules["crop"], fits))
    preset["crop_size"] = crop
    reasons["crop_size"] = f"by the short side of images, {short:g}; at most {rules['crop']}"

    # A crop of a much larger image shows little of it: show more, at a smaller scale.
    crop = args.crop_size or crop
    little = short >= 1.5 * crop
    preset["scale"] = "0.5,0.75,1" if little else "0.75,1,1.25,1.5"
    reasons["scale"] = f"a crop shows {'little' if little else 'much'} of an image"
    if "tta_scales" in preset:
        preset["tta_scales"] = tuple(float(scale) for scale in preset["scale"].split(","))
    preset["eval_window"] = 0
    if crop > 128:  # a stride of 8 is for small images
        preset["output_stride"] = 16
        reasons["output_stride"] = "since crops are larger than 128 pixels"
    return reasons


def choose_length(args: argparse.Namespace, preset: dict, rules: dict, count: int) -> Reasons:
    """Iterations and evaluations, which are put into the preset."""
    batch = args.batch_size or preset["batch_size"]
    wanted = rules["epochs"] * count // batch
    iterations = max(rules["least"], min(rules["most"], wanted))
    preset.pop("epochs", None)
    preset.pop("eval_interval", None)
    preset["max_iters"] = iterations
    length = args.max_iters or (args.epochs or 0) * (count // batch) or iterations
    preset["eval_iters"] = -(-length // rules["evaluations"])
    if args.epochs is not None:
        return {}
    return {
        "max_iters": f"{rules['epochs']} passes over the images, but at least {rules['least']} "
        f"and at most {rules['most']}"
    }
