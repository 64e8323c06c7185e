"""U2PL: Using Unreliable Pseudo-Labels (Wang, Wang, Shen, Fei, Li, Jin, Wu, Zhao, Le; CVPR 2022, arXiv:2203.03884).

Pixels whose pseudo-label is too uncertain to learn from still say which classes they are not: they become negatives of those
classes, in memory banks that a contrastive loss draws from. The teacher is a moving average of the student.

1. The teacher labels the unlabelled pictures: ŷ_u. With chance 1/2 the batch is cut and mixed, pictures and labels alike.
2. The student sees labelled and mixed pictures together:   L_s = CE(p_l, y)                                     [section 3.1]
       (cityscapes: on the hard pixels, plus 0.4 times the same loss of an auxiliary head)
3. The teacher sees the same pictures; H is the entropy of its probabilities. Of the unlabelled pixels, the α_e percent with the
   highest H are unreliable, H >= γ; α_e = α_0·(1 - iteration/total) (dynamic partition adjustment, DPA):
       L_u = (pixels / reliable pixels) · mean over reliable pixels of CE(p_u, ŷ_u)                            [section 3.2]
4. At the head's resolution, for each class c in the batch; O(c) is c's rank in the teacher's probabilities p':  [section 3.3]
       anchors a:    student's features where the label is c and p'(c) > δ_p, of labelled pixels and of unlabelled ones with
                     H up to its α_e-th percentile (--anchors paper: with H < γ)
       positive a+:  mean of the teacher's features over such pixels with label c, whatever p'(c) (paper: p'(c) > δ_p, too)
       negatives a-: teacher's features of labelled pixels with y != c and O(c) < r_l, and of unreliable unlabelled pixels
                     with r_l <= O(c) < r_h (probability rank threshold, PRT); they enter the bank of c, first in first out
       L_c = mean over classes and anchors of -log( e^(a·a+/τ) / (e^(a·a+/τ) + sum of 50 e^(a·a-/τ)) ), cosine similarities
5. L = L_s + L_u + λ_c·L_c;  SGD step;  teacher <- m·teacher + (1-m)·student,  m = min(1 - 1/t, 0.99) at t = 1, 2, ...
   Before, in the warm-up, L = L_s and the teacher is a copy of the student. The teacher is the result.

| symbol | variable | symbol | variable         | symbol   | variable                      | symbol | variable        |
|--------|----------|--------|------------------|----------|-------------------------------|--------|-----------------|
| y      | target_l | p, p'  | logits, logits_t | r_l, r_h | args.low_rank, args.high_rank | L_s    | loss_sup        |
| ŷ_u    | label_u  | H, γ   | entropy, gamma   | a, a+    | anchors, positives            | L_u    | loss_unsup      |
| α_e    | alpha    | δ_p, τ | SURE, TEMPERATURE | a-      | bank.keys                     | L_c    | loss_contrast   |

Logged: `kept`, the share of unlabelled pixels in L_u; `anchors`, the share of all pixels that qualify; `fill` of the bank.

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
5. Bank. It keeps 30 000 keys of every class (release: 50 000 of class 0), in float16, on the device,
   and is saved, so that --resume is exact. Of the new keys of a class, step and process, a random
   1024 enter, so that shapes are fixed (release: all of them).
6. Processes. Percentiles, positives and the classes present are those of all processes; in the
   release each process has its own.
7. Schedule. α_e falls with the iteration, in the release with the epoch. CutMix rounds boxes to
   whole pixels; the release draws whole numbers.
8. Teacher. It drops no features; the release's does in step 3. In the warm-up it is a copy of the
   student. In the release it is then a network of its own, which gets the student's parameters
   after the warm-up but keeps its own BatchNorm statistics.
9. Network. It is this project's DeepLabv3+ (--backbone resnet101 is what U2PL's tables have). The
   release's ResNet-101 has a stem of three 3x3 convolutions and dilations 4, 8, 16 in its last three
   blocks. Its low-level features keep 256 channels (here 48), a 3x3 convolution projects ASPP (here
   1x1), and there are five Dropout2d(0.1) (here one of 0.5): after that projection and after the two
   3x3 convolutions of each head. The feature head reads 512 channels (here 304).
10. Images. Padding counts nowhere. The release labels it class 0, in training and where it
   validates centre crops (VOC: of 513 pixels, larger than any image), and on unlabelled images it
   counts in L_u and in the percentiles. Images are antialiased when scaled down; the release's not.

    python u2pl.py                                              # built-in data, a CPU, about 3 minutes
    python u2pl.py --data voc --data-dir VOCdevkit --split u2pl-1/8 --amp bf16
"""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import InputError, checkpoint, cli, runtime
from common.augment import IGNORE, normalise
from common.cutmix import mix, wide_box_masks
from common.data import load_data, train_loader
from common.datasets import DataSource
from common.deeplabv3plus import DeepLabV3Plus, conv_bn_relu, initialise, parameter_groups
from common.evaluate import Scores, validate
from common.figures import reliable_pixels_figure
from common.losses import labelled_loss
from common.report import Report
from common.runtime import Runtime
from kernels import cross_entropy, drop_unreliable, masked_percentile, memory_contrast, pseudo_label

