"""Labels of COCO and LabelMe become the masks that `--data folder` reads."""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import damage, run, settings, write_picture
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from common import InputError, annotations, datasets, import_labels
from common.masks import read_mask

# Of COCO's code with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZE = (64, 48)
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
SQUARE = [[10, 10, 30, 10, 30, 20, 10, 20]]  # 20 x 10 pixels
BIG = [[5, 5, 45, 5, 45, 40, 5, 40]]


def dump(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def coco_file(
    root: Path,
    regions: dict[str, list],
    categories: list[dict] = CATEGORIES,
    size: tuple[int, int] = SIZE,
    images: bool = True,
) -> Path:
    """A COCO file: file name -> (category id, segmentation) of its annotations, and the images."""
    content = {"images": [], "annotations": [], "categories": categories}
    for number, (name, parts) in enumerate(regions.items(), start=1):
        if images:
            write_picture(root / "images" / name, seed=number)
        entry = {"id": number, "file_name": name, "width": size[0], "height": size[1]}
        content["images"].append(entry)
        for category, segmentation in parts:
            annotation = {"id": len(content["annotations"]) + 1, "image_id": number}
            annotation |= {"category_id": category, "segmentation": segmentation}
            content["annotations"].append(annotation | {"bbox": [1, 1, 5, 5], "iscrowd": 0})
    return dump(root / "labels.json", content)


def shape(label: str, kind: str, points: list, **more) -> dict:
    return {"label": label, "shape_type": kind, "points": points, **more}


def labelme_file(path: Path, shapes: list[dict], image: str = "", **more) -> Path:
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": image}
    size = {"imageWidth": SIZE[0], "imageHeight": SIZE[1]}
    return dump(path, {**content, **size, "imageData": "not looked at", **more})


def png(values: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(content, format="PNG")
    return base64.b64encode(content.getvalue()).decode()


def convert(labels: Path, root: Path, *flags: str) -> None:
    import_labels.main([str(labels), str(root), *map(str, flags)])


def mask_of(root: Path, name: str = "a") -> np.ndarray:
    return read_mask(root / "masks" / f"{name}.png").numpy()


def classes_of(root: Path) -> list[str]:
    return (root / "classes.txt").read_text().splitlines()


def refuses(match: str, labels: Path, root: Path, *flags: str) -> None:
    """The import ends with this message, and nothing was written."""
    before = sorted(root.rglob("*"))
    with pytest.raises(InputError, match=match):
        convert(labels, root, *flags)
    assert sorted(root.rglob("*")) == before


def disc() -> np.ndarray:
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    return (((x - 40) ** 2 + (y - 20) ** 2) < 150).astype(np.uint8)


def rle(mask: np.ndarray, compressed: bool) -> dict:
    """A mask as COCO writes it: as text by COCO's own code, or as lengths of runs down columns."""
    if compressed:
        encoded = coco_mask.encode(np.asfortranarray(mask))
        return {**encoded, "counts": encoded["counts"].decode()}
    pixels = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(pixels)) + 1
    lengths = np.diff([0, *ends, pixels.size]).tolist()
    return {"size": list(mask.shape), "counts": ([0] if pixels[0] else []) + lengths}


# ------------------------------------------------------------------------------------------- COCO


def test_a_polygon_covers_its_area_and_the_rest_is_background(tmp_path):
    convert(coco_file(tmp_path, {"a.jpg": [(7, SQUARE)]}), tmp_path)
    assert classes_of(tmp_path) == ["background", "cat", "dog"]  # by id
    mask = mask_of(tmp_path)
    assert mask.shape == SIZE[::-1]
    assert (mask == 2).sum() == 200 and (mask[10:20, 10:30] == 2).all()
    assert (mask == 0).sum() == mask.size - 200


def test_the_parts_of_an_annotation_are_one_region(tmp_path):
    parts = [*SQUARE, [40, 30, 50, 30, 50, 40, 40, 40]]
    convert(coco_file(tmp_path, {"a.jpg": [(3, parts)]}), tmp_path)
    assert (mask_of(tmp_path) == 1).sum() == 300


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("inverted", [True, False])
def test_both_kinds_of_rle_are_decoded(tmp_path, compressed: bool, inverted: bool):
    mask = 1 - disc() if inverted else disc()
    region = rle(mask, compressed)
    assert np.array_equal(coco_mask.decode(coco_mask.encode(np.asfortranarray(mask))), mask)
    convert(coco_file(tmp_path, {"a.jpg": [(3, region)]}), tmp_path)
    assert np.array_equal(mask_of(tmp_path), mask)


def test_run_lengths_are_those_that_coco_encodes():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = (rng.random((90, 70)) < share).astype(np.uint8)
        text = rle(mask, compressed=True)["counts"]
        assert annotations.run_lengths(text) == rle(mask, compressed=False)["counts"]


def test_a_crowd_is_of_its_class(tmp_path):
    path = coco_file(tmp_path, {"a.jpg": [(3, rle(disc(), compressed=False))]})
    content = json.loads(path.read_text())
    content["annotations"][0]["iscrowd"] = 1
    convert(dump(path, content), tmp_path)
    assert np.array_equal(mask_of(tmp_path), disc())


@pytest.mark.parametrize("first", ["small", "large"])
def test_a_small_region_is_seen_on_a_large_one(tmp_path, first: str):
    regions = [(3, SQUARE), (7, BIG)]
    convert(
        coco_file(tmp_path, {"a.jpg": regions if first == "small" else regions[::-1]}), tmp_path
    )
    mask = mask_of(tmp_path)
    assert (mask == 1).sum() == 200 and (mask == 2).sum() == 40 * 35 - 200


def test_annotations_without_a_region_are_counted(tmp_path, capsys):
    regions = [(3, SQUARE), (7, []), (7, None), (7, [[1, 1, 9, 9]]), (7, [*BIG, [1, 2]])]
    labels = coco_file(tmp_path, {"a.jpg": regions, "b.jpg": [(3, [])]})
    convert(labels, tmp_path, "--empty", "background")  # which b.jpg is not
    printed = capsys.readouterr().out
    assert "note: 3 annotations without a segmentation" in printed
    assert "note: 2 polygons of fewer than 3 points" in printed
    assert "note: 1 images get no mask, since none of their annotations can be drawn" in printed
    assert set(np.unique(mask_of(tmp_path))) == {0, 1, 2}
    assert not (tmp_path / "masks" / "b.png").exists()


def test_a_file_of_boxes_alone_is_refused(tmp_path):
    labels = coco_file(tmp_path, {"a.jpg": [(3, []), (7, None)]})
    refuses("holds boxes only", labels, tmp_path)
    refuses("no annotation", coco_file(tmp_path, {"a.jpg": []}), tmp_path)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [48, 64], "counts": [100, 5]}, "annotation 1: an RLE of 105 pixels"),
        ({"size": [48, 64], "counts": [-1, 48 * 64 + 1]}, "no whole numbers"),
        ({"size": [64, 48], "counts": [48 * 64]}, r"\[64, 48\] instead of \[48, 64\]"),
        ({"size": [48, 64], "counts": ""}, "an RLE of 0 pixels"),
        ({"size": [48, 64]}, 'without "counts"'),
        ([[1, 2, 3, 4, 5, 6, 7]], "odd number"),
        ([[1, 2, 3, 4, 5, float("nan")]], "no numbers"),
        ([[1, 2, 3, 4, 5, 1e9]], "far off"),
        ([[1, 2, 3, 4, 5, "x"]], "could not convert"),
        ([1, 2, 3, 4, 5, 6], "neither a list of polygons nor an RLE"),
    ],
)
def test_a_broken_segmentation_is_named(tmp_path, segmentation, message: str):
    refuses(message, coco_file(tmp_path, {"a.jpg": [(3, segmentation)]}), tmp_path)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("annotations", {"image_id": 9}, "annotation 1: of an image or a category"),
        ("annotations", {"category_id": 9}, "annotation 1: of an image or a category"),
        ("annotations", {"category_id": None}, '"category_id" is missing'),
        ("images", {"file_name": None}, '"file_name" is missing'),
        ("images", {"width": -3}, "must be positive"),
        ("categories", {"id": 3}, "two categories have the id 3"),
        ("categories", {"name": " "}, "no name"),
    ],
)
def test_a_broken_coco_file_is_named(tmp_path, part: str, change: dict, message: str):
    path = coco_file(tmp_path, {"a.jpg": [(3, SQUARE)]})
    content = json.loads(path.read_text())
    content[part][0].update(change)
    refuses(rf"labels\.json: .*{message}", dump(path, content), tmp_path)


