"""The tables of comparisons: their arithmetic, and that they can be made from the csv alone."""

import math
import re

import pytest
from conftest import ROOT
from PIL import Image

from common import InputError, tables
from common.tables import Comparison, Result, Row


def row(label: str, values: list[float], published: float | None = None, **fields) -> Row:
    """A row at the split 1/8 with these results, of the seeds 0, 1, 2, ..."""
    results = [
        Result(seed, value, value + 1, 60.0, 100, rarest=value / 2)
        for seed, value in enumerate(values)
    ]
    return Row(label, f"{label}.py", "1/8", results, published)._replace(**fields)


def without_rarest(line: Row) -> Row:
    """The same of a data set with few classes."""
    return line._replace(results=[result._replace(rarest=None) for result in line.results])


def test_differences_are_paired_and_have_errors():
    rows = [
        row("first", [70.0, 71.0, 72.0], 75.0),
        row("better", [75.0, 76.0, 78.0], 77.0),
        row("same", [70.0, 71.0, 72.0], 74.0),
        row("unpublished", [1.0, 1.0, 1.0]),
    ]
    # 5, 5, 6: standard deviation 0.577, over √3; 4.303 standard errors hold 95 % at three seeds.
    expected = [
        "- better against first at 1/8: published +2.00, "
        "here +5.33, standard error 0.33, 95 % interval +3.90 to +6.77",
        "- same against first at 1/8: published -1.00, "
        "here +0.00, standard error 0.00, 95 % interval +0.00 to +0.00",
        "- unpublished against first at 1/8: "
        "here -70.00, standard error 0.58, 95 % interval -72.48 to -67.52",
    ]
    rarest = ("+2.67 (standard error 0.17)", "+0.00 (standard error 0.00)")
    found = tables.differences(rows)
    assert found[:2] == [f"{line}; rarest {half}" for line, half in zip(expected, rarest)]
    assert tables.differences([without_rarest(line) for line in rows]) == expected
    single = [row("a", [70.0]), row("b", [71.0])]
    assert tables.differences(single) == [
        "- b against a at 1/8: here +1.00, one seed; rarest +0.50"
    ]


def test_published_figures_are_subtracted_within_one_table_alone():
    first, other = row("first", [70.0], 75.0), row("other", [75.0], 77.0, source="a release")
    assert "published" not in tables.differences([first, other])[0]
    third = row("third", [75.0], 79.0, source="another release")
    assert "published" not in tables.differences([other, third])[0]
    assert tables.published_with_source(other) == "77.00 (a release)"
    assert tables.published_with_source(first) == "75.00"
    assert tables.published_with_source(other._replace(published=None)) == ""


def test_a_row_is_compared_with_the_one_that_it_names_too():
    rows = [row("first", [70.0]), row("b", [75.0]), row("c", [76.0], against="b")]
    found = [line.split(", one seed")[0] for line in tables.differences(rows)]
    assert found == [
        "- b against first at 1/8: here +5.00",
        "- c against first at 1/8: here +6.00",
        "- c against b at 1/8: here +1.00",
    ]
    alone = [rows[0]._replace(against="first"), rows[2]._replace(against="first")]
    assert len(tables.differences(alone)) == 1


def test_seeds_are_paired_by_their_numbers():
    first = row("first", [70.0, 71.0, 72.0])
    later = row("later", [0.0, 72.0, 73.0])
    later = later._replace(results=later.results[1:])  # seeds 1 and 2
    assert "here +1.00, standard error 0.00" in tables.differences([first, later])[0]
    for rows in ([first, later], [later, first]):
        lines = tables.table(Comparison("t", "c", rows)).splitlines()
        assert "| seed 0 | seed 1 | seed 2 |" in lines[4]
        assert any("| - | 72.00 (73.00) | 73.00 (74.00) |" in line for line in lines)
    other = later._replace(results=[later.results[0]._replace(seed=9)])
    assert "no seed in common" in tables.differences([first, other])[0]


def test_rows_of_other_splits_have_another_first_row():
    rows = [row("a", [70.0]), row("b", [71.0])]
    rows += [row("a", [80.0], 1.0, split="1/4"), row("b", [82.0], 1.0, split="1/4")]
    assert tables.differences([without_rarest(line) for line in rows]) == [
        "- b against a at 1/8: here +1.00, one seed",
        "- b against a at 1/4: published +0.00, here +2.00, one seed",
    ]


def test_a_row_knows_its_mean_and_its_spread():
    first = row("first", [70.0, 71.0, 72.0])
    assert first.mean == 71 and first.spread == 1 and first.mean_of("best") == 72
    assert first.mean_of("rarest") == 35.5 and first.mean_of("measure") is None
    assert math.isnan(row("one", [3.0]).spread)


