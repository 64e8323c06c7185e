"""All methods on one data set, or an experiment of a paper.

    python -m common.compare --data shapes --split 1/8 --seeds 3

Every run is a process of its own with a folder OUT/METHOD/SPLIT-seedN; a finished one is reused, a
stopped one resumed, so that the whole can be stopped and started again. All get the same backbone,
output stride, crop, batch (per process), iterations of each trained network and evaluation window
(ST's re-trainings are --retrain-times as long: twice, on the built-in set); learning rate, decay,
scale and OHEM stay each method's own. What is printed is also left in OUT, in files that are named
by experiment (or methods) and split:

    NAME.csv                every run: mIoU of the last and of the best evaluation; time; memory
    NAME.md                 the table: mean and standard deviation, and each seed
    NAME.png                every seed, the means and the standard deviations
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

and those of --method-flags to one method:

    python -m common.compare --methods supervised u2pl --method-flags u2pl="--warmup-iters 300"
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import sys
from pathlib import Path

from common import InputError, checkpoint, cli, tables, writing
from common.datasets import DATASETS
from common.experiments import EXPERIMENTS, METHODS, Experiment, Variant
from common.runner import Runner, Runs, Task, read_iou, read_metrics, slug
from common.tables import Comparison

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


def mean_curve(folders: list[Path], measure: str) -> dict[int, float]:
    """A column of metrics.csv by iteration, in percent: the mean over runs; empty without it."""
    points: dict[int, list[float]] = {}
    for row in (row for folder in folders for row in read_metrics(folder)):
        if row.get(measure):
            points.setdefault(int(row["iteration"]), []).append(100 * float(row[measure]))
    return {iteration: statistics.mean(points[iteration]) for iteration in sorted(points)}


def file_name(name: str, experiment: Experiment, args: argparse.Namespace) -> str:
    """NAME of the files: with the split, and with the seeds if they are not those from 0 on."""
    if not experiment.splits:
        name += "-" + Path(args.split.replace("/", "-")).stem
    if args.first_seed:
        name += f"-seeds{seeds(args)[0]}-{seeds(args)[-1]}"
    return name


def write_reports(
    name: str, experiment: Experiment, compared: list[Runs], args: argparse.Namespace
) -> None:
    """Print the table; write it with the figures to OUT."""
    from common import figures

    rows = [runs.row for runs in compared]
    shares = ", ".join(dict.fromkeys(row.split for row in rows))
    comparison = Comparison(
        f"{experiment.title}; {args.data}, {shares} labelled",
        args.command,
        rows,
        experiment.curve,
        (*conditions(compared), *([f"{args.jobs} runs at a time"] if args.jobs > 1 else [])),
    )
    name = file_name(name, experiment, args)
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
    shown = {
        label: runs.folders[0]
        for label, runs in zip(labels, compared)
        if runs.split == compared[0].split
    }
    figures.side_by_side(shown, args.output / f"{name}-predictions.png")
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
    add_choice_flags(parser)
    add_shared_flags(parser)
    return parser


def add_choice_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that choose the rows."""
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}",
    )
    parser.add_argument(
        "--method-flags",
        action="append",
        type=method_flags,
        default=[],
        metavar="METHOD=FLAGS",
        help="flags for one method alone, such as u2pl='--warmup-iters 300'; "
        "once for each method that gets some",
    )
    named = ", ".join(EXPERIMENTS)
    parser.add_argument(
        "--experiment",
        nargs="+",
        choices=list(EXPERIMENTS),
        metavar="NAME",
        help=f"instead: {named}",
    )


