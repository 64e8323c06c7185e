"""The runs of `common.compare`: their folders, how they start and stop, what they end with."""

import argparse
import csv
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from common import InputError, checkpoint, cli
from common.experiments import Variant
from common.tables import Result, Row, minutes

LAST_LINE = re.compile(r"^miou_last=([\d.]+) miou_best=([\d.]+)$")


class Task(NamedTuple):
    """One run of a comparison."""

    variant: Variant
    split: str
    seed: int


class Runs(NamedTuple):
    """The runs of one line of a table, a folder and a result for each seed."""

    variant: Variant
    split: str
    folders: list[Path]
    results: list[Result]

    @property
    def row(self) -> Row:
        """The line of the table."""
        variant = self.variant
        published, source = variant.published_at(self.split)
        return Row(
            variant.label,
            variant.command,
            self.split,
            self.results,
            published,
            source,
            variant.against,
        )


# ---------------------------------------------------------------------------------------- folders


def run_folder(out: Path, task: Task) -> Path:
    """OUT/METHOD/SPLIT-seedN.

    METHOD is the script, its flags and, unless once, how many times as long it trains.
    """
    script, *flags = task.variant.command.split(" ", 1)
    method = script.removesuffix(".py") + "".join(f"_{slug(each)}" for each in flags)
    longer = f"_x{task.variant.times}" if task.variant.times > 1 else ""
    return out / (method + longer) / f"{task.split.replace('/', '-')}-seed{task.seed}"


def slug(flags: str) -> str:
    """Flags as a part of a file's name: `--teachers 1 --xi 1e-6` becomes `teachers-1_xi-1e-6`."""
    name = " ".join(shlex.split(flags)).removeprefix("--")
    return re.sub(r"[^\w.,-]", "-", name.replace(" --", "_"))


def parts(folder: Path) -> list[Path]:
    """A run's folder, and those of the earlier stages of ST and ST++."""
    return [folder, *sorted(folder.glob("stage-*"))]


def is_started(folder: Path) -> bool:
    """Whether a run has begun to write there."""
    return any(map(checkpoint.occupied, parts(folder)))


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_result(folder: Path, seed: int, measure: str = "") -> Result | None:
    """The result of a run, or None if it is not finished.

    Seconds of the stages of ST and ST++ are added up. `measure` is a column of metrics.csv, of
    which the last value is wanted, too.
    """
    log = folder / "log.txt"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    found = LAST_LINE.match(lines[-1]) if lines else None
    if not found:
        return None
    stages = [read_metrics(part) for part in parts(folder)]
    seconds = sum(float(rows[-1]["seconds"]) for rows in stages)
    memory = max(int(row["peak_memory_mb"] or 0) for rows in stages for row in rows)
    rarest = last_value(stages[0], "miou_rarest")
    at_end = last_value(stages[0], measure) if measure else None
    return Result(seed, float(found[1]), float(found[2]), seconds, memory, rarest, at_end)


def last_value(rows: list[dict[str, str]], measure: str) -> float | None:
    """The last value of a column of metrics.csv in percent; None where there is none."""
    values = [float(row[measure]) for row in rows if row.get(measure)]
    return round(100 * values[-1], 2) if values else None


def read_iou(folder: Path) -> dict[str, str]:
    """IoU in percent of each class at the end of a run, as written in iou.csv."""
    with open(folder / "iou.csv", newline="", encoding="utf-8") as file:
        return {row[0]: row[1] for row in list(csv.reader(file))[1:]}


# --------------------------------------------------------------------------------------- settings


def settings(script: str, flags: list[str]) -> argparse.Namespace:
    """What a script makes of its flags; flags that it refuses end this program with its message."""
    return importlib.import_module(script.removesuffix(".py")).parse_args(flags)


def command_line(task: Task, args: argparse.Namespace) -> tuple[str, list[str]]:
    """Script and flags of a run; of a flag that is given twice the last one counts.

    Args:
        task: the run.
        args: `data`, `output`, `rest` (flags for every script), `shared` (settings by name).

    Raises:
        InputError: it trains several times as long as the others, whose length is not given.
    """
    script, *own = shlex.split(task.variant.command)
    shared = {"data": args.data, "split": task.split, "seed": task.seed, **args.shared}
    if task.variant.times > 1:
        if "max_iters" not in shared:
            raise InputError(f"{task.variant.label}: give --max-iters, of which it takes several")
        shared["max_iters"] *= task.variant.times
    shared["output_dir"] = run_folder(args.output, task)
    return script, [
        *args.rest,
        *own,
        *(f"--{key.replace('_', '-')}={value}" for key, value in shared.items()),
    ]


