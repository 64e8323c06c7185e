"""Prediction of a folder of images, and which of them to label next."""

import csv
import json
import math
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, damage, run, write_picture
from PIL import ExifTags, Image
from torch import nn

import stpp
import supervised
from common import InputError, checkpoint, cli, label_next, predict
from common.deeplabv3plus import DeepLabV3Plus
from common.evaluate import averaged_probabilities
from common.predict import EqualSizes, Files, overlay, predict_batch
from common.run import sgd


@pytest.fixture
def trained(begin) -> Path:
    """A run of the built-in set with a checkpoint of a fresh network."""
    started = begin(supervised, "--max-iters", "1")
    network = started.place(DeepLabV3Plus.from_settings(started.args, started.data.num_classes))
    started.keep(result="model", model=network, optimizer=sgd([network], started.args))
    started.save()
    return Path(started.args.output_dir)


@pytest.fixture
def images(tmp_path) -> Path:
    """Three images of two sizes, one of them in a subfolder."""
    folder = tmp_path / "images"
    write_picture(folder / "one.jpg", (90, 70), seed=1)
    write_picture(folder / "deep" / "two.v1.png", (64, 64), seed=2)
    write_picture(folder / "three.jpg", (90, 70), seed=3)
    return folder


def call(*arguments) -> None:
    """`common.predict` on the CPU."""
    predict.main([*map(str, arguments), "--device", "cpu"])


