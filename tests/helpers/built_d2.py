"""What Detectron2 builds from a config, in the words of tests/helpers/recipes.py."""

import inspect
import re
from functools import cached_property
from pathlib import Path

import torch
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling import META_ARCH_REGISTRY, build_anchor_generator, build_model
from detectron2.structures import Boxes, Instances, pairwise_iou
from parity import mmdet_name
from recipes import LETTERS, drop_paths

from elsa_d2 import Trainer, load_config
from elsa_d2.data.augmentation import OpenCVResizeShortestEdge
from elsa_d2.data.mapper import DetectionMapper
from elsa_d2.data.sem_seg_augmentation import (
    PhotometricDistortion,
    RandomCropCategoryArea,
    ResizeToFit,
)
from elsa_d2.data.sem_seg_mapper import SemSegMapper
from elsa_d2.modeling.sem_seg_tta import SegmentorWithTTA, at_test_ratios

CONFIGS = Path(__file__).resolve().parents[2] / "configs/detectron2"


def config_of(recipe):
    backbone = f"elsa_{'volo' if recipe.volo else 'swin'}_{LETTERS[recipe.arch]}"
    if recipe.method == "upernet":
        return CONFIGS / f"ADE20K-SemanticSegmentation/upernet_{backbone}_160k.yaml"
    method = recipe.method.replace("-", "_")
    name = f"{method}_{backbone}_fpn_{recipe.epochs // 12}x.yaml"
    return CONFIGS / "COCO-InstanceSegmentation" / name


