"""The network against torchvision and against hand-computed sizes."""

import math
from types import SimpleNamespace

import pytest
import torch
from torchvision import models

import u2pl
from common import InputError, deeplabv3plus
from common.deeplabv3plus import ASPP, DeepLabV3Plus, ResNetBackbone, parameter_groups


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("name", "low", "high"), [("resnet18", 64, 512), ("resnet50", 256, 2048)])
def test_parameter_count_is_torchvisions_backbone_plus_the_head(name: str, low: int, high: int):
    classes = 21
    backbone = count(getattr(models, name)(weights=None))
    backbone -= high * 1000 + 1000  # its classifier
    # Branches, pooling, projection, BatchNorms.
    aspp = high * 256 + 3 * high * 256 * 9 + high * 256 + 5 * 256 * 256 + 6 * 2 * 256
    decoder = low * 48 + 2 * 48 + 304 * 256 * 9 + 2 * 256 + 256 * 256 * 9 + 2 * 256
    classifier = 256 * classes + classes
    assert count(DeepLabV3Plus(name, classes)) == backbone + aspp + decoder + classifier


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_resnet50_computes_what_torchvisions_does(output_stride: int):
    torch.manual_seed(0)
    ours = ResNetBackbone("resnet50", "none", output_stride).eval()
    theirs = models.resnet50(replace_stride_with_dilation=[False, output_stride == 8, True]).eval()
    state = {
        key.replace("stem.0.", "conv1.").replace("stem.1.", "bn1."): value
        for key, value in ours.state_dict().items()
    }
    assert theirs.load_state_dict(state, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    images = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        stem = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(stem))))
        torch.testing.assert_close(ours(images)[2], expected)


@pytest.mark.parametrize("name", ["tiny", "resnet18", "resnet50"])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_stride_and_head_resolution(name: str, output_stride: int):
    network = DeepLabV3Plus(name, 5, output_stride=output_stride).eval()
    with torch.no_grad():
        low, _, high = network.backbone(torch.zeros(1, 3, 96, 64))
        logits = network(torch.zeros(1, 3, 96, 64))
        odd = network(torch.zeros(1, 3, 65, 97))
    assert low.shape[2:] == (24, 16)
    assert high.shape[2:] == (96 // output_stride, 64 // output_stride)
    assert logits.shape == (1, 5, 24, 16)
    assert odd.shape == (1, 5, 17, 25)


def test_a_basic_block_network_dilates_every_3x3_after_the_first_block():
    backbone = ResNetBackbone("resnet18", "none", 8)
    blocks = (*backbone.layer3, *backbone.layer4)
    rates = [[conv.dilation[0] for conv in (block.conv1, block.conv2)] for block in blocks]
    assert rates == [[1, 1], [2, 2], [2, 2], [4, 4]]


@pytest.mark.parametrize(
    ("output_stride", "rates"), [(8, (12, 24, 36)), (16, (6, 12, 18)), (32, (3, 6, 9))]
)
def test_aspp_looks_as_far_as_in_the_paper(output_stride: int, rates: tuple[int, int, int]):
    """Each branch sees a point from the eight places at its distance, and from its own place."""
    aspp = DeepLabV3Plus("resnet18", 3, output_stride=output_stride).aspp
    point = torch.zeros(1, 512, 73, 73)
    point[:, :, 36, 36] = 1
    for branch, rate in zip(aspp.branches, (0, *rates), strict=True):
        with torch.no_grad():
            rows, columns = branch[0](point)[0].any(0).nonzero().unbind(1)
        assert rows.unique().tolist() == sorted({36 - rate, 36, 36 + rate})
        assert columns.unique().tolist() == sorted({36 - rate, 36, 36 + rate})


def test_nothing_negative_reaches_the_classifier_or_is_joined():
    """A head without its ReLUs has the same parameters, and could be trained as well."""
    torch.manual_seed(0)
    network, seen = DeepLabV3Plus("tiny", 6).train(), []
    watched = (*network.aspp.branches, network.aspp.pooled, network.aspp.project[0])
    for part in (*watched, network.low_level, *network.decoder):
        part.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        logits = network(torch.randn(2, 3, 64, 64))
    assert len(seen) == 9 and all(output.min() == 0 < output.max() for output in seen)
    assert logits.min() < 0


def test_deep_features_are_upsampled_with_corners_on_corners():
    network = DeepLabV3Plus("tiny", 6).eval()
    low, high = torch.randn(1, 24, 13, 10), torch.randn(1, 96, 5, 4)
    with torch.no_grad():
        deep, fused = network.aspp(high), network.fuse(low, high)[:, :64]
    torch.testing.assert_close(fused[..., ::3, ::3], deep)


def test_imagenet_weights_are_those_that_the_methods_were_published_with(monkeypatch):
    """torchvision's V2 weights are better, and results would no longer be comparable."""
    asked = []

    def get_model(name: str, weights: str | None):
        asked.append((name, weights))
        return models.get_model(name, weights=None)

    monkeypatch.setattr(deeplabv3plus, "get_model", get_model)
    for weights in ("imagenet", "none"):
        DeepLabV3Plus("resnet18", 3, weights)
    assert asked == [("resnet18", "IMAGENET1K_V1"), ("resnet18", None)]


def test_weights_from_a_file_and_from_a_wrong_file(tmp_path):
    net = models.resnet18(weights=None)
    torch.save(net.state_dict(), tmp_path / "r18.pt")
    network = DeepLabV3Plus("resnet18", 3, str(tmp_path / "r18.pt"))
    torch.testing.assert_close(network.backbone.layer4[1].conv2.weight, net.layer4[1].conv2.weight)
    with pytest.raises(InputError, match=r"r18\.pt: weights of another network"):
        DeepLabV3Plus("resnet50", 3, str(tmp_path / "r18.pt"))
    torch.save({"epoch": torch.tensor(1)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt: not the weights of this backbone"):
        DeepLabV3Plus("resnet18", 3, str(tmp_path / "other.pt"))
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(InputError, match=r"text\.pt: not a file of weights"):
        DeepLabV3Plus("resnet18", 3, str(tmp_path / "text.pt"))


def test_weights_may_come_from_a_network_that_several_processes_trained(tmp_path):
    net = models.resnet18(weights=None)
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "r18.pt")
    network = DeepLabV3Plus("resnet18", 3, str(tmp_path / "r18.pt"))
    torch.testing.assert_close(network.backbone.layer4[1].conv2.weight, net.layer4[1].conv2.weight)


def test_dropout_leaves_out_whole_channels():
    torch.manual_seed(0)
    aspp = ASPP(8, 64, (1, 2, 3), dropout=0.5).train()
    with torch.no_grad():
        dropped = (aspp(torch.randn(4, 8, 9, 9)) == 0).all(3).all(2)
    assert 0.3 < dropped.float().mean() < 0.7


def test_parameter_groups_hold_each_parameter_once():
    network = DeepLabV3Plus("tiny", 6)
    groups = parameter_groups(network, 0.1, 10, 1e-4, decay_norm=False)
    held = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, network.parameters()))
    rates = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert rates[id(network.backbone.stem[0][0].weight)] == (0.1, 1e-4)
    assert rates[id(network.backbone.stem[0][1].weight)] == (0.1, 0.0)
    assert rates[id(network.classifier.weight)] == (1.0, 1e-4)
    assert rates[id(network.classifier.bias)] == (1.0, 0.0)


