"""Masks and overlays for a folder of images, with the network of a run.

    python -m common.predict runs/cps-shapes-1-8-seed0 my_images

writes RUN/predictions/masks/NAME.png (indexed PNG in the data set's colours, label = index) and
RUN/predictions/overlays/NAME.png, both at the image's own size, turned as EXIF says. Images in
subfolders are found too; their masks and overlays lie in subfolders of the same names.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common import InputError, checkpoint
from common.augment import normalise
from common.datasets import images_in
from common.deeplabv3plus import DeepLabV3Plus
from common.evaluate import predict
from common.figures import colourise
from common.images import naming_if_too_large, open_image
from common.masks import write_mask
from kernels import set_backend


def load_network(
    run: Path, which: str, name: str | None, device: torch.device
) -> tuple[nn.Module, dict]:
    """The network of a run in eval mode, and the run's description (args.json).

    Args:
        run: the run's folder.
        which: "best" or "last".
        name: a network of the checkpoint, None for the method's result.
        device: where to put it.

    Raises:
        InputError: no run there, or no such network.
    """
    description = checkpoint.read_description(run)
    path = run / f"{which}.pt"
    content = checkpoint.read(path)
    name = name or content["result"]
    args = description["args"]
    classes = len(description["classes"])
    network = DeepLabV3Plus(args["backbone"], classes, "none", args["output_stride"])
    if name in content["networks"]:
        # A method may have trained further heads, such as U2PL's features: not needed here.
        wanted = network.state_dict().keys()
        state = content["networks"][name]
        content["networks"][name] = {key: state[key] for key in state if key in wanted}
    checkpoint.load_networks(content, {name: network}, path)
    return network.to(device).eval(), description


def save(overlay: np.ndarray, path: Path) -> None:
    """Write an overlay, (H,W,3) uint8.

    Raises:
        InputError: the disk is full or the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(overlay).save(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from None


def find_images(place: Path, output: Path) -> dict[str, Path]:
    """The image file `place`, or every image in and below the folder `place`, by its id.

    What lies in `output` is left out: it may be the overlays of an earlier call.

    Raises:
        InputError: nothing there, or no image.
    """
    if not place.exists():
        raise InputError(f"no file or folder {place}")
    if not place.is_dir():
        return {place.stem: place}
    found = {
        name: path
        for name, path in images_in(place).items()
        if output.resolve() not in path.resolve().parents
    }
    if not found:
        raise InputError(f"no .png, .jpg or .jpeg in {place}")
    return found


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "images", type=Path, metavar="IMAGES", help="a folder of images, or one image"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/predictions")
    parser.add_argument(
        "--checkpoint",
        choices=["best", "last"],
        default="last",
        help="default: last, the result",
    )
    parser.add_argument("--network", metavar="NAME", help="default: the method's result network")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def find_device(name: str) -> torch.device:
    """The device `name`, tried out.

    Raises:
        InputError: there is no such device.
    """
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def predict_file(
    path: Path, network: nn.Module, description: dict, device: torch.device
) -> tuple[Tensor, np.ndarray]:
    """The labels (H,W) of an image, and the overlay (H,W,3) uint8 of image and labels.

    Raises:
        InputError: the image cannot be read, or is too large for the memory.
    """
    with naming_if_too_large(path):
        pixels = open_image(path).pixels()
        images = normalise(pixels[None].to(device))
        labels = predict(network, images, description["args"]["eval_window"])[0].cpu()
        painted = colourise(labels.numpy(), description["colours"])
        return labels, pixels.numpy() // 2 + painted // 2


def main(argv: list[str] | None = None) -> None:
    """Predict every image.

    One that cannot be read is named at the end and does not stop the others.

    Raises:
        InputError: nothing to predict, no such run, or images that could not be predicted.
    """
    args = parse_args(argv)
    device = find_device(args.device)
    network, description = load_network(args.run, args.checkpoint, args.network, device)
    if description["args"]["kernels"] == "torch":
        set_backend("torch")  # a machine that trained so may have no C compiler
    output = args.output or args.run / "predictions"
    found = find_images(args.images, output)
    try:
        for part in ("masks", "overlays"):
            (output / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror}") from None

    failed = []
    for name, path in found.items():
        try:
            labels, overlay = predict_file(path, network, description, device)
        except InputError as error:
            failed.append(str(error))
            continue
        write_mask(output / "masks" / f"{name}.png", labels, description["colours"])
        save(overlay, output / "overlays" / f"{name}.png")
    print(f"{len(found) - len(failed)} images predicted: {output}/masks and {output}/overlays")
    if failed:
        raise InputError(f"{len(failed)} could not be predicted: " + "; ".join(failed))


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        print(f"predict: error: {problem}", file=sys.stderr)
        sys.exit(2)