def test_the_table_is_made_from_the_files_alone(tmp_path):
    results = [Result(seed, seed - 50.0, 60.0, 90.0, 300, 40.0, 12.5) for seed in (100, 101)]
    better = [result._replace(last=result.last + 2, rarest=44.0) for result in results]
    comparison = Comparison(
        'A, "B", and C; shapes, 1/8 labelled',
        "python -m common.compare --seeds 2",
        [
            Row("A, alone", "a.py --flag", "1/8", results, 70.1),
            Row("B", "b.py", "1/8", better, 72.0, "its release", "A, alone"),
        ],
        "overlap",
        ("not alike in all runs: threads (1; 2)",),
    )
    path = tmp_path / "name.csv"
    tables.write_csv(comparison, path)
    assert tables.read_csv(path) == comparison
    iou = [{"background": "90.00", "bar": value} for value in ("10.00", "", "", "")]
    labels = ("A, alone", "A, alone", "B", "B")
    seeds = (100, 101, 100, 101)
    found = [(label, "1/8", seed, one) for label, seed, one in zip(labels, seeds, iou)]
    tables.write_classes(found, tables.classes_file(path))
    curves = {"A, alone": {10: 1.0, 20: 2.5}, "B": {10: 3.0}}
    tables.write_curves(curves, tables.curve_file(path))
    assert tables.read_curves(tmp_path / "name-curve.csv") == curves

    tables.main([str(path)])
    text = path.with_suffix(".md").read_text()
    assert text.splitlines()[4:8] == [
        "| method | mean | sd | rarest | seed 100 | seed 101 | time | memory | overlap at the end "
        "| published |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| A, alone | 50.50 | 0.71 | 40.00 | 50.00 (60.00) | 51.00 (60.00) | 1.5 min | 300 MiB "
        "| 12.50 | 70.10 |",
        "| B | 52.50 | 0.71 | 44.00 | 52.00 (60.00) | 53.00 (60.00) | 1.5 min | 300 MiB | 12.50 "
        "| 72.00 (its release) |",
    ]
    assert (
        "- sum of the times of all runs: 0.10 hours\n- not alike in all runs: threads (1; 2)\n"
        in text
    )
    assert "    python -m common.compare --seeds 2\n" in text
    assert text.splitlines()[-4:] == [
        "| method | background | bar |",
        "|---|---|---|",
        "| A, alone | 90.0 | 10.0 |",
        "| B | 90.0 | - |",
    ]
    for figure in ("name.png", "name-curve.png"):
        assert Image.open(tmp_path / figure).width > 300


def test_the_summary_has_means_and_differences_to_the_first_row_of_the_split():
    rows = [
        row("first", [70.0, 71.0, 72.0], 75.0),
        row("gains", [72.0, 74.0, 76.0], 77.0),
        row("elsewhere", [70.0, 71.0, 72.0], 80.0, source="a release"),
        row("at a quarter", [80.0], split="1/4"),
        row("better at a quarter", [81.5], split="1/4"),
    ]
    assert tables.summary(Comparison("title", "command", rows)) == [
        "| method | split | mean | sd | minus first (s.e.) | rarest | published |",
        "|---|---|---|---|---|---|---|",
        "| first, `first.py` | 1/8 | 71.00 | 1.00 | - | 35.50 | 75.00 |",
        "| gains, `gains.py` | 1/8 | 74.00 | 2.00 | +3.00 (0.58) | 37.00 | 77.00 (+2.00) |",
        "| elsewhere, `elsewhere.py` | 1/8 | 71.00 | 1.00 | +0.00 (0.00) | 35.50 "
        "| 80.00 (a release) |",
        "| at a quarter, `at a quarter.py` | 1/4 | 80.00 | - | - | 40.00 | - |",
        "| better at a quarter, `better at a quarter.py` | 1/4 | 81.50 | - | +1.50 | 40.75 | - |",
    ]


STORED = [
    path
    for path in sorted((ROOT / "common" / "results").glob("*/*.csv"))
    if not path.stem.endswith(("-classes", "-curve"))
]


@pytest.mark.parametrize("path", STORED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_stored_tables_are_those_of_their_csv(path):
    text = tables.table(tables.read_csv(path))
    text += "\n\n" + tables.class_table(tables.classes_file(path)) + "\n"
    assert path.with_suffix(".md").read_text(encoding="utf-8") == text


def test_the_page_of_results_shows_the_stored_figures():
    page = (ROOT / "common" / "results" / "README.md").read_text(encoding="utf-8")
    blocks = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", page, re.M)]
    shown = [block for block in blocks if "(s.e.) | rarest |" in block[0]]
    stored = [sorted(tables.summary(tables.read_csv(path))) for path in STORED]
    assert shown
    for block in shown:  # the page may choose the order of the rows
        assert sorted(block) in stored, block


def test_the_csv_holds_any_label(tmp_path):
    labels = ("# a", 'b "c", d', "e|f", "ξ = 1e-6", "two\nlines")
    rows = [row(label, [50.0], command="x.py") for label in labels]
    comparison = Comparison("title # of; it", "command", rows)
    path = tmp_path / "name.csv"
    tables.write_csv(comparison, path)
    assert tables.read_csv(path) == comparison
    path.write_text(path.read_text(), encoding="utf-8-sig", newline="\r\n")  # as Excel does
    assert tables.read_csv(path).rows[:4] == rows[:4]
    assert "| e\\|f |" in tables.table(comparison)


def test_another_csv_is_refused(tmp_path):
    path = tmp_path / "name.csv"
    tables.write_csv(Comparison("t", "c", [row("a", [50.0])]), path)
    text = path.read_text()
    others = ("", "iteration,miou\n10,0.5\n", text[:-20], text.replace("50.00", "fifty"))
    for other in (*others, text.replace("# c\n# measure:\n", "")):
        path.write_text(other)
        with pytest.raises(InputError, match=r"name\.csv was not written by common\.compare"):
            tables.main([str(path)])
    with pytest.raises(InputError, match="cannot read"):
        tables.main([str(tmp_path / "none.csv")])