def test_entries_of_one_file_are_one_image(tmp_path):
    path = coco_file(tmp_path, {"a.jpg": [(7, SQUARE)]})
    content = json.loads(path.read_text())
    content["images"].append({**content["images"][0], "id": 2, "file_name": "./a.jpg"})
    content["annotations"].append({**content["annotations"][0], "image_id": 2, "category_id": 3})
    content["annotations"][1]["segmentation"] = BIG
    convert(dump(path, content), tmp_path)
    assert set(np.unique(mask_of(tmp_path))) == {0, 1, 2}

    content["images"][1]["width"] = 10
    refuses("have different sizes", dump(path, content), tmp_path, "--overwrite")
    content["images"][1].update(id=1, file_name="b.jpg")
    refuses("have the same id 1", dump(path, content), tmp_path, "--overwrite")


def test_without_pycocotools_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    labels = coco_file(tmp_path, {"a.jpg": [(3, SQUARE)]})
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    refuses("pip install pycocotools", labels, tmp_path)


# ---------------------------------------------------------------------------------------- LabelMe


def test_labelme_shapes_are_drawn_in_their_order(tmp_path):
    write_picture(tmp_path / "images" / "a.jpg")
    shapes = [
        shape("rectangle", "rectangle", [[30, 20], [10, 10]]),  # corners may be any two
        shape("polygon", "polygon", [[20, 10], [40, 10], [40, 20], [20, 20]]),
        shape("circle", "circle", [[50, 35], [53, 39]]),  # radius 5
        {"label": "old", "points": [[1, 30], [9, 30], [9, 38], [1, 38]]},
        shape("turned", "oriented_rectangle", [[30, 30], [35, 35], [30, 40], [25, 35]]),
    ]
    convert(labelme_file(tmp_path / "labels" / "a.json", shapes), tmp_path, "--rest", "ignored")
    names = classes_of(tmp_path)
    assert names == ["circle", "old", "polygon", "rectangle", "turned"]
    mask = mask_of(tmp_path)
    assert (mask[10:21, 20:41] == names.index("polygon")).all()  # on the rectangle, rims included
    assert (mask[10:21, 10:20] == names.index("rectangle")).all()
    assert (mask[30:39, 1:10] == names.index("old")).all()
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    distance = np.hypot(x - 50, y - 35)
    assert (mask[distance <= 4.5] == 0).all() and (mask[(distance > 6) & (x > 42)] == 255).all()
    assert (mask == names.index("turned")).sum() == 61  # a rhombus, 1 + 3 + ... + 11 + ... + 1


