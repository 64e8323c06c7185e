"""The comparison of all methods: what it runs, reuses, resumes and refuses, and what it says."""

import csv
import importlib
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run
from PIL import Image
from test_scripts import same, start, wait_for, weights

from common import InputError, compare, runner, tables
from common.experiments import EXPERIMENTS, METHODS, Experiment, Variant
from common.runner import Runs, Task, run_folder

SHORT = ("--seeds", "1", "--max-iters", "4", "--crop-size", "32", "-b", "2")
REST = ("--", "--eval-iters", "4", "--log-interval", "1", "--device", "cpu")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Scripts are started by their names."""
    monkeypatch.chdir(ROOT)


def here(*flags: str) -> None:
    """Compare in this process; the runs are processes of their own."""
    compare.main([str(flag) for flag in flags])


def test_it_runs_reuses_and_reports(tmp_path, capfd):
    command = (*SHORT, "--methods", "supervised", "cps", "--output", tmp_path, *REST)
    out = run("-m", "common.compare", *command).stdout
    assert "[1/2] supervised.py --split 1/8 --seed 0 --max-iters 4: started" in out
    folders = [tmp_path / name / "1-8-seed0" for name in ("supervised", "cps")]
    table = (tmp_path / "supervised+cps-1-8.md").read_text()
    assert table in out
    for label, folder in zip(("SupOnly", "CPS"), folders):
        value = (folder / "log.txt").read_text().rsplit("miou_last=", 1)[1].split()[0]
        assert f"| {label} | {value} | - | " in table
        last = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))[-1]
        assert f"| - | {100 * float(last['miou_rarest']):.2f} | {value} (" in table  # after sd
    rows = tables.read_csv(tmp_path / "supervised+cps-1-8.csv").rows
    assert [len(row.results) for row in rows] == [1, 1]
    iou = dict(line.split(",")[:2] for line in (folders[0] / "iou.csv").read_text().splitlines())
    assert iou.pop("class") == "model" and len(iou) == 12
    assert sum(map(float, iou.values())) / 12 == pytest.approx(rows[0].mean, abs=0.02)
    means = "".join(f" {float(value):.1f} |" for value in iou.values())
    assert f"| SupOnly |{means}" in table
    for name in ("supervised+cps-1-8.png", "supervised+cps-1-8-predictions.png"):
        assert Image.open(tmp_path / name).width > 300

    before = [(folder / "last.pt").stat().st_mtime_ns for folder in folders]
    here(*command)
    assert "started" not in capfd.readouterr().out
    assert [(folder / "last.pt").stat().st_mtime_ns for folder in folders] == before
    message = "supervised/1-8-seed0 holds a run with lr=0.03; choose another --output"
    with pytest.raises(InputError, match=message):
        here(*command, "--lr", "0.5")
    with pytest.raises(InputError, match="holds a run with data_dir=None"):
        here(*command, "--data-dir", "elsewhere")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that `test_a_comparison_that_is_stopped_goes_on` stops, not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    command = ("supervised.py", "--max-iters", "60", "--crop-size", "32", "-b", "2", *REST[1:])
    run(*command, "--output-stride", "8", "--output-dir", folder / "run")
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_comparison_that_is_stopped_goes_on(number: int, whole, tmp_path, capfd):
    folder = tmp_path / "supervised" / "1-8-seed0"
    short = (*SHORT, "--max-iters", "60", "--methods", "supervised")
    command = (*short, "--output", tmp_path, *REST, "--save-interval", "1")
    process = start("-m", "common.compare", *command)
    wait_for(process, "started")
    log = folder / "log.txt"
    while not (log.is_file() and "\niter " in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal's Ctrl-C reaches the run, too
    else:
        process.send_signal(number)  # a scheduler's may not: the run must not go on alone
    rest = process.stdout.read()
    assert process.wait() == 130 and "the same command goes on" in rest, rest
    here(*command)
    assert "resumed" in capfd.readouterr().out
    assert same(weights(whole), weights(folder))


STUB = """\
import pathlib, signal, sys, time
seed = next(flag for flag in sys.argv if flag.startswith("--seed=")).split("=")[1]
folder = pathlib.Path("{folder}")
signal.signal(signal.SIGTERM, lambda *_: ((folder / f"{{seed}}.stopped").touch(), sys.exit(0)))
(folder / f"{{seed}}.started").touch()
if seed == "100":
    while not (folder / "101.started").exists():
        time.sleep(0.01)
    sys.exit(1)
