"""ST and ST++: scores, lists and augmentation by definition, and runs killed in every stage."""

import argparse
import csv
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from conftest import run, settings
from test_scripts import here, kill, same, start, wait_for, weights

import stpp
from common import InputError, checkpoint, datasets
from common.augment import Window
from common.data import Key, TrainSet
from common.evaluate import image_miou
from common.masks import read_mask, write_mask
from common.run import Run
from common.schedule import Schedule

SHORT = (
    "--max-iters", "6", "--retrain-times", "1", "--eval-iters", "6", "--log-interval", "1",
    "--save-interval", "2", "-b", "2", "--crop-size", "32", "--split", "1/2", "--no-tta",
    "--device", "cpu",
)  # fmt: skip


def test_reliability_is_the_definition():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randint(0, 4, (3, 5, 6), generator=generator) for _ in range(3)]
    maps[0][1], maps[1][1] = 2, 2
    maps[2][1] = 2  # an image of one class on which all agree
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
    assert image_miou(target, maps[2], 5).tolist() == pytest.approx(
        image_miou(target[:, 2:], maps[2][:, 2:], 5).tolist()
    )


def test_test_time_augmentation_sums_softmaxes_of_scales_and_mirror_images():
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 4, 3, padding=1)
    images = torch.randn(2, 3, 12, 10)
    total = torch.zeros(2, 4, 12, 10)
    for scale in (0.5, 0.75, 1.0, 1.5, 2.0):
        x = torch.nn.functional.interpolate(
            images, (round(12 * scale), round(10 * scale)), mode="bilinear", align_corners=True
        )
        for y in (network(x), network(x.flip(3)).flip(3)):
            total += torch.nn.functional.interpolate(
                y, (12, 10), mode="bilinear", align_corners=True
            ).softmax(1)
    scales = stpp.PRESETS["voc"]["tta_scales"]
    assert torch.equal(stpp.label_images(network, images, scales).long(), total.argmax(1))
    assert torch.equal(stpp.label_images(network, images, ()).long(), network(images).argmax(1))


@pytest.fixture
def labelled_run(tmp_path):
    """Settings of a run and its data (shapes 1/8: 32 labelled images, 224 unlabelled).

    Image k has a pseudo-mask of the label k % 12, made by stage 1 if k is odd, else by stage 2.
    """
    data = datasets.load(settings())
    args = settings(run=str(tmp_path), selection="reliable", strong_aug="unlabelled", debug=False)
    for k, item in enumerate(data.unlabelled):
        path = stpp.mask_path(args, 1 if k % 2 else 2, item.name)
        write_mask(path, torch.full((64, 64), k % 12), data.colours)
    return args, data


def label_all(args: argparse.Namespace, data: datasets.DataSource) -> tuple[list, list]:
    """The pseudo-labelled images of stages 1 and 2, whose masks are there already."""
    first, second = data.unlabelled[1::2], data.unlabelled[::2]
    return stpp.label(1, first, data, args), stpp.label(2, second, data, args)


def test_lists_of_the_stages(labelled_run):
    args, data = labelled_run
    assert stpp.stage_list(data, []) == [*data.labelled] * 2  # fewer than 200
    many = replace(data, labelled=data.labelled * 13)
    assert stpp.stage_list(many, []) == [*many.labelled]
    pseudo_1, pseudo_2 = label_all(args, data)
    second, third = stpp.stage_list(data, pseudo_1), stpp.stage_list(data, pseudo_1 + pseudo_2)
    # ceil(112/32) = 4, ceil(224/32) = 7
    assert len(second) == 32 * 4 + 112 and second[: 32 * 4] == [*data.labelled] * 4
    assert len(third) == 32 * 7 + 224 and third[: 32 * 7] == [*data.labelled] * 7
    assert {item.mask.parent.name for item in second if item.pseudo} == {"1"}
    reliable = {item.name for item in data.unlabelled[1::2]}
    for item in third:
        assert not item.pseudo or item.mask.parent.name == ("1" if item.name in reliable else "2")
    names = [item.name for item in third if item.pseudo]
    assert names == [item.name for item in data.unlabelled]  # in the data's order


