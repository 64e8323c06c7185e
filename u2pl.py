"""U2PL: Using Unreliable Pseudo-Labels.

Wang, Wang, Shen, Fei, Li, Jin, Wu, Zhao, Le; CVPR 2022, arXiv:2203.03884. Pixels whose pseudo-label
is too uncertain to learn from still say which classes they are not: they become negatives of those
classes, in memory banks that a contrastive loss draws from. The teacher is a moving average of the
student.

    x_u -+-> teacher -> ŷ_u
         |               |
         '---> CutMix <--'
                 |
    x_l ---------+--> student -+-> p_l ------- y --------------------> L_s --+
                 |             +-> p_u ------- ŷ_u, where H < γ -----> L_u --+--> L -> SGD step
                 |             '-> features -- anchors a ------+-----> L_c --'
                 |                                             |
                 '--> teacher -+-> features -+- positives a+ --+
                               |             '- memory bank ---'  negatives a-
                               '-> p' -> H, γ, O(c): which pixels take part

    after each step:  teacher <- m·teacher + (1-m)·student

1. The teacher labels the unlabelled images x_u: ŷ_u = argmax p'. With chance 1/2 the batch is cut
   and mixed, images and labels alike.
2. The student sees labelled and mixed images together:                             [section 3.1]
       L_s = CE(p_l, y)
       (cityscapes: on the hard pixels, plus 0.4 times the same loss of an auxiliary head)
3. The teacher sees the same images; H is the entropy of its probabilities p'. Of the unlabelled
   pixels, the α_e percent with the highest H are unreliable:                       [section 3.2]
       α_e = α_0·(1 - iteration/total)      (dynamic partition adjustment, DPA)
       γ = the (100 - α_e)-th percentile of H; a pixel is reliable where H < γ
       L_u = (pixels / reliable pixels) · mean over reliable pixels of CE(p_u, ŷ_u)
4. Each pixel of the head's resolution gets its roles for each class c. O(c) is the rank of c in p',
   0 for the most probable class. Certain are labelled pixels, and unlabelled ones with H up to its
   α_e-th percentile (--anchors paper: with H < γ).                                 [section 3.3]
       positive of c:  certain pixels with label c, whatever p'(c) (paper: with p'(c) > δ_p, too)
       anchors of c:   certain pixels with label c and p'(c) > δ_p
       negatives of c: labelled pixels with y != c and O(c) < r_l; unreliable unlabelled pixels with
                       r_l <= O(c) < r_h (probability rank threshold, PRT)
5. The contrast, with cosine similarities a·a+ and a·a-:                            [section 3.3]
       a+:   mean of the teacher's features over the positive pixels of c
       bank: the teacher's features of the negatives of c enter, first in, first out
       a:    the student's features of 256 anchors of c;  a-: 50 keys of the bank for each of them
       L_c = mean over the classes in the batch and their anchors of
             -log( e^(a·a+/τ) / (e^(a·a+/τ) + sum of 50 e^(a·a-/τ)) )
6. L = L_s + L_u + λ_c·L_c
7. SGD step for the student; then the teacher, with m = min(1 - 1/t, 0.99) at t = 1, 2, ...:
       teacher <- m·teacher + (1-m)·student

Before, in the warm-up, L = L_s and the teacher is a copy of the student. The teacher is the result.

| symbol   | variable           | symbol   | variable       | symbol | variable                |
|----------|--------------------|----------|----------------|--------|-------------------------|
| x_l, y   | images_l, target_l | H        | entropy        | L_s    | loss_sup                |
| x_u, ŷ_u | images_u, label_u  | α_e, γ   | alpha, gamma   | L_u    | loss_unsup              |
| p_l      | logits[:n]         | O(c)     | rank_l, rank_u | L_c    | loss_contrast           |
| p_u      | logits[n:]         | r_l, r_h | ranks          | λ_c    | args.contrast_weight    |
| p'       | logits_t           | δ_p      | SURE           | m      | decay                   |
| a, a+    | anchors, positives | τ        | TEMPERATURE    | t      | iteration - warm_up + 1 |

Logged: `kept`, the share of unlabelled pixels in L_u; `anchors`, the share of all pixels that may
be anchors; `fill` of the bank.

Differences from the paper and from the released code:
1. Negatives. The release asks that the label of a negative of class c be c itself. Then a labelled
   pixel is never a negative, and an unlabelled one only where r_l <= O(c) < r_h holds for its own
   pseudo-label c. --negatives-as-released does the same; the default is the paper's rule, above.
2. Anchors. In the paper every reliable unlabelled pixel (H < γ) may be an anchor, and the positive
   is the mean over the pixels that may be anchors: --anchors paper. In the release unlabelled
   anchors are among the α_e percent with the lowest H, and the positive's mean does not ask for
   p'(c) > δ_p: --anchors released, the default.
3. Weight. λ_c is 0.1 in the paper and 1 in the release, which also divides the contrast by the
   number of processes, although DDP averages its gradient as it does that of L_s and L_u. In one
   process the contrast has therefore the weight 1/4 on VOC (4 GPUs) and 1/8 on Cityscapes (8 GPUs).
   These are the defaults of --contrast-weight.
4. Three faults of the release are not repeated. (a) Where n classes are present, it pairs anchors
   and positive of class i = 0, ..., n-1 with the bank of the i-th class present; classes from n on
   have no anchors. (b) It writes the one-hot labels of all images of a process into those of the
   first; in the contrast the other images have no label. (c) In the first epoch after the warm-up
   it gives the teacher the student's parameters again before every iteration.
5. Bank. It keeps 30 000 keys of every class (release: 50 000 of class 0), in float16, on the
   device, and is saved, so that --resume is exact. Of the new keys of a class, step and process, a
   random 1024 enter, so that shapes are fixed (release: all of them).
6. Processes. Percentiles, positives and the classes present are those of all processes; in the
   release each process has its own.
7. Schedule. α_e falls with the iteration, in the release with the epoch. CutMix rounds boxes to
   whole pixels; the release draws whole numbers.
8. Teacher. It drops no features; the release's does in step 3. In the warm-up it is a copy of the
   student. In the release it is then a network of its own, which gets the student's parameters
   after the warm-up but keeps its own BatchNorm statistics.
9. Network. It is this project's DeepLabv3+ (--backbone resnet101 is what U2PL's tables have). The
   release's ResNet-101 has a stem of three 3x3 convolutions and dilations 4, 8, 16 in its last
   three blocks. Its low-level features keep 256 channels (here 48), a 3x3 convolution projects ASPP
   (here 1x1), and there are five Dropout2d(0.1) (here one of 0.5, shapes 0.1): after that
   projection and after the two 3x3 convolutions of each head. The feature head reads 512 channels
   (here 304).
10. Images. Padding counts nowhere. The release labels it class 0, in training and where it
   validates centre crops (VOC: of 513 pixels, larger than any image), and on unlabelled images it
   counts in L_u and in the percentiles. Images are antialiased when scaled down; the release's not.

With --ael, as the authors' results on Cityscapes (branch with_AEL of the release), weak classes are
treated as `ael.py` does, which explains it: they are pasted into labelled images, boxes of CutMix
bound their regions, and the loss on unlabelled images is AEL's, once on the labelled images with
the teacher's labels and once on the mixed ones. Differences of that branch:
11. It drops the α_e percent of the labels with the LOWEST entropy, the most certain ones, and those
    of its anchors and positives that are among them, at first nearly all: --entropy-as-released.
    The paper and the main branch drop those with the highest, and so does --ael here.
12. The contrast begins after a tenth of the iterations, and its percentiles stay at α_0 and
    100 - α_0, as released. The branch has no warm-up; the presets with --ael keep U2PL's.
13. Entropy and ranks are those of the teacher on the mixed images, as without --ael; there they are
    mixed from those of the whole images. The teacher labels these in eval mode, as released.
    Labelled and mixed images go through the networks together, there one after another.

    python u2pl.py                                       # built-in data, a CPU
    python u2pl.py --ael --data shapes-zipf
    python u2pl.py --data voc --data-dir VOCdevkit --split u2pl-1/8 --amp bf16
"""

