"""The scripts as a user runs them: trained, killed, resumed, stopped, evaluated, misused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, damage, run, write_mask, write_picture
from PIL import ExifTags, Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cps
from common import InputError, figures, predict, runtime
from common.data import StreamSampler

SHORT = ("--max-iters", "12", "--eval-iters", "6", "--log-interval", "2", "--save-interval", "3", "-b", "2", "--device", "cpu")
ON_FILES = ("--backbone", "tiny", "--weights", "none", "-b", "2", "--crop-size", "32", "--max-iters", "2", "-j", "1")
LAST_LINE = re.compile(r"^miou_last=\d+\.\d\d miou_best=\d+\.\d\d$")


def weights(run_folder: Path) -> dict:
    return torch.load(run_folder / "last.pt", weights_only=True)["networks"]


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(value, second[name][key]) for name in first for key, value in first[name].items())


def start(*command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-u", *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Read the output up to a line that holds `text`."""
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"ended without {text!r}:\n{seen}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """An uninterrupted short CPS run."""
    folder = tmp_path_factory.mktemp("runs") / "cps"
    result = run("cps.py", *SHORT, "--output-dir", folder)
    (folder / "stdout.txt").write_text(result.stdout)
    return folder


def test_a_run_leaves_what_is_promised(finished):
    out = (finished / "stdout.txt").read_text()
    assert LAST_LINE.match(out.splitlines()[-1])
    for text in ("1 in 8 of 128 sorted names: 16 labelled, 112 unlabelled", "network 2", "average", "triangle", "figures"):
        assert text in out
    left = {path.name for path in finished.iterdir()}
    assert left >= {"args.json", "log.txt", "metrics.csv", "last.pt", "best.pt", "figures"}
    assert any(name.startswith("events.out.tfevents") for name in left)
    for name in ("curves.png", "predictions.png"):
        assert Image.open(finished / "figures" / name).width > 500
    described = json.loads((finished / "args.json").read_text())
    assert described["versions"]["torch"] == torch.__version__ and len(described["labelled_list_sha1"]) == 40
    assert set(torch.load(finished / "best.pt", weights_only=True)) == {"schema", "iteration", "args", "networks"}


def test_metrics_have_one_row_a_log_line_and_evaluation(finished):
    rows = [line.split(",") for line in (finished / "metrics.csv").read_text().splitlines()]
    columns = dict(zip(rows[0], zip(*rows[1:])))
    assert columns["iteration"] == ("2", "4", "6", "6", "8", "10", "12", "12")
    assert [cell != "" for cell in columns["miou"]] == [False, False, False, True, False, False, False, True]
    total = [float(a) + float(b) for a, b in zip(columns["loss_sup"], columns["loss_unsup"]) if a]
    assert total == pytest.approx([float(cell) for cell in columns["loss"] if cell], rel=1e-4)


@pytest.mark.parametrize(
    "command", ["cps.py", "supervised.py", "mean_teacher.py", "mean_teacher.py --cutmix"], ids=lambda command: command
)
def test_killed_and_resumed_ends_with_the_same_weights(command: str, finished, tmp_path):
    script, *flags = command.split()
    if script != "cps.py":
        finished = tmp_path / "whole"
        run(script, *flags, *SHORT, "--output-dir", finished)
    process = start(script, *flags, *SHORT, "--output-dir", tmp_path / "killed")
    wait_for(process, "iter      8/12")
    process.kill()
    process.wait()
    assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["iteration"] == 6
    with open(tmp_path / "killed" / "metrics.csv", "a") as file:
        file.write("1")  # half a row
    result = run(script, "--resume", tmp_path / "killed")
    assert "resumed at iteration 6" in result.stdout
    assert same(weights(finished), weights(tmp_path / "killed"))
    names = ("iteration", "loss", "miou")
    tables = []
    for folder in (finished, tmp_path / "killed"):
        rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
        tables.append([[row[rows[0].index(name)] for name in names] for row in rows])
    assert tables[0] == tables[1]
    assert shown(finished) == shown(tmp_path / "killed")


def shown(run_folder: Path) -> list[tuple[str, int, float]]:
    """What TensorBoard finds in a run's folder; learning rates are rounded alike in both."""
    events = EventAccumulator(str(run_folder), purge_orphaned_data=False).Reload()
    tags = events.Tags()["scalars"]
    return sorted((tag, event.step, round(event.value, 5)) for tag in tags for event in events.Scalars(tag))


