"""The digits models of both frameworks, with random weights that tell classes apart."""

from pathlib import Path

import torch

from elsa_tools.predict import load_inferencer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DET = {
    "detectron2": str(CONFIGS / "detectron2/digits/mask_rcnn_elsa_swin_digits.yaml"),
    "mmdet": str(CONFIGS / "mmdet/digits/mask-rcnn_elsa-swin_fpn_digits.py"),
}
SEG = {
    "detectron2": str(CONFIGS / "detectron2/digits/upernet_elsa_swin_digits.yaml"),
    "mmseg": str(CONFIGS / "mmseg/digits/elsa-swin_upernet_digits.py"),
}
# Options that leave out a detector's masks.
BOXES = {
    "detectron2": ["MODEL.MASK_ON", "False"],
    "mmdet": ["model.roi_head.mask_head=None", "model.roi_head.mask_roi_extractor=None"],
}
DIGITS = [str(digit) for digit in range(10)]


def untrained(config, options=()):
    """With scores far enough from 1 / 11 that some pass a threshold."""
    torch.manual_seed(3)
    inferencer = load_inferencer(config, None, device="cpu", options=options)
    for name, parameter in inferencer.model.named_parameters():
        if name.endswith(("fc_cls.weight", "cls_score.weight", "conv_seg.weight")):
            torch.nn.init.normal_(parameter, std=0.3)
    return inferencer


def save_untrained(config, path):
    """A checkpoint of OpenMMLab, with the names of the classes."""
    names = DIGITS if config in DET.values() else ["background", *DIGITS]
    meta = {"dataset_meta": {"classes": names}}
    torch.save({"meta": meta, "state_dict": untrained(config).model.state_dict()}, path)
    return str(path)
