"""ST and ST++: scores, lists and augmentation by definition, and runs that are killed in every stage."""

import argparse
import csv
import os
import signal
from dataclasses import replace

import pytest
import torch
from conftest import run, settings
from test_scripts import same, start, wait_for, weights

import stpp
from common import InputError, checkpoint, datasets
from common.augment import Window, cutout
from common.data import Key, TrainSet
from common.masks import read_mask, write_mask

SHORT = (
    "--max-iters", "6", "--eval-iters", "6", "--log-interval", "1", "--save-interval", "2", "-b", "2", "--crop-size", "32",
    "--split", "1/2", "--no-tta", "--device", "cpu",
)  # fmt: skip


def test_reliability_is_the_definition():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randint(0, 4, (3, 5, 6), generator=generator) for _ in range(3)]
    maps[0][1], maps[1][1] = 2, 2
    maps[2][1] = 2  # a picture of one class on which all agree
    expected = []
    for i in range(3):
        total = 0.0
        for j in range(2):
            ious = []
            for c in range(5):  # class 4 occurs nowhere
                a, b = maps[j][i] == c, maps[2][i] == c
                if (a | b).any():
                    ious.append(((a & b).sum() / (a | b).sum()).item())
            total += sum(ious) / len(ious)
        expected.append(total)
    assert stpp.reliability(maps, 5).tolist() == pytest.approx(expected, rel=1e-6)
    assert stpp.reliability(maps, 5)[1].item() == 2
    target = maps[0].clone()
    target[:, :2] = 255
    assert stpp.image_miou(target, maps[2], 5).tolist() == pytest.approx(
        stpp.image_miou(target[:, 2:], maps[2][:, 2:], 5).tolist()
    )


def test_test_time_augmentation_sums_softmaxes_of_scales_and_mirror_images():
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 4, 3, padding=1)
    images = torch.randn(2, 3, 12, 10)
    total = torch.zeros(2, 4, 12, 10)
    for scale in (0.5, 0.75, 1.0, 1.5, 2.0):
        x = torch.nn.functional.interpolate(images, (round(12 * scale), round(10 * scale)), mode="bilinear", align_corners=True)
        for y in (network(x), network(x.flip(3)).flip(3)):
            total += torch.nn.functional.interpolate(y, (12, 10), mode="bilinear", align_corners=True).softmax(1)
    assert torch.equal(stpp.label_pictures(network, images, True).long(), total.argmax(1))
    assert torch.equal(stpp.label_pictures(network, images, False).long(), network(images).argmax(1))


@pytest.fixture
def labelled_run(tmp_path):
    """Settings of a run whose pseudo-masks lie there, and its unlabelled pictures (shapes 1/8: 16 and 112)."""
    data = datasets.load(settings())
    args = settings(run=str(tmp_path), selection="reliable", strong_aug="unlabelled", debug=False)
    names = [item.name for item in data.unlabelled]
    for k, name in enumerate(names):
        write_mask(stpp.mask_path(args, 1 if k % 2 else 2, name), torch.full((64, 64), k % 6), data.colours)
    lines = [f"{name},1.0,{k % 2}" for k, name in enumerate(names)]
    (tmp_path / "reliability.csv").write_text("\n".join(["id,score,reliable", *lines]) + "\n")
    return args, data


def stage_list(args: argparse.Namespace, rt, **changes) -> tuple:
    return stpp.load_data(argparse.Namespace(**{**vars(args), **changes}), rt).labelled


def test_lists_of_the_stages(labelled_run, rt):
    args, data = labelled_run
    assert stage_list(args, rt, stage=1) == data.labelled * 2  # fewer than 200
    second, third = (stage_list(args, rt, stage=stage) for stage in (2, 3))
    assert len(second) == 16 * 4 + 56 and len(third) == 16 * 7 + 112  # ceil(56/16) = 4, ceil(112/16) = 7
    assert {item.mask.parent.name for item in second if item.pseudo} == {"1"}
    reliable = stpp.read_reliable(args)
    for item in third:
        assert not item.pseudo or item.mask.parent.name == ("1" if item.name in reliable else "2")
    for stage in (1, 2, 3):  # the same protocol as other methods, whatever the stage adds
        changed = argparse.Namespace(**{**vars(args), "stage": stage})
        assert stpp.load_data(changed, rt).list_hash == data.list_hash
    whole = [item for item in third if item.pseudo]
    assert sorted(item.name for item in whole) == sorted(item.name for item in data.unlabelled)


class Whole:
    """An augmentation that takes the whole picture."""

    crop = 64

    def draw(self, width: int, height: int) -> Window:
        return Window((0, 0, width, height), (width, height), False)


