"""MMDetection's and MMSegmentation's config of a training."""

from __future__ import annotations

from typing import Any

from elsa_core.variants import Arch
from elsa_mm.configs import get_config_file

from .choose import MODELS, SMALL, Choice
from .dataset import BOXES, INSTANCES, SEMANTIC
from .plan import Plan
from .render import comment, python_text, settings

WRITERS = {
    "tensorboard": "TensorboardVisBackend",
    "wandb": "WandbTracker",
    "mlflow": "MLflowTracker",
}
METRICS = {INSTANCES: "coco/segm_mAP", BOXES: "coco/bbox_mAP", SEMANTIC: "mIoU"}


def config_text(plan: Plan) -> str:
    """Return the text of a config for tools/train.py."""
    semantic = plan.data.task == SEMANTIC
    tree = settings(*(_semantic(plan) if semantic else _objects(plan)), *_shared(plan))
    head = comment(
        f"Written by `elsa fit`, which trains it; so does python tools/train.py "
        f"{plan.work.parent / 'config.py'}. {plan.data.layout}. {plan.data.split}."
    )
    # Here, as --cfg-options takes commas and spaces of a path for parts of a list.
    prefix = "" if semantic else f", {python_text({'outfile_prefix': str(plan.results)}).strip()}"
    tail = f"test_dataloader = val_dataloader\ntest_evaluator = dict(val_evaluator{prefix})\n"
    return f"{head}\n{python_text({'_base_': _bases(plan), **tree})}{tail}"


def _bases(plan: Plan) -> list[str]:
    semantic = plan.data.task == SEMANTIC
    toolbox = "mmseg" if semantic else "mmdet"
    family = "elsa-volo" if plan.model.startswith("volo") else "elsa-swin"
    small = plan.model == SMALL
    if semantic:
        model = {True: "elsa-swin_small", False: family}[small]
        model = f"upernet_{model}" + "_ade20k" * (family == "elsa-volo")
    else:
        model = f"mask-rcnn_{family}_fpn" + "_own_data" * small
    parts = [
        f"models/{model}",
        f"datasets/own_{'semantic' if semantic else 'instance'}",
        "schedules/own_data",
        "iteration_runtime",
    ]
    return [get_config_file(f"{toolbox}/_base_/{part}.py") for part in parts]


def schedule(choice: Choice) -> list[dict[str, Any]]:
    """Return the schedule of the learning rate.

    A warm-up of one iteration is left out: MMEngine's would keep its low rate to the end.
    """
    warm = choice.warmup if choice.warmup > 1 else 0
    linear = dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=warm)
    cosine = dict(type="CosineAnnealingLR", eta_min=0, by_epoch=False, begin=warm)
    return [linear] * (warm > 0) + [{**cosine, "end": choice.iterations}]


def _shared(plan: Plan) -> list[tuple[Any, ...]]:
    choice, why = plan.choice, plan.reasons
    metric = "ema/" * choice.averaged + METRICS[plan.data.task]
    average = dict(type="AveragedWeightsHook")
    ema = [("default_hooks.ema", average, why["averaged weights"])] if choice.averaged else []
    hook = dict(type="PatienceHook", monitor=metric, patience=choice.patience)
    patience = [("default_hooks.patience", hook, why["early stop"])] if choice.patience else []
    writers = ["LocalVisBackend", *(WRITERS[name] for name in plan.writers)]
    arch: list[tuple[Any, ...]] = []
    if plan.model != SMALL:
        arch = [("model.backbone.arch", MODELS[plan.model]), ("model.backbone.drop_path_rate", 0.1)]
    if plan.weights:
        arch += [("load_from", str(plan.weights))]
    return [
        *arch,
        ("train_dataloader.batch_size", choice.batch, why["batch"]),
        ("train_dataloader.num_workers", choice.workers, why["workers"]),
        ("train_dataloader.persistent_workers", choice.workers > 0),
        ("val_dataloader.num_workers", choice.workers),
        ("val_dataloader.persistent_workers", choice.workers > 0),
        ("optim_wrapper.type", f"{'Amp' * choice.amp}OptimWrapper", why["precision"]),
        ("optim_wrapper.optimizer.lr", choice.rate, why["learning rate"]),
        ("optim_wrapper.constructor", "ELSAOptimWrapperConstructor"),
        ("optim_wrapper.paramwise_cfg.layer_decay", choice.layer_decay, why["layer decay"]),
        (
            "optim_wrapper.paramwise_cfg.backbone_lr_factor",
            choice.backbone_factor,
            why["backbone's rate"],
        ),
        ("optim_wrapper.clip_grad", dict(max_norm=choice.clip), why["clipping"]),
        ("param_scheduler", schedule(choice), f"warm-up: {why['warm-up']}"),
        ("train_cfg.max_iters", choice.iterations, why.get("length", "a probe")),
        ("train_cfg.val_interval", choice.evaluate, why.get("evaluations", "a probe")),
        *ema,
        ("default_hooks.logger.interval", 10),
        ("log_processor.window_size", 10),
        *patience,
        ("default_hooks.checkpoint.interval", choice.save),
        ("default_hooks.checkpoint.save_best", metric),
        ("default_hooks.checkpoint.rule", "greater"),
        ("visualizer.vis_backends", [dict(type=name) for name in writers]),
        ("randomness", dict(seed=plan.seed)),
        ("work_dir", str(plan.work)),
    ]


