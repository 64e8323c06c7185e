"""PS-MT: perturbed and strict mean teachers.

Liu, Tian, Chen, Liu, Belagiannis, Carneiro; CVPR 2022, arXiv:2111.12903.

    x_u --+-- weak -----> teachers t1, t2 --> z' = mean --> ŷ, κ --+-- CutMix --> ŷ_m, κ_m --+
          |                                                        |                         |
          '-- strong --> x_s --------------------------------------+-- CutMix --> x_m        |
                                                                                   |         v
    x_m ----------> student: features + r --> p_m ---------------------------------'--> κ·CE --> L_u
    x_l, strong --> student: features + r --> p_l --> CE --> L_s
                              r: the small change that moves the teachers' predictions most

1. Warm-up: for some epochs of the labelled images all three networks learn from these alone, the
   teachers from weak views and the student f from strong ones.
2. After it there is one active teacher t_a, t1 and t2 in turns that are as long as an epoch of the
   unlabelled images.
3. Both teachers predict the weak view. Of the other one only the 7 highest logits of each pixel are
   taken, and else the active one's:
       z' = ½·z_1 + ½·z_2,   κ = max softmax(z'),   ŷ = argmax z'
4. CutMix of the strong views with those of the batch in a random order, in which an image may meet
   itself, and of ŷ and κ alike: x_m, ŷ_m, κ_m.
5. T-VAT: to the student's features h, those that its decoder gets, a change r of length ε is added
   that moves the mean prediction q of both teachers' decoders most:
       d random, of unit length,   g = ∇_d KL(q(h) ‖ q(h + ξ·d)),   r = ε · g / ‖g‖
6. Losses on the strong views x_l and x_m; the confidence κ is the weight of a pixel, and pixels
   below τ do not count:
       L_s = CE(f(x_l), y)
       L_u = Σ_{κ >= τ} κ_m · CE(f(x_m), ŷ_m) / #{κ_m >= τ}
7. L = L_s + w(t)·L_u, where w(t) grows by a cosine to w in the first epochs:
       w(t) = w · ½ (1 - cos(π t / T))
   SGD step for the student.
8. t_a <- α·t_a + (1-α)·student, BatchNorm's statistics included. The other teacher's parameters
   stay. In step 3 the statistics of both follow the weak views, too.
The result is the mean of both teachers' logits. Each teacher and the student are reported, too.

| symbol | variable           | symbol | variable         | symbol | variable          |
|--------|--------------------|--------|------------------|--------|-------------------|
| x_l, y | images_l, target_l | t1, t2 | teachers         | L_s    | loss_sup          |
| x_m    | images_m           | t_a    | active           | L_u    | loss_unsup        |
| z'     | logits_t           | ξ, ε   | args.xi, EPSILON | w      | args.unsup_weight |
| ŷ_m    | label_m            | τ      | args.conf_thresh | w(t)   | weight            |
| κ_m    | conf_m             | α      | args.ema_decay   | T      | args.ramp_epochs  |

h are features (N,F,h,w), and q the softmax of the mean of both teachers' logits of them. In step 7
t counts epochs from the end of the warm-up on. `confident` is the share of pixels with κ_m >= τ,
`agreement` the share of pixels, at the resolution of the logits and with padding, that have the
same label by both teachers.

Differences from the paper and the released code (yyliu01/PS-MT, VocCode). The paper's own text was
not at hand: what is here is the release.
1. The release takes ξ = 1e-6. g is of the order of ξ², far below the 1e-8 that the release adds to
   ‖g‖, so that r is nearly 0: on features of a network trained here its length is of the order of
   0.001 instead of 2. In float32 rounding takes g's direction, too (cosine to that of float64:
   0.00). With ξ = 0.1, the default here and of the released function, which its decoder overrides,
   they are 2 and 1.00. Here r has length ε whatever ‖g‖ is, and is 0 where g is 0: so --xi 1e-6
   adds a random direction of that length, and the release is near --no-vat.
2. T-VAT compares predictions at the resolution of the logits, a quarter of the image's; in the
   release they are interpolated first. The 7 highest logits are chosen at that resolution, too.
3. The teachers start from the student's pretrained backbone; in the release from random weights,
   which averaging replaces: --teachers-from-scratch. Heads differ, as released.
4. The warm-up has one optimiser and the poly learning rate of the whole run, whose iterations it is
   part of; in the release it comes in addition, each network has its own optimiser and a constant
   rate, and they train one after another.
5. The boxes are those of the release for VOC on all data sets: of one size a batch, λ ~ Beta(4,4),
   sides sqrt(1-λ). On Cityscapes the release pastes three smaller ones, each from another image. λ
   and the means of the losses are those of a process there, here of all.
6. The blur of the strong view has the full kernel of its σ; the release's has 1, 3 or 5 pixels.
   Within an epoch the release shows the same augmented labelled images again and again
   (itertools.cycle keeps the first pass); here each pass is drawn anew.
7. Padding counts in neither loss; in the release that of unlabelled images does. The teachers run
   in train mode, as released, but drop nothing after the warm-up; the released network has no
   dropout at all.
8. On VOC the release multiplies 0.0025 by the processes, of which docs/before_start.md has 4, so
   0.01; on Cityscapes 0.0045 is not multiplied.
9. On Cityscapes the released sliding evaluation has one teacher alone and adds logits, here
   softmaxes. Its configuration names OHEM, and its README says that the results of 800 x 800 have
   it; its code has cross-entropy, and so has this. The weight w of VOC is that of the augmented
   splits; the release has w = 0.06 for 92 labels, and 0.6 for 183 to 732. On VOC it evaluates
   images that are stretched to multiples of 8 pixels.
10. The network is this project's DeepLabv3+, without deep stem and multi-grid. The released ASPP
    has leaky ReLUs, and adds the pooled branch after the projection instead of joining it before.
    Images are resized bilinearly, in the release bicubically.

    python psmt.py                                           # built-in data, a CPU
    python psmt.py --teachers 1 --output-dir runs/psmt-one-teacher
    python psmt.py --data voc --data-dir VOCdevkit --split 1/8 --amp bf16
"""

