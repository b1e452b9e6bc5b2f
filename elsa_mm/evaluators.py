"""Gives configs the project's metric of COCO, and tells it how much the model may detect."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config

from .nested import walk

COCO_METRIC = "elsa_mm.coco_metric.CocoMetric"


def use_coco_metric(cfg: Config) -> None:
    """Evaluators that name MMDetection's CocoMetric get ours, which takes the same arguments, and
    the model's limit of detections of an image, where they do not say it themselves."""
    limit = detection_limit(cfg.get("model") or {})
    for part in ("val", "test"):
        for node in walk(cfg.get(f"{part}_evaluator")):
            if node.get("type") in ("CocoMetric", "mmdet.CocoMetric", COCO_METRIC):
                node["type"] = COCO_METRIC
                if limit is not None:
                    node.setdefault("max_dets", limit)


def detection_limit(model: dict[str, Any]) -> int | None:
    """How many objects of an image a detector's config lets it give, None where it does not say."""
    for settings in (model.get("tta_cfg"), model.get("test_cfg")):
        for node in ((settings or {}).get("rcnn"), settings):
            limit = (node or {}).get("max_per_img")
            if isinstance(limit, int):
                return limit
    return None