def test_a_labelme_mask_lies_at_its_corner(tmp_path):
    write_picture(tmp_path / "images" / "a.jpg")
    part = disc()[10:31, 30:51]
    points = [[30, 10], [50, 30]]
    shapes = [shape("thing", "mask", points, mask=png(part))]
    convert(labelme_file(tmp_path / "a.json", shapes), tmp_path)
    expected = np.zeros(SIZE[::-1], np.uint8)
    expected[10:31, 30:51] = part
    assert np.array_equal(mask_of(tmp_path), expected)


@pytest.mark.parametrize(
    ("points", "rows", "columns"),
    [
        ([[60, 44], [69, 53]], (44, 48), (60, 64)),  # across the lower right corner
        ([[-5, -6], [4, 3]], (0, 4), (0, 5)),
        ([[10, 10], [14, 16]], (10, 17), (10, 15)),  # LabelMe cuts off at whole corners
        ([[9.6, 10.4], [14, 16]], (10, 20), (10, 20)),  # and rounds others
    ],
)
def test_a_labelme_mask_is_cut_off(tmp_path, points: list, rows: tuple, columns: tuple):
    write_picture(tmp_path / "images" / "a.jpg")
    shapes = [shape("thing", "mask", points, mask=png(np.full((10, 10), 255)))]
    convert(labelme_file(tmp_path / "a.json", shapes), tmp_path)
    expected = np.zeros(SIZE[::-1], np.uint8)
    expected[slice(*rows), slice(*columns)] = 1
    assert np.array_equal(mask_of(tmp_path), expected)


