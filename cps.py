"""CPS: Cross Pseudo Supervision, with CutMix by default.

Chen, Yuan, Zeng, Wang; CVPR 2021, arXiv:2106.01226. Two networks, alike but for their
initialisation, teach each other: the hard labels of one are the targets of the other.

    x_l --+--> f1 --> CE(p1, y) --+
          +--> f2 --> CE(p2, y) --+--> L_s

    u0, u1 --+--> f1 --> argmax --> mixed by m --> ŷ1 ---------------+      no gradient
             +--> f2 --> argmax --> mixed by m --> ŷ2 --+            |      through ŷ1, ŷ2
             |                                          v            |
             +--> mixed by m --> x_m --+--> f1 --> CE(p1, ŷ2) --+    v
                                       +--> f2 -----------------|-> CE(p2, ŷ1) --+
                                                                +----------------+--> L_cps

1. Take labelled images x_l and two independent unlabelled batches u0, u1.
2. Supervise both networks (cityscapes: online hard example mining, OHEM):               [section 3]
       L_s = CE(f1(x_l), y) + CE(f2(x_l), y)
3. Draw a mask m for each image: three boxes, XOR-ed. Each covers a/3 of the image, with a from
   U(1/4, 1/2).
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
4. One process does what P = 4 (voc) or 8 (cityscapes) do in the release. There the loss is divided
   by P before the gradients are averaged, so that its gradient is g/P. PRESETS have a P-th of its
   learning rate and P times its weight decay, which comes to the same. The updates are then equal
   where all processes have equally many valid pixels: the release averages the means of its
   processes, while here every pixel weighs the same.
5. OHEM compares the pixels of all images of a process. The release does so, too, but has one image
   on each of its 8 processes: every image keeps its own hardest pixels.
6. Images of VOC are evaluated whole; the release pads them to 512 pixels. On Cityscapes the
   probabilities of overlapping windows are added up; the release adds logits. It evaluates the
   checkpoints of many epochs (20 to 34 on VOC); here the last one is the result.
7. The network is this project's DeepLabv3+: 7x7 stem, ReLU, dropout 0.5 (shapes 0.1) after ASPP.
   The release has three 3x3 convolutions as its stem, dilations 2, 4, 8 in the last stage,
   LeakyReLU in ASPP, no dropout, and starts its head with Kaiming's fan-in rule.
8. With CutMix, BatchNorm's running statistics see the labelled batch first and the mixed one last.
   In the release the labelled batch is the last.
9. Images are antialiased when they are scaled down; the release's are not.
10. The presets train a ResNet-50, as the released scripts do. The paper's tables list ResNet-101
    beside it, with higher figures: --backbone resnet101.

    python cps.py                                            # built-in data, a CPU
    python cps.py --data voc --data-dir VOCdevkit --split 1/8 --amp bf16
"""

import argparse
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import cli, runtime
from common.augment import IGNORE, normalise
from common.cutmix import mix, xor_box_masks
from common.deeplabv3plus import DeepLabV3Plus
from common.distributed import global_mean
from common.evaluate import evaluate
from common.losses import labelled_loss, mean_cross_entropy
from common.run import Run, sgd
from kernels import pseudo_label, soft_consistency

