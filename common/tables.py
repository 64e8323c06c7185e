"""The tables of `common.compare`, and how they are made again from the files that it writes.

    python -m common.tables common/results/*.csv

Next to each NAME.csv this writes NAME.md and NAME.png, as `common.compare` did; it also reads
NAME-classes.csv, and NAME-curve.csv where there is one, of which it makes NAME-curve.png. NAME.csv
begins with comment lines: what is compared, the command that ran it, and notes. A row is a run:

    method, command     the label, and the script with its flags
    split, seed         the labelled share, and the seed
    miou_last, miou_best, miou_rarest
                        mIoU in percent: last and best evaluation; the last one's over the rarer
                        half of the classes, where there are enough of them
    seconds, memory_mb  of training and evaluating all networks; MiB at the peak
    measure_last        in percent, at the end, in experiments that are about another measure
    published, source   the paper's figure at this split, and where it is from

Under the table each method is compared with the first one of its split, seed by seed: the mean of
the differences, its standard error, and the interval that holds the true mean in 95 % of such
comparisons, if the differences are normally distributed (Student's t).
"""

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from scipy.stats import t as student

from common import InputError

COLUMNS = (
    "method", "command", "split", "seed", "miou_last", "miou_best", "miou_rarest", "seconds",
    "memory_mb", "measure_last", "published", "source",
)  # fmt: skip


class Result(NamedTuple):
    """One finished run.

    Attributes:
        seed: its seed.
        last: mIoU of the last evaluation in percent.
        best: mIoU of the best evaluation in percent.
        seconds: of training and evaluating all its networks.
        memory: MiB at the peak.
        rarest: mIoU of the rarer half of the classes at the end; None where there are few classes.
        measure: the measure that the experiment is about, at the end, in percent.
    """

    seed: int
    last: float
    best: float
    seconds: float
    memory: int
    rarest: float | None = None
    measure: float | None = None


class Row(NamedTuple):
    """One line of a table.

    Attributes:
        label: what it is called.
        command: the script and its own flags.
        split: the labelled share.
        results: a run for each seed.
        published: the paper's mIoU at this split.
        source: where it is from, if the title of the comparison does not say so.
    """

    label: str
    command: str
    split: str
    results: list[Result]
    published: float | None = None
    source: str = ""

    @property
    def mean(self) -> float:
        return statistics.mean(result.last for result in self.results)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; NaN for a single one."""
        values = [result.last for result in self.results]
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def mean_of(self, name: str) -> float | None:
        """Mean over the seeds of another field of the results, None where one lacks it."""
        found = [getattr(result, name) for result in self.results]
        return None if None in found else statistics.mean(found)


class Comparison(NamedTuple):
    """What was compared.

    Attributes:
        title: what, on which data.
        command: that ran it.
        rows: the lines of its table.
        measure: the measure that it is about, or "".
        notes: what else differs between the runs.
    """

    title: str
    command: str
    rows: list[Row]
    measure: str = ""
    notes: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------ files


def write_csv(comparison: Comparison, path: Path) -> None:
    """Write what `read_csv` reads."""
    measure = f"measure: {comparison.measure}"
    with open(path, "w", newline="") as file:
        for line in (comparison.title, comparison.command, measure, *comparison.notes):
            file.write(f"# {line}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in comparison.rows:
            for result in row.results:
                writer.writerow(
                    [
                        row.label, row.command, row.split, result.seed,
                        f"{result.last:.2f}", f"{result.best:.2f}", number(result.rarest),
                        f"{result.seconds:.1f}", result.memory, number(result.measure),
                        number(row.published), row.source,
                    ]
                )  # fmt: skip


def number(value: float | None) -> str:
    """With two digits; empty for None."""
    return "" if value is None else f"{value:.2f}"


def read_csv(path: Path) -> Comparison:
    """Read what `write_csv` has written.

    Raises:
        InputError: it is no such file.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    heads = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    reader = csv.DictReader(line for line in lines if not line.startswith("# "))
    if tuple(reader.fieldnames or ()) != COLUMNS or len(heads) < 3:
        raise InputError(f"{path} was not written by common.compare")

    rows: dict[tuple[str, str, str], Row] = {}
    for line in reader:
        known = float(line["published"]) if line["published"] else None
        row = Row(line["method"], line["command"], line["split"], [], known, line["source"])
        rows.setdefault(row[:3], row).results.append(parse_result(line))
    title, command, measure, *notes = heads
    measure = measure.removeprefix("measure:").strip()
    return Comparison(title, command, [*rows.values()], measure, tuple(notes))


