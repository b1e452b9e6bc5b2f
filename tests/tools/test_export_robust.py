"""What must not be exported, and what must not happen to files and programs when it is."""

import pytest
from digit_models import DET, SEG

from elsa_core.runtime.errors import UsageError
from elsa_tools.export.build import wrap
from elsa_tools.predict import load_inferencer

OTHER_MM = {
    "neck.lateral_convs.0.gn.eps": "neck=dict(norm_cfg=dict(eps=0.1))",
    "the activation of neck": "neck=dict(act_cfg=dict(type='ReLU'))",
    "neck.lateral_convs.0.conv must be a plain": "neck=dict(conv_cfg=dict(type='ConvWS'))",
    "roi_head.bbox_head.fc_cls must be a plain": (
        "roi_head=dict(bbox_head=dict(cls_predictor_cfg=dict(type='NormedLinear')))"
    ),
    "strides": "rpn_head=dict(anchor_generator=dict(strides=[8, 16, 32, 64, 128]))",
    "featmap_strides": "roi_head=dict(bbox_roi_extractor=dict(featmap_strides=[4, 8]))",
    "nms_pre must be at least 1": "test_cfg=dict(rpn=dict(nms_pre=-1))",
    "rcnn.max_per_img must be at least 1": "test_cfg=dict(rcnn=dict(max_per_img=-1))",
    "mask_thr_binary must be at least 0": "test_cfg=dict(rcnn=dict(mask_thr_binary=-1))",
    "has a mask head": "roi_head=dict(mask_head=None, mask_roi_extractor=None)",
    "cannot be built: AssertionError": "neck=dict(end_level=2)",
}


@pytest.mark.parametrize("part", OTHER_MM)
def test_other_parts_of_mmdetection_are_named(part, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(f"_base_ = [{DET['mmdet']!r}]\nmodel = dict({OTHER_MM[part]})\n")
    with pytest.raises(UsageError, match=part):
        wrap(load_inferencer(str(config), None, device="cpu"))


OTHER_D2 = {
    "fpn_lateral2.norm must be a plain": ["MODEL.FPN.NORM", "LN"],
    "ROI_HEADS.IN_FEATURES": ["MODEL.ROI_HEADS.IN_FEATURES", "['p3', 'p4', 'p5']"],
    "DETECTIONS_PER_IMAGE must be at least 1": ["TEST.DETECTIONS_PER_IMAGE", "-1"],
    "PRE_NMS_TOPK_TEST must be at least 1": ["MODEL.RPN.PRE_NMS_TOPK_TEST", "0"],
}


@pytest.mark.parametrize("part", OTHER_D2)
def test_other_parts_of_detectron2_are_named(part):
    with pytest.raises(UsageError, match=part):
        wrap(load_inferencer(DET["detectron2"], None, device="cpu", options=OTHER_D2[part]))


@pytest.mark.parametrize("norm", ["FrozenBN", "naiveSyncBN"])
def test_ordinary_norms_of_detectron2_are_exported(norm):
    options = ["MODEL.FPN.NORM", norm]
    assert wrap(load_inferencer(DET["detectron2"], None, device="cpu", options=options))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("align_corners", "decode_head=dict(align_corners=True)"),
        ("out_channels", "decode_head=dict(num_classes=2, out_channels=1)"),
        (
            "has a neck",
            "neck=dict(type='FPN', in_channels=[32, 64, 128, 256], num_outs=4, out_channels=48)",
        ),
    ],
)
def test_other_parts_of_mmsegmentation_are_named(part, change, tmp_path):
    config = tmp_path / "config.py"
    body = f"_base_ = [{SEG['mmseg']!r}]\nmodel = dict({change}, auxiliary_head=None)\n"
    config.write_text(body)
    with pytest.raises(UsageError, match=part):
        wrap(load_inferencer(str(config), None, device="cpu"))
