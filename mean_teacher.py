"""Mean Teacher and, with --cutmix, CutMix-Seg.

Mean Teacher: Tarvainen & Valpola, NeurIPS 2017, arXiv:1703.01780. CutMix-Seg: French et al.,
BMVC 2020, arXiv:1906.01916. The teacher is the exponential moving average of the student. It is
never trained; the student learns to predict what the teacher predicts from another view of the
same image.

1. Take labelled images x_l and unlabelled ones x_u; with CutMix two independent unlabelled batches
   u0, u1.
2. Supervise the student (Mean Teacher: on x_l + η; cityscapes: on the hard pixels, OHEM):
       L_s = CE(f(x_l), y)
3. Mean Teacher: student and teacher see the same crops, labelled and unlabelled alike, with
   different Gaussian noise η, η':
       L_u = mean over pixels and classes of (p(x + η) - p'(x + η'))²                    [section 2]
   CutMix-Seg: the teacher sees u0 and u1 whole, and its probabilities are mixed by one box m of
   half the image's area:
       x_m = m·u1 + (1-m)·u0,   p'_m = m·p'(u1) + (1-m)·p'(u0)
       L_u = (share of pixels with max p'_m >= 0.97)
             · mean over pixels of sum_c (p(x_m) - p'_m)²                                [section 3]
4. L = L_s + w·L_u;  SGD step for the student.
5. teacher <- α·teacher + (1-α)·student,   α = min(1 - 1/(t+1), 0.99) at iteration t = 0, 1, ...
The teacher is the result; the student is reported beside it.

| symbol | variable           | symbol | variable            | symbol | variable          |
|--------|--------------------|--------|---------------------|--------|-------------------|
| x_l, y | images_l, target_l | x_m    | images_m            | L_s    | loss_sup          |
| u0, u1 | images_u           | m      | mask                | L_u    | loss_unsup        |
| f, p   | student, probs     | p'     | targets (teacher's) | w      | args.unsup_weight |

`confident` is the share of pixels on which the teacher's highest probability reaches the threshold.

Differences from the papers and the released code:
1. Mean Teacher was published for image classification. The setting here is the one that the authors
   of CPS released for VOC: w = 100 from the start, the same crops for both networks, labelled and
   unlabelled images in forward passes of their own. They add no noise (--noise-std 0), keep
   α = 0.99 from the start, average between the labelled and the unlabelled forward pass, before
   the optimiser's step, and evaluate the student. On Cityscapes w and OHEM are our choice.
2. In Mean Teacher the teacher runs in train mode and its BatchNorm keeps statistics of its own, as
   theirs does. Dropout is active with it; their network has none.
3. In CutMix-Seg the teacher's BatchNorm statistics are averages of the student's, like its weights,
   and it runs in eval mode. The release averages them, too, but freezes BatchNorm: all of it in
   DeepLab v2, the backbone's in DeepLab v3+. The rest of its teacher runs in train mode.
4. CutMix-Seg is released with Adam, a constant learning rate (a tenth of it for pretrained layers),
   α = 0.99 from the start and, on VOC, batches of 10 crops of 321 pixels. Here it is trained as
   the other methods are, by SGD with the poly learning rate and the crops of cps.py, with α as in
   step 5.
5. --colour-jitter changes what the student sees, and the teacher never. It belongs to the follow-up
   paper, arXiv:2110.04487, whose settings the released scripts have; it is off by default.
6. Padding counts nowhere. In the released Mean Teacher it counts in L_u. In the released CutMix-Seg
   it adds nothing to the distance, but counts in the number of pixels that both means divide by.
7. The network is this project's DeepLabv3+, and images are antialiased when they are scaled down,
   which they are in neither release.

    python mean_teacher.py                                   # built-in data, a CPU, about 2 minutes
    python mean_teacher.py --cutmix --data voc --data-dir VOCdevkit --split 1/8 --amp bf16
"""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from common import checkpoint, cli, runtime
from common.augment import colour_jitter, normalise
from common.cutmix import half_area_masks, mix
from common.data import load_data, train_loader
from common.datasets import DataSource, Item
from common.deeplabv3plus import DeepLabV3Plus, full_softmax, parameter_groups
from common.evaluate import Scores, validate
from common.losses import labelled_loss
from common.report import Report
from common.runtime import Runtime

