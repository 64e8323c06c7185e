"""The user's own data: layouts, classes, values and colours in masks, formats, what is chosen."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import settings, write_mask, write_picture
from PIL import Image

import cps
import supervised
import u2pl
from common import InputError, check, datasets, figures, folder
from common.augment import ScaleFrom, WeakAugment
from common.data import EvalSet, Key, TrainSet, equal_size_loader, known_grey_range, load_data
from common.deeplabv3plus import DeepLabV3Plus
from common.folder import parse_line
from common.images import Shrunk, open_image, open_mask, working_size
from common.run import Run, sgd


def own(root, **changes):
    """Settings for the user's own data, all labelled."""
    return settings(**{"data": "folder", "data_dir": str(root), "split": "all", **changes})


@pytest.fixture
def flat(tmp_path):
    """The simplest layout: ten images, four of them with masks of three labels."""
    (tmp_path / "classes.txt").write_text("background\ncat\ndog\n")
    for index in range(10):
        write_picture(tmp_path / "images" / f"p{index}.jpg", seed=index)
    for index in range(4):
        write_mask(tmp_path / "masks" / f"p{index}.png", 3, seed=index)
    return tmp_path


def change_masks(root, change) -> dict[str, np.ndarray]:
    """Rewrite all masks below a folder; returns their labels before by file name."""
    before = {}
    for path in sorted((root / "masks").rglob("*.png")):
        before[path.stem] = np.array(Image.open(path))
        Image.fromarray(change(before[path.stem])).save(path)
    return before


def targets(data) -> dict[str, np.ndarray]:
    """The target of every image with a mask, as evaluation reads it."""
    items = (*data.labelled, *data.val)
    samples = EvalSet(data, items)
    return {samples[index]["name"]: samples[index]["target"].numpy() for index in range(len(items))}


# ----------------------------------------------------------------------------------------- layout


def test_an_image_with_a_mask_is_labelled_and_one_without_is_not(flat):
    data = load_data(own(flat))
    assert len(data.labelled) == 3 and len(data.val) == 1 and len(data.unlabelled) == 6
    with_masks = {item.name for item in (*data.labelled, *data.val)}
    assert with_masks == {"p0", "p1", "p2", "p3"}
    assert all(item.mask is None for item in data.unlabelled)
    assert data.protocol == (
        "4 images with masks, 1 of them held out for validation by the seed: "
        "3 labelled, 6 unlabelled"
    )


def test_a_resumed_run_knows_names_that_end_with_a_space(flat, tmp_path):
    """Found wrong once: what a run had written was read without it, so that no id fitted."""
    for index in range(4):
        for path in ((flat / f"images/p{index}.jpg"), (flat / f"masks/p{index}.png")):
            path.rename(path.with_stem(path.stem + " "))
    before = load_data(own(flat, split="1/2"))
    run = tmp_path / "run"
    run.mkdir()
    for name, items in (("val", before.val), ("labelled", before.labelled)):
        (run / f"{name}.txt").write_text("".join(f"{item.name}\n" for item in items))
    after = load_data(own(flat, split="1/2", resume=True, output_dir=str(run)))
    assert after.val == before.val and after.labelled == before.labelled


def test_a_resumed_run_keeps_its_division_when_an_image_is_taken_away(flat, tmp_path):
    """Every second name, and what is drawn for validation, would be others."""
    for index in range(4, 10):
        write_mask(flat / "masks" / f"p{index}.png", 3, seed=index)
    before = load_data(own(flat, split="1/2"))
    run = tmp_path / "run"
    run.mkdir()
    for name in ("labelled", "val"):
        ids = [item.name for item in getattr(before, name)]
        (run / f"{name}.txt").write_text("".join(f"{each}\n" for each in ids))
    taken = before.unlabelled[0].name
    (flat / "images" / f"{taken}.jpg").unlink()
    (flat / "masks" / f"{taken}.png").unlink()

    after = load_data(own(flat, split="1/2", resume=True, output_dir=str(run)))
    assert after.list_hash == before.list_hash and after.val_hash == before.val_hash
    assert len(after.unlabelled) == len(before.unlabelled) - 1
    assert load_data(own(flat, split="1/2")).list_hash != before.list_hash


def test_the_seed_decides_what_is_held_out(flat):
    for index in range(4, 10):
        write_mask(flat / "masks" / f"p{index}.png", 3, seed=index)

    def val(seed: int, fraction: float = 0.2) -> set[str]:
        data = datasets.load(own(flat, seed=seed, val_fraction=fraction))
        assert not {item.name for item in data.val} & {item.name for item in data.labelled}
        return {item.name for item in data.val}

    assert val(0) == val(0) and len(val(0)) == 2 and len(val(0, 0.5)) == 5
    assert len({frozenset(val(seed)) for seed in range(6)}) > 1
    assert len(val(0, 0.999)) == 9  # one is left to train on


