"""Pages of results: whole in one file, safe, the same each time, and readable in a browser."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import look_at
from coco_files import NAMES, content, rectangle

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("supervision")

from PIL import Image

from elsa_core.runtime.errors import UsageError
from elsa_tools.inspect import cli
from elsa_tools.results.analyse import analyse
from elsa_tools.results.report import write_report
from elsa_tools.results.run import Rule, Run

ODD = {"zebra": "<script>alert(1)</script>", "ape": "_$a_b$ & <b>", "Ächse": "a " + 40 * "long"}


def perfect(coco, wrong=3):
    """The objects of a file as detections with masks, every `wrong`th as another class."""
    ids = [one["id"] for one in coco["categories"]]
    return [
        {
            "image_id": one["image_id"],
            "category_id": ids[(ids.index(one["category_id"]) + (number % wrong == 0)) % len(ids)],
            "score": 0.5 + 0.001 * number,
            "bbox": one["bbox"],
            "segmentation": one["segmentation"],
        }
        for number, one in enumerate(coco["annotations"])
    ]


def files(folder, coco):
    """Annotations, results, and images of `coco` below a folder."""
    for image in coco["images"]:
        image["file_name"] = f"{image['id']}.png"
        path = folder / "images" / image["file_name"]
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 255, (image["height"], image["width"], 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    annotations = folder / "annotations.json"
    annotations.write_text(json.dumps(coco))
    results = folder / "results.json"
    results.write_text(json.dumps(perfect(coco)))
    return str(annotations), str(results)


def a_run(folder, annotations, name):
    history = [{"iteration": i, "loss": 3 / i, f"loss_{name}": 1 / i, "lr": 0.1} for i in (1, 2, 9)]
    history += [
        {"iteration": 5, "val/bbox AP": 40.0, "val_ema/bbox AP": 30.0, "val/segm AP": 1.0},
        {"iteration": 9, "val/bbox AP": 35.0, "val_ema/bbox AP": 45.5},
    ]
    return Run(
        title=f"a run {name}",
        framework="Detectron2 0.7",
        model="Mask R-CNN",
        task="instances",
        data=[f"COCO's format {name}"],
        rules=[Rule("batch", f"4 {name}", "because")],
        history=history,
        metric="bbox AP",
        seconds=3723.0,
        images_per_second=None,
        image_seconds=0.0125,
        machine="2 cores",
        commands={"Predict": f"elsa demo '{name}'"},
        config=folder / "config.yaml",
        checkpoint=folder / f"{name.replace('/', '')}.pth",
        images=folder / "images",
        train=annotations,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with everything, of classes with odd names."""
    folder = tmp_path_factory.mktemp("report")
    coco = content()
    for category in coco["categories"]:
        category["name"] = ODD[category["name"]]
    coco["categories"].append({"id": 7, "name": "never there"})
    annotations, results = files(folder, coco)
    run = a_run(folder, annotations, ODD["zebra"])
    for name in ("report.html", "again.html"):
        analyses = [analyse(annotations, results, task) for task in ("bbox", "segm")]
        write_report(folder / name, analyses, run)
    return folder / "report.html"


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def of(self, *tags):
        return [attributes for tag, attributes in self.found if tag in tags]


def test_page_is_whole_and_safe(page):
    text = page.read_text(encoding="utf-8")
    assert page.with_name("again.html").read_text(encoding="utf-8") == text
    assert len(text) < 5e6
    elements = Elements(text)
    assert not elements.of("script", "link", "iframe", "object")
    assert ODD["zebra"] not in text and "&lt;script&gt;alert(1)" in text
    for attributes in (one for _, one in elements.found):
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:image/jpeg;base64,"))
    assert not re.findall(r"url\((?!#)|@import", text)
    ids = [one["id"] for _, one in elements.found if "id" in one]
    assert len(ids) == len(set(ids))
    referred = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert referred and set(referred) <= set(ids)


def test_page_is_accessible(page):
    elements = Elements(page.read_text(encoding="utf-8"))
    images = elements.of("img")
    assert len(images) == 2 * 3 and all(len(one["alt"]) > 5 for one in images)
    assert elements.of("html")[0]["lang"] == "en"
    assert all(one.get("scope") in ("col", "row") for one in elements.of("th"))
    charts = [one for one in elements.of("div") if one.get("role") == "img"]
    assert len(charts) == len(elements.of("svg")) == 3 + 2 * 2
    assert all(": " in one["aria-label"] and " over " in one["aria-label"] for one in charts)


def test_page_says_what_a_run_was(page):
    text = page.read_text(encoding="utf-8")
    plain = " ".join(re.sub("<[^>]*>", " ", text).split())
    assert "40.0 % best bbox AP of the trained weights, at iteration 5" in plain
    assert "45.5 % best bbox AP of the averaged weights, at iteration 9" in plain
    assert "1 h 2 min time of training" in plain and "speed of training" not in plain
    assert "batch 4 &lt;script&gt;" in plain and "elsa demo &#39;&lt;script&gt;" in plain
    for label in ("iteration", "loss", "learning rate", "recall, percent", "IoU threshold"):
        assert f">{label}</text>" in text
    assert "bbox AP, averaged weights" in text and "segm AP, averaged weights" not in text


