"""What a run leaves behind: progress lines, log.txt, metrics.csv, TensorBoard events, figures.

metrics.csv has a row every `--log-interval` iterations (means since the row before) and a row at
each evaluation (miou and what else the script measures); cells that a row does not measure are
empty.
"""

import argparse
import csv
import errno
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from common import InputError, checkpoint, distributed, note
from common.evaluate import Scores
from common.schedule import Schedule
from common.source import DataSource, Item

# Columns of metrics.csv; between them what a script measures, as it comes.
FIRST_COLUMNS, LAST_COLUMNS = ("iteration", "epoch", "lr"), ("seconds", "peak_memory_mb")
MANY_CLASSES = 6  # with more, the rarer half has a mean of its own
NOT_ON_BOARD = {"iteration", "epoch", *LAST_COLUMNS}  # TensorBoard has axes of its own

# The settings that a run prints when it begins; those in neither list are the method's own.
SETTINGS = {
    "data": ("data_dir", "long_side", "crop_size", "scale"),
    "network": ("backbone", "weights", "output_stride", "dropout"),
    "schedule": ("batch_size", "eval_interval", "eval_iters", "eval_window"),
    "optimisation": ("lr", "head_lr_mult", "weight_decay", "decay_norm", "ohem"),
    "machine": ("device", "amp", "compile", "kernels", "workers", "seed", "deterministic"),
}
NOT_SHOWN = {
    "method", "data", "split", "labelled_list", "val_fraction", "extra", "extra_count",
    "reasons",  # lines of their own tell them
    "epochs", "max_iters",  # the schedule's own text tells
    "download", "measure_pseudo_labels", "output_dir", "run", "stage", "resume", "eval_only",
    "log_interval", "save_interval", "debug", "views",
}  # fmt: skip


