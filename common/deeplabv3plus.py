"""DeepLabv3+ (Chen et al., ECCV 2018, arXiv:1802.02611): the one network that all methods share.

    image (N,3,H,W) -> backbone -> layer1 (stride 4) ---- 1x1 conv, 48 channels --+
                                -> layer4 (stride 8/16/32) -> ASPP -> upsample ---+
                                                                                  |
                      logits <- 1x1 classifier <- two 3x3 convs <- concatenation -+

The network returns the head's logits at stride 4 and never upsamples them. The losses and the
evaluation do that, because they can do it without ever holding an N x C x H x W tensor (see
`kernels/`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model, resnet

from common import InputError

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
BACKBONES = ("tiny", *RESNETS)
# Dilation rates of ASPP by output stride: the paper's 6/12/18 at stride 16, doubled at 8, halved
# at 32.
ASPP_RATES = {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}
TINY_ASPP_RATES = {8: (2, 4, 6), 16: (1, 2, 3), 32: (1, 2, 3)}
BLOTS = Path(__file__).with_name("tiny.pt")


def dilate_layer(layer: nn.Sequential, dilation: int, previous: int) -> None:
    """Trade the stride of one ResNet stage for dilation, in place.

    torchvision's own `replace_stride_with_dilation` refuses ResNet-18/34, so this does it for both
    kinds of block, with torchvision's convention: the first block still sees the input's grid and
    keeps the `previous` dilation.

    Args:
        layer: one of `layer2`..`layer4` of a torchvision ResNet.
        dilation: dilation of every 3x3 convolution after the first block.
        previous: dilation of the stage before, used by the first block.
    """
    for index, block in enumerate(layer):
        rate = previous if index == 0 else dilation
        for conv in (module for module in block.modules() if isinstance(module, nn.Conv2d)):
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (rate, rate)


class ResNetBackbone(nn.Module):
    """torchvision's ResNet without its classifier.

    Args:
        name: one of `RESNETS`.
        weights: "imagenet" (torchvision's IMAGENET1K_V1), "none", or the path of a torchvision
            state dict.
        output_stride: 8, 16 or 32.

    Shape: (N,3,H,W) float -> layer1 (N,c1,H/4,W/4), layer3 and layer4 (stride <= `output_stride`).

    Raises:
        InputError: the weights cannot be downloaded or read.
    """

    def __init__(self, name: str, weights: str, output_stride: int):
        super().__init__()
        try:
            net = get_model(name, weights="IMAGENET1K_V1" if weights == "imagenet" else None)
        except OSError as error:  # urllib's errors are of this kind
            raise InputError(
                f"could not download {name}'s ImageNet weights ({error}); --weights PATH or none"
            ) from None
        if weights not in ("imagenet", "none"):
            load_backbone_file(net, Path(weights))
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4
        if output_stride == 8:
            dilate_layer(self.layer3, 2, previous=1)
            dilate_layer(self.layer4, 4, previous=2)
        elif output_stride == 16:
            dilate_layer(self.layer4, 2, previous=1)
        expansion = 1 if name in ("resnet18", "resnet34") else 4
        self.low_channels = 64 * expansion
        self.mid_channels = 256 * expansion
        self.out_channels = 512 * expansion
        self.aspp_rates = ASPP_RATES[output_stride]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low = self.layer1(self.stem(images))
        mid = self.layer3(self.layer2(low))
        return low, mid, self.layer4(mid)


class TinyBackbone(nn.Module):
    """A ResNet of four BasicBlocks (0.22 M parameters) for 64-pixel images on a CPU.

    Its interface is that of `ResNetBackbone`. Its pretrained weights, "blots", are of
    `common/pretrain.py`. They were trained at output stride 8; at 16 and 32 further layers have
    strides, so that the last maps are on another grid than these weights have seen.
    """

    low_channels, mid_channels, out_channels = 24, 48, 96

    def __init__(self, weights: str, output_stride: int):
        super().__init__()
        self.stem = nn.Sequential(conv_bn_relu(3, 16, 3, stride=2))
        self.layer1 = nn.Sequential(tiny_block(16, 24, stride=2))
        self.layer2 = nn.Sequential(tiny_block(24, 48, stride=2))
        self.layer3 = nn.Sequential(tiny_block(48, 48, stride=2 if output_stride >= 16 else 1))
        self.layer4 = nn.Sequential(tiny_block(48, 96, stride=2 if output_stride == 32 else 1))
        self.aspp_rates = TINY_ASPP_RATES[output_stride]
        self.apply(initialise)
        if weights != "none":
            load_backbone_file(self, BLOTS if weights == "blots" else Path(weights))

    forward = ResNetBackbone.forward


def tiny_block(channels_in: int, channels_out: int, stride: int) -> resnet.BasicBlock:
    """torchvision's BasicBlock with a projected shortcut."""
    conv = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
    shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels_out))
    return resnet.BasicBlock(channels_in, channels_out, stride, shortcut)


