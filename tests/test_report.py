"""A run's folder and what is printed of its settings."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS

import cps
import supervised
from common import InputError, report


def test_a_killed_run_leaves_no_lock_behind_in_its_loader_workers(tmp_path):
    """Found wrong once: workers inherited the lock, and outlived their parent by seconds."""
    code = (
        "import os, sys, time; from pathlib import Path; from common.report import claim\n"
        "claim(Path(sys.argv[1]))\n"
        "child = os.fork()\n"
        "if child == 0: os.close(1); os.close(2); time.sleep(60); os._exit(0)\n"
        "print(child, flush=True); os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    worker = int(result.stdout)
    try:
        report.claim(tmp_path / "run")
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    report.claim(tmp_path / "run")
    assert "has no locks" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["log.txt", "figures", "pseudo_masks/1/a.part"])
def test_symbolic_links_in_a_run_folder_are_refused(name: str, tmp_path):
    """Writing through them would leave the folder."""
    outside, path = tmp_path / "outside", tmp_path / "run" / name
    outside.write_text("precious")
    path.parent.mkdir(parents=True)
    path.symlink_to(outside if "." in name else tmp_path)
    with pytest.raises(InputError, match=f"{name} is a symbolic link"):
        report.claim(tmp_path / "run")
    assert outside.read_text() == "precious"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_run_prints_every_setting_of_its_preset_once(script):
    told = {"epochs", "max_iters"}  # by the schedule's own text
    for data, preset in script.PRESETS.items():
        args = script.parse_args(["--data", data, "--device", "cpu"])
        names = [name for group in report.settings_by_group(args).values() for name in group]
        assert len(names) == len(set(names)) and set(preset) - told <= set(names)
        text = report.listed(args, names)
        for name in set(preset) - told:
            value = getattr(args, name)
            assert value is None or f"{name} {value}" in text


def test_a_methods_own_settings_have_a_line_of_their_own():
    groups = report.settings_by_group(cps.parse_args([]))
    assert list(groups)[-2:] == ["method", "machine"]
    assert groups["method"] == ["cps_weight", "cutmix", "soft"]
    assert "method" not in report.settings_by_group(supervised.parse_args([]))