def test_workers_do_not_change_the_result(finished, tmp_path):
    run("cps.py", *SHORT, "-j", "2", "--output-dir", tmp_path / "workers")
    assert same(weights(finished), weights(tmp_path / "workers"))


@pytest.mark.parametrize(("number", "code", "flags"), [(signal.SIGTERM, 0, ("--debug",)), (signal.SIGINT, 130, ())])
def test_signals_save_and_the_run_goes_on(number: int, code: int, flags: tuple, finished, tmp_path):
    process = start("cps.py", *SHORT, "-j", "1", *flags, "--output-dir", tmp_path / "run")
    wait_for(process, "iter      4/12")
    os.killpg(process.pid, number)  # the group: loader workers get it too, as from a terminal or a scheduler
    rest = process.stdout.read()
    assert process.wait() == code, rest
    assert "Traceback" not in rest and f"--resume {tmp_path / 'run'}" in rest
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["iteration"] >= 4
    run("cps.py", "--resume", tmp_path / "run")
    assert same(weights(finished), weights(tmp_path / "run"))


def test_a_run_folder_is_never_overwritten(finished):
    before = (finished / "last.pt").read_bytes()
    result = run("cps.py", *SHORT, "--output-dir", finished, expect=2)
    assert "holds a run already" in result.stderr and len(result.stderr.splitlines()) == 1
    assert (finished / "last.pt").read_bytes() == before


def test_two_processes_cannot_write_one_run(tmp_path):
    process = start("supervised.py", "--max-iters", "100000", "--log-interval", "2", "--output-dir", tmp_path / "run")
    wait_for(process, "iter ")
    result = run("supervised.py", "--resume", tmp_path / "run", expect=2)
    assert "another process is writing" in result.stderr
    process.kill()
    process.wait()


def test_resume_refuses_other_settings_and_takes_missing_ones(finished):
    result = run("cps.py", "--resume", finished, "--lr", "0.5", expect=2)
    assert "lr=0.1" in result.stderr
    again = run("cps.py", "--resume", finished)
    assert "resumed at iteration 12" in again.stdout and LAST_LINE.match(again.stdout.splitlines()[-1])


def test_a_run_that_died_before_its_first_checkpoint_starts_again(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "young")
    (tmp_path / "young" / "last.pt").unlink()
    result = run("cps.py", "--resume", tmp_path / "young")
    assert "no checkpoint in the run folder yet" in result.stdout
    assert same(weights(finished), weights(tmp_path / "young"))


def test_a_run_is_resumed_with_its_own_script_pictures_and_folder(finished, own_folder, tmp_path):
    result = run("supervised.py", "--resume", finished, expect=2)
    assert "is a run of cps; use its script" in result.stderr
    result = run("cps.py", "--resume", finished / "best.pt", expect=2)
    assert "give the run's folder" in result.stderr
    result = run("cps.py", "--resume", finished, "--output-dir", tmp_path / "other", expect=2)
    assert "leave --output-dir out" in result.stderr
    (tmp_path / "list.txt").write_text("labelled0\nlabelled1\n")
    command = (
        "supervised.py",
        *ON_FILES,
        "--data",
        "folder",
        "--data-dir",
        own_folder,
        "--labelled-list",
        tmp_path / "list.txt",
    )
    run(*command, "--output-dir", tmp_path / "run")
    (tmp_path / "list.txt").write_text("labelled2\nlabelled3\n")
    result = run("supervised.py", "--resume", tmp_path / "run", expect=2)
    assert "was started with other images" in result.stderr
    (tmp_path / "list.txt").write_text("labelled0\nlabelled1\n")
    run(*command, "--resume", tmp_path / "run")  # the very command goes on
    write_picture(own_folder / "images" / "unlabelled" / "another.jpg")
    result = run("supervised.py", "--resume", tmp_path / "run", expect=2)
    assert "1 unlabelled images are new, such as another" in result.stderr


def test_a_run_that_failed_at_its_start_does_not_occupy_its_folder(tmp_path):
    result = run("cps.py", *SHORT, "--split", "all", "--output-dir", tmp_path / "run", expect=2)
    assert "use supervised.py" in result.stderr
    run("cps.py", *SHORT, "--split", "1/8", "--output-dir", tmp_path / "run")


def test_eval_only_repeats_the_table_and_changes_nothing(finished):
    before = (finished / "metrics.csv").read_text()
    result = run("cps.py", "--eval-only", "--resume", finished)
    table = (finished / "stdout.txt").read_text().split("IoU %")[1].split("figures")[0]
    assert result.stdout.split("IoU %")[1].split("figures")[0] == table
    assert (finished / "metrics.csv").read_text() == before