import argparse
import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from common import InputError, cli, distributed, runtime
from common.adversarial import direction
from common.augment import IGNORE, colour_jitter_and_blur, normalise
from common.cutmix import mix, rasterise
from common.deeplabv3plus import DeepLabV3Plus, MeanLogits
from common.distributed import add_up, global_mean
from common.evaluate import Scores, evaluate
from common.losses import labelled_loss
from common.run import Run, sgd
from common.runtime import derive_seed
from common.source import Item
from kernels import cross_entropy, pseudo_label

# All settings of a data set; a flag of the same name, where there is one, replaces it. Unless a
# comment says otherwise, those of voc and cityscapes are the released configurations
# (VocCode/configs, scripts/train_voc_*.sh; CityCode/configs, scripts/train_city.sh), whose 4
# processes with 8 images each and 2 with 4 (docs/before_start.md) are one here. The other settings
# are our own choice.
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
    "unsup_weight": 1.5,
    "ramp_epochs": 12.0,
    "warmup_epochs": 5.0,
    "ema_decay": 0.9,
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
    "scale": "uniform:0.5-2",
    "lr": 0.01,
    "head_lr_mult": 1.0,
    "weight_decay": 4e-4,
    "decay_norm": False,
    "ohem": None,
    "unsup_weight": 1.5,
    "ramp_epochs": 12.0,
    "warmup_epochs": 5.0,
    "ema_decay": 0.996,
    "eval_window": 0,
    "eval_interval": 10,
}
VOC = {
    "backbone": "resnet50",
    "weights": "imagenet",
    "output_stride": 16,
    "dropout": 0.5,  # our choice
    "epochs": {
        **{"1/16": 80, "1/8": 80, "1/4": 200, "1/2": 300},  # train_voc_aug.sh
        **{"u2pl-1/16": 80, "u2pl-1/8": 80, "u2pl-1/4": 200, "u2pl-1/2": 300},  # ..._blender.sh
        **{"92": 80, "183": 80, "366": 80},  # ..._hq.sh, whose list of 732 is another one
    },
    "max_iters": 25_000,  # of every other split; our choice
    "batch_size": 32,
    "crop_size": 512,
    "scale": "long:300-1200",
    "lr": 0.01,
    "head_lr_mult": 1.0,
    "weight_decay": 1e-4,
    "decay_norm": False,
    "ohem": None,
    "unsup_weight": 1.5,
    "ramp_epochs": 12.0,
    "warmup_epochs": 5.0,
    "ema_decay": 0.996,
    "eval_window": 0,  # whole images (difference 9)
    "eval_interval": 1,
}
CITYSCAPES = VOC | {
    "epochs": {"1/8": 320, "1/4": 450, "1/2": 550},
    "max_iters": 100_000,  # of every other split; our choice
    "batch_size": 8,
    "crop_size": 800,
    "scale": "uniform:0.5-2",
    "lr": 0.0045,
    "unsup_weight": 3.0,
    "eval_window": "crop",
    "eval_interval": 8,  # our choice; released: 10, in the last quarter 1
}
FOLDER = VOC | {"epochs": 80, "max_iters": None, "batch_size": 8, "lr": 0.0025}  # our choice
PRESETS = {
    "shapes": SHAPES,
    "shapes-zipf": SHAPES,
    "camvid": CAMVID,
    "voc": VOC,
    "cityscapes": CITYSCAPES,
    "folder": FOLDER,
}
EPSILON = 2.0  # ε, encoder_decoder.py
LATER_MEASURES = ("loss_unsup", "confident", "agreement")  # after the warm-up
KEPT_LOGITS = 7  # of the teacher that is not active, train.py


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run: the shared flags and those of PS-MT."""
    parser = cli.parser(__doc__, PRESETS)
    add_flags(parser)
    parser.set_defaults(views=1)  # by which `cli` counts memory
    args = cli.finish(parser, PRESETS, "psmt", argv)
    check(args, parser)
    return args


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add PS-MT's flags."""
    group = parser.add_argument_group("PS-MT")
    group.add_argument(
        "--teachers", type=int, choices=[1, 2], default=2, help="their number (default: 2)"
    )
    group.add_argument("--no-vat", dest="vat", action="store_false", help="do not change features")
    group.add_argument(
        "--xi",
        type=float,
        default=0.1,
        metavar="ξ",
        help="step at which T-VAT's gradient is taken (default: 0.1; the release: 1e-6, too small "
        "for float32)",
    )
    group.add_argument(
        "--no-conf-weight",
        dest="conf_weight",
        action="store_false",
        help="all pixels above the threshold weigh 1 instead of κ",
    )
    group.add_argument(
        "--strong-aug",
        choices=["both", "unlabelled", "labelled", "none"],
        default="both",
        help="of which images the student sees the strong view (default: both)",
    )
    group.add_argument(
        "--teachers-from-scratch",
        action="store_true",
        help="the teachers' backbones have random weights at first, as in the release",
    )
    group.add_argument(
        "--conf-thresh", type=float, default=0.6, metavar="τ", help="of κ (default: 0.6)"
    )
    group.add_argument("--unsup-weight", type=float, metavar="W", help="w, of L_u")
    group.add_argument(
        "--ramp-epochs", type=float, metavar="T", help="epochs after the warm-up until w is reached"
    )
    group.add_argument(
        "--warmup-epochs", type=float, metavar="N", help="passes over the labelled images"
    )
    group.add_argument("--ema-decay", type=float, metavar="α", help="of the active teacher")


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse values that cannot work; argparse prints one line and exits with 2."""
    if not (0 <= args.ema_decay < 1 and 0 <= args.conf_thresh <= 1):
        parser.error("--ema-decay lies in [0,1), --conf-thresh in [0,1]")
    if args.xi <= 0:
        parser.error(f"--xi {args.xi}: above 0; --no-vat leaves T-VAT out")
    if not all(x >= 0 for x in (args.unsup_weight, args.ramp_epochs, args.warmup_epochs)):
        parser.error("--unsup-weight, --ramp-epochs and --warmup-epochs are not negative")


class Network(DeepLabV3Plus):
    """DeepLabv3+ whose decoder can get changed features."""

    def forward(self, images: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits (N,C,h,w) of images (N,3,H,W); `change` gives what is added to the features."""
        with self.precision(images):
            low, _, high = self.backbone(images)
            features = self.fuse(low, high)
            if change is None:
                return self.decode(features)
        # In bfloat16 much of so small a change would be lost in rounding.
        with torch.autocast(images.device.type, enabled=False):
            features = features.float()
            return self.decode(features + change(features.detach()))

    def decode(self, features: Tensor) -> Tensor:
        """Logits of the features that the decoder gets."""
        return self.classifier(self.decoder(features))