import argparse
import copy
import os
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import InputError, cli, runtime
from common.adaptive import (
    ConfidenceBank,
    ImagePool,
    adaptive_cutmix,
    adaptive_loss,
    copy_paste_step,
    nearest,
    pasted_classes,
    sampling_rates,
    teacher_labels,
)
from common.augment import IGNORE, normalise
from common.cutmix import mix, wide_box_masks
from common.deeplabv3plus import DeepLabV3Plus, conv_bn_relu, initialise
from common.distributed import add_up, collect, global_mean, world_size
from common.evaluate import Scores, evaluate
from common.figures import reliable_pixels_figure
from common.losses import labelled_loss
from common.run import Run, sgd
from common.runtime import derive_seed
from common.schedule import Schedule
from kernels import cross_entropy, drop_unreliable, masked_percentile, memory_contrast, pseudo_label

# The settings of each data set. voc and cityscapes are the released configurations,
# experiments/{pascal/1464,cityscapes/744}/ours/config.yaml, where no other source is given; their
# 4 and 8 processes are one here. Nothing is published for the others. An epoch passes over the
# unlabelled images.
SHAPES = {  # our choice: a small network with pretrained weights of its own, for a CPU
    "backbone": "tiny",
    "weights": "blots",
    "output_stride": 8,
    "dropout": 0.1,
    "max_iters": 900,
    "warmup_epochs": 0,
    "warmup_iters": 200,  # shorter ones did worse, see common/results/README.md
    "batch_size": 8,
    "crop_size": 64,
    "scale": "0.75,1,1.25,1.5",
    "lr": 0.03,
    "head_lr_mult": 3.0,
    "weight_decay": 1e-4,
    "decay_norm": False,
    "ohem": None,
    "aux_weight": 0.0,
    "contrast_weight": 1.0,
    "eval_window": 0,
    "eval_iters": 450,
}
CAMVID = {  # our choice: network, schedule and augmentation of cps.py
    "backbone": "resnet50",
    "weights": "imagenet",
    "output_stride": 16,
    "dropout": 0.5,
    "epochs": 300,
    "warmup_epochs": 0,
    "batch_size": 8,
    "crop_size": 320,
    "scale": "0.5,0.75,1,1.5,1.75,2",
    "lr": 0.01,
    "head_lr_mult": 1.0,
    "weight_decay": 4e-4,
    "decay_norm": False,
    "ohem": None,
    "aux_weight": 0.0,
    "contrast_weight": 1.0,
    "eval_window": 0,
    "eval_interval": 10,
}
VOC = {
    "backbone": "resnet50",  # as the other methods here; released: ResNet-101 (difference 9)
    "weights": "imagenet",
    "output_stride": 8,  # replace_stride_with_dilation: layer3 and layer4
    "dropout": 0.5,
    "epochs": 80,
    "warmup_epochs": 1,  # train_semi.py: sup_only_epoch, where the configuration has none
    "batch_size": 16,  # 4 on each of 4 GPUs
    "crop_size": 513,
    "scale": "half-or-double",  # rand_resize: U(0.5,1) or U(1,2)
    "lr": 0.001,
    "head_lr_mult": 10.0,  # train_semi.py, where the data are VOC's
    "weight_decay": 1e-4,
    "decay_norm": True,
    "ohem": None,
    "aux_weight": 0.0,  # no auxiliary head
    "contrast_weight": 1 / 4,  # 1, divided by the processes (difference 3)
    "eval_window": 0,  # whole images; released: centre crops (difference 10)
    "eval_interval": 1,
}
CITYSCAPES = VOC | {
    "epochs": 200,
    "warmup_epochs": 0,
    "batch_size": 16,  # 2 on each of 8 GPUs
    "crop_size": 769,
    "lr": 0.01,
    "head_lr_mult": 1.0,
    "weight_decay": 5e-4,
    "ohem": (0.7, 50_000),  # min_kept 100 000 for the 2 images of a process
    "aux_weight": 0.4,
    "contrast_weight": 1 / 8,  # 1, divided by the processes (difference 3)
    "eval_window": "crop",  # as the release's eval.py --crop
    "eval_interval": 8,  # our choice; released: 1
}
FOLDER = VOC | {"output_stride": 16}  # our choice
PRESETS = {
    "shapes": SHAPES,
    "shapes-zipf": SHAPES,
    "camvid": CAMVID,
    "voc": VOC,
    "cityscapes": CITYSCAPES,
    "folder": FOLDER,
}

