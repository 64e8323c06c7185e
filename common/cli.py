"""Flags that all method scripts share, their defaults, and their validation.

A flag that is not given takes the value of the method's preset for the data set. Each script lists
its presets in full (`PRESETS`): data set -> setting -> value. With `--resume`, flags that are not
given come from the run's `args.json`. Three entries of a preset have forms of their own:

    epochs or max_iters             the length; epochs may be a dict by split, and max_iters is then
                                    the length for every other split
    eval_interval or eval_iters     epochs or iterations between evaluations
    eval_window                     pixels, 0 for whole images, or "crop": as large as the crop
"""

import argparse
import math
import os
import shutil
import sys
import textwrap
from pathlib import Path

import torch

from common import InputError, checkpoint, note
from common.augment import scale_rule
from common.datasets import DATASETS
from common.deeplabv3plus import BACKBONES
from common.own_preset import own_preset
from kernels.interpolation import use_triton

# Settings that may differ when a run is resumed; all others decide its result.
FREE_ON_RESUME = {
    "resume", "output_dir", "device", "workers", "debug", "eval_only", "log_interval",
    "save_interval", "kernels", "data_dir", "download",
}  # fmt: skip


def listed(defaults: dict[str, dict]) -> str:
    """Settings by data set, for the help; None is left out."""
    lines = []
    for data, values in defaults.items():
        text = ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
        text = f"{data}: {text}"
        lines.append(
            textwrap.fill(
                text, 100, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
            )
        )
    return "\n".join(lines)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def not_negative(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def fraction(text: str) -> float:
    """A share above 0 and below 1, such as 1/5 or 0.2, for argparse."""
    part, _, whole = text.partition("/")
    try:
        value = float(part) / float(whole or 1)
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below 1")
    return value


def parser(doc: str, presets: dict[str, dict]) -> argparse.ArgumentParser:
    """The shared flags; a script adds its own and calls `finish`.

    Args:
        doc: the script's docstring. Its first paragraph and its last, the commands, frame the help;
            the algorithm between them is for the source.
        presets: see the top of this file.
    """
    description, *_, commands = doc.strip("\n").split("\n\n")
    splits = {data: {"split": DATASETS[data].split} for data in presets}
    defaults = {data: {**splits[data], **preset} for data, preset in presets.items()}
    top = argparse.ArgumentParser(
        description=description,
        epilog=f"defaults of the data sets:\n{listed(defaults)}\n"
        "  (folder on a CPU, or with --backbone tiny: those of shapes)\n\n"
        f"examples:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    add_data_flags(top, presets)
    add_network_flags(top)
    add_schedule_flags(top)
    add_run_flags(top)
    add_machine_flags(top)
    return top


def add_data_flags(top: argparse.ArgumentParser, presets: dict[str, dict]) -> None:
    """What to train on, and how it is split."""
    group = top.add_argument_group("data")
    group.add_argument(
        "--data",
        choices=presets,
        default="shapes",
        help="data set (default: shapes, the built-in one; shapes-zipf has rare classes)",
    )
    group.add_argument("--data-dir", metavar="DIR", help="its folder (default: data/NAME)")
    group.add_argument(
        "--download",
        action="store_true",
        help="fetch voc (with SBD) or camvid into --data-dir first",
    )
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--split",
        help="labelled share: 1/8, a published list (183, u2pl-1/8), all, or a .txt "
        "(default: 1/8; folder: all)",
    )
    either.add_argument(
        "--labelled-list",
        "--labeled-list",
        metavar="TXT",
        help="your own list of labelled image ids, a line each",
    )
    group.add_argument(
        "--val-fraction",
        type=fraction,
        default=0.2,
        metavar="X",
        help="folder without images/val: share of the images with masks that is held out for "
        "validation, drawn by --seed (default: 1/5)",
    )
    group.add_argument(
        "--long-side",
        type=positive,
        metavar="PX",
        help="shrink images whose long side is longer, in training, evaluation and prediction "
        "(default: never; folder: by the device)",
    )
    group.add_argument(
        "--extra",
        choices=["coarse"],
        help="cityscapes: add unlabelled images of leftImg8bit/train_extra",
    )
    group.add_argument(
        "--extra-count", type=positive, default=3000, metavar="N", help="how many (default: 3000)"
    )
    group.add_argument(
        "--measure-pseudo-labels",
        action="store_true",
        help="open masks of unlabelled images, to measure pseudo-labels only (shapes: always)",
    )


def add_network_flags(top: argparse.ArgumentParser) -> None:
    """The network."""
    group = top.add_argument_group("network")
    group.add_argument("--backbone", choices=BACKBONES, help="default: resnet50; shapes: tiny")
    group.add_argument(
        "--weights",
        metavar="imagenet|blots|none|PATH",
        help="of the backbone (default: imagenet; shapes: blots, those of tiny)",
    )
    group.add_argument(
        "--output-stride",
        type=int,
        choices=[8, 16, 32],
        help="of the deepest features (default: the preset's)",
    )
    group.add_argument(
        "--dropout", type=float, help="Dropout2d after ASPP (default: the preset's)"
    )


def add_schedule_flags(top: argparse.ArgumentParser) -> None:
    """Length, batch, and optimisation."""
    group = top.add_argument_group("schedule (defaults: the method's preset for the data set)")
    group.add_argument(
        "--epochs",
        type=positive,
        help="passes over the unlabelled images (stpp.py: over each stage's)",
    )
    group.add_argument(
        "--max-iters",
        type=positive,
        metavar="N",
        help="iterations of each training (stpp.py: of the first, see --retrain-times); "
        "wins over --epochs",
    )
    group.add_argument(
        "-b",
        "--batch-size",
        type=positive,
        metavar="N",
        help="labelled images per process; each batch of unlabelled ones is as large "
        "(stpp.py: all images of a batch)",
    )
    group.add_argument(
        "--lr", type=float, help="learning rate of the backbone, for the global batch"
    )
    group.add_argument("--head-lr-mult", type=float, metavar="X", help="the head's multiple of it")
    group.add_argument("--weight-decay", type=float, metavar="X", help="L2 coefficient")
    group.add_argument("--crop-size", type=positive, metavar="PX", help="side of the training crop")
    group.add_argument(
        "--scale",
        metavar="RULE",
        help="random scale: factors (0.5,1,2), uniform:0.5-2, halves:0.5-2 (below or above 1 "
        "with equal chance), long:200-800 (pixels), or half-or-double",
    )


def add_run_flags(top: argparse.ArgumentParser) -> None:
    """Where a run is kept, and what it tells."""
    group = top.add_argument_group("run")
    group.add_argument(
        "--output-dir", metavar="DIR", help="run folder (default: runs/METHOD-DATA-SPLIT-seedN)"
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with a run (default: the run these flags name)",
    )
    group.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate the run's last checkpoint and write its figures",
    )
    group.add_argument(
        "--eval-interval", type=positive, metavar="EPOCHS", help="epochs between evaluations"
    )
    group.add_argument(
        "--eval-iters",
        type=positive,
        metavar="N",
        help="iterations between evaluations; wins over --eval-interval",
    )
    group.add_argument(
        "--eval-window",
        type=int,
        metavar="PX",
        help="sliding-window evaluation with stride 2/3; 0: whole images",
    )
    group.add_argument(
        "--log-interval",
        type=positive,
        default=50,
        metavar="N",
        help="iterations between log lines (default: 50)",
    )
    group.add_argument(
        "--save-interval",
        type=positive,
        default=500,
        metavar="N",
        help="iterations between checkpoints (default: 500)",
    )


