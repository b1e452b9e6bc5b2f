"""examples/own_data.ipynb: runs from its first cell to its last on a few small images."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_cells_run_in_order_and_end_with_an_exported_model(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    monkeypatch.setenv("OWN_DATA_IMAGES", "--train 12 --val 4 --size 96")
    monkeypatch.setenv("OWN_DATA_FIT", "--epochs 4")
    monkeypatch.setenv("PYTHONPATH", paths)
    notebook = nbformat.read(ROOT / "examples/own_data.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()

    said = "".join(
        out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", [])
    )
    assert "error" not in said.lower() and "Traceback" not in said
    for name in (
        "my_run/report.html",
        "my_run/best.pth",
        "my_detector.onnx",
    ):
        assert (tmp_path / name).stat().st_size
    assert said.count("pixels apart") == 4 and "inf pixels" not in said
    pictures = [
        out
        for cell in notebook.cells
        for out in cell.get("outputs", [])
        if "image/png" in out.get("data", {})
    ]
    assert len(pictures) == 2