def test_predict_writes_masks_and_overlays_of_the_pictures_size(finished, tmp_path, capsys):
    write_picture(tmp_path / "pictures" / "one.jpg", (90, 70))
    write_picture(tmp_path / "pictures" / "deep" / "two.v1.png", (64, 64))
    write_picture(tmp_path / "pictures" / "._one.jpg")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(tmp_path / "pictures" / "one.jpg").save(tmp_path / "pictures" / "turned.jpg", exif=exif)
    out = tmp_path / "pictures" / "out"
    for _ in range(2):  # the second time the overlays of the first are no images to predict
        predict.main([str(finished), str(tmp_path / "pictures"), "--output", str(out)])
        assert "3 pictures predicted" in capsys.readouterr().out
    mask = Image.open(out / "masks" / "one.png")
    assert mask.mode == "P" and mask.size == (90, 70) and np.asarray(mask).max() < 6
    assert mask.getpalette()[3:6] == [220, 60, 60]
    assert Image.open(out / "overlays" / "one.png").size == (90, 70)
    assert Image.open(out / "masks" / "turned.png").size == (70, 90)
    assert Image.open(out / "overlays" / "deep" / "two.v1.png").size == (64, 64)
    shutil.rmtree(out)
    damage(tmp_path / "pictures" / "bad.png")
    with pytest.raises(InputError, match=r"1 could not be predicted: .*bad\.png: cannot be decoded"):
        predict.main([str(finished), str(tmp_path / "pictures"), "--output", str(tmp_path / "again")])
    assert len(list((tmp_path / "again" / "masks").rglob("*.png"))) == 3


def test_predict_names_an_image_too_large_for_the_memory_and_goes_on(finished, tmp_path, capsys, monkeypatch):
    def too_large(network, images, *_):
        if images.shape[-1] == 90:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return images[:, 0].byte() % 6

    write_picture(tmp_path / "one.jpg", (90, 70))
    write_picture(tmp_path / "two.jpg", (64, 64))
    monkeypatch.setattr(predict, "predict", too_large)
    with pytest.raises(InputError, match=r"1 could not be predicted: .*one\.jpg: too large for this machine's memory"):
        predict.main([str(finished), str(tmp_path), "--output", str(tmp_path / "out")])
    assert "1 pictures predicted" in capsys.readouterr().out


