"""The comparison of the demo's models in both frameworks and all executors."""

import dataclasses

import numpy as np
import pytest
from digit_files import SMALL
from digit_models import SEG, save_untrained

from elsa_tools.predict.results import Detections
from examples.digits.dataset import make_dataset
from examples.digits.executors import Row, _count, main, table

pytest.importorskip("detectron2")
pytest.importorskip("mmseg")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder, **SMALL)
    return folder


@pytest.mark.slow
def test_every_executor_has_a_row(data, tmp_path, capsys):
    name = "mmsegmentation"
    demo = tmp_path / name
    demo.mkdir()
    save_untrained(SEG["mmseg"], demo / "iter_1.pth")
    (demo / "last_checkpoint").write_text("iter_1.pth")
    options = ["--demo", str(tmp_path), "--data", str(data), "--only", name, "--sizes", "64"]
    out = tmp_path / "table.md"
    assert main([*options, "--images", "3", "--batches", "2", "--out", str(out)]) == 0
    text = out.read_text()
    assert capsys.readouterr().out.endswith(text)  # behind what the frameworks print
    rows = [[cell.strip() for cell in line.split("|")[3:-1]] for line in text.splitlines()[2:]]
    executors = [row[0] for row in rows]
    assert executors[:2] == ["MMSegmentation", "Detectron2"] and "onnxruntime" in executors
    assert [row[-1] for row in rows] == ["-"] * 2 + ["yes"] * (len(rows) - 2)
    assert all(row[2] == "100.0000%" for row in rows)


def test_what_is_missing_is_said(data, tmp_path, capsys):
    assert main(["--demo", str(tmp_path), "--data", str(data)]) == 2
    assert "has no checkpoint: `make demo` trains it" in capsys.readouterr().err
    assert main(["--demo", str(tmp_path), "--data", str(tmp_path)]) == 2
    assert "has no held-out images" in capsys.readouterr().err


def found(number=5):
    corners = np.arange(number, dtype=np.float32)[:, None] * 9 + np.array([0, 0, 8, 8])
    masks = np.zeros((number, 50, 50), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, corners.astype(int), strict=True):
        mask[y1:y2, x1:x2] = True
    scores = (0.9 - 0.2 * np.arange(number)).astype(np.float32)
    return Detections(np.zeros(number, np.int64), scores, corners.astype(np.float32), masks)


def changed(name, value):
    array = getattr(found(), name).copy()
    array[2] = value
    return dataclasses.replace(found(), **{name: array})


@pytest.mark.parametrize(
    ("got", "met", "total", "said"),
    [
        (found(), 5, 5, ""),
        (found(4), 4, 5, "the reference's alone"),
        (changed("scores", 0.502), 4, 5, "score 0.002"),
        (changed("boxes", [18, 18, 26.1, 26]), 4, 5, "box 0.1"),
        (changed("masks", False), 4, 5, "IoU 0"),
        (changed("labels", 3), 4, 5, "the executor's alone"),
        (found(0), 0, 5, "the reference's alone"),
    ],
)
def test_detections_are_met_one_to_one(got, met, total, said):
    row = Row("model", 64, "onnxruntime", 1, precision=(0.5, 0.5))
    _count(row, "1.jpg", got, found())
    assert (row.met, row.total) == (met, total)
    assert said in "\n".join(row.unmet)
    reference = Row("model", 64, "MMDetection", 1, precision=(0.5, 0.5))
    assert row.keeps(reference) == (met == total)
    assert f"{met / row.total:.4%}" in table([row])
    row.precision = (0.5, 0.5002)
    assert not row.keeps(reference)
