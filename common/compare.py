"""All methods on one data set, or an experiment of a paper.

    python -m common.compare --data shapes --split 1/8 --seeds 3

Every run is a process of its own with a folder OUT/METHOD/SPLIT-seedN; a finished one is reused, a
stopped one resumed, so that the whole can be stopped and started again. All get the same backbone,
output stride, crop, batch (a process), iterations of each trained network and evaluation window
(ST's re-trainings are --retrain-times as long: twice, on the built-in set); learning rate, decay,
scale and OHEM stay each method's own. What is printed is also left in OUT, in files that are named
by experiment (or methods) and split:

    NAME.csv                every run: mIoU of the last and of the best evaluation; time; memory
    NAME.md                 the table: mean and standard deviation, and each seed
    NAME.png                bars with the standard deviation
    NAME-curve.csv, .png    a measure over the iterations, for the experiments that are about one
    NAME-classes.csv        IoU of each class of every run; their means are in NAME.md, too
    NAME-predictions.png    image by image: input, target, prediction of each method (first seed)

Under the table each method is compared with the first one, seed by seed (`common.tables`, which
makes tables from the csv again).

With --jobs several runs go on at a time, all on the same device; on a CPU give each its share:

    OMP_NUM_THREADS=1 python -m common.compare --jobs 2

Seeds on which settings are chosen should not be those on which they are reported: --first-seed.

Flags after `--` go to every script, here those of another folder and of mixed precision:

    python -m common.compare --data voc -- --data-dir VOCdevkit --amp bf16
"""

import argparse
import csv
import importlib
import json
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from common import InputError, checkpoint, cli, tables
from common.datasets import DATASETS
from common.experiments import EXPERIMENTS, METHODS, Experiment, Variant
from common.tables import Comparison, Result, Row, minutes

# What all methods share: CPS's preset for the data set.
RESNET = {"backbone": "resnet50", "output_stride": 16, "batch_size": 8, "eval_window": 0}
SHAPES = {
    **RESNET,
    "backbone": "tiny",
    "output_stride": 8,
    "crop_size": 64,
    "max_iters": 900,
}
SHARED = {
    "shapes": SHAPES,
    "shapes-zipf": SHAPES,
    "camvid": {**RESNET, "crop_size": 320, "max_iters": 12_000},
    "voc": {**RESNET, "crop_size": 512, "max_iters": 39_000},
    "cityscapes": {**RESNET, "crop_size": 800, "max_iters": 44_500, "eval_window": 800},
    "folder": {"batch_size": 8},  # the rest is chosen from the images, for all methods alike
}
SHARED_FLAGS = (
    "backbone", "output_stride", "crop_size", "batch_size", "max_iters", "eval_window",
)  # fmt: skip
LAST_LINE = re.compile(r"^miou_last=([\d.]+) miou_best=([\d.]+)$")
_under_way: list[subprocess.Popen] = []
_stopping = threading.Event()


class Runs(NamedTuple):
    """The runs of one line of a table, a folder and a result for each seed."""

    variant: Variant
    split: str
    folders: list[Path]
    results: list[Result]

    @property
    def row(self) -> Row:
        """What is told about them."""
        variant = self.variant
        published = (variant.published or {}).get(self.split)
        source = variant.source
        return Row(variant.label, variant.command, self.split, self.results, published, source)


def run_folder(out: Path, variant: Variant, split: str, seed: int) -> Path:
    """OUT/METHOD/SPLIT-seedN.

    METHOD is the script, its flags and, unless once, how many times as long it trains.
    """
    method = variant.command.replace(".py", "").replace(" --", "_").replace(" ", "-")
    longer = f"_x{variant.times}" if variant.times > 1 else ""
    return out / (method + longer) / f"{split.replace('/', '-')}-seed{seed}"


def parts(folder: Path) -> list[Path]:
    """A run's folder, and those of the earlier stages of ST and ST++."""
    return [folder, *sorted(folder.glob("stage-*"))]