def parse_result(line: dict[str, str]) -> Result:
    """A line of the csv."""
    rarest, measure = (
        float(line[name]) if line[name] else None for name in ("miou_rarest", "measure_last")
    )
    last, best, seconds = (float(line[name]) for name in ("miou_last", "miou_best", "seconds"))
    return Result(int(line["seed"]), last, best, seconds, int(line["memory_mb"]), rarest, measure)


def curve_file(path: Path) -> Path:
    """NAME-curve.csv of NAME.csv."""
    return path.with_name(f"{path.stem}-curve.csv")


def write_curves(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Write a measure in percent by label and iteration."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("method", "iteration", "percent"))
        for label, points in curves.items():
            writer.writerows(
                (label, iteration, number(value)) for iteration, value in points.items()
            )


def read_curves(path: Path) -> dict[str, dict[int, float]]:
    """Read what `write_curves` has written."""
    curves: dict[str, dict[int, float]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            curves.setdefault(row["method"], {})[int(row["iteration"])] = float(row["percent"])
    return curves


def classes_file(path: Path) -> Path:
    """NAME-classes.csv of NAME.csv."""
    return path.with_name(f"{path.stem}-classes.csv")


def write_classes(found: list[tuple[str, str, int, dict[str, str]]], path: Path) -> None:
    """Write IoU in percent by class; `found` has label, split, seed and IoU of each run."""
    classes = list(found[0][3])
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("method", "split", "seed", *classes))
        for *run, iou in found:
            writer.writerow((*run, *(iou[name] for name in classes)))


# ----------------------------------------------------------------------------------------- tables


def table(comparison: Comparison) -> str:
    """The results in Markdown, with the command that makes them."""
    rows, measure = comparison.rows, comparison.measure
    several = len({row.split for row in rows}) > 1
    with_rarest = all(row.mean_of("rarest") is not None for row in rows)

    columns: dict[str, Callable[[Row], str]] = {"method": lambda row: row.label}
    if several:
        columns["split"] = lambda row: row.split
    columns["mean"] = lambda row: f"{row.mean:.2f}"
    columns["sd"] = lambda row: "-" if math.isnan(row.spread) else f"{row.spread:.2f}"
    if with_rarest:
        columns["rarest"] = lambda row: f"{row.mean_of('rarest'):.2f}"
    for index, result in enumerate(rows[0].results):
        columns[f"seed {result.seed}"] = lambda row, index=index: last_and_best(row.results[index])
    columns["time"] = lambda row: minutes(row.mean_of("seconds"))
    columns["memory"] = lambda row: f"{max(result.memory for result in row.results)} MiB"
    if measure:
        columns[f"{measure} at the end"] = lambda row: f"{row.mean_of('measure'):.2f}"
    if any(row.published is not None for row in rows):
        columns["published"] = published

    lines = [
        f"{comparison.title}; mIoU last (best) in percent:",
        "",
        f"    {comparison.command}",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows),
        "",
        *differences(rows),
        f"- all runs together: {all_hours(rows)}",
        *(f"- {note}" for note in comparison.notes),
    ]
    return "\n".join(lines)


def class_table(path: Path) -> str:
    """Mean IoU of each class over the seeds, in Markdown, from NAME-classes.csv.

    A class that a run neither met nor predicted does not count in its mean.
    """
    with open(path, newline="") as file:
        head, *lines = csv.reader(file)
    runs: dict[tuple[str, str], list[list[str]]] = {}
    for method, split, _, *values in lines:
        runs.setdefault((method, split), []).append(values)
    several = len({split for _, split in runs}) > 1
    table = ["| method |" + (" split |" if several else "") + "".join(f" {c} |" for c in head[3:])]
    table.append("|---" * (table[0].count("|") - 1) + "|")
    for (method, split), seeds in runs.items():
        cells = [method, *([split] if several else [])]
        for values in zip(*seeds):
            known = [float(value) for value in values if value]
            cells.append(f"{statistics.mean(known):.1f}" if known else "-")
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join(["IoU of each class in percent, mean over the seeds:", "", *table])