time.sleep(100)
"""


@pytest.mark.parametrize("failing", [True, False])
def test_runs_beside_one_that_fails_are_stopped_and_none_is_started(failing: bool, tmp_path):
    """Also after Ctrl-C, which here comes while two runs are under way."""
    stub = tmp_path / "stub.py"
    stub.write_text(STUB.format(folder=tmp_path))
    command = ["--launcher", f"{sys.executable} {stub}", "--jobs", "2", "--seeds", "6"]
    command += ["--first-seed", "100" if failing else "101", "--methods", "supervised"]
    command += [*SHORT[2:], "--output", str(tmp_path / "out"), *REST]
    if failing:
        with pytest.raises(InputError, match=r"supervised.py .*--seed 100 .*: exit code 1"):
            here(*command)
    else:
        process = start("-m", "common.compare", *command)
        while len([*tmp_path.glob("*.started")]) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    first = {"100", "101"} if failing else {"101", "102"}
    assert {path.stem for path in tmp_path.glob("*.started")} == first
    assert {path.stem for path in tmp_path.glob("*.stopped")} == first - {"100"}


def test_a_run_that_fails_is_named(tmp_path, capfd):
    command = (*SHORT, "--methods", "cps", "--split", "3/4", "--output", tmp_path, *REST)
    with pytest.raises(InputError, match=r"cps\.py --split 3/4 --seed 0 .*: exit code 2"):
        here(*command)
    assert "--split 3/4" in capfd.readouterr().err


@pytest.mark.parametrize("method", ["st", "cps"])
def test_a_run_that_failed_at_its_start_takes_the_corrected_command(method: str, tmp_path, capfd):
    own = ("--data", "camvid", "--backbone", "tiny", "--methods", method)
    command = (*SHORT, *own, "--output", tmp_path, *REST, "--weights", "none")
    for folder in ("nowhere", "elsewhere"):
        # The second one is not refused as the setting of another run.
        with pytest.raises(InputError, match="exit code 2, its message is above"):
            here(*command, "--data-dir", folder)
        assert f"no folder {folder};" in capfd.readouterr().err


def test_flags_that_a_later_method_refuses_stop_the_comparison_before_its_first_run(
    tmp_path, capfd
):
    with pytest.raises(SystemExit) as end:
        here(*SHORT, "--methods", "supervised", "u2pl", "--output", tmp_path, *REST)
    out, err = capfd.readouterr()
    assert end.value.code == 2 and "started" not in out
    assert "--warmup-iters 200: from 0 to below --max-iters" in err


def test_an_error_ends_a_comparison_with_one_line(tmp_path):
    (tmp_path / "file").touch()
    command = ("-m", "common.compare", "--output", tmp_path / "file" / "folder")
    assert "compare: error: cannot write to" in run(*command, expect=2).stderr.splitlines()[-1]


def test_runs_with_other_labelled_images_are_not_compared(tmp_path):
    compared = []
    for name, sha1, threads in (("a", "1", 1), ("b", "1", 2), ("c", "2", 2)):
        description = {
            "args": {"method": "cps", "seed": 0},
            "git_commit": "c",
            "processes": 1,
            "hardware": "cpu",
            "versions": {"torch": "2"},
            "labelled_list_sha1": sha1,
            "threads": threads,
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps(description))
        compared.append(Runs(METHODS["cps"], "1/8", [tmp_path / name], []))
    assert compare.conditions(compared[1:2]) == []
    assert compare.conditions(compared[:2]) == ["not alike in all runs: threads (1; 2)"]
    with pytest.raises(InputError, match="other labelled images"):
        compare.conditions(compared)
    other_split = compared[2]._replace(split="1/4")  # which has another list
    assert compare.conditions([compared[0], other_split])


def test_a_run_of_an_earlier_version_can_be_completed(tmp_path):
    command = (*SHORT, "--methods", "supervised", "--output", tmp_path, *REST)
    here(*command)
    folder = tmp_path / "supervised" / "1-8-seed0"
    iou = (folder / "iou.csv").read_text()
    (folder / "iou.csv").unlink()
    with pytest.raises(
        InputError, match=r"earlier version, .*python supervised\.py --resume"
    ) as no:
        here(*command)
    run(*str(no.value).split("; python ")[1].split(" writes")[0].split())
    assert (folder / "iou.csv").read_text() == iou
    here(*command)


def test_a_measure_that_a_method_lacks_leaves_a_gap(tmp_path, monkeypatch):
    variants = Variant("SupOnly", "supervised.py"), METHODS["cps_no_cutmix"]
    monkeypatch.setitem(EXPERIMENTS, "test", Experiment("a test", variants, curve="overlap"))
    here("--experiment", "test", *SHORT, "--output", tmp_path, *REST)
    lines = (tmp_path / "test-1-8.md").read_text().splitlines()
    assert lines[4].endswith("| overlap at the end |") and lines[6].endswith("| - |")
    curves = tables.read_curves(tmp_path / "test-1-8-curve.csv")
    assert list(curves) == ["CPS without CutMix"] and 4 in curves["CPS without CutMix"]
    assert Image.open(tmp_path / "test-1-8-curve.png").width > 300


def test_a_line_of_the_table_knows_what_is_published_at_its_split():
    runs = Runs(METHODS["psmt"], "1/8", [], [])
    assert runs.row.published == 76.89 and runs.row.source == "PS-MT's release"
    assert runs._replace(split="1/16").row.published is None


def test_the_figure_of_a_paper_with_one_split_says_at_which_it_was_published():
    variant = Variant("DRW", "ael.py", {"1/16": 73.85})
    assert variant.published_at("1/16") == (73.85, "")
    assert variant.published_at("1/8") == (73.85, "at 1/16")
    assert variant._replace(source="a release").published_at("1/8")[1] == "a release at 1/16"


def test_several_runs_at_a_time_give_the_table_of_one_at_a_time(tmp_path):
    command = (*SHORT, "--seeds", "2", "--first-seed", "100", "--methods", "supervised")
    for jobs in (1, 2):
        places = ("--output", tmp_path / str(jobs), "--jobs", jobs)
        out = run("-m", "common.compare", *command, *places, *REST)
    first, second = (
        tables.read_csv(tmp_path / str(jobs) / "supervised-1-8-seeds100-101.csv").rows[0].results
        for jobs in (1, 2)
    )
    assert [result.seed for result in first] == [100, 101]
    assert [result.last for result in first] == [result.last for result in second]
    assert [line.rsplit(" ", 1)[1] for line in out.stdout.splitlines()[:2]] == ["started"] * 2


def test_every_variant_has_flags_that_exist():
    experiments = EXPERIMENTS.values()
    commands = {variant.command for part in experiments for variant in part.variants}
    assert commands >= {variant.command for variant in METHODS.values()}
    folders = set()
    for command in commands:
        script, *flags = shlex.split(command)
        importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        folders.add(run_folder(Path("out"), Task(Variant("", command), "1/8", 0)))
    assert len(folders) == len(commands)
    assert run_folder(Path("out"), Task(Variant("", "cps.py", times=2), "1/8", 0)) not in folders


def test_methods_and_experiments_exclude_each_other():
    with pytest.raises(SystemExit):
        compare.parse_args(["--methods", "cps", "--experiment", "cps-fig5"])
    with pytest.raises(SystemExit):
        compare.parse_args(["--methods", "cps", "cps"])


def test_lines_of_an_experiment_have_names_of_their_own():
    for experiment in EXPERIMENTS.values():
        labels = [variant.label for variant in experiment.variants]
        assert len(set(labels)) == len(labels)
        assert {variant.against for variant in experiment.variants} <= {"", *labels}


def test_tables_of_other_seeds_stand_beside_one_another():
    for flags, expected in (
        ([], "methods-1-8"),
        (["--first-seed", "100", "--seeds", "2"], "methods-1-8-seeds100-101"),
    ):
        args = compare.parse_args(flags)
        assert compare.file_name("methods", EXPERIMENTS["methods"], args) == expected


def test_the_folder_data_set_has_no_length_of_its_own():
    args = compare.parse_args(["--data", "folder", "--", "--data-dir", "mine"])
    task = Task(METHODS["cps"], "all", 0)
    assert "--seed=0" in runner.command_line(task, args)[1]
    with pytest.raises(InputError, match="give --max-iters"):
        runner.command_line(task._replace(variant=Variant("twice", "cps.py", times=2)), args)


def test_flags_change_what_all_runs_share_or_go_to_every_script():
    args = compare.parse_args(["--data", "voc", "--backbone", "resnet101", "--", "--amp", "bf16"])
    assert args.shared["backbone"] == "resnet101" and args.shared["max_iters"] == 39_000
    assert args.rest == ["--amp", "bf16"]
    args = compare.parse_args(["--data", "cityscapes", "--eval-window", "0"])
    assert args.shared["eval_window"] == 0
    launcher = ["--launcher", "torchrun --nproc_per_node 4"]
    with pytest.raises(SystemExit):  # each process would get the batch of all
        compare.parse_args(launcher)
    assert compare.parse_args([*launcher, "-b", "2"]).shared["batch_size"] == 2


def test_flags_of_one_method_are_its_own(tmp_path):
    flags = ("--methods", "supervised", "u2pl", "--output", str(tmp_path))
    args = compare.parse_args([*flags, "--method-flags", "u2pl=--warmup-iters 3 --lr=0.5"])
    variants = compare.chosen_variants(args)
    assert [variant.label for variant in variants] == [
        "SupOnly",
        "U2PL (--warmup-iters 3 --lr=0.5)",
    ]
    commands = [runner.command_line(Task(variant, "1/8", 0), args)[1] for variant in variants]
    settled = runner.settings("u2pl.py", commands[1])
    assert (settled.warmup_iters, settled.lr) == (3, 0.5) and "--warmup-iters" not in commands[0]
    folder = run_folder(tmp_path, Task(variants[1], "1/8", 0)).parent
    assert folder == tmp_path / "u2pl_warmup-iters-3_lr-0.5"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["cps=--soft"], "not among --methods"),
        (["unknown=--soft"], "give METHOD=FLAGS"),
        (["u2pl"], "give METHOD=FLAGS"),
        (["u2pl=--lr '0.5"], "No closing quotation"),
        (["u2pl=--seed 7 -b 2"], "--seed, -b is the same for all methods"),
        (["u2pl=--crop-size=96"], "--crop-size is the same for all methods"),
        (["u2pl=--lr 0.5", "u2pl=--no-prt"], "all flags of a method at once"),
        (["u2pl=--ael"], "makes two methods the same"),
    ],
)
def test_flags_of_one_method_that_cannot_be_compared_are_refused(wrong: list[str], said, capsys):
    given = [flag for each in wrong for flag in ("--method-flags", each)]
    with pytest.raises(SystemExit):
        compare.parse_args(["--methods", "supervised", "u2pl", "u2pl_ael", *given])
    assert said in capsys.readouterr().err


def test_a_stopped_run_with_flags_of_its_own_goes_on(tmp_path, capfd):
    flags = (*SHORT, "--methods", "supervised", "--method-flags", "supervised=--lr 0.01")
    flags = (*flags, "--output", tmp_path, *REST, "--lr", "0.02", "--save-interval", "1")
    here(*flags)
    folder = tmp_path / "supervised_lr-0.01" / "1-8-seed0"
    log = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text(log.rsplit("miou_last", 1)[0])  # as if it had been stopped
    here(*flags)
    assert "resumed" in capfd.readouterr().out
    assert (tmp_path / "supervised+supervised-lr-0.01-1-8.csv").is_file()
    description = json.loads((folder / "args.json").read_text())["args"]
    assert description["lr"] == 0.01