def strong_view(sample: dict, item: Item) -> dict:
    """Add the strong view: jitter, grey and blur, each by chance."""
    return {**sample, "image_strong": colour_jitter_and_blur(sample["image"])}


def student_view(batch: dict, kind: str, args: argparse.Namespace) -> Tensor:
    """The view that the student gets of a batch, normalised; `kind`: "labelled" or "unlabelled"."""
    strong = args.strong_aug in (kind, "both")
    return normalise(batch["image_strong" if strong else "image"], batch["valid_mask"])


# --------------------------------------------------------------------------------------- the method


def cosine_ramp(done: float, length: float) -> float:
    """Step 7: ½ (1 - cos(π·done/length)), and 1 from `length` on."""
    if done >= length:
        return 1.0
    return 0.5 * (1 - math.cos(math.pi * done / length))


def strict_mean(active: Tensor, other: Tensor, kept: int = KEPT_LOGITS) -> Tensor:
    """Step 3: the mean of both teachers' logits (N,C,h,w), of the other one the highest alone.

    Where a logit of the other teacher is not among the `kept` highest of its pixel, the active
    one's stands for it.
    """
    if kept < other.shape[1]:
        least = other.topk(kept, dim=1).values[:, -1:]  # of those that are kept
        other = torch.where(other >= least, other, active)
    return (active + other) / 2


