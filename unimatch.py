"""UniMatch and, with --fixmatch, FixMatch: one network that learns from its own confident labels.

UniMatch: Yang, Qi, Feng, Zhang, Shi; CVPR 2023, arXiv:2208.09910. FixMatch: Sohn et al., NeurIPS
2020, arXiv:2001.07685, in the form that UniMatch's authors gave it for segmentation. There is no
teacher: what the network predicts with confidence for a weakly augmented image is the label of the
same image under two strong augmentations, and under a perturbation of its features.

    x_l ---> f ---> p_l ---> CE(p_l, y)

    x_u -+-> weak x_w --> f -+-> p_w --> ŷ where sure (no gradient) --+
         |                   +-> features dropped --> p_fp ---------> CE(p_fp, ŷ)
         |
         +-> strong s_1 --> mixed by M_1 --> x_1 --> f --> p_1 ----> CE(p_1, ŷ_1)
         +-> strong s_2 --> mixed by M_2 --> x_2 --> f --> p_2 ----> CE(p_2, ŷ_2)
                              ^                                              ^
    x'_u -+-> s_1', s_2' -----+                                              |
          +-> weak x'_w --> f in eval mode --> ŷ' where sure --> mixed into ŷ by M_1, M_2

1. Take labelled images x_l, unlabelled ones x_u, and their partners x'_u, to be mixed in. Each
   unlabelled image has three views of one crop: weak x_w and, with colours and blur drawn twice,
   strong s_1, s_2.                                            [dual-stream perturbation, DusPerb]
2. Label x'_w, in eval mode, as released. A label is kept where the network is sure:
       ŷ' = argmax p'_w where max p'_w >= τ, else 255                                 [FixMatch]
3. Mix the strong views by small boxes M_1, M_2, drawn independently, each with chance ½:
       x_k = M_k·s_k' + (1-M_k)·s_k
4. One forward pass of [x_l; x_w] through the backbone. The head gets its features, at stride 4 and
   of the last layer, twice in one batch: as they are, and with each channel dropped with
   probability ½. So its BatchNorm sees both; of the dropped ones those of x_l serve that alone.
                                                                  [unified perturbations, UniPerb]
       p_l, p_w, p_fp = f(x_l), f(x_w), head(dropped features of x_w)
   One more pass of [x_1; x_2]:
       p_1, p_2 = f(x_1), f(x_2)
5. Label x_w by p_w of step 4, so in train mode, and mix the labels like the images:
       ŷ = argmax p_w where max p_w >= τ, else 255
       ŷ_k = M_k·ŷ' + (1-M_k)·ŷ
6. Losses. A pixel whose label is not kept adds nothing, but counts in the mean:
       L_s = CE(p_l, y)                        (cityscapes: on the hard pixels, OHEM)
       L_fp = mean over valid pixels of CE(p_fp, ŷ)
       L_strong = ½·(mean CE(p_1, ŷ_1) + mean CE(p_2, ŷ_2))
7. L = ½·(L_s + ½·L_fp + ½·L_strong);  SGD step.

--fixmatch has one strong view and no dropped features: L = ½·(L_s + L_strong). The steps between
are --no-fp (two views, the same L) and --no-second-view (step 7 with L_strong of one view). To SGD
the outer ½ is half the learning rate with twice the weight decay.

A prime marks what belongs to the partner image; no method here has a teacher.

| symbol    | variable             | symbol | variable               | symbol   | variable         |
|-----------|----------------------|--------|------------------------|----------|------------------|
| x_l, y    | images_l, target_l   | p_l    | logits_l               | L_s      | loss_sup         |
| x_u, x'_u | batch_u, partner     | p_w    | logits_w               | L_fp     | loss_feature     |
| x_w, x'_w | weak, (in 2. alone)  | p_fp   | logits_fp              | L_strong | loss_strong      |
| s_k, s_k' | strong,              | p_k    | logits_strong          | M_k      | masks            |
|           | strong_partner       | ŷ, ŷ'  | pseudo, pseudo_partner | τ        | args.conf_thresh |
| x_k       | mixed                | ŷ_k    | targets                | f, head  | network          |

`confident` is the share of the valid pixels of x_w on which max p_w >= τ.

Differences from the paper and the released code:
1. The partner x'_u is an independent batch. In the release both loaders read one sampler, so that
   the partner is another crop of the same image: --partner-as-released.
2. A mean is over the valid pixels of all processes; the release averages the means of its four. A
   padded pixel counts nowhere in either. It is 0 after normalisation here, the mean colour, and
   black there. The release opens the masks of unlabelled images to find the padding; here they are
   never opened.
3. OHEM compares the pixels of all images of a process and keeps 100 000 an image; the release keeps
   200 000 of a process's two.
4. The learning rate follows the iteration. In the release it is set after the step, so that the
   first two steps have the same.
5. The last result counts here; the release reports the best on the validation images. A class that
   is in neither prediction nor target is left out of the mean here; there it counts as 0. The last
   sliding windows are flush with the border here; there they are cut off at it.
6. The blur is torchvision's, 13 pixels wide; the release's is PIL's, which approximates a Gaussian
   by repeated box filters.
7. The network is this project's DeepLabv3+ with a ResNet-50. The released configurations have a
   ResNet-101, whose stem has three 3x3 convolutions; there are training logs of a ResNet-50, too.
   Its head has no dropout and starts with PyTorch's weights. Ours has none either, but on the
   built-in set 0.1, as with the other methods, and its convolutions before a BatchNorm start with
   Kaiming's weights, by fan-out.
8. --complementary is an experiment after UniMatch V2 (arXiv:2410.10777), which trains a vision
   transformer with an averaged teacher and mixes each image with another one of its batch. Instead
   of dropping features for p_fp, the two strong views drop complementary channels: m·features and
   (2-m)·features, m = 0 or 2, on a random half of the images. L = ½·(L_s + L_strong). There all
   features have as many channels and share m; here the two kinds have their own.

    python unimatch.py                                       # built-in data, a CPU
    python unimatch.py --fixmatch --data voc --data-dir VOCdevkit --split 183 --amp bf16
"""

