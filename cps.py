"""CPS: Cross Pseudo Supervision, with CutMix by default.

Chen, Yuan, Zeng, Wang; CVPR 2021, arXiv:2106.01226. Two networks, alike but for their
initialisation, teach each other: the hard labels of one are the targets of the other.

1. Take labelled images x_l and two independent unlabelled batches u0, u1.
2. Supervise both networks (cityscapes: on the hard pixels, OHEM):                       [section 3]
       L_s = CE(f1(x_l), y) + CE(f2(x_l), y)
3. Draw a mask m for each image: three boxes, XOR-ed. The area of a box is a third of a number
   between a quarter and half of the image's.
4. Each network labels the unmixed images, without gradient; labels are mixed like images:
       x_m = m·u1 + (1-m)·u0,   ŷ_k = m·argmax f_k(u1) + (1-m)·argmax f_k(u0)
5. Cross supervision:                                                                    [section 3]
       L_cps = CE(f1(x_m), ŷ2) + CE(f2(x_m), ŷ1)
       --no-cutmix: on the labelled and the unlabelled images, with labels from the same pass
       --soft (CPC): mean over pixels of |p1 - p2|², each network in turn the fixed target
6. L = L_s + λ·L_cps                                                                     [section 3]
7. SGD step for both. Network 1 is the result; network 2 and the mean of their probabilities are
   reported beside it.

| symbol | variable           | symbol | variable   | symbol | variable           |
|--------|--------------------|--------|------------|--------|--------------------|
| x_l, y | images_l, target_l | u0, u1 | images_u   | m      | mask               |
| f1, f2 | f1, f2             | x_m    | images_m   | ŷ1, ŷ2 | pseudo_1, pseudo_2 |
| L_s    | loss_sup           | L_cps  | loss_unsup | λ      | args.cps_weight    |

`overlap` (Fig. 7) is the share of pixels on which the networks agree, among those where either
sees an object.

Differences from the paper and the released code:
1. u0 and u1 are independent shuffles. The release shuffles both with one seed, the same in every
   epoch: u0 and u1 are two random views of the same images.
2. Padding counts nowhere and lies at the right and the bottom. In the release it lies on all sides,
   and padded pixels count in L_cps.
3. Without CutMix, L_cps is one mean over labelled and unlabelled pixels, as released; the paper
   adds two means. The release has no CPC; --soft follows the paper.
4. One process does what 4 (voc) or 8 (cityscapes) do in the release, which divides the gradient by
   their number once more than an average does. PRESETS rescale learning rate and weight decay
   accordingly. The updates are then the same where all processes have equally many valid pixels:
   the release averages the means of its processes, while here every pixel weighs the same.
5. OHEM compares the pixels of all images of a process. The release does so, too, but has one image
   on each of its 8 processes: every image keeps its own hardest pixels.
6. Images of VOC are evaluated whole; the release pads them to 512 pixels. On Cityscapes the
   probabilities of overlapping windows are added up; the release adds logits. It evaluates the
   checkpoints of many epochs (20 to 34 on VOC); here the last one is the result.
7. The network is this project's DeepLabv3+: 7x7 stem, ReLU, dropout 0.5 after ASPP. The release has
   three 3x3 convolutions as its stem, dilations 2, 4, 8 in the last stage, LeakyReLU in ASPP, no
   dropout, and starts its head with Kaiming's fan-in rule.
8. With CutMix, BatchNorm's running statistics see the labelled batch first and the mixed one last.
   In the release the labelled batch is the last.
9. Images are antialiased when they are scaled down; the release's are not.
10. The presets train a ResNet-50, as the released scripts do. The paper's tables list ResNet-101
    beside it, with higher figures: --backbone resnet101.

    python cps.py                                            # built-in data, a CPU, about 3 minutes
    python cps.py --data voc --data-dir VOCdevkit --split 1/8 --amp bf16
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from common import checkpoint, cli, runtime
from common.augment import IGNORE, normalise
from common.cutmix import mix, xor_box_masks
from common.data import load_data, train_loader
from common.datasets import DataSource
from common.deeplabv3plus import DeepLabV3Plus, full_softmax, parameter_groups
from common.evaluate import Scores, validate
from common.losses import labelled_loss, mean_cross_entropy
from common.report import Report
from common.runtime import Runtime
from kernels import pseudo_label

# voc, cityscapes: the released configurations. Epochs pass over the unlabelled pictures: about 39 000 and 44 500 iterations.
# The release divides the gradient by the number of processes twice, so its lr 0.0025 x 4 GPUs with decay 1e-4 (voc) and 0.02
# on 8 GPUs with 1e-4 (cityscapes) are lr 0.0025 with 4e-4 and 8e-4 in one process. shapes, camvid, folder: our own choice.
# cps_weight: λ.
# fmt: off
WEIGHT = {"cutmix": 1.0, "plain": 1.5}
PRESETS = {
    "shapes": {"max_iters": 1400, "lr": 0.1, "weight_decay": 1e-4, "crop_size": 64, "cps_weight": WEIGHT},
    "camvid": {"epochs": 300, "lr": 0.01, "weight_decay": 4e-4, "crop_size": 320, "cps_weight": WEIGHT},
    "voc": {"epochs": {"1/16": 32, "1/8": 34, "1/4": 40, "1/2": 60}, "max_iters": 39_000,  # max_iters: every other split
            "lr": 0.0025, "weight_decay": 4e-4, "crop_size": 512, "cps_weight": WEIGHT},
    "cityscapes": {"epochs": {"1/16": 128, "1/8": 137, "1/4": 160, "1/2": 240}, "max_iters": 44_500,
                   "lr": 0.0025, "weight_decay": 8e-4, "crop_size": 800,
                   "cps_weight": {"cutmix": 5.0, "plain": 6.0}, "ohem": (0.7, 50_000)},
    "folder": {"epochs": 60, "lr": 0.0025, "weight_decay": 4e-4, "crop_size": 512, "cps_weight": WEIGHT},
}
# fmt: on
EVERYWHERE = {"batch_size": 8, "head_lr_mult": 1.0, "decay_norm": False, "scale": "0.5,0.75,1,1.5,1.75,2", "ohem": None}
PRESETS = {name: {**EVERYWHERE, **preset} for name, preset in PRESETS.items()}
MEASURES, EVALUATIONS = ("loss_sup", "loss_unsup", "overlap"), ("pseudo_accuracy",)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run: the shared flags and those of CPS."""
    parser = cli.parser(__doc__, PRESETS)
    group = parser.add_argument_group("CPS")
    group.add_argument(
        "--no-cutmix",
        dest="cutmix",
        action="store_false",
        help="cross supervision without CutMix, on labelled pictures too",
    )
    group.add_argument("--soft", action="store_true", help="CPC: squared distance of probabilities instead of hard labels")
    group.add_argument(
        "--cps-weight", type=float, metavar="λ", help="of L_cps (default: 1, cityscapes 5; without CutMix 1.5 and 6)"
    )
    given, _ = parser.parse_known_args(argv)
    method = "cps" + ("" if given.cutmix else "-nocutmix") + ("-soft" if given.soft else "")
    args = cli.finish(parser, PRESETS, method, argv)
    if isinstance(args.cps_weight, dict):
        args.cps_weight = args.cps_weight["cutmix" if args.cutmix else "plain"]
    if not args.cps_weight >= 0:
        parser.error("--cps-weight is not negative")
    return args


