"""What a run leaves behind: progress lines, log.txt, metrics.csv, TensorBoard events, figures, best.pt.

metrics.csv has a row every `--log-interval` iterations (means since the row before) and a row at each evaluation (miou and
what else the script measures); cells that a row does not measure are empty.
"""

import argparse
import csv
import errno
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from common import InputError, checkpoint
from common.cli import Schedule, note
from common.datasets import DataSource
from common.evaluate import Scores
from common.runtime import Runtime

# Columns of metrics.csv that TensorBoard shows as the axis, or not at all.
NOT_ON_BOARD = {"iteration", "epoch", "seconds", "peak_memory_mb"}


class Report:
    """Prints and records a run; on processes other than the first it only keeps count.

    Args:
        args: the settings.
        data: the data set.
        rt: the process.
        schedule: the run's length.
        measures: names of what `iteration` gets besides `loss`.
        evaluations: names of what `evaluation` gets besides `miou`.

    Raises:
        InputError: the run folder is occupied or cannot be written to.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        data: DataSource,
        rt: Runtime,
        schedule: Schedule,
        measures: tuple[str, ...],
        evaluations: tuple[str, ...] = (),
    ):
        self.args, self.data, self.rt, self.schedule = args, data, rt, schedule
        self.folder = Path(args.output_dir)
        self.columns = ["iteration", "epoch", "lr", "loss", *measures, "miou", *evaluations, "seconds", "peak_memory_mb"]
        self.sums: dict[str, Tensor] = {}
        self.counted, self.best, self.seconds, self.clock = 0, -1.0, 0.0, None
        self.bar = self.log = self.board = self.lock = None
        self.remarks: list[str] = []  # said when the run begins
        self.resumed = bool(args.resume)
        if self.resumed:
            self.check_resumed()
        if rt.is_main:
            self.open_folder()

    # --------------------------------------------------------------------------------------------------- the run folder

    def check_resumed(self) -> None:
        """Compare the data with what the run was started with; on all processes alike.

        Unlabelled images may have been taken away meanwhile, such as one that could not be read: the run keeps its
        number of iterations and says so. Anything else would be another run.

        Raises:
            InputError: other labelled or more unlabelled images, or another number of processes.
        """
        needed = ("labelled_list_sha1", "protocol", "processes", "iterations")
        described = checkpoint.read_description(self.folder, *needed)
        other = f"{self.folder} was started with other images ({described['protocol']})"
        if described["labelled_list_sha1"] != self.data.list_hash:
            raise InputError(f"{other}, not {self.data.protocol}")
        before, now = set(read_names(self.folder)), unlabelled_names(self.data)
        added = sorted(set(now) - before)
        if added:
            raise InputError(f"{other}: {len(added)} unlabelled images are new, such as {added[0]}")
        removed = sorted(before - set(now))
        if removed:
            shown = ", ".join(removed[:3]) + (", ..." if len(removed) > 3 else "")
            self.remarks.append(
                f"{len(removed)} of {len(before)} unlabelled images are gone since the start ({shown}): "
                "the others come in another order from here on"
            )
            self.args.max_iters = self.schedule.total = described["iterations"]
        if described["processes"] != self.rt.world and not self.args.eval_only:
            raise InputError(
                f"{self.folder} was started with {described['processes']} processes, not {self.rt.world}"
            )

    def open_folder(self) -> None:
        """Make the run's folder, or take up the one that is resumed, and keep other processes out of it."""
        if not self.resumed and checkpoint.occupied(self.folder):
            raise InputError(
                f"{self.folder} holds a run already; go on with --resume {self.folder}, or choose another --output-dir"
            )
        self.lock = claim(self.folder)
        try:
            if not self.resumed:
                checkpoint.write(unlabelled_names(self.data), self.folder / "unlabelled.txt")
                checkpoint.write(self.description(), self.folder / "args.json")
            self.log = open(self.folder / "log.txt", "a" if self.resumed else "w", buffering=1)
        except OSError as error:
            raise InputError(f"cannot write to the run folder {self.folder}: {error.strerror or error}") from None

    def description(self) -> dict:
        """args.json: the settings and what else a result depends on."""
        here, commit = Path(__file__).parent, None
        if shutil.which("git"):
            command = ["git", "rev-parse", "HEAD"]
            commit = subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip() or None
        return {
            "args": vars(self.args),
            "classes": self.data.classes,
            "colours": self.data.colours,
            "protocol": self.data.protocol,
            "labelled_list_sha1": self.data.list_hash,
            "iterations": self.schedule.total,
            "processes": self.rt.world,
            "git_commit": commit,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "numpy": np.__version__,
            },
            "hardware": torch.cuda.get_device_name() if self.rt.device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
        }

    def begin(self, start: int, networks: dict[str, nn.Module]) -> None:
        """Print what is about to run; drop rows that a resumed run is going to write again."""
        args, data = self.args, self.data
        if not self.rt.is_main:
            return
        sizes = [sum(parameter.numel() for parameter in network.parameters()) / 1e6 for network in networks.values()]
        self.say(f"{args.method} on {data.name}: {data.protocol}, {len(data.val)} for validation, {len(data.classes)} classes")
        self.say(
            f"{sum(size > 0 for size in sizes)} x DeepLabv3+ {args.backbone} ({sizes[0]:.1f} M parameters), "
            f"weights {args.weights}, output stride {args.output_stride}"
        )
        self.say(
            f"{self.schedule}, batch {args.batch_size} x {self.rt.world}, crop {args.crop_size}, lr {args.lr}, "
            f"seed {args.seed}, {self.rt.device}; run folder {self.folder}"
        )
        for line in (line for network in networks.values() for line in getattr(network, "notes", ())):
            self.say(line)
        if args.eval_only:
            return
        rows = [
            row
            for row in self.rows()
            if int(row["iteration"]) <= start and not (row["miou"] and int(row["iteration"]) == start)
        ]
        if args.resume:
            self.say(
                f"resumed at iteration {start}" if start else "no checkpoint in the run folder yet: starting from iteration 0"
            )
        for remark in self.remarks:
            self.say(remark)
        part = self.folder / "metrics.part"  # a run that dies here keeps its history
        with open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        part.replace(self.folder / "metrics.csv")
        self.open_board(rows)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.schedule.total, initial=start, unit="it", dynamic_ncols=True)
        self.clock = time.monotonic()

    def open_board(self, rows: list[dict]) -> None:
        """Begin TensorBoard's events anew from the rows of metrics.csv that stay, each at the time it was measured.

        Going on with the old files would show twice what was measured between the last checkpoint and the end of the
        run before. A TensorBoard that is looking on drops what it has (`purge_step`).
        """
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import: only when a run begins

        for path in self.folder.glob("events.out.tfevents.*"):
            path.unlink()
        self.board = SummaryWriter(str(self.folder), purge_step=0)
        begun = time.time() - self.elapsed()
        for row in rows:
            for name in set(self.columns) - NOT_ON_BOARD:
                if row.get(name):
                    when = begun + float(row["seconds"])
                    self.board.add_scalar(name, float(row[name]), int(row["iteration"]), walltime=when)

    def say(self, text: str = "") -> None:
        """Print a line and keep it in log.txt; only on the first process."""
        if not self.rt.is_main:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)
        self.log.write(text + "\n")

    def rows(self) -> list[dict]:
        """The whole rows of metrics.csv; a run that was killed may have left half of one."""
        path = self.folder / "metrics.csv"
        if not path.is_file():
            return []
        with open(path, newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]

    def state_dict(self) -> dict:
        """What a checkpoint keeps: the running sums, averaged over processes, and the best result. Collective."""
        sums = {name: self.rt.add_up(value) / self.rt.world for name, value in self.sums.items()}
        return {"sums": sums, "counted": self.counted, "best": self.best, "seconds": self.elapsed()}

    def load_state_dict(self, state: dict) -> None:
        self.sums = {name: value.to(self.rt.device) for name, value in state["sums"].items()}
        self.counted, self.best, self.seconds = state["counted"], state["best"], state["seconds"]

    def elapsed(self) -> float:
        """Seconds of this run, those before a resume included."""
        return self.seconds + (time.monotonic() - self.clock if self.clock else 0.0)

    # ------------------------------------------------------------------------------------------------------- recording

    def iteration(self, done: int, measured: dict[str, Tensor], lr: float) -> None:
        """Take the measures of iteration `done` (scalars on the device); print and record their means now and then.

        Nothing waits for the device except at a log line.
        """
        for name, value in measured.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=self.rt.device)) + value.detach()
        self.counted += 1
        if self.bar is not None:
            self.bar.update()
        if done % self.args.log_interval and done != self.schedule.total:
            return
        sums = self.rt.add_up(torch.stack(list(self.sums.values()))) / (self.counted * self.rt.world)
        means = dict(zip(self.sums, sums.tolist()))
        self.sums, self.counted = {}, 0
        if not self.rt.is_main:
            return
        self.record(done, {"lr": lr, **means})
        parts = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        left = self.elapsed() / done * (self.schedule.total - done)
        self.say(f"iter {done:>6}/{self.schedule.total}  {parts}  lr {lr:.5f}  {clock(self.elapsed())} (left {clock(left)})")

    def evaluation(
        self, done: int, result: Scores, networks: dict[str, nn.Module], measured: dict[str, float] | None = None
    ) -> None:
        """Record an evaluation of the result network; write best.pt when it is the best so far."""
        better = result.miou > self.best
        self.best = max(self.best, result.miou)
        if not self.rt.is_main:
            return
        self.record(done, {"miou": result.miou, **(measured or {})})
        more = "".join(f"  {name} {100 * value:.2f}" for name, value in (measured or {}).items())
        self.say(f"eval {done:>6}/{self.schedule.total}  mIoU {100 * result.miou:.2f} (best {100 * self.best:.2f}){more}")
        if better:
            trained = {name: network for name, network in networks.items() if any(True for _ in network.parameters())}
            checkpoint.write(checkpoint.header(done, self.args, trained), self.folder / "best.pt")  # without a memory bank

    def record(self, done: int, values: dict[str, float]) -> None:
        cuda = self.rt.device.type == "cuda"
        peak = round(torch.cuda.max_memory_allocated() / 2**20) if cuda else resident_mb()
        row = {
            "iteration": done,
            "epoch": round(done / self.schedule.per_epoch, 3),
            **values,
            "seconds": round(self.elapsed(), 2),
            "peak_memory_mb": peak,
        }
        with open(self.folder / "metrics.csv", "a", newline="") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)
        for name, value in values.items():
            self.board.add_scalar(name, value, done)

    def finish(self, results: dict[str, Scores], network: nn.Module) -> None:
        """Per-class IoU of every network, the figures, and the last line `miou_last=NN.NN miou_best=NN.NN`.

        Args:
            results: the last evaluation, the result network first.
            network: the result network, for predictions.png.
        """
        from common import figures

        if not self.rt.is_main:
            return
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        width = max(map(len, (*self.data.classes, "mean")))
        self.say("\n" + f"{'IoU %':<{width}}" + "".join(f"{name:>12}" for name in results))
        for index, name in enumerate(self.data.classes):
            self.say(
                f"{name:<{width}}"
                + "".join(f"{100 * result.iou[index].item():>12.2f}" for result in results.values()).replace("nan", "  -")
            )
        self.say(f"{'mean':<{width}}" + "".join(f"{100 * result.miou:>12.2f}" for result in results.values()) + "\n")
        figures.curves(self.rows(), self.folder / "figures" / "curves.png")
        figures.predictions(network, self.data, self.args, self.rt, self.folder / "figures" / "predictions.png")
        drawn = ", ".join(sorted(path.name for path in (self.folder / "figures").glob("*.png")))
        self.say(f"figures in {self.folder / 'figures'}: {drawn}; predict your own pictures with")
        self.say(f"  python -m common.predict {self.folder} FOLDER")
        if self.board is not None:
            self.board.close()
        last = next(iter(results.values())).miou
        self.say(f"miou_last={100 * last:.2f} miou_best={100 * max(self.best, last):.2f}")


