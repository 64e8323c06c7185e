"""SupOnly: DeepLabv3+ trained on the labelled images alone.

This is the baseline of every semi-supervised method.

    labelled images --+-- scale, crop, flip --+--> x_l --> f --> logits --+
    their masks ------'                       '--> y ---------------------+--> L_s --> SGD step

    unlabelled images: their number alone matters, for the length of an epoch

1. Take a batch of labelled images x_l, randomly scaled, cropped and flipped.
2. Forward pass: the logits f(x_l) stay at stride 4; the loss interpolates them.
3. L_s = mean over valid pixels of CE(f(x_l), y); on cityscapes over the hard pixels alone (online
   hard example mining, OHEM; see `common/losses.py`).
4. SGD step, with momentum 0.9 and the poly learning rate lr · (1 - iteration/total)^0.9.

| symbol | variable | symbol | variable           | symbol | variable |
|--------|----------|--------|--------------------|--------|----------|
| f      | network  | x_l, y | images_l, target_l | L_s    | loss     |

An epoch is one pass over the UNLABELLED images, as in the semi-supervised scripts, so that the same
split trains for the same number of iterations and the comparison is fair.

    python supervised.py                                      # built-in data, a CPU
    python supervised.py --data voc --data-dir VOCdevkit --split 1/8
"""

import argparse

from torch import Tensor, nn

from common import cli, runtime
from common.augment import normalise
from common.deeplabv3plus import DeepLabV3Plus
from common.evaluate import evaluate
from common.losses import labelled_loss
from common.run import Run, sgd

# The settings of each data set are those of cps.py, whose baseline this is, and so are the sources:
# for voc and cityscapes CPS's released configurations, rescaled to one process (see difference 4
# there); for the others our own choice.
SHAPES = {  # a small network with pretrained weights of its own, for a CPU
    "backbone": "tiny",
    "weights": "blots",
    "output_stride": 8,
    "dropout": 0.1,
    "max_iters": 900,
    "batch_size": 8,
    "crop_size": 64,
    "scale": "0.75,1,1.25,1.5",
    "lr": 0.03,
    "head_lr_mult": 3.0,
    "weight_decay": 1e-4,
    "decay_norm": False,
    "ohem": None,
    "eval_window": 0,
    "eval_iters": 450,
}
CAMVID = {
    "backbone": "resnet50",
    "weights": "imagenet",
    "output_stride": 16,
    "dropout": 0.5,
    "epochs": 300,
    "batch_size": 8,
    "crop_size": 320,
    "scale": "0.5,0.75,1,1.5,1.75,2",
    "lr": 0.01,
    "head_lr_mult": 1.0,
    "weight_decay": 4e-4,
    "decay_norm": False,
    "ohem": None,
    "eval_window": 0,  # whole images
    "eval_interval": 10,
}
VOC = {
    "backbone": "resnet50",
    "weights": "imagenet",
    "output_stride": 16,
    "dropout": 0.5,
    "epochs": {"1/16": 32, "1/8": 34, "1/4": 40, "1/2": 60},
    "max_iters": 39_000,  # of every other split
    "batch_size": 8,
    "crop_size": 512,
    "scale": "0.5,0.75,1,1.5,1.75,2",
    "lr": 0.0025,
    "head_lr_mult": 1.0,
    "weight_decay": 4e-4,
    "decay_norm": False,
    "ohem": None,
    "eval_window": 0,
    "eval_interval": 1,
}
CITYSCAPES = VOC | {
    "epochs": {"1/16": 128, "1/8": 137, "1/4": 160, "1/2": 240},
    "max_iters": 44_500,
    "crop_size": 800,
    "weight_decay": 8e-4,
    "ohem": (0.7, 50_000),  # probability, pixels an image
    "eval_window": "crop",  # windows of the crop's size
    "eval_interval": 8,
}
FOLDER = VOC | {"epochs": 60, "max_iters": None}  # whatever the split
PRESETS = {
    "shapes": SHAPES,
    "shapes-zipf": SHAPES,
    "camvid": CAMVID,
    "voc": VOC,
    "cityscapes": CITYSCAPES,
    "folder": FOLDER,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run."""
    return cli.finish(cli.parser(__doc__, PRESETS), PRESETS, "supervised", argv)


def train_step(network: nn.Module, batch_l: dict, args: argparse.Namespace) -> dict[str, Tensor]:
    """Steps 1 to 3: the loss of one iteration.

    Args:
        network: the network to train.
        batch_l: labelled images.
        args: `ohem`, see `common.losses.labelled_loss`.

    Returns:
        The measures to log, scalars on the device.
    """
    # 1. Labelled images, normalised on the device.
    images_l = normalise(batch_l["image"], batch_l["valid_mask"])  # (N,3,H,W)
    target_l = batch_l["target"]  # (N,H,W)

    # 2. f(x_l)
    logits_l = network(images_l)  # (N,C,H/4,W/4)

    # 3. L_s = mean over valid pixels of CE(f(x_l), y)
    loss = labelled_loss(logits_l, target_l, args.ohem)
    return {"loss": loss}


def main(args: argparse.Namespace) -> None:
    """Train and evaluate one network."""
    run = Run(args)
    network = run.place(DeepLabV3Plus.from_settings(args, run.data.num_classes))
    optimizer = sgd([network], args)
    run.keep(result="model", model=network, optimizer=optimizer)
    trained = run.parallel(network)

    for _, (batch_l,) in run.iterations(run.batches(run.data.labelled, stream=0)):
        if run.evaluates():
            run.report(evaluate({"model": network}, run.data.val, run.data, args))
        measured = train_step(trained, batch_l, args)
        run.step(measured["loss"], optimizer)  # 4. SGD step
        run.log(measured)
    run.finish(evaluate({"model": network}, run.data.val, run.data, args))


if __name__ == "__main__":
    runtime.launch(main, parse_args())
