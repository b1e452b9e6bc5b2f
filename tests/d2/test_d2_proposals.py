"""The RPN that is trained and ranks as MMDetection's does, compared with MMDetection's."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")

from detectron2.data import DatasetCatalog
from detectron2.data.build import load_proposals_into_dataset
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_proposal_generator
from detectron2.structures import ImageList
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope

import elsa_d2
from elsa_core.runtime.errors import UsageError
from elsa_d2.data.proposal_files import check_proposals

SIZES = [(90, 120), (96, 128)]
STRIDES = (4, 8, 16, 32, 64)
BEFORE, AFTER = 50, 40
CONFIG = "COCO-InstanceSegmentation/mask_rcnn_elsa_swin_t_fpn_1x.yaml"
# The published models' anchors, and those of the digits, of two sizes.
ANCHORS = {
    CONFIG: dict(scales=[8], ratios=[0.5, 1.0, 2.0]),
    "digits/mask_rcnn_elsa_swin_digits.yaml": dict(scales=[8, 11.3], ratios=[1.0, 2.0]),
}


@pytest.fixture(scope="module")
def ours():
    return build(CONFIG)


def build(config):
    cfg = elsa_d2.load_config(elsa_d2.get_config_file(config))
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = BEFORE
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = AFTER
    shapes = {f"p{i + 2}": ShapeSpec(channels=256, stride=s) for i, s in enumerate(STRIDES)}
    return build_proposal_generator(cfg, shapes)


def random_outputs(deviation, number=3):
    """Logits [2, number, H, W] and deltas [2, number * 4, H, W] of each level."""
    shapes = [(96 // s + (96 % s > 0), 128 // s) for s in STRIDES]
    logits = [deviation * torch.randn(2, number, *shape) for shape in shapes]
    return logits, [0.5 * torch.randn(2, number * 4, *shape) for shape in shapes]


def propose(rpn, logits, deltas):
    images = ImageList(torch.zeros(2, 3, 96, 128), SIZES)
    anchors = rpn.anchor_generator(logits)
    flat = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
    moved = [x.view(2, -1, 4, *x.shape[-2:]).permute(0, 3, 4, 1, 2).flatten(1, -2) for x in deltas]
    return rpn.predict_proposals(anchors, flat, moved, images.image_sizes)


def propose_in_mmdet(logits, deltas, least, anchors):
    head = dict(
        type="RPNHead",
        in_channels=256,
        feat_channels=256,
        anchor_generator=dict(type="AnchorGenerator", strides=STRIDES, **anchors),
        test_cfg=ConfigDict(
            nms_pre=BEFORE,
            max_per_img=AFTER,
            nms=dict(type="nms", iou_threshold=0.7),
            min_bbox_size=least,
        ),
    )
    with DefaultScope.overwrite_default_scope("mmdet"):
        metas = [dict(img_shape=size) for size in SIZES]
        return MODELS.build(head).predict_by_feat(logits, deltas, batch_img_metas=metas)


# The larger the logits, the more of them become the same probability.
@pytest.mark.parametrize("deviation", [1, 10, 40])
# -1 keeps boxes without area, as the original does; some of them are nowhere in the image.
@pytest.mark.parametrize("least", [0, -1])
@pytest.mark.parametrize("config", ANCHORS)
def test_the_same_boxes_in_the_same_order(deviation, least, config, monkeypatch):
    """To the bit, whatever is suppressed."""
    rpn, anchors = build(config).eval(), ANCHORS[config]
    monkeypatch.setattr(rpn, "min_box_size", least)
    sizes, ratios = map(len, anchors.values())
    for seed in range(4):
        torch.manual_seed(seed)
        logits, deltas = random_outputs(deviation, sizes * ratios)
        for x in deltas:
            x[:, ::4] += 20 * (torch.rand_like(x[:, ::4]) < 0.1)
        theirs = propose_in_mmdet(logits, deltas, least, anchors)
        # MMDetection's channels are by ratio, ours by size.
        mine = [
            [x.unflatten(1, (ratios, sizes, -1)).transpose(1, 2).flatten(1, 3) for x in part]
            for part in (logits, deltas)
        ]
        found = propose(rpn, *mine)
        empty = sum((~item.proposal_boxes.nonempty()).sum() for item in found)
        assert (empty > 0) == (least < 0)
        for item, other in zip(found, theirs, strict=True):
            assert len(item) == AFTER
            chances = item.objectness_logits.sigmoid()
            torch.testing.assert_close(chances, other.scores, rtol=0, atol=1e-6)
            assert torch.equal(item.proposal_boxes.tensor, other.bboxes)


def test_images_without_any_box(ours):
    logits, deltas = random_outputs(1)
    nowhere = [torch.full_like(x, float("nan")) for x in logits]
    assert [len(found) for found in propose(ours.eval(), nowhere, deltas)] == [0, 0]


def test_training_leaves_out_what_is_not_finite(ours):
    """Its losses show it."""
    logits, deltas = random_outputs(1)
    logits[2][0, 0] = float("inf")
    deltas[1][1] = float("nan")
    found = propose(ours.train(), logits, deltas)
    assert all(len(boxes) for boxes in found)
    assert all(boxes.proposal_boxes.tensor.isfinite().all() for boxes in found)
    assert all(boxes.objectness_logits.isfinite().all() for boxes in found)


def test_scores_are_not_rounded_in_mixed_precision(ours):
    """Half the logits of a level share a value as bfloat16 probabilities."""
    torch.manual_seed(0)
    logits, deltas = random_outputs(3)
    half = [x.bfloat16() for x in logits], [x.bfloat16() for x in deltas]
    with torch.autocast("cpu", torch.bfloat16):
        found = propose(ours.eval(), *half)
    expected = propose(ours, *([x.float() for x in part] for part in half))
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine.proposal_boxes.tensor, other.proposal_boxes.tensor)
        assert torch.equal(mine.objectness_logits.float(), other.objectness_logits)


def test_min_size_is_the_key(ours):
    cfg = elsa_d2.load_config(
        elsa_d2.get_config_file(CONFIG), ["MODEL.PROPOSAL_GENERATOR.MIN_SIZE", "-1"]
    )
    shapes = {f"p{i + 2}": ShapeSpec(channels=256, stride=s) for i, s in enumerate(STRIDES)}
    with torch.device("meta"):
        assert build_proposal_generator(cfg, shapes).min_box_size == -1
    assert ours.min_box_size == 0


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def proposal_file(**changes):
    scores, boxes = np.ones(3, np.float32), np.ones((3, 4), np.float32)
    content = {"ids": [1, 2], "boxes": [boxes] * 2, "objectness_logits": [scores] * 2}
    return {key: value for key, value in {**content, **changes}.items() if value is not None}


OLD = {"ids": None, "objectness_logits": None, "indexes": ["1", "2"], "scores": [np.ones(3)] * 2}


@pytest.mark.parametrize(
    "files, changes, words",
    [
        (["a.pkl"], {}, None),
        (["a.pkl"], {"ids": ["2", "1", "7"], "boxes": [1] * 3, "objectness_logits": [1] * 3}, None),
        (["a.pkl"], {**OLD, "bbox_mode": 0}, None),
        ([], {}, "PROPOSAL_FILES_TEST must have as many as DATASETS.TEST, which has 1, got 0"),
        (["a.pkl", "a.pkl"], {}, "DATASETS.TEST, which has 1, got 2"),
        (["b.pkl"], {}, "DATASETS.PROPOSAL_FILES_TEST b.pkl does not exist"),
        (["a.pkl"], {"boxes": None}, "a.pkl holds no proposals: it has no boxes"),
        (["a.pkl"], {"ids": [1]}, "must have boxes and scores for each of 1 images"),
        (["a.pkl"], {"ids": [1, 3]}, "no proposals for 1 of the 2 images of data set .*first is 2"),
        (["a.pkl"], {"more": Evil()}, "would execute code"),
        (["a.pkl"], None, "is cut off|is damaged"),
    ],
)
def test_files_of_proposals(tmp_path, monkeypatch, clean_catalog, files, changes, words):
    """What a run cannot use ends it before it begins, and nothing in a file is executed."""
    monkeypatch.chdir(tmp_path)
    DatasetCatalog.register("two", lambda: [{"image_id": 1}, {"image_id": 2}])
    content = pickle.dumps(proposal_file(**(changes or {})))
    Path("a.pkl").write_bytes(content if changes is not None else content[:-40])
    cfg = elsa_d2.load_config()
    cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST = ["two"], files
    check_proposals(cfg, eval_only=True)  # without MODEL.LOAD_PROPOSALS, nothing is looked at
    cfg.MODEL.LOAD_PROPOSALS = True
    if words is None:
        check_proposals(cfg, eval_only=True)
        return
    with pytest.raises(UsageError, match=words):
        check_proposals(cfg, eval_only=True)
    assert not Path("touched").exists()


def test_a_file_of_proposals_that_passes_is_one_that_detectron2_reads(tmp_path):
    records = [{"image_id": 1}, {"image_id": 2}]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(proposal_file()))
    for record in load_proposals_into_dataset(records, str(tmp_path / "a.pkl")):
        assert record["proposal_boxes"].shape == (3, 4)