def build_networks(args: argparse.Namespace, data: DataSource, rt: Runtime) -> dict[str, nn.Module]:
    """Two networks, initialised one after the other and so differently; network 1 is the result."""
    first, second = (
        DeepLabV3Plus(args.backbone, data.num_classes, args.weights, args.output_stride, args.dropout) for _ in range(2)
    )
    return {"model_1": rt.place(first), "model_2": rt.place(second)}


def load_batches(args: argparse.Namespace, data: DataSource, rt: Runtime, start: int, stop: int) -> Iterator[tuple[dict, ...]]:
    """The batches of iterations `start` to `stop`: labelled, unlabelled and, for CutMix, an independent second one."""
    unlabelled = [
        train_loader(data, data.unlabelled, stream, args, rt, start, stop) for stream in ((1, 2) if args.cutmix else (1,))
    ]
    return zip(train_loader(data, data.labelled, 0, args, rt, start, stop), *unlabelled)


# ---------------------------------------------------------------------------------------------------------- the method


@torch.no_grad()
def targets_from(logits: Tensor, size: tuple[int, int], soft: bool, impl: str = "auto") -> Tensor:
    """What one network teaches the other: labels (N,H,W) uint8, or with `soft` probabilities (N,C,H,W) float32.

    Args:
        logits: (N,C,h,w); no gradient flows back into them.
        size: (H,W) of the pictures.
        soft: probabilities instead of hard labels (CPC).
        impl: passed to the kernel.
    """
    if soft:
        return full_softmax(logits, size)
    return pseudo_label(logits, size, impl=impl).label


