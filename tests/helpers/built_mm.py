"""What OpenMMLab builds from a config, in the words of tests/helpers/recipes.py."""

import copy
import json
from functools import cache, cached_property
from pathlib import Path

import torch
from mmdet.registry import TASK_UTILS, TRANSFORMS
from mmdet.structures.bbox import bbox2roi, bbox_overlaps
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, DefaultScope
from mmengine.structures import InstanceData
from mmseg.registry import TRANSFORMS as SEG_TRANSFORMS
from recipes import LETTERS, drop_paths

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def config_of(recipe):
    family, letter = "elsa_volo" if recipe.volo else "elsa_swin", LETTERS[recipe.arch]
    if recipe.method == "upernet":
        arch = f"volo-{letter}" if recipe.volo else f"swin-{recipe.arch}-patch4-window7"
        name = f"elsa-{arch}-in1k-pre_upernet_8xb2-160k_ade20k-512x512"
        return CONFIGS / f"mmseg/{family}/{name}.py"
    arch = f"volo-{letter}" if recipe.volo else f"swin-{letter}-p4-w7"
    head = "4conv1fc-giou_" if recipe.method.startswith("cascade") else ""
    name = f"{recipe.method}_elsa-{arch}_fpn_{head}amp-ms-crop"
    return CONFIGS / f"mmdet/{family}/{name}-{recipe.epochs // 12}x_coco.py"