class Report:
    """Prints and records a run; on processes other than the first it only keeps count.

    Args:
        args: the settings.
        data: the data set.
        device: where the measures are.
        schedule: the run's length.

    Raises:
        InputError: the run folder is occupied or cannot be written to.
    """

    def __init__(
        self, args: argparse.Namespace, data: DataSource, device: torch.device, schedule: Schedule
    ):
        self.args, self.data, self.device, self.schedule = args, data, device, schedule
        self.folder = Path(args.output_dir)
        self.columns = [*FIRST_COLUMNS, *LAST_COLUMNS]
        self.sums: dict[str, Tensor] = {}
        self.counted, self.best, self.seconds, self.clock = 0, -1.0, 0.0, None
        self.bar = self.log = self.board = None
        self.remarks: list[str] = []  # said when the run begins
        self.resumed = bool(args.resume)
        if self.resumed:
            self.check_resumed()
        if distributed.is_main():
            self.open_folder()

    # ------------------------------------------------------------------------------- the run folder

    def check_resumed(self) -> None:
        """Compare the data with what the run was started with; on all processes alike.

        Unlabelled images may have been taken away meanwhile, such as one that could not be read:
        the run keeps its number of iterations, and the length of its epochs, and says so. Anything
        else would be another run.

        Raises:
            InputError: other labelled or more unlabelled images, or another number of processes.
        """
        needed = ("labelled_list_sha1", "protocol", "processes", "iterations")
        described = checkpoint.read_description(self.folder, *needed)
        other = f"{self.folder} was started with other images ({described['protocol']})"
        if described["labelled_list_sha1"] != self.data.list_hash:
            raise InputError(f"{other}, not {self.data.protocol}")
        if described.get("val_list_sha1", self.data.val_hash) != self.data.val_hash:
            raise InputError(f"{self.folder} was started with other images for validation")
        before, now = set(read_names(self.folder)), unlabelled_names(self.data)
        added = sorted(set(now) - before)
        if added:
            raise InputError(f"{other}: {len(added)} unlabelled images are new, such as {added[0]}")
        per_epoch = described.get("iterations_per_epoch", self.schedule.per_epoch)
        self.schedule.restore(described["iterations"], per_epoch)
        removed = sorted(before - set(now))
        if removed:
            shown = ", ".join(removed[:3]) + (", ..." if len(removed) > 3 else "")
            self.remarks.append(
                f"{len(removed)} of {len(before)} unlabelled images are gone since the start "
                f"({shown}): the others come in another order from here on"
            )
        started, now = described["processes"], distributed.world_size()
        if started != now and not self.args.eval_only:
            raise InputError(f"{self.folder} was started with {started} processes, not {now}")

    def open_folder(self) -> None:
        """Make the run's folder, or take up the one that is resumed; keep other processes out."""
        if not self.resumed and checkpoint.occupied(self.folder):
            raise InputError(
                f"{self.folder} holds a run already; "
                f"go on with --resume {shlex.quote(str(self.folder))}, "
                "or choose another --output-dir"
            )
        claim(self.folder)
        try:
            if not self.resumed:
                checkpoint.write(unlabelled_names(self.data), self.folder / "unlabelled.txt")
                for part, items in (("labelled", self.data.labelled), ("val", self.data.val)):
                    names = [item.name for item in items]
                    checkpoint.write(names, self.folder / f"{part}.txt")
                known = files_of((*self.data.labelled, *self.data.val))
                checkpoint.write(known, self.folder / "files_with_masks.txt")
                checkpoint.write(self.description(), self.folder / "args.json")
            mode = "a" if self.resumed else "w"
            self.log = open(self.folder / "log.txt", mode, buffering=1, encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"cannot write to the run folder {self.folder}: {error.strerror or error}"
            ) from None

    def description(self) -> dict:
        """args.json: the settings and what else a result depends on."""
        here, commit = Path(__file__).parent, None
        if shutil.which("git"):
            command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
            commit = (
                subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip()
                or None
            )
        return {
            "args": vars(self.args),
            "classes": self.data.classes,
            "colours": self.data.colours,
            "protocol": self.data.protocol,
            "labelled_list_sha1": self.data.list_hash,
            "val_list_sha1": self.data.val_hash,
            "grey_range": self.data.grey_range,
            "iterations": self.schedule.total,
            "iterations_per_epoch": self.schedule.per_epoch,
            "processes": distributed.world_size(),
            "git_commit": commit,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "numpy": np.__version__,
            },
            "hardware": torch.cuda.get_device_name()
            if self.device.type == "cuda"
            else platform.machine(),
            "threads": torch.get_num_threads(),
        }

    def begin(self, start: int, networks: dict[str, nn.Module]) -> None:
        """Print what is about to run; drop rows that a resumed run is going to write again."""
        if not distributed.is_main():
            return
        self.say_settings(networks)
        if self.args.eval_only:
            return
        if self.args.resume and start:
            self.say(f"resumed at iteration {start}")
        elif self.args.resume:
            self.say("no checkpoint in the run folder yet: starting from iteration 0")
        for remark in self.remarks:
            self.say(remark)
        self.write_rows([row for row in self.rows() if self.stays(row, start)])
        self.open_board()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.schedule.total, initial=start, unit="it", dynamic_ncols=True)
        self.clock = time.monotonic()

    def say_settings(self, networks: dict[str, nn.Module]) -> None:
        """Print what is trained on what, and all settings, a line a group."""
        args, data = self.args, self.data
        self.say(
            f"{args.method} on {data.name}: {data.protocol}, {len(data.val)} for validation, "
            f"{len(data.classes)} classes"
        )
        for reason in getattr(args, "reasons", ()):
            self.say(f"chosen: {reason}")
        # The mean of several networks counts as these.
        every = [part for net in networks.values() for part in getattr(net, "members", [net])]
        millions = sum(parameter.numel() for parameter in every[0].parameters()) / 1e6
        more = {
            "network": f"{len(every)} x DeepLabv3+ ({millions:.1f} M parameters)",
            "schedule": f"{self.schedule}, processes {distributed.world_size()}",
        }
        for group, names in settings_by_group(args).items():
            begin = f"{group}: {more[group]}, " if group in more else f"{group}: "
            self.say(begin + listed(args, names))
        self.say(f"run folder: {self.folder}")

    @staticmethod
    def stays(row: dict, start: int) -> bool:
        """Whether a row of metrics.csv stays when the run goes on at `start`.

        The evaluation at `start` is repeated, and its row written again.
        """
        iteration = int(row["iteration"])
        return iteration < start or (iteration == start and not row.get("miou"))

    def open_board(self) -> None:
        """Begin TensorBoard's events anew from metrics.csv, each row at the time it was measured.

        Going on with the old files would show twice what was measured between the last checkpoint
        and the end of the run before. A TensorBoard that is looking on drops what it has
        (`purge_step`).
        """
        from torch.utils.tensorboard import (
            SummaryWriter,
        )  # takes seconds to import: only when a run begins

        for path in self.folder.glob("events.out.tfevents.*"):
            path.unlink()
        self.board = SummaryWriter(str(self.folder), purge_step=0)
        begun = time.time() - self.elapsed()
        for row in self.rows():
            for name in set(row) - NOT_ON_BOARD:
                if row[name]:
                    when = begun + float(row["seconds"])
                    self.board.add_scalar(
                        name, float(row[name]), int(row["iteration"]), walltime=when
                    )

    def say(self, text: str = "") -> None:
        """Print a line and keep it in log.txt; only on the first process."""
        if not distributed.is_main():
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
        with open(path, newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]

    def write_rows(self, rows: list[dict]) -> None:
        """Write metrics.csv anew: a run that dies meanwhile keeps its history."""
        self.columns = list(rows[0]) if rows else self.columns
        part = self.folder / "metrics.part"
        with open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        part.replace(self.folder / "metrics.csv")

    def add_columns(self, names: list[str]) -> None:
        """Give metrics.csv the columns `names`, before the last ones, where it lacks them."""
        new = [name for name in names if name not in self.columns]
        if new:
            rows = self.rows()
            middle = [*self.columns[: -len(LAST_COLUMNS)], *new]
            self.columns = [*middle, *LAST_COLUMNS]
            self.write_rows([{name: row.get(name, "") for name in self.columns} for row in rows])

    def state_dict(self) -> dict:
        """What a checkpoint keeps: the running sums, averaged over processes, and the best result.

        Collective.
        """
        world = distributed.world_size()
        sums = {name: distributed.add_up(value) / world for name, value in self.sums.items()}
        return {"sums": sums, "counted": self.counted, "best": self.best, "seconds": self.elapsed()}

    def load_state_dict(self, state: dict) -> None:
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.counted, self.best, self.seconds = state["counted"], state["best"], state["seconds"]

    def elapsed(self) -> float:
        """Seconds of this run, those before a resume included."""
        return self.seconds + (time.monotonic() - self.clock if self.clock else 0.0)

    # ------------------------------------------------------------------------------------ recording

    def iteration(self, done: int, measured: dict[str, Tensor], lr: float) -> None:
        """Take the measures of iteration `done`, scalars on the device.

        Now and then print their means; nothing waits for the device except then.
        """
        for name, value in measured.items():
            before = self.sums.get(name, torch.zeros((), device=self.device))
            self.sums[name] = before + value.detach()
        self.counted += 1
        if self.bar is not None:
            self.bar.update()
        if done % self.args.log_interval and done != self.schedule.total:
            return
        means = self.means()
        if not distributed.is_main():
            return
        self.record(done, {"lr": lr, **means})
        total = self.schedule.total
        parts = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        left = self.elapsed() / done * (total - done)
        times = f"{clock(self.elapsed())} (left {clock(left)})"
        self.say(f"iter {done:>6}/{total}  {parts}  lr {lr:.5f}  {times}")

    def means(self) -> dict[str, float]:
        """Means of all measures over iterations and processes since the last call; collective."""
        sums = distributed.add_up(torch.stack(list(self.sums.values())))
        means = sums / (self.counted * distributed.world_size())
        found = dict(zip(self.sums, means.tolist()))
        self.sums, self.counted = {}, 0
        return found

    def evaluation(self, done: int, scores: Scores, measured: dict[str, float]) -> bool:
        """Record an evaluation: the result's mIoU and further measures, fractions all of them.

        Where there are many classes, the mean over the rarer half is among them.

        Returns:
            Whether it is the best so far.
        """
        miou = scores.miou
        if len(scores.iou) > MANY_CLASSES:
            measured = {"miou_rarest": scores.miou_of_rarest(len(scores.iou) // 2), **measured}
        better = miou > self.best
        self.best = max(self.best, miou)
        if distributed.is_main():
            self.record(done, {"miou": miou, **measured})
            more = "".join(f"  {name} {100 * value:.2f}" for name, value in measured.items())
            shown = f"mIoU {100 * miou:.2f} (best {100 * self.best:.2f})"
            self.say(f"eval {done:>6}/{self.schedule.total}  {shown}{more}")
        return better

    def record(self, done: int, values: dict[str, float]) -> None:
        """Add a row to metrics.csv and points to TensorBoard."""
        cuda = self.device.type == "cuda"
        row = {
            "iteration": done,
            "epoch": round(done / self.schedule.per_epoch, 3),
            **values,
            "seconds": round(self.elapsed(), 2),
            "peak_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20)
            if cuda
            else resident_mb(),
        }
        self.add_columns(list(values))
        with open(self.folder / "metrics.csv", "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)
        for name, value in values.items():
            self.board.add_scalar(name, value, done)

    def finish(self, results: dict[str, Scores], result: str, network: nn.Module) -> None:
        """Print per-class IoU of every network, draw the figures, and print the last line.

        That is `miou_last=NN.NN miou_best=NN.NN`.

        Args:
            results: the last evaluation, by network.
            result: which of them is the method's result.
            network: that network, for predictions.png.
        """
        from common import figures

        if not distributed.is_main():
            return
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        for line in table(results, self.data.classes):
            self.say(line)
        write_iou(results, result, self.data.classes, self.folder / "iou.csv")
        folder = self.folder / "figures"
        figures.curves(self.rows(), folder / "curves.png")
        figures.predictions(network, self.data, self.args, folder / "predictions.png")
        drawn = ", ".join(sorted(path.name for path in folder.glob("*.png")))
        self.say(f"figures in {folder}: {drawn}; predict your own images with")
        self.say(f"  python -m common.predict {shlex.quote(str(self.folder))} FOLDER")
        if self.board is not None:
            self.board.close()
        last = results[result].miou
        self.say(f"miou_last={100 * last:.2f} miou_best={100 * max(self.best, last):.2f}")


def settings_by_group(args: argparse.Namespace) -> dict[str, list[str]]:
    """Names of the settings to print by group; the method's own come before the machine's."""
    found = {group: [*names] for group, names in SETTINGS.items()}
    shared = NOT_SHOWN.union(*SETTINGS.values())
    own = sorted(set(vars(args)) - shared)
    machine = found.pop("machine")
    return {**found, **({"method": own} if own else {}), "machine": machine}


def listed(args: argparse.Namespace, names: list[str]) -> str:
    """NAME VALUE, NAME VALUE, ... of the settings that have a value."""
    values = {name: getattr(args, name) for name in names}
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def table(results: dict[str, Scores], classes: tuple[str, ...]) -> list[str]:
    """IoU in percent, a class a line and a network a column, between empty lines.

    Beside the mean over all classes stands that of the rarer half, where there are many.
    """
    rarest = len(classes) // 2
    width = max(map(len, (*classes, f"{rarest} rarest")))
    lines = ["", f"{'IoU %':<{width}}" + "".join(f"{name:>12}" for name in results)]
    for index, name in enumerate(classes):
        values = [100 * scores.iou[index].item() for scores in results.values()]
        cells = "".join(f"{value:>12.2f}" for value in values).replace("nan", "  -")
        lines.append(f"{name:<{width}}{cells}")

    means = {"mean": [scores.miou for scores in results.values()]}
    if len(classes) > MANY_CLASSES:
        values = [scores.miou_of_rarest(rarest) for scores in results.values()]
        means[f"{rarest} rarest"] = values
    for name, values in means.items():
        cells = "".join(f"{100 * value:>12.2f}" for value in values)
        lines.append(f"{name:<{width}}{cells}")
    return [*lines, ""]


def write_iou(
    results: dict[str, Scores], result: str, classes: tuple[str, ...], path: Path
) -> None:
    """Write IoU in percent, a class a row and a network a column, the method's result first.

    It is empty for a class that neither labels nor predictions have.
    """
    names = sorted(results, key=lambda name: name != result)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", *names])
        for index, label in enumerate(classes):
            values = [100 * results[name].iou[index].item() for name in names]
            writer.writerow(
                [label, *("" if math.isnan(value) else round(value, 2) for value in values)]
            )


def resident_mb() -> float | str:
    """The largest resident memory of this process so far in MiB.

    Empty where the system does not tell (Windows).
    """
    try:
        import resource
    except ImportError:
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def unlabelled_names(data: DataSource) -> list[str]:
    """Names of the images that a run learns from without true labels, in order."""
    return [item.name for item in data.unlabelled]


def files_of(items: Sequence[Item]) -> list[str]:
    """The image files of items, as absolute paths; drawn images have none."""
    return [str(item.image.resolve()) for item in items if isinstance(item.image, Path)]


def read_names(run: Path) -> list[str]:
    """What `unlabelled_names` gave when the run in folder `run` was started."""
    path = run / "unlabelled.txt"
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        raise InputError(f"{path} is missing or damaged; without it the run cannot go on") from None


_claimed: list = []  # open lock files: a lock goes with its file, at the latest with the process


def claim(folder: Path) -> None:
    """Make a run's folder if need be, and keep other processes from writing to it.

    That holds as long as this process lives.

    Raises:
        InputError: another process writes there, the folder cannot be written to, or it holds
            symbolic links, through which writing would leave the folder.
    """
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        links = [path for path, *entries in os.walk(folder) for path in linked(path, entries)]
        if links:
            raise InputError(
                f"{links[0]} is a symbolic link; a run's folder may not hold any, remove it"
            )
        _claimed.append(lock(folder / ".lock"))
    except OSError as error:
        raise InputError(
            f"cannot write to the run folder {folder}: {error.strerror or error}"
        ) from None


def linked(folder: str, entries: list[list[str]]) -> list[str]:
    """The symbolic links among the entries of a folder, as `os.walk` lists them."""
    paths = [os.path.join(folder, name) for names in entries for name in names]
    return [path for path in paths if os.path.islink(path)]


def lock(path: Path):
    """Lock the file `path` for this process, see `claim`.

    The lock is POSIX's: it belongs to the process. One of BSD's kind (flock) would pass on to
    loader workers, which outlive a killed run by some seconds and would keep it from being resumed;
    and it would refuse the last stage of ST, which writes to the folder that the run itself has
    claimed.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    file = open(path, "w", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise InputError(
                f"another process is writing to {path.parent}; "
                "wait for it, or choose another --output-dir"
            ) from None
        note(
            f"the file system of {path.parent} has no locks: "
            "nothing keeps two processes from writing there"
        )
    return file


def clock(seconds: float) -> str:
    """Seconds as H:MM:SS or M:SS."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