def test_predict_errors(finished, tmp_path):
    for arguments, message in (
        ((tmp_path, tmp_path), "no run in"),
        ((finished, tmp_path / "nowhere"), "no file or folder"),
        ((finished, tmp_path), "no .png, .jpg or .jpeg"),
        ((finished, ROOT, "--network", "teacher"), "not 'teacher'"),
        ((finished, ROOT, "--device", "toaster"), "--device toaster"),
    ):
        result = run("-m", "common.predict", *arguments, expect=2)
        assert message in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_comparison_draws_on_the_device_of_its_runs(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # but the run took --device cpu
    figures.side_by_side({"CPS": finished}, tmp_path / "page.png", count=1)
    assert Image.open(tmp_path / "page.png").width > 300


def test_a_run_without_triton_predicts_without_it(finished, tmp_path, monkeypatch):
    """A machine without a C compiler trains with --kernels torch."""
    shutil.copytree(finished, tmp_path / "run")
    description = json.loads((tmp_path / "run" / "args.json").read_text())
    description["args"]["kernels"] = "torch"
    (tmp_path / "run" / "args.json").write_text(json.dumps(description))
    write_picture(tmp_path / "one.jpg")
    given = []
    monkeypatch.setattr(
        predict, "predict", lambda *arguments: given.append(arguments) or torch.zeros(1, 48, 64, dtype=torch.uint8)
    )
    predict.main([str(tmp_path / "run"), str(tmp_path / "one.jpg"), "--device", "cpu"])
    assert given[0][-1] == "torch"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--split", "3/4"), "--split 3/4"),
        (("--data", "voc", "--data-dir", "nowhere"), "no folder nowhere"),
        (("--data", "folder"), "needs --data-dir"),
        (("--backbone", "resnet18", "--weights", "nowhere.pt"), "no such file"),
        (("--weights", "imagenet"), "tiny has no pretrained weights"),
        (("--crop-size", "8"), "at least 32"),
        (("--scale", "huge"), "--scale huge"),
        (("-b", "1"), "at least 2 pictures"),
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
        (("--crop-size", "200"), "more than twice the pictures' longest side, 64"),
        (("--eval-only",), "--eval-only needs --resume RUN"),
    ],
)
def test_bad_flags_end_with_one_clear_line(flags: tuple, message: str, tmp_path, capsys, monkeypatch):
    """In this process: starting one takes seconds."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    output = () if "--output-dir" in flags or "--resume" in flags else ("--output-dir", str(tmp_path / "run"))
    with pytest.raises(SystemExit) as end:
        runtime.launch(cps.main, cps.parse_args([*SHORT, *output, *flags]))
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_a_bad_mask_is_named_before_training(own_folder, tmp_path):
    write_mask(own_folder / "masks/labelled/labelled1.png", 3, extra=(77,))
    result = run(
        "supervised.py", "--data", "folder", "--data-dir", own_folder, "--backbone", "tiny", "--weights", "none", *SHORT,
        "--crop-size", "32", "--output-dir", tmp_path / "out", expect=2,
    )  # fmt: skip
    assert re.search(r"labelled1\.png: labels 77 in the mask; 0 to 2 and 255", result.stderr.splitlines()[-1])


@pytest.mark.parametrize("flags", [(), ("--debug",)])
def test_an_error_ends_the_workers_of_all_loaders(own_folder, tmp_path, flags: tuple):
    """Found hanging once: after its message the script waited forever for workers that ignore SIGTERM."""
    for path in (own_folder / "images" / "unlabelled").iterdir():
        damage(path)
    result = run(
        "cps.py", "--data", "folder", "--data-dir", own_folder, "--backbone", "tiny", "--weights", "none", *SHORT,
        "--crop-size", "32", "-j", "2", "--output-dir", tmp_path / "out", *flags, expect=1 if flags else 2,
    )  # fmt: skip
    assert re.search(r"unlabelled\d\.jpg: cannot be decoded", result.stderr)


def test_a_run_outlives_a_broken_image_that_is_taken_away(own_folder, tmp_path):
    """Found costly once: it ended without a checkpoint, and without the image --resume refused."""
    first_batch = {key.index for key in next(iter(StreamSampler(6, 2, seed=0, stream=1, start=0, stop=1)))}
    name = f"unlabelled{min(set(range(6)) - first_batch)}"
    broken = own_folder / "images" / "unlabelled" / f"{name}.jpg"
    flags = ("--backbone", "tiny", "--weights", "none", *SHORT, "--crop-size", "32", "-j", "0", "--save-interval", "1000",
             "--eval-iters", "1000")  # fmt: skip
    command = ("cps.py", "--no-cutmix", "--data", "folder", "--data-dir", own_folder, *flags, "--output-dir", tmp_path / "run")
    damage(broken)  # its pixels: nothing shows before its turn comes
    result = run(*command, expect=2)
    at = re.search(name + r"\.jpg: .*; saved at iteration (\d+): repair or remove the file, then go on with", result.stderr)
    assert at and torch.load(tmp_path / "run" / "last.pt", weights_only=True)["iteration"] == int(at[1]) > 0
    broken.unlink()
    result = run("cps.py", "--resume", tmp_path / "run")
    assert f"resumed at iteration {at[1]}" in result.stdout
    assert f"1 of 6 unlabelled images are gone since the start ({name})" in result.stdout
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["iteration"] == 12


def test_a_killed_loader_worker_ends_the_run_after_a_checkpoint(own_folder, tmp_path):
    flags = ("--backbone", "tiny", "--weights", "none", "-b", "2", "--crop-size", "32", "-j", "1", "--log-interval", "1",
             "--max-iters", "100000", "--device", "cpu")  # fmt: skip
    process = start("supervised.py", "--data", "folder", "--data-dir", own_folder, *flags, "--output-dir", tmp_path / "run")
    wait_for(process, "iter      5/")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output = process.stdout.read()
    assert process.wait() == 1 and "Traceback" not in output
    assert re.search(r"supervised.py: stopped: DataLoader worker .*fewer workers \(-j\).*--resume", output.splitlines()[-1])
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["iteration"] >= 5


def test_a_loss_that_is_not_finite_stops_with_the_checkpoint_untouched(tmp_path):
    result = run("supervised.py", *SHORT, "--lr", "1e30", "--output-dir", tmp_path / "run", expect=1)
    assert re.search(r"the loss is (nan|inf) at iteration \d+; its pictures: shape\d+", result.stderr)
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(("data", "split"), [("camvid", "1/4"), ("cityscapes", "1/16"), ("folder", "1/2")])
def test_cps_trains_on_every_data_set(data: str, split: str, request, tmp_path):
    fixture = {"camvid": "camvid_tree", "cityscapes": "cityscapes_tree", "folder": "own_folder"}[data]
    result = run("cps.py", *ON_FILES, "--data", data, "--data-dir", request.getfixturevalue(fixture), "--split", split,
                 "--output-dir", tmp_path / "out")  # fmt: skip
    assert LAST_LINE.match(result.stdout.splitlines()[-1])


def test_cps_trains_on_voc(voc_tree, tmp_path, capsys, monkeypatch):
    """In this process, where the fixture has cut the lists down."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    cps.main(cps.parse_args([*ON_FILES, "--data", "voc", "--data-dir", str(voc_tree), "--output-dir", str(tmp_path / "out")]))
    out = capsys.readouterr().out
    assert "4 labelled, 6 unlabelled" in out and "tvmonitor" in out and LAST_LINE.match(out.splitlines()[-1])


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def finished_by_two(tmp_path_factory) -> Path:
    """An uninterrupted short CPS run of two processes."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    run(*TORCHRUN, "cps.py", *SHORT, "--output-dir", folder)
    return folder


def test_two_processes_under_torchrun_train_save_and_resume(finished_by_two, tmp_path):
    process = start(*TORCHRUN, "cps.py", *SHORT, "--output-dir", tmp_path / "killed")
    wait_for(process, "iter      8/12")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)
    result = run(*TORCHRUN, "cps.py", *SHORT, "--resume", tmp_path / "killed")
    assert result.stdout.count("miou_last=") == 1
    assert same(weights(finished_by_two), weights(tmp_path / "killed"))
    assert len(torch.load(finished_by_two / "last.pt", weights_only=True)["rng"]) == 2
    result = run("cps.py", "--resume", finished_by_two, expect=2)
    assert "was started with 2 processes, not 1" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for torchrun's processes")
def test_torchrun_goes_on_when_one_process_is_killed(finished_by_two, tmp_path):
    """The new processes may not call the address that the dead one has left in torchrun's store."""
    command = (*TORCHRUN, "--max-restarts", "1", "cps.py", *SHORT)
    process = start(*command, "--output-dir", tmp_path / "run")
    wait_for(process, "iter      8/12")
    *_, last = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(last), signal.SIGKILL)
    rest = process.stdout.read()
    assert process.wait() == 0, rest
    assert "resumed at iteration 6" in rest
    assert same(weights(finished_by_two), weights(tmp_path / "run"))


