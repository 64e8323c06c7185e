"""Mean Teacher; with --cutmix CutMix-Seg, with --classmix ClassMix.

Mean Teacher: Tarvainen & Valpola, NeurIPS 2017, arXiv:1703.01780. CutMix-Seg: French et al.,
BMVC 2020, arXiv:1906.01916. ClassMix: Olsson et al., WACV 2021, arXiv:2007.07936; the mixing of
DACS: Tranheden et al., WACV 2021, arXiv:2007.08702. The teacher is the exponential moving average
of the student. It is never trained; the student learns to predict what the teacher predicts from
another view of the same image.

    Mean Teacher   x --+-- + η  --> student f  --> p  --+
                       |               ^ gradient       +--> mean (p - p')² --> L_u
                       +-- + η' --> teacher f' --> p' --+
                                       ^ average of the student's weights

    CutMix-Seg     u0, u1 --+--> mixed by m --> x_m --> student f --------> p ----+
                            |                                                     +--> L_u
                            +--> teacher f' --> p'(u0), p'(u1) --> mixed --> p'_m +

    ClassMix       u0, u1 --+--> teacher f' --> ŷ0, ŷ1 --> M: half of the classes in ŷ1
                            |                                |
                            +--> mixed by M --> x_m --> f -> CE(p, ŷ0 and ŷ1 mixed by M) --> L_u

1. Take labelled images x_l and unlabelled ones x_u; to mix, two independent unlabelled batches u0
   and u1.
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
   ClassMix: the labels are hard. In u1 the teacher sees K classes; ⌊K/2⌋ of them are drawn, and M
   is True on their pixels, so that whole objects are pasted:
       ŷ0 = argmax p'(u0),   ŷ1 = argmax p'(u1)
       x_m = M·u1 + (1-M)·u0,   ŷ_m = M·ŷ1 + (1-M)·ŷ0
       L_u = q · mean over pixels of CE(f(x_m), ŷ_m),   q = share of pixels with max p'_m >= 0.968
   --classmix labelled pastes from labelled images instead, ⌈K/2⌉ of their true classes, as DACS
   does from another domain. Pasted pixels then have weight 1 instead of q, and q is of u0 alone:
       x_m = M·x_l + (1-M)·u0,   ŷ_m = M·y + (1-M)·ŷ0
4. L = L_s + w(t)·L_u;  SGD step for the student. With a ramp-up (of Mean Teacher, on the
   built-in set), w(t) grows to w in the first T iterations, a share of all; without one it is w:
       w(t) = w·exp(-5 (1 - t/T)²)                               [the release, after 1610.02242]
5. teacher <- α·teacher + (1-α)·student,   α = min(1 - 1/(t+1), 0.99) at iteration t = 0, 1, ...
The teacher is the result; the student is reported beside it.

| symbol | variable           | symbol | variable            | symbol | variable          |
|--------|--------------------|--------|---------------------|--------|-------------------|
| x_l, y | images_l, target_l | x_m    | images_m            | L_s    | loss_sup          |
| u0, u1 | images_u           | m, M   | mask                | L_u    | loss_unsup        |
| f      | student            | f'     | teacher             | w      | args.unsup_weight |
| ŷ0, ŷ1 | label_0, label_1   | ŷ_m    | target_m            | w(t)   | weight            |
| q      | confident          | T      | args.ramp_up · all  | α      | <= args.ema_decay |

The probabilities p and p' have no variable: `soft_consistency` makes them of the student's `logits`
and the teacher's `targets`, which are logits, too, at the resolution of the head.

`confident` is the share of pixels on which the teacher's highest probability reaches the threshold,
`pasted` the share of pixels inside M.

Differences from the papers and the released code:
1. Mean Teacher was published for image classification. The setting here is the one that the authors
   of CPS released for VOC: w = 100 from the start, the same crops for both networks, labelled and
   unlabelled images in forward passes of their own. On the built-in set w is ramped up. They add no
   noise (--noise-std 0; Mean Teacher's release has σ = 0.15, 0.1 is our choice), keep α = 0.99 from
   the start, average between the labelled and the unlabelled forward pass, before the optimiser's
   step, and evaluate the student, at the epochs 20 to 34, on images padded to 512 pixels. On
   Cityscapes w is our choice, and so is OHEM for all methods of this file.
2. In Mean Teacher the teacher runs in train mode and its BatchNorm keeps statistics of its own, as
   theirs does. Dropout is active with it; their network has none.
3. In CutMix-Seg the teacher's BatchNorm statistics are averages of the student's, like its weights,
   and it runs in eval mode. The release averages them, too, but freezes BatchNorm: all of it in
   DeepLab v2, the backbone's in DeepLab v3+. The rest of its teacher runs in train mode.
4. CutMix-Seg is released with Adam, a constant learning rate (a tenth of it for pretrained layers),
   α = 0.99 from the start and, on VOC, batches of 10 crops of 321 pixels, scaled by 0.5 to 1.5.
   Here it is trained as the other methods are, by SGD with the poly learning rate and the crops of
   cps.py, with α as in step 5. Its unlabelled images are all training images, the labelled ones
   among them; here they are the others.
5. --colour-jitter changes the mixed images that the student sees, and the teacher's never. It
   belongs to the follow-up paper, arXiv:2110.04487, whose settings the released scripts have; it is
   off by default.
6. ClassMix is released with batches of one stream, whose images are mixed in a ring; here u0 and u1
   are independent. ClassMix and DACS evaluate the student, and their teacher averages parameters
   alone and runs in train mode; here the teacher is CutMix-Seg's (3.), so that box and classes can
   be compared. ClassMix starts from a DeepLab v2 that was trained on COCO, scales by 0.5 to 1.6 on
   VOC and flips nothing; here it is trained as the other methods are. On Cityscapes the mixed image
   is jittered and blurred, on VOC it is not; here --colour-jitter does it before mixing, with other
   colours and no blur. DACS adapts to another domain; here both images are of one. It is released
   with jitter and blur, and ignored pixels are a class of their own that may be pasted; here never.
7. Padding counts nowhere. In the released Mean Teacher it counts in L_u. In the released CutMix-Seg
   it adds nothing to the distance, but counts in the number of pixels that it is divided by, and
   like any other pixel in the share of confident ones. In the released DACS ignored pixels add
   nothing, but count in the number that the loss is divided by. The released ClassMix treats
   padding as image.
8. On Cityscapes CutMix-Seg, ClassMix and DACS train and evaluate on images and masks of half the
   size, 512x1024 pixels; here they have their full size.
9. The network is this project's DeepLabv3+, and images are antialiased when they are scaled down,
   which they are not in the releases of Mean Teacher and CutMix-Seg nor, on VOC, of ClassMix.

    python mean_teacher.py                                   # built-in data, a CPU
    python mean_teacher.py --classmix
    python mean_teacher.py --cutmix --data voc --data-dir VOCdevkit --split 1/8 --amp bf16
"""