def check_folder(task: Task, args: argparse.Namespace) -> None:
    """Refuse flags that the script refuses, and a folder with another run.

    Raises:
        InputError: the folder holds a run with other settings, or one of an earlier version.
    """
    folder = run_folder(args.output, task)
    script, flags = command_line(task, args)
    wanted = json.loads(json.dumps(vars(settings(script, flags))))
    if not is_started(folder):
        return
    found = checkpoint.read_description(folder)["args"]
    fixed = [key for key in wanted if key in found and key not in cli.FREE_ON_RESUME - {"data_dir"}]
    other = [f"{key}={found[key]}" for key in fixed if found[key] != wanted[key]]
    if other:
        raise InputError(f"{folder} holds a run with {', '.join(other)}; choose another --output")
    if read_result(folder, task.seed) and not (folder / "iou.csv").is_file():
        raise InputError(
            f"{folder} holds a run of an earlier version, without iou.csv; "
            f"python {script} --resume {shlex.quote(str(folder))} --eval-only writes it"
        )


# ---------------------------------------------------------------------------------------- running


class Runner:
    """Runs tasks, `args.jobs` at a time.

    Args:
        args: the command line of `common.compare`.
        measure: a column of metrics.csv that the results are to have.
    """

    def __init__(self, args: argparse.Namespace, measure: str = ""):
        self.args, self.measure = args, measure
        self.processes: list[subprocess.Popen] = []
        self.failure: BaseException | None = None
        self.stopping = threading.Event()
        # Several progress bars would overwrite one another.
        self.environment = os.environ | ({"TQDM_DISABLE": "1"} if args.jobs > 1 else {})

    def run_all(self, tasks: list[Task]) -> list[tuple[Path, Result]]:
        """Folder and result of each task: reused, resumed or started.

        Raises:
            InputError: flags are refused, a folder holds another run, or a run failed. The runs
                that were under way beside it have been stopped, and can be resumed.
        """
        for task in tasks:  # before the first run, rather than after hours
            check_folder(task, self.args)
        pool = ThreadPoolExecutor(self.args.jobs)
        try:
            futures = [
                pool.submit(self.guarded, task, f"{number}/{len(tasks)}")
                for number, task in enumerate(tasks, start=1)
            ]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # after a failure and after Ctrl-C, too
            pool.shutdown(wait=False, cancel_futures=True)
            self.stop()
            pool.shutdown()
        if self.failure:
            raise self.failure
        return [future.result() for future in futures]

    def guarded(self, task: Task, number: str) -> tuple[Path, Result] | None:
        """`run`, unless another one has failed; the first failure is kept."""
        if self.stopping.is_set():
            return None
        try:
            return self.run(task, number)
        except BaseException as error:
            if not self.stopping.is_set():
                self.failure = error
            self.stopping.set()  # before this thread takes the next task
            raise

    def run(self, task: Task, number: str) -> tuple[Path, Result]:
        """One run; `number` is printed before its command.

        Raises:
            InputError: it failed.
        """
        folder = run_folder(self.args.output, task)
        script, flags = command_line(task, self.args)
        what = f"{task.variant.command} --split {task.split} --seed {task.seed}"
        if "max_iters" in self.args.shared:
            what += f" --max-iters {self.args.shared['max_iters'] * task.variant.times}"
        result = read_result(folder, task.seed, self.measure)
        if result is None:
            started = is_started(folder)
            say(f"[{number}] {what}: {'resumed' if started else 'started'}")
            if started:
                own = shlex.split(task.variant.command)[1:]
                flags = [f"--resume={folder}", *self.args.rest, *own]
            code = self.call([*shlex.split(self.args.launcher), script, *flags])
            result = read_result(folder, task.seed, self.measure)
            if code or result is None:
                again = "" if code == 2 else "; start this again to go on"
                raise InputError(f"{what}: exit code {code}, its message is above{again}")
        say(f"[{number}] {what}: {result.last:.2f} in {minutes(result.seconds)}")
        return folder, result

    def call(self, command: list[str]) -> int:
        """Run a command, its output in the run's log.txt alone; returns its exit code."""
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=self.environment)
        self.processes.append(process)
        if self.stopping.is_set():  # `stop` may have come between the two lines above
            process.terminate()
        return process.wait()

    def stop(self) -> None:
        """Start nothing more, and stop what is under way, with time to save.

        A Ctrl-C meanwhile kills it.
        """
        self.stopping.set()
        under_way = [process for process in self.processes if process.poll() is None]
        if under_way:
            print(f"compare: stopping; {len(under_way)} runs save", file=sys.stderr, flush=True)
        try:
            for process in under_way:
                process.terminate()
            for process in under_way:
                process.wait()
        except KeyboardInterrupt:
            for process in under_way:
                process.kill()
            raise


def say(line: str) -> None:
    """Print a line in one piece: several threads do."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