def without_dropout(network: nn.Module) -> None:
    """Train mode, in which BatchNorm takes the statistics of the batch, but nothing is dropped."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.Dropout2d):
            module.eval()


def beta_boxes(count: int, size: int, seed: int, iteration: int) -> tuple[Tensor, Tensor]:
    """Step 4: the boxes of this process's images, and the images that they are cut from.

        λ ~ Beta(4,4), the same for all;   side = sqrt(1-λ) · size,
        centre uniform over the lower right 7/8 of each axis; the box is clipped to the image

    Source: the release (train.py, rand_bbox_1 and cut_mix).

    Returns:
        (count,1,4) int64: top, left, bottom, right in pixels, the last two exclusive; and (count,)
        int64, a random order of the images.
    """
    everywhere = np.random.default_rng(derive_seed(seed, iteration, 0xBE7A))
    half = int(size * math.sqrt(1 - everywhere.beta(4, 4))) // 2
    mine = np.random.default_rng(derive_seed(seed, iteration, distributed.rank(), 0xBE7B))
    first = count * distributed.rank()
    centre = everywhere.integers(size // 8, size, (count * distributed.world_size(), 2))
    centre = centre[first : first + count]
    corners = np.concatenate([centre - half, centre + half], 1).clip(0, size)
    return torch.from_numpy(corners)[:, None], torch.from_numpy(mine.permutation(count))


def teachers_direction(teachers: Sequence[Network], xi: float) -> Callable[[Tensor], Tensor]:
    """Step 5: a function that gives r for features (N,F,h,w); in it BatchNorm is in eval mode."""

    def mean_logits(features: Tensor) -> Tensor:
        return sum(teacher.decode(features) for teacher in teachers) / len(teachers)

    def change(features: Tensor) -> Tensor:
        for teacher in teachers:
            teacher.decoder.eval()
        found = direction(mean_logits, features, xi, EPSILON)
        for teacher in teachers:
            teacher.decoder.train()
        return found

    return change


def confidence_weighted(
    logits: Tensor, label: Tensor, confidence: Tensor, valid_mask: Tensor, threshold: float,
    weighted: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Step 6: L_u = Σ_{κ >= τ} κ·CE(z, ŷ) / #{κ >= τ}.

    Args:
        logits: (N,C,h,w) of the student.
        label: ŷ, (N,H,W).
        confidence: κ, (N,H,W).
        valid_mask: (N,H,W), False on padding.
        threshold: τ.
        weighted: False gives every pixel above τ the weight 1.

    Returns:
        The loss over the pixels of all processes, 0 where none is confident; and the share of valid
        pixels that are.
    """
    counted = (confidence >= threshold) & valid_mask
    weight = counted * (confidence if weighted else torch.ones_like(confidence))
    total = cross_entropy(logits, label, ignore_index=IGNORE, pixel_weight=weight, reduction="sum")
    share = add_up(counted.sum()) / add_up(valid_mask.sum()).clamp_min(1)
    return global_mean(total, counted.sum()), share