def read_result(folder: Path, seed: int, measure: str = "") -> Result | None:
    """The result of a run, or None if it is not finished.

    Seconds of the stages of ST and ST++ are added up. `measure` is a column of metrics.csv, of
    which the last value is wanted, too.
    """
    log = folder / "log.txt"
    found = (
        LAST_LINE.match(log.read_text().splitlines()[-1])
        if log.is_file() and log.stat().st_size
        else None
    )
    if not found:
        return None
    seconds, memory = 0.0, 0
    for part in parts(folder):
        with open(part / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        seconds += float(rows[-1]["seconds"])
        memory = max(memory, *(int(row["peak_memory_mb"] or 0) for row in rows))
        if part == folder:
            own = rows
    rarest = last_value(own, "miou_rarest")
    at_end = last_value(own, measure) if measure else None
    return Result(seed, float(found[1]), float(found[2]), seconds, memory, rarest, at_end)


def last_value(rows: list[dict[str, str]], measure: str) -> float | None:
    """The last value of a column of metrics.csv in percent; None where there is none."""
    values = [float(row[measure]) for row in rows if row.get(measure)]
    return round(100 * values[-1], 2) if values else None


def settings(script: str, flags: list[str]) -> argparse.Namespace:
    """What a script makes of its flags; flags that it refuses end this program with its message."""
    return importlib.import_module(script.removesuffix(".py")).parse_args(flags)


def check_settings(folder: Path, script: str, flags: list[str]) -> None:
    """A run that is there must have been started with these flags.

    Raises:
        InputError: it was not; the message names folder and settings.
    """
    wanted = json.loads(json.dumps(vars(settings(script, flags))))
    found = checkpoint.read_description(folder)["args"]
    fixed = [key for key in wanted if key in found and key not in cli.FREE_ON_RESUME - {"data_dir"}]
    other = [f"{key}={found[key]}" for key in fixed if found[key] != wanted[key]]
    if other:
        raise InputError(f"{folder} holds a run with {', '.join(other)}; choose another --output")


def command_line(
    variant: Variant, split: str, seed: int, args: argparse.Namespace
) -> tuple[str, list[str]]:
    """Script and flags of a run; of a flag that is given twice the last one counts."""
    script, *own = shlex.split(variant.command)
    shared = {"data": args.data, "split": split, "seed": seed, **args.shared}
    shared["max_iters"] *= variant.times
    shared["output_dir"] = run_folder(args.output, variant, split, seed)
    return script, [
        *args.rest,
        *own,
        *(f"--{key.replace('_', '-')}={value}" for key, value in shared.items()),
    ]


def run(
    variant: Variant, split: str, seed: int, args: argparse.Namespace, number: str, measure: str
) -> tuple[Path, Result]:
    """One run: reused, resumed or started.

    `number` is printed before its command; `measure` goes to `read_result`.

    Raises:
        InputError: the run failed, or the folder holds another one.
    """
    folder = run_folder(args.output, variant, split, seed)
    script, flags = command_line(variant, split, seed, args)
    length = args.shared["max_iters"] * variant.times
    place = f"[{number}] {variant.command} --split {split} --seed {seed} --max-iters {length}"
    started = any(map(checkpoint.occupied, parts(folder)))
    if started:
        check_settings(folder, script, flags)
    result = read_result(folder, seed, measure)
    if result is None:
        print(f"{place}: {'resumed' if started else 'started'}", flush=True)
        flags = [f"--resume={folder}", *args.rest] if started else flags
        code = call([*shlex.split(args.launcher), script, *flags])
        result = read_result(folder, seed, measure)
        if code or result is None:
            again = "" if code == 2 else "; start this again to go on"
            raise InputError(f"{script} ended with exit code {code}, its message is above{again}")
    print(f"{place}: {result.last:.2f} in {minutes(result.seconds)}", flush=True)
    return folder, result


def call(command: list[str]) -> int:
    """Run a command, its output in the run's log.txt alone; returns its exit code."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _under_way.append(process)
    if _stopping.is_set():  # after `stop_all` has looked for the last time
        process.terminate()
    return process.wait()


def stop_all() -> None:
    """Stop the runs that are under way, with time to save."""
    _stopping.set()
    for process in _under_way:
        if process.poll() is None:
            process.terminate()
    for process in _under_way:
        process.wait()


# ------------------------------------------------------------------------------------------ reports


def conditions(compared: list[Runs]) -> list[str]:
    """Notes on what else differs between the runs, reused ones mostly.

    Raises:
        InputError: at one split and seed, other labelled images: the list has changed between the
            runs. The seed may decide it, since it decides what is held out for validation.
    """
    found = [
        (runs.split, folder, checkpoint.read_description(folder))
        for runs in compared
        for folder in runs.folders
    ]
    lists: dict[tuple[str, int], tuple[str, Path]] = {}
    for split, folder, description in found:
        key = split, description["args"]["seed"]
        other, first = lists.setdefault(key, (description["labelled_list_sha1"], folder))
        if other != description["labelled_list_sha1"]:
            raise InputError(
                f"{first} and {folder} have other labelled images; choose another --output"
            )
    notes = []
    for key in ("git_commit", "processes", "threads", "hardware", "versions"):
        values = {json.dumps(description[key]) for *_, description in found}
        if len(values) > 1:
            notes.append(f"not alike in all runs: {key} ({'; '.join(sorted(values))})")
    return notes


def read_iou(folder: Path) -> dict[str, str]:
    """IoU in percent of each class at the end of a run.

    Raises:
        InputError: the run does not have it.
    """
    path = folder / "iou.csv"
    if not path.is_file():
        raise InputError(f"no {path}: a run of an earlier version? choose another --output")
    with open(path, newline="") as file:
        return {row[0]: row[1] for row in list(csv.reader(file))[1:]}


def mean_curve(folders: list[Path], measure: str) -> dict[int, float]:
    """A column of metrics.csv by iteration, in percent: the mean over runs."""
    points: dict[int, list[float]] = {}
    for folder in folders:
        with open(folder / "metrics.csv", newline="") as file:
            for row in csv.DictReader(file):
                if row[measure]:
                    points.setdefault(int(row["iteration"]), []).append(100 * float(row[measure]))
    return {iteration: statistics.mean(points[iteration]) for iteration in sorted(points)}


def write_reports(
    name: str, experiment: Experiment, compared: list[Runs], args: argparse.Namespace
) -> None:
    """Print the table; write it with the figures to OUT."""
    from common import figures

    if not experiment.splits:
        name += "-" + Path(args.split.replace("/", "-")).stem
    rows = [runs.row for runs in compared]
    shares = ", ".join(dict.fromkeys(row.split for row in rows))
    comparison = Comparison(
        f"{experiment.title}; {args.data}, {shares} labelled",
        args.command,
        rows,
        experiment.curve,
        tuple(conditions(compared)),
    )
    path = args.output / f"{name}.csv"
    tables.write_csv(comparison, path)
    labels = tables.labels(rows)
    if experiment.curve:
        curves = {
            label: mean_curve(runs.folders, experiment.curve)
            for label, runs in zip(labels, compared)
        }
        tables.write_curves(curves, tables.curve_file(path))
    tables.write_classes(
        [
            (runs.variant.label, runs.split, result.seed, read_iou(folder))
            for runs in compared
            for folder, result in zip(runs.folders, runs.results)
        ],
        tables.classes_file(path),
    )
    print("\n" + tables.write_table(path) + "\n", flush=True)
    first_seed = {
        label: runs.folders[0]
        for label, runs in zip(labels, compared)
        if runs.split == compared[0].split
    }
    figures.side_by_side(first_seed, args.output / f"{name}-predictions.png")
    print(f"{name}.md, .csv and figures are in {args.output}")


def make_parser() -> argparse.ArgumentParser:
    """The flags of the comparison itself, and those that all runs get."""
    parser = argparse.ArgumentParser(
        prog="python -m common.compare",
        description=__doc__,
        epilog=f"defaults of the shared settings:\n{cli.listed(SHARED)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", choices=list(SHARED), default="shapes", help="data set (default: shapes)"
    )
    parser.add_argument(
        "--split", help="labelled share, as the scripts take it (default: 1/8; folder: all)"
    )
    parser.add_argument(
        "--seeds", type=cli.positive, default=3, metavar="N", help="how many (default: 3)"
    )
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="S", help="seeds S to S+N-1 (default: 0)"
    )
    parser.add_argument(
        "--jobs",
        type=cli.positive,
        default=1,
        metavar="N",
        help="runs at a time, on one device (default: 1)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}",
    )
    named = ", ".join(EXPERIMENTS)
    parser.add_argument(
        "--experiment",
        nargs="+",
        choices=list(EXPERIMENTS),
        metavar="NAME",
        help=f"instead: {named}",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of runs and tables (default: runs/compare-DATA)",
    )
    parser.add_argument(
        "--launcher",
        default=shlex.quote(sys.executable),
        help="such as 'torchrun --nproc_per_node 4'; needs -b",
    )
    add_shared_flags(parser)
    return parser


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that replace entries of SHARED."""
    shared = parser.add_argument_group("shared by all runs (defaults depend on the data set)")
    shared.add_argument("--backbone")
    shared.add_argument("--output-stride", type=int)
    shared.add_argument("--crop-size", type=cli.positive, metavar="PX")
    shared.add_argument("-b", "--batch-size", type=cli.positive, metavar="N", help="a process")
    shared.add_argument(
        "--max-iters", type=cli.positive, metavar="N", help="iterations of each trained network"
    )
    shared.add_argument(
        "--eval-window", type=int, metavar="PX", help="sliding-window evaluation; 0: whole images"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    `shared` holds the settings that all runs get, `rest` the flags after `--`.
    """
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    own, rest = argv[:cut], argv[cut + 1 :]
    parser = make_parser()
    args = parser.parse_args(own)
    if args.launcher != parser.get_default("launcher") and not args.batch_size:
        parser.error(
            "--launcher needs -b: the batch of one process, 8 divided by the processes "
            "if it is to stay as it was"
        )
    if args.methods and args.experiment:
        parser.error(
            "--methods chooses rows of the comparison of all methods; "
            "leave it out with --experiment"
        )
    given = {key: getattr(args, key) for key in SHARED_FLAGS if getattr(args, key) is not None}
    args.shared = {**SHARED[args.data], **given}
    args.rest, args.command = rest, "python -m common.compare " + shlex.join(argv)
    args.split = args.split or DATASETS[args.data].split
    args.output = args.output or Path("runs") / f"compare-{args.data}"
    return args


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then report.

    Raises:
        InputError: a run failed, or a folder holds another one.
    """
    args = parse_args(argv)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {args.output}: {error.strerror}") from None
    for name in args.experiment or ["methods"]:
        experiment = EXPERIMENTS[name]
        if args.methods:
            chosen = tuple(METHODS[method] for method in args.methods)
            experiment = experiment._replace(variants=chosen)
            name = "+".join(args.methods)
        write_reports(name, experiment, run_all(experiment, args), args)


def run_all(experiment: Experiment, args: argparse.Namespace) -> list[Runs]:
    """All runs of an experiment, `args.jobs` at a time.

    Raises:
        InputError: a run failed; those that were under way beside it are stopped.
    """
    splits = experiment.splits or (args.split,)
    lines = [(variant, split) for split in splits for variant in experiment.variants]
    for variant, split in lines:  # before the first run, rather than after hours
        settings(*command_line(variant, split, args.first_seed, args))
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    todo = [(variant, split, seed) for variant, split in lines for seed in seeds]

    _under_way.clear()
    _stopping.clear()
    pool = ThreadPoolExecutor(args.jobs)
    try:
        started = [
            pool.submit(run, *what, args, f"{number}/{len(todo)}", experiment.curve)
            for number, what in enumerate(todo, start=1)
        ]
        for future in as_completed(started):
            future.result()  # or the first failure's exception
    finally:  # after a failure, and after Ctrl-C
        pool.shutdown(wait=False, cancel_futures=True)
        stop_all()
        pool.shutdown()
    done = [future.result() for future in started]

    compared = []
    for index, (variant, split) in enumerate(lines):
        folders, results = map(list, zip(*done[index * len(seeds) : (index + 1) * len(seeds)]))
        compared.append(Runs(variant, split, folders, results))
    return compared


if __name__ == "__main__":
    # Or the run would go on alone; a shell's background jobs ignore Ctrl-C's.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        main()
    except InputError as problem:
        print(f"compare: error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("compare: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