class Built:
    """The objects of one config; models are without memory."""

    def __init__(self, recipe):
        self.recipe = recipe
        self.cfg = load_config(str(config_of(recipe)), ["MODEL.DEVICE", "cpu"])
        with torch.device("meta"):
            self.model = META_ARCH_REGISTRY.get(self.cfg.MODEL.META_ARCHITECTURE)(self.cfg)

    @property
    def backbone(self):
        if self.recipe.method == "upernet":
            return self.model.backbone, "backbone."
        return self.model.backbone.bottom_up, "backbone.bottom_up."

    @cached_property
    def optimizer(self):
        return Trainer.build_optimizer(self.cfg, self.model)

    def rates(self, recipe, iterations):
        """Learning rates at iterations."""
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], self.cfg.SOLVER.BASE_LR)
        scheduler = Trainer.build_lr_scheduler(self.cfg, optimizer)
        rates = []
        for iteration in iterations:
            scheduler.last_epoch = iteration
            rates += scheduler.get_lr()
        return rates

    def length(self):
        """Of the training: epochs or iterations."""
        iterations = self.cfg.SOLVER.MAX_ITER
        if self.recipe.epochs is None:
            return iterations
        assert iterations == self.recipe.iterations
        return self.recipe.epochs

    def positive_overlaps(self, boxes, size):
        """IoU of the positive anchors of each box [N, 4] with it, in an image of a size."""
        strides = [2**i for i in range(2, 7)]
        anchors = build_anchor_generator(self.cfg, [ShapeSpec(stride=s) for s in strides])
        maps = [torch.zeros(1, 1, *(-(-side // stride) for side in size)) for stride in strides]
        targets = Instances(size, gt_boxes=Boxes(boxes))
        every = anchors(maps)
        (labels,), (targets,) = self.model.proposal_generator.label_and_sample_anchors(
            every, [targets]
        )
        overlaps = pairwise_iou(Boxes(boxes), Boxes.cat(every))
        return [
            row[(labels == 1) & (targets == box).all(1)].tolist()
            for row, box in zip(overlaps, boxes, strict=True)
        ]

    def pooled(self, maps, box):
        """What each RoI pooling makes of maps [1, C, H_i, W_i] and a box [1, 4]."""
        roi = self.model.roi_heads
        return [pooler(maps, [Boxes(box)]) for pooler in (roi.box_pooler, roi.mask_pooler)]

    def first_weights(self):
        """Parameters of neck and heads, by OpenMMLab's names or, of UPerNet, nearly so."""
        named = build_model(self.cfg).named_parameters()
        if self.recipe.method == "upernet":
            words = {".norm.": ".bn.", "_predictor.": ".conv_seg.", ".predictor.": ".conv_seg."}
            pattern = "|".join(map(re.escape, words))
            new = {re.sub(pattern, lambda m: words[m[0]], name): part for name, part in named}
        else:
            new = {mmdet_name(name): part for name, part in named}
        return {name: part for name, part in new.items() if not name.startswith("backbone.")}

    def facts(self):
        cfg, solver = self.cfg, self.cfg.SOLVER
        sem_seg = self.recipe.method == "upernet"
        mapper = SemSegMapper if sem_seg else DetectionMapper
        self.steps = {type(a): a for a in mapper(cfg, True).augmentations.augs}
        self.test_steps = {type(a): a for a in mapper(cfg, False).augmentations.augs}
        facts = {
            "colours": (cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD)),
            "drop paths": drop_paths(self.backbone[0]),
            "images on a GPU": solver.IMS_PER_BATCH // self.recipe.gpus,
            "mixed precision": solver.AMP.ENABLED,
            "clipping": solver.CLIP_GRADIENTS.CLIP_VALUE if solver.CLIP_GRADIENTS.ENABLED else None,
            "flip": self.steps[T.RandomFlip].prob,
            "betas": self.optimizer.defaults["betas"],
        }
        return facts | (self._upernet() if sem_seg else self._rcnn())

    def _rcnn(self):
        model, cfg = self.model, self.cfg
        rpn, roi = model.proposal_generator, model.roi_heads
        anchors = build_anchor_generator(cfg, [ShapeSpec(stride=2**i) for i in range(2, 7)])
        cells = [(cell[:, 2:] - cell[:, :2]).tolist() for cell in anchors.cell_anchors]
        heads, predictors = _list(roi.box_head), _list(roi.box_predictor)
        matchers = getattr(roi, "proposal_matchers", None) or [roi.proposal_matcher]
        masks = _list(roi.mask_head)
        crop = self.steps[T.RandomApply]
        first, cropping = crop.aug.augs
        resize = self.steps[OpenCVResizeShortestEdge]
        test = self.test_steps[OpenCVResizeShortestEdge]
        poolers = (roi.box_pooler, roi.mask_pooler)
        (head,) = {_head(head, cfg.MODEL.ROI_BOX_HEAD.NORM) for head in heads}
        weights = [predictor.box2box_transform.weights for predictor in predictors]
        return {
            "padding": model.backbone.size_divisibility,
            "training sizes": (tuple(resize.short_edge_length), resize.max_size),
            "sizes before the crop": (tuple(first.short_edge_length), first.max_size),
            "crop": (cropping.crop_type, tuple(cropping.crop_size), crop.prob),
            "test size": (test.short_edge_length[0], test.max_size),
            "resize": "cv2",  # the class of all three
            "least edge": cfg.DATALOADER.MIN_IMAGE_SIZE,
            "empty images": not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            "pyramid": (
                model.backbone._out_feature_channels["p2"],
                len(model.backbone._out_features),
            ),
            "anchor sizes": tuple(round(_one({_area(*wh) for wh in cell})) for cell in cells),
            "anchor ratios": _one({tuple(round(h / w, 4) for w, h in cell) for cell in cells}),
            "rpn thresholds": tuple(rpn.anchor_matcher.thresholds[1:-1]),
            "rpn samples": (rpn.batch_size_per_image, rpn.positive_fraction),
            "rpn nms": (rpn.nms_thresh, rpn.nms_thresh),
            "rpn test proposals": (rpn.pre_nms_topk[False], rpn.post_nms_topk[False]),
            "roi samples": (roi.batch_size_per_image, roi.positive_fraction),
            "roi resolutions": tuple(pooler.output_size[0] for pooler in poolers),
            "sampling ratios": tuple(
                _one({level.sampling_ratio for level in pooler.level_poolers}) for pooler in poolers
            ),
            "classes": _one(
                {p.num_classes for p in [roi, *predictors]}
                | {mask.predictor.out_channels for mask in masks}
            ),
            "class-specific boxes": {p.bbox_pred.out_features for p in predictors} == {320},
            "mask convolutions": _one({len(mask.conv_norm_relus) for mask in masks}),
            "score threshold": _one({p.test_score_thresh for p in predictors}),
            "nms threshold": _one({p.test_nms_thresh for p in predictors}),
            "detections": _one({p.test_topk_per_image for p in predictors}),
            "mask threshold": inspect.signature(paste_masks_in_image)
            .parameters["threshold"]
            .default,
            "rpn box loss": (
                *_box_loss(rpn.box_reg_loss_type, rpn.smooth_l1_beta),
                rpn.loss_weight["loss_rpn_loc"],
            ),
            "rpn training proposals": (rpn.pre_nms_topk[True], rpn.post_nms_topk[True]),
            "rpn border": rpn.anchor_boundary_thresh,
            "box loss": _one(
                {
                    (
                        _box_loss(p.box_reg_loss_type, p.smooth_l1_beta)[0],
                        p.loss_weight.get("loss_box_reg", 1.0),
                    )
                    for p in predictors
                }
            ),
            "stage weights": tuple(getattr(roi, "stage_loss_weights", (1,))),
            "roi thresholds": tuple(matcher.thresholds[1] for matcher in matchers),
            "target deviations": tuple(tuple(1 / weight for weight in stage) for stage in weights),
            "box head": head,
            "mask heads": len(masks),
        }

    def _upernet(self):
        cfg, head = self.cfg, self.model.sem_seg_head
        crop, resize = self.steps[RandomCropCategoryArea], self.steps[ResizeToFit]
        test_scale = self.test_steps[ResizeToFit].scale
        augmented = SegmentorWithTTA(cfg, self.model)
        validated = at_test_ratios(cfg, self.model)
        once = validated is self.model
        return {
            "crop": (crop.size, crop.max_ratio),
            "training scale": (resize.scale, resize.ratio_range),
            "test scale": test_scale,
            "validation scales": [test_scale] if once else _sizes(validated),
            "validation flip": not once and True in validated.flips,
            "best checkpoint": cfg.TEST.BEST_METRIC.removeprefix("sem_seg/") or None,
            "augmented test scales": _sizes(augmented),
            "augmented test flip": augmented.flips == (False, True),
            "colours distorted": PhotometricDistortion in self.steps,
            "head": (head.fpn_bottleneck.out_channels, head.pool_scales, head.dropout.p),
            "norm": cfg.MODEL.SEM_SEG_HEAD.NORM,
            "auxiliary head": (
                head.aux_conv.in_channels,
                head.aux_conv.out_channels,
                head.aux_loss_weight,
            ),
            "test padding": self.model.backbone.size_divisibility,
            "loss weight": head.loss_weight,
            "ignored label": head.ignore_value,
            "classes": head.num_classes,
            "saved every": cfg.SOLVER.CHECKPOINT_PERIOD,
            "evaluated every": cfg.TEST.EVAL_PERIOD,
        }


def _sizes(augmented):
    return [tuple(int(s * step.ratio_range[0]) for s in step.scale) for step in augmented.resizes]


def _list(part):
    return list(part) if isinstance(part, torch.nn.ModuleList) else [part]


def _one(values):
    (value,) = values
    return value


def _area(width, height):
    """Side of the square of the same area."""
    return round((width * height) ** 0.5, 2)


def _box_loss(kind, beta):
    if kind == "smooth_l1":
        return ("SmoothL1", beta) if beta else ("L1", None)
    return {"giou": "GIoU"}[kind], None


def _head(head, norm):
    """Convolutions, fully connected layers, their width, norm."""
    convs, fcs = head.conv_norm_relus, head.fcs
    assert all(bool(conv.norm) == bool(norm) for conv in convs)
    return len(convs), len(fcs), fcs[0].out_features, norm or None
