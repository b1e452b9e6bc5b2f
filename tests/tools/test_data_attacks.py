"""Files that were made to crash, to hang or to run a program: each ends in a report."""

import json
import os
import re
from pathlib import Path

import pytest
from data_trees import coco, coco_content, image
from PIL import EpsImagePlugin, Image

from elsa_core.data.coco import first_problem, read_json
from elsa_core.data.images import read_image
from elsa_core.data.label_maps import pair_files, read_map
from elsa_core.runtime.errors import UsageError
from elsa_tools.data import cli
from elsa_tools.data.annotations import missing_images
from elsa_tools.data.check import check_folder
from elsa_tools.data.layout import LAYOUTS

LARGE = int("1" * 400)
ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b2J\u202e"


def annotation(**values):
    return lambda content: content["annotations"][-1].update(values)


def image_entry(**values):
    return lambda content: content["images"][0].update(values)


def large(side):
    def change(content):
        content["images"][0].update(width=side, height=side)
        box = [0, 0, side, side]
        polygon = [[0, 0, side, 0, side, side, 0, side]]
        content["annotations"][0].update(image_id=0, bbox=box, segmentation=polygon)

    return change


def zigzag(content):
    content["images"][0].update(width=9000, height=9000)
    polygon = [-80_000, -80_000, 80_000, 80_000] * 5000
    content["annotations"][0].update(image_id=0, bbox=[0, 0, 9, 9], segmentation=[polygon])


def rename(name):
    return lambda content: content["categories"][0].update(name=name)