# The schedules are those of cps.py, whose authors compare with Mean Teacher; sources there. unsup_weight: w of Mean Teacher
# (100 is theirs) and of CutMix-Seg (1 is French et al.'s). shapes, trained from scratch: chosen on seeds 100 and 101, see the
# README.
# fmt: off
PRESETS = {
    "shapes": {"max_iters": 1400, "lr": 0.1, "weight_decay": 1e-4, "crop_size": 64,
               "unsup_weight": {"noise": 10.0, "cutmix": 5.0}},
    "camvid": {"epochs": 300, "lr": 0.01, "weight_decay": 4e-4, "crop_size": 320},
    "voc": {"epochs": {"1/16": 32, "1/8": 34, "1/4": 40, "1/2": 60}, "max_iters": 39_000,  # max_iters: every other split
            "lr": 0.0025, "weight_decay": 4e-4, "crop_size": 512},
    "cityscapes": {"epochs": {"1/16": 128, "1/8": 137, "1/4": 160, "1/2": 240}, "max_iters": 44_500,
                   "lr": 0.0025, "weight_decay": 8e-4, "crop_size": 800, "ohem": (0.7, 50_000)},
    "folder": {"epochs": 60, "lr": 0.0025, "weight_decay": 4e-4, "crop_size": 512},
}
# fmt: on
EVERYWHERE = {
    "batch_size": 8,
    "head_lr_mult": 1.0,
    "decay_norm": False,
    "scale": "0.5,0.75,1,1.5,1.75,2",
    "ohem": None,
    "unsup_weight": {"noise": 100.0, "cutmix": 1.0},
}  # fmt: skip
PRESETS = {name: {**EVERYWHERE, **preset} for name, preset in PRESETS.items()}
MEASURES, EVALUATIONS = ("loss_sup", "loss_unsup", "confident"), ("student_miou", "pseudo_accuracy")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run: the shared flags and those of the two methods."""
    parser = cli.parser(__doc__, PRESETS)
    group = parser.add_argument_group("Mean Teacher")
    group.add_argument("--cutmix", action="store_true", help="CutMix-Seg instead of noise")
    group.add_argument(
        "--unsup-weight",
        type=float,
        metavar="W",
        help="w of the consistency loss (default: 100, shapes 10; with CutMix 1, shapes 5)",
    )
    group.add_argument("--ema-decay", type=float, default=0.99, metavar="α", help="after its warm-up (default: 0.99)")
    group.add_argument(
        "--noise-std", type=float, default=0.1, metavar="σ", help="of η, in normalised units; not with --cutmix (default: 0.1)"
    )
    group.add_argument(
        "--conf-thresh",
        type=float,
        default=0.97,
        metavar="P",
        help="teacher's probability from which a pixel is confident; with --cutmix their share scales the loss (default: 0.97)",
    )
    group.add_argument(
        "--colour-jitter", "--color-jitter", action="store_true", help="with --cutmix: jitter what the student sees"
    )
    given, _ = parser.parse_known_args(argv)
    args = cli.finish(parser, PRESETS, "mean_teacher" + ("-cutmix" if given.cutmix else ""), argv)
    if isinstance(args.unsup_weight, dict):
        args.unsup_weight = args.unsup_weight["cutmix" if args.cutmix else "noise"]
    if not (0 <= args.ema_decay < 1 and 0 <= args.noise_std and 0 <= args.conf_thresh <= 1 and 0 <= args.unsup_weight):
        parser.error("--ema-decay lies in [0,1), --conf-thresh in [0,1]; --noise-std and --unsup-weight are not negative")
    if args.colour_jitter and not args.cutmix:
        parser.error("--colour-jitter goes with --cutmix")
    return args


def build_networks(args: argparse.Namespace, data: DataSource, rt: Runtime) -> dict[str, nn.Module]:
    """The teacher, which is the result and starts as a copy, and the student."""
    student = rt.place(DeepLabV3Plus(args.backbone, data.num_classes, args.weights, args.output_stride, args.dropout))
    teacher = copy.deepcopy(student).requires_grad_(False)
    return {"teacher": teacher.train(not args.cutmix), "student": student}


def student_view(sample: dict, item: Item) -> dict:
    """Add the jittered picture that the student alone sees."""
    return {**sample, "image_strong": colour_jitter(sample["image"])}


def load_batches(args: argparse.Namespace, data: DataSource, rt: Runtime, start: int, stop: int) -> Iterator[tuple[dict, ...]]:
    """The batches of iterations `start` to `stop`: labelled, unlabelled and, for CutMix, an independent second one."""
    strong = student_view if args.colour_jitter else None
    unlabelled = [
        train_loader(data, data.unlabelled, stream, args, rt, start, stop, strong)
        for stream in ((1, 2) if args.cutmix else (1,))
    ]
    return zip(train_loader(data, data.labelled, 0, args, rt, start, stop), *unlabelled)


# ---------------------------------------------------------------------------------------------------------- the method


def add_noise(images: Tensor, valid_mask: Tensor, std: float) -> Tensor:
    """Images (N,3,H,W) with Gaussian noise, drawn anew at each call; padding, where valid_mask (N,H,W) is False, stays 0."""
    return images + std * torch.randn_like(images) * valid_mask[:, None]


def squared_distance(probs: Tensor, targets: Tensor, valid_mask: Tensor, rt: Runtime) -> Tensor:
    """Mean over the valid pixels of all processes of sum_c (p - p')², a scalar; the gradient goes to `probs`.

    Args:
        probs: (N,C,H,W) of the student.
        targets: (N,C,H,W) of the teacher, without gradient.
        valid_mask: (N,H,W) bool, False on padding.
        rt: the process.
    """
    distance = (probs - targets).square().sum(1)  # (N,H,W)
    return rt.mean((distance * valid_mask).sum(), valid_mask.sum())


def confident_share(targets: Tensor, valid_mask: Tensor, threshold: float, rt: Runtime) -> Tensor:
    """Share of the valid pixels of all processes whose highest probability reaches `threshold`, a scalar in [0,1]."""
    confident = (targets.amax(1) >= threshold) & valid_mask
    return rt.add_up(confident.sum()) / rt.add_up(valid_mask.sum()).clamp_min(1)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float, buffers: bool) -> None:
    """teacher <- decay·teacher + (1-decay)·student, for the parameters and, with `buffers`, BatchNorm's statistics.

    Source: Eq. (2), arXiv:1703.01780. Counters among the buffers are copied.
    """
    ours, theirs = list(teacher.parameters()), list(student.parameters())
    if buffers:
        floating = [(a, b) for a, b in zip(teacher.buffers(), student.buffers()) if a.is_floating_point()]
        ours, theirs = ours + [a for a, _ in floating], theirs + [b for _, b in floating]
        for a, b in zip(teacher.buffers(), student.buffers()):
            if not a.is_floating_point():
                a.copy_(b)
    torch._foreach_lerp_(ours, theirs, 1 - decay)


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
    student, teacher = networks["student"], networks["teacher"]
    # 1. Labelled and unlabelled pictures, normalised on the device.
    batch_l, *batches_u = batches
    images_l, target_l = normalise(batch_l["image"], batch_l["valid_mask"]), batch_l["target"]  # (N,3,H,W), (N,H,W)
    images_u = [normalise(batch["image"], batch["valid_mask"]) for batch in batches_u]  # one or two of (N,3,H,W)
    size = target_l.shape[1:]

    with rt.autocast():
        if args.cutmix:
            logits_l = student(images_l)
            # 3. One box a picture; the teacher sees the unmixed pictures.
            mask = half_area_masks(len(target_l), size[0], rt, args.seed, iteration)  # (N,H,W) bool
            seen = images_u
            if args.colour_jitter:
                seen = [normalise(batch["image_strong"], batch["valid_mask"]) for batch in batches_u]
            images_m = mix(mask, seen[1], seen[0])
            valid_mask = mix(mask, batches_u[1]["valid_mask"], batches_u[0]["valid_mask"])
            with torch.no_grad():
                targets = mix(mask, *(full_softmax(teacher(images_u[i]), size) for i in (1, 0)))
            probs = full_softmax(student(images_m), size)
        else:
            # 3. The same crops under different noise, labelled and unlabelled pictures in forward passes of their own.
            clean = [(images_l, batch_l["valid_mask"]), (images_u[0], batches_u[0]["valid_mask"])]
            logits_l, logits_u = (student(add_noise(*pair, args.noise_std)) for pair in clean)
            valid_mask = torch.cat([mask for _, mask in clean])
            with torch.no_grad():
                targets = torch.cat([full_softmax(teacher(add_noise(*pair, args.noise_std)), size) for pair in clean])
            probs = torch.cat([full_softmax(logits, size) for logits in (logits_l, logits_u)])

    # 2., 3. Losses.
    loss_sup = labelled_loss(logits_l, target_l, args.ohem, rt, args.kernels)
    confident = confident_share(targets, valid_mask, args.conf_thresh, rt)
    loss_unsup = squared_distance(probs, targets, valid_mask, rt)
    loss_unsup = loss_unsup * confident if args.cutmix else loss_unsup / data.num_classes
    loss = loss_sup + args.unsup_weight * loss_unsup

    # 4., 5. Gradient and step of the student; then the average.
    rt.step(loss, optimizer)
    ema_update(teacher, student, min(1 - 1 / (iteration + 1), args.ema_decay), buffers=args.cutmix)
    return {"loss": loss, "loss_sup": loss_sup, "loss_unsup": loss_unsup, "confident": confident}


def score(
    networks: dict[str, nn.Module],
    args: argparse.Namespace,
    data: DataSource,
    rt: Runtime,
    final: bool,
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Evaluate the teacher, which is the result, and the student; the accuracy of the teacher's pseudo-labels."""
    results, measured = validate(networks, data, args, rt, audit=True)
    return results, {"student_miou": results["student"].miou, **measured}


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