def test_what_the_split_leaves_is_held_out_first(flat):
    """No label is lost, and the labelled list is the same for all seeds."""
    for index in range(4, 10):
        write_mask(flat / "masks" / f"p{index}.png", 3, seed=index)
    for seed in range(5):
        data = datasets.load(own(flat, split="1/2", seed=seed))
        assert [item.name for item in data.labelled] == ["p0", "p2", "p4", "p6", "p8"]
        assert len(data.val) == 2 and len(data.unlabelled) == 3
    (flat / "list.txt").write_text("p3\np7\n")
    data = datasets.load(own(flat, labelled_list=str(flat / "list.txt"), split="list.txt"))
    assert [item.name for item in data.labelled] == ["p3", "p7"] and len(data.val) == 2
    measured = datasets.load(own(flat, split="1/2", measure_pseudo_labels=True))
    assert len(measured.audit) == 3 and not set(measured.audit) & set(measured.val)


def test_a_folder_val_is_the_validation_set(flat):
    for index in range(2):
        write_picture(flat / "images/val" / f"v{index}.jpg", seed=20 + index)
        write_mask(flat / "masks/val" / f"v{index}.png", 3)
    data = load_data(own(flat))
    assert [item.name for item in data.val] == ["v0", "v1"]
    assert len(data.labelled) == 4 and len(data.unlabelled) == 6
    assert "held out" not in data.protocol


def test_roles_without_val_are_held_out_from_the_labelled(own_folder):
    for path in (own_folder / "images/val").iterdir():
        path.unlink()
    data = load_data(own(own_folder))
    assert (len(data.labelled), len(data.unlabelled), len(data.val)) == (3, 6, 1)


def test_subfolders_keep_their_names(flat):
    write_picture(flat / "images/street/p0.jpg", seed=30)
    write_mask(flat / "masks/street/p0.png", 3, seed=30)
    write_picture(flat / "images/street/p1.jpg", seed=31)
    data = datasets.load(own(flat))
    assert "street/p0" in {item.name for item in (*data.labelled, *data.val)}
    assert "street/p1" in {item.name for item in data.unlabelled}


@pytest.mark.parametrize("ending", ["_mask", "_L", "_gt"])
def test_masks_may_have_an_ending(flat, ending: str):
    for path in (flat / "masks").iterdir():
        path.rename(path.with_stem(path.stem + ending))
    data = load_data(own(flat))
    assert {item.name for item in (*data.labelled, *data.val)} == {"p0", "p1", "p2", "p3"}
    assert len(data.unlabelled) == 6


def test_each_mask_may_have_an_ending_and_strangers_are_counted(flat, capsys):
    (flat / "masks/p0.png").rename(flat / "masks/p0_mask.png")
    (flat / "masks/p1.png").rename(flat / "masks/q1.png")
    data = datasets.load(own(flat))
    assert {item.name for item in (*data.labelled, *data.val)} == {"p0", "p2", "p3"}
    assert "1 masks in" in (said := capsys.readouterr().err) and "no image: q1.png" in said


@pytest.mark.parametrize("name", ["val", "Validation", "VAL"])
def test_a_folder_for_validation_may_have_other_names(flat, name: str):
    write_picture(flat / "images" / name / "v.jpg", seed=20)
    write_mask(flat / "masks" / name / "v.png", 3)
    data = load_data(own(flat))
    assert [item.name for item in data.val] == ["v"] and len(data.labelled) == 4


@pytest.mark.parametrize(("ours", "theirs"), [("validation", "val"), ("VAL", "valid")])
def test_masks_for_validation_may_lie_in_a_folder_of_another_name(flat, ours: str, theirs: str):
    """Found wrong once: the masks were said to be missing."""
    write_picture(flat / "images" / ours / "v.jpg", seed=20)
    write_mask(flat / "masks" / theirs / "v.png", 3)
    data = load_data(own(flat))
    assert [item.name for item in data.val] == ["v"] and len(data.labelled) == 4


def test_the_folder_of_the_same_name_goes_first(flat):
    write_picture(flat / "images/validation/v.jpg", seed=20)
    for name in ("val", "validation"):
        write_mask(flat / "masks" / name / "v.png", 3)
    assert load_data(own(flat)).val[0].mask == flat / "masks/validation/v.png"


@pytest.mark.parametrize("names", [("p0", "p0_seg"), ("p0_gt", "p0_seg")])
def test_two_masks_of_one_image_are_refused(flat, names: tuple[str, str]):
    """Found wrong once: one of them was taken without a word."""
    (flat / "masks/p0.png").unlink()
    for name in names:
        write_mask(flat / "masks" / f"{name}.png", 3)
    message = rf"two masks of one image in .*: p0 \({names[0]}\.png and {names[1]}\.png\)"
    with pytest.raises(InputError, match=message):
        datasets.load(own(flat))


def test_images_beside_the_folders_of_roles_are_counted(own_folder, capsys):
    datasets.load(own(own_folder))
    assert "left out" not in capsys.readouterr().err
    write_picture(own_folder / "images/a.jpg", seed=20)
    write_picture(own_folder / "images/test/b.jpg", seed=21)
    data = datasets.load(own(own_folder))
    assert (len(data.labelled), len(data.unlabelled), len(data.val)) == (4, 6, 2)
    said = capsys.readouterr().err
    assert "2 images in" in said and "are left out: a.jpg, test/b.jpg" in said
    assert "taken for images to train on" not in said


