"""What a run leaves behind: progress lines, log.txt, metrics.csv, TensorBoard events, figures, best.pt.

metrics.csv has a row every `--log-interval` iterations (means since the row before) and a row at each evaluation (miou and
what else the script measures); cells that a row does not measure are empty.
"""

import argparse
import csv
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
from common.cli import Schedule
from common.datasets import DataSource
from common.evaluate import Scores
from common.runtime import Runtime


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
        if rt.is_main:
            self.open_folder()

    # --------------------------------------------------------------------------------------------------- the run folder

    def open_folder(self) -> None:
        resumed = self.args.resume and checkpoint.read_description(self.folder)
        if not resumed and checkpoint.occupied(self.folder):
            raise InputError(
                f"{self.folder} holds a run already; go on with --resume {self.folder}, or choose another --output-dir"
            )
        before = resumed and (resumed["labelled_list_sha1"], resumed["protocol"])
        if resumed and before != (self.data.list_hash, self.data.protocol):
            raise InputError(f"{self.folder} was started with other pictures ({resumed['protocol']}), not {self.data.protocol}")
        if resumed and resumed["processes"] != self.rt.world and not self.args.eval_only:
            raise InputError(f"{self.folder} was started with {resumed['processes']} processes, not {self.rt.world}")
        try:
            (self.folder / "figures").mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.folder / ".lock")
            if not resumed:
                checkpoint.write(self.description(), self.folder / "args.json")
            self.log = open(self.folder / "log.txt", "a" if resumed else "w", buffering=1)
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
        part = self.folder / "metrics.part"  # a run that dies here keeps its history
        with open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        part.replace(self.folder / "metrics.csv")
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import: only when a run begins

        self.board = SummaryWriter(str(self.folder), purge_step=start + 1 if start else None)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.schedule.total, initial=start, unit="it", dynamic_ncols=True)
        self.clock = time.monotonic()

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


def lock(path: Path):
    """Hold an exclusive lock on `path` as long as the returned file is open, so that two processes cannot write one run."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process is writing to {path.parent}; wait for it, or choose another --output-dir") from None
    return file


def clock(seconds: float) -> str:
    """Seconds as H:MM:SS or M:SS."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