def method_flags(text: str) -> tuple[str, str]:
    """METHOD=FLAGS as a pair; of flags that all runs share none."""
    method, _, flags = text.partition("=")
    try:
        tokens = shlex.split(flags)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    if method not in METHODS or not tokens:
        raise argparse.ArgumentTypeError(
            f"{text}: give METHOD=FLAGS, the method one of {', '.join(METHODS)}"
        )
    names = ("data", "split", "seed", "output_dir", "resume", *SHARED_FLAGS)
    shared = {"-b", *("--" + name.replace("_", "-") for name in names)}
    if refused := shared & {token.split("=")[0] for token in tokens}:
        raise argparse.ArgumentTypeError(
            f"{text}: {', '.join(sorted(refused))} is the same for all methods"
        )
    return method, shlex.join(tokens)


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that replace entries of SHARED."""
    shared = parser.add_argument_group("shared by all runs (defaults depend on the data set)")
    shared.add_argument("--backbone")
    shared.add_argument("--output-stride", type=int)
    shared.add_argument("--crop-size", type=cli.positive, metavar="PX")
    shared.add_argument("-b", "--batch-size", type=cli.positive, metavar="N", help="per process")
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
    for chosen in (args.methods or [], args.experiment or []):
        if len(chosen) > len(set(chosen)):
            parser.error(f"{' '.join(chosen)}: one of them twice")
    check_method_flags(args, parser)
    given = {key: getattr(args, key) for key in SHARED_FLAGS if getattr(args, key) is not None}
    args.shared = {**SHARED[args.data], **given}
    args.rest, args.command = rest, "python -m common.compare " + shlex.join(argv)
    if "OMP_NUM_THREADS" in os.environ:
        args.command = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} {args.command}"
    args.split = args.split or DATASETS[args.data].split
    args.output = args.output or Path("runs") / f"compare-{args.data}"
    return args


def check_method_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse flags for a method that is not compared, and two methods that become one."""
    flagged = [method for method, _ in args.method_flags]
    if args.experiment and flagged:
        parser.error("--method-flags is for the comparison of methods; leave out --experiment")
    if len(flagged) > len(set(flagged)):
        parser.error("--method-flags: give all flags of a method at once")
    if unused := set(flagged) - set(args.methods or METHODS):
        parser.error(f"--method-flags {' '.join(sorted(unused))}: not among --methods")
    commands = [variant.command for variant in chosen_variants(args)]
    if len(commands) > len(set(commands)):
        parser.error("--method-flags makes two methods the same")


def seeds(args: argparse.Namespace) -> range:
    """The seeds of every line."""
    return range(args.first_seed, args.first_seed + args.seeds)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then report.

    Raises:
        InputError: a run failed, or a folder holds another one.
    """
    args = parse_args(argv)
    with writing(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
    for name in args.experiment or ["methods"]:
        experiment = EXPERIMENTS[name]
        if args.methods or args.method_flags:
            experiment = experiment._replace(variants=chosen_variants(args))
            name = "+".join(args.methods) if args.methods else name
            name += "".join(f"+{method}-{slug(flags)}" for method, flags in args.method_flags)
        compared = run_all(experiment, args)
        with writing(args.output):
            write_reports(name, experiment, compared, args)


def chosen_variants(args: argparse.Namespace) -> tuple[Variant, ...]:
    """The rows of the methods, those with flags of their own named by them, too."""
    own = dict(args.method_flags)
    found = []
    for method in args.methods or METHODS:
        variant = METHODS[method]
        if method in own:
            variant = variant._replace(
                label=f"{variant.label} ({own[method]})", command=f"{variant.command} {own[method]}"
            )
        found.append(variant)
    return tuple(found)


def run_all(experiment: Experiment, args: argparse.Namespace) -> list[Runs]:
    """All runs of an experiment, a line of the table for each variant and split.

    Raises:
        InputError: a run failed, or a folder holds another one.
    """
    splits = experiment.splits or (args.split,)
    lines = [(variant, split) for split in splits for variant in experiment.variants]
    tasks = [Task(variant, split, seed) for variant, split in lines for seed in seeds(args)]
    done = Runner(args, experiment.curve).run_all(tasks)

    compared, count = [], len(seeds(args))
    for index, (variant, split) in enumerate(lines):
        folders, results = map(list, zip(*done[index * count : (index + 1) * count]))
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