# What changes the content, or its text; the rule that names it, or a word of the sentence.
ATTACKS = {
    "image of 1e8 x 1e8": (large(10**8), "image-size"),
    "image of 4e9 pixels": (large(65_500), "image-size"),
    "polygon at 1e300": (annotation(segmentation=[[1e300, 0, 0, 1e9, 5, 5]]), "polygon-form"),
    "polygon that needs 80 GB": (zigzag, "polygon-length"),
    "400 digits in a box": (annotation(bbox=[1, 1, LARGE, 5]), "box-form"),
    "400 digits in an area": (annotation(area=LARGE), "area-form"),
    "400 digits in a polygon": (annotation(segmentation=[[LARGE, 1, 2, 3, 4, 5]]), "polygon-form"),
    "box of 1e29": (annotation(bbox=[1, 1, 1e29, 5]), "box-far"),
    "RLE of 2^33": (annotation(segmentation={"size": [16, 24], "counts": [2**33]}), "rle-broken"),
    "RLE of one endless number": (
        annotation(segmentation={"size": [16, 24], "counts": "o" * 300_000 + "0"}),
        "rle-form",
    ),
    "width of a list": (image_entry(width=[96] * 5000), "damaged-file"),
    "keypoints of words": (annotation(keypoints=["a", 1, 2]), "keypoints-form"),
    "one entry of another format": (annotation(segments_info=[]), "panoptic"),
    "name of half a character": (rename("\ud800"), "category-name-form"),
    "name that commands a terminal": (rename(ESCAPES), "category-name-form"),
    "id that commands a terminal": (
        lambda content: [one.update(id=f"{ESCAPES}{one['id']}") for one in content["annotations"]],
        "annotation-id-form",
    ),
    "file name that commands a terminal": (image_entry(file_name=ESCAPES), "file-name-form"),
    "file name with NUL": (image_entry(file_name="a\0.jpg"), "file-name-form"),
    "file name of half a character": (image_entry(file_name="\ud800.jpg"), "missing-image-file"),
    "file name of 5000 characters": (image_entry(file_name="a" * 5000), "missing-image-file"),
    "file outside": (image_entry(file_name="../images/a.jpg"), "file-elsewhere"),
    "values in 900 lists": (
        annotation(
            bbox=json.loads("[" * 900 + "]" * 900), iscrowd=json.loads("[" * 900 + "]" * 900)
        ),
        "box-form",
    ),
    "5000 digits": (lambda text: text.replace("24", "1" * 5000), "thousands of digits"),
    "100 000 brackets": (lambda text: "[" * 100_000, "too deeply"),
    "a number": (lambda text: "7", "no list of images"),
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A good file of 2 images, as text, in the working directory."""
    monkeypatch.chdir(tmp_path)
    content = coco_content(["a.jpg", "b.jpg"], 2)
    for one in content["images"]:
        image(tmp_path / "images" / one["file_name"])
    return content


@pytest.mark.parametrize("name", ATTACKS)
def test_each_ends_in_a_report(files, capfd, name):
    change, rule = ATTACKS[name]
    if " " in rule:
        text = change(json.dumps(files))
    else:
        change(files)
        text = json.dumps(files)
    Path("a.json").write_text(text)
    arguments = ["check", "--annotations", "a.json", "--images", "images", "--json", "r.json"]
    status = cli.main(arguments)
    out = capfd.readouterr().out
    record = json.loads(Path("r.json").read_text())
    (report,) = record["reports"]
    found = {one["rule"]: one for one in report["findings"]}
    assert status == (not record["complete"])
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202e]", out) and len(out) < 9000
    if rule in found:
        examples = "".join(found[rule]["examples"])
        assert len(examples) < 1500
        if found[rule]["level"] == "error" and "file" not in rule.split("-"):
            assert first_problem(json.loads(text))  # and so no run starts
    else:
        assert rule in found["unreadable"]["text"]


@pytest.mark.parametrize("seed", range(0, 60, 20))
def test_random_damage_ends_in_a_report(tmp_path, monkeypatch, seed):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "fuzz")
    from coco_mutations import checked, written

    for one in range(seed, seed + 20):
        (tmp_path / str(one)).mkdir()
        monkeypatch.chdir(tmp_path / str(one))
        written(one)
        checked()


def test_damaged_images_end_in_pixels_or_a_sentence(tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "fuzz")
    monkeypatch.chdir(tmp_path)
    from image_cases import case

    for seed in range(60):
        case(seed)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(UsageError, match="a.json cannot be read: it is a pipe"):
        read_json(str(tmp_path / "a.json"))


def test_errors_write_out_what_a_terminal_obeys():
    text = f"file {ESCAPES}\udcff ä 日\tö"
    shown = r"file \x1b]0;title\x07\x1b[2J\x9b2J\u202e\udcff ä 日" + "\tö"
    assert str(UsageError(text)) == shown


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program of that name, and the file that it leaves when it was started."""
    program, mark = tmp_path / "bin/gs", tmp_path / "started"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho 10; touch {mark}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return mark


def test_an_eps_file_starts_no_ghostscript(tmp_path, ghostscript):
    path = str(tmp_path / "photo.jpg")
    Path(path).write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{ } loop\n"
    )
    for read in (read_image, lambda path: read_map(path, path)):
        with pytest.raises(UsageError, match="is no image of a known kind"):
            read(path)
    assert not ghostscript.exists()
    with pytest.raises(OSError), Image.open(path) as opened:  # what Pillow does by itself
        opened.load()
    assert ghostscript.exists()


def test_pictures_of_phones_are_read(tmp_path):
    """MPO: a JPEG with more pictures behind it."""
    picture = Image.new("RGB", (8, 6), "red")
    picture.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[picture])
    assert read_image(str(tmp_path / "a.jpg")).shape == (6, 8, 3)


def test_links_in_a_circle(tmp_path):
    coco(tmp_path / "coco")
    os.symlink("loop", tmp_path / "coco/train2017/loop")
    report = check_folder(LAYOUTS["coco"], str(tmp_path / "coco"))
    assert not any("cannot be read" in str(one) for one in report.findings)
    for folder, ending in (("images", ".jpg"), ("maps", ".png")):
        image(tmp_path / folder / f"sub/a{ending}")
        for name in ("self", "again"):
            os.symlink(tmp_path / folder, tmp_path / folder / f"sub/{name}")
    pairs = pair_files(str(tmp_path / "images"), str(tmp_path / "maps"))
    assert [Path(one).name for one, _ in pairs] == ["a.jpg"]


def test_a_brace_in_a_folders_name(files, tmp_path):
    (finding,) = missing_images("f", files, str(tmp_path / "{x}"))
    assert finding.text == f"2 of 2 images have no file in {tmp_path}/{{x}}"