def test_sigterm_to_torchrun_with_loader_workers_saves(tmp_path):
    process = start(*TORCHRUN, "supervised.py", "--max-iters", "5000", "--log-interval", "2", "-b", "2", "-j", "1",
                    "--device", "cpu", "--output-dir", tmp_path / "run")  # fmt: skip
    wait_for(process, "iter     10/5000")
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    process.wait()
    assert "stopped: SIGTERM" in rest
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["iteration"] >= 10


def test_two_processes_share_the_labelling_of_st(tmp_path):
    """Every picture is labelled once, and a run that is killed while it trains on the masks goes on exactly."""
    flags = ("--max-iters", "6", "--eval-iters", "6", "--log-interval", "1", "--save-interval", "2", "-b", "2", "--no-tta",
             "--device", "cpu")  # fmt: skip
    run(*TORCHRUN, "stpp.py", *flags, "--output-dir", tmp_path / "whole")
    masks = sorted(path.parent.name + path.stem for path in (tmp_path / "whole" / "pseudo_masks").glob("*/*.png"))
    assert len(masks) == 112 and len({name[1:] for name in masks}) == 112
    process = start(*TORCHRUN, "stpp.py", *flags, "--output-dir", tmp_path / "killed")
    wait_for(process, "stage 2 of 3")
    wait_for(process, "iter      4/6")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run(*TORCHRUN, "stpp.py", "--resume", tmp_path / "killed")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_a_restart_by_torchrun_resumes_by_itself(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    result = run("cps.py", *SHORT, "--output-dir", tmp_path / "run", TORCHELASTIC_RESTART_COUNT="1")
    assert "resumed at iteration 12" in result.stdout


def test_bfloat16_runs(tmp_path):
    result = run("supervised.py", *SHORT, "--amp", "bf16", "--output-dir", tmp_path / "bf16")
    assert LAST_LINE.match(result.stdout.splitlines()[-1])
