"""UniMatch and, with --fixmatch, FixMatch.

UniMatch: Yang, Qi, Feng, Zhang, Shi; CVPR 2023, arXiv:2208.09910. FixMatch: Sohn et al., NeurIPS
2020, arXiv:2001.07685, in the form that UniMatch's authors gave it for segmentation. One network,
no teacher: what it predicts with confidence for a weakly augmented image is the label of the same
image under two strong augmentations and under a perturbation of its features.

    x_u --> weak x_w ---> f -+-> p_w --> ŷ where sure ---+------------------+   no gradient
        |                    |                           |                  |   through ŷ
        |                    +-> features dropped -> p_fp -> CE(p_fp, ŷ)    |
        |                                                                   |
        +-> strong s1 --> mixed by M1 --> x_1 --> f --> p_1 --> CE(p_1, ŷ mixed by M1)
        +-> strong s2 --> mixed by M2 --> x_2 --> f --> p_2 --> CE(p_2, ŷ mixed by M2)
                              ^
    x'_u, mixed in -----------+      another batch; its labels come from x'_w, in eval mode

1. Take labelled images x_l, unlabelled ones x_u and, to be mixed in, x'_u. Each unlabelled image
   has three views of one crop: weak x_w and, with two independent draws of colours and blur, strong
   s1, s2.
2. Label x'_w with the network in eval mode. A label is kept where the network is sure:
       ŷ' = argmax p'_w where max p'_w >= τ, else 255                            [FixMatch]
3. Mix the strong views by small boxes M1, M2, drawn independently; half of the images get none:
       x_k = M_k·s_k' + (1-M_k)·s_k                                              [DusPerb]
4. One forward pass of [x_l; x_w]. The features of both, at stride 4 and of the last layer, take a
   second way through the head with half of their channels dropped. One more pass of [x_1; x_2]:
       p_l, p_w, p_fp = f(x_l), f(x_w), head(dropped features of x_w)            [UniPerb]
       p_1, p_2 = f(x_1), f(x_2)
5. Label x_w as in 2., without gradient, and mix the labels like the images:
       y_k = M_k·ŷ' + (1-M_k)·ŷ
6. Losses. A pixel whose label is not kept adds nothing, but counts in the mean:
       L_x = CE(p_l, y)                        (cityscapes: on the hard pixels, OHEM)
       L_fp = mean over valid pixels of CE(p_fp, ŷ)
       L_s = ½·(mean CE(p_1, y_1) + mean CE(p_2, y_2))
7. L = ½·(L_x + ½·L_fp + ½·L_s);  SGD step.                        [λ = μ = ½, as released]

--fixmatch has one strong view and no dropped features: L = ½·(L_x + L_s). The steps between are
--no-fp (L = ½·(L_x + L_s), two views) and --no-second-view (L_s of one view). The ½ around
everything halves the learning rate's effect.

| symbol       | variable                | symbol   | variable          | symbol | variable     |
|--------------|-------------------------|----------|-------------------|--------|--------------|
| x_l, y       | images_l, target_l      | f, head  | network           | L_x    | loss_sup     |
| x_w, x'_w    | weak, partner's weak    | ŷ, ŷ'    | pseudo, pseudo_p  | L_fp   | loss_feature |
| s1, s2       | batch["image_strong_k"] | M_k      | masks             | L_s    | loss_strong  |
| x_1, x_2     | mixed                   | y_k      | targets           | τ      | conf_thresh  |

`confident` is the share of the valid pixels of x_w on which max p_w >= τ.

Differences from the paper and the released code:
1. The partner x'_u is an independent batch. In the release both loaders read one sampler, so that
   the partner is another crop of the same image: --partner-as-released.
2. A mean is over the valid pixels of all processes; the release averages the means of its four. A
   padded pixel counts nowhere in either. The release opens the masks of unlabelled images to find
   the padding; here they are never opened.
3. OHEM compares the pixels of all images of a process and keeps 100 000 an image; the release keeps
   200 000 of a process's two.
4. The learning rate follows the iteration. In the release it is set after the step, so that the
   first two steps have the same. The last result counts here, the best on the validation images
   there. A class that is in neither prediction nor target does not count here, and as 0 there; the
   last sliding windows are flush with the border here, and smaller there.
5. The network is this project's DeepLabv3+ with a ResNet-50; the release's is a ResNet-101 (on
   Cityscapes ResNet-50, too) whose stem has three 3x3 convolutions. Neither drops features outside
   step 4; on the built-in set dropout is 0.1, as for the other methods.
6. The blur is torchvision's, 13 pixels wide; the release's is PIL's, which approximates a Gaussian
   by repeated box filters.
7. --complementary is an experiment after UniMatch V2 (arXiv:2410.10777), which trains a vision
   transformer with an averaged teacher. Instead of dropping features for p_fp, the two strong views
   drop complementary channels: m·features and (2-m)·features, m = 0 or 2, on a random half of the
   images. L = ½·(L_x + L_s). There all features have as many channels and share m; here the two
   kinds have their own.

    python unimatch.py                                       # built-in data, a CPU, under 2 minutes
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
from common.datasets import Item
from common.deeplabv3plus import DeepLabV3Plus
from common.distributed import add_up, global_mean
from common.evaluate import evaluate
from common.losses import labelled_loss
from common.run import Run, sgd
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
    "lr": 0.03,
    "head_lr_mult": 3.0,
    "weight_decay": 1e-4,
    "decay_norm": False,
    "ohem": None,
    "conf_thresh": 0.95,
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
    args = cli.finish(parser, PRESETS, method_name(given), argv)
    check(args, parser)
    # What the flags amount to.
    args.views = 2 if args.second_view and not args.fixmatch else 1
    args.features = args.fp and not args.fixmatch and not args.complementary
    return args


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of UniMatch."""
    parser.set_defaults(views=2)  # at most: `cli` counts the loader's memory by it
    group = parser.add_argument_group("UniMatch")
    group.add_argument(
        "--fixmatch", action="store_true", help="FixMatch: one strong view, no dropped features"
    )
    group.add_argument(
        "--no-fp",
        dest="fp",
        action="store_false",
        help="without L_fp, the loss from dropped features",
    )
    group.add_argument(
        "--no-second-view", dest="second_view", action="store_false", help="one strong view"
    )
    group.add_argument(
        "--conf-thresh",
        type=float,
        metavar="τ",
        help="probability from which a pseudo-label is kept (default: 0.95, cityscapes 0)",
    )
    group.add_argument(
        "--feature-dropout",
        type=float,
        default=0.5,
        metavar="P",
        help="chance of each channel to be dropped (default: 0.5)",
    )
    group.add_argument(
        "--complementary",
        action="store_true",
        help="experiment: the strong views drop complementary channels, instead of L_fp",
    )
    group.add_argument(
        "--partner-as-released",
        action="store_true",
        help="mix with another crop of the same image",
    )


