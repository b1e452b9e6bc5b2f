"""`python -m elsa_d2 SCRIPT`: scripts that know nothing of ELSA-Swin, with our keys."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("detectron2")

from d2_tiny import CONFIG, REPOSITORY, overrides

from elsa_d2.__main__ import main

SCRIPT = """\
from __future__ import annotations

import json, multiprocessing, sys

import beside
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model


def setup(arguments):
    cfg = get_cfg()
    cfg.merge_from_file(arguments.config_file)
    cfg.merge_from_list(arguments.opts)
    return cfg


def of_another_process(arguments):
    return setup(arguments).MODEL.ELSA_SWIN.ARCH, len(DatasetCatalog.get("digits_validation"))


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    cfg = setup(arguments)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        other = pool.apply(of_another_process, [arguments])
    model = build_model(cfg)
    backbone = type(model.backbone.bottom_up).__module__
    print(json.dumps([sys.argv[0], __file__, beside.NAME, backbone, other]))
    sys.exit(3)
"""


@pytest.mark.slow
def test_a_script_and_its_processes_have_our_keys_and_data_sets(digits, tmp_path):
    script = tmp_path / "train_net.py"
    script.write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    keys = overrides(digits, MODEL__DEVICE="cpu")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "elsa_d2", script, "--config-file", CONFIG, *keys],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    images = len(
        json.loads((digits / "annotations/instances_validation.json").read_text())["images"]
    )
    assert found == [
        str(script),
        str(script),
        "beside",
        "elsa_d2.modeling.backbone",
        ["custom", images],
    ]


def test_errors_are_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setenv("ELSA_D2_SCRIPT", "")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "nothing.py")])
    assert "nothing.py does not exist" in capsys.readouterr().err
    script = tmp_path / "script.py"
    script.write_text("raise AssertionError")
    assert main([str(script), "--config-file", str(tmp_path / "nothing.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("elsa_d2: config file ") and error.count("\n") == 1