def test_a_folder_test_is_questioned(flat, capsys):
    write_picture(flat / "images/test/t.jpg", seed=20)
    datasets.load(own(flat))
    assert "is taken for images to train on" in capsys.readouterr().err


def test_masks_of_other_names_are_named(flat):
    for path in (flat / "masks").iterdir():
        path.rename(path.with_stem("x" + path.stem))
    with pytest.raises(InputError, match=r"none of the 4 masks in .*, such as xp0\.png, has"):
        datasets.load(own(flat))


def test_what_is_missing_is_said(flat, tmp_path_factory):
    for path in sorted((flat / "masks").iterdir())[1:]:
        path.unlink()
    with pytest.raises(InputError, match="only one image has a mask"):
        datasets.load(own(flat))
    (flat / "masks/p0.png").unlink()
    with pytest.raises(InputError, match=r"no masks in .*masks"):
        datasets.load(own(flat))
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(InputError, match=r"no folder .*images"):
        datasets.load(own(empty))


def test_jpeg_masks_are_refused(flat):
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(flat / "masks/p5.jpg")
    with pytest.raises(
        InputError, match=r"masks: p5\.jpg: JPEG changes the values of pixels; export"
    ):
        datasets.load(own(flat))


def test_a_run_keeps_its_lists(flat, begin):
    run = begin(supervised, "--data", "folder", "--data-dir", str(flat), "--max-iters", "1")
    names = {part: (run.book.folder / f"{part}.txt").read_text().split() for part in
             ("labelled", "unlabelled", "val")}  # fmt: skip
    assert sorted(names["labelled"] + names["val"]) == ["p0", "p1", "p2", "p3"]
    assert names["val"] == [item.name for item in run.data.val]
    assert names["unlabelled"] == [f"p{index}" for index in range(4, 10)]


# ---------------------------------------------------------------------------- values and colours


def test_binary_masks_of_0_and_255(flat):
    (flat / "classes.txt").write_text("background 0\ncat 255\n")
    before = change_masks(flat, lambda labels: (labels == 1).astype(np.uint8) * 255)
    data = load_data(own(flat))
    assert data.classes == ("background", "cat") and data.background == 0
    for name, target in targets(data).items():
        assert (target == (before[name] == 1)).all()


def test_binary_masks_without_values_get_the_two_lines_to_write(flat):
    change_masks(flat, lambda labels: (labels == 1).astype(np.uint8) * 255)
    (flat / "classes.txt").write_text("ground\ncat\n")
    with pytest.raises(InputError, match=r"hold 0 and 255 alone.*\nground 0\ncat 255$"):
        load_data(own(flat))
    (flat / "classes.txt").unlink()
    with pytest.raises(InputError, match=r"no .*classes\.txt: .*\nbackground 0\nobject 255$"):
        load_data(own(flat))


def test_a_few_masks_of_0_and_255_among_empty_ones_are_found(flat):
    """Found wrong once: of 24 masks the first 16 were looked at, and these were the empty ones."""
    (flat / "classes.txt").write_text("ground\ncat\n")
    for index in range(24):
        name = f"normal_{index:02}" if index < 18 else f"tumour_{index:02}"
        mask = np.zeros((48, 64), np.uint8)
        mask[:9] = 255 * (index >= 18)
        write_picture(flat / "images" / f"{name}.jpg", seed=index)
        Image.fromarray(mask).save(flat / "masks" / f"{name}.png")
    for index in range(4):
        (flat / "masks" / f"p{index}.png").unlink()
    with pytest.raises(InputError, match="hold 0 and 255 alone"):
        load_data(own(flat))


@pytest.mark.parametrize("ignored", [False, True])
def test_masks_of_0_and_255_that_were_not_looked_at_first_are_refused(
    flat, monkeypatch, ignored: bool
):
    """More masks are decoded before training than when classes.txt is read."""
    (flat / "classes.txt").write_text("ground\ncat\n")
    change_masks(flat, lambda labels: (labels == 1).astype(np.uint8) * 255)
    Image.new("L", (64, 48)).save(flat / "masks/p0.png")
    monkeypatch.setattr(folder, "LOOKED_AT", 1)
    if ignored:  # what to do where 255 is no object
        (flat / "classes.txt").write_text("ground 0\ncat 1\nignored 255\n")
        load_data(own(flat))
        return
    message = r"hold only 0 and 255, such as .*classes\.txt, NAME VALUE"
    with pytest.raises(InputError, match=message):
        load_data(own(flat))


def test_arbitrary_values_several_a_class_and_above_255(flat):
    (flat / "classes.txt").write_text("low 7 9\nhigh 300 40000\nignored 0\n")
    values = np.array([[7, 300, 0], [9, 40000, 0]])
    before = change_masks(flat, lambda labels: values[labels % 2, labels].astype(np.uint16))
    data = load_data(own(flat))
    for name, target in targets(data).items():
        expected = np.array([0, 1, 255])[before[name]]
        assert (target == expected).all()
    crops = TrainSet(data, data.labelled, WeakAugment(32, ScaleFrom((1.0,))), 0, 0)
    assert set(crops[Key(0, 0, 0)]["target"].unique().tolist()) <= {0, 1, 255}


