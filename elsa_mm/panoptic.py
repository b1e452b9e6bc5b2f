"""Panoptic segmentation in COCO's format for MMDetection, without `panopticapi`.

That package is not on PyPI. Configs name these by their place, because they need MMDetection:
`dict(type="elsa_mm.panoptic.CocoPanopticDataset", ...)`.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import mmcv
import mmdet.datasets
import mmdet.datasets.transforms as transforms
import numpy as np
from mmdet.datasets.api_wrappers import COCOPanoptic
from mmdet.evaluation.functional import INSTANCE_OFFSET
from mmdet.evaluation.metrics.coco_panoptic_metric import parse_pq_results, print_panoptic_table
from mmengine import fileio
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger

from elsa_core.data.panoptic import VOID, PanopticQuality, to_ids
from elsa_core.runtime.errors import UsageError

from .coco import ByName


class NamedCOCOPanoptic(ByName, COCOPanoptic):
    """MMDetection's index of a panoptic file: ids by name, and the PNG files that it names."""

    def __init__(self, annotation_file: str | None = None) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(annotation_file)

    def annotations(self) -> list[dict[str, Any]]:
        entries = self.dataset.get("annotations") or []
        return [segment for entry in entries for segment in entry["segments_info"]]

    def createIndex(self) -> None:
        super().createIndex()
        for entry in self.dataset.get("annotations") or []:
            self.imgs[entry["image_id"]]["segm_file"] = entry["file_name"]


class CocoPanopticDataset(mmdet.datasets.CocoPanopticDataset):
    """CocoPanopticDataset whose label i is the category with the name of class i of the metainfo.

    Raises UsageError for classes in which stuff comes before things, which `Mask2FormerHead` counts
    from label 0 on. ``things`` is their number.
    """

    COCOAPI = NamedCOCOPanoptic
    things = 0
    is_thing: list[bool] = []  # of each class

    def load_data_list(self) -> list[dict[str, Any]]:
        images = super().load_data_list()
        self.things = sum(self.is_thing)
        if sorted(self.is_thing, reverse=True) != self.is_thing:
            names = self.metainfo["classes"]
            stuff = names[self.is_thing.index(False)]
            raise UsageError(
                f"the classes of panoptic data must have things before stuff, got {stuff!r} before "
                f"{names[len(names) - 1 - self.is_thing[::-1].index(True)]!r} ({self.ann_file})"
            )
        return images

    def parse_data_info(self, raw_data_info: dict[str, Any]) -> dict[str, Any]:
        cats = self.coco.cats
        self.is_thing = self.is_thing or [bool(cats[k].get("isthing", 1)) for k in self.cat_ids]
        wanted = [s for s in raw_data_info["raw_ann_info"] if s["category_id"] in self.cat2label]
        info = super().parse_data_info({**raw_data_info, "raw_ann_info": wanted})
        if self.data_prefix.get("seg"):
            name = raw_data_info["raw_img_info"]["segm_file"]
            info["seg_map_path"] = os.path.join(self.data_prefix["seg"], name)
        return info


class LoadPanopticAnnotations(transforms.LoadPanopticAnnotations):
    """LoadPanopticAnnotations that needs no `panopticapi`."""

    def __init__(
        self,
        with_bbox: bool = True,
        with_label: bool = True,
        with_mask: bool = True,
        with_seg: bool = True,
        **options: Any,
    ) -> None:
        self.rgb2id = to_ids
        super(transforms.LoadPanopticAnnotations, self).__init__(
            with_bbox=with_bbox,
            with_label=with_label,
            with_mask=with_mask,
            with_seg=with_seg,
            with_keypoints=False,
            **options,
        )


class CocoPanopticMetric(BaseMetric):
    """PQ, SQ and RQ in percent, as `panopticapi` computes them: of all classes, things and stuff.

    Args:
        ann_file: COCO's panoptic file.
        seg_prefix: the folder of its PNG files.
        classwise: also log the values of each class.
    """

    default_prefix = "coco_panoptic"

    def __init__(
        self,
        ann_file: str,
        seg_prefix: str,
        classwise: bool = False,
        backend_args: dict | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.seg_prefix, self.classwise, self.backend_args = seg_prefix, classwise, backend_args
        with fileio.get_local_path(ann_file, backend_args=backend_args) as path:
            self.truth = NamedCOCOPanoptic(path)

    @cached_property
    def ids(self) -> list[Any]:
        """The category of each label."""
        return self.truth.get_cat_ids(self.dataset_meta["classes"])

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        ids = self.ids
        for sample in data_samples:
            number = sample["img_id"]
            path = os.path.join(self.seg_prefix, self.truth.imgs[number]["segm_file"])
            png = fileio.get(path, backend_args=self.backend_args)
            truth = to_ids(mmcv.imfrombytes(png, flag="color", channel_order="rgb"))
            found = sample["pred_panoptic_seg"]["sem_seg"][0].cpu().numpy().astype(np.int64)
            labels = {key: key % INSTANCE_OFFSET for key in np.unique(found).tolist()}
            # 0 is a label here and stands for none in `PanopticQuality`.
            found = np.where(found % INSTANCE_OFFSET < len(ids), found + 1, VOID)
            quality = PanopticQuality()
            quality.add(
                truth,
                self.truth.imgToAnns[number],
                found,
                {key + 1: ids[label] for key, label in labels.items() if label < len(ids)},
            )
            self.results.append(dict(quality.counts))

    def compute_metrics(self, results: list[dict[Any, np.ndarray]]) -> dict[str, float]:
        total = PanopticQuality()
        for one in results:
            for category, counts in one.items():
                total.counts[category] += counts
        ids = self.ids
        things = [key for key in ids if self.truth.cats[key].get("isthing", 1)]
        parts = {"All": ids, "Things": things, "Stuff": [key for key in ids if key not in things]}
        values = {name: total.average(members) for name, members in parts.items()}
        classes = None
        if self.classwise:
            names = self.dataset_meta["classes"]
            classes = {name: total.average([key]) for name, key in zip(names, ids, strict=True)}
        print_panoptic_table(values, classes, logger=MMLogger.get_current_instance())
        return parse_pq_results(values)
