"""The scripts as a user runs them: trained, killed, resumed, stopped, evaluated, misused."""

import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT, damage, run, write_mask, write_picture
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import runtime
from common.data import StreamSampler

SHORT = (
    "--max-iters", "12", "--eval-iters", "6", "--log-interval", "2", "--save-interval", "3",
    "-b", "2", "--device", "cpu",
)  # fmt: skip
TINY = ("--backbone", "tiny", "--weights", "none", "-b", "2", "--crop-size", "32")
LAST_LINE = re.compile(r"^miou_last=\d+\.\d\d miou_best=\d+\.\d\d$")


def here(script: str, *flags: str, expect: int = 0) -> SimpleNamespace:
    """Run a script in this process and check its exit code; a process of its own takes seconds.

    This process then holds the lock of the run's folder: no other one can go on with the run.
    """
    module = importlib.import_module(script.removesuffix(".py"))
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(signal, "signal"):
        with pytest.raises(SystemExit) as end:
            runtime.launch(module.main, module.parse_args([str(flag) for flag in flags]))
    result = SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())
    assert end.value.code == expect, f"{result.stdout}\n{result.stderr}"
    return result


def start(*command: str) -> subprocess.Popen:
    """Start a Python command line in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-u", *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Read the output up to a line that holds `text`."""
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"ended without {text!r}:\n{seen}")


def kill(process: subprocess.Popen) -> None:
    """Kill a process and all that it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def last(run_folder: Path) -> dict:
    """The last checkpoint of a run."""
    return torch.load(run_folder / "last.pt", weights_only=True)


def weights(run_folder: Path) -> dict:
    """The networks of a run's last checkpoint."""
    return last(run_folder)["networks"]


def same(first: dict, second: dict) -> bool:
    """Whether networks are equal bit by bit."""
    return all(
        torch.equal(value, second[name][key])
        for name in first
        for key, value in first[name].items()
    )


def rows(run_folder: Path) -> dict[str, tuple[str, ...]]:
    """The columns of metrics.csv."""
    lines = [line.split(",") for line in (run_folder / "metrics.csv").read_text().splitlines()]
    return dict(zip(lines[0], zip(*lines[1:])))