import argparse
import copy
import math

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from common import cli, runtime
from common.augment import IGNORE, normalise
from common.cutmix import class_masks, half_area_masks, mix
from common.deeplabv3plus import DeepLabV3Plus
from common.distributed import add_up, global_mean
from common.evaluate import Scores, evaluate
from common.losses import labelled_loss, mean_cross_entropy
from common.run import Run, sgd
from common.source import Item
from kernels import cross_entropy, pseudo_label, soft_consistency

# All settings of a data set; a flag of the same name, where there is one, replaces it. The
# schedules are those of cps.py. For voc its authors released Mean Teacher with that schedule
# (exp.voc/voc8.res50v3+.MeanTeacher); for cityscapes they released CPS alone, whose schedule we
# take. Those of the other data sets are our own choice.
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
    # w as on voc, but CutMix-Seg's; that and the ramp-up: see common/results/README.md.
    "unsup_weight": {"noise": 100.0, "cutmix": 5.0, "classmix": 1.0},
    "ramp_up": {"noise": 0.4, "cutmix": 0.0, "classmix": 0.0},
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
    "unsup_weight": {"noise": 100.0, "cutmix": 1.0, "classmix": 1.0},
    "ramp_up": 0.0,
    "eval_window": 0,
    "eval_interval": 10,
}
VOC = {
    "backbone": "resnet50",
    "weights": "imagenet",
    "output_stride": 16,
    "dropout": 0.5,
    # Passes over the unlabelled images: 39 300 to 39 700 iterations.
    "epochs": {"1/16": 32, "1/8": 34, "1/4": 40, "1/2": 60},
    "max_iters": 39_000,  # of every other split; our choice
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
    # Of CPS's authors; of French et al.; of Olsson et al.
    "unsup_weight": {"noise": 100.0, "cutmix": 1.0, "classmix": 1.0},
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
    """The settings of a run: the shared flags and those of the three methods."""
    parser = cli.parser(__doc__, PRESETS)
    add_flags(parser)
    given, _ = parser.parse_known_args(argv)
    name = "mean_teacher" if kind(given) == "noise" else f"mean_teacher-{kind(given)}"
    if given.classmix == "labelled":
        name += "-labelled"
    parser.set_defaults(views=int(given.colour_jitter))  # by which `cli` counts memory
    args = cli.finish(parser, PRESETS, name, argv)
    for key in ("unsup_weight", "ramp_up"):
        value = getattr(args, key)
        if isinstance(value, dict):
            setattr(args, key, value[kind(args)])
    if args.conf_thresh is None:
        args.conf_thresh = 0.968 if args.classmix else 0.97
    check(args, parser)
    return args


def kind(args: argparse.Namespace) -> str:
    """How the student's view differs from the teacher's: noise, cutmix or classmix."""
    return "classmix" if args.classmix else "cutmix" if args.cutmix else "noise"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the three methods."""
    group = parser.add_argument_group("Mean Teacher, CutMix-Seg, ClassMix")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--cutmix", action="store_true", help="CutMix-Seg instead of noise")
    either.add_argument(
        "--classmix",
        nargs="?",
        const="unlabelled",
        choices=["unlabelled", "labelled"],
        help="ClassMix; with `labelled`, what is pasted comes from labelled images, as in DACS",
    )
    group.add_argument(
        "--unsup-weight",
        type=float,
        metavar="W",
        help="w of the consistency loss (default: 100; with ClassMix 1; with CutMix 1, shapes 5)",
    )
    group.add_argument(
        "--ramp-up",
        type=float,
        metavar="SHARE",
        help="share of the iterations over which w grows from 0.7 %% of its value "
        "(default: 0; shapes 0.4, with CutMix and ClassMix 0)",
    )
    group.add_argument(
        "--ema-decay",
        type=float,
        default=0.99,
        metavar="α",
        help="of the teacher, at most (default: 0.99)",
    )
    group.add_argument(
        "--noise-std",
        type=float,
        default=0.1,
        metavar="σ",
        help="of η, in normalised units; of Mean Teacher alone (default: 0.1)",
    )
    group.add_argument(
        "--conf-thresh",
        type=float,
        metavar="P",
        help="teacher's probability from which a pixel is confident; with CutMix and ClassMix "
        "their share scales the loss (default: 0.97; ClassMix 0.968)",
    )
    group.add_argument(
        "--colour-jitter",
        "--color-jitter",
        action="store_true",
        help="with CutMix or ClassMix: jitter the mixed images that the student sees",
    )


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse values that cannot work."""
    if not (0 <= args.ema_decay < 1 and 0 <= args.conf_thresh <= 1):
        parser.error("--ema-decay lies in [0,1), --conf-thresh in [0,1]")
    if not 0 <= args.ramp_up <= 1:
        parser.error("--ramp-up lies in [0,1]")
    if not (0 <= args.noise_std and 0 <= args.unsup_weight):
        parser.error("--noise-std and --unsup-weight are not negative")
    if args.colour_jitter and kind(args) == "noise":
        parser.error("--colour-jitter goes with --cutmix or --classmix")


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


def squared_distance(
    logits: Tensor,
    targets: Tensor,
    valid_mask: Tensor,
    threshold: float,
    *,
    mask: Tensor | None = None,
    second: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean of sum_c (p - p')², and the share of pixels on which the teacher is confident.

    p and p' are the softmax of `logits` and `targets`, interpolated to the size of `valid_mask`.

    Args:
        logits: (N,C,h,w) of the student, which the gradient goes to.
        targets: (N,C,h,w) logits of the teacher, without gradient.
        valid_mask: (N,H,W) bool, False on padding.
        threshold: of max p', from which a pixel is confident.
        mask, second: where `mask` (N,H,W) is True, p' comes from `second` (N,C,h,w) instead.

    Returns:
        Two scalars, both over the valid pixels of all processes.
    """
    options = {"mask": mask, "second": second, "threshold": threshold}
    found = soft_consistency(logits, targets, valid_mask, mode="squared", **options)
    confident = add_up(found.confident) / add_up(found.count).clamp_min(1)
    return global_mean(found.loss, found.count), confident


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

    # Steps 2 and 3 need forward passes of their own for both kinds of images: the same crops under
    # different noise, x+η for the student and x+η' for the teacher.
    logits_l, logits_u = (student(add_noise(*part, args.noise_std)) for part in parts)
    with torch.no_grad():
        targets = torch.cat([teacher(add_noise(*part, args.noise_std)) for part in parts])
    logits = torch.cat([logits_l, logits_u])  # (2N,C,h,w), as the targets
    valid_mask = torch.cat([mask for _, mask in parts])

    # 2. L_s = CE(f(x_l + η), y)
    loss_sup = labelled_loss(logits_l, target_l, args.ohem)

    # 3. L_u = mean over pixels and classes of (p - p')²
    distance, confident = squared_distance(logits, targets, valid_mask, args.conf_thresh)
    loss_unsup = distance / logits.shape[1]

    # 4. L = L_s + w(t)·L_u
    return {
        "loss": loss_sup + weight * loss_unsup,
        "loss_sup": loss_sup,
        "loss_unsup": loss_unsup,
        "confident": confident,
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

    # 2. L_s = CE(f(x_l), y)
    logits_l = student(images_l)
    loss_sup = labelled_loss(logits_l, target_l, args.ohem)

    # 3. One box an image, (N,H,W) bool; x_m = m·u1 + (1-m)·u0
    mask = half_area_masks(len(target_l), target_l.shape[1], args.seed, iteration, target_l.device)
    seen = images_u
    if args.colour_jitter:
        seen = [normalise(batch["image_strong"], batch["valid_mask"]) for batch in batches_u]
    images_m = mix(mask, seen[1], seen[0])
    valid_mask = mix(mask, batches_u[1]["valid_mask"], batches_u[0]["valid_mask"])

    # The teacher sees the unmixed images; (N,C,h,w)
    with torch.no_grad():
        inside, outside = (teacher(images_u[index]) for index in (1, 0))

    # p'_m = m·p'(u1) + (1-m)·p'(u0)
    # L_u = share(max p'_m >= threshold) · mean over pixels of sum_c (p(x_m) - p'_m)²
    distance, confident = squared_distance(
        student(images_m), outside, valid_mask, args.conf_thresh, mask=mask, second=inside
    )
    loss_unsup = distance * confident

    # 4. L = L_s + w(t)·L_u
    return {
        "loss": loss_sup + weight * loss_unsup,
        "loss_sup": loss_sup,
        "loss_unsup": loss_unsup,
        "confident": confident,
    }


@torch.no_grad()
def teacher_labels(teacher: nn.Module, batch: dict, threshold: float) -> tuple[Tensor, Tensor]:
    """argmax p' of a batch, (N,H,W) uint8 with 255 on padding; where max p' >= threshold, bool."""
    valid_mask = batch["valid_mask"]
    logits = teacher(normalise(batch["image"], valid_mask))
    found = pseudo_label(logits, valid_mask.shape[1:], with_confidence=True)
    return found.label.masked_fill(~valid_mask, IGNORE), found.confidence >= threshold


def share(chosen: Tensor, counted: Tensor) -> Tensor:
    """Share of `chosen` among the `counted` pixels (N,H,W) of all processes, a scalar in [0,1]."""
    return add_up((chosen & counted).sum()) / add_up(counted.sum()).clamp_min(1)


def paste_classes(
    teacher: nn.Module,
    into: dict,
    pasted: dict,
    classes: int,
    iteration: int,
    args: argparse.Namespace,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Step 3 of ClassMix, up to the student: classes of one batch pasted into another.

    Args:
        teacher: the network that labels.
        into: u0, a batch of unlabelled images.
        pasted: u1, or a batch of labelled images.
        classes: C.
        iteration: iterations done, for the choice of classes.
        args: `classmix`, `colour_jitter`, `conf_thresh`, `seed`.

    Returns:
        x_m, (N,3,H,W); ŷ_m, (N,H,W) uint8, 255 on padding; M, (N,H,W) bool; q, a scalar.
    """
    # ŷ0 and ŷ1, or true labels; where the teacher is sure of them
    label_0, sure_0 = teacher_labels(teacher, into, args.conf_thresh)
    from_labelled = args.classmix == "labelled"
    if from_labelled:
        label_1 = pasted["target"]
    else:
        label_1, sure_1 = teacher_labels(teacher, pasted, args.conf_thresh)

    # M: ⌊K/2⌋ of the classes in label_1, or ⌈K/2⌉
    mask = class_masks(label_1, classes, args.seed, iteration, round_up=from_labelled)

    # x_m = M·u1 + (1-M)·u0,   ŷ_m = M·ŷ1 + (1-M)·ŷ0
    view = "image_strong" if args.colour_jitter else "image"
    inside, outside = (normalise(batch[view], batch["valid_mask"]) for batch in (pasted, into))
    target = mix(mask, label_1, label_0)
    if from_labelled:
        confident = share(sure_0, into["valid_mask"])
    else:
        confident = share(mix(mask, sure_1, sure_0), target != IGNORE)
    return mix(mask, inside, outside), target, mask, confident


def classmix_step(
    student: nn.Module,
    teacher: nn.Module,
    batch_l: dict,
    batches_u: list[dict],
    weight: float,
    iteration: int,
    args: argparse.Namespace,
) -> dict[str, Tensor]:
    """ClassMix: steps 1 to 4, the losses of one iteration.

    Args:
        student, teacher: the networks.
        batch_l: labelled images.
        batches_u: two independent batches of unlabelled images; one, if labelled ones are pasted.
        weight: w(t).
        iteration: iterations done, for the choice of classes.
        args: `classmix`, `colour_jitter`, `conf_thresh`, `ohem`, `seed`.
    """
    # 1. Labelled images; u0, and what is pasted into it
    images_l, target_l = normalise(batch_l["image"], batch_l["valid_mask"]), batch_l["target"]
    from_labelled = args.classmix == "labelled"
    into, pasted = batches_u[0], batch_l if from_labelled else batches_u[1]

    # 2. L_s = CE(f(x_l), y)
    logits_l = student(images_l)
    loss_sup = labelled_loss(logits_l, target_l, args.ohem)

    # 3. L_u = mean over pixels of weight · CE(f(x_m), ŷ_m); the weight is q, or 1 on true labels
    classes = logits_l.shape[1]
    mixed = paste_classes(teacher, into, pasted, classes, iteration, args)
    images_m, target_m, mask, confident = mixed
    logits_m = student(images_m)
    valid_mask = target_m != IGNORE
    if from_labelled:
        pixel_weight = torch.where(mask, 1.0, confident)
        total = cross_entropy(logits_m, target_m, pixel_weight=pixel_weight, reduction="sum")
        loss_unsup = global_mean(total, valid_mask.sum())
    else:
        loss_unsup = confident * mean_cross_entropy(logits_m, target_m)

    # 4. L = L_s + w(t)·L_u
    return {
        "loss": loss_sup + weight * loss_unsup,
        "loss_sup": loss_sup,
        "loss_unsup": loss_unsup,
        "confident": confident,
        "pasted": share(mask, valid_mask),
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
    mixes = kind(args) != "noise"
    student = run.place(DeepLabV3Plus.from_settings(args, data.num_classes))
    teacher = copy.deepcopy(student).requires_grad_(False).train(not mixes)
    optimizer = sgd([student], args)
    run.keep(result="teacher", teacher=teacher, student=student, optimizer=optimizer)
    trained = run.parallel(student)

    strong = student_view if args.colour_jitter else None
    pasted_from_labelled = args.classmix == "labelled"
    labelled = run.batches(data.labelled, 0, strong if pasted_from_labelled else None)
    streams = (1, 2) if mixes and not pasted_from_labelled else (1,)
    unlabelled = [run.batches(data.unlabelled, stream, strong) for stream in streams]
    mix_step = classmix_step if args.classmix else cutmix_step
    for iteration, (batch_l, *batches_u) in run.iterations(labelled, *unlabelled):
        if run.evaluates():
            run.report(*validate(run, teacher, student))
        weight = args.unsup_weight * ramp_up(iteration, run.schedule.total, args.ramp_up)
        if mixes:
            measured = mix_step(trained, teacher, batch_l, batches_u, weight, iteration, args)
        else:
            measured = noise_step(trained, teacher, batch_l, *batches_u, weight, args)
        # 4., 5. The student's step; then the average.
        run.step(measured["loss"], optimizer)
        ema_update(teacher, student, min(1 - 1 / (iteration + 1), args.ema_decay), mixes)
        run.log(measured)
    run.finish(*validate(run, teacher, student))


if __name__ == "__main__":
    runtime.launch(main, parse_args())
