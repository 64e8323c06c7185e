"""The comparison of all methods: what it runs, reuses, resumes and refuses, and what its tables say."""

import importlib
import json
import math
import os
import shlex
import signal
import time
from pathlib import Path

import pytest
from conftest import run
from PIL import Image
from test_scripts import same, start, wait_for, weights

from common import InputError, compare
from common.compare import Result, Row
from common.experiments import EXPERIMENTS, METHODS, Variant

SHORT = ("-m", "common.compare", "--seeds", "1", "--max-iters", "4", "--crop-size", "32", "-b", "2")
REST = ("--", "--eval-iters", "4", "--log-interval", "1", "--device", "cpu")


def test_it_runs_reuses_and_reports(tmp_path):
    methods = ("--methods", "supervised", "cps")
    result = run(*SHORT, *methods, "--output", tmp_path, *REST)
    assert "[1/2] supervised.py --split 1/8 --seed 0 --max-iters 4: started" in result.stdout
    folders = [tmp_path / name / "1-8-seed0" for name in ("supervised", "cps")]
    last = [(folder / "log.txt").read_text().splitlines()[-1].split()[0].removeprefix("miou_last=") for folder in folders]
    table = (tmp_path / "supervised+cps-1-8.md").read_text()
    assert all(f"| {label} | {value} (" in table for label, value in zip(("SupOnly", "CPS"), last)) and table in result.stdout
    assert len((tmp_path / "supervised+cps-1-8.csv").read_text().splitlines()) == 3
    for name in ("supervised+cps-1-8.png", "supervised+cps-1-8-predictions.png"):
        assert Image.open(tmp_path / name).width > 300
    before = [(folder / "last.pt").stat().st_mtime_ns for folder in folders]
    again = run(*SHORT, *methods, "--output", tmp_path, *REST)
    assert "started" not in again.stdout and [(folder / "last.pt").stat().st_mtime_ns for folder in folders] == before
    other = run(*SHORT, "--methods", "cps", "--output", tmp_path, *REST, "--lr", "0.5", expect=2)
    assert "cps/1-8-seed0 holds a run with lr=0.1; choose another --output" in other.stderr
    other = run(*SHORT, "--methods", "cps", "--output", tmp_path, *REST, "--data-dir", "elsewhere", expect=2)
    assert "holds a run with data_dir=None" in other.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_comparison_that_is_stopped_goes_on(number: int, tmp_path):
    command = (*SHORT, "--max-iters", "60", "--methods", "supervised", "--output")
    run(*command, tmp_path / "whole", *REST)
    process = start(*command, tmp_path / "stopped", *REST, "--save-interval", "1")
    wait_for(process, "started")
    log = tmp_path / "stopped" / "supervised" / "1-8-seed0" / "log.txt"
    while not (log.is_file() and "\niter " in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal's Ctrl-C reaches the run, too
    else:
        process.send_signal(number)  # a scheduler's may not: the run must not go on alone
    rest = process.stdout.read()
    assert process.wait() == 130 and "the same command goes on" in rest, rest
    result = run(*command, tmp_path / "stopped", *REST, "--save-interval", "1")
    assert "resumed" in result.stdout
    assert same(*(weights(tmp_path / name / "supervised" / "1-8-seed0") for name in ("whole", "stopped")))


def test_a_run_that_fails_is_named(tmp_path):
    result = run(*SHORT, "--methods", "cps", "--split", "3/4", "--output", tmp_path, *REST, expect=2)
    assert "--split 3/4" in result.stderr and "cps.py ended with exit code 2" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("method", ["st", "cps"])
def test_a_run_that_failed_at_its_start_takes_the_corrected_command(method: str, tmp_path):
    command = (*SHORT, "--data", "camvid", "--backbone", "tiny", "--methods", method, "--output", tmp_path, *REST)
    for folder in ("nowhere", "elsewhere"):  # the second one is not refused as the setting of another run
        result = run(*command, "--weights", "none", "--data-dir", folder, expect=2)
        assert f"no folder {folder};" in result.stderr


def test_flags_that_a_later_method_refuses_stop_the_comparison_before_its_first_run(tmp_path):
    result = run(*SHORT, "--methods", "supervised", "u2pl", "--output", tmp_path, *REST, expect=2)
    assert "--warmup-iters 200: from 0 to below --max-iters" in result.stderr and "started" not in result.stdout


def test_runs_with_other_labelled_pictures_are_not_compared(tmp_path):
    rows = []
    for name, sha1, threads in (("a", "1", 1), ("b", "1", 2), ("c", "2", 2)):
        (tmp_path / name).mkdir()
        alike = {"args": {"method": "cps"}, "git_commit": "c", "processes": 1, "hardware": "cpu", "versions": {"torch": "2"}}
        (tmp_path / name / "args.json").write_text(json.dumps({**alike, "labelled_list_sha1": sha1, "threads": threads}))
        rows.append(row(name, [50.0], None)._replace(folders=[tmp_path / name]))
    assert compare.conditions(rows[1:2]) == [] and compare.conditions(rows[:2]) == ["- not alike in all runs: threads (1; 2)"]
    with pytest.raises(InputError, match="other labelled pictures"):
        compare.conditions(rows)
    assert compare.conditions([rows[0], rows[2]._replace(split="1/4")])  # another split has another list


def test_every_variant_has_flags_that_exist():
    commands = {variant.command for experiment in EXPERIMENTS.values() for variant in experiment.variants}
    assert commands >= {variant.command for variant in METHODS.values()}
    folders = set()
    for command in commands:
        script, *flags = shlex.split(command)
        importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        folders.add(compare.run_folder(Path("out"), Variant("", command), "1/8", 0))
    assert len(folders) == len(commands)
    assert compare.run_folder(Path("out"), Variant("", "cps.py", times=2), "1/8", 0) not in folders


def row(label: str, values: list[float], published: float | None) -> Row:
    results = [Result(value, value + 1, 60.0, 100) for value in values]
    return Row(Variant(label, "cps.py", published and {"1/8": published}), "1/8", [], results)


def test_the_table_reads_differences_against_their_noise():
    same, zero = row("same", [70.0, 71.0, 72.0], 74.0), row("zero", [75.0, 76.0, 78.0], 75.0)
    assert [line.split(": ")[-1] for line in compare.readings([row("first", [70.0, 71.0, 72.0], 75.0), same, zero])] == [
        "no difference at all, these flags change nothing here",
        "clear of the noise, and none is published",
    ]
    rows = [
        row("first", [70.0, 71.0, 72.0], 75.0),
        row("better", [75.0, 76.0, 78.0], 77.0),
        row("worse", [60.0, 61.0, 62.0], 76.0),
        row("equal", [70.0, 71.0, 73.0], 74.0),
        row("unpublished", [1.0, 1.0, 1.0], None),
    ]
    found = compare.readings(rows)
    better = (
        "better against first at 1/8: published +2.00, here +5.33, standard error 0.33: clear of the noise, in the published"
    )
    assert better in found[0] and "DISAGREES" in found[1] and "not clear of the noise" in found[2]
    assert found[3].endswith("unpublished against first at 1/8: here -70.00, standard error 0.58: clear of the noise")
    assert compare.readings([row("a", [70.0], None), row("b", [71.0], None)])[0].endswith(
        "+1.00: one seed, nothing is known of the noise"
    )
    assert rows[0].mean == 71 and rows[0].spread == 1 and math.isnan(row("one", [3.0], None).spread)
    assert rows[1]._replace(split="1/4").published is None


def test_methods_and_experiments_exclude_each_other():
    with pytest.raises(SystemExit):
        compare.parse_args(["--methods", "cps", "--experiment", "cps-fig5"])
    args = compare.parse_args(["--data", "voc", "--backbone", "resnet101", "--", "--amp", "bf16"])
    assert args.shared["backbone"] == "resnet101" and args.shared["max_iters"] == 39_000 and args.rest == ["--amp", "bf16"]
    with pytest.raises(SystemExit):  # each process would get the batch of all
        compare.parse_args(["--launcher", "torchrun --nproc_per_node 4"])
    assert compare.parse_args(["--launcher", "torchrun --nproc_per_node 4", "-b", "2"]).shared["batch_size"] == 2
    assert compare.parse_args(["--data", "cityscapes", "--eval-window", "0"]).shared["eval_window"] == 0