def _channels(plan: Plan) -> list[int] | None:
    """Channels of the backbone's maps, where they are not those of the base."""
    return Arch.variants["base"].num_features if plan.model == "b" else None


def _objects(plan: Plan) -> list[tuple[Any, ...]]:
    data, choice, why = plan.data, plan.choice, plan.reasons
    masks = data.task == INSTANCES
    scales = [(round(choice.long * 9 / 8), short) for short in choice.shorts]
    load = [dict(type="LoadImageFromFile")]
    annotations = [dict(type="LoadAnnotations", with_bbox=True, with_mask=masks)]
    flip = [dict(type="RandomFlip", prob=0.5)] if choice.flip else []
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    train: list[dict[str, Any]] = [
        *load,
        *annotations,
        dict(type="RandomChoiceResize", scales=scales, keep_ratio=True),
        *flip,
        dict(type="PackDetInputs"),
    ]
    test: list[dict[str, Any]] = [
        *load,
        dict(type="Resize", scale=(choice.long, choice.short), keep_ratio=True),
        *annotations,
        dict(type="PackDetInputs", meta_keys=keys),
    ]
    heads: list[tuple[Any, ...]] = [("model.roi_head.bbox_head.num_classes", len(data.classes))]
    if masks:
        heads += [("model.roi_head.mask_head.num_classes", len(data.classes))]
    else:
        heads += [("model.roi_head.mask_roi_extractor", None), ("model.roi_head.mask_head", None)]
    if channels := _channels(plan):
        heads += [("model.neck.in_channels", channels)]
    parts = {"train": (data.train, train), "val": (data.val, test)}
    datasets: list[tuple[Any, ...]] = []
    for name, (part, pipeline) in parts.items():
        reason = (f"image size: {why['image size']}; flip: {why['flip']}",) * (name == "train")
        datasets += [
            (f"{name}_dataloader.dataset.metainfo", dict(classes=data.classes)),
            (f"{name}_dataloader.dataset.ann_file", str(part.annotations)),
            (f"{name}_dataloader.dataset.data_prefix", dict(img=f"{part.images}/")),
            (f"{name}_dataloader.dataset.pipeline", pipeline, *reason),
        ]
    anchors = "model.rpn_head.anchor_generator"
    octaves = [choice.scale * 2 ** (step / choice.octave) for step in range(choice.octave)]
    return [
        *heads,
        (f"{anchors}.scales", [round(one, 3) for one in octaves], why["anchor sizes"]),
        (f"{anchors}.ratios", list(choice.ratios), why["anchor ratios"]),
        *datasets,
        ("val_evaluator.ann_file", str(data.val.annotations)),
        ("val_evaluator.metric", ["bbox", "segm"] if masks else "bbox"),
    ]


def _semantic(plan: Plan) -> list[tuple[Any, ...]]:
    data, choice, why = plan.data, plan.choice, plan.reasons
    scale, crop = (choice.long, choice.short), (choice.short, choice.short)
    flip = [dict(type="RandomFlip", prob=0.5)] if choice.flip else []
    train: list[dict[str, Any]] = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations"),
        dict(type="RandomResize", scale=scale, ratio_range=(7 / 8, 9 / 8), keep_ratio=True),
        dict(type="RandomCrop", crop_size=crop, cat_max_ratio=0.75),
        *flip,
        dict(type="PhotoMetricDistortion"),
        dict(type="PackSegInputs"),
    ]
    test: list[dict[str, Any]] = [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=scale, keep_ratio=True),
        dict(type="LoadAnnotations"),
        dict(type="PackSegInputs"),
    ]
    loss = dict(class_weight=list(choice.weights) or None)
    result: list[tuple[Any, ...]] = [
        ("model.data_preprocessor.size", crop),
        ("val_evaluator.iou_metrics", ["mIoU"]),
    ]
    for head in ("decode_head", "auxiliary_head"):
        result += [
            (f"model.{head}.num_classes", len(data.classes)),
            (f"model.{head}.loss_decode", loss, why["class weights"]),
        ]
    if channels := _channels(plan):
        result += [
            ("model.decode_head.in_channels", channels),
            ("model.auxiliary_head.in_channels", channels[2]),
        ]
    parts = {"train": (data.train, train), "val": (data.val, test)}
    for name, (part, pipeline) in parts.items():
        place = f"{name}_dataloader.dataset"
        prefix = dict(img_path=str(part.images), seg_map_path=str(part.maps))
        reason = (f"image size: {why['image size']}; flip: {why['flip']}",) * (name == "train")
        result += [
            (f"{place}.metainfo", dict(classes=data.classes)),
            (f"{place}.reduce_zero_label", data.reduce_zero_label),
            (f"{place}.data_prefix", prefix),
            (f"{place}.pipeline", pipeline, *reason),
        ]
    return result
