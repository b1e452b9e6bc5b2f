"""The same detector in Detectron2 and in MMDetection: one set of weights, one set of targets."""

import re
from pathlib import Path

import detectron2.structures as d2
import numpy as np
import torch
from detectron2.modeling import build_model
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

from elsa_d2 import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
METHODS = {
    "mask_rcnn": "mask-rcnn_elsa-swin-{}-p4-w7_fpn_amp-ms-crop-{}_coco",
    "cascade_mask_rcnn": (
        "cascade-mask-rcnn_elsa-swin-{}-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-{}_coco"
    ),
}
# A small backbone and narrow heads; everything else is as in the published configs.
WIDTH = 32
ARCH = dict(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], group_width=8, kernel_size=3)
# Detectron2's names on the left; "~" stands for a cascade's stage with its point, or for nothing.
NAMES = [
    (r"backbone\.bottom_up\.(.+)", r"backbone.\1"),
    (r"proposal_generator\.rpn_head\.conv\.(.+)", r"rpn_head.rpn_conv.\1"),
    (r"proposal_generator\.rpn_head\.objectness_logits\.(.+)", r"rpn_head.rpn_cls.\1"),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.(.+)", r"rpn_head.rpn_reg.\1"),
    (r"roi_heads\.box_predictor\.~cls_score\.(.+)", r"roi_head.bbox_head.~fc_cls.\1"),
    (r"roi_heads\.box_predictor\.~bbox_pred\.(.+)", r"roi_head.bbox_head.~fc_reg.\1"),
    (r"roi_heads\.mask_head\.~deconv\.(.+)", r"roi_head.mask_head.~upsample.\1"),
    (r"roi_heads\.mask_head\.~predictor\.(.+)", r"roi_head.mask_head.~conv_logits.\1"),
]
# The same for numbered layers: prefix, prefix in MMDetection, its suffix, how far numbers differ.
NUMBERED = [
    ("backbone.fpn_lateral", "neck.lateral_convs.", ".conv", 2),
    ("backbone.fpn_output", "neck.fpn_convs.", ".conv", 2),
    ("roi_heads.box_head.~fc", "roi_head.bbox_head.~shared_fcs.", "", 1),
    ("roi_heads.mask_head.~mask_fcn", "roi_head.mask_head.~convs.", ".conv", 1),
    ("roi_heads.box_head.~conv", "roi_head.bbox_head.~shared_convs.", ".conv", 1),
]


def mmdet_name(name):
    """MMDetection's name of a parameter or buffer of Detectron2's model."""
    stage = re.search(r"(?<=_head\.|ictor\.)\d\.|(?<=box_head\.)\d\.", name)
    stage = stage[0] if stage else ""
    plain = re.sub(r"(box_head|box_predictor|mask_head)\.(\d\.)?", r"\1.~", name)
    for pattern, replacement in NAMES:
        if match := re.fullmatch(pattern, plain):
            return match.expand(replacement).replace("~", stage)
    for prefix, other, suffix, shift in NUMBERED:
        if match := re.fullmatch(re.escape(prefix) + r"(\d)\.(norm\.)?(\w+)", plain):
            number = int(match[1]) - shift
            layer = ".bn" if match[2] else suffix
            return f"{other}{number}{layer}.{match[3]}".replace("~", stage)
    raise KeyError(name)


def mmdet_state(model):
    """Detectron2's parameters and buffers under MMDetection's names."""
    state = model.state_dict()
    return {mmdet_name(name): state[name] for name in state if not name.startswith("pixel_")}


def d2_config(method, variant="t", schedule="1x", overrides=()):
    file = f"detectron2/COCO-InstanceSegmentation/{method}_elsa_swin_{variant}_fpn_{schedule}.yaml"
    return load_config(str(CONFIGS / file), ["MODEL.DEVICE", "cpu", *map(str, overrides)])


def mmdet_config(method, variant="t", schedule="1x"):
    name = METHODS[method].format(variant, schedule)
    return Config.fromfile(CONFIGS / f"mmdet/elsa_swin/{name}.py")


def build_mmdet(cfg):
    init_default_scope("mmdet")
    return MODELS.build(cfg.model)


def pair(method, overrides, change):
    """Both models in training mode, narrow and with the same, unusual, weights.

    ``overrides`` are Detectron2's, ``change`` alters MMDetection's model config in the same sense.
    """
    keys = {
        "MODEL.ELSA_SWIN.ARCH": "custom",
        "MODEL.ELSA_SWIN.DROP_PATH_RATE": 0.0,
        "MODEL.FPN.OUT_CHANNELS": WIDTH,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": WIDTH,
        "MODEL.ROI_BOX_HEAD.FC_DIM": WIDTH,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": WIDTH,
        **{f"MODEL.ELSA_SWIN.CUSTOM_ARCH.{name.upper()}": ARCH[name] for name in ARCH},
        **overrides,
    }
    pairs = [part for item in keys.items() for part in item]
    torch.manual_seed(0)
    first = build_model(d2_config(method, overrides=pairs))
    with torch.no_grad():  # first weights make all boxes and classes nearly alike
        for name, parameter in first.named_parameters():
            if re.search(r"(objectness_logits|deltas|cls_score|bbox_pred|predictor)\.weight", name):
                parameter.normal_(std=0.2)
    model = mmdet_config(method).model
    model.backbone.update(arch=ARCH, drop_path_rate=0.0)
    model.neck.in_channels = [ARCH["embed_dim"] * 2**stage for stage in range(4)]
    _narrow(model)
    change(model)
    init_default_scope("mmdet")
    second = MODELS.build(model)
    second.load_state_dict(mmdet_state(first), strict=True)
    return first.train(), second.train()


