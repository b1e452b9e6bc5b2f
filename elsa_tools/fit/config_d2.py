"""Detectron2's config of a training."""

from __future__ import annotations

from typing import Any

from elsa_d2.config import get_config_file

from .choose import MODELS, SMALL
from .dataset import BOXES, INSTANCES, SEMANTIC
from .plan import Plan
from .render import comment, settings, yaml_text

TRAIN, VAL = "fit_train", "fit_val"
METRICS = {INSTANCES: "segm/AP", BOXES: "bbox/AP", SEMANTIC: "sem_seg/mIoU"}


def config_text(plan: Plan) -> str:
    """Return the text of a config for tools/train_net.py."""
    semantic = plan.data.task == SEMANTIC
    tree = settings(*(_semantic(plan) if semantic else _objects(plan)), *_shared(plan))
    head = comment(
        f"Written by `elsa fit`, which trains it; so does python tools/train_net.py --config-file "
        f"{plan.work.parent / 'config.yaml'}. {plan.data.layout}. {plan.data.split}."
    )
    return f"{head}\n{yaml_text({'_BASE_': _bases(plan), **tree})}"


def _bases(plan: Plan) -> list[str]:
    head = "UPerNet" if plan.data.task == SEMANTIC else "FPN"
    if plan.model == SMALL:
        model = "upernet" if head == "UPerNet" else "mask_rcnn"
        names = [f"own_data/{model}_elsa_swin.yaml"]
    else:
        family = "VOLO" if plan.model.startswith("volo") else "Swin"
        names = [f"Base-ELSA-{family}-{head}.yaml"]
        names += ["Base-Mask-RCNN.yaml"] * (head == "FPN")
    return [get_config_file(name) for name in names]


def _shared(plan: Plan) -> list[tuple[Any, ...]]:
    choice, why = plan.choice, plan.reasons
    arch: list[tuple[Any, ...]] = []
    if plan.model != SMALL:
        node = "MODEL.ELSA_VOLO" if plan.model.startswith("volo") else "MODEL.ELSA_SWIN"
        arch = [(f"{node}.ARCH", MODELS[plan.model]), (f"{node}.DROP_PATH_RATE", 0.1)]
    return [
        ("MODEL.DEVICE", plan.device),
        ("MODEL.WEIGHTS", str(plan.weights or "")),
        ("MODEL.EMA.ENABLED", choice.averaged, why["averaged weights"]),
        *arch,
        ("DATASETS.TRAIN", [TRAIN]),
        ("DATASETS.TEST", [VAL]),
        ("DATALOADER.NUM_WORKERS", choice.workers, why["workers"]),
        ("INPUT.RANDOM_FLIP", "horizontal" if choice.flip else "none", why["flip"]),
        ("INPUT.RESIZE_BACKEND", "cv2"),
        ("SOLVER.IMS_PER_BATCH", choice.batch, why["batch"]),
        ("SOLVER.BASE_LR", choice.rate, why["learning rate"]),
        ("SOLVER.MAX_ITER", choice.iterations, why.get("length", "a probe")),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"),
        ("SOLVER.WARMUP_ITERS", choice.warmup, why["warm-up"]),
        ("SOLVER.WARMUP_FACTOR", 0.01),
        ("SOLVER.LAYER_DECAY", choice.layer_decay, why["layer decay"]),
        ("SOLVER.BACKBONE_LR_FACTOR", choice.backbone_factor, why["backbone's rate"]),
        ("SOLVER.CLIP_GRADIENTS.ENABLED", True, why["clipping"]),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", choice.clip),
        ("SOLVER.CHECKPOINT_PERIOD", choice.save),
        ("SOLVER.AMP.ENABLED", choice.amp, why["precision"]),
        ("TEST.EVAL_PERIOD", choice.evaluate, why.get("evaluations", "a probe")),
        ("TEST.PATIENCE", choice.patience, why["early stop"]),
        ("TEST.BEST_METRIC", "ema/" * choice.averaged + METRICS[plan.data.task]),
        ("LOG.WRITERS", list(plan.writers)),
        ("SEED", plan.seed),
        ("OUTPUT_DIR", str(plan.work)),
    ]


def _objects(plan: Plan) -> list[tuple[Any, ...]]:
    data, choice, why = plan.data, plan.choice, plan.reasons
    parts = [(TRAIN, data.train), (VAL, data.val)]
    return [
        ("MODEL.MASK_ON", data.task == INSTANCES),
        ("MODEL.ROI_HEADS.NUM_CLASSES", len(data.classes)),
        ("MODEL.ANCHOR_GENERATOR.SIZES", choice.sizes, why["anchor sizes"]),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [list(choice.ratios)], why["anchor ratios"]),
        (
            "DATASETS.REGISTER_COCO",
            [[name, str(part.annotations), str(part.images)] for name, part in parts],
        ),
        ("INPUT.MIN_SIZE_TRAIN", list(choice.shorts), why["image size"]),
        ("INPUT.MAX_SIZE_TRAIN", round(choice.long * 9 / 8)),
        ("INPUT.MIN_SIZE_TEST", choice.short),
        ("INPUT.MAX_SIZE_TEST", choice.long),
    ]


def _semantic(plan: Plan) -> list[tuple[Any, ...]]:
    data, choice, why = plan.data, plan.choice, plan.reasons
    parts = [(TRAIN, data.train), (VAL, data.val)]
    return [
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", len(data.classes)),
        ("MODEL.SEM_SEG_HEAD.CLASS_WEIGHT", list(choice.weights), why["class weights"]),
        (
            "DATASETS.REGISTER_SEM_SEG",
            [
                [name, str(one.images), str(one.maps), list(data.classes), data.reduce_zero_label]
                for name, one in parts
            ],
        ),
        ("INPUT.MIN_SIZE_TEST", choice.short),
        ("INPUT.MAX_SIZE_TEST", choice.long),
        ("INPUT.SEM_SEG.SCALE", [choice.long, choice.short], why["image size"]),
        ("INPUT.SEM_SEG.RATIO_RANGE", [7 / 8, 9 / 8]),
        ("INPUT.SEM_SEG.CROP_SIZE", [choice.short, choice.short]),
    ]
