"""Packages that are not there: nothing fails that can do without, and a sentence names all."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.packages import missing, need

ROOT = Path(__file__).resolve().parents[2]
HIDE = """\
import json, sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hide())
"""


def run_without(hidden, code):
    """Runs code in an environment without some packages; returns what it puts into ``found``."""
    code = HIDE.format(hidden=set(hidden)) + code + "\nprint(json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("detectron2"), reason="Detectron2 is not installed")
def test_detectron2_without_opencv(tmp_path):
    """The backbone and Detectron2's own resize work; OpenMMLab's resize says what to install."""
    found = run_without(
        ["cv2"],
        f"""
import contextlib, io, sys
import elsa_d2, elsa_d2.engine.preflight, torch
from detectron2.modeling import build_backbone

cfg = elsa_d2.load_config("configs/detectron2/digits/mask_rcnn_elsa_swin_digits.yaml")
features = build_backbone(cfg)(torch.zeros(1, 3, 64, 64))
cfg.INPUT.RESIZE_BACKEND = "pil"
elsa_d2.DetectionMapper(cfg, is_train=True)
found = [list(features)]
sys.path.insert(0, "tools")
import train_net

for config, resize in (("mask_rcnn_elsa_swin_digits", "cv2"), ("upernet_elsa_swin_digits", "pil")):
    file = f"configs/detectron2/digits/{{config}}.yaml"
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        status = train_net.main(
            ["--config-file", file, "INPUT.RESIZE_BACKEND", resize]
            + ["OUTPUT_DIR", {str(tmp_path / "run")!r}]
        )
    found.append([status, stream.getvalue()])
""",
    )
    assert found[0] == ["p2", "p3", "p4", "p5", "p6"]
    for (status, error), purpose in zip(
        found[1:], ("INPUT.RESIZE_BACKEND cv2", "WholeImageSegmentor"), strict=True
    ):
        assert status == 2 and error.count("\n") == 1
        assert f"{purpose} needs the Python package cv2, which is missing in" in error
        assert error.endswith(": pip install opencv-python-headless\n")
    assert not (tmp_path / "run").exists()


COMMANDS = {
    "demo": (
        "from elsa_tools.predict.cli import main",
        ["x.jpg", "--config", "c.yaml", "--weights", "w.pth", "--out", "out"],
        "opencv-python-headless pycocotools tqdm",
    ),
    "export_onnx": (
        "from elsa_tools.export.cli import main",
        ["--arch", "tiny", "--out", "m.onnx"],
        "onnx onnx-ir onnxruntime onnxscript tqdm",
    ),
    "analyze": (
        "from elsa_tools.inspect.cli import main",
        ["filters", "--arch", "tiny", "--image", "x.jpg", "--out", "x.png"],
        "pillow matplotlib",
    ),
    "make_digits": (
        "sys.path.append('tools'); from make_digits import main",
        ["--out", "data"],
        "opencv-python-headless pycocotools scikit-image scikit-learn tqdm",
    ),
}


@pytest.mark.slow
def test_commands_name_all_that_is_missing():
    hidden = ["PIL", "cv2", "matplotlib", "onnx", "onnx_ir", "onnxruntime", "onnxscript"]
    hidden += ["pycocotools", "skimage", "sklearn", "tqdm"]
    code = f"import contextlib, io\nfound, commands = {{}}, {COMMANDS}"
    code += """
for name, (line, arguments, _) in commands.items():
    exec(line)
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        found[name] = [main(arguments)]
    found[name].append(stream.getvalue())
"""
    for name, (status, error) in run_without(hidden, code).items():
        assert status == 2 and error.count("\n") == 1 and error.startswith(f"{name}: ")
        assert "the Python packages " in error and f" are missing in {sys.executable}" in error
        installed = error.partition(": pip install ")[2].split()
        assert sorted(installed) == sorted(COMMANDS[name][2].split()), name


def test_sentences(monkeypatch):
    executable = f"is missing in {sys.executable}"
    assert missing(["detectron2"]) == f"the Python package detectron2 {executable}"
    assert missing(["tqdm"], ["json", "tqdm"]).endswith(f"tqdm {executable}: pip install tqdm")
    assert need("json", "this") is json
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UsageError, match=f"a resize needs .* cv2, which {executable}: pip install"):
        need("cv2", "a resize")


def test_what_a_module_of_ours_lacks(monkeypatch):
    monkeypatch.delitem(sys.modules, "elsa_core.data.cityscapes_eval", raising=False)
    for name in [n for n in sys.modules if n.partition(".")[0] == "cityscapesscripts"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cityscapesscripts", None)
    with pytest.raises(UsageError, match="^Scores needs .* cityscapesscripts, .*: pip ins"):
        need("elsa_core.data.cityscapes_eval", "Scores")


def test_a_package_that_does_not_load(tmp_path, monkeypatch):
    """As OpenCV's builds with windows where libGL is missing."""
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    with pytest.raises(UsageError, match="which fails with 'libGL.*pip install opencv-python-head"):
        need("cv2", "a resize")
