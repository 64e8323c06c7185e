"""Presets, help, and what the flags leave open."""

import json
import math

import pytest
from conftest import SCRIPTS

import ael
import cps
import stpp
import supervised
import unimatch
from common import cli, compare
from common.datasets import DATASETS
from common.schedule import Schedule

EVERY_PRESET = {
    "backbone", "weights", "output_stride", "dropout", "batch_size", "eval_window", "crop_size",
    "scale", "lr", "head_lr_mult", "weight_decay", "decay_norm", "ohem",
}  # fmt: skip
LENGTH = {"epochs", "max_iters", "eval_interval", "eval_iters"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_presets_are_complete(script):
    assert set(script.PRESETS) == set(DATASETS)
    for preset in script.PRESETS.values():
        assert set(preset) >= EVERY_PRESET
        assert set(preset) >= set(script.PRESETS["voc"]) - LENGTH  # the method's own keys, too
        length = {"epochs", "max_iters"} & set(preset)
        assert length == {"epochs", "max_iters"} or not isinstance(preset.get("epochs"), dict)
        assert length and len({"eval_interval", "eval_iters"} & set(preset)) == 1


def test_every_data_set_can_be_compared_on():
    assert set(compare.SHARED) == set(DATASETS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_shows_every_default(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for data, preset in script.PRESETS.items():
        part = shown.split(f" {data}: split ")[1].split(": split ")[0]
        assert part.startswith(f"{DATASETS[data].split}, ")
        for key, value in preset.items():
            assert value is None or f"{key} {value}" in part


def test_the_window_is_the_crop_and_a_users_list_has_no_published_schedule():
    args = cps.parse_args(["--data", "cityscapes", "--crop-size", "512"])
    assert args.eval_window == 512
    args = cps.parse_args(["--data", "voc", "--labelled-list", "my92.txt"])
    assert (args.split, args.epochs, args.max_iters) == ("my92.txt", None, 39_000)
    assert args.output_dir == "runs/cps-voc-my92-seed0"


def test_a_resumed_run_keeps_settings_that_are_none(tmp_path):
    """A preset took the place of OHEM's None once, where the data's own preset had chosen it."""
    args = ael.parse_args(["--data", "voc"])
    assert args.ohem is not None
    (tmp_path / "args.json").write_text(json.dumps({"args": {**vars(args), "ohem": None}}))
    assert ael.parse_args(["--resume", str(tmp_path)]).ohem is None


def test_a_resumed_run_keeps_the_length_of_its_epochs():
    """Once an image of 64 was gone, everything that goes by epochs came at another time."""
    schedule = Schedule(cps.parse_args(["--data", "voc", "--epochs", "3", "-b", "8"]), 63, 1)
    assert (schedule.total, schedule.per_epoch, schedule.eval_every) == (21, 7, 7)
    schedule.restore(24, 8)
    assert (schedule.total, schedule.per_epoch, schedule.eval_every) == (24, 8, 8)


@pytest.mark.parametrize(
    ("world", "batch", "said"),
    [(4, 2, ""), (3, 2, "note: 3 processes with 2 images each, not 8 in all"), (8, 2, "not 8 in")],
)
def test_a_preset_that_processes_cannot_share_is_said_so(
    world: int, batch: int, said: str, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert cps.parse_args([]).batch_size == batch
    printed = capsys.readouterr().err
    assert said in printed if said else not printed


@pytest.mark.parametrize("text", ["1/0", "0", "1", "x", "2/1"])
def test_a_fraction_lies_between_0_and_1(text: str, capsys):
    with pytest.raises(SystemExit):
        cps.parse_args(["--val-fraction", text])
    assert "is not above 0 and below 1" in capsys.readouterr().err
    assert cps.parse_args(["--val-fraction", "1/4"]).val_fraction == 0.25


def test_pretrained_weights_are_those_of_the_backbone():
    """Found wrong once: --backbone resnet18 on the built-in set wanted the weights of tiny."""
    for flags, weights in (
        ([], "blots"),
        (["--backbone", "resnet18"], "imagenet"),
        (["--backbone", "resnet18", "--weights", "none"], "none"),
        (["--data", "camvid"], "imagenet"),
        (["--data", "camvid", "--backbone", "tiny"], "blots"),
    ):
        assert supervised.parse_args([*flags, "--device", "cpu"]).weights == weights


def test_an_epoch_is_shorter_where_processes_share_it():
    """Each image is passed over once an epoch, by one of them."""
    args = cps.parse_args(["--data", "voc", "--epochs", "3", "-b", "8"])
    lengths = [(each.per_epoch, each.total) for each in (Schedule(args, 64, n) for n in (1, 2, 4))]
    assert lengths == [(8, 24), (4, 12), (2, 6)]


def test_a_run_ends_with_a_checkpoint_and_every_evaluation_follows_one():
    args = cps.parse_args(["--max-iters", "10", "--eval-iters", "4", "--save-interval", "3"])
    schedule = Schedule(args, 64, 1)
    assert [done for done in range(11) if schedule.evaluates(done)] == [4, 8, 10]
    assert [done for done in range(11) if schedule.saves(done)] == [3, 4, 6, 8, 9, 10]


def test_only_iterations_are_multiplied_and_at_least_one_is_left():
    """Epochs of a longer list are longer already."""
    args = stpp.parse_args(["--max-iters", "4", "--device", "cpu"])
    assert Schedule(args, 64, 1, times=2).total == 8
    assert Schedule(args, 64, 1, times=0.1).total == 1
    args = stpp.parse_args(["--epochs", "3", "-b", "8", "--device", "cpu"])
    assert Schedule(args, 64, 1, times=2).total == 24


def test_workers_need_shared_memory(monkeypatch, capsys):
    """PyTorch's workers wait forever where /dev/shm is full, as in a small container."""
    monkeypatch.setattr(cli, "shared_memory", lambda: 1e6)
    command = ["--data", "camvid", "--weights", "none"]
    assert cps.parse_args(command).workers == 0
    assert "note: /dev/shm has 1 MB" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cps.parse_args([*command, "-j", "1"])
    message = "which has 1; use -j 0, or start the container with --shm-size"
    assert message in capsys.readouterr().err
    monkeypatch.setattr(cli, "shared_memory", lambda: math.inf)
    assert cps.parse_args([*command, "-j", "1"]).workers == 1


def test_strong_views_need_memory_of_their_own(monkeypatch, capsys):
    """Three bytes a pixel each, beside five."""
    monkeypatch.setattr(cli, "shared_memory", lambda: math.inf)
    city = ["--data", "cityscapes", "--weights", "none", "-j", "4"]
    plain, one, two = (
        cli.worker_memory(unimatch.parse_args([*city, *flags]) if script else cps.parse_args(city))
        for script, flags in ((False, []), (True, ["--fixmatch"]), (True, []))
    )
    assert one / plain == pytest.approx(8 / 5 * (801 / 800) ** 2)
    assert two / one == pytest.approx(11 / 8)
    monkeypatch.setattr(cli, "shared_memory", lambda: 1e6)
    with pytest.raises(SystemExit):
        unimatch.parse_args(city)
    assert "--shm-size 3g or more" in capsys.readouterr().err


def test_epochs_give_the_papers_iterations():
    for split, labelled in (("1/16", 662), ("1/8", 1323), ("1/4", 2646), ("1/2", 5291)):
        args = cps.parse_args(["--data", "voc", "--split", split, "--weights", "none"])
        assert 39_000 <= Schedule(args, 10582 - labelled, 1).total <= 39_700
    args = cps.parse_args(["--data", "voc", "--split", "183"])
    assert Schedule(args, 10582 - 183, 1).total == 39_000