def test_labelme_shapes_without_an_area_are_counted(tmp_path, capsys):
    write_picture(tmp_path / "images" / "a.jpg")
    shapes = [
        shape("thing", "rectangle", [[10, 10], [30, 20]]),
        shape("end", "point", [[1, 1]]),
        shape("end", "line", [[1, 1], [9, 9]]),
        shape("end", "line", [[1, 1], [9, 9]]),
        shape("end", "polygon", [[1, 1], [9, 9]]),
    ]
    convert(labelme_file(tmp_path / "a.json", shapes), tmp_path)
    printed = capsys.readouterr().out
    assert "note: 3 shapes without an area are left out: 2 line, 1 point" in printed
    assert "note: 1 polygons of fewer than 3 points" in printed
    assert classes_of(tmp_path) == ["background", "thing"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (shape("x", "ellipse", [[1, 1], [9, 9]]), "shape 1: unknown shape_type ellipse"),
        (shape("x", "circle", [[1, 1]]), "shape 1: a circle of 1 points"),
        (shape("x", "rectangle", [[1, 1], [2]]), "shape 1: not enough values"),
        (shape("x", "rectangle", [[1, 1], [2, None]]), "shape 1"),
        (shape("x", "rectangle", [[1, 1], [2, float("inf")]]), "shape 1: .*far off"),
        (shape("x", "mask", [[1, 1], [2, 2]]), "shape 1: its mask is no PNG"),
        (shape("x", "mask", [[1, 1], [2, 2]], mask="AAAA"), "shape 1: its mask is no PNG"),
        (
            shape("x", "mask", [[9, 9], [2, 2]], mask=png(np.ones((2, 2)))),
            "shape 1: its first point",
        ),
        (
            shape("x", "mask", [[1, 1], [2, 2]], mask=png(np.ones((2, 2, 3)))),
            "shape 1: its mask is in colour",
        ),
        ({"label": "x"}, '"points" is missing'),
        ("x", '"points" is missing'),
        (shape(None, "rectangle", [[1, 1], [9, 9]]), '"label" is missing'),
    ],
)
def test_a_broken_shape_is_named(tmp_path, broken, message: str):
    write_picture(tmp_path / "images" / "a.jpg")
    labels = labelme_file(tmp_path / "a.json", [broken])
    refuses(rf"a\.json: {message}", labels, tmp_path)


def test_labelme_names_for_background_and_ignored(tmp_path):
    write_picture(tmp_path / "images" / "a.jpg")
    shapes = [
        shape("thing", "rectangle", [[10, 10], [29, 19]]),
        shape("_background_", "rectangle", [[10, 10], [14, 14]]),
        shape("background", "rectangle", [[10, 15], [14, 19]]),
        shape("__ignore__", "rectangle", [[20, 10], [29, 19]]),
    ]
    convert(labelme_file(tmp_path / "a.json", shapes), tmp_path)
    assert classes_of(tmp_path) == ["background", "thing"]
    mask = mask_of(tmp_path)
    assert (mask == 1).sum() == 50 and (mask == 255).sum() == 100


# ----------------------------------------------------------------------------- where the images are


def test_images_are_found_in_subfolders(tmp_path):
    for name in ("labelled/x", "val/deep/y", "val/z", "w"):
        write_picture(tmp_path / "images" / f"{name}.jpg")
    regions = [(3, SQUARE)]
    listed = {
        "labelled/x.jpg": regions,  # the path below DIR/images
        "some/where/val/deep/y.png": regions,  # its tail, whatever the suffix
        "train2017\\z.jpg": regions,  # the bare name
        "w.jpg": regions,
    }
    convert(coco_file(tmp_path, listed, images=False), tmp_path)
    for name in ("labelled/x", "val/deep/y", "val/z", "w"):
        assert (mask_of(tmp_path, name) == 1).sum() == 200


def test_labelme_files_lie_beside_the_images_or_in_a_like_tree(tmp_path):
    write_picture(tmp_path / "images" / "street" / "a.jpg")
    write_picture(tmp_path / "images" / "park" / "a.jpg")
    write_picture(tmp_path / "images" / "b.jpg")
    thing = [shape("thing", "rectangle", [[10, 10], [29, 19]])]
    other = [shape("other", "rectangle", [[10, 10], [29, 19]])]
    # The place of the file counts for more than the path that it names.
    labelme_file(tmp_path / "images" / "street" / "a.json", thing, "..\\park\\a.jpg")
    convert(tmp_path / "images" / "street", tmp_path, "--classes", "thing")
    assert (mask_of(tmp_path, "street/a") == 1).sum() == 200

    labels = tmp_path / "labels"
    labelme_file(labels / "park" / "a.json", other)
    labelme_file(labels / "17.json", thing, "..\\images\\b.jpg")
    labelme_file(labels / ".hidden" / "a.json", [{}])
    with pytest.raises(InputError, match=r"1 masks of these would stay: .*street.a\.png"):
        convert(labels, tmp_path, "--overwrite")  # its labels would mean other classes
    (tmp_path / "masks" / "street" / "a.png").unlink()
    convert(labels, tmp_path, "--overwrite")
    assert classes_of(tmp_path) == ["background", "other", "thing"]
    assert (mask_of(tmp_path, "park/a") == 1).sum() == 200
    assert (mask_of(tmp_path, "b") == 2).sum() == 200


