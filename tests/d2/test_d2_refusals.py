"""tools/train_net.py: what is refused before a training, in one sentence."""

import pytest
import torch

pytest.importorskip("detectron2")

from conftest import load_tool
from d2_tiny import CONFIG, datasets, overrides


@pytest.fixture(scope="module")
def tool():
    return load_tool("train_net")


RETINANET = {"MODEL__META_ARCHITECTURE": "RetinaNet", "MODEL__MASK_ON": False}
ONE_STAGE = {**RETINANET, "MODEL__RETINANET__IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"]}
REFUSALS = {
    "missing config file": (
        ["--config-file", "nowhere.yaml"],
        {},
        "config file nowhere.yaml is not valid: Config file 'nowhere.yaml' does not exist!",
    ),
    "unknown key": ([], {"SOLVER__LERNING_RATE": 1}, "Non-existent key: SOLVER.LERNING_RATE"),
    "wrong type": ([], {"SOLVER__MAX_ITER": "many"}, "SOLVER.MAX_ITER"),
    "unknown arch": (
        [],
        {"MODEL__ELSA_SWIN__ARCH": "huge"},
        "base, custom, got 'huge'",
    ),
    "arch lacks a field": (
        [],
        {"MODEL__ELSA_SWIN__CUSTOM_ARCH__DEPTHS": None},
        "a dict arch needs embed_dim, depths, num_heads, group_width, missing depths",
    ),
    "unknown backbone": ([], {"MODEL__BACKBONE__NAME": "build_x"}, "'build_x' is not registered"),
    "unknown optimizer": ([], {"SOLVER__OPTIMIZER": "Lion"}, "one of AdamW, SGD, got 'Lion'"),
    "unknown schedule": ([], {"SOLVER__LR_SCHEDULER_NAME": "X"}, "Unknown LR scheduler: X"),
    "heads without features": (
        [],
        {"MODEL__FPN__IN_FEATURES": ["res2", "res3", "res4"]},
        "MODEL.RPN.IN_FEATURES must be among the p2, p3, p4, p5 of build_elsa_swin_fpn_backbone, "
        "got p2, p3, p4, p5, p6",
    ),
    "one stage without features": (
        [],
        RETINANET,
        "MODEL.RETINANET.IN_FEATURES must be among the p2, p3, p4, p5, p6 of "
        "build_elsa_swin_fpn_backbone, got p3, p4, p5, p6, p7",
    ),
    "proposals without features": (
        [],
        {"MODEL__META_ARCHITECTURE": "ProposalNetwork", "MODEL__RPN__IN_FEATURES": ["res4"]},
        "MODEL.RPN.IN_FEATURES must be among the p2, p3, p4, p5, p6 of build",
    ),
    "no features": (
        [],
        {"MODEL__ROI_HEADS__IN_FEATURES": []},
        "p6 of build_elsa_swin_fpn_backbone, got none",
    ),
    "segmentor without features": (
        [],
        {
            "MODEL__META_ARCHITECTURE": "SemanticSegmentor",
            "MODEL__SEM_SEG_HEAD__IN_FEATURES": ["res2"],
        },
        "MODEL.SEM_SEG_HEAD.IN_FEATURES must be among the p2, p3, p4, p5, p6 of build",
    ),
    "anchors of another number": (
        [],
        {"MODEL__ANCHOR_GENERATOR__SIZES": [[32], [64]]},
        "sizes of length 2 in anchor generator, but the number of input features is 5",
    ),
    "masks of one stage": ([], {**RETINANET, "MODEL__MASK_ON": True}, "MODEL.MASK_ON False, got"),
    "classes of one stage": (
        [],
        {**ONE_STAGE, "MODEL__RETINANET__NUM_CLASSES": 9},
        "has 10 classes, but MODEL.RETINANET.NUM_CLASSES is 9",
    ),
    "label maps of objects": (
        [],
        {"MODEL__META_ARCHITECTURE": "PanopticFPN"},
        "has no label maps beside its objects, which PanopticFPN needs",
    ),
    "keypoints without names": (
        [],
        {"MODEL__KEYPOINT_ON": True},
        "MODEL.KEYPOINT_ON needs the names of the keypoints of data set 'digits_training': key",
    ),
    "proposals without a file": (
        [],
        {"MODEL__LOAD_PROPOSALS": True},
        "DATASETS.PROPOSAL_FILES_TRAIN must have as many as DATASETS.TRAIN, which has 1, got 0",
    ),
    "neck without features": (
        [],
        {"MODEL__FPN__IN_FEATURES": ["res2", "res4"]},
        "must be consecutive features of MODEL.ELSA_SWIN.OUT_FEATURES",
    ),
    "unknown heads": ([], {"MODEL__ROI_HEADS__NAME": "Heads"}, "No object named 'Heads' found"),
    "unknown model": ([], {"MODEL__META_ARCHITECTURE": "RCNN"}, "'RCNN' is not registered"),
    "unknown precision": ([], {"SOLVER__AMP__DTYPE": "half"}, "float16, bfloat16, got 'half'"),
    "unknown resize": ([], {"INPUT__RESIZE_BACKEND": "opencv"}, "one of pil, cv2, got 'opencv'"),
    "unknown device": ([], {"MODEL__DEVICE": "gpu"}, "MODEL.DEVICE 'gpu' is no device"),
    "unregistered data": ([], {"DATASETS__TRAIN": ["cats"]}, "data set 'cats' is not registered"),
    "no data": ([], {"DATASETS__TRAIN": []}, "DATASETS.TRAIN names no data set"),
    "wrong classes": ([], {"MODEL__ROI_HEADS__NUM_CLASSES": 9}, "NUM_CLASSES is 9"),
    "indivisible batch": (["--num-gpus", "2"], {"SOLVER__IMS_PER_BATCH": 3}, "the 2 processes"),
    "no process": (["--num-gpus", "0"], {}, "got processes=0"),
    "evaluation without weights": (["--eval-only"], {}, "an evaluation needs weights"),
    "missing weights": ([], {"MODEL__WEIGHTS": "w.pth"}, "MODEL.WEIGHTS w.pth does not exist"),
    "weights that are a folder": ([], {"MODEL__WEIGHTS": "/"}, "MODEL.WEIGHTS / is a directory"),
    "unwritable output": ([], {"OUTPUT_DIR": CONFIG + "/out"}, "cannot be written"),
}