# voc, cityscapes: the released configurations; an epoch passes over the unlabelled pictures. shapes, camvid: as elsewhere.
# contrast_weight: the release's 1, divided by its 4 and 8 processes (difference 3); folder as voc. Nothing is published for
# shapes and camvid: 1 is our own choice.
# fmt: off
AS_CPS = {"batch_size": 8, "head_lr_mult": 1.0, "decay_norm": False, "scale": "0.5,0.75,1,1.5,1.75,2"}
PRESETS = {
    "shapes": {**AS_CPS, "max_iters": 1400, "lr": 0.1, "weight_decay": 1e-4, "crop_size": 64, "warmup_iters": 200},
    "camvid": {**AS_CPS, "epochs": 300, "lr": 0.01, "weight_decay": 4e-4, "crop_size": 320},
    "voc": {"epochs": 80, "lr": 0.001, "weight_decay": 1e-4, "crop_size": 513, "output_stride": 8, "warmup_epochs": 1,
            "contrast_weight": 1 / 4},
    "cityscapes": {"epochs": 200, "lr": 0.01, "weight_decay": 5e-4, "crop_size": 769, "output_stride": 8, "head_lr_mult": 1.0,
                   "ohem": (0.7, 50_000), "aux_weight": 0.4, "contrast_weight": 1 / 8},
    "folder": {"epochs": 80, "lr": 0.001, "weight_decay": 1e-4, "crop_size": 513, "warmup_epochs": 1,
               "contrast_weight": 1 / 4},
}
EVERYWHERE = {"batch_size": 16, "head_lr_mult": 10.0, "decay_norm": True, "scale": "half-or-double", "ohem": None,
              "aux_weight": 0.0, "warmup_epochs": 0, "contrast_weight": 1.0}