def test_one_image_cannot_train():
    with pytest.raises(ValueError, match="more than 1 value"):
        DeepLabV3Plus("tiny", 6).train()(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("backbone", ["tiny", "resnet50"])
@pytest.mark.parametrize("num_classes", [6, 21])
def test_a_fresh_network_knows_nothing(backbone: str, num_classes: int):
    """The loss of a fresh classifier on random images is ln C: it may not be sure of anything.

    In train mode: the running statistics of a fresh BatchNorm are not yet those of any image.
    """
    torch.manual_seed(0)
    args = SimpleNamespace(
        backbone=backbone,
        weights="none",
        output_stride=16,
        dropout=0.5,
        contrast=True,
        aux_weight=0.4,
    )
    network = u2pl.Network(args, num_classes)  # the plain network with every further head
    with torch.no_grad():
        logits, features, auxiliary = network(torch.randn(4, 3, 96, 96), return_features=True)
    for head in (logits, auxiliary):
        target = torch.randint(num_classes, (4, *head.shape[2:]))
        loss = torch.nn.functional.cross_entropy(head, target).item()
        assert loss == pytest.approx(math.log(num_classes), rel=0.1)
    assert features.std() < 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_settings_build_the_network_and_amp_its_precision(dtype: torch.dtype | None):
    args = SimpleNamespace(backbone="tiny", weights="none", output_stride=8, dropout=0.25)
    network = DeepLabV3Plus.from_settings(args, 6).eval()
    network.amp = dtype
    assert network.aspp.project[-1].p == 0.25
    with torch.no_grad():
        assert network.backbone(torch.zeros(1, 3, 64, 64))[2].shape[2:] == (8, 8)
        logits = network(torch.zeros(1, 3, 64, 64))
    assert logits.shape == (1, 6, 16, 16) and logits.dtype == (dtype or torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def test_joined_features_keep_the_layout_of_a_gpu():
    """With channels_last throughout nothing is laid out anew, and the values are the same."""
    torch.manual_seed(0)
    network = DeepLabV3Plus("tiny", 6).eval()
    images = torch.randn(2, 3, 64, 48)
    layouts = []

    def note(module, inputs):
        layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    for joined in (network.aspp.project, network.decoder):  # what these get is a concatenation
        joined.register_forward_pre_hook(note)
    with torch.no_grad():
        network.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    assert layouts == [True, True]


def test_the_pooled_branch_is_a_constant_in_either_layout():
    torch.manual_seed(0)
    aspp = ASPP(8, 4, (1, 2, 3), dropout=0.0).eval()
    features = torch.randn(2, 8, 5, 7)
    joined = []
    aspp.project.register_forward_pre_hook(lambda module, inputs: joined.append(inputs[0]))
    with torch.no_grad():
        aspp(features)
        aspp(features.to(memory_format=torch.channels_last))
        expected = aspp.pooled(features).expand(-1, -1, 5, 7)
    assert torch.equal(joined[0][:, 16:], expected)
    torch.testing.assert_close(joined[1], joined[0])