def add_machine_flags(top: argparse.ArgumentParser) -> None:
    """What it is computed with."""
    group = top.add_argument_group("machine")
    group.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    group.add_argument(
        "--amp",
        choices=["off", "bf16", "fp16"],
        default="off",
        help="mixed precision (default: off)",
    )
    group.add_argument(
        "--compile", action="store_true", help="torch.compile the networks that are trained"
    )
    group.add_argument(
        "--kernels",
        choices=["auto", "triton", "torch"],
        default="auto",
        help="of the fused operations; auto is triton on CUDA, else torch (default: auto)",
    )
    group.add_argument(
        "-j",
        "--workers",
        type=int,
        metavar="N",
        help="processes of each loader (default: 4 or the cores; shapes: 0)",
    )
    group.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    group.add_argument(
        "--deterministic", action="store_true", help="deterministic CUDA operations, slower"
    )
    group.add_argument(
        "--debug", action="store_true", help="print a traceback when something goes wrong"
    )


def finish(
    top: argparse.ArgumentParser,
    presets: dict[str, dict],
    method: str,
    argv: list[str] | None = None,
) -> argparse.Namespace:
    """Parse the flags, fill in presets, and find the run folder.

    A resumed run's settings come from its `args.json`.

    Args:
        top: `parser(...)` with the method's own flags.
        presets: see the top of this file.
        method: the method's name, kept in `args.method` and part of the default run folder.
        argv: the command line, None for this process's.

    Returns:
        The settings, all plain values; `method`, `output_dir` and `resume` (True or False) are set.
    """
    args = top.parse_args(argv)
    run = Path(args.resume) if args.resume else default_run(args, method)
    restarted = (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and (run / "args.json").is_file()
    )
    if args.resume is not None or restarted:
        args = resumed_args(top, run, method, argv)
    else:
        if args.eval_only:
            top.error("--eval-only needs --resume RUN, the run to evaluate")
        args.output_dir, args.resume, args.method = str(run), False, method
    try:
        fill(args, presets)
    except InputError as error:
        top.error(str(error))
    check(args, top)
    return args