# fmt: on
PRESETS = {name: {**EVERYWHERE, **preset} for name, preset in PRESETS.items()}
MEASURES = ("loss_sup", "loss_unsup", "loss_contrast", "kept", "anchors", "fill")
EVALUATIONS = ("student_miou", "pseudo_accuracy")
ANCHORS, NEGATIVES, TEMPERATURE, SURE = 256, 50, 0.5, 0.3  # anchors a class, negatives an anchor, τ, δ_p
CAPACITY, PUSHED = 30_000, 1024  # keys of a class in the bank; new ones a step, at most


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run: the shared flags and those of U2PL."""
    parser = cli.parser(__doc__, PRESETS)
    add = parser.add_argument_group("U2PL").add_argument
    weights = "default: voc and folder 0.25, cityscapes 0.125, else 1; the paper: 0.1"
    add("--contrast-weight", type=float, metavar="λ", help=f"of the contrastive loss ({weights})")
    add("--no-contrast", dest="contrast", action="store_false", help="leave the contrastive loss out (Table 6)")
    anchors = "unlabelled anchors: the lowest H, or in the paper all with H < γ (default: released)"
    add("--anchors", choices=["released", "paper"], default="released", help=anchors)
    kinds = ["unreliable", "reliable", "all"]
    add("--negatives", choices=kinds, default=kinds[0], help="unlabelled pixels to take (Table 4; default: unreliable)")
    add("--negatives-as-released", action="store_true", help="only pixels with pseudo-label c are negatives of class c")
    add("--low-rank", type=int, default=3, metavar="R", help="labelled negatives rank below this, unlabelled from here ...")
    add("--high-rank", type=int, default=20, metavar="R", help="... to below this (Table 5; default: 3, 20)")
    add("--no-prt", dest="prt", action="store_false", help="... or whatever the rank (Table 6)")
    add("--alpha0", type=float, default=20.0, metavar="PERCENT", help="of pixels unreliable at first (Table 7; default: 20)")
    add("--no-dpa", dest="dpa", action="store_false", help="keep that percentage throughout (Table 6)")
    add("--cutmix-prob", type=float, default=0.5, metavar="P", help="chance of CutMix (default: 0.5)")
    add("--ema-decay", type=float, default=0.99, metavar="M", help="of the teacher's average, at most (default: 0.99)")
    add("--warmup-iters", type=int, metavar="N", help="labelled pictures alone (default: an epoch; shapes 200; city, camvid 0)")
    args = cli.finish(parser, PRESETS, "u2pl", argv)
    if not 0 <= args.low_rank < args.high_rank or (args.negatives_as_released and not args.prt):
        parser.error("--low-rank must be at least 0 and below --high-rank; --negatives-as-released needs ranks, no --no-prt")
    if not (0 <= args.ema_decay < 1 and 0 <= args.cutmix_prob <= 1 and 0 < args.alpha0 < 50):
        parser.error("--ema-decay lies in [0,1), --cutmix-prob in [0,1], --alpha0 between 0 and 50")
    if not (0 <= (args.warmup_iters or 0) < (args.max_iters or 10**9) and args.contrast_weight >= 0):
        parser.error(f"--warmup-iters {args.warmup_iters}: from 0 to below --max-iters; --contrast-weight: not negative")
    return args


def phases(args: argparse.Namespace, data: DataSource, rt: Runtime) -> tuple[int, int]:
    """Iterations of the warm-up, and of the whole run."""
    schedule = cli.Schedule(args, len(data.unlabelled), rt.world)
    return args.warmup_epochs * schedule.per_epoch if args.warmup_iters is None else args.warmup_iters, schedule.total


class Network(DeepLabV3Plus):
    """DeepLabv3+ with a second head, which gives features, and on cityscapes an auxiliary one on `layer3`.

    Images (N,3,H,W) -> logits (N,C,h,w); with `return_features` also features (N,D,h,w) and auxiliary logits, or None.
    """

    def __init__(self, args: argparse.Namespace, num_classes: int):
        super().__init__(args.backbone, num_classes, args.weights, args.output_stride, args.dropout)
        width, fused, mid = self.feature_channels, self.decoder[0][0].in_channels, self.backbone.mid_channels
        self.representation = self.auxiliary = None
        if args.contrast:
            convs = conv_bn_relu(fused, width, 3), conv_bn_relu(width, width, 3), nn.Conv2d(width, width, 1)
            self.representation = nn.Sequential(*convs).apply(initialise)
        if args.aux_weight:
            convs = conv_bn_relu(mid, width, 3), nn.Dropout2d(args.dropout), nn.Conv2d(width, num_classes, 1)
            self.auxiliary = nn.Sequential(*convs).apply(initialise)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor | None, Tensor | None]:
        low, mid, high = self.backbone(images)
        fused = self.fuse(low, high)
        logits = self.classifier(self.decoder(fused))
        if not return_features:
            return logits
        return logits, self.representation and self.representation(fused), self.auxiliary and self.auxiliary(mid)


class MemoryBank(nn.Module):
    """A ring of unit-length keys for each class: keys (classes,capacity,D) float16; filled, head (classes,) int64, how many
    there are and where the next one goes. On the device, and saved with the networks. A run prints the `notes` when it begins.
    """

    def __init__(self, classes: int, capacity: int, channels: int):
        super().__init__()
        self.register_buffer("keys", torch.zeros(classes, capacity, channels, dtype=torch.float16))
        self.register_buffer("filled", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("head", torch.zeros(classes, dtype=torch.int64))
        size = f"{classes} classes x {capacity} keys of {channels}, {self.keys.dtype}: {self.keys.nbytes / 1e6:.0f} MB"
        self.notes = [f"memory bank: {size}"]

    def push(self, keys: Tensor, counts: Tensor, rt: Runtime) -> None:
        """Append the first `counts` (classes,) of `keys` (classes,Q,D) of each process; a full ring drops its oldest."""
        capacity = self.keys.shape[1]
        classes, offset = torch.arange(len(keys), device=keys.device)[:, None], torch.arange(keys.shape[1], device=keys.device)
        for new, count in zip(rt.collect(keys.to(self.keys.dtype)), rt.collect(counts)):
            at = (self.head[:, None] + offset) % capacity  # (classes,Q)
            old = self.keys[classes, at]  # written back where nothing is new: the shapes stay fixed
            self.keys[classes, at] = torch.where((offset < count[:, None])[..., None], new, old)
            self.head.copy_((self.head + count) % capacity)
            self.filled.copy_((self.filled + count).clamp_max(capacity))

    def draw(self, anchors: int, negatives: int) -> Tensor:
        """Rows of `keys` for each class and anchor, with repetition: (classes,anchors,negatives) int32; 0 where none is."""
        return random_below(self.filled, anchors * negatives).view(-1, anchors, negatives).int()


def build_networks(args: argparse.Namespace, data: DataSource, rt: Runtime) -> dict[str, nn.Module]:
    """The teacher, which is the result and starts as a copy, the student, and the memory bank."""
    warm_up, total = phases(args, data, rt)
    if warm_up >= total:
        raise InputError(f"nothing of {total} iterations is left after a warm-up of {warm_up}; lower --warmup-iters")
    student = rt.place(Network(args, data.num_classes))
    networks = {"teacher": copy.deepcopy(student).requires_grad_(False).eval(), "student": student}
    student.notes = [f"warm-up: {warm_up} iterations on labelled pictures alone"]
    if args.contrast:
        bank = networks["bank"] = rt.place(MemoryBank(data.num_classes, CAPACITY, student.feature_channels))
        if data.num_classes <= args.low_rank and args.prt:
            bank.notes.append(f"no class of {data.num_classes} has rank {args.low_rank}: unlabelled pictures give no negatives")
    return networks


def load_batches(args: argparse.Namespace, data: DataSource, rt: Runtime, start: int, stop: int) -> Iterator[tuple[dict, ...]]:
    """The batches of iterations `start` to `stop`: labelled, unlabelled."""
    lists = (data.labelled, data.unlabelled)
    return zip(*(train_loader(data, items, stream, args, rt, start, stop) for stream, items in enumerate(lists)))


# ---------------------------------------------------------------------------------------------------------- the method


@torch.no_grad()
def label_and_mix(teacher: nn.Module, batch: dict, step: int, args: argparse.Namespace, rt: Runtime) -> tuple[Tensor, Tensor]:
    """Step 1: pictures (N,3,H,W) and the teacher's labels (N,H,W) uint8, 255 on padding; cut and mixed, or not."""
    images = normalise(batch["image"], batch["valid_mask"])
    size = images.shape[2:]
    label = pseudo_label(teacher.eval()(images), size, impl=args.kernels).label.masked_fill(~batch["valid_mask"], IGNORE)
    if runtime.derive_seed(args.seed, step, 0xC1) < args.cutmix_prob * 2**63:
        mask = wide_box_masks(len(images), size[0], rt, args.seed, step)  # filled from the next picture of the batch
        images, label = (mix(mask, torch.cat([x[1:], x[:1]]), x) for x in (images, label))
    return images, label