def resident_mb() -> float | str:
    """The largest resident memory of this process so far in MiB; empty where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def unlabelled_names(data: DataSource) -> list[str]:
    """Names of the images that a run learns from without true labels, pseudo-labelled ones included, in order."""
    pseudo = [item.name for item in data.labelled if item.pseudo]
    return [item.name for item in data.unlabelled] + pseudo


def read_names(run: Path) -> list[str]:
    """What `unlabelled_names` gave when the run in folder `run` was started."""
    path = run / "unlabelled.txt"
    try:
        return path.read_text().splitlines()
    except (OSError, ValueError):
        raise InputError(f"{path} is missing or damaged; without it the run cannot go on") from None


def claim(folder: Path):
    """Make a run's folder if need be and keep other processes from writing to it.

    Returns:
        An open file: the folder belongs to this process until it is closed, or the process ends however it does. None
        where the system has no locks.

    Raises:
        InputError: another process writes there, the folder cannot be written to, or it holds symbolic links, through
            which writing would leave the folder.
    """
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        links = [path for path, *entries in os.walk(folder) for path in linked(path, entries)]
        if links:
            raise InputError(f"{links[0]} is a symbolic link; a run's folder may not hold any, remove it")
        return lock(folder / ".lock")
    except OSError as error:
        raise InputError(f"cannot write to the run folder {folder}: {error.strerror or error}") from None


def linked(folder: str, entries: list[list[str]]) -> list[str]:
    """The symbolic links among the entries of a folder, as `os.walk` lists them."""
    paths = [os.path.join(folder, name) for names in entries for name in names]
    return [path for path in paths if os.path.islink(path)]


def lock(path: Path):
    """Lock the file `path` for this process, see `claim`.

    The lock is POSIX's: it belongs to the process. One of BSD's kind (flock) would pass on to loader workers, which
    outlive a killed run by some seconds and would keep it from being resumed; and it would refuse the last stage of ST,
    which writes to the folder that the run itself has claimed.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    file = open(path, "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise InputError(
                f"another process is writing to {path.parent}; wait for it, or choose another --output-dir"
            ) from None
        note(f"the file system of {path.parent} has no locks: nothing keeps two processes from writing there")
    return file


def clock(seconds: float) -> str:
    """Seconds as H:MM:SS or M:SS."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