def test_pseudo_masks_are_what_is_trained_on(labelled_run, rt):
    args, data = labelled_run
    items = stage_list(args, rt, stage=3)
    pseudo = next(item for item in items if item.pseudo)
    index = [item.name for item in data.unlabelled].index(pseudo.name)
    # Only the mask counts: a Cityscapes-like table of raw labels must not be applied to it.
    odd = stpp.replace(data, label_map=tuple([255] * 256))
    sample = TrainSet(odd, (pseudo,), Whole(), 0, 0)[Key(0, 0, 0)]
    assert sample["target"].unique().tolist() == [index % 6]


@pytest.mark.parametrize(
    ("which", "true", "pseudo"),
    [("unlabelled", False, True), ("labelled", True, False), ("both", True, True), ("none", False, False)],
)
def test_strong_augmentation_touches_what_the_flag_names(which: str, true: bool, pseudo: bool):
    torch.manual_seed(0)
    sample = {"image": torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8), "target": torch.zeros(64, 64, dtype=torch.uint8)}
    for marked, expected in ((False, true), (True, pseudo)):
        item = datasets.Item("x", 0, None, pseudo=marked)
        changed = [not torch.equal(stpp.strong_augment(sample, item, which)["image"], sample["image"]) for _ in range(8)]
        assert any(changed) == expected