def test_missing_images_are_named_and_counted(tmp_path):
    labels = coco_file(tmp_path, {f"gone/{n}.jpg": [(3, SQUARE)] for n in range(7)}, images=False)
    write_picture(tmp_path / "images" / "a.jpg")
    refuses(r"7 images .*gone/0\.jpg.* and 2 more.*--images", labels, tmp_path)
    refuses("no folder .*--images", labels, tmp_path / "elsewhere")


def test_a_name_that_two_images_have_is_refused(tmp_path):
    labels = coco_file(tmp_path, {"a.jpg": [(3, SQUARE)]}, images=False)
    write_picture(tmp_path / "images" / "street" / "a.jpg")
    write_picture(tmp_path / "images" / "park" / "a.jpg")
    refuses("more than one there has their name: a.jpg", labels, tmp_path)


def test_two_entries_do_not_share_an_image(tmp_path):
    regions = {"street/a.jpg": [(3, SQUARE)], "park/a.jpg": [(7, BIG)]}
    labels = coco_file(tmp_path, regions, images=False)
    write_picture(tmp_path / "images" / "a.jpg")
    refuses(r"street/a\.jpg and park/a\.jpg \(a\.jpg\)", labels, tmp_path)


@pytest.mark.parametrize("name", ["../secret.jpg", "/{}/secret.jpg", "images/../../secret.jpg"])
def test_no_name_leads_outside_the_images(tmp_path, name: str):
    write_picture(tmp_path / "secret.jpg")
    root = tmp_path / "data"
    write_picture(root / "images" / "a.jpg")
    labels = coco_file(root, {name.format(tmp_path): [(3, SQUARE)]}, images=False)
    refuses("1 images of the labels are not in", labels, root)
    write_picture(root / "images" / "secret.jpg")
    convert(labels, root)
    assert [path.name for path in (root / "masks").iterdir()] == ["secret.png"]
    assert not list(tmp_path.glob("*.png"))


def test_images_elsewhere_are_linked(tmp_path):
    there, root = tmp_path / "there", tmp_path / "data"
    write_picture(there / "street" / "a.jpg")
    labels = coco_file(tmp_path, {"street/a.jpg": [(3, SQUARE)]}, images=False)
    convert(labels, root, "--images", there)
    assert (root / "images").resolve() == there.resolve()
    assert (mask_of(root, "street/a") == 1).sum() == 200
    convert(labels, root, "--images", there, "--overwrite")

    write_picture(tmp_path / "other" / "a.jpg")
    refuses("is another folder", labels, root, "--images", tmp_path / "other", "--overwrite")
    refuses("lies in it", labels, root, "--images", tmp_path)
    refuses("no folder", labels, root, "--images", tmp_path / "none")


def test_where_links_cannot_be_made_the_message_says_to_copy(tmp_path, monkeypatch):
    write_picture(tmp_path / "there" / "a.jpg")
    labels = coco_file(tmp_path, {"a.jpg": [(3, SQUARE)]}, images=False)

    def refuse(*_, **__):
        raise OSError("a privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(InputError, match="copy the images to"):
        convert(labels, tmp_path / "data", "--images", str(tmp_path / "there"))


# --------------------------------------------------------------------------------- sizes and turns


def write_turned(path: Path, orientation: int) -> None:
    """An image of 64x48 stored pixels with an EXIF orientation."""
    write_picture(path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.open(path).save(path, exif=exif)


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (5, lambda m: m.T),
        (6, lambda m: np.rot90(m, -1)),
        (7, lambda m: np.rot90(m, 2).T),
        (8, np.rot90),
    ],
)
def test_labels_of_the_stored_image_are_turned_with_it(tmp_path, orientation: int, expected):
    write_turned(tmp_path / "images" / "a.jpg", orientation)
    convert(coco_file(tmp_path, {"a.jpg": [(3, SQUARE)]}, images=False), tmp_path)
    stored = np.zeros((48, 64), np.uint8)
    stored[10:20, 10:30] = 1
    assert np.array_equal(mask_of(tmp_path), expected(stored))