def method_name(given: argparse.Namespace) -> str:
    """The name of the method that the flags choose, for the run folder."""
    parts = {
        "fixmatch": given.fixmatch,
        "nofp": not given.fp,
        "oneview": not given.second_view,
        "complementary": given.complementary,
    }
    return "-".join(["unimatch", *(name for name, chosen in parts.items() if chosen)])


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse values that cannot work; argparse prints one line and exits with 2."""
    if not (0 <= args.conf_thresh <= 1 and 0 <= args.feature_dropout < 1):
        parser.error("--conf-thresh lies in [0,1], --feature-dropout in [0,1)")
    if args.complementary and (args.fixmatch or not args.second_view):
        parser.error("--complementary needs both strong views")


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
        A mask (N,H,W) bool a view; images (N,3,H,W) a view.
    """
    valid = batch["valid_mask"]
    count, size = valid.shape[:2]
    masks, images = [], []
    for view in range(1, args.views + 1):
        mask = small_box_masks(count, size, args.seed, iteration, view, valid.device)
        strong = normalise(batch[f"image_strong_{view}"], valid)
        strong_p = normalise(partner[f"image_strong_{view}"], partner["valid_mask"])
        masks.append(mask)
        images.append(mix(mask, strong_p, strong))
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
        args: `views`, `features`, `complementary`, `conf_thresh`, `feature_dropout`, `ohem`,
            `seed`.
    """
    # 1. Images, normalised on the device, (N,3,H,W).
    images_l, target_l = normalise(batch_l["image"], batch_l["valid_mask"]), batch_l["target"]
    valid, valid_p = batch_u["valid_mask"], partner["valid_mask"]
    weak, weak_p = normalise(batch_u["image"], valid), normalise(partner["image"], valid_p)

    # 2. ŷ' = argmax p'_w where max p'_w >= τ, else 255, in eval mode
    network.eval()
    with torch.no_grad():
        pseudo_p, _ = confident_labels(network(weak_p), valid_p, args.conf_thresh)
    network.train()

    # 3. x_k = M_k·s_k' + (1-M_k)·s_k
    masks, mixed = mixed_views(batch_u, partner, iteration, args)

    # 4. p_l and p_w in one pass, p_fp from their features with dropped channels; p_1 and p_2
    both = torch.cat([images_l, weak])
    if args.features:
        clean, dropped = network(both, dropout=args.feature_dropout)
    else:
        clean = network(both)
    logits_l, logits_w = clean.split([len(images_l), len(weak)])
    logits_s = network(torch.cat(mixed), complementary=args.complementary).chunk(args.views)

    # 5. ŷ, and y_k = M_k·ŷ' + (1-M_k)·ŷ
    pseudo, kept = confident_labels(logits_w, valid, args.conf_thresh)
    targets = [mix(mask, pseudo_p, pseudo) for mask in masks]
    valids = [mix(mask, valid_p, valid) for mask in masks]

    # 6. L_x and L_s = ½·(mean CE(p_1, y_1) + mean CE(p_2, y_2))
    loss_sup = labelled_loss(logits_l, target_l, args.ohem)
    loss_strong = sum(map(consistency_loss, logits_s, targets, valids)) / args.views
    losses = {"loss_sup": loss_sup, "loss_strong": loss_strong}
    loss_unsup = loss_strong
    if args.features:
        # L_fp = mean CE(p_fp, ŷ)
        losses["loss_feature"] = consistency_loss(dropped[len(images_l) :], pseudo, valid)
        loss_unsup = 0.5 * losses["loss_feature"] + 0.5 * loss_strong

    # 7. L = ½·(L_x + ½·L_fp + ½·L_s)
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
    order = 1 if args.partner_as_released else 2
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
