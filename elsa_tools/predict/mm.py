"""Predictions of MMDetection and MMSegmentation models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.dataset import Compose
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope, init_default_scope
from mmengine.structures import InstanceData, PixelData

import elsa_core.weights
import elsa_mm  # noqa: F401  registers the backbone
from elsa_core.data.problems import shown
from elsa_core.runtime.errors import UsageError, one_line
from elsa_mm import preflight
from elsa_mm.channels import channels_in
from elsa_mm.loading import check_weights, plain_state
from elsa_mm.nested import walk
from elsa_tools.export.record import Resize

from .inferencer import Inferencer
from .results import Detections, Result, Segmentation
from .timing import forward_times

TASKS = {"mmdet": "detection", "mmseg": "segmentation"}
# Steps of a test pipeline after which an image has the same pixels.
_CHANGE_NOTHING = ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs", "PackDetInputs")


class OpenMMLabInferencer(Inferencer):
    """See `elsa_tools.predict.load_inferencer`."""

    def __init__(
        self, config: str, weights: str | None, device: str, options: Sequence[str]
    ) -> None:
        cfg = self.cfg = read_config(config, options)
        self.framework = cfg.get("default_scope", "")
        if self.framework not in TASKS:
            raise UsageError(
                f"the config must be of {' or '.join(TASKS)} (default_scope), got {config} of "
                f"{self.framework or 'no toolbox'}"
            )
        self.task = TASKS[self.framework]
        init_default_scope(self.framework)
        preflight.check_config(cfg)
        for node in walk(cfg.model):
            node.pop("init_cfg", None)  # the checkpoint brings all weights
        cfg.model.pop("pretrained", None)
        cfg.model.train_cfg = None
        try:
            model = MODELS.build(cfg.model)
        except UsageError:
            raise
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise UsageError(f"the model of {config} cannot be built: {reason}") from error
        self.model = revert_sync_batchnorm(model)
        names = colours = None
        if weights is not None:
            content = elsa_core.weights.read_checkpoint(weights)
            names, colours = elsa_core.weights.class_names(content)
            check_weights(self.model, weights, content)
            self.model.load_state_dict(plain_state(content), strict=False)
        self.model.cfg = cfg
        self.model.to(device).eval()
        configured, palette = _names_in(cfg)
        self.name_classes(
            _number_of_classes(self.model), names, configured, palette if names is None else colours
        )
        self.pipeline = _pipeline(cfg)
        self.channels = channels_in(cfg)
        self.painter: Any = None

    def predict(self, image: np.ndarray) -> Result:
        with DefaultScope.overwrite_default_scope(self.framework), torch.no_grad():
            data = self.pipeline(dict(img=image, img_id=0))
            batch = {key: [value] for key, value in data.items()}
            with forward_times(self.model) as seconds:
                (found,) = self.model.test_step(batch)
        self.model_seconds = sum(seconds)
        if self.task == "segmentation":
            return Segmentation(found.pred_sem_seg.data[0].cpu().numpy())
        instances = found.pred_instances.cpu()
        masks = None
        if "masks" in instances:
            masks = np.asarray(instances.masks).astype(bool).reshape(-1, *image.shape[:2])
        return Detections(
            instances.labels.numpy(), instances.scores.numpy(), instances.bboxes.numpy(), masks
        )

    def draw(self, image: np.ndarray, result: Result) -> np.ndarray:
        with DefaultScope.overwrite_default_scope(self.framework):
            return self._draw(np.ascontiguousarray(image[..., ::-1]), result)

    def _draw(self, image: np.ndarray, result: Result) -> np.ndarray:
        painter = self._painter()
        if isinstance(result, Segmentation):
            from mmseg.structures import SegDataSample

            labels = torch.from_numpy(self.painted_labels(result))
            sample = SegDataSample(pred_sem_seg=PixelData(data=labels[None]))
            painter.add_datasample("demo", image, sample, draw_gt=False, show=False)
            return np.ascontiguousarray(painter.get_image()[..., ::-1])
        from mmdet.structures import DetDataSample

        found = InstanceData(
            labels=torch.from_numpy(result.labels),
            scores=torch.from_numpy(result.scores),
            bboxes=torch.from_numpy(result.boxes),
        )
        if result.masks is not None:
            found.masks = result.masks
        sample = DetDataSample(pred_instances=found)
        painter.add_datasample("demo", image, sample, draw_gt=False, show=False, pred_score_thr=0)
        return np.ascontiguousarray(painter.get_image()[..., ::-1])

    def _painter(self) -> Any:
        if self.painter is None:
            if self.task == "segmentation":
                from mmseg.visualization import SegLocalVisualizer as Visualizer

                names = self.classes  # which OpenCV writes
            else:
                from mmdet.visualization import DetLocalVisualizer as Visualizer

                names = self.names_for_matplotlib
            self.painter = Visualizer(name="elsa_tools", alpha=0.5)
            self.painter.dataset_meta = dict(classes=names, palette=self.colours)
        return self.painter

    def normalisation(self) -> tuple[list[float], list[float]]:
        node = self.cfg.model.get("data_preprocessor") or self.cfg.get("preprocess_cfg") or {}
        if not node.get("bgr_to_rgb"):
            raise UsageError("model.data_preprocessor.bgr_to_rgb must be True, for an RGB model")
        return list(node["mean"]), list(node["std"])

    def resize(self) -> Resize | None:
        found = None
        for step in self.cfg.test_dataloader.dataset.pipeline:
            name = str(step["type"]).rpartition(".")[2]
            if name == "Resize" and found is None:
                found = _resize(step)
            elif name not in _CHANGE_NOTHING:
                raise UsageError(
                    "the test pipeline of an exported model must be LoadImageFromFile, Resize, "
                    f"LoadAnnotations and Pack{self.framework[2:].title()}Inputs, got {name}"
                )
            elif step.get("to_float32"):
                raise UsageError(
                    f"{name} of an exported model must have to_float32=False, got True"
                )
        if self.task == "segmentation":
            if (mode := self.model.test_cfg.get("mode", "whole")) != "whole":
                raise UsageError(
                    f"an exported segmentor must have model.test_cfg.mode='whole', got {mode!r}"
                )
            preprocessor = self.model.data_preprocessor
            padding = dict(preprocessor.test_cfg or {})
            if padding.keys() - {"size_divisor"} or (padding and preprocessor.pad_val):
                raise UsageError(
                    "an exported segmentor must not pad test images but with 0 to a size_divisor "
                    f"(model.data_preprocessor.test_cfg), got {shown(padding)} and "
                    f"pad_val={preprocessor.pad_val}"
                )
        return found

    def thresholds(self) -> tuple[float, float | None]:
        node = self.cfg.model.test_cfg.rcnn
        with_mask = getattr(self.model, "with_mask", False)
        return float(node.score_thr), float(node.mask_thr_binary) if with_mask else None


def read_config(path: str, options: Sequence[str] = ()) -> Config:
    """Raises UsageError for a file or options that cannot be used."""
    changes = {}
    for option in options:
        key, separator, value = option.partition("=")
        if not separator:
            raise UsageError(f"--cfg-options must be KEY=VALUE, got {option}")
        changes[key] = DictAction._parse_iterable(value)
    try:
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(changes)
    except (ImportError, KeyError, OSError, SyntaxError, TypeError, ValueError) as error:
        raise UsageError(f"the config {path} cannot be used: {one_line(error)}") from error
    return cfg


def _resize(step: Any) -> Resize:
    """Raises UsageError for a resize that changes the ratio, or by other means than cv2's."""
    settings = {"backend": "cv2", "interpolation": "bilinear", "keep_ratio": False, **step}
    wanted = {"backend": "cv2", "interpolation": "bilinear", "keep_ratio": True}
    for name, value in wanted.items():
        if settings[name] != value:
            raise UsageError(
                f"the test pipeline's Resize of an exported model must have {name}={value!r}, "
                f"got {settings[name]!r}"
            )
    scale = settings.get("scale")
    if scale is None:
        raise UsageError(
            f"the test pipeline's Resize of an exported model must have a scale, got {shown(step)}"
        )
    scale = (scale, scale) if isinstance(scale, int) else scale
    return Resize(int(min(scale)), int(max(scale)), "opencv")