class Built:
    """The objects of one config; models are without memory."""

    def __init__(self, recipe):
        self.cfg = Config.fromfile(config_of(recipe))
        with self._scope():
            self.preprocessor = MODELS.build(self.cfg.model.data_preprocessor)
            with torch.device("meta"):
                self.model = MODELS.build(self.cfg.model)

    def _scope(self):
        return DefaultScope.overwrite_default_scope(self.cfg.default_scope)

    @property
    def backbone(self):
        return self.model.backbone, "backbone."

    @cached_property
    def optimizer(self):
        wrapper = self.cfg.optim_wrapper.copy()
        if wrapper.type == "AmpOptimWrapper":  # it needs a GPU, its optimizer does not
            wrapper.type = "OptimWrapper"
            del wrapper.loss_scale
        with self._scope():
            return build_optim_wrapper(self.model, wrapper).optimizer

    def rates(self, recipe, iterations):
        """Learning rates at iterations, by stepping the schedulers as the training loop does."""
        schedule = json.dumps(self.cfg.to_dict()["param_scheduler"])
        # Between warm-up and steps nothing changes: long epochs need not be stepped through.
        epoch = recipe.iterations // recipe.epochs if recipe.epochs else None
        last = recipe.warmup + 1 if epoch else max(iterations)
        return _rates(schedule, recipe.lr, tuple(iterations), epoch, last)

    def pooled(self, maps, box):
        """What each RoI pooling makes of maps [1, C, H_i, W_i] and a box [1, 4]."""
        roi = self.model.roi_head
        extractors = [*_list(roi.bbox_roi_extractor), *_list(roi.mask_roi_extractor)]
        return [extractor(tuple(maps), bbox2roi([box])) for extractor in extractors]

    def first_weights(self):
        """Parameters of neck and heads, by MMDetection's or MMSegmentation's names."""
        model = copy.deepcopy(self.cfg.model)
        model.backbone = dict(type=torch.nn.Identity)
        with self._scope():
            built = MODELS.build(model)
        built.init_weights()
        return dict(built.named_parameters())

    def length(self):
        """Of the training: epochs or iterations."""
        return self.cfg.train_cfg.get("max_epochs") or self.cfg.train_cfg.max_iters

    def positive_overlaps(self, boxes, size):
        """IoU of the positive anchors of each box [N, 4] with it, in an image of a size."""
        rpn, node = self.model.rpn_head, self.cfg.model.rpn_head.anchor_generator
        with self._scope():
            generator = TASK_UTILS.build(node)
        maps = [tuple(-(-side // stride) for side in size) for stride in node.strides]
        anchors = torch.cat(generator.grid_priors(maps, device="cpu"))
        flags = torch.cat(generator.valid_flags(maps, size, device="cpu"))
        targets = InstanceData(bboxes=boxes, labels=torch.zeros(len(boxes), dtype=torch.long))
        result = rpn._get_targets_single(anchors, flags, targets, dict(img_shape=size))[-1]
        overlaps = bbox_overlaps(boxes, result.pos_priors)
        return [row[result.pos_assigned_gt_inds == i].tolist() for i, row in enumerate(overlaps)]

    def facts(self):
        loader, wrapper = self.cfg.train_dataloader, self.cfg.optim_wrapper
        preprocessor = self.preprocessor
        channel_order = getattr(preprocessor, "channel_conversion", None)
        if channel_order is None:
            channel_order = preprocessor._channel_conversion
        self._load_steps()
        facts = {
            # Images are read as BGR.
            "colours": (
                "RGB" if channel_order else "BGR",
                *(_numbers(getattr(preprocessor, name)) for name in ("mean", "std")),
            ),
            "drop paths": drop_paths(self.model.backbone),
            "images on a GPU": loader.batch_size,
            "mixed precision": wrapper.type == "AmpOptimWrapper",
            "clipping": wrapper.get("clip_grad"),
            "flip": self.steps["RandomFlip"].prob,
            "betas": self.optimizer.defaults["betas"],
        }
        return facts | (self._rcnn() if "roi_head" in self.cfg.model else self._upernet())

    def _load_steps(self):
        registry = TRANSFORMS if self.cfg.default_scope == "mmdet" else SEG_TRANSFORMS

        def build(pipeline):
            with self._scope():
                return {step["type"]: registry.build(step) for step in pipeline}

        self.steps = build(self.cfg.train_dataloader.dataset.pipeline)
        self.test_steps = build(self.cfg.test_dataloader.dataset.pipeline)
        if tta := self.cfg.get("tta_pipeline"):
            self.tta = build(tta)["TestTimeAug"]

    def _rcnn(self):
        model, rpn, roi = self.model, self.model.rpn_head, self.model.roi_head
        heads = _list(roi.bbox_head)
        masks = _list(roi.mask_head)
        plain, cropped = self.steps["RandomChoice"].transforms
        resize, crop, last = cropped.transforms
        (only,) = plain.transforms
        assert only.scales == last.scales
        probabilities = self.steps["RandomChoice"].prob or [0.5, 0.5]
        data = self.cfg.train_dataloader.dataset
        proposals = model.train_cfg.rpn_proposal
        anchors = rpn.prior_generator
        regression = rpn.loss_bbox
        (head,) = {_head(head) for head in heads}
        return {
            "padding": self.preprocessor.pad_size_divisor,
            "training sizes": _sizes(only.scales),
            "sizes before the crop": _sizes(resize.scales),
            "crop": (crop.crop_type, tuple(crop.crop_size), probabilities[1]),
            "test size": tuple(sorted(self.test_steps["Resize"].scale)),
            "resize": self.test_steps["Resize"].backend,
            "least edge": data.filter_cfg.min_size,
            "empty images": not data.filter_cfg.filter_empty_gt,
            "pyramid": (model.neck.out_channels, model.neck.num_outs),
            "anchor sizes": tuple(
                stride[0] * scale for stride in anchors.strides for scale in anchors.scales.tolist()
            ),
            "anchor ratios": tuple(anchors.ratios.tolist()),
            "rpn thresholds": (rpn.assigner.neg_iou_thr, rpn.assigner.pos_iou_thr),
            "rpn samples": (rpn.sampler.num, rpn.sampler.pos_fraction),
            "rpn nms": tuple(x.nms.iou_threshold for x in (proposals, model.test_cfg.rpn)),
            "rpn test proposals": (model.test_cfg.rpn.nms_pre, model.test_cfg.rpn.max_per_img),
            "roi samples": _one({(s.num, s.pos_fraction) for s in _list(roi.bbox_sampler)}),
            "roi resolutions": tuple(
                _one({_pool(x).output_size[0] for x in _list(extractor)})
                for extractor in (roi.bbox_roi_extractor, roi.mask_roi_extractor)
            ),
            "sampling ratios": tuple(
                _one({_pool(x).sampling_ratio for x in _list(extractor)})
                for extractor in (roi.bbox_roi_extractor, roi.mask_roi_extractor)
            ),
            "classes": _one({part.num_classes for part in [*heads, *masks]}),
            "class-specific boxes": not any(part.reg_class_agnostic for part in heads),
            "mask convolutions": _one({len(mask.convs) for mask in masks}),
            "score threshold": roi.test_cfg.score_thr,
            "nms threshold": roi.test_cfg.nms.iou_threshold,
            "detections": roi.test_cfg.max_per_img,
            "mask threshold": roi.test_cfg.mask_thr_binary,
            "rpn box loss": (
                type(regression).__name__.removesuffix("Loss"),
                getattr(regression, "beta", None),
                regression.loss_weight,
            ),
            "rpn training proposals": (proposals.nms_pre, proposals.max_per_img),
            "rpn border": rpn.train_cfg.allowed_border,
            "box loss": _one({_loss(part) for part in heads}),
            "stage weights": tuple(getattr(roi, "stage_loss_weights", (1,))),
            "roi thresholds": tuple(a.pos_iou_thr for a in _list(roi.bbox_assigner)),
            "target deviations": tuple(tuple(part.bbox_coder.stds) for part in heads),
            "box head": head,
            "mask heads": len(masks),
        }

    def _validation(self):
        """Sizes and flips of a training's evaluation."""
        pipeline, loop = self.cfg.val_dataloader.dataset.pipeline, self.cfg.val_cfg
        augmented = [step for step in pipeline if step.type == "TestTimeAug"]
        assert loop == (
            {"type": "AugmentedValLoop", "tta_model": {"type": "SegTTAModel"}}
            if augmented
            else {"type": "ValLoop"}
        )
        if not augmented:
            return [step.scale for step in pipeline if step.type == "Resize"], []
        with self._scope():
            views = SEG_TRANSFORMS.build(augmented[0]).subroutines
        sizes = [one.transforms[0].scale for one in views]
        return sizes, [
            step.prob for one in views for step in one.transforms if hasattr(step, "prob")
        ]

    def _upernet(self):
        head, aux = self.model.decode_head, self.model.auxiliary_head
        assert self.model.test_cfg.mode == "whole" and not head.align_corners
        crop, resize = self.steps["RandomCrop"], self.steps["RandomResize"]
        augmented = [steps.transforms for steps in self.tta.subroutines]
        hooks = self.cfg.default_hooks
        sizes, flips = self._validation()
        return {
            "crop": (tuple(crop.crop_size), crop.cat_max_ratio),
            "training scale": (tuple(resize.scale), tuple(resize.ratio_range)),
            "test scale": tuple(self.test_steps["Resize"].scale),
            "validation scales": sizes,
            "validation flip": any(flips),
            "best checkpoint": hooks.checkpoint.get("save_best"),
            "augmented test scales": [resize.scale for resize, flip, *_ in augmented if flip.prob],
            "augmented test flip": [flip.prob for _, flip, *_ in augmented] == [0.0, 1.0] * 6,
            "colours distorted": "PhotoMetricDistortion" in self.steps,
            "head": (head.channels, tuple(head.psp_modules.pool_scales), head.dropout.p),
            "norm": _one({part.norm_cfg.type for part in (head, aux)}),
            "auxiliary head": (aux.in_channels, aux.channels, aux.loss_decode.loss_weight),
            "test padding": (self.preprocessor.test_cfg or {}).get("size_divisor", 0),
            "loss weight": head.loss_decode.loss_weight,
            "ignored label": _one({head.ignore_index, aux.ignore_index}),
            "classes": _one({head.num_classes, aux.num_classes}),
            "saved every": hooks.checkpoint.interval,
            "evaluated every": self.cfg.train_cfg.val_interval,
        }


@cache
def _rates(schedule, lr, iterations, epoch, last):
    """Args: epoch: its iterations; last: up to which all are stepped through."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedulers = [
        PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=optimizer))
        for scheduler in json.loads(schedule)
    ]
    by_epoch = [scheduler for scheduler in schedulers if scheduler.by_epoch]
    others = [scheduler for scheduler in schedulers if not scheduler.by_epoch]
    rates, epochs_done = {}, 0
    optimizer.step()
    for iteration in range(last + 1):
        rates[iteration] = optimizer.param_groups[0]["lr"]
        for scheduler in others:
            scheduler.step()
    for iteration in [i for i in sorted(iterations) if i > last]:
        while (epochs_done + 1) * epoch <= iteration:
            for scheduler in by_epoch:
                scheduler.step()
            epochs_done += 1
        rates[iteration] = optimizer.param_groups[0]["lr"]
    return [rates[iteration] for iteration in iterations]


def _numbers(tensor):
    """A tensor's values, rounded as they are written."""
    return tuple(round(value, 4) for value in tensor.flatten().tolist())


def _list(part):
    return list(part) if isinstance(part, (list, tuple, torch.nn.ModuleList)) else [part]


def _one(values):
    (value,) = values
    return value


def _sizes(scales):
    """Short sides, and the one long side, of the scales that are chosen from."""
    return tuple(short for short, _ in scales), _one({long for _, long in scales})


def _pool(extractor):
    return extractor.roi_layers[0]


def _loss(head):
    assert head.reg_decoded_bbox == (type(head.loss_bbox).__name__ == "GIoULoss")
    return type(head.loss_bbox).__name__.removesuffix("Loss"), head.loss_bbox.loss_weight


def _head(head):
    """Convolutions, fully connected layers, their width, norm."""
    norms = {conv.norm_cfg["type"] for conv in head.shared_convs if conv.with_norm}
    return (
        len(head.shared_convs),
        len(head.shared_fcs),
        head.fc_out_channels,
        _one(norms) if norms else None,
    )
