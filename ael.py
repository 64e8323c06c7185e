"""AEL: adaptive equalisation learning, for the classes that a network knows least.

Hu, Wei, Hu, Ye, Cui, Wang; NeurIPS 2021, arXiv:2110.05474.

    bank: Conf^c, how sure the student is of the true class --+--> what is pasted, mixed and kept
                                                              |
    x_l, y --+-- copy-paste of weak classes --> x_l', y' --> student f --> L_s
             |                                    '-------> teacher f' --> ŷ_l --+
    other labelled images                                                        +--> w·CE --> L_u
    u1 --+-- adaptive CutMix --> x_m -----------> student f --> p_m -------------+
    u2 --'       ^ box around a weak class in u2        teacher f' --> ŷ_m ------'

1. Take labelled images x_l and others to paste from, and unlabelled images u1.
2. Copy-paste (ACP): K classes are drawn for the whole batch, with repetition, with probabilities
   softmax(sqrt(1 - Conf^c)); with chance ½ all their pixels in another labelled image, of another
   scale, are pasted at the same place: x_l', y'. Supervise the student on the result (voc,
   cityscapes, and folder on a GPU: on the hard pixels, OHEM, and with an auxiliary head):
       L_s = CE(f(x_l'), y')
3. Bank:  Conf^c <- 0.999·Conf^c + 0.001·(mean of p_c(x_l') over the pixels of class c)    [Eq. (4)]
4. Adaptive CutMix (ACM): for each u1 a class c is drawn with probabilities softmax(1 - Conf), by
   the bank before step 3, and a crop u2 in which the teacher has seen it. The box M bounds a random
   connected region of c in argmax f'(u2), or is CutMix-Seg's, of half the area, without one:
       x_m = M·u2 + (1-M)·u1,   ŷ_m = M·ŷ(u2) + (1-M)·ŷ(u1),   κ_m alike, κ = max p'
5. Sampling (AES), by the bank as it is now: a pixel which the student predicts as c is kept with
   probability
       s^c = ((1 - Conf^c) / max_k (1 - Conf^k))^β
6. Re-weighting (DRW):
       w = κ^γ · kept,   L_u = Σ w·CE(f(x), ŷ) / Σ w                              [Eq. (10) to (12)]
   on x_m; on voc and cityscapes also on x_l' with the teacher's labels, and the two are added.
7. L = L_s + α·L_u;  SGD step for the student.
8. teacher <- d·teacher + (1-d)·student,   d = min(1 - 1/(t+1), 0.99) at iteration t = 0, 1, ...
The teacher is the result; the student is reported beside it.

| symbol   | variable           | symbol | variable   | symbol  | variable          |
|----------|--------------------|--------|------------|---------|-------------------|
| x_l', y' | images_l, target_l | x_m    | images_m   | L_s     | loss_sup          |
| f, f'    | student, teacher   | ŷ_m    | label_m    | L_u     | loss_unsup        |
| Conf     | bank.confidence    | κ_m    | conf_m     | α       | args.unsup_weight |
| s        | rates              | M      | mask       | β       | args.sampling_exp |
| K        | args.copy_classes  | d      | decay      | γ       | args.gamma        |

`kept` is the share of pixels that sampling keeps, `pasted` the share that copy-paste replaces,
`found` the share of boxes that bound a region of the class that was drawn. The mean of Conf over
the classes and its lowest value are `confidence` and `confidence_lowest`.

Differences from the paper and the released code (hzhupku/SemiSeg-AEL):
1. A class that no labelled pixel of a batch has keeps its confidence, which begins with 0. In the
   release it counts as confidence 0, so that a rare class loses confidence because it is rare, and
   the bank begins with random numbers: --bank-as-released. There each process has a bank of its own
   that no checkpoint keeps, and a class is absent if its 2 images lack it; here there is one bank
   for all, which is kept, as is the pool of 3, and a class is absent if the whole batch lacks it.
2. The classes to paste are drawn with the square root of 1 - Conf, as released; the paper has none.
   In the release the classes 0, 1, 2, 8 and 10 are never pasted, whatever the data set, though they
   are road, sidewalk, building, vegetation and sky of Cityscapes. Here these are left out on
   Cityscapes, and elsewhere the background: --copy-paste-classes names others. There each process
   draws K classes for its 2 images; here K serve the whole batch, on VOC one instead of up to 8.
3. Where the release reads u2 anew from all unlabelled images, in the middle of a step, here it is
   one of the last `--pool` crops, labelled again. All images u1 of a batch are mixed, there one of
   each two.
4. Connected regions, and which classes a crop has, are found at the resolution of the logits, a
   quarter of the image's. The box is that of the region, whatever its size, as the released
   settings have it (no_pad, no_slim).
5. The paper's L_u is on unlabelled images; the release adds the same on labelled ones, with the
   teacher's labels: --labelled-consistency. That is the preset of voc and cityscapes. On the
   built-in set with rare classes the paper's does better (common/results), and is the preset
   elsewhere.
6. Σ w is taken over all pixels of the batch and of all processes; the paper's Eq. (12) divides in
   each image, and so does the release on mixed images, of which a process there has one. Labels
   below the threshold of voc add nothing to the loss, and their weight counts, as released. Padding
   counts nowhere; in the release it is image, on labelled crops of class 0.
7. Which pixels are kept is drawn for each image; in the release the images of a process share a
   map for each class. OHEM chooses among the 2 images of a process there, here among all that a
   process has.
8. The teacher runs in train mode with BatchNorm statistics of its own, as released. They are of
   labelled and unlabelled images: it sees x_l' also where ŷ_l is not asked for.
9. The network is this project's DeepLabv3+, ResNet-50 in the presets. The release's ResNet-101 has
   a stem of three 3x3 convolutions and multi-grid; its low-level features keep 256 channels (here
   48), a 3x3 convolution projects ASPP (here 1x1), and its decoder has three Dropout2d(0.1) (here
   one, after ASPP). Images are antialiased when they are scaled down; the release's are not. In the
   release the teacher is not a copy of the student at first, but is one after the first iteration,
   d being 0.
10. The release draws its labelled images by the seed. It validates centre crops, on VOC of 513
    pixels, which are larger than any image and padded with class 0. On Cityscapes they choose the
    checkpoint that is then scored with sliding windows; here the last one is the result.

    python ael.py                                            # built-in data, a CPU
    python ael.py --data shapes-zipf                         # with rare classes
    python ael.py --data voc --data-dir VOCdevkit --split 1/8 --amp bf16
"""

