"""Masks and overlays for a folder of pictures, with the network of a run.

    python -m common.predict runs/cps-shapes-1-8-seed0 my_pictures

writes RUN/predictions/masks/NAME.png (indexed PNG in the data set's colours, label = index) and
RUN/predictions/overlays/NAME.png, both at the picture's own size.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.utils import draw_segmentation_masks

from common import InputError, checkpoint
from common.augment import normalise
from common.data import open_picture, to_rgb
from common.datasets import pictures
from common.deeplabv3plus import DeepLabV3Plus
from common.evaluate import predict
from common.masks import write_mask


def load_network(run: Path, which: str, name: str | None, device: torch.device) -> tuple[nn.Module, dict]:
    """The network of a run in eval mode, and the run's description (args.json).

    Args:
        run: the run's folder.
        which: "best" or "last".
        name: a network of the checkpoint, None for the result network (its first).
        device: where to put it.

    Raises:
        InputError: no run there, or no such network.
    """
    description = checkpoint.read_description(run)
    path = run / f"{which}.pt"
    content = checkpoint.read(path)
    name = name or next(iter(content["networks"]))
    args = description["args"]
    network = DeepLabV3Plus(args["backbone"], len(description["classes"]), "none", args["output_stride"])
    if name in content["networks"]:  # a method may have trained further heads, such as U2PL's features: not needed here
        wanted = network.state_dict().keys()
        content["networks"][name] = {key: value for key, value in content["networks"][name].items() if key in wanted}
    checkpoint.load_networks(content, {name: network}, path)
    return network.to(device).eval(), description


def save_prediction(picture: Image.Image, labels: torch.Tensor, colours: list, name: str, output: Path) -> None:
    """Write the indexed mask and the overlay of one picture."""
    write_mask(output / "masks" / f"{name}.png", labels, colours)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    classes = torch.arange(len(colours))[:, None, None]
    overlay = draw_segmentation_masks(pixels, labels[None] == classes, alpha=0.5, colors=list(map(tuple, colours)))
    Image.fromarray(overlay.permute(1, 2, 0).numpy()).save(output / "overlays" / f"{name}.png")


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Predict every picture; one that cannot be read is named at the end and does not stop the others.

    Raises:
        InputError: nothing to predict, no such run, or pictures that could not be read.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("images", type=Path, metavar="IMAGES", help="a folder of pictures, or one picture")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/predictions")
    parser.add_argument("--checkpoint", choices=["best", "last"], default="last", help="default: last, the result")
    parser.add_argument("--network", metavar="NAME", help="default: the method's result network")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    try:
        device = torch.empty(1, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    network, description = load_network(args.run, args.checkpoint, args.network, device)
    impl = "torch" if description["args"]["kernels"] == "torch" else "auto"  # such a machine may have no C compiler
    if not args.images.exists():
        raise InputError(f"no file or folder {args.images}")
    found = pictures(args.images) if args.images.is_dir() else {args.images.stem: args.images}
    if not found:
        raise InputError(f"no .png, .jpg or .jpeg in {args.images}")
    output = args.output or args.run / "predictions"
    try:
        for part in ("masks", "overlays"):
            (output / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror}") from None

    failed = []
    for name, path in found.items():
        try:
            picture = to_rgb(open_picture(path), path)
        except InputError as error:
            failed.append(str(error))
            continue
        pixels = torch.from_numpy(np.array(picture))[None]
        labels = predict(network, normalise(pixels.to(device)), description["args"]["eval_window"], impl)[0].cpu()
        save_prediction(picture, labels, description["colours"], name, output)
    print(f"{len(found) - len(failed)} pictures predicted: {output}/masks and {output}/overlays")
    if failed:
        raise InputError(f"{len(failed)} could not be read: " + "; ".join(failed))


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        print(f"predict: error: {problem}", file=sys.stderr)
        sys.exit(2)