@torch.no_grad()
def label_and_mix(
    teachers: Sequence[Network],
    active: int,
    batch_u: dict,
    iteration: int,
    args: argparse.Namespace,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Steps 3 and 4: mixed strong views, and the teachers' labels of them.

    Args:
        teachers: one or two, in train mode.
        active: which of them is active.
        batch_u: unlabelled images, weak and strong views.
        iteration: iterations done, for the boxes.
        args: `seed`, `strong_aug`.

    Returns:
        x_m, (N,3,H,W); ŷ_m, (N,H,W) uint8; κ_m, (N,H,W); valid_mask, (N,H,W); and the share of
        pixels on which the teachers agree.
    """
    valid_mask = batch_u["valid_mask"]
    size = valid_mask.shape[1:]

    # z' = ½·z_1 + ½·z_2, κ and ŷ
    for teacher in teachers:
        without_dropout(teacher)
    weak = normalise(batch_u["image"], valid_mask)
    logits = [teacher(weak) for teacher in teachers]
    logits_t = logits[active]
    if len(teachers) == 2:
        logits_t = strict_mean(logits[active], logits[1 - active])
    found = pseudo_label(logits_t, size, with_confidence=True)
    agreement = (logits[0].argmax(1) == logits[-1].argmax(1)).float().mean()

    # x_m, ŷ_m, κ_m: a box of each image comes from one of the batch in another order
    seen = student_view(batch_u, "unlabelled", args)
    boxes, order = beta_boxes(len(weak), size[0], args.seed, iteration)
    mask = rasterise(boxes.to(weak.device, non_blocking=True), size[0])
    order = order.to(weak.device, non_blocking=True)

    parts = seen, found.label, found.confidence, valid_mask
    return *(mix(mask, part[order], part) for part in parts), agreement


def warm_up_step(
    student: nn.Module, teachers: Sequence[nn.Module], batch_l: dict, args: argparse.Namespace
) -> dict[str, Tensor]:
    """Step 1: all networks learn from labelled images; the loss is the sum of theirs.

    The student's alone is `loss_sup`; what is measured later is 0.
    """
    target = batch_l["target"]
    loss_sup = labelled_loss(student(student_view(batch_l, "labelled", args)), target, args.ohem)

    weak = normalise(batch_l["image"], batch_l["valid_mask"])
    losses = [labelled_loss(teacher(weak), target, args.ohem) for teacher in teachers]
    later = dict.fromkeys(LATER_MEASURES, torch.zeros_like(loss_sup))
    return {"loss": loss_sup + sum(losses), "loss_sup": loss_sup, **later}


def train_step(
    student: nn.Module,
    teachers: Sequence[Network],
    active: int,
    batch_l: dict,
    batch_u: dict,
    weight: float,
    iteration: int,
    args: argparse.Namespace,
) -> dict[str, Tensor]:
    """Steps 3 to 7: the losses of one iteration.

    Args:
        student: the network that learns, as it is trained.
        teachers: one or two, in train mode, without gradients.
        active: which of them is active.
        batch_l, batch_u: labelled and unlabelled images, weak and strong views.
        weight: w(t).
        iteration: iterations done, for the boxes.
        args: the settings.

    Returns:
        The measures to log, scalars on the device.
    """
    # 3., 4. x_m, ŷ_m, κ_m
    mixed = label_and_mix(teachers, active, batch_u, iteration, args)
    images_m, label_m, conf_m, valid_m, agreement = mixed

    # 5. r, for the features of each forward pass
    change = teachers_direction(teachers, args.xi) if args.vat else None

    # 6. L_s = CE(f(x_l), y)
    images_l, target_l = student_view(batch_l, "labelled", args), batch_l["target"]
    loss_sup = labelled_loss(student(images_l, change), target_l, args.ohem)

    # L_u = Σ_{κ >= τ} κ·CE / #{κ >= τ}
    loss_unsup, confident = confidence_weighted(
        student(images_m, change), label_m, conf_m, valid_m, args.conf_thresh, args.conf_weight
    )

    # 7. L = L_s + w(t)·L_u
    return {
        "loss": loss_sup + weight * loss_unsup,
        "loss_sup": loss_sup,
        "loss_unsup": loss_unsup,
        "confident": confident,
        "agreement": agreement,
    }


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Step 8: teacher <- decay·teacher + (1-decay)·student, BatchNorm's statistics included."""
    theirs, ours = list(teacher.parameters()), list(student.parameters())
    for old, new in zip(teacher.buffers(), student.buffers()):
        if old.is_floating_point():
            theirs.append(old)
            ours.append(new)
    torch._foreach_lerp_(theirs, ours, 1 - decay)


def build_networks(run: Run, args: argparse.Namespace) -> tuple[Network, list[Network]]:
    """The student, and the teachers: the same backbone, or one without pretrained weights."""
    student = run.place(Network.from_settings(args, run.data.num_classes))
    own = copy.copy(args)
    if args.teachers_from_scratch:
        own.weights = "none"
    count = range(args.teachers)
    return student, [run.place(Network.from_settings(own, run.data.num_classes)) for _ in count]


def end_warm_up(mean: MeanLogits, optimizer: torch.optim.Optimizer) -> list:
    """From now on the teachers are averages: no gradients, no momentum; returns an empty list."""
    mean.requires_grad_(False)
    for parameter in mean.parameters():
        parameter.grad = None
        optimizer.state.pop(parameter, None)
    return []


def validate(
    run: Run, mean: MeanLogits, student: nn.Module
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Scores of all networks, and what else is measured of them."""
    networks = {"teachers": mean}
    if len(mean.members) > 1:
        networks |= {f"teacher_{index}": net for index, net in enumerate(mean.members, start=1)}
    networks["student"] = student
    scores = evaluate(networks, run.data.val, run.data, run.args)
    return scores, {"student_miou": scores["student"].miou, **run.audit(mean)}


def main(args: argparse.Namespace) -> None:
    """Train a student and the averages of it that teach it."""
    run = Run(args)
    data = run.data
    student, teachers = build_networks(run, args)
    mean = MeanLogits(teachers)
    optimizer = sgd([student, *teachers], args)
    run.keep(result="teachers", teachers=mean, student=student, optimizer=optimizer)
    trained = run.parallel(student)
    epoch_l = len(data.labelled) / (args.batch_size * distributed.world_size())
    warm_up = round(args.warmup_epochs * epoch_l)  # iterations
    if warm_up >= run.schedule.total and not args.eval_only:
        raise InputError(
            f"nothing of {run.schedule.total} iterations is left after a warm-up of {warm_up}; "
            "lower --warmup-epochs"
        )
    # Only while they are trained do the teachers' gradients pass between the processes.
    learning = [run.parallel(teacher) for teacher in teachers] if run.start < warm_up else []
    if not learning:
        end_warm_up(mean, optimizer)

    loaders = (
        run.batches(data.labelled, 0, strong_view),
        run.batches(data.unlabelled, 1, strong_view),
    )
    for iteration, (batch_l, batch_u) in run.iterations(*loaders):
        if run.evaluates():
            run.report(*validate(run, mean, student))
        if iteration < warm_up:  # 1.
            measured = warm_up_step(trained, learning, batch_l, args)
            run.step(measured["loss"], optimizer)
            run.log(measured)
            continue

        if learning:
            learning = end_warm_up(mean, optimizer)
        done = iteration - warm_up
        active = done // run.schedule.per_epoch % len(teachers)  # 2.
        weight = args.unsup_weight * cosine_ramp(done / run.schedule.per_epoch, args.ramp_epochs)
        measured = train_step(trained, teachers, active, batch_l, batch_u, weight, iteration, args)
        # 7., 8. The student's step; then the average.
        run.step(measured["loss"], optimizer)
        ema_update(teachers[active], student, args.ema_decay)
        run.log(measured)
    run.finish(*validate(run, mean, student))


if __name__ == "__main__":
    runtime.launch(main, parse_args())