def test_labels_of_the_upright_image_are_kept(tmp_path, capsys):
    write_turned(tmp_path / "images" / "a.jpg", 6)
    labels = coco_file(tmp_path, {"a.jpg": [(3, SQUARE)]}, size=(48, 64), images=False)
    convert(labels, tmp_path)
    mask = mask_of(tmp_path)
    assert mask.shape == (64, 48) and (mask[10:20, 10:30] == 1).all() and mask.sum() == 200
    assert "turned by EXIF" not in capsys.readouterr().out


def test_labels_of_an_image_upside_down_are_doubtful(tmp_path, capsys):
    write_turned(tmp_path / "images" / "a.jpg", 3)
    convert(coco_file(tmp_path, {"a.jpg": [(3, SQUARE)]}, images=False), tmp_path)
    assert (mask_of(tmp_path)[10:20, 10:30] == 1).all()
    assert "note: 1 images are turned by EXIF without" in capsys.readouterr().out


def test_labels_of_another_size_are_refused(tmp_path):
    labels = coco_file(tmp_path, {"a.jpg": [(3, SQUARE)]}, size=(60, 48))
    refuses(r"a\.jpg: the image has 64x48 pixels, its labels 60x48", labels, tmp_path)


def test_labels_may_leave_the_size_out(tmp_path):
    write_picture(tmp_path / "images" / "a.jpg")
    shapes = [shape("thing", "rectangle", [[10, 10], [29, 19]])]
    sizes = {"imageWidth": None, "imageHeight": None}
    convert(labelme_file(tmp_path / "a.json", shapes, **sizes), tmp_path)
    assert mask_of(tmp_path).shape == (48, 64)


# ------------------------------------------------------------------------------------- the choices


def test_masks_are_not_overwritten_unasked(tmp_path):
    labels = coco_file(tmp_path, {f"{n}.jpg": [(3, SQUARE)] for n in range(7)})
    convert(labels, tmp_path)
    (tmp_path / "masks" / "6.png").write_bytes(b"mine")
    refuses(r"7 masks are there already: .*0\.png.* and 2 more", labels, tmp_path)
    convert(labels, tmp_path, "--overwrite")
    assert (mask_of(tmp_path, "6") == 1).sum() == 200


@pytest.mark.parametrize("name", ["a.tif", "a_mask.png"])
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_no_image_gets_a_second_mask(tmp_path, name: str, flags: tuple[str, ...]):
    """Found wrong once: a.png was written beside a.tif, and training refused the two."""
    labels = coco_file(tmp_path, {"a.jpg": [(3, SQUARE)]})
    (tmp_path / "masks").mkdir()
    Image.new("L", (64, 48)).save(tmp_path / "masks" / name)
    message = rf"1 images have a mask already, of another name: .*{name}; remove these"
    refuses(message, labels, tmp_path, *flags)
    assert [path.name for path in (tmp_path / "masks").iterdir()] == [name]


def test_other_classes_are_not_overwritten_unasked(tmp_path):
    labels = coco_file(tmp_path, {"a.jpg": [(3, SQUARE)]})
    (tmp_path / "classes.txt").write_text("background\ndog\ncat\n")
    refuses("names other classes", labels, tmp_path)
    convert(labels, tmp_path, "--classes", "dog", "cat")
    assert (mask_of(tmp_path) == 2).sum() == 200
    convert(labels, tmp_path, "--overwrite")
    assert classes_of(tmp_path) == ["background", "cat", "dog"]


def test_a_second_file_adds_masks(tmp_path):
    for name in ("a", "b"):
        convert(coco_file(tmp_path, {f"{name}.jpg": [(3, SQUARE)]}), tmp_path)
    assert {path.name for path in (tmp_path / "masks").iterdir()} == {"a.png", "b.png"}


def test_images_without_annotations(tmp_path, capsys):
    labels = coco_file(tmp_path, {"a.jpg": [(3, SQUARE)], "b.jpg": []})
    convert(labels, tmp_path)
    assert not (tmp_path / "masks" / "b.png").exists()
    assert "note: 1 images without any annotation get no mask" in capsys.readouterr().out
    convert(labels, tmp_path, "--empty", "background", "--overwrite")
    assert not mask_of(tmp_path, "b").any()
    assert "note: 1 images without any annotation are background" in capsys.readouterr().out