def use_batch_statistics(network: nn.Module) -> nn.Module:
    """Step 3: BatchNorm in train mode, dropout as it was."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return network


def entropy_percentiles(entropy: Tensor, label: Tensor, alpha: float, rt: Runtime, impl: str) -> Tensor:
    """Step 3: the α-th and (100-α)-th percentile (2,) of H over the valid pixels of all processes; NaN if there is none."""
    everywhere = torch.cat(rt.collect(entropy.masked_fill(label == IGNORE, -1.0)))
    return masked_percentile(everywhere, everywhere > -0.5, [alpha, 100 - alpha], impl=impl)


def unsup_loss(logits: Tensor, label: Tensor, entropy: Tensor, gamma: Tensor, rt: Runtime, impl: str) -> tuple[Tensor, Tensor]:
    """Step 3: L_u and the reliable share of the valid pixels; logits (N,C,h,w), label (N,H,W), entropy (N,H,W) and γ ()."""
    reliable, count = drop_unreliable(label, entropy, gamma, ignore_index=IGNORE, impl=impl)
    kept = rt.add_up(count) / rt.add_up((label != IGNORE).sum()).clamp_min(1)
    mean = rt.mean(cross_entropy(logits, reliable, ignore_index=IGNORE, reduction="sum", impl=impl), count)
    return mean / kept.clamp_min(1e-6), kept


def nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N,H,W) at a lower resolution, (N,h,w), by nearest neighbour."""
    rows, columns = (torch.arange(few, device=maps.device) * many // few for few, many in zip(size, maps.shape[1:]))
    return maps[:, rows[:, None], columns]


def pixel_roles(
    logits_t: Tensor, target_l: Tensor, label_u: Tensor, entropy: Tensor, percentiles: Tensor, args: argparse.Namespace
) -> tuple[Tensor, Tensor, Tensor]:
    """Step 4: what each of the P = 2N·h·w pixels (image, row, column) is to each class c.

    Args:
        logits_t: (2N,C,h,w) of the teacher, labelled images first.
        target_l, label_u, entropy: (N,H,W) labels; pseudo-labels and H of the unlabelled images.
        percentiles: (2,) of `entropy_percentiles`.
        args: `anchors`, `negatives`, `negatives_as_released`, `prt`, `low_rank`, `high_rank`.

    Returns:
        (C,P) bool each: is part of the positive of c; may be an anchor of c; is a negative of c.
    """
    n, size, (low, gamma) = len(target_l), logits_t.shape[2:], percentiles
    label = torch.cat([nearest(target_l, size), nearest(label_u, size)])  # (2N,h,w)
    classes = torch.arange(logits_t.shape[1], device=label.device)[:, None, None]
    is_label = label[:, None] == classes  # (2N,C,h,w)
    valid_l, valid_u = (label != IGNORE).split(n)
    entropy = nearest(entropy, size)  # (N,h,w), of the unlabelled images

    # A_c: label c and p'(c) > δ_p; labelled, or unlabelled and certain
    certain_u = entropy < gamma if args.anchors == "paper" else entropy <= low
    certain = torch.cat([valid_l, valid_u & certain_u])[:, None]
    positive = is_label & certain
    anchor = positive & (logits_t.float().softmax(1) > SURE)
    if args.anchors == "paper":  # the positive is the mean over A_c
        positive = anchor

    # N_c: labelled [y != c]·[O(c) < r_l], unlabelled [H >= γ]·[r_l <= O(c) < r_h]
    unlikely_l, unlikely_u = (~is_label).split(n)
    if args.prt:
        rank_l, rank_u = logits_t.argsort(1, descending=True).argsort(1).split(n)  # O(c)
        unlikely_l = unlikely_l & (rank_l < args.low_rank)
        unlikely_u = (args.low_rank <= rank_u) & (rank_u < args.high_rank)
    kinds_u = {"unreliable": entropy >= gamma, "reliable": entropy < gamma, "all": valid_u}
    source_l, source_u = valid_l[:, None], (valid_u & kinds_u[args.negatives])[:, None]
    negative = torch.cat([unlikely_l & source_l, unlikely_u & source_u])
    if args.negatives_as_released:
        negative = negative & is_label  # of labelled pixels with y != c none is left
    return tuple(role.transpose(0, 1).flatten(1) for role in (positive, anchor, negative))


def random_below(limits: Tensor, count: int) -> Tensor:
    """`count` whole numbers from 0 to below each of `limits` (C,), (C,count) int64; 0 where the limit is 0."""
    draws = (torch.rand(len(limits), count, device=limits.device) * limits[:, None]).long()
    return torch.minimum(draws, limits[:, None] - 1).clamp_min(0)  # float32 may round up to the limit


def choose(candidates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` pixels of each class with repetition, (C,count) int64, from candidates (C,P) bool; how many these are, (C,)."""
    running = candidates.cumsum(1, dtype=torch.int32)
    wanted = random_below(running[:, -1], count).int() + 1  # the wanted-th candidate of the row
    return torch.searchsorted(running, wanted).clamp_max(candidates.shape[1] - 1), running[:, -1]


def choose_once(candidates: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Up to `most` pixels of each class without repetition, (C,Q) int64, of which the first (C,) count."""
    chances = torch.rand(candidates.shape, device=candidates.device).masked_fill_(~candidates, -1.0)
    values, indices = chances.topk(min(most, candidates.shape[1]), dim=1)
    return indices, (values >= 0).sum(1)


def contrast_loss(
    features: Tensor, features_t: Tensor, roles: tuple[Tensor, Tensor, Tensor], bank: MemoryBank, rt: Runtime, impl: str
) -> tuple[Tensor, Tensor]:
    """Step 4: L_c and the share of pixels that may be anchors, two scalars; features (2N,D,h,w), roles of `pixel_roles`.

    All classes at once, present or not, so that shapes are fixed: absent ones weigh nothing. The bank takes before it gives.
    """
    members, candidates, negatives = roles
    vectors, vectors_t = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (features, features_t))  # (P,D)
    counts = rt.add_up(members.sum(1))  # (C,)
    weights = (members / counts.clamp_min(1)[:, None]).to(vectors_t.dtype)
    positives = rt.add_up((weights @ vectors_t).float())  # (C,D)

    pushed, valid = choose_once(negatives, min(PUSHED, bank.keys.shape[1]))
    bank.push(F.normalize(vectors_t[pushed].float(), dim=2), valid, rt)
    chosen, available = choose(candidates, ANCHORS)
    anchors = vectors.index_select(0, chosen.flatten()).view(*chosen.shape, -1)  # (C,ANCHORS,D)
    rows, classes = bank.draw(ANCHORS, NEGATIVES), torch.arange(len(chosen), dtype=torch.int32, device=chosen.device)
    loss = memory_contrast(anchors, positives, bank.keys, rows, classes, temperature=TEMPERATURE, impl=impl)  # (C,ANCHORS)

    usable = ((available > 0) & (bank.filled > 0)).float()
    mean = loss.mean(1) * usable * rt.world / rt.add_up(usable).clamp_min(1)  # over the processes with anchors of the class
    present = (counts > 0).sum()
    return mean.sum() / present.clamp_min(1) * (present > 1), available.sum() / candidates.shape[1]


def supervised_loss(logits: Tensor, auxiliary: Tensor | None, target: Tensor, args: argparse.Namespace, rt: Runtime) -> Tensor:
    """Step 2: L_s of the first pictures' logits (2N,C,h,w), target (N,H,W), and of the auxiliary head's."""
    n = len(target)
    loss = labelled_loss(logits[:n], target, args.ohem, rt, args.kernels)
    if auxiliary is not None:
        loss = loss + args.aux_weight * labelled_loss(auxiliary[:n], target, args.ohem, rt, args.kernels)
    return loss


def warm_up_step(networks: dict, optimizer: torch.optim.Optimizer, batch: dict, args: argparse.Namespace, rt: Runtime) -> dict:
    """An iteration of the warm-up: L_s alone; the teacher stays a copy of the student."""
    with rt.autocast():
        logits, features, auxiliary = networks["student"](normalise(batch["image"], batch["valid_mask"]), return_features=True)
    loss = supervised_loss(logits, auxiliary, batch["target"], args, rt)
    rt.step(loss if features is None else loss + 0 * features.float().mean(), optimizer)  # DDP: a gradient for all parameters
    networks["teacher"].load_state_dict(runtime.unwrap(networks["student"]).state_dict())
    return {"loss": loss, "loss_sup": loss, **dict.fromkeys(MEASURES[1:], torch.zeros_like(loss))}


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Step 5: teacher <- decay·teacher + (1-decay)·student, parameters only."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)


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
    student, teacher, bank = (networks.get(name) for name in ("student", "teacher", "bank"))
    batch_l, batch_u = batches
    warm_up, total = phases(args, data, rt)
    if iteration < warm_up:
        return warm_up_step(networks, optimizer, batch_l, args, rt)
    images_l, target_l = normalise(batch_l["image"], batch_l["valid_mask"]), batch_l["target"]  # (N,3,H,W), (N,H,W)
    n, size = len(target_l), target_l.shape[1:]

    with rt.autocast():
        # 1. Labels of the unlabelled pictures; CutMix.
        images_u, label_u = label_and_mix(teacher, batch_u, iteration, args, rt)
        # 2. The student on all pictures together.
        images = torch.cat([images_l, images_u])
        logits, features, auxiliary = student(images, return_features=True)
        # 3. The teacher on the same.
        with torch.no_grad():
            logits_t, features_t, _ = use_batch_statistics(teacher)(images, return_features=True)
    loss_sup = supervised_loss(logits, auxiliary, target_l, args, rt)
    # α_e = α_0·(1 - iteration/total), percent
    alpha = args.alpha0 * (1 - iteration / total) if args.dpa else args.alpha0
    # H(p') = -sum over c of p'(c)·log p'(c), nats, of every unlabelled pixel
    entropy = pseudo_label(logits_t[n:], size, with_entropy=True, impl=args.kernels).entropy
    # the α_e-th percentile of H, and γ, its (100-α_e)-th
    percentiles = entropy_percentiles(entropy, label_u, alpha, rt, args.kernels)
    # L_u, on the pixels with H < γ
    loss_unsup, kept = unsup_loss(logits[n:], label_u, entropy, percentiles[1], rt, args.kernels)

    # 4. Contrast.
    loss_contrast = anchors = fill = torch.zeros_like(kept)
    if bank is not None:
        roles = pixel_roles(logits_t, target_l, label_u, entropy, percentiles, args)
        loss_contrast, anchors = contrast_loss(features, features_t, roles, bank, rt, args.kernels)
        fill = bank.filled.float().mean() / bank.keys.shape[1]

    # 5. Gradient and step of the student; then the average.
    loss = loss_sup + loss_unsup + args.contrast_weight * loss_contrast
    rt.step(loss, optimizer)
    # m = min(1 - 1/t, 0.99), t = 1 in the first iteration after the warm-up
    t = iteration - warm_up + 1
    ema_update(teacher, student, min(1 - 1 / t, args.ema_decay))
    return {"loss": loss, **dict(zip(MEASURES, (loss_sup, loss_unsup, loss_contrast, kept, anchors, fill)))}


def score(
    networks: dict[str, nn.Module], args: argparse.Namespace, data: DataSource, rt: Runtime, final: bool
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Evaluate the teacher, which is the result, and the student; the accuracy of the teacher's pseudo-labels; the figure."""
    results, measured = validate({name: networks[name] for name in ("teacher", "student")}, data, args, rt, audit=True)
    if rt.is_main:
        fill = networks["bank"].filled / networks["bank"].keys.shape[1] if args.contrast else None
        reliable_pixels_figure(networks["teacher"], fill, SURE, data, args, rt)
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
