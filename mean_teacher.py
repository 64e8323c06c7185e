"""Mean Teacher and, with --cutmix, CutMix-Seg.

Mean Teacher: Tarvainen & Valpola, NeurIPS 2017, arXiv:1703.01780. CutMix-Seg: French et al.,
BMVC 2020, arXiv:1906.01916. The teacher is the exponential moving average of the student. It is
never trained; the student learns to predict what the teacher predicts from another view of the
same image.

    Mean Teacher   x --+-- + η  --> student f  --> p  --+
                       |               ^ gradient       +--> mean (p - p')² --> L_u
                       +-- + η' --> teacher f' --> p' --+
                                       ^ average of the student's weights

    CutMix-Seg     u0, u1 --+--> mixed by m --> x_m --> student f --------> p ----+
                            |                                                     +--> L_u
                            +--> teacher f' --> p'(u0), p'(u1) --> mixed --> p'_m +

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
4. L = L_s + w(t)·L_u;  SGD step for the student. With a ramp-up (on the built-in set), w(t) grows
   to w in the first T iterations; without one it is w:
       w(t) = w·exp(-5 (1 - t/T)²)                               [the release, after 1610.02242]
5. teacher <- α·teacher + (1-α)·student,   α = min(1 - 1/(t+1), 0.99) at iteration t = 0, 1, ...
The teacher is the result; the student is reported beside it.

| symbol | variable           | symbol | variable            | symbol | variable          |
|--------|--------------------|--------|---------------------|--------|-------------------|
| x_l, y | images_l, target_l | x_m    | images_m            | L_s    | loss_sup          |
| u0, u1 | images_u           | m      | mask                | L_u    | loss_unsup        |
| f, p   | student, probs     | p'     | targets (teacher's) | w      | args.unsup_weight |
|        |                    |        |                     | w(t)   | weight            |

`confident` is the share of pixels on which the teacher's highest probability reaches the threshold.

Differences from the papers and the released code:
1. Mean Teacher was published for image classification. The setting here is the one that the authors
   of CPS released for VOC: w = 100 from the start, the same crops for both networks, labelled and
   unlabelled images in forward passes of their own. On the built-in set w is ramped up. They add
   no noise (--noise-std 0), keep α = 0.99 from the start, average between the labelled and the
   unlabelled forward pass, before the optimiser's step, and evaluate the student. On Cityscapes w
   and OHEM are our choice.
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

    python mean_teacher.py                                   # built-in data, a CPU, about a minute
    python mean_teacher.py --cutmix --data voc --data-dir VOCdevkit --split 1/8 --amp bf16
"""

import argparse
import copy
import math

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from common import cli, runtime
from common.augment import normalise
from common.cutmix import half_area_masks, mix
from common.datasets import Item
from common.deeplabv3plus import DeepLabV3Plus, full_softmax
from common.distributed import add_up, global_mean
from common.evaluate import Scores, evaluate
from common.losses import labelled_loss
from common.run import Run, sgd

