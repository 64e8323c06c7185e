"""The tables of `common.compare`, and how they are made again from the files that it writes.

    python -m common.tables OUT/NAME.csv

Next to NAME.csv this writes NAME.md and NAME.png, as `common.compare` did. Where they are there, it
reads NAME-classes.csv, too, and NAME-curve.csv, of which it makes NAME-curve.png. With --summary it
writes nothing and prints a table of the means, without the single seeds, for a page.

NAME.csv begins with comment lines: what is compared, the command that ran it, the measure that it
is about, and notes. A row is a run:

    method, command     the label, and the script with its flags
    split, seed         the labelled share, and the seed
    miou_last, miou_best, miou_rarest
                        mIoU in percent: last and best evaluation; the last one's over the rarer
                        half of the classes, where there are enough of them
    seconds, memory_mb  of training and evaluating all networks; MiB at the peak
    measure_last        the measure that the experiment is about, at the end, in percent
    published, source   the paper's figure at this split, and where it is from
    against             another method that this one is compared with

Under the table each method is compared with the first one of its split, and with the one of
`against`, seed by seed: the mean of the differences, its standard error, and the interval that
holds the true mean in 95 % of such comparisons, if the differences are normally distributed
(Student's t).
"""

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from scipy.stats import t as student

from common import InputError, writing

COLUMNS = (
    "method", "command", "split", "seed", "miou_last", "miou_best", "miou_rarest", "seconds",
    "memory_mb", "measure_last", "published", "source", "against",
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
        against: the label of a row that it is compared with, besides the first one.
    """

    label: str
    command: str
    split: str
    results: list[Result]
    published: float | None = None
    source: str = ""
    against: str = ""

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
        notes: what else is to be known of the runs.
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
    with open(path, "w", newline="", encoding="utf-8") as file:
        for comment in (comparison.title, comparison.command, measure, *comparison.notes):
            file.write(f"# {' '.join(comment.split())}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in comparison.rows:
            writer.writerows(cells_of(row, result) for result in row.results)


def cells_of(row: Row, result: Result) -> list[str | int]:
    """A run as a row of NAME.csv."""
    return [
        row.label, row.command, row.split, result.seed, in_digits(result.last),
        in_digits(result.best), in_digits(result.rarest), f"{result.seconds:.1f}", result.memory,
        in_digits(result.measure), in_digits(row.published), row.source, row.against,
    ]  # fmt: skip


def in_digits(value: float | None) -> str:
    """With two digits; empty for None."""
    return "" if value is None else f"{value:.2f}"


def read_csv(path: Path) -> Comparison:
    """Read what `write_csv` has written.

    Raises:
        InputError: it cannot be read, or is no such file.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            comments, line = [], file.readline()
            while line.startswith("# "):  # at the top alone: a label may begin so, too
                comments.append(line[2:].strip())
                line = file.readline()
            return parse(comments, [*csv.reader([line, *file])])
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, IndexError):
        raise InputError(f"{path} was not written by common.compare") from None


def parse(comments: list[str], lines: list[list[str]]) -> Comparison:
    """The comment lines and the rows of NAME.csv.

    Raises:
        ValueError, IndexError: they are not those of such a file.
    """
    if tuple(lines[0]) != COLUMNS or len(lines) == 1:
        raise ValueError
    rows: dict[tuple[str, str, str], Row] = {}
    for line in lines[1:]:
        label, command, split, seed, last, best, rarest, seconds, memory, measured, *about = line
        published, source, against = about
        row = Row(label, command, split, [], optional(published), source, against)
        result = Result(
            int(seed), float(last), float(best), float(seconds), int(memory),
            optional(rarest), optional(measured),
        )  # fmt: skip
        rows.setdefault(row[:3], row).results.append(result)
    title, command, measure, *notes = comments
    measure = measure.removeprefix("measure:").strip()
    return Comparison(title, command, [*rows.values()], measure, tuple(notes))


def optional(cell: str) -> float | None:
    """A number; None if it is not there."""
    return float(cell) if cell else None


def curve_file(path: Path) -> Path:
    """NAME-curve.csv of NAME.csv."""
    return path.with_name(f"{path.stem}-curve.csv")


