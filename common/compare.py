"""All methods on one data set, or an experiment of a paper.

    python -m common.compare --data shapes --split 1/8 --seeds 3

Every run is a process of its own with a folder OUT/METHOD/SPLIT-seedN; a finished one is reused, a
stopped one resumed, so that the whole can be stopped and started again. All get the same backbone,
output stride, crop, batch (a process), iterations of each trained network and evaluation window
(ST's re-trainings are --retrain-times as long: twice, on the built-in set); learning rate, decay,
scale and OHEM stay each method's own. What is printed is also left in OUT, in files that are named
by experiment (or methods) and split:

    NAME.md, .csv           mIoU of the last evaluation: every seed, mean and standard deviation;
                            best in brackets; time; memory
    NAME.png                bars with the standard deviation
    NAME-curve.png          a measure over the iterations, for the experiments that are about one
    NAME-predictions.png    image by image: input, target, prediction of each method (first seed)

Under the table each method is compared with the first one, seed by seed: the mean of the
differences, its standard error, and the interval that holds the true mean in 95 % of such
comparisons, if the differences are normally distributed (Student's t).

Flags after `--` go to every script, here those of another folder and of mixed precision:

    python -m common.compare --data voc -- --data-dir VOCdevkit --amp bf16
"""

import argparse
import csv
import importlib
import json
import math
import re
import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from scipy.stats import t as student

from common import InputError, checkpoint, cli
from common.datasets import DATASETS
from common.experiments import EXPERIMENTS, METHODS, Experiment, Variant

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


class Result(NamedTuple):
    """One finished run.

    Attributes:
        last: mIoU of the last evaluation in percent.
        best: mIoU of the best evaluation in percent.
        seconds: of training and evaluating all its networks.
        memory: MiB at the peak.
        rarest: mIoU of the rarer half of the classes at the end; None where there are few classes.
    """

    last: float
    best: float
    seconds: float
    memory: int
    rarest: float | None = None


class Row(NamedTuple):
    """One line of a table."""

    variant: Variant
    split: str
    folders: list[Path]
    results: list[Result]

    @property
    def mean(self) -> float:
        return statistics.mean(result.last for result in self.results)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; NaN for a single one."""
        return (
            statistics.stdev(result.last for result in self.results)
            if len(self.results) > 1
            else math.nan
        )

    @property
    def rarest(self) -> float | None:
        """Mean over the seeds of the mIoU of the rarer half of the classes."""
        found = [result.rarest for result in self.results]
        return None if None in found else statistics.mean(found)

    @property
    def published(self) -> float | None:
        return (self.variant.published or {}).get(self.split)


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


def read_result(folder: Path) -> Result | None:
    """The result of a run, or None if it is not finished.

    Seconds of the stages of ST and ST++ are added up.
    """
    log = folder / "log.txt"
    found = (
        LAST_LINE.match(log.read_text().splitlines()[-1])
        if log.is_file() and log.stat().st_size
        else None
    )
    if not found:
        return None
    seconds, memory, rarest = 0.0, 0, None
    for part in parts(folder):
        with open(part / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        seconds += float(rows[-1]["seconds"])
        memory = max(memory, *(int(row["peak_memory_mb"] or 0) for row in rows))
        if part == folder and rows[-1].get("miou_rarest"):
            rarest = round(100 * float(rows[-1]["miou_rarest"]), 2)
    return Result(float(found[1]), float(found[2]), seconds, memory, rarest)


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
    variant: Variant, split: str, seed: int, args: argparse.Namespace, number: str
) -> tuple[Path, Result]:
    """One run: reused, resumed or started; `number` is printed before its command.

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
    result = read_result(folder)
    if result is None:
        print(f"{place}: {'resumed' if started else 'started'}", flush=True)
        flags = [f"--resume={folder}", *args.rest] if started else flags
        code = call([*shlex.split(args.launcher), script, *flags])
        result = read_result(folder)
        if code or result is None:
            again = "" if code == 2 else "; start this again to go on"
            raise InputError(f"{script} ended with exit code {code}, its message is above{again}")
    print(f"{place}: {result.last:.2f} in {minutes(result.seconds)}", flush=True)
    return folder, result


