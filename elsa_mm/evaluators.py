"""Gives configs our COCO metric, with the model's limit of detections."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config

from .nested import walk

COCO_METRIC = "elsa_mm.coco_metric.CocoMetric"


def use_coco_metric(cfg: Config) -> None:
    """Replaces MMDetection's CocoMetric in a config by ours, which takes the same arguments, and
    sets its `max_dets` to the model's limit unless the config does."""
    limit = detection_limit(cfg.get("model") or {})
    for part in ("val", "test"):
        for node in walk(cfg.get(f"{part}_evaluator")):
            if node.get("type") in ("CocoMetric", "mmdet.CocoMetric", COCO_METRIC):
                node["type"] = COCO_METRIC
                if limit is not None:
                    node.setdefault("max_dets", limit)


def detection_limit(model: dict[str, Any]) -> int | None:
    """The most objects per image that a detector's config allows; None if it does not say."""
    for settings in (model.get("tta_cfg"), model.get("test_cfg")):
        for node in ((settings or {}).get("rcnn"), settings):
            for name in ("max_per_img", "max_per_image"):  # the latter is Mask2Former's
                if isinstance(limit := (node or {}).get(name), int):
                    return limit
    return None