def test_cutout_fills_a_box_and_ignores_it():
    pixels, target = torch.full((60, 80, 3), 7, dtype=torch.uint8), torch.ones(60, 80, dtype=torch.uint8)
    cut, shares = 0, []
    for seed in range(300):
        torch.manual_seed(seed)
        image, label = cutout(pixels, target)
        inside = label == 255
        assert (image[~inside] == 7).all()
        if not inside.any():
            continue
        cut += 1
        rows, columns = (inside.any(dim).nonzero() for dim in (1, 0))
        box = (len(rows), len(columns))
        assert inside.sum() == box[0] * box[1]
        assert (image[inside] == 7).float().mean() < 0.1
        shares.append(box[0] * box[1] / 4800)
        assert 0.25 < box[0] / box[1] < 4
    assert 115 <= cut <= 185 and 0.015 < min(shares) and max(shares) < 0.42 and max(shares) > 0.3
    assert (pixels == 7).all() and (target == 1).all()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted short ST++ run."""
    folder = tmp_path_factory.mktemp("runs") / "stpp"
    result = run("stpp.py", *SHORT, "--output-dir", folder)
    (folder / "stdout.txt").write_text(result.stdout)
    return folder


def test_a_run_leaves_stages_masks_scores_and_figures(finished):
    stages = [line for line in (finished / "stdout.txt").read_text().splitlines() if line.startswith("== stage")]
    assert [line.split(":")[0] for line in stages] == ["== stage 1 of 3", "== stage 2 of 3", "== stage 3 of 3"]
    rows = list(csv.DictReader(open(finished / "reliability.csv")))
    scores = [float(row["score"]) for row in rows]
    assert len(rows) == 64 and scores == sorted(scores, reverse=True)
    assert [row["reliable"] for row in rows] == ["1"] * 32 + ["0"] * 32
    for stage, part in (("1", rows[:32]), ("2", rows[32:])):
        made = finished / "pseudo_masks" / stage
        assert {path.stem for path in made.iterdir()} == {row["id"] for row in part}
        assert read_mask(next(made.iterdir())).max() < 6
    assert (finished / "figures" / "reliability.png").stat().st_size > 5000
    kept = [torch.load(finished / "stage-1" / f"checkpoint-{j}.pt", weights_only=True)["iteration"] for j in (1, 2, 3)]
    assert kept == [2, 4, 6]
    assert same(
        torch.load(finished / "stage-1" / "checkpoint-3.pt", weights_only=True)["networks"], weights(finished / "stage-1")
    )


# What is on the screen when the run is killed: in each training, while scoring, while labelling.
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("stage 1 of 3", "iter      4/6"),
        ("stage 1 of 3", "== select"),
        ("stage 1 of 3", "== label"),
        ("stage 2 of 3", "iter      4/6"),
        ("stage 3 of 3", "iter      4/6"),
    ],
)
def test_killed_anywhere_and_resumed_ends_with_the_same_weights(text: str, line: str, finished, tmp_path):
    process = start("stpp.py", *SHORT, "--output-dir", tmp_path / "killed")
    wait_for(process, text)
    wait_for(process, line)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "stage-1").glob("finished")}
    result = run("stpp.py", "--resume", tmp_path / "killed")
    assert same(weights(finished), weights(tmp_path / "killed"))
    assert (tmp_path / "killed" / "reliability.csv").read_text() == (finished / "reliability.csv").read_text()
    if kept:
        assert "stage 1 of 3" not in result.stdout


def test_sigterm_while_labelling_stops_and_goes_on(finished, tmp_path):
    process = start("stpp.py", *SHORT, "--output-dir", tmp_path / "stopped")
    wait_for(process, "== label")
    os.killpg(process.pid, signal.SIGTERM)
    output = process.stdout.read()
    assert process.wait() == 0 and "--resume" in output
    run("stpp.py", "--resume", tmp_path / "stopped")
    assert same(weights(finished), weights(tmp_path / "stopped"))


def test_plain_st_has_two_stages_and_is_resumed_as_such(tmp_path):
    folder = tmp_path / "st"
    result = run("stpp.py", "--plain", *SHORT, "--output-dir", folder)
    assert "stage 2 of 2" in result.stdout and not (folder / "reliability.csv").exists()
    assert len(list((folder / "pseudo_masks" / "1").iterdir())) == 64
    again = run("stpp.py", "--resume", folder, "--eval-only")
    assert again.stdout.splitlines()[-1] == result.stdout.splitlines()[-1]
    assert "label" not in again.stdout.replace("labelled", "")
    message = run("stpp.py", "--plain", *SHORT, "--output-dir", folder, expect=2).stderr
    assert "holds a run already" in message
    assert "resume the run itself" in run("stpp.py", "--resume", folder / "stage-1", expect=2).stderr


def test_a_start_that_failed_leaves_no_settings_behind(tmp_path):
    """Found wrong once: a later resume took the settings of a first attempt that had never begun."""
    folder = tmp_path / "run"
    run("stpp.py", "--plain", "--lr", "0.5", "--labelled-list", tmp_path / "none.txt", "--output-dir", folder, expect=2)
    assert "no run in" in run("stpp.py", "--resume", folder, "--eval-only", expect=2).stderr
    process = start("stpp.py", "--plain", *SHORT, "--lr", "0.02", "--output-dir", folder)
    wait_for(process, "iter      4/6")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "lr 0.02," in run("stpp.py", "--resume", folder).stdout


def test_a_refused_second_start_leaves_the_first_run_as_it_is(tmp_path):
    """Found wrong once: the second start put its settings into args.json, and --resume trained later stages with them."""
    folder = tmp_path / "run"
    silent = [word for name in ("max-iters", "eval-iters", "log-interval", "save-interval") for word in (f"--{name}", "10000")]
    process = start("stpp.py", "--plain", *SHORT, *silent, "--output-dir", folder)  # nothing in its folder yet
    wait_for(process, "run folder")
    before = (folder / "args.json").read_text()
    refused = run("stpp.py", "--plain", *SHORT, "--lr", "0.5", "--output-dir", folder, expect=2)
    assert "another process is writing" in refused.stderr
    assert (folder / "args.json").read_text() == before
    process.kill()
    process.wait()


def test_stages_that_were_trained_with_other_settings_are_refused(tmp_path):
    args = stpp.parse_args(["--plain", "--output-dir", str(tmp_path)])
    stage = {**vars(args), "stage": 1, "output_dir": str(tmp_path / "stage-1"), "run": str(tmp_path)}
    args.run = str(tmp_path)
    (tmp_path / "stage-1").mkdir()
    for changes, agrees in (({"log_interval": 7}, True), ({"lr": 0.5}, False)):
        checkpoint.write({"args": {**stage, **changes}, "versions": {}}, tmp_path / "stage-1" / "args.json")
        if agrees:
            stpp.check_stages(args)
        else:
            with pytest.raises(InputError, match=r"stage-1 was trained with lr=0\.5, unlike the run"):
                stpp.check_stages(args)


@pytest.mark.parametrize(("flags", "unlabelled", "needed"), [(["--plain"], 0, 1), ([], 1, 2)])
def test_too_few_unlabelled_images_are_refused_before_the_first_stage(flags: list, unlabelled: int, needed: int):
    data = datasets.load(settings())
    few = replace(data, unlabelled=data.unlabelled[:unlabelled])
    args = stpp.parse_args(flags)
    with pytest.raises(InputError, match=f"re-training needs at least {needed} unlabelled"):
        stpp.check_unlabelled(args, few)
    stpp.check_unlabelled(args, replace(data, unlabelled=data.unlabelled[:needed]))


def test_random_selection_takes_a_shuffled_half(tmp_path):
    run("stpp.py", "--selection", "random", *SHORT, "--output-dir", tmp_path / "a")
    rows = list(csv.DictReader(open(tmp_path / "a" / "reliability.csv")))
    assert sum(row["reliable"] == "1" for row in rows) == 32
    assert [row["id"] for row in rows] != sorted(row["id"] for row in rows)