def conv_bn_relu(
    channels_in: int, channels_out: int, kernel: int, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU; "same" padding."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling.

    A 1x1 convolution, three dilated 3x3 convolutions and the mean over the whole image, side by
    side, are projected to `width` channels.

    Source: arXiv:1706.05587, section 3.3. Shape: (N,c,h,w) -> (N,width,h,w).

    Args:
        channels_in: c.
        width: channels of each branch and of the result.
        rates: dilations of the three 3x3 convolutions.
        dropout: probability of the Dropout2d at the end.
    """

    def __init__(self, channels_in: int, width: int, rates: tuple[int, int, int], dropout: float):
        super().__init__()
        dilated = [conv_bn_relu(channels_in, width, 3, dilation=rate) for rate in rates]
        self.branches = nn.ModuleList([conv_bn_relu(channels_in, width, 1), *dilated])
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_bn_relu(channels_in, width, 1))
        self.project = nn.Sequential(conv_bn_relu(5 * width, width, 1), nn.Dropout2d(dropout))

    def forward(self, features: Tensor) -> Tensor:
        pooled = self.pooled(features)  # a 1x1 map, which upsampled is a constant
        pooled = pooled.expand(-1, -1, *features.shape[2:])
        if features.is_contiguous(memory_format=torch.channels_last):
            # An expanded map has no layout of its own: with it, all that is joined would be laid
            # out anew, as NCHW.
            pooled = pooled.contiguous(memory_format=torch.channels_last)
        branches = [branch(features) for branch in self.branches]
        return self.project(torch.cat([*branches, pooled], dim=1))


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+ whose logits stay at the head's resolution.

    Args:
        backbone: one of `BACKBONES`.
        num_classes: channels of the logits.
        weights: "imagenet" ("blots" for `tiny`), "none", or the path of a backbone state dict.
        output_stride: stride of the deepest features: 8, 16 or 32.
        dropout: probability of the Dropout2d after ASPP.

    Shape: images (N,3,H,W) float, normalised -> logits (N,num_classes,ceil(H/4),ceil(W/4)), before
    softmax.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        weights: str = "none",
        output_stride: int = 16,
        dropout: float = 0.5,
    ):
        super().__init__()
        if backbone == "tiny":
            width, low_width = 64, 16
            self.backbone = TinyBackbone(weights, output_stride)
        else:
            width, low_width = 256, 48
            self.backbone = ResNetBackbone(backbone, weights, output_stride)
        self.aspp = ASPP(self.backbone.out_channels, width, self.backbone.aspp_rates, dropout)
        self.low_level = conv_bn_relu(self.backbone.low_channels, low_width, 1)
        self.decoder = nn.Sequential(
            conv_bn_relu(width + low_width, width, 3),
            conv_bn_relu(width, width, 3),
        )
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.feature_channels = width
        self.amp: torch.dtype | None = None  # autocast type of forward passes, set by `Run.place`
        for part in self.head_modules():
            part.apply(initialise)

    @classmethod
    def from_settings(cls, args: argparse.Namespace, num_classes: int) -> "DeepLabV3Plus":
        """The network that the flags `--backbone`, `--weights`, ... ask for."""
        return cls(args.backbone, num_classes, args.weights, args.output_stride, args.dropout)

    def head_modules(self) -> list[nn.Module]:
        """Everything that no pretrained weights exist for."""
        return [module for name, module in self.named_children() if name != "backbone"]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N,C,h,w) at stride 4."""
        with self.precision(images):
            low, _, high = self.backbone(images)
            return self.classifier(self.decoder(self.fuse(low, high)))

    def precision(self, images: Tensor) -> torch.autocast:
        """Mixed precision for a forward pass, where `amp` is a type."""
        dtype = self.amp or torch.bfloat16
        return torch.autocast(images.device.type, dtype=dtype, enabled=self.amp is not None)

    def fuse(self, low: Tensor, high: Tensor) -> Tensor:
        """The decoder's input: projected `low` features beside ASPP's of `high`, upsampled.

        Returns:
            (N,304,h,w), with `tiny` (N,80,h,w).
        """
        high = self.aspp(high)
        high = F.interpolate(high, size=low.shape[2:], mode="bilinear", align_corners=True)
        return torch.cat([high, self.low_level(low)], dim=1)


class MeanLogits(nn.Module):
    """Several networks as one: the mean of their logits."""

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N,C,h,w) of images (N,3,H,W)."""
        return sum(member(images) for member in self.members) / len(self.members)


def full_softmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Softmax maps (N,C,H,W) float32 of logits (N,C,h,w), interpolated to `size` = (H,W)."""
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=True).softmax(1)