def last_and_best(result: Result) -> str:
    """ "52.40 (52.91)"."""
    return f"{result.last:.2f} ({result.best:.2f})"


def minutes(seconds: float) -> str:
    """1234.5 -> "20.6 min"."""
    return f"{seconds / 60:.1f} min"


def all_hours(rows: list[Row]) -> str:
    """The time of all runs."""
    seconds = sum(result.seconds for row in rows for result in row.results)
    return f"{seconds / 3600:.2f} hours"


def published(row: Row) -> str:
    """The paper's figure, and where it is from if the title does not say so."""
    if row.published is None:
        return "-"
    return f"{row.published:.2f}" + (f" ({row.source})" if row.source else "")


def differences(rows: list[Row]) -> list[str]:
    """Each row against the first one of its split, seed by seed.

    Beside it stands what is published, where both figures are of one table, and the difference over
    the rarer half of the classes.
    """
    lines = []
    for row in rows:
        first = next(other for other in rows if other.split == row.split)
        if row is first:
            continue
        line = f"- {row.label} against {first.label} at {row.split}: "
        known = row.published is not None and first.published is not None
        if known and row.source == first.source:
            line += f"published {row.published - first.published:+.2f}, "
        line += f"here {mean_with_interval(paired(row, first, 'last'))}"
        rarest = paired(row, first, "rarest")
        if rarest:
            line += f"; rarest {mean_with_error(rarest)}"
        lines.append(line)
    return lines


def paired(row: Row, first: Row, name: str) -> list[float]:
    """The differences of a field between two rows, seed by seed; empty where a run lacks it."""
    pairs = [
        (getattr(ours, name), getattr(theirs, name))
        for ours, theirs in zip(row.results, first.results)
    ]
    return [] if any(None in pair for pair in pairs) else [ours - theirs for ours, theirs in pairs]


def standard_error(values: list[float]) -> float:
    """s/√n, with the standard deviation s of n values."""
    return statistics.stdev(values) / math.sqrt(len(values))


def mean_with_error(values: list[float]) -> str:
    """Mean of `values` and its standard error."""
    mean = f"{statistics.mean(values):+.2f}"
    return mean if len(values) == 1 else f"{mean} (standard error {standard_error(values):.2f})"


def mean_with_interval(values: list[float]) -> str:
    """Mean of `values`, its standard error, and its 95 % interval by Student's t.

    With n values the interval reaches t(0.975; n-1) standard errors to both sides.
    """
    mean, count = statistics.mean(values), len(values)
    if count == 1:
        return f"{mean:+.2f}, one seed"
    error = standard_error(values)
    reach = student.ppf(0.975, count - 1) * error
    return (
        f"{mean:+.2f}, standard error {error:.2f}, "
        f"95 % interval {mean - reach:+.2f} to {mean + reach:+.2f}"
    )


def labels(rows: list[Row]) -> list[str]:
    """What the rows are called in a figure: with the split where there are several."""
    several = len({row.split for row in rows}) > 1
    return [row.label + (f", {row.split}" if several else "") for row in rows]


def write_table(path: Path) -> str:
    """Make NAME.md and the figures of NAME.csv; returns the table."""
    from common import figures

    comparison = read_csv(path)
    text = table(comparison) + "\n\n" + class_table(classes_file(path))
    path.with_suffix(".md").write_text(text + "\n")
    rows = comparison.rows
    values = [[result.last for result in row.results] for row in rows]
    figures.bars(labels(rows), values, path.with_suffix(".png"))
    curves = curve_file(path)
    if curves.exists():
        figures.measure_curves(read_curves(curves), comparison.measure, curves.with_suffix(".png"))
    return text


def main(argv: list[str] | None = None) -> None:
    """Make the tables of the files again.

    Raises:
        InputError: a file was not written by `common.compare`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m common.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="NAME.csv")
    for path in parser.parse_args(argv).files:
        print(write_table(path) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        print(f"tables: error: {problem}", file=sys.stderr)
        sys.exit(2)