def test_a_retraining_is_longer_than_the_first_training(monkeypatch):
    lengths = []

    class Begun(Exception):
        pass

    def begin(args: argparse.Namespace, data: object, images: int, times: float) -> None:
        lengths.append(Schedule(args, images, 1, times).total)
        raise Begun

    monkeypatch.setattr(stpp, "Run", begin)
    for stage in (1, 2, 3):
        args = stpp.parse_args(["--device", "cpu"])
        args.stage = stage
        with pytest.raises(Begun):
            stpp.train_network(args, None, [])
    assert lengths == [900, 1800, 1800]
    assert stpp.parse_args(["--data", "voc", "--device", "cpu"]).retrain_times == 1


def test_a_run_can_be_longer_than_its_settings_say(begin, tmp_path):
    assert begin(stpp, "--max-iters", "5").schedule.total == 5
    flags = ["--max-iters", "5", "--device", "cpu", "--output-dir", str(tmp_path / "longer")]
    args = stpp.parse_args(flags)
    assert Run(args, datasets.load(settings()), 8, times=2).schedule.total == 10


@pytest.mark.parametrize(
    ("flags", "scales"),
    [
        ([], (0.75, 1.0, 1.25, 1.5)),
        (["--no-tta"], ()),
        (["--data", "voc"], (0.5, 0.75, 1.0, 1.5, 2.0)),
    ],
)
def test_images_are_labelled_at_the_scales_of_the_preset(flags, scales, tmp_path, monkeypatch):
    given = []

    def label_images(network: torch.nn.Module, images: torch.Tensor, scales: tuple) -> torch.Tensor:
        given.append(scales)
        return torch.zeros(len(images), 64, 64, dtype=torch.uint8)

    monkeypatch.setattr(stpp, "label_images", label_images)
    args = stpp.parse_args([*flags, "--device", "cpu", "-j", "0"])
    args.run = str(tmp_path)
    data = datasets.load(settings())
    stpp.write_masks(1, torch.nn.Conv2d(3, 12, 1), list(data.unlabelled[:2]), data, args)
    assert given == [scales]
    assert stpp.mask_path(args, 1, data.unlabelled[1].name).is_file()


class Whole:
    """An augmentation that takes the whole image."""

    crop = 64

    def draw(self, width: int, height: int) -> Window:
        return Window((0, 0, width, height), (width, height), False)


def test_pseudo_masks_are_what_is_trained_on(labelled_run):
    args, data = labelled_run
    pseudo = label_all(args, data)[1][3]
    index = [item.name for item in data.unlabelled].index(pseudo.name)
    # Only the mask counts: a Cityscapes-like table of raw labels must not be applied to it.
    odd = replace(data, label_map=tuple([255] * 256))
    sample = TrainSet(odd, (pseudo,), Whole(), 0, 0)[Key(0, 0, 0)]
    assert sample["target"].unique().tolist() == [index % 12]


@pytest.mark.parametrize(
    ("which", "true", "pseudo"),
    [
        ("unlabelled", False, True),
        ("labelled", True, False),
        ("both", True, True),
        ("none", False, False),
    ],
)
def test_strong_augmentation_touches_what_the_flag_names(which: str, true: bool, pseudo: bool):
    torch.manual_seed(0)
    sample = {
        "image": torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8),
        "target": torch.zeros(64, 64, dtype=torch.uint8),
    }
    for marked, expected in ((False, true), (True, pseudo)):
        item = datasets.Item("x", 0, None, pseudo=marked)
        changed = [
            not torch.equal(stpp.strong_augment(sample, item, which)["image"], sample["image"])
            for _ in range(8)
        ]
        assert any(changed) == expected