def rows(folder: Path) -> dict[str, dict[str, str]]:
    """predictions.csv by image, none of which stands there twice."""
    with open(folder / "predictions.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert len({row["image"] for row in found}) == len(found)
    return {row["image"]: row for row in found}


# -------------------------------------------------------------------------------- what is written


def test_masks_and_overlays_have_the_images_size(trained, images, capsys):
    write_picture(images / "._one.jpg")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(images / "one.jpg").save(images / "turned.jpg", exif=exif)
    out = images / "out"
    call(trained, images, "--output", out)
    assert re.search(r"^4 images predicted in .* \(.* a second\)", capsys.readouterr().out)
    mask = Image.open(out / "masks" / "one.png")
    assert mask.mode == "P" and mask.size == (90, 70) and np.asarray(mask).max() < 12
    assert mask.getpalette()[3:6] == [220, 60, 60]
    assert Image.open(out / "overlays" / "one.jpg").size == (90, 70)
    assert Image.open(out / "masks" / "turned.png").size == (70, 90)
    assert Image.open(out / "overlays" / "deep" / "two.v1.jpg").size == (64, 64)
    call(trained, images, "--output", out)  # the overlays are no images to predict
    assert re.search(r"^0 images predicted, 4 were there already", capsys.readouterr().out)


def test_the_table_tells_of_each_image(trained, images, tmp_path):
    call(trained, images, "--output", tmp_path / "out", "--overlay", "off", "--uncertainty")
    assert not (tmp_path / "out" / "overlays").exists()
    description = checkpoint.read_description(trained)
    table = rows(tmp_path / "out")
    assert set(table) == {"one", "three", "deep/two.v1"}
    for name, row in table.items():
        mask = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{name}.png"))
        shares = [float(row[label]) for label in description["classes"]]
        assert shares == pytest.approx(
            np.bincount(mask.ravel(), minlength=12) / mask.size, abs=1e-4
        )
        entropy = np.asarray(Image.open(tmp_path / "out" / "entropy" / f"{name}.png"))
        assert entropy.shape == mask.shape
        # The mean at a quarter of the resolution is that of the map but for its rounding to 1/255.
        mean = entropy.mean() / 255 * math.log(12)
        assert float(row["mean_entropy"]) == pytest.approx(mean, rel=0.05)
        assert 1 / 12 <= float(row["mean_confidence"]) <= 1


def test_large_images_get_masks_of_their_own_size(trained, images, tmp_path):
    description = json.loads((trained / "args.json").read_text())
    description["args"]["long_side"] = 48
    (trained / "args.json").write_text(json.dumps(description))
    call(trained, images, "--output", tmp_path / "out", "--uncertainty")
    assert Image.open(tmp_path / "out/masks/one.png").size == (90, 70)
    assert Image.open(tmp_path / "out/entropy/one.png").size == (90, 70)
    assert Image.open(tmp_path / "out/overlays/one.jpg").size == (48, 37)  # that of the network


def test_an_overlay_leaves_the_background_as_it_is():
    image = torch.full((4, 6, 3), 100, dtype=torch.uint8)
    label = torch.zeros(8, 12, dtype=torch.uint8)
    label[:4, :6] = 1  # the first two rows and three columns of the smaller image
    colours = [(0, 0, 0), (200, 0, 40)]
    half = overlay(image, label, colours, "half", background=0)
    assert (half[:2, :3] == (150, 50, 70)).all() and (half[2:] == 100).all()
    assert (overlay(image, label, colours, "half")[2:] == 50).all()
    both = overlay(image, label, colours, "side-by-side", background=0)
    assert both.shape == (4, 12, 3) and (both[:, :6] == 100).all() and (both[2:, 6:] == 0).all()


# ------------------------------------------------------------------ going on, and starting anew


def test_only_what_is_missing_is_predicted(trained, images, tmp_path, capsys):
    """A call that was killed leaves a mask without a line, or half a line."""
    out = tmp_path / "out"
    call(trained, images, "--output", out)
    text = (out / "predictions.csv").read_text()
    before = rows(out)
    last = text.splitlines()[-1].split(",")[0]
    (out / "predictions.csv").write_text(text[:-30])  # in the middle of the last line
    (out / "overlays" / "one.jpg").unlink()
    missing = len({last, "one"})
    capsys.readouterr()
    call(trained, images, "--output", out)
    assert f"{missing} images predicted" in capsys.readouterr().out
    assert rows(out) == before and (out / "overlays" / "one.jpg").is_file()


def test_an_image_that_has_changed_is_predicted_again(trained, images, tmp_path, capsys):
    call(trained, images, "--output", tmp_path / "out")
    os.utime(images / "one.jpg", (2e9, 2e9))
    capsys.readouterr()
    call(trained, images, "--output", tmp_path / "out")
    assert re.search(r"^1 images predicted.*2 were there already", capsys.readouterr().out)


def test_another_folder_with_the_same_names_is_predicted(trained, images, tmp_path, capsys):
    """Found wrong once: the masks of the first folder stood for those of the second."""
    other = tmp_path / "other"
    write_picture(other / "one.jpg", (32, 32), seed=9)
    os.utime(other / "one.jpg", (1e9, 1e9))  # older than the first masks
    call(trained, images, "--output", tmp_path / "out")
    capsys.readouterr()
    call(trained, other, "--output", tmp_path / "out")
    assert capsys.readouterr().out.startswith("1 images predicted")
    assert Image.open(tmp_path / "out/masks/one.png").size == (32, 32)
    assert rows(tmp_path / "out")["one"]["file"] == str((other / "one.jpg").resolve())
    assert set(rows(tmp_path / "out")) == {"one", "three", "deep/two.v1"}


@pytest.mark.parametrize("change", ["checkpoint", "tta", "overwrite", "overlay", "maps"])
def test_other_settings_predict_all_again(trained, images, tmp_path, capsys, change: str):
    call(trained, images, "--output", tmp_path / "out")
    flags = {
        "checkpoint": (),
        "tta": ("--tta", "1"),
        "overwrite": ("--overwrite",),
        "overlay": ("--overlay", "side-by-side"),
        "maps": ("--uncertainty",),
    }[change]
    if change == "checkpoint":
        os.utime(trained / "last.pt", (2e9, 2e9))
    capsys.readouterr()
    call(trained, images, "--output", tmp_path / "out", *flags)
    assert capsys.readouterr().out.startswith("3 images predicted")
    assert len(rows(tmp_path / "out")) == 3


def test_maps_of_another_image_are_not_kept(trained, images, tmp_path):
    """Found wrong once: the map of the first folder's image stood for the second's."""
    other, out = tmp_path / "other", tmp_path / "out"
    write_picture(other / "one.jpg", (32, 32), seed=9)
    call(trained, images, "--output", out, "--uncertainty")
    call(trained, other, "--output", out)
    call(trained, other, "--output", out, "--uncertainty")
    assert Image.open(out / "entropy/one.png").size == (32, 32)


def test_a_class_may_be_called_image(trained, images, tmp_path, capsys):
    """Found wrong once: its share stood in the place of the image's name."""
    description = json.loads((trained / "args.json").read_text())
    description["classes"][1] = "image"
    (trained / "args.json").write_text(json.dumps(description))
    call(trained, images, "--output", tmp_path / "out")
    assert set(rows(tmp_path / "out")) == {"one", "three", "deep/two.v1"}
    assert "class image" in next(iter(rows(tmp_path / "out").values()))
    capsys.readouterr()
    call(trained, images, "--output", tmp_path / "out")
    assert capsys.readouterr().out.startswith("0 images predicted")


def test_grey_of_more_bits_than_the_run_has_seen_is_noted(trained, images, tmp_path, capsys):
    """Of 12 bits, it is almost black to a network that was trained on 8."""
    call(trained, images, "--output", tmp_path / "out")
    assert "more than 8 bits" not in capsys.readouterr().err
    for name in ("deep.png", "deeper.png"):
        Image.fromarray(np.full((64, 64), 4000, np.uint16)).save(images / name)
    call(trained, images, "--output", tmp_path / "out")
    assert capsys.readouterr().err.count("no grey of more than 8 bits") == 1


# ------------------------------------------------------------------------------------ broken images


def test_a_reading_process_that_was_killed_is_named(trained, images, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        yield

    monkeypatch.setattr(predict, "new_loader", killed)
    with pytest.raises(InputError, match=r"is killed by signal: Killed\. Too little memory.*-j"):
        call(trained, images, "--output", tmp_path / "out")


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_do_not_stop_the_others(trained, images, tmp_path, capsys, workers: int):
    damage(images / "bad.png")  # its header is whole
    (images / "worse.jpg").write_bytes(b"nothing")
    message = r"2 could not be predicted: .*(worse\.jpg: cannot be read.*bad\.png|bad\.png.*worse)"
    with pytest.raises(InputError, match=message):
        call(trained, images, "--output", tmp_path / "out", "-j", workers)
    assert capsys.readouterr().out.startswith("3 images predicted")
    assert (
        len(list((tmp_path / "out" / "masks").rglob("*.png"))) == len(rows(tmp_path / "out")) == 3
    )


def test_an_image_too_large_for_the_memory_is_named(trained, images, tmp_path, monkeypatch):
    def too_large(network, images, *rest):
        if images.shape[-1] == 90:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return predict_batch(network, images, *rest)

    monkeypatch.setattr(predict, "predict_batch", too_large)
    message = r"2 could not be predicted: .*one\.jpg: too large .*three\.jpg: too large for this"
    with pytest.raises(InputError, match=message):
        call(trained, images, "--output", tmp_path / "out")
    assert list(rows(tmp_path / "out")) == ["deep/two.v1"]


def test_what_is_written_is_entered_before_the_end(trained, tmp_path, monkeypatch):
    """Else a call that is stopped would begin anew, and the bar stand still."""
    for index in range(40):
        write_picture(tmp_path / "many" / f"p{index}.png", (16, 16), seed=index)
    entered = []
    original = predict.predict_all

    def watched(*inputs):
        for batch in original(*inputs):
            yield batch
            time.sleep(0.2)  # the threads have written meanwhile
            entered.append(len(rows(tmp_path / "out")))

    monkeypatch.setattr(predict, "predict_all", watched)
    call(trained, tmp_path / "many", "--output", tmp_path / "out")
    assert entered[-2] > 0 and len(rows(tmp_path / "out")) == 40


def refuse_batches(monkeypatch, module) -> None:
    """The memory suffices for one image at a time."""

    def limited(network, images, *rest, **options):
        if len(images) > 1:
            raise MemoryError
        return predict_batch(network, images, *rest, **options)

    monkeypatch.setattr(module, "predict_batch", limited)


def test_a_batch_too_large_for_the_memory_is_split(trained, images, tmp_path, monkeypatch):
    call(trained, images, "--output", tmp_path / "whole")
    refuse_batches(monkeypatch, predict)
    call(trained, images, "--output", tmp_path / "split")
    whole, split = rows(tmp_path / "whole"), rows(tmp_path / "split")
    assert split.keys() == whole.keys()
    for name, row in whole.items():
        assert float(split[name]["mean_entropy"]) == pytest.approx(
            float(row["mean_entropy"]), abs=2e-4
        )


def test_batches_have_images_of_one_size(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "LOOK_AHEAD", 12)
    paths = {}
    for index in range(30):
        paths[f"p{index}"] = tmp_path / f"p{index}.png"
        write_picture(paths[f"p{index}"], (20, 16) if index % 3 else (24, 16))
    paths["p5"].write_bytes(b"")
    files = Files(paths, {"args": {}})
    batches = list(EqualSizes(files))
    assert sorted(index for batch in batches for index in batch) == list(range(30))
    assert max(map(len, batches)) == 8
    for batch in batches:
        assert len({EqualSizes(files).size_of(index) for index in batch}) == 1


def test_masks_of_a_data_folder_are_no_images(tmp_path):
    """Found wrong once: they were offered for labelling."""
    write_picture(tmp_path / "images" / "deep" / "a.png")
    write_picture(tmp_path / "masks" / "a.png")
    found = predict.find_images(tmp_path, tmp_path / "out")
    assert found.keys() == {"images/deep/a", "masks/a"}
    (tmp_path / "classes.txt").write_text("a\nb\n", encoding="utf-8")
    found = predict.find_images(tmp_path, tmp_path / "out")
    assert found == {"deep/a": tmp_path / "images" / "deep" / "a.png"}


def test_what_is_wrong_with_the_arguments_is_named(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((trained, tmp_path / "nowhere"), "no file or folder"),
        ((trained, tmp_path / "empty"), r"no \.png, \.jpg, .* in"),
        ((trained, ROOT, "--network", "teacher"), "not 'teacher'"),
    ):
        with pytest.raises(InputError, match=message):
            call(*arguments)
    with pytest.raises(InputError, match="--device toaster"):
        predict.main([str(trained), str(ROOT), "--device", "toaster"])
    result = run("-m", "common.predict", tmp_path, tmp_path, expect=2)
    assert "no run in" in result.stderr and len(result.stderr.splitlines()) == 1


def test_processes_that_read_images_need_shared_memory(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    for memory, chosen in ((math.inf, 6), (500e6, 2), (64e6, 0)):
        monkeypatch.setattr(cli, "shared_memory", lambda memory=memory: memory)
        for device, expected in (("cuda", chosen), ("cpu", 0)):
            args = SimpleNamespace(workers=None)
            predict.fill_workers(args, torch.device(device))
            assert args.workers == expected
    with pytest.raises(InputError, match="-j 1: /dev/shm has 64 MB, enough for -j 0"):
        predict.fill_workers(SimpleNamespace(workers=1), torch.device("cuda"))
    monkeypatch.setattr(cli, "shared_memory", lambda: math.inf)
    predict.fill_workers(SimpleNamespace(workers=12), torch.device("cuda"))


def test_the_gpu_of_the_network_is_the_current_one(monkeypatch):
    """Events were recorded on another GPU's stream once, and waited for nothing."""
    second, current = torch.device("cuda", 1), []
    monkeypatch.setattr(torch, "empty", lambda *size, device: SimpleNamespace(device=second))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert predict.find_device("cuda:1") == second and current == [second]


def test_a_run_without_triton_predicts_without_it(trained, images, tmp_path, monkeypatch):
    """A machine without a C compiler trains with --kernels torch."""
    description = json.loads((trained / "args.json").read_text())
    description["args"]["kernels"] = "torch"
    (trained / "args.json").write_text(json.dumps(description))
    given = []
    monkeypatch.setattr(predict, "set_backend", given.append)
    call(trained, images, "--output", tmp_path / "out")
    assert given == ["torch"]


# --------------------------------------------------------------------------- test-time augmentation


class Ramp(nn.Module):
    """Logits that depend on a pixel and on its column, so that mirroring changes them."""

    def forward(self, images):
        ramp = torch.linspace(-1, 1, images.shape[3]).expand(len(images), images.shape[2], -1)
        return torch.stack([images[:, 0], images[:, 1] + ramp], 1)


def test_probabilities_are_the_mean_over_mirror_images():
    images = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(-1, 1, 12)
    straight = torch.stack([images[:, 0], images[:, 1] + ramp], 1).softmax(1)
    mirrored = torch.stack([images[:, 0], images[:, 1] - ramp], 1).softmax(1)
    found = averaged_probabilities(Ramp(), images, 0, (1.0,))
    torch.testing.assert_close(found, (straight + mirrored) / 2)


def test_probabilities_are_the_mean_over_scales():
    class Size(nn.Module):
        """Sure of a class where the image has been scaled up, of the other one elsewhere."""

        def forward(self, images):
            sure = 20.0 if images.shape[3] > 12 else -20.0
            return torch.stack([sure * torch.ones_like(images[:, 0]), 0 * images[:, 0]], 1)

    found = averaged_probabilities(Size(), torch.zeros(1, 3, 8, 12), 0, (0.5, 1.0, 2.0))
    torch.testing.assert_close(found[:, 0], torch.full((1, 8, 12), 1 / 3))
    windows = averaged_probabilities(Size(), torch.zeros(1, 3, 8, 12), 6, (2.0,))
    torch.testing.assert_close(windows.sum(1), torch.ones(1, 8, 12))


def test_uncertainty_by_hand():
    class Fixed(nn.Module):
        """At stride 4: one half of an image is certain, the other knows nothing."""

        def forward(self, images):
            logits = torch.zeros(len(images), 4, 2, 4)
            logits[:, 0, :, 2:] = 50.0
            return logits

    found = predict_batch(Fixed(), torch.zeros(1, 3, 8, 16), (8, 16), with_entropy=True)
    assert found.mean_entropy.item() == pytest.approx(math.log(4) / 2)
    assert found.mean_confidence.item() == pytest.approx((0.25 + 1) / 2)
    assert found.entropy[0, 0, 0].item() == pytest.approx(math.log(4))
    assert found.entropy[0, 0, -1].item() == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------- label_next


def test_equal_values_share_their_rank():
    assert label_next.rank([3.0, 1.0, 3.0, 7.0]).tolist() == pytest.approx([0.5, 0, 0.5, 1])
    assert label_next.rank([5.0]).tolist() == [0]


def test_uncertain_is_what_has_high_entropy_and_little_stability():
    measured = {
        "a": {"mean_entropy": 0.1, "stability": 1.9},
        "b": {"mean_entropy": 0.3, "stability": 0.2},
        "c": {"mean_entropy": 0.2, "stability": 1.0},
    }
    assert label_next.uncertainty(measured) == pytest.approx({"a": 0, "b": 1, "c": 0.5})
    for value in measured.values():
        value["stability"] = None
    assert label_next.uncertainty(measured) == pytest.approx({"a": 0, "b": 1, "c": 0.5})


def test_near_copies_are_chosen_last():
    directions = torch.eye(3)
    features = torch.stack(
        [directions[0], directions[0] * 3, directions[1], directions[1] + 0.01, directions[2]]
    )
    chosen, distances = label_next.spread_out(features, 3)
    assert chosen[0] == 0 and len({0, 1} & set(chosen)) == 1
    assert len({2, 3} & set(chosen)) == 1 and 4 in chosen
    assert distances[0] is None and min(distances[1:]) > 0.9
    assert len(label_next.spread_out(features, 99)[0]) == 5


def test_stability_is_the_reliability_of_stpp():
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(4, (3, 8, 8), generator=generator) for _ in range(3)]
    expected = stpp.reliability(labels, 4)
    torch.testing.assert_close(label_next.stability(labels, 4), expected)


@pytest.mark.parametrize("with_checkpoints", [False, True])
def test_images_to_label_next(trained, images, tmp_path, with_checkpoints: bool, capsys):
    for index in range(6):
        write_picture(images / f"more{index}.png", seed=10 + index)
    known = [images / "more0.png", images / "more1.png"]
    (trained / "files_with_masks.txt").write_text("".join(f"{path.resolve()}\n" for path in known))
    if with_checkpoints:
        (trained / "stage-1").mkdir()
        for number in (1, 2, 3):
            content = checkpoint.read(trained / "last.pt")
            for value in content["networks"]["model"].values():
                if number < 3 and value.is_floating_point():
                    value += 0.1 * number * torch.randn_like(value)
            checkpoint.write(content, trained / "stage-1" / f"checkpoint-{number}.pt")
    arguments = [trained, images, "--count", "3", "--device", "cpu", "--output", tmp_path / "out"]
    label_next.main([*map(str, arguments)])
    out = capsys.readouterr().out
    assert "2 of 9 images have masks in the run: left out" in out
    assert ("stability over 3 checkpoints" in out) == with_checkpoints
    with open(tmp_path / "out/label_next.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["order"] for row in table] == ["1", "2", "3", "", "", "", ""]
    assert not {"more0", "more1"} & {row["image"] for row in table}
    rest = [float(row["uncertainty"]) for row in table[3:]]
    assert rest == sorted(rest, reverse=True)
    assert float(table[0]["uncertainty"]) == max(float(row["uncertainty"]) for row in table)
    assert all((row["stability"] != "") == with_checkpoints for row in table)
    assert Image.open(tmp_path / "out/label_next.png").width > 500


def test_images_that_were_moved_cannot_be_told_apart(trained, images, tmp_path, capsys):
    arguments = [str(trained), str(images), "--count", "1", "--device", "cpu"]
    arguments += ["--output", str(tmp_path / "out")]
    (trained / "files_with_masks.txt").write_text(f"{images / 'one.jpg'}\n")
    label_next.main(arguments)
    assert "no longer" not in capsys.readouterr().err
    (trained / "files_with_masks.txt").write_text("/old/place/one.jpg\n")
    label_next.main(arguments)
    assert "no longer where they were, such as /old/place/one.jpg" in capsys.readouterr().err


def test_a_figure_that_cannot_be_written_is_named(trained, images, tmp_path):
    (tmp_path / "out/label_next.png").mkdir(parents=True)
    with pytest.raises(InputError, match=r"cannot write to .*label_next\.png: Is a directory"):
        label_next.main(
            [str(trained), str(images), "--device", "cpu", "--output", str(tmp_path / "out")]
        )


def test_a_batch_that_fails_does_not_shift_the_others(trained, images, tmp_path, monkeypatch):
    """Found wrong once: every later image had the features of another one."""
    description = checkpoint.read_description(trained)
    network = predict.load_checkpoint(trained / "last.pt", description, None, torch.device("cpu"))
    files = Files(predict.find_images(images, tmp_path), description)
    args = SimpleNamespace(workers=0, device="cpu")
    expected, _ = label_next.look_closer(files, network, 0, torch.device("cpu"), args)
    refuse_batches(monkeypatch, label_next)
    found, _ = label_next.look_closer(files, network, 0, torch.device("cpu"), args)
    assert found.keys() == expected.keys() and len(found) == 3
    for name, feature in expected.items():
        torch.testing.assert_close(found[name], feature, rtol=1e-4, atol=1e-4)


def test_nothing_is_left_to_label(trained, images):
    known = [path for path in images.rglob("*.*") if path.is_file()]
    (trained / "files_with_masks.txt").write_text("".join(f"{path.resolve()}\n" for path in known))
    with pytest.raises(InputError, match="all of these images have masks"):
        label_next.main([str(trained), str(images), "--device", "cpu"])