def _number_of_classes(model: Any) -> int:
    if hasattr(model, "decode_head"):
        return int(model.decode_head.num_classes)
    if hasattr(model, "panoptic_head"):
        return int(model.panoptic_head.num_classes)
    head: Any = getattr(getattr(model, "roi_head", model), "bbox_head", None)
    head = head[0] if isinstance(head, torch.nn.ModuleList) else head
    if not hasattr(head, "num_classes"):
        raise UsageError(f"{type(model).__name__} has no bbox_head and no decode_head with classes")
    return int(head.num_classes)


def _names_in(cfg: Config) -> tuple[Any, Any]:
    """Names and colours of the test data's classes."""
    dataset = (cfg.get("test_dataloader") or {}).get("dataset") or {}
    meta = dict(dataset.get("metainfo") or {})
    if "classes" not in meta and dataset.get("type"):
        meta = dict(getattr(DATASETS.get(dataset["type"]), "METAINFO", {}))
    return meta.get("classes"), meta.get("palette")


def _pipeline(cfg: Config) -> Compose:
    """The test pipeline for an image in memory, which has no annotations.

    Raises UsageError for a config without one that begins with reading a file.
    """
    dataset: Any = (cfg.get("test_dataloader") or {}).get("dataset") or {}
    if not str((dataset.get("pipeline") or [{}])[0].get("type")).endswith("LoadImageFromFile"):
        raise UsageError("test_dataloader.dataset.pipeline must begin with LoadImageFromFile")
    steps = [dict(step) for step in dataset.pipeline]
    steps = [step for step in steps if "LoadAnnotations" not in step["type"]]
    steps[0]["type"] = "LoadImageFromNDArray"
    steps[0].pop("backend_args", None)
    return Compose(steps)