import argparse
import copy
import os

import torch
from torch import Tensor, nn

from common import cli, runtime
from common.adaptive import (
    NEVER_PASTED,
    ConfidenceBank,
    ImagePool,
    adaptive_cutmix,
    adaptive_loss,
    copy_paste_step,
    pasted_classes,
    sampling_rates,
    teacher_labels,
)
from common.deeplabv3plus import DeepLabV3Plus, conv_bn_relu, initialise
from common.distributed import add_up
from common.evaluate import Scores, evaluate
from common.losses import labelled_loss
from common.run import Run, sgd

# All settings of a data set; a flag of the same name, where there is one, replaces it. Unless a
# comment says otherwise, those of voc and cityscapes are the released configurations
# (experiments/pascal_4, cityscapes_2, and train.py there), whose 8 processes with 2 images each are
# one here. They divide the loss by the processes before gradients are averaged, so that the
# gradient is an eighth of the average's: an eighth of the rate, eight times the decay. The other
# settings are our own choice.
SHAPES = {  # a small network with pretrained weights of its own, for a CPU
    "backbone": "tiny",
    "weights": "blots",
    "output_stride": 8,
    "dropout": 0.1,
    "max_iters": 900,
    "batch_size": 8,
    "crop_size": 64,
    "scale": "0.75,1,1.25,1.5",
    "paste_scale": "0.75,1,1.25,1.5",
    "lr": 0.03,
    "head_lr_mult": 3.0,
    "weight_decay": 1e-4,
    "decay_norm": False,
    "ohem": None,
    "aux_weight": 0.0,
    "labelled_consistency": False,
    "bank_momentum": 0.999,
    "copy_classes": 3,
    "region_share": 0.005,
    "listed_share": 0.01,
    "conf_thresh": 0.0,
    "pool": 256,
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
    "paste_scale": "halves:0.1-2",
    "lr": 0.01,
    "head_lr_mult": 1.0,
    "weight_decay": 4e-4,
    "decay_norm": False,
    "ohem": None,
    "aux_weight": 0.0,
    "labelled_consistency": False,
    "bank_momentum": 0.999,
    "copy_classes": 3,
    "region_share": 0.005,
    "listed_share": 0.01,
    "conf_thresh": 0.0,
    "pool": 128,
    "eval_window": 0,
    "eval_interval": 10,
}
VOC = {
    "backbone": "resnet50",  # released: resnet101
    "weights": "imagenet",
    "output_stride": 8,
    "dropout": 0.1,
    "epochs": 80,
    "batch_size": 16,
    "crop_size": 513,
    "scale": "half-or-double",
    "paste_scale": "halves:0.1-2",
    "lr": 0.00125,  # 0.01 on 8 processes
    "head_lr_mult": 10.0,
    "weight_decay": 8e-4,  # 1e-4 on 8 processes
    "decay_norm": True,
    "ohem": (0.7, 50_000),  # probability, pixels an image
    "aux_weight": 0.4,
    "labelled_consistency": True,
    "bank_momentum": 0.999,
    "copy_classes": 1,
    "region_share": 0.03,
    "listed_share": 0.03,
    "conf_thresh": 0.7,
    "pool": 64,  # our choice
    "eval_window": 0,  # whole images, our choice (difference 10)
    "eval_interval": 1,
}
CITYSCAPES = VOC | {
    "epochs": 200,
    "crop_size": 769,
    "copy_classes": 3,
    "region_share": 0.005,
    "listed_share": 0.01,
    "conf_thresh": 0.0,
    "eval_window": "crop",
    "eval_interval": 8,  # our choice; released: 1
}
FOLDER = VOC | {"output_stride": 16, "labelled_consistency": False}  # our choice
PRESETS = {
    "shapes": SHAPES,
    "shapes-zipf": SHAPES,
    "camvid": CAMVID,
    "voc": VOC,
    "cityscapes": CITYSCAPES,
    "folder": FOLDER,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run: the shared flags and those of AEL."""
    parser = cli.parser(__doc__, PRESETS)
    add_flags(parser)
    args = cli.finish(parser, PRESETS, "ael", argv)
    check(args, parser)
    return args


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add AEL's flags."""
    group = parser.add_argument_group("AEL")
    for name, text in (
        ("acp", "no copy-paste"),
        ("acm", "CutMix-Seg's boxes instead of adaptive ones"),
        ("aes", "keep every pixel"),
        ("drw", "give all pixels the same weight"),
    ):
        group.add_argument(f"--no-{name}", dest=name, action="store_false", help=text)
    group.add_argument(
        "--labelled-consistency",
        action=argparse.BooleanOptionalAction,
        help="L_u on labelled images, too, as in the release",
    )
    group.add_argument(
        "--bank-as-released",
        action="store_true",
        help="the confidence of a class that is not in a batch falls",
    )
    group.add_argument(
        "--copy-paste-classes",
        nargs="+",
        metavar="NAME",
        help="classes that may be pasted (default: all but the background; cityscapes: but "
        f"{', '.join(NEVER_PASTED)})",
    )
    group.add_argument("--copy-classes", type=int, metavar="K", help="classes that are drawn")
    group.add_argument("--gamma", type=float, default=2.0, metavar="γ", help="of w (default: 2)")
    group.add_argument(
        "--sampling-exp", type=float, default=1.0, metavar="β", help="of s^c (default: 1)"
    )
    group.add_argument(
        "--unsup-weight", type=float, default=1.0, metavar="α", help="of L_u (default: 1)"
    )
    group.add_argument("--bank-momentum", type=float, metavar="M", help="of the bank")
    group.add_argument("--conf-thresh", type=float, metavar="P", help="labels below it are ignored")
    group.add_argument("--pool", type=cli.positive, metavar="P", help="crops to choose u2 from")
    group.add_argument(
        "--region-share", type=float, metavar="X", help="of the pixels, of the region in a box"
    )
    group.add_argument(
        "--listed-share", type=float, metavar="X", help="... of a class that a crop is listed for"
    )
    group.add_argument(
        "--ema-decay", type=float, default=0.99, metavar="D", help="d (default: 0.99)"
    )


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse values that cannot work; argparse prints one line and exits with 2."""
    if not (0 <= args.ema_decay < 1 and 0 <= args.bank_momentum < 1):
        parser.error("--ema-decay and --bank-momentum lie in [0,1)")
    if not (0 <= args.conf_thresh <= 1 and args.gamma >= 0 and args.sampling_exp >= 0):
        parser.error("--conf-thresh lies in [0,1]; --gamma and --sampling-exp are not negative")
    if not (0 <= args.region_share < 1 and 0 <= args.listed_share < 1):
        parser.error("--region-share and --listed-share lie in [0,1)")
    if not args.unsup_weight >= 0 or args.copy_classes < 1:
        parser.error("--unsup-weight is not negative, --copy-classes at least 1")
    if args.pool < args.batch_size * int(os.environ.get("WORLD_SIZE", 1)):
        parser.error(f"--pool {args.pool}: at least as many as the images of a batch")


class Network(DeepLabV3Plus):
    """DeepLabv3+ with an auxiliary head on `layer3`, where `aux_weight` asks for it."""

    def __init__(self, args: argparse.Namespace, num_classes: int):
        super().__init__(args.backbone, num_classes, args.weights, args.output_stride, args.dropout)
        self.auxiliary = None
        if args.aux_weight:
            width = self.feature_channels
            self.auxiliary = nn.Sequential(
                conv_bn_relu(self.backbone.mid_channels, width, 3),
                nn.Dropout2d(args.dropout),
                nn.Conv2d(width, num_classes, 1),
            ).apply(initialise)

    def forward(
        self, images: Tensor, with_auxiliary: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Logits (N,C,h,w) of images (N,3,H,W); with `with_auxiliary` the other head's, or None."""
        with self.precision(images):
            low, mid, high = self.backbone(images)
            logits = self.classifier(self.decoder(self.fuse(low, high)))
            if not with_auxiliary:
                return logits
            return logits, self.auxiliary(mid) if self.auxiliary else None


# --------------------------------------------------------------------------------------- the method


def supervise(
    student: nn.Module, images: Tensor, target: Tensor, args: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """The student's logits of labelled images, and L_s, with that of the auxiliary head."""
    logits, auxiliary = student(images, with_auxiliary=True)
    loss = labelled_loss(logits, target, args.ohem)
    if auxiliary is not None:
        loss = loss + args.aux_weight * labelled_loss(auxiliary, target, args.ohem)
    return logits, loss


def train_step(
    student: nn.Module,
    teacher: nn.Module,
    bank: ConfidenceBank,
    pool: ImagePool,
    allowed: Tensor,
    batches: list[dict],
    iteration: int,
    args: argparse.Namespace,
) -> dict[str, Tensor]:
    """Steps 1 to 7: the losses of one iteration.

    Args:
        student, teacher: the networks.
        bank, pool: what the method remembers; both change.
        allowed: (A,) the classes that may be pasted.
        batches: labelled images, labelled ones to paste from, unlabelled ones.
        iteration: iterations done.

    Returns:
        The measures to log, scalars on the device.
    """
    # 1., 2. Labelled images with weak classes pasted into them: x_l', y'
    batch_l, batch_p, batch_u = batches
    labelled = copy_paste_step(batch_l, batch_p, bank, allowed, iteration, args)
    images_l, target_l, valid_l, pasted = labelled

    # L_s = CE(f(x_l'), y')
    logits_l, loss_sup = supervise(student, images_l, target_l, args)

    # 4. x_m, ŷ_m, κ_m, with the classes that the bank calls weak before this batch
    with torch.no_grad():  # x_l' also for the teacher's BatchNorm
        label_l, conf_l = teacher_labels(teacher(images_l), valid_l, args.conf_thresh)
    mixed = adaptive_cutmix(teacher, batch_u, bank, pool, iteration, args)
    images_m, label_m, conf_m, valid_m, found = mixed

    # 3., 5. The bank takes in this batch;  s^c
    bank.update(logits_l.detach(), target_l)
    rates = sampling_rates(bank, args.sampling_exp) if args.aes else None

    # 6. L_u = Σ w·CE / Σ w, on x_m; where it is asked for, on x_l' too
    logits_m = student(images_m)
    options = {"rates": rates, "gamma": args.gamma if args.drw else 0.0}
    loss_unsup, kept = adaptive_loss(logits_m, label_m, conf_m, valid_m, **options)
    if args.labelled_consistency:
        again, _ = adaptive_loss(logits_l, label_l, conf_l, valid_l, **options)
        loss_unsup = loss_unsup + again

    # 7. L = L_s + α·L_u
    return {
        "loss": loss_sup + args.unsup_weight * loss_unsup,
        "loss_sup": loss_sup,
        "loss_unsup": loss_unsup,
        "kept": kept,
        "pasted": add_up(pasted.sum()) / add_up(valid_l.sum()).clamp_min(1),
        "found": found,
        "confidence": bank.confidence.mean(),
        "confidence_lowest": bank.confidence.min(),
    }


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Step 8: teacher <- decay·teacher + (1-decay)·student, the parameters alone."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)


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
    data, device = run.data, run.device
    student = run.place(Network(args, data.num_classes))
    teacher = copy.deepcopy(student).requires_grad_(False).train()
    optimizer = sgd([student], args)
    allowed = torch.tensor(pasted_classes(args, data), device=device)
    bank = ConfidenceBank(data.num_classes, args.bank_momentum, device, args.bank_as_released)
    pool = ImagePool(args.pool, data.num_classes, args.crop_size, device)
    states = {"optimizer": optimizer, "bank": bank, "pool": pool}
    run.keep(result="teacher", teacher=teacher, student=student, **states)
    trained = run.parallel(student)

    loaders = (
        run.batches(data.labelled, stream=0),
        run.batches(data.labelled, stream=1, scale=args.paste_scale),
        run.batches(data.unlabelled, stream=2),
    )
    for iteration, batches in run.iterations(*loaders):
        if run.evaluates():
            run.report(*validate(run, teacher, student))
        measured = train_step(trained, teacher, bank, pool, allowed, batches, iteration, args)
        # 7., 8. The student's step; then the average.
        run.step(measured["loss"], optimizer)
        ema_update(teacher, student, min(1 - 1 / (iteration + 1), args.ema_decay))
        run.log(measured)
    run.finish(*validate(run, teacher, student))


if __name__ == "__main__":
    runtime.launch(main, parse_args())