def _narrow(node):
    """Sets each width of neck and heads, in place."""
    for value in node.values() if isinstance(node, dict) else node:
        if isinstance(value, (dict, list)):
            _narrow(value)
    if isinstance(node, dict):
        widths = ("in_channels", "out_channels", "feat_channels", "fc_out_channels")
        for key in (*widths, "conv_out_channels"):
            if isinstance(node.get(key), int):
                node[key] = WIDTH


# All boxes are trained, so that nothing is drawn by chance, and detected.
EVERY_BOX = {
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 999,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
}


def every_box(model):
    """The same in MMDetection's model config."""
    model.test_cfg.rcnn.score_thr = 0.0
    rcnn = model.train_cfg.rcnn
    for stage in rcnn if isinstance(rcnn, list) else [rcnn]:
        stage.sampler.update(num=999, pos_fraction=1.0)


def mmdet_loss(name):
    """MMDetection's name of a loss of the heads."""
    plain, _, stage = name.partition("_stage")
    other = {"loss_box_reg": "loss_bbox"}.get(plain, plain)
    return f"s{stage}.{other}" if stage else other


def scene(seed, size=(128, 192), number=5, classes=80):
    """Boxes [N, 4] well inside the image, classes [N], elliptic masks [N, H, W] of a scene."""
    random = np.random.default_rng(seed)
    height, width = size
    extent = random.uniform(26, 60, (number, 2))
    centre = random.uniform(36, [width - 36, height - 36], (number, 2))
    boxes = np.concatenate([centre - extent / 2, centre + extent / 2], 1)
    boxes = boxes.clip(0, [width, height] * 2).astype(np.float32)
    y, x = np.mgrid[:height, :width]
    masks = [
        ((x - c[0]) / e[0]) ** 2 + ((y - c[1]) / e[1]) ** 2 <= 0.25
        for c, e in zip(centre, extent, strict=True)
    ]
    labels = random.integers(0, classes, number)
    return torch.from_numpy(boxes), torch.from_numpy(labels), np.stack(masks)


def hard_scene(size=(128, 192)):
    """As `scene`: small, thin, overlapping, equal and half visible rectangles, some at the border.

    Anchors of 3x60 pixels exist nowhere, and none overlaps by 0.3 with 8x8 pixels.
    """
    height, width = size
    boxes = [
        [50, 40, 58, 48],
        [101, 70, 109, 78],
        [30, 20, 33, 80],
        [80, 60, 140, 63],
        [60, 52, 92, 84],
        [64, 56, 97, 88],
        [120, 10, 160, 40],
        [120, 10, 160, 40],
        [0, 0, 30, 26],
        [width - 25, height - 40, width, height],
        [width - 8, 60, width, 68],
        [40, height - 5, 90, height],
        [0, 0, width, height],
    ]
    boxes = np.array(boxes).clip(0, [width, height] * 2)
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
    masks = np.zeros((len(boxes), height, width), bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return torch.from_numpy(boxes).float(), torch.arange(len(boxes)) * 6, masks


def proposals_for(boxes, size, seed, number=60):
    """Boxes [number, 4] near and far from the given ones."""
    generator = torch.Generator().manual_seed(seed)
    near = boxes.repeat(number // 2 // len(boxes) + 1, 1)[: number // 2]
    near = near + torch.randn(near.shape, generator=generator) * 4
    corner = torch.rand(number - len(near), 2, generator=generator) * 0.7
    far = torch.cat([corner, corner + 0.1 + 0.2 * torch.rand(corner.shape, generator=generator)], 1)
    far = far * torch.tensor([size[1], size[0]] * 2)
    everything = torch.cat([near, far])
    everything[:, 0::2].clamp_(0, size[1])
    everything[:, 1::2].clamp_(0, size[0])
    return everything


def d2_proposals(boxes, size):
    return [
        d2.Instances(size, proposal_boxes=d2.Boxes(one), objectness_logits=torch.zeros(len(one)))
        for one in boxes
    ]


def mmdet_proposals(boxes):
    return [InstanceData(bboxes=one) for one in boxes]


def d2_targets(scenes, *sizes):
    """Of images of one size, or of a size each."""
    return [
        d2.Instances(
            size,
            gt_boxes=d2.Boxes(boxes),
            gt_classes=labels,
            gt_masks=d2.BitMasks(torch.from_numpy(masks)),
        )
        for size, (boxes, labels, masks) in zip(_each(sizes, scenes), scenes, strict=True)
    ]


def mmdet_samples(scenes, *sizes):
    """The same, in a batch that is padded to the largest height and width."""
    batch = tuple(max(sides) for sides in zip(*sizes, strict=True))
    samples = []
    for size, (boxes, labels, masks) in zip(_each(sizes, scenes), scenes, strict=True):
        padded = tuple(-(-side // 32) * 32 for side in size)
        shapes = dict(img_shape=size, pad_shape=padded, batch_input_shape=batch, ori_shape=size)
        sample = DetDataSample(metainfo=dict(shapes, scale_factor=(1.0, 1.0)))
        masks = BitmapMasks(masks.astype(np.uint8), *size)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels, masks=masks)
        sample.ignored_instances = InstanceData(
            bboxes=boxes.new_zeros(0, 4), labels=labels.new_zeros(0)
        )
        samples.append(sample)
    return samples


def _each(sizes, scenes):
    return sizes * len(scenes) if len(sizes) == 1 else sizes