def test_the_rest_may_be_ignored(tmp_path, capsys):
    labels = coco_file(tmp_path, {"a.jpg": [(3, SQUARE)], "b.jpg": []})
    convert(labels, tmp_path, "--rest", "ignored")
    assert classes_of(tmp_path) == ["cat", "dog"]
    mask = mask_of(tmp_path)
    assert (mask == 0).sum() == 200 and (mask == 255).sum() == mask.size - 200
    assert "(ignored)  93.49" in capsys.readouterr().out
    flags = ("--rest", "ignored", "--empty", "background", "--overwrite")
    refuses("--empty background: .*no class background", labels, tmp_path, *flags)


def test_an_annotated_background_stays_where_the_rest_is_ignored(tmp_path):
    categories = [*CATEGORIES, {"id": 9, "name": "Background"}]
    regions = {"a.jpg": [(3, SQUARE), (9, BIG)], "b.jpg": []}
    flags = ("--rest", "ignored", "--empty", "background")
    convert(coco_file(tmp_path, regions, categories), tmp_path, *flags)
    assert classes_of(tmp_path) == ["background", "cat", "dog"]
    mask = mask_of(tmp_path)
    assert (mask == 0).sum() == 40 * 35 - 200 and (mask == 1).sum() == 200
    assert not mask_of(tmp_path, "b").any()


def test_only_the_chosen_classes_are_drawn(tmp_path, capsys):
    regions = {"a.jpg": [(3, SQUARE), (7, BIG), (7, SQUARE)], "b.jpg": [(7, BIG)]}
    labels = coco_file(tmp_path, regions)
    convert(labels, tmp_path, "--classes", "cat")
    assert classes_of(tmp_path) == ["background", "cat"]
    assert (mask_of(tmp_path) == 1).sum() == 200 and not mask_of(tmp_path, "b").any()
    assert "note: 3 annotations of other classes are left out: dog 3" in capsys.readouterr().out
    convert(labels, tmp_path, "--classes", "dog", "cat", "--rest", "ignored", "--overwrite")
    assert classes_of(tmp_path) == ["dog", "cat"]
    refuses("no cow in the labels: cat, dog", labels, tmp_path, "--classes", "cow", "cat")
    one = ("--classes", "cat", "--rest", "ignored")
    refuses("1 classes", labels, tmp_path, *one)


def test_an_image_of_other_classes_alone_is_no_image_of_ignored_pixels(tmp_path, capsys):
    categories = [*CATEGORIES, {"id": 8, "name": "cow"}]
    regions = {"a.jpg": [(3, SQUARE)], "b.jpg": [(8, BIG)]}
    labels = coco_file(tmp_path, regions, categories)
    convert(labels, tmp_path, "--classes", "cat", "dog", "--rest", "ignored")
    assert not (tmp_path / "masks" / "b.png").exists()
    assert "note: 1 images get no mask" in capsys.readouterr().out
    refuses("no annotation of dog", labels, tmp_path, "--classes", "dog", "--overwrite")


def test_spaces_in_names_become_underlines(tmp_path, capsys):
    categories = [{"id": 3, "name": "traffic light"}, {"id": 7, "name": "dog"}]
    labels = coco_file(tmp_path, {"a.jpg": [(3, SQUARE)]}, categories)
    convert(labels, tmp_path)
    assert classes_of(tmp_path) == ["background", "traffic_light", "dog"]
    assert 'note: spaces in class names became "_": traffic_light' in capsys.readouterr().out
    convert(labels, tmp_path, "--classes", "dog", "traffic light", "--overwrite")
    assert classes_of(tmp_path) == ["background", "dog", "traffic_light"]

    categories[1]["name"] = "traffic_light"
    labels = coco_file(tmp_path, {"a.jpg": [(3, SQUARE)]}, categories)
    refuses("'traffic light' and 'traffic_light' both become traffic_light", labels, tmp_path)


def test_categories_of_one_name_are_one_class(tmp_path, capsys):
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "cat"}]
    convert(coco_file(tmp_path, {"a.jpg": [(3, SQUARE), (7, BIG)]}, categories), tmp_path)
    assert classes_of(tmp_path) == ["background", "cat"]
    assert (mask_of(tmp_path) == 1).sum() == 40 * 35
    assert "note: categories of one name are one class: cat" in capsys.readouterr().out