# Of the contrast, section contrastive of both configurations.
ANCHORS = 256  # anchors a class: num_queries
NEGATIVES = 50  # negatives an anchor: num_negatives
TEMPERATURE = 0.5  # τ
SURE = 0.3  # δ_p: current_class_threshold
AUX_DROPOUT = 0.1  # of the auxiliary head: Aux_Module
# Of the memory bank (difference 5).
CAPACITY = 30_000  # keys of a class
PUSHED = 1024  # new keys of a class, step and process, at most: our choice

# Of --ael; AEL's own settings are those of ael.py.
SMALL_AEL = {
    "paste_scale": "0.75,1,1.25,1.5",
    "bank_momentum": 0.999,
    "copy_classes": 3,
    "region_share": 0.005,
    "listed_share": 0.01,
    "pool": 256,
}
LARGE_AEL = SMALL_AEL | {"paste_scale": "halves:0.1-2", "pool": 64}
# The released configuration of Cityscapes, whose processes, 8 in the release's README, divide the
# loss as those of AEL do (see ael.py): an eighth of lr 0.01, eight times the decay of 1e-4. The
# contrast, of weight 0.1, is divided once more (difference 3).
RELEASED_AEL = LARGE_AEL | {
    "lr": 0.00125,
    "head_lr_mult": 10.0,
    "weight_decay": 8e-4,
    "contrast_weight": 0.0125,
}
# Released is AEL's part for Cityscapes alone; LARGE_AEL, that of all others, is our choice.
AEL_PART = {"shapes": SMALL_AEL, "shapes-zipf": SMALL_AEL, "cityscapes": RELEASED_AEL}
WITH_AEL = {data: preset | AEL_PART.get(data, LARGE_AEL) for data, preset in PRESETS.items()}
AEL_GAMMA, AEL_SAMPLING = 2.0, 1.0  # γ and β of AEL
CONTRAST_FROM = 0.1  # of the iterations, with --ael: start_epoch, by default 20, of 200
LATER_MEASURES = ("loss_unsup", "loss_contrast", "kept", "anchors", "fill")  # after the warm-up


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run: the shared flags and those of U2PL."""
    with_ael = "--ael" in (sys.argv[1:] if argv is None else argv)
    presets = WITH_AEL if with_ael else PRESETS
    parser = cli.parser(__doc__, presets)  # whose help lists them
    add_flags(parser)
    args = cli.finish(parser, presets, "u2pl-ael" if with_ael else "u2pl", argv)
    if args.ael:  # what `common.adaptive` reads
        vars(args).update(acp=True, acm=True, conf_thresh=0.0, copy_paste_classes=None)
    check(args, parser)
    return args


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of U2PL; the tables that their help names are the paper's."""
    group = parser.add_argument_group("U2PL")
    add_contrast_flags(group)
    group.add_argument(
        "--alpha0",
        type=float,
        default=20.0,
        metavar="PERCENT",
        help="of pixels unreliable at first (Table 7; default: 20)",
    )
    group.add_argument(
        "--no-dpa",
        dest="dpa",
        action="store_false",
        help="keep that percentage throughout (Table 6)",
    )
    group.add_argument(
        "--cutmix-prob",
        type=float,
        default=0.5,
        metavar="P",
        help="chance of CutMix (default: 0.5)",
    )
    group.add_argument(
        "--ema-decay",
        type=float,
        default=0.99,
        metavar="M",
        help="of the teacher's average, at most (default: 0.99)",
    )
    group.add_argument(
        "--ael", action="store_true", help="treat weak classes as AEL does, see ael.py"
    )
    group.add_argument(
        "--entropy-as-released",
        action="store_true",
        help="with --ael: drop the labels of the lowest entropy",
    )
    group.add_argument(
        "--warmup-iters",
        type=int,
        metavar="N",
        help="labelled images alone (default: an epoch; shapes 200; city, camvid 0)",
    )