def resumed_args(
    top: argparse.ArgumentParser, run: Path, method: str, argv: list[str] | None
) -> argparse.Namespace:
    """The settings of the run in folder `run`, with the flags of `argv` that may change."""
    if run.suffix == ".pt":
        top.error(
            f"--resume {run}: give the run's folder, {run.parent}; "
            "it goes on from the last.pt there"
        )
    try:
        saved = checkpoint.read_description(run)["args"]
    except InputError as error:
        top.error(f"--resume: {error}")
    if saved["method"].split("-")[0] != method.split("-")[0]:
        top.error(f"{run} is a run of {saved['method']}; use its script")
    kept = {
        key: value
        for key, value in saved.items()
        if key not in ("resume", "eval_only", "debug", "output_dir")
    }
    top.set_defaults(**kept)
    args = top.parse_args(argv)
    if args.output_dir and Path(args.output_dir) != run:
        top.error(f"--resume {run} goes on in that folder; leave --output-dir out")
    clash = [
        f"{key}={value}"
        for key, value in kept.items()
        if key not in FREE_ON_RESUME and getattr(args, key) != value
    ]
    if clash:
        top.error(f"{run} was started with {', '.join(clash)}; resume without changing that")
    args.output_dir, args.resume = str(run), True
    return args


def default_run(args: argparse.Namespace, method: str) -> Path:
    """`--output-dir`, or runs/METHOD-DATA-SPLIT-seedN."""
    split = args.labelled_list or args.split or DATASETS[args.data].split
    split = Path(split).stem if split.endswith(".txt") else split.replace("/", "-")
    return Path(args.output_dir or f"runs/{method}-{args.data}-{split}-seed{args.seed}")


def fill(args: argparse.Namespace, presets: dict[str, dict]) -> None:
    """Give every flag that is still None its preset."""
    preset = dict(presets[args.data])
    if args.data == "folder" and not args.resume:
        preset, args.reasons = own_preset(args, presets)
    args.split = args.labelled_list or args.split or DATASETS[args.data].split
    fill_schedule(args, preset)
    fill_weights(args, preset)
    for key, value in preset.items():
        # A resumed run's settings are all there, and None may be one of them.
        if getattr(args, key, None) is None and not (args.resume and hasattr(args, key)):
            setattr(args, key, value)
    if args.eval_window == "crop":
        args.eval_window = args.crop_size
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.workers is None:
        args.workers = DATASETS[args.data].workers
    if args.workers is None:
        fill_workers(args)


def fill_weights(args: argparse.Namespace, preset: dict) -> None:
    """The pretrained weights of another backbone than the preset's, where one was asked for."""
    backbone = args.backbone or preset["backbone"]
    if args.weights is None and preset["weights"] != "none":
        args.weights = pretrained_weights(backbone)


def pretrained_weights(backbone: str) -> str:
    """The name of a backbone's pretrained weights."""
    return "blots" if backbone == "tiny" else "imagenet"