def write_curves(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Write a measure in percent by label and iteration."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("method", "iteration", "percent"))
        for label, points in curves.items():
            writer.writerows((label, done, in_digits(value)) for done, value in points.items())


def read_curves(path: Path) -> dict[str, dict[int, float]]:
    """Read what `write_curves` has written."""
    curves: dict[str, dict[int, float]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            curves.setdefault(row["method"], {})[int(row["iteration"])] = float(row["percent"])
    return curves


def classes_file(path: Path) -> Path:
    """NAME-classes.csv of NAME.csv."""
    return path.with_name(f"{path.stem}-classes.csv")


def write_classes(found: list[tuple[str, str, int, dict[str, str]]], path: Path) -> None:
    """Write IoU in percent by class; `found` has label, split, seed and IoU of each run."""
    classes = list(found[0][3])
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("method", "split", "seed", *classes))
        for *run, iou in found:
            writer.writerow((*run, *(iou[name] for name in classes)))


# ----------------------------------------------------------------------------------------- tables


def table(comparison: Comparison) -> str:
    """The results in Markdown, with the command that makes them."""
    rows = comparison.rows
    columns = [column for column in columns_of(comparison) if any(column[1:])]
    with_rarest = any(row.mean_of("rarest") for row in rows)
    rarest = "; rarest: over the rarer half of the classes" if with_rarest else ""
    seconds = sum(result.seconds for row in rows for result in row.results)
    lines = [
        f"{comparison.title}; mIoU last (best) in percent{rarest}:",
        "",
        f"    {comparison.command}",
        "",
        *markdown(list(zip(*columns))),
        "",
        *differences(rows),
        f"- sum of the times of all runs: {seconds / 3600:.2f} hours",
        *(f"- {note}" for note in comparison.notes),
    ]
    return "\n".join(lines)


def columns_of(comparison: Comparison) -> Iterator[list[str]]:
    """The table by columns, each with its title; those without any content are to be left out."""
    rows = comparison.rows
    several = len({row.split for row in rows}) > 1
    yield ["method", *(row.label for row in rows)]
    yield ["split", *(row.split if several else "" for row in rows)]
    yield ["mean", *(in_digits(row.mean) for row in rows)]
    yield ["sd", *("-" if math.isnan(row.spread) else in_digits(row.spread) for row in rows)]
    yield ["rarest", *(in_digits(row.mean_of("rarest")) for row in rows)]
    for seed in sorted({result.seed for row in rows for result in row.results}):
        yield [f"seed {seed}", *(last_and_best(row, seed) for row in rows)]
    yield ["time", *(minutes(row.mean_of("seconds")) for row in rows)]
    yield ["memory", *(f"{max(result.memory for result in row.results)} MiB" for row in rows)]
    measured = (in_digits(row.mean_of("measure")) for row in rows)
    yield [f"{comparison.measure} at the end", *measured]
    yield ["published", *(published_with_source(row) for row in rows)]


def markdown(lines: list[tuple[str, ...]]) -> list[str]:
    """A table, of which the first line is the head; "-" stands in empty cells."""
    shown = [[cell.replace("|", "\\|") or "-" for cell in line] for line in lines]
    head, *rest = ["| " + " | ".join(line) + " |" for line in shown]
    return [head, "|---" * len(lines[0]) + "|", *rest]


def last_and_best(row: Row, seed: int) -> str:
    """ "52.40 (52.91)", or nothing for a seed that was not run."""
    found = [result for result in row.results if result.seed == seed]
    return f"{found[0].last:.2f} ({found[0].best:.2f})" if found else ""


def minutes(seconds: float) -> str:
    """1234.5 -> "20.6 min"."""
    return f"{seconds / 60:.1f} min"


def published_with_source(row: Row) -> str:
    """The paper's figure, and where it is from if the title does not say so."""
    if row.published is None:
        return ""
    return in_digits(row.published) + (f" ({row.source})" if row.source else "")


def class_table(path: Path) -> str:
    """Mean IoU of each class over the seeds, in Markdown, from NAME-classes.csv.

    A class that a run neither met nor predicted does not count in its mean.
    """
    with open(path, newline="", encoding="utf-8") as file:
        head, *lines = csv.reader(file)
    runs: dict[tuple[str, str], list[list[str]]] = {}
    for label, split, _, *values in lines:
        runs.setdefault((label, split), []).append(values)
    several = len({split for _, split in runs}) > 1

    table = [("method", *(["split"] if several else []), *head[3:])]
    for (label, split), seeds in runs.items():
        means = []
        for values in zip(*seeds):
            known = [float(value) for value in values if value]
            means.append(f"{statistics.mean(known):.1f}" if known else "")
        table.append((label, *([split] if several else []), *means))
    return "\n".join(["IoU of each class in percent, mean over the seeds:", "", *markdown(table)])


def summary(comparison: Comparison) -> list[str]:
    """A table of the means in Markdown, without single seeds, times and memory.

    The differences to the first row of each split, and those of the published figures, stand in it
    instead of below it.
    """
    rows = comparison.rows
    bases = [next(base for base in rows if base.split == row.split) for row in rows]
    several = len({row.split for row in rows}) > 1
    columns = [
        ["method", *(f"{row.label}, `{row.command}`" for row in rows)],
        ["split", *(row.split if several else "" for row in rows)],
        ["mean", *(in_digits(row.mean) for row in rows)],
        ["sd", *("" if math.isnan(row.spread) else in_digits(row.spread) for row in rows)],
        [
            f"minus {rows[0].label} (s.e.)",
            *(short_difference(row, base) for row, base in zip(rows, bases)),
        ],
        ["rarest", *(in_digits(row.mean_of("rarest")) for row in rows)],
        ["published", *(published_with_gain(row, base) for row, base in zip(rows, bases))],
    ]
    return markdown(list(zip(*(column for column in columns if any(column[1:])))))


# ------------------------------------------------------------------------------------ differences


def differences(rows: list[Row]) -> list[str]:
    """Each row against the first one of its split, and against the one that it names."""
    lines = []
    for row in rows:
        first, *others = [other for other in rows if other.split == row.split]
        if row is not first:
            lines.append(difference(row, first))
        lines += [difference(row, other) for other in others if other.label == row.against]
    return lines


def difference(row: Row, base: Row) -> str:
    """A row against another one, seed by seed, over all classes and over the rarer half.

    In front stands what is published, where both figures are of one table.
    """
    line = f"- {row.label} against {base.label} at {row.split}: "
    both_published = row.published is not None and base.published is not None
    if both_published and row.source == base.source:
        line += f"published {row.published - base.published:+.2f}, "
    line += f"here {mean_with_interval(paired(row, base, 'last'))}"
    rarest = paired(row, base, "rarest")
    return line + (f"; rarest {mean_with_error(rarest)}" if rarest else "")


def short_difference(row: Row, base: Row) -> str:
    """ "+1.96 (0.41)": the mean difference, seed by seed, and its standard error."""
    values = [] if row is base else paired(row, base, "last")
    if not values:
        return ""
    error = f" ({standard_error(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.2f}{error}"


def published_with_gain(row: Row, base: Row) -> str:
    """ "74.37 (+1.84)", the gain where both figures are of one table; else their source."""
    both_published = row.published is not None and base.published is not None
    if row is base or not both_published or row.source != base.source:
        return published_with_source(row)
    source = f"{row.source}, " if row.source else ""
    return f"{in_digits(row.published)} ({source}{row.published - base.published:+.2f})"


def paired(row: Row, base: Row, name: str) -> list[float]:
    """The differences of a field between two rows for the seeds that both have; [] without it."""
    theirs = {result.seed: getattr(result, name) for result in base.results}
    pairs = [
        (getattr(result, name), theirs[result.seed])
        for result in row.results
        if result.seed in theirs
    ]
    return [] if any(None in pair for pair in pairs) else [ours - other for ours, other in pairs]


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
    if not values:
        return "no seed in common"
    mean, count = statistics.mean(values), len(values)
    if count == 1:
        return f"{mean:+.2f}, one seed"
    error = standard_error(values)
    reach = student.ppf(0.975, count - 1) * error
    return (
        f"{mean:+.2f}, standard error {error:.2f}, "
        f"95 % interval {mean - reach:+.2f} to {mean + reach:+.2f}"
    )


# ----------------------------------------------------------------------------------------- output


def labels(rows: list[Row]) -> list[str]:
    """What the rows are called in a figure: with the split where there are several."""
    several = len({row.split for row in rows}) > 1
    return [row.label + (f", {row.split}" if several else "") for row in rows]


def write_table(path: Path) -> str:
    """Make NAME.md and the figures of NAME.csv; returns the table.

    Raises:
        InputError: it was not written by `common.compare`, or its folder cannot be written to.
    """
    comparison = read_csv(path)
    text = table(comparison)
    if classes_file(path).exists():
        text += "\n\n" + class_table(classes_file(path))
    with writing(path.parent):
        path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        draw(comparison, path)
    return text


def draw(comparison: Comparison, path: Path) -> None:
    """Draw the figures of NAME.csv."""
    from common import figures

    rows = comparison.rows
    values = [[result.last for result in row.results] for row in rows]
    one_split = len({row.split for row in rows}) == 1
    figures.dots(labels(rows), values, path.with_suffix(".png"), line=one_split)
    curves = curve_file(path)
    if curves.exists():
        figures.measure_curves(read_curves(curves), comparison.measure, curves.with_suffix(".png"))


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
    parser.add_argument("--summary", action="store_true", help="print the means; write nothing")
    args = parser.parse_args(argv)
    for path in args.files:
        text = "\n".join(summary(read_csv(path))) if args.summary else write_table(path)
        print(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        print(f"tables: error: {problem}", file=sys.stderr)
        sys.exit(2)