def call(command: list[str]) -> int:
    """Run a command, its output in the run's log.txt alone.

    What stops this process stops the command, too, with time to save.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def minutes(seconds: float) -> str:
    """1234.5 -> "20.6 min"."""
    return f"{seconds / 60:.1f} min"


# ------------------------------------------------------------------------------------------ reports


def table(experiment: Experiment, rows: list[Row], args: argparse.Namespace) -> str:
    """The results in Markdown, with the command that makes them."""
    splits = len({row.split for row in rows}) > 1
    seeds = [f"seed {seed}" for seed in range(args.seeds)]
    last = [f"{experiment.curve} at the end"] if experiment.curve else []
    rarest = ["rarest"] if all(row.rarest is not None for row in rows) else []
    head = ["method", *(["split"] if splits else []), *seeds, "mean", "sd", *rarest]
    head += ["time", "memory", *last, "published"]
    shares = ", ".join(dict.fromkeys(row.split for row in rows))
    lines = [
        f"{experiment.title}; {args.data}, {shares} labelled, {args.seeds} seeds, "
        "mIoU last (best) in percent:",
        "",
        f"    {args.command}",
        "",
    ]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row.variant.label, *([row.split] if splits else [])]
        cells += [f"{result.last:.2f} ({result.best:.2f})" for result in row.results]
        cells += [f"{row.mean:.2f}", "-" if math.isnan(row.spread) else f"{row.spread:.2f}"]
        cells += [f"{row.rarest:.2f}"] if rarest else []
        cells.append(minutes(statistics.mean(result.seconds for result in row.results)))
        cells.append(f"{max(result.memory for result in row.results)} MiB")
        cells += [last_value(row.folders, experiment.curve)] if experiment.curve else []
        cells.append(published(row))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *differences(rows), *conditions(rows)])


def published(row: Row) -> str:
    """The paper's figure, and where it is from if the experiment's title does not say it."""
    if row.published is None:
        return "-"
    source = row.variant.source
    return f"{row.published:.2f}" + (f" ({source})" if source else "")


def last_value(folders: list[Path], measure: str) -> str:
    """The last value of a column of metrics.csv in percent, mean over runs."""
    found = []
    for folder in folders:
        with open(folder / "metrics.csv", newline="") as file:
            found.append([float(row[measure]) for row in csv.DictReader(file) if row[measure]][-1])
    return f"{100 * statistics.mean(found):.2f}"


def differences(rows: list[Row]) -> list[str]:
    """Each row against the first one of its split, seed by seed.

    Beside it stands what is published, where both figures are of one table.
    """
    lines = []
    for row in rows:
        first = next(other for other in rows if other.split == row.split)
        if row is first:
            continue
        line = f"- {row.variant.label} against {first.variant.label} at {row.split}: "
        known = row.published is not None and first.published is not None
        if known and row.variant.source == first.variant.source:
            line += f"published {row.published - first.published:+.2f}, "
        paired = [ours.last - theirs.last for ours, theirs in zip(row.results, first.results)]
        lines.append(line + f"here {mean_with_error(paired)}")
    return lines


def mean_with_error(values: list[float]) -> str:
    """Mean of `values`, its standard error, and its 95 % interval by Student's t.

    With n values of standard deviation s the standard error is s/√n, and the interval reaches
    t(0.975; n-1) standard errors to both sides.
    """
    mean, count = statistics.mean(values), len(values)
    if count == 1:
        return f"{mean:+.2f}, one seed"
    error = statistics.stdev(values) / math.sqrt(count)
    reach = student.ppf(0.975, count - 1) * error
    return (
        f"{mean:+.2f}, standard error {error:.2f}, "
        f"95 % interval {mean - reach:+.2f} to {mean + reach:+.2f}"
    )


def conditions(rows: list[Row]) -> list[str]:
    """Notes on what else differs between the runs, reused ones mostly.

    Raises:
        InputError: at one split and seed, other labelled images: the list has changed between the
            runs. The seed may decide it, since it decides what is held out for validation.
    """
    found = [
        (row.split, folder, checkpoint.read_description(folder))
        for row in rows
        for folder in row.folders
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
            notes.append(f"- not alike in all runs: {key} ({'; '.join(sorted(values))})")
    return notes


def write_reports(
    name: str, experiment: Experiment, rows: list[Row], args: argparse.Namespace
) -> None:
    """Print the table; write it with the figures to OUT."""
    from common import figures

    if not experiment.splits:
        name += "-" + Path(args.split.replace("/", "-")).stem
    text = table(experiment, rows, args)
    print("\n" + text + "\n", flush=True)
    (args.output / f"{name}.md").write_text(text + "\n")
    with open(args.output / f"{name}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "method", "command", "split", "seed",
                "miou_last", "miou_best", "seconds", "memory_mb", "miou_rarest",
            ]
        )  # fmt: skip
        for row in rows:
            for seed, result in enumerate(row.results):
                writer.writerow([row.variant.label, row.variant.command, row.split, seed, *result])
    labels = [row.variant.label + (f", {row.split}" if experiment.splits else "") for row in rows]
    figures.bars(
        labels,
        [[result.last for result in row.results] for row in rows],
        args.output / f"{name}.png",
    )
    if experiment.curve:
        runs = {
            label: [folder / "metrics.csv" for folder in row.folders]
            for label, row in zip(labels, rows)
        }
        figures.measure_curves(runs, experiment.curve, args.output / f"{name}-curve.png")
    folders = {
        label: row.folders[0] for label, row in zip(labels, rows) if row.split == rows[0].split
    }
    figures.side_by_side(folders, args.output / f"{name}-predictions.png")
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
        "--seeds", type=cli.positive, default=3, metavar="N", help="seeds 0 to N-1 (default: 3)"
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


def run_all(experiment: Experiment, args: argparse.Namespace) -> list[Row]:
    """All runs of an experiment, a row for each variant and split."""
    splits = experiment.splits or (args.split,)
    todo = [(variant, split) for split in splits for variant in experiment.variants]
    for variant, split in todo:  # before the first run, rather than after hours
        settings(*command_line(variant, split, 0, args))
    total, rows = len(todo) * args.seeds, []
    for index, (variant, split) in enumerate(todo):
        first = index * args.seeds + 1
        numbers = [f"{first + seed}/{total}" for seed in range(args.seeds)]
        done = [run(variant, split, seed, args, number) for seed, number in enumerate(numbers)]
        folders, results = map(list, zip(*done))
        rows.append(Row(variant, split, folders, results))
    return rows


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
