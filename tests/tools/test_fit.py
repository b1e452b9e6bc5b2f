"""`elsa fit` from a folder to a trained model, as a user runs it."""

import json
import subprocess
import sys

import fit_folders
import pytest
from conftest import REPOSITORY

COMMAND = [sys.executable, "-m", "elsa_tools", "fit"]


def fit(data, out, *options):
    command = [*COMMAND, str(data), "--epochs", "1", "--out", str(out), *options]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "framework"),
    [
        ("roboflow", "detectron2"),
        ("yolo", "mmdet"),
        ("voc", "detectron2"),
        ("yolo_boxes", "mmdet"),
        ("label_maps", "mmseg"),
        ("label_maps", "detectron2"),
    ],
)
def test_from_a_folder_to_a_model(tmp_path, layout, framework):
    data, out = tmp_path / layout, tmp_path / "out"
    fit_folders.LAYOUTS[layout](data)
    done = fit(data, out, "--framework", framework)
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "fit.json").read_text())
    assert record["trained"] and record["evaluated"]
    assert (out / "best.pth").is_file()
    assert not list(out.rglob("*.part"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--framework", "mmseg"], "--framework mmseg cannot train instances"),
        (["--out", "DATA/runs"], "--out must be outside of the data"),
        (["--batch", "0"], "--batch must be above 0, got 0"),
        (["--minutes", "1"], "--epochs and --minutes exclude each other"),
    ],
)
def test_refusals(tmp_path, options, sentence):
    data = tmp_path / "data"
    fit_folders.LAYOUTS["single_json"](data)
    options = [one.replace("DATA", str(data)) for one in options]
    done = fit(data, tmp_path / "out", *options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert sentence in done.stderr