# All settings of a data set; a flag of the same name, where there is one, replaces it. The
# schedules are those of cps.py: on voc, its authors released Mean Teacher with the same
# (exp.voc/voc8.res50v3+.MeanTeacher), on cityscapes CPS alone. Those of the other data sets are
# our own choice.
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
    # w as on voc; the ramp-up is our choice, see common/results/README.md.
    "unsup_weight": {"noise": 100.0, "cutmix": 1.0},
    "ramp_up": {"noise": 0.4, "cutmix": 0.0},
    "eval_window": 0,  # whole images
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
    "unsup_weight": {"noise": 100.0, "cutmix": 1.0},
    "ramp_up": 0.0,
    "eval_window": 0,
    "eval_interval": 10,
}
VOC = {
    "backbone": "resnet50",
    "weights": "imagenet",
    "output_stride": 16,
    "dropout": 0.5,
    # Passes over the unlabelled images: about 39 000 iterations on each split.
    "epochs": {"1/16": 32, "1/8": 34, "1/4": 40, "1/2": 60},
    "max_iters": 39_000,  # of every other split
    "batch_size": 8,
    "crop_size": 512,
    "scale": "0.5,0.75,1,1.5,1.75,2",
    # Released: 0.0025 times 4 processes with decay 1e-4, and a gradient that is a quarter of the
    # average's.
    "lr": 0.0025,
    "head_lr_mult": 1.0,
    "weight_decay": 4e-4,
    "decay_norm": False,  # BatchNorm and biases do not decay
    "ohem": None,
    "unsup_weight": {"noise": 100.0, "cutmix": 1.0},  # of CPS's authors; of French et al.
    "ramp_up": 0.0,
    "eval_window": 0,  # our choice
    "eval_interval": 1,  # our choice
}
CITYSCAPES = VOC | {
    # About 44 500 iterations on each split.
    "epochs": {"1/16": 128, "1/8": 137, "1/4": 160, "1/2": 240},
    "max_iters": 44_500,
    "crop_size": 800,
    # Released: 0.02 on 8 processes with decay 1e-4, and a gradient that is an eighth of the
    # average's, so the same rate as on voc.
    "weight_decay": 8e-4,
    "ohem": (0.7, 50_000),  # probability, pixels an image: our choice, as in CPS
    "eval_window": "crop",  # windows of the crop's size
    "eval_interval": 8,  # our choice
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
    """The settings of a run: the shared flags and those of the two methods."""
    parser = cli.parser(__doc__, PRESETS)
    group = parser.add_argument_group("Mean Teacher")
    group.add_argument("--cutmix", action="store_true", help="CutMix-Seg instead of noise")
    group.add_argument(
        "--unsup-weight",
        type=float,
        metavar="W",
        help="w of the consistency loss (default: 100; with CutMix 1)",
    )
    group.add_argument(
        "--ramp-up",
        type=float,
        metavar="SHARE",
        help="share of the iterations over which w grows from 0.7 %% of its value "
        "(default: 0; shapes 0.4, with CutMix 0)",
    )
    group.add_argument(
        "--ema-decay",
        type=float,
        default=0.99,
        metavar="α",
        help="after its warm-up (default: 0.99)",
    )
    group.add_argument(
        "--noise-std",
        type=float,
        default=0.1,
        metavar="σ",
        help="of η, in normalised units; not with --cutmix (default: 0.1)",
    )
    group.add_argument(
        "--conf-thresh",
        type=float,
        default=0.97,
        metavar="P",
        help="teacher's probability from which a pixel is confident; with --cutmix their share "
        "scales the loss (default: 0.97)",
    )
    group.add_argument(
        "--colour-jitter",
        "--color-jitter",
        action="store_true",
        help="with --cutmix: jitter what the student sees",
    )
    given, _ = parser.parse_known_args(argv)
    args = cli.finish(parser, PRESETS, "mean_teacher" + ("-cutmix" if given.cutmix else ""), argv)
    for name in ("unsup_weight", "ramp_up"):
        value = getattr(args, name)
        if isinstance(value, dict):
            setattr(args, name, value["cutmix" if args.cutmix else "noise"])
    check(args, parser)
    return args


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse values that cannot work."""
    if not (0 <= args.ema_decay < 1 and 0 <= args.conf_thresh <= 1):
        parser.error("--ema-decay lies in [0,1), --conf-thresh in [0,1]")
    if not 0 <= args.ramp_up <= 1:
        parser.error("--ramp-up lies in [0,1]")
    if not (0 <= args.noise_std and 0 <= args.unsup_weight):
        parser.error("--noise-std and --unsup-weight are not negative")
    if args.colour_jitter and not args.cutmix:
        parser.error("--colour-jitter goes with --cutmix")


# CutMix-Seg's colours. Source: its release with the follow-up paper, arXiv:2110.04487.
COLOURS = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, hue=0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
    ]
)


def colour_jitter(pixels: Tensor) -> Tensor:
    """Jitter and grey, each by chance; (H,W,3) uint8 to the same."""
    return COLOURS(pixels.permute(2, 0, 1)).permute(1, 2, 0)


def student_view(sample: dict, item: Item) -> dict:
    """Add the jittered image that the student alone sees."""
    return {**sample, "image_strong": colour_jitter(sample["image"])}


# --------------------------------------------------------------------------------------- the method


def add_noise(images: Tensor, valid_mask: Tensor, std: float) -> Tensor:
    """Images (N,3,H,W) with Gaussian noise, drawn anew at each call.

    Padding, where valid_mask (N,H,W) is False, stays 0.
    """
    return images + std * torch.randn_like(images) * valid_mask[:, None]


def squared_distance(probs: Tensor, targets: Tensor, valid_mask: Tensor) -> Tensor:
    """Mean over the valid pixels of all processes of sum_c (p - p')², a scalar.

    Args:
        probs: (N,C,H,W) of the student, which the gradient goes to.
        targets: (N,C,H,W) of the teacher, without gradient.
        valid_mask: (N,H,W) bool, False on padding.
    """
    distance = (probs - targets).square().sum(1)  # (N,H,W)
    return global_mean((distance * valid_mask).sum(), valid_mask.sum())


def confident_share(targets: Tensor, valid_mask: Tensor, threshold: float) -> Tensor:
    """Share of the valid pixels of all processes with max p' >= threshold, a scalar in [0,1]."""
    confident = (targets.amax(1) >= threshold) & valid_mask
    return add_up(confident.sum()) / add_up(valid_mask.sum()).clamp_min(1)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float, buffers: bool) -> None:
    """teacher <- decay·teacher + (1-decay)·student.

    For the parameters and, with `buffers`, BatchNorm's statistics; its counters are copied.
    Source: Eq. (2), arXiv:1703.01780.
    """
    theirs, ours = list(teacher.parameters()), list(student.parameters())
    if buffers:
        for old, new in zip(teacher.buffers(), student.buffers()):
            if old.is_floating_point():
                theirs.append(old)
                ours.append(new)
            else:
                old.copy_(new)
    torch._foreach_lerp_(theirs, ours, 1 - decay)


def ramp_up(done: int, total: int, share: float) -> float:
    """The factor of w at iteration `done`: exp(-5 (1 - t)²), where t runs from 0 to 1.

    t reaches 1 after a `share` of all `total` iterations. Source: the released Mean Teacher (its
    `sigmoid_rampup`), which takes it from arXiv:1610.02242.
    """
    length = share * total
    if done >= length:
        return 1.0
    return math.exp(-5 * (1 - done / length) ** 2)


def noise_step(
    student: nn.Module,
    teacher: nn.Module,
    batch_l: dict,
    batch_u: dict,
    weight: float,
    args: argparse.Namespace,
) -> dict[str, Tensor]:
    """Mean Teacher: steps 1 to 4, the losses of one iteration.

    Args:
        student, teacher: the networks.
        batch_l, batch_u: labelled and unlabelled images.
        weight: w(t).
        args: `noise_std`, `conf_thresh`, `ohem`.
    """
    # 1. Labelled and unlabelled images, normalised on the device.
    parts = [
        (normalise(batch["image"], batch["valid_mask"]), batch["valid_mask"])
        for batch in (batch_l, batch_u)
    ]  # (N,3,H,W) and (N,H,W) each
    target_l = batch_l["target"]
    size = target_l.shape[1:]

    # 3. The same crops under different noise, in forward passes of their own: x+η, x+η'
    logits_l, logits_u = (student(add_noise(*part, args.noise_std)) for part in parts)
    with torch.no_grad():
        targets = torch.cat(
            [full_softmax(teacher(add_noise(*part, args.noise_std)), size) for part in parts]
        )  # p', (2N,C,H,W)
    probs = torch.cat([full_softmax(logits, size) for logits in (logits_l, logits_u)])
    valid_mask = torch.cat([mask for _, mask in parts])

    # 2. L_s = CE(f(x_l + η), y)
    loss_sup = labelled_loss(logits_l, target_l, args.ohem)

    # 3. L_u = mean over pixels and classes of (p - p')²
    loss_unsup = squared_distance(probs, targets, valid_mask) / probs.shape[1]

    # 4. L = L_s + w(t)·L_u
    return {
        "loss": loss_sup + weight * loss_unsup,
        "loss_sup": loss_sup,
        "loss_unsup": loss_unsup,
        "confident": confident_share(targets, valid_mask, args.conf_thresh),
    }


def cutmix_step(
    student: nn.Module,
    teacher: nn.Module,
    batch_l: dict,
    batches_u: list[dict],
    weight: float,
    iteration: int,
    args: argparse.Namespace,
) -> dict[str, Tensor]:
    """CutMix-Seg: steps 1 to 4, the losses of one iteration.

    Args:
        student, teacher: the networks.
        batch_l: labelled images.
        batches_u: two independent batches of unlabelled images.
        weight: w(t).
        iteration: iterations done, for the boxes.
        args: `colour_jitter`, `conf_thresh`, `ohem`, `seed`.
    """
    # 1. Labelled images, and two independent batches of unlabelled ones: u0, u1
    images_l, target_l = normalise(batch_l["image"], batch_l["valid_mask"]), batch_l["target"]
    images_u = [normalise(batch["image"], batch["valid_mask"]) for batch in batches_u]
    size = target_l.shape[1:]

    # 2. L_s = CE(f(x_l), y)
    logits_l = student(images_l)
    loss_sup = labelled_loss(logits_l, target_l, args.ohem)

    # 3. One box an image, (N,H,W) bool; x_m = m·u1 + (1-m)·u0
    mask = half_area_masks(len(target_l), size[0], args.seed, iteration, target_l.device)
    seen = images_u
    if args.colour_jitter:
        seen = [normalise(batch["image_strong"], batch["valid_mask"]) for batch in batches_u]
    images_m = mix(mask, seen[1], seen[0])
    valid_mask = mix(mask, batches_u[1]["valid_mask"], batches_u[0]["valid_mask"])

    # p'_m = m·p'(u1) + (1-m)·p'(u0): the teacher sees the unmixed images
    with torch.no_grad():
        inside, outside = (full_softmax(teacher(images_u[index]), size) for index in (1, 0))
        targets = mix(mask, inside, outside)  # (N,C,H,W)
    probs = full_softmax(student(images_m), size)

    # L_u = share(max p'_m >= threshold) · mean over pixels of sum_c (p(x_m) - p'_m)²
    confident = confident_share(targets, valid_mask, args.conf_thresh)
    loss_unsup = squared_distance(probs, targets, valid_mask) * confident

    # 4. L = L_s + w(t)·L_u
    return {
        "loss": loss_sup + weight * loss_unsup,
        "loss_sup": loss_sup,
        "loss_unsup": loss_unsup,
        "confident": confident,
    }


def validate(
    run: Run, teacher: nn.Module, student: nn.Module
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Scores of both networks, and what else is measured of them."""
    networks = {"teacher": teacher, "student": student}
    scores = evaluate(networks, run.data.val, run.data, run.args)
    return scores, {"student_miou": scores["student"].miou, **run.audit(teacher)}


def main(args: argparse.Namespace) -> None:
    """Train a student and its average, the teacher, and evaluate both."""
    run = Run(args)
    data = run.data
    student = run.place(DeepLabV3Plus.from_settings(args, data.num_classes))
    teacher = copy.deepcopy(student).requires_grad_(False).train(not args.cutmix)
    optimizer = sgd([student], args)
    run.keep(result="teacher", teacher=teacher, student=student, optimizer=optimizer)
    trained = run.parallel(student)

    strong = student_view if args.colour_jitter else None
    labelled = run.batches(data.labelled, stream=0)
    streams = (1, 2) if args.cutmix else (1,)
    unlabelled = [run.batches(data.unlabelled, stream, strong) for stream in streams]
    for iteration, (batch_l, *batches_u) in run.iterations(labelled, *unlabelled):
        if run.evaluates():
            run.report(*validate(run, teacher, student))
        weight = args.unsup_weight * ramp_up(iteration, run.schedule.total, args.ramp_up)
        if args.cutmix:
            measured = cutmix_step(trained, teacher, batch_l, batches_u, weight, iteration, args)
        else:
            measured = noise_step(trained, teacher, batch_l, *batches_u, weight, args)
        # 4., 5. The student's step; then the average.
        run.step(measured["loss"], optimizer)
        ema_update(teacher, student, min(1 - 1 / (iteration + 1), args.ema_decay), args.cutmix)
        run.log(measured)
    run.finish(*validate(run, teacher, student))


if __name__ == "__main__":
    runtime.launch(main, parse_args())