# All settings of a data set; a flag of the same name, where there is one, replaces it. Unless a
# comment says otherwise, those of voc and cityscapes are the released configurations (exp.voc,
# exp.city; the epochs stand in the release's docs/getting_started.md). CPS was not published for
# the other data sets: their settings are our own choice.
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
    # λ, with CutMix and without. Published with CutMix: 1, which varied more between seeds; see
    # common/results/README.md.
    "cps_weight": {"cutmix": 0.5, "plain": 1.5},
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
    "cps_weight": {"cutmix": 1.0, "plain": 1.5},
    "eval_window": 0,
    "eval_interval": 10,
}
VOC = {
    "backbone": "resnet50",
    "weights": "imagenet",
    "output_stride": 16,
    "dropout": 0.5,  # our choice (difference 7)
    # Passes over the unlabelled images: 39 300 to 39 700 iterations.
    "epochs": {"1/16": 32, "1/8": 34, "1/4": 40, "1/2": 60},
    "max_iters": 39_000,  # of every other split; our choice
    "batch_size": 8,
    "crop_size": 512,
    "scale": "0.5,0.75,1,1.5,1.75,2",
    # Released: lr = 0.01 (0.0025 times 4 processes) with decay wd = 1e-4, and g/4 instead of the
    # averaged gradient g (difference 4). An SGD step is the same with a quarter of the rate and
    # four times the decay: lr·(g/4 + wd·θ) = (lr/4)·(g + 4·wd·θ).
    "lr": 0.0025,
    "head_lr_mult": 1.0,
    "weight_decay": 4e-4,
    "decay_norm": False,  # BatchNorm and biases do not decay
    "ohem": None,
    "cps_weight": {"cutmix": 1.0, "plain": 1.5},
    "eval_window": 0,  # our choice (difference 6)
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
    "ohem": (0.7, 50_000),  # probability, pixels an image
    "cps_weight": {"cutmix": 5.0, "plain": 6.0},
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
    """The settings of a run: the shared flags and those of CPS."""
    parser = cli.parser(__doc__, PRESETS)
    group = parser.add_argument_group("CPS")
    group.add_argument(
        "--no-cutmix",
        dest="cutmix",
        action="store_false",
        help="cross supervision without CutMix, on labelled images too",
    )
    group.add_argument(
        "--soft",
        action="store_true",
        help="CPC: squared distance of probabilities instead of hard labels",
    )
    group.add_argument(
        "--cps-weight",
        type=float,
        metavar="λ",
        help="of L_cps (default: 1, shapes 0.5, cityscapes 5; without CutMix 1.5, cityscapes 6)",
    )
    given, _ = parser.parse_known_args(argv)
    method = "cps" + ("" if given.cutmix else "-nocutmix") + ("-soft" if given.soft else "")
    args = cli.finish(parser, PRESETS, method, argv)
    if isinstance(args.cps_weight, dict):
        args.cps_weight = args.cps_weight["cutmix" if args.cutmix else "plain"]
    if not args.cps_weight >= 0:
        parser.error("--cps-weight is not negative")
    return args


# --------------------------------------------------------------------------------------- the method


class Pseudo(NamedTuple):
    """What one network teaches the other: its labels, and for CPC the logits that they come from.

    Attributes:
        label: (N,H,W) uint8, ŷ.
        logits: (N,C,h,w), without gradient; with CutMix those of u0; None unless for CPC.
        mask: (N,H,W) bool, m: where a pixel is one of u1; None without CutMix.
        inside: (N,C,h,w), the logits of u1; None without CutMix.
    """

    label: Tensor
    logits: Tensor | None
    mask: Tensor | None = None
    inside: Tensor | None = None


def cps_loss(logits: Tensor, pseudo: Pseudo, valid_mask: Tensor) -> Tensor:
    """One direction of L_cps: mean over the valid pixels of CE(p1, ŷ2).

    Args:
        logits: (N,C,h,w) of the network that learns.
        pseudo: of the other network.
        valid_mask: (N,H,W) bool, False on padding.

    Returns:
        A scalar. Source: section 3, arXiv:2106.01226.
    """
    return mean_cross_entropy(logits, pseudo.label.masked_fill(~valid_mask, IGNORE))


def cpc_loss(logits: Tensor, pseudo: Pseudo, valid_mask: Tensor) -> Tensor:
    """One direction of CPC, L_cps with --soft: mean over the valid pixels of sum_c (p1 - p2)².

    With CutMix p2 = m·p2(u1) + (1-m)·p2(u0).

    Args:
        logits: (N,C,h,w) of the network that learns.
        pseudo: of the other network.
        valid_mask: (N,H,W) bool, False on padding.

    Returns:
        A scalar. Source: cross probability consistency, arXiv:2106.01226.
    """
    mixed = {"mask": pseudo.mask, "second": pseudo.inside}
    found = soft_consistency(logits, pseudo.logits, valid_mask, mode="squared", **mixed)
    return global_mean(found.loss, found.count)


def overlap(label_1: Tensor, label_2: Tensor, valid_mask: Tensor, background: int | None) -> Tensor:
    """Share of equal labels over the valid pixels where either network predicts an object (Fig. 7).

    Args:
        label_1, label_2: (N,H,W) labels of the two networks.
        valid_mask: (N,H,W) bool.
        background: the class that is no object; None counts every class.

    Returns:
        A scalar in [0,1].
    """
    counted = valid_mask
    if background is not None:
        counted = valid_mask & ((label_1 != background) | (label_2 != background))
    return ((label_1 == label_2) & counted).sum() / counted.sum().clamp_min(1)


@torch.no_grad()
def pseudo_of(logits: Tensor, size: tuple[int, int], soft: bool) -> Pseudo:
    """Labels at `size` = (H,W) of logits (N,C,h,w); for CPC (`soft`) these logits, too."""
    return Pseudo(pseudo_label(logits, size).label, logits.detach() if soft else None)


@torch.no_grad()
def mixed_pseudo(
    network: nn.Module, images_0: Tensor, images_1: Tensor, mask: Tensor, soft: bool
) -> Pseudo:
    """Step 4: ŷ_k = m·argmax f_k(u1) + (1-m)·argmax f_k(u0), from the unmixed images (N,3,H,W)."""
    size = images_0.shape[2:]
    outside, inside = (pseudo_of(network(images), size, soft) for images in (images_0, images_1))
    return Pseudo(mix(mask, inside.label, outside.label), outside.logits, mask, inside.logits)


def train_step(
    f1: nn.Module,
    f2: nn.Module,
    batch_l: dict,
    batches_u: list[dict],
    iteration: int,
    args: argparse.Namespace,
    background: int | None,
) -> dict[str, Tensor]:
    """Steps 1 to 6: the losses of one iteration, scalars on the device.

    Args:
        f1, f2: the networks.
        batch_l: labelled images.
        batches_u: two independent batches of unlabelled images, or one without CutMix.
        iteration: iterations done, for the masks.
        args: `cutmix`, `soft`, `cps_weight`, `ohem`, `seed`.
        background: see `overlap`.
    """
    # 1. Images, normalised on the device.
    images_l, target_l = normalise(batch_l["image"], batch_l["valid_mask"]), batch_l["target"]
    images_u = [normalise(batch["image"], batch["valid_mask"]) for batch in batches_u]  # (N,3,H,W)
    size = target_l.shape[1:]

    # 2. L_s = CE(f1(x_l), y) + CE(f2(x_l), y), from logits at stride 4, (N,C,H/4,W/4).
    logits_l1, logits_l2 = f1(images_l), f2(images_l)
    loss_sup = sum(labelled_loss(z, target_l, args.ohem) for z in (logits_l1, logits_l2))

    if args.cutmix:
        # 3. One mask an image, (N,H,W) bool; x_m = m·u1 + (1-m)·u0
        mask = xor_box_masks(len(target_l), size[0], args.seed, iteration, target_l.device)
        images_m = mix(mask, images_u[1], images_u[0])
        valid_mask = mix(mask, batches_u[1]["valid_mask"], batches_u[0]["valid_mask"])

        # 4. Each forward pass has its own batch statistics, as released.
        pseudo_1 = mixed_pseudo(f1, *images_u, mask, args.soft)
        pseudo_2 = mixed_pseudo(f2, *images_u, mask, args.soft)
        logits_1, logits_2 = f1(images_m), f2(images_m)
    else:
        # 3., 4. Labelled and unlabelled images, with labels from this very forward pass.
        logits_1 = torch.cat([logits_l1, f1(images_u[0])])
        logits_2 = torch.cat([logits_l2, f2(images_u[0])])
        valid_mask = torch.cat([batch_l["valid_mask"], batches_u[0]["valid_mask"]])
        pseudo_1, pseudo_2 = (pseudo_of(z, size, args.soft) for z in (logits_1, logits_2))

    # 5. L_cps = CE(f1(x_m), ŷ2) + CE(f2(x_m), ŷ1); CPC: |p1 - p2|², likewise
    one_direction = cpc_loss if args.soft else cps_loss
    loss_unsup_1 = one_direction(logits_1, pseudo_2, valid_mask)
    loss_unsup = loss_unsup_1 + one_direction(logits_2, pseudo_1, valid_mask)

    # 6. L = L_s + λ·L_cps
    loss = loss_sup + args.cps_weight * loss_unsup

    return {
        "loss": loss,
        "loss_sup": loss_sup,
        "loss_unsup": loss_unsup,
        "overlap": overlap(pseudo_1.label, pseudo_2.label, valid_mask, background),
    }


def main(args: argparse.Namespace) -> None:
    """Train two networks that teach each other, and evaluate the first."""
    run = Run(args)
    data = run.data
    f1, f2 = (run.place(DeepLabV3Plus.from_settings(args, data.num_classes)) for _ in range(2))
    optimizer = sgd([f1, f2], args)
    run.keep(result="model_1", model_1=f1, model_2=f2, optimizer=optimizer)
    trained_1, trained_2 = run.parallel(f1), run.parallel(f2)

    labelled = run.batches(data.labelled, stream=0)
    streams = (1, 2) if args.cutmix else (1,)
    unlabelled = [run.batches(data.unlabelled, stream) for stream in streams]
    for iteration, (batch_l, *batches_u) in run.iterations(labelled, *unlabelled):
        if run.evaluates():
            scores = evaluate({"model_1": f1}, data.val, data, args)
            run.report(scores, run.audit(f1))
        measured = train_step(
            trained_1, trained_2, batch_l, batches_u, iteration, args, data.background
        )
        run.step(measured["loss"], optimizer)  # 7.
        run.log(measured)

    scores = evaluate({"model_1": f1, "model_2": f2}, data.val, data, args, average=True)
    run.finish(scores, run.audit(f1))


if __name__ == "__main__":
    runtime.launch(main, parse_args())