def test_page_in_a_browser(page, tmp_path):
    """On a phone: no error, all images there, charts as wide as their cards, nothing sticks out."""
    seen = look_at(page, tmp_path, 390)
    assert seen["console"] == []
    assert len(seen["images"]) == 6 and min(seen["images"]) >= 90
    assert len(seen["charts"]) == 7 and 250 < min(seen["charts"]) <= max(seen["charts"]) < 390
    assert seen["scrollWidth"] <= seen["clientWidth"] == 390


def test_many_classes(tmp_path):
    """100 of them: the best and worst at once, all on demand, and a matrix of the most confused."""
    coco = content([(400, 400)], [(9, 9)])
    coco["categories"] = [{"id": i, "name": f"class {i}"} for i in range(1, 101)]
    (first,) = coco["annotations"]
    boxes = [[10 + 20 * (i % 19), 10 + 20 * (i // 19), 15, 15] for i in range(95)]
    coco["annotations"] = [
        {**first, "id": i, "category_id": i, "bbox": box, "segmentation": [rectangle(*box)]}
        for i, box in enumerate(boxes, start=1)
    ]
    annotations, results = files(tmp_path, coco)
    write_report(tmp_path / "page.html", [analyse(annotations, results, "bbox")])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(text) < 1e6
    outside = re.sub("<details.*?</details>", "", text, flags=re.DOTALL)
    assert outside.count('<tr><th scope="row">class ') == 40 + 19 - 1  # one is the background
    assert text.count('<tr><th scope="row">class ') == 40 + 18 + 100 + 100
    assert "20 best and worst of 100 classes; 5 have nothing to find." in text
    assert "19 rows with most mistakes of 101" in text
    matrix = re.search('<table class="heat">.*?</table>', text, re.DOTALL)[0]
    counts = [int(one) for one in re.findall(r"<td[^>]*>(\d+)</td>", matrix)]
    assert sum(counts) == 95


def label_maps(folder):
    random = np.random.default_rng(0)
    for part in ("images", "truth", "found"):
        (folder / part).mkdir()
        for name in ("a", "b"):
            size = (60, 80, 3) if part == "images" else (60, 80)
            labels = random.integers(0, 3 if part != "images" else 255, size, dtype=np.uint8)
            if part == "truth":
                labels[:9] = 255
            Image.fromarray(labels).save(folder / part / f"{name}.png")
    return ["--annotations", folder / "truth", "--results", folder / "found", "--classes", *NAMES]


def results_command(*arguments):
    return cli.main(["results", *map(str, arguments)])


def test_page_of_the_command(tmp_path, capsys):
    maps = label_maps(tmp_path)
    (tmp_path / "boxes").mkdir()
    annotations, results = files(tmp_path / "boxes", content())
    boxes = ["--annotations", annotations, "--results", results]
    for arguments, images, title in (
        (boxes, tmp_path / "boxes/images", "Results of results.json"),
        (maps, tmp_path / "images", "Results of found"),
    ):
        for options, pictures in (
            ([], 0),
            (["--images", images], 2 * (3 if images.parent.name == "boxes" else 2)),
        ):
            assert results_command(*arguments, *options, "--out", tmp_path / "out") == 0
            assert "wrote: " in capsys.readouterr().out
            text = (tmp_path / "out/results.html").read_text(encoding="utf-8")
            elements = Elements(text)
            assert len(elements.of("img")) == pictures
            assert f"<h1>{title}</h1>" in text and "How to go on" not in text
            assert all(len(one["alt"]) > 5 for one in elements.of("img"))


def test_nothing_is_written_where_an_image_is_damaged(tmp_path, capsys):
    annotations, results = files(tmp_path, content())
    (tmp_path / "images/2.png").write_bytes(b"no image")
    analyses = [analyse(annotations, results, "bbox")]
    with pytest.raises(UsageError, match="2.png cannot be read as an image"):
        write_report(tmp_path / "page.html", analyses, images=tmp_path / "images")
    assert not (tmp_path / "page.html").exists()
    arguments = ["--annotations", annotations, "--results", results, "--out", tmp_path / "out"]
    assert results_command(*arguments, "--images", tmp_path / "gone") == 2
    assert "--images must be a folder, got" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_found_nothing(tmp_path):
    """No detection, no evaluation, a single logged iteration: still a page."""
    annotations, results = files(tmp_path, content())
    (tmp_path / "results.json").write_text("[]")
    run = a_run(tmp_path, None, "x")
    object.__setattr__(run, "history", [{"iteration": 20, "loss": 1.0}])
    write_report(tmp_path / "page.html", [analyse(annotations, results, "bbox")], run)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "at iteration" not in text and text.count("<svg") == 1 + 2
    assert "0.0 <small>%" in text