def add_contrast_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the contrastive loss."""
    group.add_argument(
        "--contrast-weight",
        type=float,
        metavar="λ",
        help="of the contrastive loss (default: 1; voc, and folder on a GPU, 0.25; "
        "cityscapes 0.125, with --ael 0.0125; the paper: 0.1)",
    )
    group.add_argument(
        "--no-contrast",
        dest="contrast",
        action="store_false",
        help="leave the contrastive loss out (Table 6)",
    )
    group.add_argument(
        "--anchors",
        choices=["released", "paper"],
        default="released",
        help="unlabelled anchors: the lowest H, or in the paper all with H < γ (default: released)",
    )
    group.add_argument(
        "--negatives",
        choices=["unreliable", "reliable", "all"],
        default="unreliable",
        help="unlabelled pixels to take (Table 4; default: unreliable)",
    )
    group.add_argument(
        "--negatives-as-released",
        action="store_true",
        help="only pixels with pseudo-label c are negatives of class c",
    )
    group.add_argument(
        "--low-rank",
        type=int,
        default=3,
        metavar="R",
        help="labelled negatives rank below this, unlabelled from here ...",
    )
    group.add_argument(
        "--high-rank",
        type=int,
        default=20,
        metavar="R",
        help="... to below this (Table 5; default: 3, 20)",
    )
    group.add_argument(
        "--no-prt",
        dest="prt",
        action="store_false",
        help="... or whatever the rank, but for the class of its own label (Table 6)",
    )


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse values that cannot work; argparse prints one line and exits with 2."""
    if not 0 <= args.low_rank < args.high_rank:
        parser.error("--low-rank must be at least 0 and below --high-rank")
    if args.negatives_as_released and not args.prt:
        parser.error("--negatives-as-released needs ranks, no --no-prt")
    if not (0 <= args.ema_decay < 1 and 0 <= args.cutmix_prob <= 1):
        parser.error("--ema-decay lies in [0,1), --cutmix-prob in [0,1]")
    if not 0 < args.alpha0 < 50:
        parser.error(f"--alpha0 {args.alpha0}: between 0 and 50")
    if not 0 <= (args.warmup_iters or 0) < (args.max_iters or 10**9):
        parser.error(f"--warmup-iters {args.warmup_iters}: from 0 to below --max-iters")
    if args.ael and args.pool < args.batch_size * int(os.environ.get("WORLD_SIZE", 1)):
        parser.error(f"--ael remembers {args.pool} crops: lower -b")
    if args.ael and args.cutmix_prob != parser.get_default("cutmix_prob"):
        parser.error("--cutmix-prob goes without --ael, which mixes every image")
    if args.entropy_as_released and not args.ael:
        parser.error("--entropy-as-released goes with --ael")
    if args.contrast_weight < 0:
        parser.error(f"--contrast-weight {args.contrast_weight}: not negative")