def fill_schedule(args: argparse.Namespace, preset: dict) -> None:
    """Length, batch and evaluations, which are removed from `preset`."""
    epochs, max_iters = preset.pop("epochs", None), preset.pop("max_iters", None)
    if args.epochs is None and args.max_iters is None:
        args.epochs = epochs.get(args.split) if isinstance(epochs, dict) else epochs
        args.max_iters = None if args.epochs else max_iters

    batch_size = preset.pop("batch_size")  # of all processes
    if args.batch_size is None:
        world = int(os.environ.get("WORLD_SIZE", 1))
        args.batch_size = max(2, batch_size // world)
        if args.batch_size * world != batch_size:
            note(
                f"{world} processes with {args.batch_size} images each, "
                f"not {batch_size} in all as the preset has"
            )

    interval, iters = preset.pop("eval_interval", None), preset.pop("eval_iters", None)
    if args.eval_interval is None and args.eval_iters is None:
        args.eval_interval, args.eval_iters = interval, iters


def fill_workers(args: argparse.Namespace) -> None:
    """As many loader workers as cores, up to 4; none where there is too little shared memory."""
    args.workers = min(4, os.cpu_count() or 1)
    if shared_memory() < worker_memory(args):
        note(
            f"/dev/shm has {shared_memory() / 1e6:.0f} MB: loading without worker processes, "
            f"slowly; a container needs --shm-size {shm_size(args)} or more"
        )
        args.workers = 0


def shared_memory() -> float:
    """Bytes free in /dev/shm, through which loader workers hand over batches.

    With too few PyTorch waits forever. Infinite where the system has other means.
    """
    if sys.platform != "linux":
        return math.inf
    return shutil.disk_usage("/dev/shm").free if os.access("/dev/shm", os.W_OK) else 0


def worker_memory(args: argparse.Namespace) -> float:
    """Bytes that the batches in flight may take.

    These are 4 a worker of each of 3 loaders, with 5 bytes a pixel (RGB, label, valid_mask) and 3
    for each strong view (`args.views`, where a method has some). Whole images may be larger than
    crops: 512 pixels a side at least.
    """
    workers = args.workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    pixels = args.batch_size * max(args.crop_size, 512) ** 2
    return 3 * 4 * workers * pixels * (5 + 3 * getattr(args, "views", 0))


def shm_size(args: argparse.Namespace) -> str:
    """What to give a container as --shm-size: whole gigabytes that hold the workers' batches."""
    return f"{max(2, math.ceil(worker_memory(args) / 1e9))}g"


def check(args: argparse.Namespace, top: argparse.ArgumentParser) -> None:
    """Refuse values that cannot work; argparse prints one line and exits with 2."""
    check_data(args, top)
    check_training(args, top)
    check_machine(args, top)


def check_data(args: argparse.Namespace, top: argparse.ArgumentParser) -> None:
    """Refuse flags that do not go with the data set."""
    if args.extra and not DATASETS[args.data].extra:
        top.error("--extra coarse goes with --data cityscapes")
    if args.download and not DATASETS[args.data].download:
        top.error(f"--download fetches voc and camvid, not {args.data}")
    if args.download and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        top.error(
            "--download: run it once without torchrun first; "
            "the other processes would not wait that long"
        )


def check_training(args: argparse.Namespace, top: argparse.ArgumentParser) -> None:
    """Refuse values of network, schedule and optimisation."""
    try:
        scale_rule(args.scale)
    except InputError as error:
        top.error(str(error))
    pretrained = pretrained_weights(args.backbone)
    if args.weights not in (pretrained, "none") and not Path(args.weights).is_file():
        top.error(
            f"--weights {args.weights}: no such file; "
            f"{args.backbone} takes {pretrained}, none or a path"
        )
    if args.crop_size < 32:
        top.error(f"--crop-size {args.crop_size}: at least 32 pixels")
    rates = 0 < args.lr < math.inf and 0 < args.head_lr_mult < math.inf
    if not (rates and 0 <= args.weight_decay < math.inf):
        top.error("--lr and --head-lr-mult must be above 0, --weight-decay at least 0")
    if not 0 <= args.dropout < 1:
        top.error(f"--dropout {args.dropout}: from 0 to below 1")
    if not 0 <= args.seed < 2**32 or args.workers < 0 or args.eval_window < 0:
        top.error("--seed (below 2^32), --workers and --eval-window must not be negative")


def check_machine(args: argparse.Namespace, top: argparse.ArgumentParser) -> None:
    """Refuse more loader workers than memory, and devices that are none."""
    if shared_memory() < worker_memory(args):
        top.error(
            f"-j {args.workers}: the workers need {worker_memory(args) / 1e6:.0f} MB of /dev/shm, "
            f"which has {shared_memory() / 1e6:.0f}; "
            f"use -j 0, or start the container with --shm-size {shm_size(args)} or more"
        )
    try:
        device = torch.device(args.device)
    except RuntimeError:
        top.error(f"--device {args.device}: cpu, cuda or cuda:N")
    try:
        use_triton(args.kernels, device)
    except ValueError as error:
        top.error(f"--kernels {args.kernels}: {error}")