@pytest.mark.parametrize("count", [253, 254])
def test_there_are_254_classes_at_most(tmp_path, count: int):
    categories = [{"id": n, "name": f"class{n}"} for n in range(count)]
    labels = coco_file(tmp_path, {"a.jpg": [(count - 1, SQUARE)]}, categories)
    if count == 254:  # and the background
        refuses("255 classes", labels, tmp_path)
        return
    convert(labels, tmp_path)
    assert (mask_of(tmp_path) == 253).sum() == 200


# ------------------------------------------------------------------------ other files, and the page


def test_files_of_another_kind_are_named(tmp_path):
    write_picture(tmp_path / "images" / "a.jpg")
    labels = tmp_path / "labels.json"
    for content in ([], {"images": []}, "text", 3):
        refuses(r"labels\.json: neither labels of COCO", dump(labels, content), tmp_path)
    labels.write_text('{"images": [')
    refuses(r"labels\.json: not JSON", labels, tmp_path)
    labels.write_bytes(b"\xff\xfe\x00")
    refuses(r"labels\.json: not JSON", labels, tmp_path)
    refuses("cannot read .*none", tmp_path / "none.json", tmp_path)
    refuses("no .json in", tmp_path / "images", tmp_path)
    dump(tmp_path / "folder" / "x.json", {"images": [], "annotations": [], "categories": []})
    refuses("give the file itself", tmp_path / "folder", tmp_path)


def test_an_image_that_cannot_be_decoded_is_left_off_the_page(tmp_path, capsys):
    labels = coco_file(tmp_path, {"a.jpg": [(3, SQUARE)], "b.jpg": [(3, SQUARE)]})
    damage(tmp_path / "images" / "b.jpg")
    convert(labels, tmp_path)
    assert "b.jpg: cannot be decoded" in capsys.readouterr().out
    assert (tmp_path / "labels.png").is_file() and mask_of(tmp_path, "b").any()


def test_the_page_shows_grey_of_more_than_8_bits_by_its_own_range(tmp_path):
    """Found wrong once: images of 12 bits were black on the page to check labels by eye."""
    values = np.linspace(0, 4095, SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = import_labels.shown_pixels(tmp_path / "a.png")
    assert pixels.min() == 0 and pixels.max() == 255 and 120 < pixels.mean() < 135


def test_the_page_shows_images_evenly_spread(tmp_path, monkeypatch):
    labels = coco_file(tmp_path, {f"$x$_{n:02}.jpg": [(3, SQUARE)] for n in range(47)})
    shown = []
    real = import_labels.open_image
    convert(labels, tmp_path)
    monkeypatch.setattr(
        import_labels, "open_image", lambda path: (shown.append(path), real(path))[1]
    )
    names = [f"$x$_{n:02}" for n in range(47)]
    images = datasets.images_in(tmp_path / "images")
    import_labels.draw_page(names, images, tmp_path, ("background", "cat", "dog"))
    assert [path.stem for path in shown] == names[::2]


def test_imported_labels_train(tmp_path, capsys):
    regions = [(3, SQUARE), (7, BIG)]
    listed = {"labelled/x.jpg": regions, "labelled/y.jpg": regions, "val/v.jpg": regions}
    convert(coco_file(tmp_path, listed), tmp_path)
    printed = capsys.readouterr().out
    assert "3 masks of 3 classes" in printed
    assert f"python cps.py --data folder --data-dir {tmp_path}" in printed
    share = 100 * 200 / (SIZE[0] * SIZE[1])
    assert f"cat        {share:6.2f}\n" in printed
    assert Image.open(tmp_path / "labels.png").size[0] > 500

    data = datasets.load(settings(data="folder", data_dir=str(tmp_path), split="all"))
    assert data.classes == ("background", "cat", "dog") and data.background == 0
    assert [item.name for item in data.labelled] == ["x", "y"]
    assert [item.mask for item in data.val] == [tmp_path / "masks" / "val" / "v.png"]
    with Image.open(data.labelled[0].mask) as mask:
        assert mask.mode == "P"
        assert mask.getpalette()[3:6] == list(datasets.voc_colours(2)[1])


def test_the_command_ends_with_one_line(tmp_path):
    write_picture(tmp_path / "images" / "a.jpg")
    result = run("-m", "common.import_labels", tmp_path / "none.json", tmp_path, expect=2)
    assert result.stderr.startswith("import_labels: error: cannot read")
    assert len(result.stderr.splitlines()) == 1