def test_a_value_of_no_class_is_named(flat):
    (flat / "classes.txt").write_text("background 0\ncat 1\n")
    with pytest.raises(InputError, match=r"p\d\.png: labels 2 in the mask; 0 to 1 and 255"):
        load_data(own(flat))
    (flat / "classes.txt").write_text("background *\ncat 1\n")
    assert all(
        set(np.unique(target)) == {0, 1} for target in targets(load_data(own(flat))).values()
    )


COLOURS = np.array([(0, 0, 0), (128, 64, 128), (250, 0, 3)], np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_masks(flat, mode: str):
    (flat / "classes.txt").write_text("road 128 64 128\nsky 250 0 3\nignored 0 0 0\n")
    before = change_masks(flat, lambda labels: COLOURS[labels])
    for path in (flat / "masks").iterdir():
        image = Image.open(path)
        image = image.quantize(8) if mode == "P" else image.convert(mode)
        image.save(path)
        assert Image.open(path).mode == mode
    data = load_data(own(flat))
    assert data.classes == ("road", "sky") and data.colours == ((128, 64, 128), (250, 0, 3))
    for name, target in targets(data).items():
        assert (target == np.array([255, 0, 1])[before[name]]).all()
    crops = TrainSet(data, data.labelled, WeakAugment(32, ScaleFrom((2.0,))), 0, 0)
    assert set(crops[Key(0, 0, 0)]["target"].unique().tolist()) <= {0, 1, 255}


def test_a_class_may_have_several_colours_and_one_all_others(flat):
    (flat / "classes.txt").write_text("other *\ntwo 128 64 128 250 0 3\n")
    before = change_masks(flat, lambda labels: COLOURS[labels])
    for name, target in targets(load_data(own(flat))).items():
        assert (target == (before[name] > 0)).all()


def test_colours_without_classes_are_listed_as_lines(flat):
    change_masks(flat, lambda labels: COLOURS[labels])
    with pytest.raises(InputError) as error:
        load_data(own(flat))
    lines = str(error.value).splitlines()
    assert "is a mask in colours; give each class its colour, NAME R G B" in lines[0]
    assert {line.split(" ", 1)[1] for line in lines[1:]} == {"0 0 0", "128 64 128", "250 0 3"}
    (flat / "classes.txt").write_text("a 128 64 128\nb 250 0 3\n")
    with pytest.raises(InputError, match=r"colours 0 0 0 in the mask \(3.*belong to no class"):
        load_data(own(flat))
    (flat / "classes.txt").write_text("a 1\nb 2\n")
    with pytest.raises(InputError, match="is a mask in colours"):
        load_data(own(flat))


def test_three_values_a_class_are_values_where_masks_are_grey(flat):
    (flat / "classes.txt").write_text("a 0 5 6\nb 1 2 7\n")
    for path in (flat / "masks").iterdir():
        Image.fromarray(np.array(Image.open(path))).save(path)  # without the palette
    data = load_data(own(flat))
    assert data.colour_map is None
    assert all(set(np.unique(target)) == {0, 1} for target in targets(data).values())


def test_three_values_of_indexed_masks_are_no_colour(flat, capsys):
    """Found wrong once: the line of the README, `cell 7 8 9`, was taken for a colour."""
    (flat / "classes.txt").write_text("background *\nobject 1 2 9\n")
    before = {path.stem: np.array(Image.open(path)) for path in (flat / "masks").iterdir()}
    for name, target in targets(load_data(own(flat))).items():
        assert (target == (before[name] > 0)).all()
    assert "holds" not in capsys.readouterr().err


def test_255_belongs_to_a_class_that_takes_the_rest(flat):
    """Found wrong once: 255 stayed ignored, and the class was trained on nothing."""
    (flat / "classes.txt").write_text("background 0\ncell *\n")
    before = change_masks(flat, lambda labels: (labels == 1).astype(np.uint8) * 255)
    for name, target in targets(load_data(own(flat))).items():
        assert (target == (before[name] == 1)).all()


@pytest.mark.parametrize(("line", "said"), [("cell *", True), ("ignored *", False)])
def test_a_class_for_the_rest_that_occurs_nowhere_is_said(flat, capsys, line: str, said: bool):
    (flat / "classes.txt").write_text(f"a 0\nb 1\nc 2\n{line}\n")
    load_data(own(flat))
    assert ("none of the masks that were looked at holds cell" in capsys.readouterr().err) == said


def test_classes_that_occur_nowhere_are_said(flat, capsys):
    (flat / "classes.txt").write_text("background *\nobject 1 2\nmoon 77\n")
    datasets.load(own(flat))
    assert "none of the masks that were looked at holds moon" in capsys.readouterr().err


def test_grey_and_colour_masks_may_be_mixed_up(flat):
    """Found ending in a traceback once."""
    mask = np.array(Image.open(flat / "masks/p0.png"))
    Image.fromarray(COLOURS[mask]).save(flat / "masks/p0.png")
    Image.fromarray(np.array(Image.open(flat / "masks/p1.png"))).save(flat / "masks/p1.png")
    with pytest.raises(InputError, match=r"p0\.png is a mask in colours"):
        datasets.load(own(flat))


def test_large_masks_are_looked_at_in_part(flat, monkeypatch):
    monkeypatch.setattr(folder, "LOOKED_AT_PIXELS", 100)
    assert len(folder.some_pixels(np.zeros((48, 64, 3)))) <= 100
    assert folder.colours_in(np.full((48, 64, 3), 7, np.uint8)).keys() == {(7, 7, 7)}
    assert folder.values_in(np.full((48, 64), 300, np.uint16)).keys() == {300}


def test_masks_with_the_first_class_and_borders_alone_are_a_note(flat, capsys):
    for index in range(2):
        write_picture(flat / f"images/val/v{index}.jpg", seed=30 + index)
        mask = np.zeros((48, 64), np.uint8)
        mask[:2] = 255
        (flat / "masks/val").mkdir(exist_ok=True)
        Image.fromarray(mask).save(flat / f"masks/val/v{index}.png")
    load_data(own(flat))
    assert "hold only the first class and ignored pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 7 8 *\nb 0\n", "numbers or \\*, not both"),
        ("a 0\nb\n", "a with values and b without"),
        ("type 1\ntype 2\n", "names type twice; the values of a class stand in one line"),
        ("a 0 1\nb 1\n", "1 more than once"),
        ("a *\nb *\n", "more than one line ends with"),
        ("a 0\nb 70000\n", "the value 70000 is above 65535"),
        ("a 0\nignored 255\n", "names 1 classes"),
        ("only\n", "names 1 classes; .*what is no object is a class, too"),
    ],
)
def test_classes_that_cannot_be_understood(flat, text: str, message: str):
    (flat / "classes.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        load_data(own(flat))


def test_names_may_hold_spaces():
    assert parse_line("traffic light 7 8").name == "traffic light"
    assert parse_line("traffic light 7 8").numbers == (7, 8)
    assert parse_line("traffic light").numbers == ()
    assert parse_line("12").name == "12"
    assert parse_line("cell 255, 254").numbers == (255, 254)
    assert parse_line("cars, trucks 3").name == "cars, trucks"
    assert parse_line("all else *").rest


# ---------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("suffix", [".tif", ".bmp", ".webp", ".TIFF"])
def test_images_of_further_formats(flat, suffix: str):
    pixels = {}
    for path in sorted((flat / "images").iterdir()):
        image = Image.open(path)
        options = {"lossless": True} if suffix == ".webp" else {}
        image.save(path.with_suffix(suffix), **options)
        pixels[path.stem] = np.array(image)
        path.unlink()
    data = load_data(own(flat))
    samples = EvalSet(data, data.labelled + data.unlabelled)
    for index in range(len(samples)):
        assert (samples[index]["image"].numpy() == pixels[samples[index]["name"]]).all()
    whole = next((flat / "images").iterdir())
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(InputError, match=rf"{whole.name}: cannot be (decoded|read)"):
        load_data(own(flat))


@pytest.mark.parametrize("suffix", [".tif", ".bmp"])
def test_masks_of_further_formats(flat, suffix: str):
    before = {}
    for path in sorted((flat / "masks").iterdir()):
        before[path.stem] = np.array(Image.open(path))
        Image.open(path).save(path.with_suffix(suffix))
        path.unlink()
    for name, target in targets(load_data(own(flat))).items():
        assert (target == before[name]).all()


@pytest.mark.parametrize("values", [(0, 2), (2,), (0, 255), (0, 1, 2, 255)])
def test_a_gif_of_greys_holds_its_greys(flat, values: tuple[int, ...]):
    """Found wrong once: its writers number the palette anew, by the values that occur."""
    for path in sorted((flat / "masks").iterdir()):
        mask = np.resize(np.array(values, np.uint8), (48, 64))
        Image.fromarray(mask).save(path.with_suffix(".gif"))
        path.unlink()
    (flat / "classes.txt").write_text("background 0\ncat 2\ndog 255\nbird 1\n")
    number = {0: 0, 2: 1, 255: 2, 1: 3}
    for target in targets(load_data(own(flat))).values():
        assert (target == np.resize([number[value] for value in values], (48, 64))).all()


def test_a_gif_in_colours_needs_colours(flat):
    palette = [0, 0, 0, 128, 0, 0, 0, 128, 0]
    before = {}
    for path in sorted((flat / "masks").iterdir()):
        mask = Image.open(path)
        before[path.stem] = np.array(mask)
        mask.putpalette(palette)
        mask.save(path.with_suffix(".gif"))
        path.unlink()
    with pytest.raises(InputError, match="is a mask in colours"):
        load_data(own(flat))
    (flat / "classes.txt").write_text("background 0 0 0\ncat 128 0 0\ndog 0 128 0\n")
    for name, target in targets(load_data(own(flat))).items():
        assert (target == before[name]).all()


def test_all_files_that_cannot_be_read_are_named_together(flat):
    """Found wrong once: what looks at images and masks before stopped at the first."""
    for index in range(4):
        (flat / f"masks/p{index}.png").write_bytes(b"no image")
    (flat / "images/p9.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"^5 images or masks cannot be used: "):
        load_data(own(flat))
    flags = ["--data", "folder", "--data-dir", str(flat), "--device", "cpu"]
    assert supervised.parse_args(flags).crop_size == 64
    for path in (flat / "images").iterdir():
        path.write_bytes(b"no image")
    supervised.parse_args(flags)


def test_masks_of_two_or_four_bits_are_refused_first(flat):
    """Found wrong once: lines of classes.txt were suggested that were refused next."""
    for path in (flat / "masks").iterdir():
        write_png(path, bytes(17 * 48), (64, 48), bits=2, colour_type=0)
    (flat / "classes.txt").unlink()
    with pytest.raises(InputError, match=r"classes\.txt: a class a line") as error:
        load_data(own(flat))
    assert "could be" not in str(error.value)
    (flat / "classes.txt").write_text("background\ncat\n")
    with pytest.raises(InputError, match="the mask has fewer than 8 bits a pixel"):
        load_data(own(flat))


def test_a_turned_tiff_is_turned_once(tmp_path):
    """PIL turns a TIFF by itself, and no other format."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "a.tif", exif=exif)
    image = open_image(tmp_path / "a.tif")
    assert image.size == (20, 30)
    assert (image.pixels().numpy() == np.rot90(pixels, -1)).all()


def test_16_bit_grey_is_scaled_by_the_sets_own_range(flat):
    """A camera of 12 bits: divided by 256 its images would be almost black."""
    generator = np.random.default_rng(0)
    for path in sorted((flat / "images").iterdir()):
        values = generator.integers(100, 4096, (48, 64)).astype(np.uint16)
        values[0, 0] = 65535  # a hot pixel
        Image.fromarray(values).save(path.with_suffix(".png"))
        path.unlink()
    data = load_data(own(flat))
    low, high = data.grey_range
    assert 100 <= low < 120 and 4070 < high <= 4096
    image = EvalSet(data, data.labelled)[0]["image"].numpy()
    stored = np.array(Image.open(data.labelled[0].image)).astype(float)
    expected = ((stored - low) / (high - low) * 255).clip(0, 255)
    assert abs(image[..., 0] - expected).max() < 1.01 and (image == image[..., :1]).all()
    assert image.max() == 255 and image.min() == 0


def write_png(path, rows: bytes, size: tuple[int, int], bits: int, colour_type: int) -> None:
    """A PNG of a kind that PIL cannot write; each row begins with a zero byte."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", *size, bits, colour_type, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def write_deep_png(path, samples: np.ndarray) -> None:
    """A PNG of 16 bits a channel, (H,W,C) uint16, C from 2 to 4."""
    height, width, channels = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    write_png(path, rows, (width, height), 16, {2: 4, 3: 2, 4: 6}[channels])


def write_tiff(path, samples: np.ndarray) -> None:
    """A TIFF of (H,W,C) uint8 or uint16, C from 2 to 4; of 2 or 4 bands the last is not alpha."""
    height, width, bands = samples.shape
    content = samples.tobytes()
    bits = struct.pack(f"<{bands}H", *[8 * samples.itemsize] * bands)
    colours = 3 if bands > 2 else 1
    start = 8 + len(bits)
    where = struct.unpack("<I", bits)[0] if len(bits) == 4 else 8  # itself, or its place
    short, long = 3, 4
    tags = [
        (256, long, 1, width), (257, long, 1, height), (258, short, bands, where),
        (259, long, 1, 1), (262, long, 1, 2 if colours == 3 else 1), (273, long, 1, start),
        (277, long, 1, bands), (278, long, 1, height), (279, long, 1, len(content)),
    ]  # fmt: skip
    if bands > colours:
        tags.append((338, short, 1, 0))
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<I", start + len(content))
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(head + bits + content + directory)


def test_16_bits_in_colour_or_with_alpha_are_noted(flat, capsys):
    """Found wrong once: images of 12 bits were almost black, without a word."""
    load_data(own(flat))
    assert "16 bits" not in capsys.readouterr().err
    samples = np.random.default_rng(0).integers(0, 4096, (48, 64, 4)).astype(np.uint16)
    for index, channels in enumerate((2, 3, 4)):
        (flat / f"images/p{index}.jpg").unlink()
        write_deep_png(flat / f"images/p{index}.png", samples[..., :channels])
    (flat / "images/p3.jpg").unlink()
    write_tiff(flat / "images/p3.tif", samples[..., :3])
    Image.fromarray(samples[..., 0]).save(flat / "images/grey.png")
    load_data(own(flat))
    said = capsys.readouterr().err
    assert "of 4 images with 16 bits a channel" in said and "grey.png" not in said
    assert all(f"p{index}.{'tif' if index == 3 else 'png'}" in said for index in range(4))


def test_bands_that_are_not_read_are_noted(flat, capsys):
    """Found wrong once: of two channels of a microscope one was read, without a word."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(flat / "images/rgb.tif")
    Image.fromarray(pixels).convert("RGBA").save(flat / "images/alpha.tif")
    Image.fromarray(pixels[..., 0]).save(flat / "images/grey.tif")
    write_tiff(flat / "images/two.tif", pixels[..., :2])
    write_tiff(flat / "images/infrared.tif", np.dstack([pixels, pixels[..., 0]]))
    load_data(own(flat))
    said = capsys.readouterr().err
    assert "2 TIFFs have more bands than are read" in said
    assert "two.tif" in said and "infrared.tif" in said


def test_kinds_of_tiff_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II*\0" + bytes(64))
    with pytest.raises(InputError, match=r"a\.tif: cannot be read \(a kind of TIFF"):
        open_image(tmp_path / "a.tif")


def test_the_range_is_no_matter_of_8_bit_images(flat, monkeypatch):
    monkeypatch.setattr(check, "some_values", lambda path: pytest.fail("decoded"))
    assert load_data(own(flat)).grey_range == (0, 65535)


def test_images_without_numbers_are_named(flat):
    for path in sorted((flat / "images").iterdir()):
        Image.fromarray(np.full((48, 64), np.nan, np.float32)).save(path.with_suffix(".tif"))
        path.unlink()
    with pytest.raises(InputError, match=r"p0\.tif: no pixel has a value that is a number"):
        load_data(own(flat))


def test_floats_have_a_range_too(flat):
    for path in sorted((flat / "images").iterdir()):
        values = np.random.default_rng(1).normal(0, 1, (48, 64)).astype(np.float32)
        values[0, 0] = np.nan
        Image.fromarray(values).save(path.with_suffix(".tif"))
        path.unlink()
    low, high = load_data(own(flat)).grey_range
    assert -4.5 < low < -2.5 and 2.5 < high < 4.5


# ------------------------------------------------------------------------------------- shrinking


def test_large_images_are_shrunk_with_their_masks(flat):
    for index in range(2):
        write_picture(flat / "images" / f"p{index}.jpg", (640, 480), seed=index)
        write_mask(flat / "masks" / f"p{index}.png", 3, (640, 480), seed=index)
    data = load_data(own(flat, long_side=64, split="all", val_fraction=0.5))
    for sample in (EvalSet(data, data.labelled + data.val)[index] for index in range(4)):
        assert sample["image"].shape == (48, 64, 3) and sample["target"].shape == (48, 64)
    batches = list(equal_size_loader(data, data.labelled + data.val, own(flat)))
    assert [batch["image"].shape[0] for batch in batches] == [4]
    sample = TrainSet(data, data.labelled, WeakAugment(32, ScaleFrom((1.0,))), 0, 0)[Key(0, 0, 0)]
    assert sample["image"].shape == (32, 32, 3) and sample["valid_mask"].all()


def test_a_comparison_shows_images_as_the_runs_have_seen_them(flat, begin, monkeypatch):
    """Found wrong once: networks of small images were shown large ones."""
    for path in (flat / "images").iterdir():
        write_picture(path, (640, 480))
    for path in (flat / "masks").iterdir():
        write_mask(path, 3, (640, 480))
    flags = ("--data-dir", str(flat), "--long-side", "64", "--crop-size", "32", "--max-iters", "1")
    run = begin(supervised, "--data", "folder", *flags)
    network = run.place(DeepLabV3Plus.from_settings(run.args, 3))
    run.keep(result="model", model=network, optimizer=sgd([network], run.args))
    run.save()
    shown = []
    monkeypatch.setattr(figures, "grid", lambda columns, *_: shown.append(columns))
    figures.side_by_side({"SupOnly": run.book.folder}, flat / "figure.png")
    assert {image.shape for images in shown[0].values() for image in images} == {(48, 64, 3)}


def test_a_shrunk_mask_has_the_label_under_the_centre_of_each_pixel(tmp_path):
    Image.fromarray(np.arange(36, dtype=np.uint8).reshape(6, 6)).save(tmp_path / "m.png")
    mask = Shrunk(open_image(tmp_path / "m.png"), (2, 2))
    assert mask.values().tolist() == [[7, 10], [25, 28]]
    assert mask.values((1, 0, 2, 2)).tolist() == [[10], [28]]


def test_a_shrunk_image_is_antialiased(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).convert("RGB").save(tmp_path / "a.png")
    pixels = Shrunk(open_image(tmp_path / "a.png"), (16, 16)).pixels()
    assert pixels.shape == (16, 16, 3) and abs(pixels.float() - 127.5).max() < 12
    assert working_size((4000, 3000), 512) == (512, 384) and working_size((40, 30), 512) == (40, 30)
    assert working_size((40, 30), None) == (40, 30)


def test_pseudo_masks_of_shrunk_images_have_their_size(flat, tmp_path):
    from common.data import read
    from common.masks import write_mask as write_labels
    from common.source import Item

    write_picture(flat / "images/p9.jpg", (640, 480))
    data = load_data(own(flat, long_side=64))
    write_labels(tmp_path / "pseudo.png", torch.zeros(48, 64), data.colours)
    item = Item("p9", flat / "images/p9.jpg", tmp_path / "pseudo.png", pseudo=True)
    image, mask = read(item, data)
    assert image.size == mask.size == (64, 48)
    assert isinstance(open_mask(item.mask, image).values(), np.ndarray)


# ------------------------------------------------------------------------- what is chosen, and why


def parsed(script, root, *flags: str):
    """The settings of a script for the user's own data on a CPU."""
    return script.parse_args(
        ["--data", "folder", "--data-dir", str(root), "--device", "cpu", "-j", "0", *flags]
    )


def test_settings_fit_a_dozen_images_on_a_cpu(flat):
    args = parsed(cps, flat)
    assert (args.backbone, args.weights, args.long_side) == ("tiny", "blots", None)
    assert (args.crop_size, args.output_stride) == (64, 8)
    assert args.max_iters == 1000 and args.eval_iters == 250
    assert args.reasons[0] == "for 10 images, up to 64x48, on a CPU; each is a flag, too"
    assert any("crop_size 64, by the short side" in line for line in args.reasons)


def test_settings_fit_large_images(flat):
    for path in (flat / "images").iterdir():
        write_picture(path, (3000, 2000))
    args = parsed(u2pl, flat)
    assert (args.long_side, args.crop_size, args.output_stride) == (512, 192, 16)
    assert args.scale == "0.5,0.75,1"
    args = parsed(u2pl, flat, "--backbone", "resnet18", "--weights", "none")
    assert (args.long_side, args.crop_size, args.max_iters) == (2048, 512, 4000)
    assert args.backbone == "resnet18" and args.lr == u2pl.PRESETS["folder"]["lr"]


def test_a_flag_wins_over_what_is_chosen(flat):
    flags = ("--crop-size", "32", "--max-iters", "7", "--scale", "1", "--long-side", "48")
    args = parsed(cps, flat, *flags)
    assert (args.crop_size, args.max_iters, args.scale, args.long_side) == (32, 7, "1", 48)
    assert args.eval_iters == 2
    assert not any("max_iters" in line or "crop_size" in line for line in args.reasons)


def test_epochs_of_ones_own_have_evaluations_on_the_way(flat):
    """Ten images in batches of 8: an epoch is an iteration."""
    assert parsed(cps, flat, "--epochs", "40").eval_iters == 10


def test_the_number_of_images_decides_the_length(flat, monkeypatch):
    from common import own_preset

    many = {f"x{index}": flat / "images/p0.jpg" for index in range(1200)}
    monkeypatch.setattr(own_preset, "images_in", lambda folder: many)
    assert parsed(cps, flat).max_iters == 20 * 1200 // 8
    monkeypatch.setattr(own_preset.torch.cuda, "is_available", lambda: True)
    args = cps.parse_args(["--data", "folder", "--data-dir", str(flat), "-j", "0"])
    assert (args.device, args.backbone, args.max_iters) == ("cuda", "resnet50", 9000)


def test_images_smaller_than_a_crop_can_start(flat):
    for path in (flat / "images").iterdir():
        write_picture(path, (20, 20))
    assert parsed(cps, flat).crop_size == 32


def test_a_run_is_not_resumed_with_other_images_for_validation(flat, begin):
    """A new mask changes what is drawn, but not for a run that goes on."""
    (flat / "list.txt").write_text("p0\np1\n")
    folder = ("--data", "folder", "--data-dir", str(flat), "--max-iters", "3")
    run = begin(supervised, *folder, "--labelled-list", str(flat / "list.txt"))
    again = supervised.parse_args(["--resume", run.args.output_dir])
    for index in (4, 5, 6, 7, 8, 9):
        write_mask(flat / "masks" / f"p{index}.png", 3, seed=index)
    assert load_data(again).val_hash == run.data.val_hash
    again.resume = False
    assert load_data(again).val_hash != run.data.val_hash

    again.resume = True
    (flat / "masks" / f"{run.data.val[0].name}.png").unlink()
    with pytest.raises(InputError, match="other images for validation"):
        Run(again)


def test_the_range_of_a_resumed_run_stays(flat, begin):
    for path in sorted((flat / "images").iterdir()):
        values = np.full((48, 64), 1000 * int(path.stem[1:]), np.uint16)
        Image.fromarray(values).save(path.with_suffix(".png"))
        path.unlink()
    run = begin(supervised, "--data", "folder", "--data-dir", str(flat), "--max-iters", "3")
    (flat / "images/p9.png").unlink()
    again = load_data(supervised.parse_args(["--resume", run.args.output_dir]))
    assert again.grey_range == run.data.grey_range == (0, 9000)


def test_the_range_of_a_first_stage_that_is_resumed_stays(tmp_path):
    """Found wrong once: while that trains, the folder of the whole run knows no range."""
    for place, more in ((tmp_path, {}), (tmp_path / "stage-1", {"grey_range": [7, 9000]})):
        place.mkdir(exist_ok=True)
        description = {"args": {"method": "stpp"}, **more}
        (place / "args.json").write_text(json.dumps(description))
    args = settings(resume=True, output_dir=str(tmp_path))
    assert known_grey_range(args) == (7, 9000)


def test_a_resumed_run_chooses_nothing_anew(flat, begin):
    run = begin(supervised, "--data", "folder", "--data-dir", str(flat), "--max-iters", "3")
    for index in range(20, 40):
        write_picture(flat / "images" / f"p{index}.jpg", (300, 200), seed=index)
    again = supervised.parse_args(["--resume", run.args.output_dir])
    for key, value in vars(run.args).items():
        if key != "resume":
            saved = list(value) if isinstance(value, tuple) else value
            assert getattr(again, key) == saved, key
