"""SupOnly: DeepLabv3+ trained on the labelled pictures alone, the baseline of every semi-supervised method.

1. Take a batch of labelled pictures, randomly scaled, cropped and flipped.
2. Forward pass; the logits stay at stride 4 and the loss interpolates them.
3. L_s = mean over valid pixels of CE(f(x_l), y)          (on Cityscapes over the hard pixels: OHEM)
4. SGD with momentum 0.9 and the poly learning rate lr · (1 - it/total)^0.9.

| symbol | variable          | symbol | variable |
|--------|-------------------|--------|----------|
| x_l    | images_l          | y      | target_l |
| f      | networks["model"] | L_s    | loss     |

An epoch is one pass over the UNLABELLED pictures, as in the semi-supervised scripts, so that the same split trains for the
same number of iterations and the comparison is fair.

    python supervised.py                                      # built-in data, a CPU, under a minute
    python supervised.py --data voc --data-dir VOCdevkit --split 1/8
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from common import checkpoint, cli, runtime
from common.augment import normalise
from common.data import load_data, train_loader
from common.datasets import DataSource
from common.deeplabv3plus import DeepLabV3Plus, parameter_groups
from common.evaluate import Scores, validate
from common.losses import labelled_loss
from common.report import Report
from common.runtime import Runtime

# The schedules are those of cps.py, whose baseline this is; sources there.
# fmt: off
PRESETS = {
    "shapes": {"max_iters": 1400, "lr": 0.1, "weight_decay": 1e-4, "crop_size": 64},
    "camvid": {"epochs": 300, "lr": 0.01, "weight_decay": 4e-4, "crop_size": 320},
    "voc": {"epochs": {"1/16": 32, "1/8": 34, "1/4": 40, "1/2": 60}, "max_iters": 39_000,  # max_iters: every other split
            "lr": 0.0025, "weight_decay": 4e-4, "crop_size": 512},
    "cityscapes": {"epochs": {"1/16": 128, "1/8": 137, "1/4": 160, "1/2": 240}, "max_iters": 44_500,
                   "lr": 0.0025, "weight_decay": 8e-4, "crop_size": 800, "ohem": (0.7, 50_000)},
    "folder": {"epochs": 60, "lr": 0.0025, "weight_decay": 4e-4, "crop_size": 512},
}
# fmt: on
EVERYWHERE = {"batch_size": 8, "head_lr_mult": 1.0, "decay_norm": False, "scale": "0.5,0.75,1,1.5,1.75,2", "ohem": None}
PRESETS = {name: {**EVERYWHERE, **preset} for name, preset in PRESETS.items()}
MEASURES, EVALUATIONS = (), ()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run."""
    return cli.finish(cli.parser(__doc__, PRESETS), PRESETS, "supervised", argv)


def build_networks(args: argparse.Namespace, data: DataSource, rt: Runtime) -> dict[str, nn.Module]:
    """The networks of a run by name; the first is the result."""
    network = DeepLabV3Plus(args.backbone, data.num_classes, args.weights, args.output_stride, args.dropout)
    return {"model": rt.place(network)}


def load_batches(args: argparse.Namespace, data: DataSource, rt: Runtime, start: int, stop: int) -> Iterator[tuple[dict, ...]]:
    """The batches of iterations `start` to `stop`, labelled first."""
    return zip(train_loader(data, data.labelled, 0, args, rt, start, stop))


def train_step(
    networks: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    batches: list[dict],
    iteration: int,
    args: argparse.Namespace,
    data: DataSource,
    rt: Runtime,
) -> dict[str, Tensor]:
    """One iteration; returns what to log, scalars on the device."""
    # 1. Labelled pictures, normalised on the device.
    (batch_l,) = batches
    images_l, target_l = normalise(batch_l["image"], batch_l["valid_mask"]), batch_l["target"]  # (N,3,H,W), (N,H,W)

    # 2. Logits at stride 4.
    with rt.autocast():
        logits_l = networks["model"](images_l)  # (N,C,H/4,W/4)

    # 3. L_s.
    loss = labelled_loss(logits_l, target_l, args.ohem, rt, args.kernels)

    # 4. Gradient and step.
    rt.step(loss, optimizer)
    return {"loss": loss}


def score(
    networks: dict[str, nn.Module],
    args: argparse.Namespace,
    data: DataSource,
    rt: Runtime,
    final: bool,
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Evaluate: results by network, the method's result first, and further measures."""
    return validate({"network": networks["model"]}, data, args, rt)


def main(args: argparse.Namespace) -> None:
    """Data -> networks -> optimiser -> resume -> loop -> evaluate -> save. These lines are the same in every script."""
    rt = runtime.start(args)
    data = load_data(args, rt)
    schedule = cli.Schedule(args, len(data.unlabelled) or len(data.labelled), rt.world)
    report = Report(args, data, rt, schedule, MEASURES, EVALUATIONS)

    networks = build_networks(args, data, rt)
    trained = [network for network in networks.values() if any(parameter.requires_grad for parameter in network.parameters())]
    groups = [
        group
        for network in trained
        for group in parameter_groups(network, args.lr, args.head_lr_mult, args.weight_decay, args.decay_norm)
    ]
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    callables = {name: rt.wrap(network) if network in trained else network for name, network in networks.items()}

    states = {"optimizer": optimizer, "scheduler": scheduler, "scaler": rt.scaler, "report": report}
    last = Path(args.output_dir) / "last.pt"
    start = checkpoint.resume(last if args.resume else None, args, networks, states, rt)
    report.begin(start, networks)
    if args.eval_only:
        results, _ = score(networks, args, data, rt, final=True)
        report.finish(results, next(iter(networks.values())))
        return

    batches = iter(load_batches(args, data, rt, start, schedule.total))
    for done in range(start, schedule.total + 1):  # `done` iterations lie behind
        stopping = rt.stopping()
        if done > start and (stopping or schedule.saves(done)):
            checkpoint.save(last, done, args, networks, states, rt)
        if stopping:
            raise runtime.Stopped(rt.signal)
        if schedule.evaluates(done):  # after saving: a run that dies here evaluates again when it is resumed
            results, measured = score(networks, args, data, rt, final=done == schedule.total)
            report.evaluation(done, next(iter(results.values())), networks, measured)
        if done == schedule.total:
            break
        with checkpoint.saved_first(last, done, args, networks, states, rt):
            batch = [rt.to_device(part) for part in next(batches)]
        measured = train_step(callables, optimizer, batch, done, args, data, rt)
        rt.check_finite(measured["loss"], done + 1, [name for part in batch for name in part["name"]])
        report.iteration(done + 1, measured, scheduler.get_last_lr()[0])
        scheduler.step()
    report.finish(results, next(iter(networks.values())))


if __name__ == "__main__":
    runtime.launch(main, parse_args())