def cross_supervision(logits: Tensor, targets: Tensor, valid_mask: Tensor, rt: Runtime, impl: str = "auto") -> Tensor:
    """One direction of L_cps: the mean over valid pixels of CE(p, ŷ), or of |p - p'|² where the targets are probabilities.

    Args:
        logits: (N,C,h,w) of the network that learns.
        targets: of the other network, see `targets_from`.
        valid_mask: (N,H,W) bool, False on padding.
        rt: the process.
        impl: passed to the kernel.

    Returns:
        A scalar. Source: section 3, arXiv:2106.01226.
    """
    if targets.ndim == 3:
        return mean_cross_entropy(logits, targets.masked_fill(~valid_mask, IGNORE), rt, impl)
    distance = (full_softmax(logits, targets.shape[2:]) - targets).square().sum(1)  # (N,H,W)
    return rt.mean((distance * valid_mask).sum(), valid_mask.sum())


def overlap(targets_1: Tensor, targets_2: Tensor, valid_mask: Tensor, background: int | None) -> Tensor:
    """Share of equal labels over the valid pixels where either network predicts an object, a scalar in [0,1] (Fig. 7).

    Args:
        targets_1, targets_2: labels (N,H,W) or probabilities (N,C,H,W).
        valid_mask: (N,H,W) bool.
        background: the class that is no object; None counts every class.
    """
    label_1, label_2 = (targets if targets.ndim == 3 else targets.argmax(1) for targets in (targets_1, targets_2))
    counted = valid_mask if background is None else valid_mask & ((label_1 != background) | (label_2 != background))
    return ((label_1 == label_2) & counted).sum() / counted.sum().clamp_min(1)


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
    f1, f2 = networks["model_1"], networks["model_2"]
    # 1. Labelled and unlabelled pictures, normalised on the device.
    batch_l, *batches_u = batches
    images_l, target_l = normalise(batch_l["image"], batch_l["valid_mask"]), batch_l["target"]  # (N,3,H,W), (N,H,W)
    images_u = [normalise(batch["image"], batch["valid_mask"]) for batch in batches_u]  # one or two of (N,3,H,W)
    size = target_l.shape[1:]

    with rt.autocast():
        # 2. Logits of the labelled pictures, at stride 4: (N,C,H/4,W/4).
        logits_l1, logits_l2 = f1(images_l), f2(images_l)

        if args.cutmix:
            # 3. One mask a picture, (N,H,W) bool.
            mask = xor_box_masks(len(target_l), size[0], rt, args.seed, iteration)
            images_m = mix(mask, images_u[1], images_u[0])
            valid_mask = mix(mask, batches_u[1]["valid_mask"], batches_u[0]["valid_mask"])
            # 4. Targets from the unmixed pictures. Each forward pass has its own batch statistics, as in the release.
            with torch.no_grad():
                targets = [[targets_from(f(images), size, args.soft, args.kernels) for images in images_u] for f in (f1, f2)]
            pseudo_1, pseudo_2 = (mix(mask, inside, outside) for outside, inside in targets)
            logits_1, logits_2 = f1(images_m), f2(images_m)
        else:
            # 3., 4. Without CutMix: labelled and unlabelled pictures, each network's labels from this very forward pass.
            logits_1, logits_2 = torch.cat([logits_l1, f1(images_u[0])]), torch.cat([logits_l2, f2(images_u[0])])
            valid_mask = torch.cat([batch_l["valid_mask"], batches_u[0]["valid_mask"]])
            pseudo_1, pseudo_2 = (targets_from(logits, size, args.soft, args.kernels) for logits in (logits_1, logits_2))

    # 5., 6. Losses.
    loss_sup = sum(labelled_loss(logits, target_l, args.ohem, rt, args.kernels) for logits in (logits_l1, logits_l2))
    towards_2 = cross_supervision(logits_1, pseudo_2, valid_mask, rt, args.kernels)
    towards_1 = cross_supervision(logits_2, pseudo_1, valid_mask, rt, args.kernels)
    loss_unsup = towards_2 + towards_1
    loss = loss_sup + args.cps_weight * loss_unsup

    # 7. Gradient and step.
    rt.step(loss, optimizer)
    return {
        "loss": loss,
        "loss_sup": loss_sup,
        "loss_unsup": loss_unsup,
        "overlap": overlap(pseudo_1, pseudo_2, valid_mask, data.background),
    }


def score(
    networks: dict[str, nn.Module],
    args: argparse.Namespace,
    data: DataSource,
    rt: Runtime,
    final: bool,
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Evaluate: network 1 first, at the end also network 2 and their average; the accuracy of network 1's pseudo-labels."""
    shown = {"network 1": networks["model_1"], **({"network 2": networks["model_2"]} if final else {})}
    return validate(shown, data, args, rt, average=final, audit=True)


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