def initialise(module: nn.Module) -> None:
    """Kaiming-normal weights (fan out) for every convolution that a BatchNorm follows.

    In this file such a convolution has no bias. The layers without a BatchNorm (the classifier, and
    in U2PL the last feature and auxiliary convolutions) must not get them: fan out of a 1x1
    classifier is the number of classes C, so its weights would have a deviation of sqrt(2/C) and a
    fresh network's loss would be twice ln C. They keep PyTorch's default,
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which the released U2PL, ST++ and UniMatch use.
    """
    if isinstance(module, nn.Conv2d) and module.bias is None:
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def load_backbone_file(net: nn.Module, path: Path) -> None:
    """Load a backbone's state dict from a file, in whatever precision; a classifier is ignored.

    Args:
        net: a torchvision ResNet or a `TinyBackbone`.
        path: the file.

    Raises:
        InputError: the file is not such a state dict, or tensors are missing; the message names the
            file and the first missing key.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise InputError(f"{path}: not a file of weights ({type(error).__name__})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {
        key.removeprefix("module."): value
        for key, value in state.items()
        if not key.startswith("fc.")
    }
    try:
        missing = net.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise InputError(f"{path}: weights of another network: {reason}") from None
    missing = [key for key in missing if not key.startswith("fc.")]
    if missing:
        raise InputError(
            f"{path}: not the weights of this backbone: "
            f"{len(missing)} tensors are missing, such as {missing[0]}"
        )


def parameter_groups(
    network: DeepLabV3Plus,
    lr: float,
    head_lr_mult: float,
    weight_decay: float,
    decay_norm: bool,
) -> list[dict]:
    """Optimiser groups: backbone at `lr`, head at `lr * head_lr_mult`.

    Args:
        network: the network.
        lr: learning rate of the backbone.
        head_lr_mult: the head's multiple of it.
        weight_decay: L2 coefficient.
        decay_norm: False leaves BatchNorm and biases (every parameter of one dimension) without
            decay, as CPS does.

    Returns:
        Four groups: of the backbone and of the head, each first the tensors, then the vectors.
    """
    backbone, head = [network.backbone], network.head_modules()
    groups = []
    for modules, rate in ((backbone, lr), (head, lr * head_lr_mult)):
        parameters = [parameter for module in modules for parameter in module.parameters()]
        for vectors in (False, True):
            decay = weight_decay if decay_norm or not vectors else 0.0
            group = [parameter for parameter in parameters if (parameter.ndim == 1) == vectors]
            groups.append({"params": group, "lr": rate, "weight_decay": decay})
    return groups