@pytest.mark.parametrize("flags, changes, message", REFUSALS.values(), ids=REFUSALS)
def test_refusals(digits, tmp_path, tool, capfd, monkeypatch, flags, changes, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    changes = {"OUTPUT_DIR": str(tmp_path / "out"), **changes}
    arguments = [*flags, *overrides(digits, **changes)]
    if "--config-file" not in flags:
        arguments = ["--config-file", CONFIG, *arguments]
    assert tool.main(arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("train_net: ") and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_vanished_is_refused(digits, tmp_path, tool, capfd):
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    keys = overrides(digits, OUTPUT_DIR=str(tmp_path))
    assert tool.main(["--config-file", CONFIG, "--resume", *keys]) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"train_net: no checkpoint in {tmp_path} can be resumed from: ")
    end = "; to start over, train in another folder"
    assert line.endswith(f"model_0000009.pth cannot be read: No such file or directory{end}")


def test_more_processes_than_gpus_are_refused(digits, tool, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert tool.main(["--num-gpus", "2", "--config-file", CONFIG, *overrides(digits)]) == 2
    assert "this machine has 1 GPUs, got processes=2" in capfd.readouterr().err


@pytest.mark.parametrize("spoil", ["missing", "empty", "cut off"])
@pytest.mark.parametrize("part", ["training", "validation"])
def test_spoilt_annotations_are_refused(digits, tmp_path, part, spoil, tool, capfd):
    # A name of its own: Detectron2's catalog lasts as long as the process.
    whole = (digits / f"annotations/instances_{part}.json").read_bytes()
    file = tmp_path / f"instances_{part}.json"
    if spoil != "missing":
        file.write_bytes(b"" if spoil == "empty" else whole[: len(whole) // 2])
    name = f"{spoil} {part}".replace(" ", "_")
    registered = [*datasets(digits), [name, str(file), str(digits / "images" / part)]]
    keys = {f"DATASETS__{'TRAIN' if part == 'training' else 'TEST'}": [name]}
    keys |= {"DATASETS__REGISTER_COCO": registered, "OUTPUT_DIR": str(tmp_path / "out")}
    assert tool.main(["--config-file", CONFIG, *overrides(digits, **keys)]) == 2
    expected = {"missing": "cannot be read", "empty": "is empty", "cut off": "is cut off"}[spoil]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and expected in lines[0] and str(file) in lines[0]
