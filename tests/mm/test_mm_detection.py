"""In mixed precision, MMDetection's heads score and place boxes in float32, as its release 2.11."""

import pytest
import torch

pytest.importorskip("mmdet")

from mm_tiny import REPOSITORY
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

PUBLISHED = REPOSITORY / "configs/mmdet/elsa_swin"
METHODS = {"mask-rcnn": "fpn", "cascade-mask-rcnn": "fpn_4conv1fc-giou"}
STOCK = {"Float32RPNHead": "RPNHead", "Float32BBoxHead": "ConvFCBBoxHead"}
WIDTHS = ("in_channels", "feat_channels", "conv_out_channels", "fc_out_channels")
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def heads(config, **more):
    """The head, narrow, and MMDetection's own with the same weights."""
    narrow = {**config, **{name: 8 for name in WIDTHS if name in config}, **more}
    narrow.pop("norm_cfg", None)
    stock = {**narrow, "type": STOCK[narrow["type"].rpartition(".")[2]]}
    with DefaultScope.overwrite_default_scope("mmdet"):
        first, second = MODELS.build(narrow), MODELS.build(stock)
    second.load_state_dict(first.state_dict())
    return first.eval(), second.eval()


def neighbours(start, number, dtype):
    """So many numbers, from ``start`` on, with none between them in a type of 16 bits."""
    bits = torch.tensor(start, dtype=dtype).view(torch.int16) + torch.arange(number)
    return bits.to(torch.int16).view(dtype)


@pytest.fixture(params=METHODS)
def model(request):
    """The config of a published detector's model."""
    name = f"{request.param}_elsa-swin-t-p4-w7_{METHODS[request.param]}_amp-ms-crop-1x_coco.py"
    return Config.fromfile(PUBLISHED / name).model


@dtypes
def test_proposals_are_ranked_without_ties(model, dtype):
    test = {**model.test_cfg.rpn, "nms": dict(type="nms", iou_threshold=1.0)}
    ours, stock = heads(model.rpn_head, test_cfg=Config(test))
    # Logits of one anchor at each position are those in the map's first channel, as they are.
    logits = neighbours(4.0 if dtype == torch.float16 else 1.0, 256, dtype)
    logits = logits[torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    level = torch.zeros(1, 8, 16, 16, dtype=dtype)
    level[0, 0] = logits.view(16, 16)
    empty = [torch.zeros(1, 8, size, size, dtype=dtype) for size in (8, 4, 2, 1)]
    for parameter in ours.parameters():
        torch.nn.init.zeros_(parameter)
    ours.rpn_conv.weight.data[0, 0, 1, 1] = 1
    ours.rpn_cls.weight.data[0, 0] = 1
    ours.rpn_cls.bias.data[1:] = -9
    stock.load_state_dict(ours.state_dict())
    metas = [dict(img_shape=(64, 64), scale_factor=(1, 1))]

    with torch.autocast("cpu", dtype), torch.no_grad():
        outputs, rounded = ours([level, *empty]), stock([level, *empty])
        found = ours.predict_by_feat(*outputs, batch_img_metas=metas)[0].scores[:256]
    for one, other in zip([*outputs[0], *outputs[1]], [*rounded[0], *rounded[1]], strict=True):
        assert one.dtype == torch.float32 and other.dtype == dtype
        assert torch.equal(one, other.float())
    assert torch.equal(found, logits.float().sigmoid().sort(descending=True).values)
    assert len(found.unique()) == 256
    assert len(rounded[0][0][0, 0].sigmoid().unique()) < 128  # as MMDetection's own head scores


@dtypes
def test_boxes_are_scored_in_float32(model, dtype):
    config = model.roi_head.bbox_head
    ours, stock = heads(config[0] if isinstance(config, list) else config)
    rois = torch.randn(64, 8, 7, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", dtype), torch.no_grad():
        outputs, rounded = ours(rois), stock(rois)
    for one, other in zip(outputs, rounded, strict=True):
        assert one.dtype == torch.float32 and other.dtype == dtype
        assert torch.equal(one, other.float())