class Network(DeepLabV3Plus):
    """DeepLabv3+ with a second head, which gives features, and on cityscapes an auxiliary one.

    The auxiliary head reads `layer3`, as in the released code.
    """

    def __init__(self, args: argparse.Namespace, num_classes: int):
        super().__init__(args.backbone, num_classes, args.weights, args.output_stride, args.dropout)
        width, fused = self.feature_channels, self.decoder[0][0].in_channels
        self.representation = self.auxiliary = None
        if args.contrast:
            self.representation = nn.Sequential(
                conv_bn_relu(fused, width, 3),
                conv_bn_relu(width, width, 3),
                nn.Conv2d(width, width, 1),
            ).apply(initialise)
        if args.aux_weight:
            self.auxiliary = nn.Sequential(
                conv_bn_relu(self.backbone.mid_channels, width, 3),
                nn.Dropout2d(AUX_DROPOUT),
                nn.Conv2d(width, num_classes, 1),
            ).apply(initialise)

    def forward(
        self, images: Tensor, return_features: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits (N,C,h,w) of images (N,3,H,W).

        With `return_features` features (N,D,h,w) and auxiliary logits follow; None where the
        network has no such head.
        """
        with self.precision(images):
            low, mid, high = self.backbone(images)
            fused = self.fuse(low, high)
            logits = self.classifier(self.decoder(fused))
            if not return_features:
                return logits
            features = self.representation(fused) if self.representation else None
            return logits, features, self.auxiliary(mid) if self.auxiliary else None


class MemoryBank:
    """A ring of unit-length keys for each class, on the device and in checkpoints.

    Attributes:
        keys: (C,capacity,D) float16.
        filled: (C,) int64, how many keys a class has.
        head: (C,) int64, where its next one goes.
    """

    def __init__(self, classes: int, capacity: int, channels: int, device: torch.device):
        self.keys = torch.zeros(classes, capacity, channels, dtype=torch.float16, device=device)
        self.filled = torch.zeros(classes, dtype=torch.int64, device=device)
        self.head = torch.zeros(classes, dtype=torch.int64, device=device)

    def __str__(self) -> str:
        """Its sizes, for the log."""
        classes, capacity, channels = self.keys.shape
        return (
            f"memory bank: {classes} classes x {capacity} keys of {channels}, "
            f"{self.keys.dtype}: {self.keys.nbytes / 1e6:.0f} MB"
        )

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {"keys": self.keys, "filled": self.filled, "head": self.head}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what a checkpoint has kept."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])

    def push(self, keys: Tensor, counts: Tensor) -> None:
        """Append new keys of every process; a full ring drops its oldest.

        Args:
            keys: (C,Q,D), this process's.
            counts: (C,), how many of them, from the first on, are new.
        """
        capacity = self.keys.shape[1]
        classes = torch.arange(len(keys), device=keys.device)[:, None]
        offset = torch.arange(keys.shape[1], device=keys.device)

        # One process after the other, in the same order everywhere: all banks stay equal.
        for new, count in zip(collect(keys.to(self.keys.dtype)), collect(counts)):
            at = (self.head[:, None] + offset) % capacity  # the places after the newest keys, (C,Q)
            is_new = (offset < count[:, None])[..., None]
            old = self.keys[classes, at]  # written back where nothing is new: the shapes stay fixed
            self.keys[classes, at] = torch.where(is_new, new, old)

            self.head.copy_((self.head + count) % capacity)
            self.filled.copy_((self.filled + count).clamp_max(capacity))

    def draw(self, anchors: int, negatives: int) -> Tensor:
        """Rows of `keys` for each class and anchor, with repetition; 0 where there is none.

        Returns:
            (C,anchors,negatives) int32.
        """
        return random_below(self.filled, anchors * negatives).view(-1, anchors, negatives).int()


# ----------------------------------------------------------------------------------- the method


@torch.no_grad()
def label_and_mix(
    teacher: nn.Module, batch: dict, iteration: int, args: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """Step 1: images and the teacher's labels, cut and mixed or not.

    Args:
        teacher: the teacher; it predicts in eval mode.
        batch: unlabelled images.
        iteration: iterations done; with `seed` it decides about CutMix.
        args: `seed` and `cutmix_prob`.

    Returns:
        Images (N,3,H,W), and labels (N,H,W) uint8, 255 on padding.
    """
    images = normalise(batch["image"], batch["valid_mask"])
    size = images.shape[2:]

    # ŷ_u = argmax p'
    label = pseudo_label(teacher.eval()(images), size).label
    label = label.masked_fill(~batch["valid_mask"], IGNORE)

    # With chance `cutmix_prob` a box of each image comes from the next one of the batch.
    if derive_seed(args.seed, iteration, 0xC1) < args.cutmix_prob * 2**63:
        mask = wide_box_masks(len(images), size[0], args.seed, iteration, images.device)
        images = mix(mask, next_in_batch(images), images)
        label = mix(mask, next_in_batch(label), label)
    return images, label


def next_in_batch(values: Tensor) -> Tensor:
    """Each image's successor in the batch; for the last image, the first one."""
    return torch.cat([values[1:], values[:1]])


def use_batch_statistics(network: nn.Module) -> nn.Module:
    """Step 3: put BatchNorm in train mode, in place, and leave dropout as it is."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return network


def supervised_loss(
    logits: Tensor,
    auxiliary: Tensor | None,
    target: Tensor,
    ohem: tuple[float, int] | None,
    aux_weight: float,
) -> Tensor:
    """Step 2: L_s = CE(p_l, y), plus `aux_weight` times that of the auxiliary head.

    Args:
        logits, auxiliary: (N,C,h,w) of the labelled images.
        target: (N,H,W).
        ohem: see `common.losses.labelled_loss`.
        aux_weight: weight of the auxiliary head's loss.
    """
    # CE(p_l, y)
    loss = labelled_loss(logits, target, ohem)
    if auxiliary is not None:
        loss = loss + aux_weight * labelled_loss(auxiliary, target, ohem)
    return loss


def entropy_percentiles(entropy: Tensor, label: Tensor, alpha: float) -> Tensor:
    """Step 3: the α-th and (100-α)-th percentile of H over the valid pixels of all processes.

    Args:
        entropy: (N,H,W), nats.
        label: (N,H,W), 255 where a pixel does not count.
        alpha: percent.

    Returns:
        (2,) float32; NaN if no pixel counts.
    """
    # H of all processes' pixels; -1 marks the pixels that do not count.
    everywhere = torch.cat(collect(entropy.masked_fill(label == IGNORE, -1.0)))
    return masked_percentile(everywhere, everywhere > -0.5, [alpha, 100 - alpha])


def unsup_loss(
    logits: Tensor, label: Tensor, entropy: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """Step 3: L_u = (pixels / reliable pixels) · mean over reliable pixels of CE(p_u, ŷ_u).

    Args:
        logits: (N,C,h,w) of the student.
        label: (N,H,W) of the teacher, 255 where a pixel does not count.
        entropy: (N,H,W) of the teacher; pixels with H < γ are reliable.
        gamma: γ, a scalar.

    Returns:
        L_u, and the reliable share of the valid pixels; two scalars.
    """
    # Labels where H < γ, 255 elsewhere, and how many there are.
    reliable, count = drop_unreliable(label, entropy, gamma, ignore_index=IGNORE)

    # kept = reliable pixels / pixels
    kept = add_up(count) / add_up((label != IGNORE).sum()).clamp_min(1)

    # L_u = mean of CE(p_u, ŷ_u) / kept
    total = cross_entropy(logits, reliable, ignore_index=IGNORE, reduction="sum")
    return global_mean(total, count) / kept.clamp_min(1e-6), kept


def pixel_roles(
    logits_t: Tensor,
    target_l: Tensor,
    label_u: Tensor,
    entropy: Tensor,
    percentiles: Tensor,
    *,
    anchors: str = "released",
    negatives: str = "unreliable",
    negatives_as_released: bool = False,
    ranks: tuple[int, int] | None = (3, 20),
) -> tuple[Tensor, Tensor, Tensor]:
    """Step 4: say what each of the P = 2N·h·w pixels (image, row, column) is to each class c.

    Args:
        logits_t: (2N,C,h,w) of the teacher, labelled images first.
        target_l, label_u, entropy: (N,H,W) labels; pseudo-labels and H of the unlabelled images.
        percentiles: (2,) of `entropy_percentiles`.
        anchors: "released" or "paper", see `--anchors`.
        negatives: "unreliable", "reliable" or "all", see `--negatives`.
        negatives_as_released: see `--negatives-as-released`.
        ranks: (r_l, r_h); None without the probability rank threshold.

    Returns:
        (C,P) bool each: is part of the positive of c; may be an anchor of c; is a negative of c.
    """
    n, size, (low, gamma) = len(target_l), logits_t.shape[2:], percentiles
    label = torch.cat([nearest(target_l, size), nearest(label_u, size)])  # (2N,h,w)
    classes = torch.arange(logits_t.shape[1], device=label.device)[:, None, None]
    is_label = label[:, None] == classes  # (2N,C,h,w)
    valid_l, valid_u = (label != IGNORE).split(n)
    entropy = nearest(entropy, size)  # (N,h,w), of the unlabelled images

    # certain: labelled, or unlabelled and H <= its α_e-th percentile (paper: H < γ)
    certain_u = entropy < gamma if anchors == "paper" else entropy <= low
    certain = torch.cat([valid_l, valid_u & certain_u])[:, None]

    # positive: [label is c]·[certain];  anchor: [p'(c) > δ_p], too
    positive = is_label & certain
    anchor = positive & (logits_t.float().softmax(1) > SURE)
    if anchors == "paper":  # the positive is the mean over the anchors
        positive = anchor

    # negative: labelled [y != c]·[O(c) < r_l], unlabelled [H >= γ]·[r_l <= O(c) < r_h]
    unlikely_l, unlikely_u = (~is_label).split(n)
    if ranks:
        lowest, highest = ranks
        rank_l, rank_u = logits_t.argsort(1, descending=True).argsort(1).split(n)  # O(c)
        unlikely_l = unlikely_l & (rank_l < lowest)
        unlikely_u = (lowest <= rank_u) & (rank_u < highest)
    kinds_u = {"unreliable": entropy >= gamma, "reliable": entropy < gamma, "all": valid_u}
    source_l, source_u = valid_l[:, None], (valid_u & kinds_u[negatives])[:, None]
    negative = torch.cat([unlikely_l & source_l, unlikely_u & source_u])
    if negatives_as_released:
        negative = negative & is_label  # of labelled pixels with y != c none is left

    return tuple(role.transpose(0, 1).flatten(1) for role in (positive, anchor, negative))


def role_flags(args: argparse.Namespace) -> dict:
    """What the flags ask of `pixel_roles`."""
    return {
        "anchors": args.anchors,
        "negatives": args.negatives,
        "negatives_as_released": args.negatives_as_released,
        "ranks": (args.low_rank, args.high_rank) if args.prt else None,
    }


def random_below(limits: Tensor, count: int) -> Tensor:
    """`count` whole numbers from 0 to below each of `limits` (C,); 0 where the limit is 0.

    Returns:
        (C,count) int64.
    """
    draws = (torch.rand(len(limits), count, device=limits.device) * limits[:, None]).long()
    highest = limits[:, None] - 1  # float32 may round up to the limit
    return torch.minimum(draws, highest).clamp_min(0)


def choose(candidates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw `count` pixels of each class, with repetition.

    Args:
        candidates: (C,P) bool.
        count: how many.

    Returns:
        Pixels (C,count) int64, and how many candidates there are, (C,).
    """
    running = candidates.cumsum(1, dtype=torch.int32)  # candidates up to each pixel of the row
    available = running[:, -1]
    wanted = random_below(available, count).int() + 1  # the wanted-th candidate of the row
    return torch.searchsorted(running, wanted).clamp_max(candidates.shape[1] - 1), available


def choose_once(candidates: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Draw up to `most` pixels of each class, without repetition.

    Args:
        candidates: (C,P) bool.
        most: how many at most.

    Returns:
        Pixels (C,Q) int64, and how many of them, from the first on, are candidates, (C,).
    """
    # The candidates with the highest random numbers; all others have -1.
    chances = torch.rand(candidates.shape, device=candidates.device)
    chances = chances.masked_fill_(~candidates, -1.0)
    values, indices = chances.topk(min(most, candidates.shape[1]), dim=1)
    return indices, (values >= 0).sum(1)


def contrast_loss(
    features: Tensor,
    features_t: Tensor,
    roles: tuple[Tensor, Tensor, Tensor],
    bank: MemoryBank,
) -> tuple[Tensor, Tensor]:
    """Step 5: L_c of all classes at once, present or not, so that shapes are fixed.

    Absent classes weigh nothing. The bank takes new keys before it gives.

    Args:
        features: (2N,D,h,w) of the student.
        features_t: (2N,D,h,w) of the teacher.
        roles: of `pixel_roles`.
        bank: the memory bank.

    Returns:
        L_c, and the share of pixels that may be anchors; two scalars.
    """
    positive, anchor, negative = roles  # (C,P) each
    vectors = features.permute(0, 2, 3, 1).flatten(0, 2)  # (P,D)
    vectors_t = features_t.permute(0, 2, 3, 1).flatten(0, 2)

    # a+ = mean of the teacher's features over the positive pixels of c, of all processes
    counts = add_up(positive.sum(1))  # (C,)
    weights = (positive / counts.clamp_min(1)[:, None]).to(vectors_t.dtype)
    positives = add_up((weights @ vectors_t).float())  # (C,D)

    # bank: the teacher's features of the negatives enter, as vectors of length 1.
    pushed, valid = choose_once(negative, min(PUSHED, bank.keys.shape[1]))
    bank.push(F.normalize(vectors_t[pushed].float(), dim=2), valid)

    # a: the student's features of 256 anchors;  a-: 50 keys of the bank for each
    chosen, available = choose(anchor, ANCHORS)
    anchors = vectors.index_select(0, chosen.flatten()).view(*chosen.shape, -1)  # (C,256,D)
    rows = bank.draw(ANCHORS, NEGATIVES)  # (C,256,50)

    # -log( e^(a·a+/τ) / (e^(a·a+/τ) + sum of 50 e^(a·a-/τ)) ) of each anchor
    classes = torch.arange(len(chosen), dtype=torch.int32, device=chosen.device)
    loss = memory_contrast(
        anchors, positives, bank.keys, rows, classes, temperature=TEMPERATURE
    )  # (C,256)

    # Mean over the anchors, and over the processes that have anchors and keys of the class.
    usable = ((available > 0) & (bank.filled > 0)).float()
    mean = loss.mean(1) * usable * world_size() / add_up(usable).clamp_min(1)  # (C,)

    # L_c = mean over the classes present; one class alone has no contrast.
    present = (counts > 0).sum()
    loss_contrast = mean.sum() / present.clamp_min(1) * (present > 1)
    return loss_contrast, available.sum() / anchor.shape[1]


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Step 7: teacher <- m·teacher + (1-m)·student, for the parameters only; `decay` is m."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)


def warm_up_step(student: nn.Module, batch_l: dict, args: argparse.Namespace) -> dict[str, Tensor]:
    """An iteration of the warm-up: L = L_s, on the labelled images alone."""
    images_l, target_l = normalise(batch_l["image"], batch_l["valid_mask"]), batch_l["target"]
    logits, features, auxiliary = student(images_l, return_features=True)

    # L_s = CE(p_l, y)
    loss_sup = supervised_loss(logits, auxiliary, target_l, args.ohem, args.aux_weight)
    loss = loss_sup
    if features is not None:
        loss = loss + 0 * features.float().mean()  # DDP wants a gradient for every parameter
    nothing = torch.zeros_like(loss_sup)
    return {"loss": loss, "loss_sup": loss_sup, **dict.fromkeys(LATER_MEASURES, nothing)}


def train_step(
    student: nn.Module,
    teacher: nn.Module,
    bank: MemoryBank | None,
    batch_l: dict,
    batch_u: dict,
    iteration: int,
    total: int,
    args: argparse.Namespace,
) -> dict[str, Tensor]:
    """Steps 1 to 6: the losses of one iteration after the warm-up, scalars on the device.

    Args:
        student, teacher: the networks.
        bank: the memory bank; None without the contrast.
        batch_l, batch_u: labelled and unlabelled images.
        iteration: iterations done, those of the warm-up included.
        total: iterations of the run.
        args: the flags of U2PL, `ohem`, `aux_weight` and `seed`.
    """
    images_l, target_l = normalise(batch_l["image"], batch_l["valid_mask"]), batch_l["target"]
    n, size = len(target_l), target_l.shape[1:]

    # 1. Labels ŷ_u of the unlabelled images; CutMix.
    images_u, label_u = label_and_mix(teacher, batch_u, iteration, args)

    # 2. The student on all images together; L_s = CE(p_l, y)
    images = torch.cat([images_l, images_u])
    logits, features, auxiliary = student(images, return_features=True)
    auxiliary_l = None if auxiliary is None else auxiliary[:n]
    loss_sup = supervised_loss(logits[:n], auxiliary_l, target_l, args.ohem, args.aux_weight)

    # 3. The teacher on the same; H = -sum over c of p'(c)·log p'(c), nats, of unlabelled pixels
    with torch.no_grad():
        logits_t, features_t, _ = use_batch_statistics(teacher)(images, return_features=True)
    entropy = pseudo_label(logits_t[n:], size, with_entropy=True).entropy

    # α_e = α_0·(1 - iteration/total), percent;  γ = the (100 - α_e)-th percentile of H
    alpha = args.alpha0 * (1 - iteration / total) if args.dpa else args.alpha0
    percentiles = entropy_percentiles(entropy, label_u, alpha)
    gamma = percentiles[1]

    # L_u = (pixels / reliable pixels) · mean over pixels with H < γ of CE(p_u, ŷ_u)
    loss_unsup, kept = unsup_loss(logits[n:], label_u, entropy, gamma)

    # 4. Positives, anchors and negatives.  5. L_c
    loss_contrast = share = fill = torch.zeros_like(kept)
    if bank is not None:
        roles = pixel_roles(logits_t, target_l, label_u, entropy, percentiles, **role_flags(args))
        loss_contrast, share = contrast_loss(features, features_t, roles, bank)
        fill = bank.filled.float().mean() / bank.keys.shape[1]

    # 6. L = L_s + L_u + λ_c·L_c
    loss = loss_sup + loss_unsup + args.contrast_weight * loss_contrast
    later = (loss_unsup, loss_contrast, kept, share, fill)
    return {"loss": loss, "loss_sup": loss_sup, **dict(zip(LATER_MEASURES, later, strict=True))}


class Equalisation(NamedTuple):
    """What AEL remembers: of `common.adaptive`.

    Attributes:
        bank: confidence of each class.
        pool: the last unlabelled crops.
        allowed: (A,) the classes that may be pasted.
    """

    bank: ConfidenceBank
    pool: ImagePool
    allowed: Tensor


def drop_by_entropy(label: Tensor, entropy: Tensor, percentiles: Tensor, lowest: bool) -> Tensor:
    """Labels (N,H,W) with 255 where the entropy is too high, or with `lowest` too low.

    Args:
        label, entropy: (N,H,W) of the teacher.
        percentiles: (2,) of `entropy_percentiles`.
        lowest: drop H below the first percentile, as released, instead of H from the second on.
    """
    low, high = percentiles
    return label.masked_fill(entropy < low if lowest else entropy >= high, IGNORE)


def ael_step(
    student: nn.Module,
    teacher: nn.Module,
    keys: MemoryBank | None,  # of features
    weak: Equalisation,  # what AEL remembers, which changes
    batches: list[dict],
    iteration: int,
    total: int,
    args: argparse.Namespace,
) -> dict[str, Tensor]:
    """The losses of one iteration with --ael, scalars on the device; see `train_step`.

    `batches` are labelled images, labelled ones to paste from, and unlabelled ones.
    """
    # 1. x_l' with weak classes pasted in; x_m, ŷ_m, κ_m of adaptive CutMix
    batch_l, batch_p, batch_u = batches
    labelled = copy_paste_step(batch_l, batch_p, weak.bank, weak.allowed, iteration, args)
    images_l, target_l, valid_l, _ = labelled
    mixed = adaptive_cutmix(teacher.eval(), batch_u, weak.bank, weak.pool, iteration, args)
    images_u, label_u, conf_u, valid_u, _ = mixed
    n, size = len(target_l), target_l.shape[1:]

    # 2. The student on all images together; L_s = CE(p_l, y)
    images = torch.cat([images_l, images_u])
    logits, features, auxiliary = student(images, return_features=True)
    auxiliary_l = None if auxiliary is None else auxiliary[:n]
    loss_sup = supervised_loss(logits[:n], auxiliary_l, target_l, args.ohem, args.aux_weight)
    weak.bank.update(logits[:n].detach(), target_l)
    rates = sampling_rates(weak.bank, AEL_SAMPLING)

    # 3. The teacher on the same; H, and the labels that are certain enough
    with torch.no_grad():
        logits_t, features_t, _ = use_batch_statistics(teacher)(images, return_features=True)
    label_l, conf_l = teacher_labels(logits_t[:n], valid_l, args.conf_thresh)
    entropy = pseudo_label(logits_t[n:], size, with_entropy=True).entropy
    alpha = args.alpha0 * (1 - iteration / total) if args.dpa else args.alpha0
    falling = entropy_percentiles(entropy, label_u, alpha)
    certain = drop_by_entropy(label_u, entropy, falling, args.entropy_as_released)

    # L_u = Σ w·CE / Σ w, w = κ^γ · kept, on x_m and on x_l'
    options = {"rates": rates, "gamma": AEL_GAMMA}
    loss_unsup, kept = adaptive_loss(logits[n:], certain, conf_u, valid_u, **options)
    again, _ = adaptive_loss(logits[:n], label_l, conf_l, valid_l, **options)
    loss_unsup = loss_unsup + again

    # 4., 5. L_c, from a tenth of the iterations on
    loss_contrast = share = fill = torch.zeros_like(kept)
    if keys is not None:
        loss_contrast = 0 * features.float().mean()  # DDP wants a gradient for every parameter
    if keys is not None and iteration >= CONTRAST_FROM * total:
        fixed = entropy_percentiles(entropy, label_u, args.alpha0)
        label = certain if args.entropy_as_released else label_u
        roles = pixel_roles(logits_t, target_l, label, entropy, fixed, **role_flags(args))
        loss_contrast, share = contrast_loss(features, features_t, roles, keys)
        fill = keys.filled.float().mean() / keys.keys.shape[1]

    # 6. L = L_s + L_u + λ_c·L_c
    loss = loss_sup + loss_unsup + args.contrast_weight * loss_contrast
    later = (loss_unsup, loss_contrast, kept, share, fill)
    return {"loss": loss, "loss_sup": loss_sup, **dict(zip(LATER_MEASURES, later, strict=True))}


def equalisation(run: Run, args: argparse.Namespace) -> Equalisation | None:
    """What --ael remembers, at the start; None without it."""
    if not args.ael:
        return None
    classes, device = run.data.num_classes, run.device
    return Equalisation(
        ConfidenceBank(classes, args.bank_momentum, device),
        ImagePool(args.pool, classes, args.crop_size, device),
        torch.tensor(pasted_classes(args, run.data), device=device),
    )


def warm_up_length(args: argparse.Namespace, schedule: Schedule) -> int:
    """Iterations of the warm-up.

    Raises:
        InputError: none of the run's are left after it.
    """
    length = args.warmup_iters
    if length is None:
        length = args.warmup_epochs * schedule.per_epoch
    if length >= schedule.total and not args.eval_only:
        raise InputError(
            f"nothing of {schedule.total} iterations is left after a warm-up of {length}; "
            "lower --warmup-iters"
        )
    return length


def validate(
    run: Run, teacher: nn.Module, student: nn.Module, bank: MemoryBank | None
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Scores of both networks, and what else is measured; draws reliable_pixels.png."""
    data, args = run.data, run.args
    scores = evaluate({"teacher": teacher, "student": student}, data.val, data, args)
    fill = bank.filled / CAPACITY if bank else None
    reliable_pixels_figure(teacher, fill, SURE, data, args)
    return scores, {"student_miou": scores["student"].miou, **run.audit(teacher)}


def main(args: argparse.Namespace) -> None:
    """Train a student and its average, the teacher, with a memory bank; evaluate both networks."""
    run = Run(args)
    data, total = run.data, run.schedule.total
    warm_up = warm_up_length(args, run.schedule)
    student = run.place(Network(args, data.num_classes))
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    bank = None
    if args.contrast:
        bank = MemoryBank(data.num_classes, CAPACITY, student.feature_channels, run.device)
    optimizer = sgd([student], args)
    weak = equalisation(run, args)
    states = {"optimizer": optimizer, "bank": bank}
    if weak is not None:
        states |= {"confidence": weak.bank, "pool": weak.pool}
    run.keep(result="teacher", teacher=teacher, student=student, **states)
    trained = run.parallel(student)
    announce(run, bank, warm_up)

    loaders = [run.batches(data.labelled, stream=0), run.batches(data.unlabelled, stream=1)]
    if weak is not None:
        loaders.insert(1, run.batches(data.labelled, stream=2, scale=args.paste_scale))
    for iteration, (batch_l, *others) in run.iterations(*loaders):
        if run.evaluates():
            run.report(*validate(run, teacher, student, bank))
        if iteration < warm_up:
            measured = warm_up_step(trained, batch_l, args)
            run.step(measured["loss"], optimizer)
            teacher.load_state_dict(student.state_dict())
        else:
            state = trained, teacher, bank
            if weak is not None:
                batches = [batch_l, *others]
                measured = ael_step(*state, weak, batches, iteration, total, args)
            else:
                measured = train_step(*state, batch_l, *others, iteration, total, args)
            # 7. SGD;  m = min(1 - 1/t, 0.99), t = 1 in the first iteration after the warm-up
            run.step(measured["loss"], optimizer)
            t = iteration - warm_up + 1
            ema_update(teacher, student, decay=min(1 - 1 / t, args.ema_decay))
        run.log(measured)
    run.finish(*validate(run, teacher, student, bank))


def announce(run: Run, bank: MemoryBank | None, warm_up: int) -> None:
    """Say what the method's own settings come to."""
    args, classes = run.args, run.data.num_classes
    run.say(f"warm-up: {warm_up} iterations on labelled images alone")
    if bank is not None:
        run.say(str(bank))
        if classes <= args.low_rank and args.prt:
            run.say(
                f"no class of {classes} has rank {args.low_rank}: "
                "unlabelled images give no negatives"
            )


if __name__ == "__main__":
    runtime.launch(main, parse_args())