def test_cutout_fills_a_box_and_ignores_it():
    pixels, target = (
        torch.full((60, 80, 3), 7, dtype=torch.uint8),
        torch.ones(60, 80, dtype=torch.uint8),
    )
    cut, shares = 0, []
    for seed in range(300):
        torch.manual_seed(seed)
        image, label = stpp.cutout(pixels, target)
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
    (folder.parent / "stdout.txt").write_text(
        here("stpp.py", *SHORT, "--output-dir", folder).stdout
    )
    return folder


def table(folder) -> list[dict]:
    """The rows of reliability.csv."""
    with open(folder / "reliability.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_stages_masks_scores_and_figures(finished):
    lines = (finished.parent / "stdout.txt").read_text().splitlines()
    headings = [line.split(":")[0] for line in lines if line.startswith("== stage")]
    assert headings == [f"== stage {stage} of 3" for stage in (1, 2, 3)]
    rows = table(finished)
    scores = [float(row["score"]) for row in rows]
    assert len(rows) == 128 and scores == sorted(scores, reverse=True)
    assert [row["reliable"] for row in rows] == ["1"] * 64 + ["0"] * 64
    for stage, part in (("1", rows[:64]), ("2", rows[64:])):
        made = finished / "pseudo_masks" / stage
        assert {path.stem for path in made.iterdir()} == {row["id"] for row in part}
        assert read_mask(next(made.iterdir())).max() < 12
    assert (finished / "figures" / "reliability.png").stat().st_size > 5000


def test_the_first_stage_keeps_three_checkpoints_and_all_stages_the_protocol(finished):
    first = finished / "stage-1"
    kept = [torch.load(first / f"checkpoint-{j}.pt", weights_only=True) for j in (1, 2, 3)]
    assert [content["iteration"] for content in kept] == [2, 4, 6]
    assert same(kept[2]["networks"], weights(first))
    for stage in (first, finished / "stage-2", finished):  # as other methods, whatever a stage adds
        described = json.loads((stage / "args.json").read_text())
        data = datasets.load(settings(split="1/2"))
        assert described["labelled_list_sha1"] == data.list_hash
        assert described["protocol"] == data.protocol


def test_killed_anywhere_and_resumed_ends_with_the_same_weights(finished, tmp_path):
    """One run, killed in each training, before scoring, and before each labelling."""
    folder = tmp_path / "killed"
    command = ("stpp.py", *SHORT, "--output-dir", folder)
    for line in (
        "iter      4/6",
        "== select",
        "== label 64 images with the network of stage 1",
        "iter      4/6",
        "== label 64 images with the network of stage 2",
        "iter      4/6",
    ):
        first_is_done = (folder / "stage-1" / "finished").is_file()
        process = start(*command)
        seen = wait_for(process, line)
        kill(process)
        assert not (first_is_done and "stage 1 of 3" in seen)
        command = ("stpp.py", "--resume", folder)
    rest = run(*command).stdout
    assert "stage 1 of 3" not in rest and "stage 2 of 3" not in rest and "== label" not in rest
    assert same(weights(finished), weights(folder))
    assert table(finished) == table(folder)


def test_sigterm_while_labelling_stops_and_goes_on(finished, tmp_path):
    process = start("stpp.py", *SHORT, "--output-dir", tmp_path / "stopped")
    wait_for(process, "== label")
    os.killpg(process.pid, signal.SIGTERM)
    output = process.stdout.read()
    assert process.wait() == 0 and "--resume" in output
    here("stpp.py", "--resume", tmp_path / "stopped")
    assert same(weights(finished), weights(tmp_path / "stopped"))


def test_plain_st_has_two_stages_and_is_resumed_as_such(tmp_path):
    folder = tmp_path / "st"
    out = here("stpp.py", "--plain", *SHORT, "--output-dir", folder).stdout
    assert "stage 2 of 2" in out and not (folder / "reliability.csv").exists()
    assert len(list((folder / "pseudo_masks" / "1").iterdir())) == 128
    again = here("stpp.py", "--resume", folder, "--eval-only").stdout
    assert again.splitlines()[-1] == out.splitlines()[-1]
    assert "== label" not in again
    refused = here("stpp.py", "--plain", *SHORT, "--output-dir", folder, expect=2)
    assert "holds a run already" in refused.stderr
    refused = here("stpp.py", "--resume", folder / "stage-1", expect=2)
    assert "resume the run itself" in refused.stderr


def test_a_start_that_failed_leaves_no_settings_behind(tmp_path):
    """Found wrong once: a later resume took the settings of a first attempt that never began."""
    folder = tmp_path / "run"
    nowhere = ("--lr", "0.5", "--labelled-list", tmp_path / "none.txt")
    here("stpp.py", "--plain", *nowhere, "--output-dir", folder, expect=2)
    refused = here("stpp.py", "--resume", folder, "--eval-only", expect=2)
    assert "no run in" in refused.stderr
    process = start("stpp.py", "--plain", *SHORT, "--lr", "0.02", "--output-dir", folder)
    wait_for(process, "iter      4/6")
    kill(process)
    assert "lr 0.02," in here("stpp.py", "--resume", folder).stdout


def test_a_refused_second_start_leaves_the_first_run_as_it_is(tmp_path):
    """Found wrong once: args.json got the settings of the second start, and --resume used them."""
    folder = tmp_path / "run"
    names = ("max-iters", "eval-iters", "log-interval", "save-interval")
    silent = [word for name in names for word in (f"--{name}", "10000")]
    process = start("stpp.py", "--plain", *SHORT, *silent, "--output-dir", folder)
    wait_for(process, "run folder")  # which holds nothing yet
    before = (folder / "args.json").read_text()
    again = ("--plain", *SHORT, "--lr", "0.5", "--output-dir", folder)
    refused = here("stpp.py", *again, expect=2)
    assert "another process is writing" in refused.stderr
    assert (folder / "args.json").read_text() == before
    kill(process)


def test_stages_that_were_trained_with_other_settings_are_refused(tmp_path):
    args = stpp.parse_args(["--plain", "--output-dir", str(tmp_path)])
    folder = tmp_path / "stage-1"
    folder.mkdir()
    args.run = str(tmp_path)
    stage = {**vars(args), "stage": 1, "output_dir": str(folder)}
    settings_of_stage = {"args": {**stage, "log_interval": 7}, "versions": {}}
    checkpoint.write(settings_of_stage, folder / "args.json")
    stpp.check_stages(args)
    settings_of_stage["args"]["lr"] = 0.5
    checkpoint.write(settings_of_stage, folder / "args.json")
    message = r"stage-1 was trained with lr=0\.5, unlike the run"
    with pytest.raises(InputError, match=message):
        stpp.check_stages(args)


@pytest.mark.parametrize(("flags", "unlabelled", "needed"), [(["--plain"], 0, 1), ([], 1, 2)])
def test_too_few_unlabelled_images_are_refused_before_the_first_stage(
    flags: list, unlabelled: int, needed: int
):
    data = datasets.load(settings())
    few = replace(data, unlabelled=data.unlabelled[:unlabelled])
    args = stpp.parse_args(flags)
    with pytest.raises(InputError, match=f"re-training needs at least {needed} unlabelled"):
        stpp.check_unlabelled(args, few)
    stpp.check_unlabelled(args, replace(data, unlabelled=data.unlabelled[:needed]))


def test_random_selection_takes_a_shuffled_half(tmp_path):
    data = datasets.load(settings())
    args = settings(selection="random", run=str(tmp_path))
    chosen = stpp.select(data, args)
    assert len(chosen) == 112 and chosen == [item for item in data.unlabelled if item in chosen]
    rows = table(tmp_path)
    assert {row["id"] for row in rows if row["reliable"] == "1"} == {item.name for item in chosen}
    assert [row["id"] for row in rows] != sorted(row["id"] for row in rows)
    again = stpp.random_scores(data, seed=0)
    assert stpp.halves(again) == [row["id"] for row in rows]
    assert stpp.halves(stpp.random_scores(data, seed=1)) != stpp.halves(again)