import argparse
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import cli, runtime
from common.augment import IGNORE, colour_jitter_and_blur, normalise
from common.cutmix import mix, small_box_masks
from common.deeplabv3plus import DeepLabV3Plus
from common.distributed import add_up, global_mean
from common.evaluate import evaluate
from common.losses import labelled_loss
from common.run import Run, sgd
from common.source import Item
from kernels import cross_entropy, pseudo_label

# All settings of a data set; a flag of the same name, where there is one, replaces it. Unless a
# comment says otherwise, those of voc and cityscapes are the released configurations
# (configs/pascal.yaml, cityscapes.yaml, and unimatch.py there), whose 4 processes with 2 images
# each are one here: the release averages gradients, so that learning rates are the same. The other
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
    "lr": 0.06,  # twice that of the other methods, since L has the outer ½
    "head_lr_mult": 3.0,
    "weight_decay": 1e-4,
    "decay_norm": False,
    "ohem": None,
    # τ: FixMatch's is published, UniMatch's was chosen here; see common/results/README.md.
    "conf_thresh": {"fixmatch": 0.95, "unimatch": 0.7},
    "eval_window": 0,  # whole images
    "eval_iters": 450,
}
CAMVID = {
    "backbone": "resnet50",
    "weights": "imagenet",
    "output_stride": 16,
    "dropout": 0.0,
    "epochs": 300,
    "batch_size": 8,
    "crop_size": 320,
    "scale": "uniform:0.5-2",
    "lr": 0.01,
    "head_lr_mult": 1.0,
    "weight_decay": 4e-4,
    "decay_norm": False,
    "ohem": None,
    "conf_thresh": 0.95,
    "eval_window": 0,
    "eval_interval": 10,
}
VOC = {
    "backbone": "resnet50",  # released: resnet101
    "weights": "imagenet",
    "output_stride": 16,
    "dropout": 0.0,
    "epochs": 80,
    "batch_size": 8,
    "crop_size": 321,
    "scale": "uniform:0.5-2",
    "lr": 0.001,
    "head_lr_mult": 10.0,
    "weight_decay": 1e-4,
    "decay_norm": True,
    "ohem": None,
    "conf_thresh": 0.95,
    "eval_window": 0,
    "eval_interval": 1,
}
CITYSCAPES = VOC | {
    "epochs": 240,
    "crop_size": 801,
    "lr": 0.005,
    "head_lr_mult": 1.0,
    "ohem": (0.7, 100_000),  # probability, pixels an image (difference 3)
    "conf_thresh": 0.0,
    "eval_window": "crop",
    "eval_interval": 8,  # our choice
}
FOLDER = VOC | {"epochs": 60}
PRESETS = {
    "shapes": SHAPES,
    "shapes-zipf": SHAPES,
    "camvid": CAMVID,
    "voc": VOC,
    "cityscapes": CITYSCAPES,
    "folder": FOLDER,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run: the shared flags and those of UniMatch."""
    parser = cli.parser(__doc__, PRESETS)
    add_flags(parser)
    given, _ = parser.parse_known_args(argv)
    check_together(given, parser)
    views = 1 if given.fixmatch or not given.second_view else 2
    parser.set_defaults(views=views)  # by which `cli` counts memory, too
    args = cli.finish(parser, PRESETS, method_name(given), argv)
    if isinstance(args.conf_thresh, dict):
        args.conf_thresh = args.conf_thresh["fixmatch" if args.fixmatch else "unimatch"]
    if not (0 <= args.conf_thresh <= 1 and 0 <= args.feature_dropout < 1):
        parser.error("--conf-thresh lies in [0,1], --feature-dropout in [0,1)")
    if args.fixmatch or args.complementary:
        args.fp = False
    args.second_view = args.views == 2
    return args


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of UniMatch."""
    group = parser.add_argument_group("UniMatch")
    group.add_argument(
        "--fixmatch", action="store_true", help="FixMatch: one strong view, no dropped features"
    )
    group.add_argument(
        "--no-fp", dest="fp", action="store_false", help="no loss from dropped features"
    )
    group.add_argument(
        "--no-second-view",
        dest="second_view",
        action="store_false",
        help="one strong view instead of two",
    )
    group.add_argument(
        "--conf-thresh",
        type=float,
        metavar="τ",
        help="probability from which a pseudo-label is kept (default: 0.95; cityscapes 0; shapes "
        "0.7, but 0.95 with --fixmatch)",
    )
    group.add_argument(
        "--feature-dropout",
        type=float,
        default=0.5,
        metavar="P",
        help="chance of each channel to be dropped for that loss (default: 0.5)",
    )
    group.add_argument(
        "--complementary",
        action="store_true",
        help="experiment: instead of that loss, the strong views drop complementary channels",
    )
    group.add_argument(
        "--partner-as-released",
        action="store_true",
        help="mix each image with another crop of itself, as the release does "
        "(default: with another image)",
    )


def method_name(given: argparse.Namespace) -> str:
    """The name of the method that the flags choose, for the run folder."""
    parts = {
        "fixmatch": given.fixmatch,
        "nofp": not given.fp,
        "oneview": not given.second_view,
        "complementary": given.complementary,
        "samepartner": given.partner_as_released,
    }
    return "-".join(["unimatch", *(name for name, chosen in parts.items() if chosen)])


def check_together(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse flags that leave nothing of each other; argparse prints one line and exits with 2."""
    less = not given.fp or not given.second_view
    if given.fixmatch and (less or given.complementary):
        parser.error("--fixmatch goes without --no-fp, --no-second-view and --complementary")
    if not given.fp and not given.second_view:
        parser.error("--no-fp --no-second-view is --fixmatch")
    if given.complementary and less:
        parser.error("--complementary needs both strong views and has no --no-fp")


def add_strong_views(sample: dict, item: Item, views: int) -> dict:
    """Add `views` strong views of the sample's crop, each with colours and blur of its own."""
    strong = {
        f"image_strong_{view}": colour_jitter_and_blur(sample["image"])
        for view in range(1, views + 1)
    }
    return {**sample, **strong}


# --------------------------------------------------------------------------------------- the method


class Network(DeepLabV3Plus):
    """DeepLabv3+ whose features can be perturbed between the backbone and the head."""

    def forward(
        self, images: Tensor, dropout: float | None = None, complementary: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (N,C,h,w) of images (N,3,H,W).

        Args:
            images: what to label.
            dropout: chance of each channel to be dropped; then two logits are returned, from the
                features as they are and from the dropped ones. They share one pass of the head, so
                that its BatchNorm sees both; the backbone's sees the images once.
            complementary: the first half of `images` and the second one, two views of the same,
                drop complementary channels; see `complementary_masks`.
        """
        with self.precision(images):
            low, _, high = self.backbone(images)
            if complementary:
                masks = complementary_masks(len(images) // 2, (low.shape[1], high.shape[1]), low)
                low, high = low * masks[0], high * masks[1]
            if dropout is not None:
                low, high = (
                    torch.cat([part, F.dropout2d(part, dropout)]) for part in (low, high)
                )
            logits = self.classifier(self.decoder(self.fuse(low, high)))
            return logits if dropout is None else logits.chunk(2)


def complementary_masks(count: int, channels: tuple[int, ...], like: Tensor) -> list[Tensor]:
    """Factors for the features of two views of `count` images: m for one, 2 - m for the other.

    m is 0 or 2 with equal chance for each image and channel. A random half of the images keeps all
    channels, in both views and in all features. Source: the released UniMatch V2.

    Args:
        count: N.
        channels: D of each kind of features.
        like: a tensor whose device and dtype to take.

    Returns:
        (2N,D,1,1) for each D of `channels`.
    """
    whole = torch.rand(count, device=like.device).argsort() < count // 2
    masks = []
    for width in channels:
        first = 2.0 * torch.randint(2, (count, width), device=like.device)
        first = torch.where(whole[:, None], 1.0, first).to(like.dtype)
        masks.append(torch.cat([first, 2 - first])[:, :, None, None])
    return masks


def confident_labels(
    logits: Tensor, valid_mask: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Steps 2 and 5: argmax p where max p >= τ, else 255; 255 on padding, too.

    Args:
        logits: (N,C,h,w).
        valid_mask: (N,H,W) bool, False on padding.
        threshold: τ.

    Returns:
        (N,H,W) uint8; and how many labels are kept, an integer scalar.
    """
    size = valid_mask.shape[1:]
    found = pseudo_label(logits, size, threshold=threshold, valid_mask=valid_mask)
    return found.label, found.kept


@torch.no_grad()
def label_partner(network: nn.Module, partner: dict, threshold: float) -> Tensor:
    """Step 2: ŷ', (N,H,W) uint8, 255 where it is not kept.

    The network is in eval mode meanwhile, as released; BatchNorm's averages do not see x'_w.
    """
    valid_mask = partner["valid_mask"]
    network.eval()
    logits = network(normalise(partner["image"], valid_mask))
    network.train()
    return confident_labels(logits, valid_mask, threshold)[0]


def consistency_loss(logits: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """Step 6: CE of the pixels that have a label, divided by the number of all valid pixels.

    Args:
        logits: (N,C,h,w).
        target: (N,H,W), 255 where the label is not kept.
        valid_mask: (N,H,W) bool, False on padding.

    Returns:
        A scalar, the mean over the pixels of all processes.
    """
    total = cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    return global_mean(total, valid_mask.sum())


def mixed_views(
    batch: dict, partner: dict, iteration: int, args: argparse.Namespace
) -> tuple[list[Tensor], list[Tensor]]:
    """Step 3: x_k = M_k·s_k' + (1-M_k)·s_k for each view k.

    Args:
        batch: unlabelled images with their strong views.
        partner: those to be mixed in, with theirs.
        iteration: iterations done, for the boxes.
        args: `views`, `seed`.

    Returns:
        For each view a mask (N,H,W) bool, and images (N,3,H,W).
    """
    valid = batch["valid_mask"]
    count, size = valid.shape[:2]
    masks, images = [], []
    for view in range(1, args.views + 1):
        mask = small_box_masks(count, size, args.seed, iteration, view, valid.device)
        strong = normalise(batch[f"image_strong_{view}"], valid)
        strong_partner = normalise(partner[f"image_strong_{view}"], partner["valid_mask"])
        masks.append(mask)
        images.append(mix(mask, strong_partner, strong))
    return masks, images


def train_step(
    network: nn.Module,
    batch_l: dict,
    batch_u: dict,
    partner: dict,
    iteration: int,
    args: argparse.Namespace,
) -> dict[str, Tensor]:
    """Steps 1 to 7: the losses of one iteration, scalars on the device.

    Args:
        network: a `Network`, in train mode before and after.
        batch_l: labelled images.
        batch_u, partner: unlabelled images with their strong views; those to be mixed in.
        iteration: iterations done, for the boxes.
        args: `views`, `fp`, `complementary`, `conf_thresh`, `feature_dropout`, `ohem`, `seed`.
    """
    # 1. Images, normalised on the device, (N,3,H,W).
    images_l, target_l = normalise(batch_l["image"], batch_l["valid_mask"]), batch_l["target"]
    valid, valid_partner = batch_u["valid_mask"], partner["valid_mask"]
    weak = normalise(batch_u["image"], valid)

    # 2. ŷ' = argmax p'_w where max p'_w >= τ, else 255
    pseudo_partner = label_partner(network, partner, args.conf_thresh)

    # 3. x_k = M_k·s_k' + (1-M_k)·s_k
    masks, mixed = mixed_views(batch_u, partner, iteration, args)

    # 4. p_l and p_w in one pass, p_fp from their features with dropped channels; p_1 and p_2
    both = torch.cat([images_l, weak])
    if args.fp:
        clean, dropped = network(both, dropout=args.feature_dropout)
    else:
        clean = network(both)
    logits_l, logits_w = clean.split([len(images_l), len(weak)])
    logits_strong = network(torch.cat(mixed), complementary=args.complementary).chunk(args.views)

    # 5. ŷ = argmax p_w where max p_w >= τ, else 255;  ŷ_k = M_k·ŷ' + (1-M_k)·ŷ
    pseudo, kept = confident_labels(logits_w, valid, args.conf_thresh)
    targets = [mix(mask, pseudo_partner, pseudo) for mask in masks]
    valids = [mix(mask, valid_partner, valid) for mask in masks]

    # 6. L_s, and L_strong = ½·(mean CE(p_1, ŷ_1) + mean CE(p_2, ŷ_2))
    loss_sup = labelled_loss(logits_l, target_l, args.ohem)
    loss_strong = sum(map(consistency_loss, logits_strong, targets, valids)) / args.views
    losses = {"loss_sup": loss_sup, "loss_strong": loss_strong}
    loss_unsup = loss_strong
    if args.fp:
        # L_fp = mean CE(p_fp, ŷ)
        logits_fp = dropped[len(images_l) :]
        losses["loss_feature"] = consistency_loss(logits_fp, pseudo, valid)
        loss_unsup = 0.5 * losses["loss_feature"] + 0.5 * loss_strong

    # 7. L = ½·(L_s + ½·L_fp + ½·L_strong)
    loss = 0.5 * (loss_sup + loss_unsup)
    confident = add_up(kept) / add_up(valid.sum()).clamp_min(1)
    return {"loss": loss, **losses, "confident": confident}


def main(args: argparse.Namespace) -> None:
    """Train one network that learns from its own confident labels, and evaluate it."""
    run = Run(args)
    data = run.data
    network = run.place(Network.from_settings(args, data.num_classes))
    optimizer = sgd([network], args)
    run.keep(result="model", model=network, optimizer=optimizer)
    trained = run.parallel(network)

    strong = functools.partial(add_strong_views, views=args.views)
    labelled = run.batches(data.labelled, stream=0)
    unlabelled = run.batches(data.unlabelled, stream=1, strong=strong)
    order = 1 if args.partner_as_released else None  # the images of stream 1, in other windows
    partners = run.batches(data.unlabelled, stream=2, strong=strong, order=order)
    for iteration, batches in run.iterations(labelled, unlabelled, partners):
        if run.evaluates():
            run.report(evaluate({"model": network}, data.val, data, args), run.audit(network))
        measured = train_step(trained, *batches, iteration, args)
        run.step(measured["loss"], optimizer)
        run.log(measured)
    run.finish(evaluate({"model": network}, data.val, data, args), run.audit(network))


if __name__ == "__main__":
    runtime.launch(main, parse_args())