def shown(run_folder: Path) -> list[tuple[str, int, float]]:
    """What TensorBoard finds in a run's folder; learning rates are rounded alike in both."""
    events = EventAccumulator(str(run_folder), purge_orphaned_data=False).Reload()
    tags = events.Tags()["scalars"]
    return sorted(
        (tag, event.step, round(event.value, 5)) for tag in tags for event in events.Scalars(tag)
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """An uninterrupted short CPS run."""
    folder = tmp_path_factory.mktemp("runs") / "cps"
    result = run("cps.py", *SHORT, "--output-dir", folder)
    (folder / "stdout.txt").write_text(result.stdout)
    return folder


# ------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_what_is_promised(finished):
    out = (finished / "stdout.txt").read_text()
    assert LAST_LINE.match(out.splitlines()[-1])
    protocol = "1 in 8 of 256 sorted names: 32 labelled, 224 unlabelled"
    for text in (protocol, "model_2", "average", "triangle", "figures"):
        assert text in out
    left = {path.name for path in finished.iterdir()}
    assert left >= {"args.json", "log.txt", "metrics.csv", "last.pt", "best.pt", "figures"}
    assert any(name.startswith("events.out.tfevents") for name in left)
    for name in ("curves.png", "predictions.png"):
        assert Image.open(finished / "figures" / name).width > 500
    described = json.loads((finished / "args.json").read_text())
    assert described["versions"]["torch"] == torch.__version__
    assert len(described["labelled_list_sha1"]) == 40
    best = torch.load(finished / "best.pt", weights_only=True)
    assert set(best) == {"schema", "iteration", "args", "networks", "result"}


def test_a_run_begins_with_its_settings_a_line_a_group(finished):
    first, *lines = (finished / "stdout.txt").read_text().splitlines()[:8]
    assert first.startswith("cps on shapes: ")
    groups = [line.split(":")[0] for line in lines]
    assert groups == [
        "data", "network", "schedule", "optimisation", "method", "machine", "run folder",
    ]  # fmt: skip
    assert lines[0] == "data: crop_size 64, scale 0.75,1,1.25,1.5"
    assert lines[2].endswith("processes 1, batch_size 2, eval_iters 6, eval_window 0")
    assert lines[4] == "method: cps_weight 0.5, cutmix True, soft False"


def test_metrics_have_one_row_a_log_line_and_evaluation(finished):
    columns = rows(finished)
    assert columns["iteration"] == ("2", "4", "6", "6", "8", "10", "12", "12")
    evaluated = [cell != "" for cell in columns["miou"]]
    assert evaluated == [False, False, False, True, False, False, False, True]
    parts = zip(columns["loss_sup"], columns["loss_unsup"])
    total = [float(sup) + 0.5 * float(unsup) for sup, unsup in parts if sup]  # λ of the preset
    expected = [float(cell) for cell in columns["loss"] if cell]
    assert total == pytest.approx(expected, rel=1e-4)


def test_rare_classes_have_a_mean_of_their_own(tmp_path):
    flags = (*SHORT, "--data", "shapes-zipf", "--output-dir", tmp_path / "zipf")
    out = here("supervised.py", *flags).stdout
    assert out.startswith("supervised on shapes-zipf: 1 in 8 of 256 sorted names: 32 labelled")
    found = re.search(r"^mean +\d+\.\d\d\n6 rarest +(\d+\.\d\d)\n\n", out, re.MULTILINE)
    assert 100 * float(rows(tmp_path / "zipf")["miou_rarest"][-1]) == pytest.approx(
        float(found[1]), abs=0.005
    )


def test_bfloat16_runs(tmp_path):
    result = here("supervised.py", *SHORT, "--amp", "bf16", "--output-dir", tmp_path / "bf16")
    assert LAST_LINE.match(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("data", "split"),
    [("camvid", "1/4"), ("cityscapes", "1/16"), ("folder", "1/2"), ("voc", "1/8")],
)
def test_cps_trains_on_every_data_set(data: str, split: str, request, tmp_path):
    """In this process, where the fixture of VOC has cut the lists down."""
    tree = request.getfixturevalue("own_folder" if data == "folder" else f"{data}_tree")
    where = ("--data", data, "--data-dir", tree, "--split", split)
    short = ("--max-iters", "2", "-j", "1", "--device", "cpu")
    out = here("cps.py", *TINY, *short, *where, "--output-dir", tmp_path / "out").stdout
    assert LAST_LINE.match(out.splitlines()[-1])
    if data == "voc":
        assert "4 labelled, 6 unlabelled" in out and "tvmonitor" in out


# ------------------------------------------------------------------------------ killed and resumed


@pytest.mark.parametrize(
    "command",
    [
        "cps.py",
        "supervised.py",
        "mean_teacher.py",
        "mean_teacher.py --cutmix",
        "mean_teacher.py --classmix",
        "unimatch.py",
        "ael.py",
        "psmt.py --warmup-epochs 0.5",
        "u2pl.py --ael --warmup-iters 2",
    ],
    ids=lambda command: command,
)
def test_killed_and_resumed_ends_with_the_same_weights(command: str, finished, tmp_path):
    script, *flags = command.split()
    if script != "cps.py":
        finished = tmp_path / "whole"
        here(script, *flags, *SHORT, "--output-dir", finished)
    killed = tmp_path / "killed"
    process = start(script, *flags, *SHORT, "--output-dir", killed)
    wait_for(process, "iter      8/12")
    kill(process)
    assert last(killed)["iteration"] == 6
    with open(killed / "metrics.csv", "a") as file:
        file.write("1")  # half a row
    assert "resumed at iteration 6" in here(script, "--resume", killed).stdout
    assert same(weights(finished), weights(killed))
    for name in ("iteration", "loss", "miou"):
        assert rows(finished)[name] == rows(killed)[name]
    assert shown(finished) == shown(killed)


def test_workers_do_not_change_the_result(finished, tmp_path):
    here("cps.py", *SHORT, "-j", "2", "--output-dir", tmp_path / "workers")
    assert same(weights(finished), weights(tmp_path / "workers"))


@pytest.mark.parametrize(
    ("number", "code", "flags"), [(signal.SIGTERM, 0, ("--debug",)), (signal.SIGINT, 130, ())]
)
def test_signals_save_and_the_run_goes_on(number: int, code: int, flags: tuple, finished, tmp_path):
    folder = tmp_path / "run"
    process = start("cps.py", *SHORT, "-j", "1", *flags, "--output-dir", folder)
    wait_for(process, "iter      4/12")
    # The group: loader workers get the signal, too, as from a terminal or a scheduler.
    os.killpg(process.pid, number)
    rest = process.stdout.read()
    assert process.wait() == code, rest
    assert "Traceback" not in rest and f"--resume {folder}" in rest
    assert last(folder)["iteration"] >= 4
    here("cps.py", "--resume", folder)
    assert same(weights(finished), weights(folder))


def test_a_run_that_died_before_its_first_checkpoint_starts_again(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "young")
    (tmp_path / "young" / "last.pt").unlink()
    result = here("cps.py", "--resume", tmp_path / "young")
    assert "no checkpoint in the run folder yet" in result.stdout
    assert same(weights(finished), weights(tmp_path / "young"))


def test_a_restart_by_torchrun_resumes_by_itself(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = here("cps.py", *SHORT, "--output-dir", tmp_path / "run")
    assert "resumed at iteration 12" in result.stdout


def test_eval_only_repeats_the_table_and_changes_nothing(finished):
    before = (finished / "metrics.csv").read_text()
    result = here("cps.py", "--eval-only", "--resume", finished)
    table = (finished / "stdout.txt").read_text().split("IoU %")[1].split("figures")[0]
    assert result.stdout.split("IoU %")[1].split("figures")[0] == table
    assert (finished / "metrics.csv").read_text() == before


# ----------------------------------------------------------------------------------- refused runs


def test_a_run_folder_is_never_overwritten(finished):
    before = (finished / "last.pt").read_bytes()
    result = here("cps.py", *SHORT, "--output-dir", finished, expect=2)
    assert "holds a run already" in result.stderr and len(result.stderr.splitlines()) == 1
    assert (finished / "last.pt").read_bytes() == before


def test_two_processes_cannot_write_one_run(tmp_path):
    endless = ("--max-iters", "100000", "--log-interval", "2")
    process = start("supervised.py", *endless, "--output-dir", tmp_path / "run")
    wait_for(process, "iter ")
    result = here("supervised.py", "--resume", tmp_path / "run", expect=2)
    assert "another process is writing" in result.stderr
    kill(process)


def test_resume_refuses_other_settings_and_takes_missing_ones(finished):
    result = here("cps.py", "--resume", finished, "--lr", "0.5", expect=2)
    assert "lr=0.03" in result.stderr
    again = here("cps.py", "--resume", finished).stdout
    assert "resumed at iteration 12" in again and LAST_LINE.match(again.splitlines()[-1])


def test_a_run_is_resumed_with_its_own_script_and_folder(finished, tmp_path):
    result = here("supervised.py", "--resume", finished, expect=2)
    assert "is a run of cps; use its script" in result.stderr
    result = here("cps.py", "--resume", finished / "best.pt", expect=2)
    assert "give the run's folder" in result.stderr
    result = here("cps.py", "--resume", finished, "--output-dir", tmp_path / "other", expect=2)
    assert "leave --output-dir out" in result.stderr


def test_a_run_is_resumed_with_its_own_images(own_folder, tmp_path):
    names, folder = tmp_path / "list.txt", tmp_path / "run"
    names.write_text("labelled0\nlabelled1\n")
    own = ("--data", "folder", "--data-dir", own_folder, "--labelled-list", names)
    command = ("supervised.py", *TINY, "--max-iters", "2", "-j", "0", "--device", "cpu", *own)
    here(*command, "--output-dir", folder)
    names.write_text("labelled2\nlabelled3\n")
    result = here("supervised.py", "--resume", folder, expect=2)
    assert "was started with other images" in result.stderr
    names.write_text("labelled0\nlabelled1\n")
    here(*command, "--resume", folder)  # the very command goes on
    write_picture(own_folder / "images" / "unlabelled" / "another.jpg")
    result = here("supervised.py", "--resume", folder, expect=2)
    assert "1 unlabelled images are new, such as another" in result.stderr


def test_a_run_that_failed_at_its_start_does_not_occupy_its_folder(tmp_path):
    result = here("cps.py", *SHORT, "--split", "all", "--output-dir", tmp_path / "run", expect=2)
    assert "use supervised.py" in result.stderr
    here("cps.py", *SHORT, "--split", "1/8", "--output-dir", tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--split", "3/4"), "--split 3/4"),
        (("--data", "voc", "--data-dir", "nowhere"), "no folder nowhere"),
        (("--data", "folder"), "needs --data-dir"),
        (("--backbone", "resnet18", "--weights", "nowhere.pt"), "no such file"),
        (("--weights", "imagenet"), "no such file; tiny takes blots, none or a path"),
        (("--crop-size", "8"), "at least 32"),
        (("--scale", "huge"), "--scale huge"),
        (("-b", "1"), "at least 2 images"),
        (("--device", "toaster"), "--device toaster"),
        (("--kernels", "triton", "--device", "cpu"), "needs a GPU"),
        (("--split", "all"), "use supervised.py"),
        (("--resume", "nowhere"), "no run in nowhere"),
        (("--output-dir", "/proc/run"), "cannot write to the run folder"),
        (("--max-iters", "0"), "not at least 1"),
        (("--lr", "nan"), "--lr and --head-lr-mult must be above 0"),
        (("--seed", "99999999999"), "--seed (below 2^32)"),
        (("--device", "mps"), "--device mps: cpu or cuda"),
        (("--extra", "coarse"), "--extra coarse goes with --data cityscapes"),
        (("--download",), "--download fetches voc and camvid, not shapes"),
        (("--cps-weight", "nan"), "--cps-weight is not negative"),
        (("--split", "1/8", "--labelled-list", "x.txt"), "not allowed with argument --split"),
        (("--crop-size", "200"), "longest side, 64"),
        (("--eval-only",), "--eval-only needs --resume RUN"),
    ],
)
def test_bad_flags_end_with_one_clear_line(flags: tuple, message: str, tmp_path):
    placed = "--output-dir" in flags or "--resume" in flags
    output = () if placed else ("--output-dir", tmp_path / "run")
    result = here("cps.py", *SHORT, *output, *flags, expect=2)
    assert message in result.stderr.splitlines()[-1]


def test_a_bad_mask_is_named_before_training(own_folder, tmp_path):
    write_mask(own_folder / "masks/labelled/labelled1.png", 3, extra=(77,))
    own = (*TINY, "--data", "folder", "--data-dir", own_folder)
    result = here("supervised.py", *SHORT, *own, "--output-dir", tmp_path / "out", expect=2)
    assert re.search(r"labelled1\.png hold 77, but 3 classes have the labels 0 to", result.stderr)
    assert result.stderr.splitlines()[-4:] == ["background 0", "cat 1", "dog 2", "class_3 77"]


# ------------------------------------------------------------------------- what goes wrong midway


@pytest.mark.parametrize("flags", [(), ("--debug",)])
def test_an_error_ends_the_workers_of_all_loaders(own_folder, tmp_path, flags: tuple):
    """Found hanging once: the script waited forever for workers that ignore SIGTERM."""
    for path in (own_folder / "images" / "unlabelled").iterdir():
        damage(path)
    own = (*TINY, "--data", "folder", "--data-dir", own_folder, "-j", "2", *flags)
    output = ("--output-dir", tmp_path / "out")
    result = run("cps.py", *SHORT, *own, *output, expect=1 if flags else 2)
    assert re.search(r"unlabelled\d\.jpg: cannot be decoded", result.stderr)


def test_a_run_outlives_a_broken_image_that_is_taken_away(own_folder, tmp_path):
    """Found costly once: it ended without a checkpoint, and without the image --resume refused."""
    folder = tmp_path / "run"
    first_batch = next(iter(StreamSampler(6, 2, seed=0, stream=1, start=0, stop=1)))
    name = f"unlabelled{min(set(range(6)) - {key.index for key in first_batch})}"
    broken = own_folder / "images" / "unlabelled" / f"{name}.jpg"
    damage(broken)  # its pixels: nothing shows before its turn comes
    never = ("--save-interval", "1000", "--eval-iters", "1000")
    own = (*TINY, "--data", "folder", "--data-dir", own_folder, "-j", "0", *never)
    result = here("cps.py", "--no-cutmix", *SHORT, *own, "--output-dir", folder, expect=2)
    message = r"\.jpg: .*; saved at iteration (\d+): repair or remove the file, then go on with"
    at = re.search(name + message, result.stderr)
    assert at and last(folder)["iteration"] == int(at[1]) > 0
    broken.unlink()
    out = here("cps.py", "--resume", folder).stdout
    assert f"resumed at iteration {at[1]}" in out
    assert f"1 of 6 unlabelled images are gone since the start ({name})" in out
    assert last(folder)["iteration"] == 12


def test_a_killed_loader_worker_ends_the_run_after_a_checkpoint(own_folder, tmp_path):
    own = (*TINY, "--data", "folder", "--data-dir", own_folder, "-j", "1", "--device", "cpu")
    endless = ("--max-iters", "100000", "--log-interval", "1")
    process = start("supervised.py", *own, *endless, "--output-dir", tmp_path / "run")
    wait_for(process, "iter      5/")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output = process.stdout.read()
    assert process.wait() == 1 and "Traceback" not in output
    message = r"supervised.py: stopped: DataLoader worker .*fewer workers \(-j\).*--resume"
    assert re.search(message, output.splitlines()[-1])
    assert last(tmp_path / "run")["iteration"] >= 5


def test_a_loss_that_is_not_finite_stops_with_the_checkpoint_untouched(tmp_path):
    folder = tmp_path / "run"
    result = here("supervised.py", *SHORT, "--lr", "1e30", "--output-dir", folder, expect=1)
    message = r"the loss is (nan|inf) at iteration \d+; its images: shape\d+"
    assert re.search(message, result.stderr)
    assert not (folder / "last.pt").exists()


# ------------------------------------------------------------------------------- several processes

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for torchrun's processes")
def test_two_processes_outlive_the_death_of_one_and_of_both(tmp_path):
    """A run loses one process, which torchrun replaces, and then both, after which it is resumed.

    torchrun's new processes may not call the address that the dead one has left in its store.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*TORCHRUN, "cps.py", *SHORT, "--output-dir", whole)
    process = start(*TORCHRUN, "--max-restarts", "1", "cps.py", *SHORT, "--output-dir", killed)
    wait_for(process, "iter      8/12")
    *_, child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    assert "resumed at iteration 6" in wait_for(process, "iter     10/12")
    kill(process)
    time.sleep(1)
    result = run(*TORCHRUN, "cps.py", *SHORT, "--resume", killed)
    assert "resumed at iteration 9" in result.stdout
    assert result.stdout.count("miou_last=") == 1
    assert same(weights(whole), weights(killed))
    assert len(last(whole)["rng"]) == 2
    result = here("cps.py", "--resume", whole, expect=2)
    assert "was started with 2 processes, not 1" in result.stderr


def test_sigterm_to_torchrun_with_loader_workers_saves(tmp_path):
    flags = ("--max-iters", "5000", "--log-interval", "2", "-b", "2", "-j", "1", "--device", "cpu")
    process = start(*TORCHRUN, "supervised.py", *flags, "--output-dir", tmp_path / "run")
    wait_for(process, "iter     10/5000")
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    process.wait()
    assert "stopped: SIGTERM" in rest
    assert last(tmp_path / "run")["iteration"] >= 10


@pytest.mark.slow
def test_two_processes_share_the_labelling_of_st(tmp_path):
    """Every image is labelled once, and a run that is killed while it trains goes on exactly."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = (
        "--max-iters", "6", "--retrain-times", "1", "--eval-iters", "6", "--log-interval", "1",
        "--save-interval", "2", "-b", "2", "--no-tta", "--device", "cpu",
    )  # fmt: skip
    run(*TORCHRUN, "stpp.py", *flags, "--output-dir", whole)
    names = [path.stem for path in (whole / "pseudo_masks").glob("*/*.png")]
    assert len(names) == len(set(names)) == 224
    process = start(*TORCHRUN, "stpp.py", *flags, "--output-dir", killed)
    wait_for(process, "stage 2 of 3")
    wait_for(process, "iter      4/6")
    kill(process)
    run(*TORCHRUN, "stpp.py", "--resume", killed)
    assert same(weights(whole), weights(killed))
