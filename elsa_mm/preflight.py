"""Finds what would go wrong before a run begins, not hours into it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.registry import MODELS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import distributed
from torch.utils.data import BatchSampler

import elsa_core.weights
from elsa_core.data.coco import first_problem, missing_files, read_json
from elsa_core.param_groups import NAMES
from elsa_core.runtime.errors import UsageError, one_line

from .channels import check_channels
from .checkpoint import is_local
from .coco_checks import check_polygons, check_things
from .cpu import is_first_of_node
from .loading import model_of
from .nested import datasets_in, walk

BACKBONES = ("ELSASwin", "ELSAVolo", "ELSAVoloTokens")
CONSTRUCTOR = "ELSAOptimWrapperConstructor"
IMPORT_LINE = "custom_imports = dict(imports=['elsa_mm'])"
# Parts with one output or label for each class of the data, unlike an RPN.
_HEADS = re.compile(
    r"(module\.)*(data_preprocessor|head)|"
    r"(.+\.)?(bbox|mask|decode|auxiliary|panoptic|panoptic_fusion)_head(\.\d+)?"
)
# MMEngine's and MMPretrain's messages on data sets without images or with other classes.
_NO_IMAGES = ("need at least one array to concatenate", "Found 0 files in subfolders of")
_CLASS_FOLDERS = re.compile(r"number of subfolders \((\d+)\).*\((\d+)\)")


def check_config(cfg: Config) -> None:
    """Raises UsageError if our backbone is not imported, cannot be built, or has other channels
    than the next parts, and for settings that MMEngine's constructor of optimizers ignores."""
    wrapper = cfg.get("optim_wrapper") or {}
    ours = [name for name in NAMES if name in (wrapper.get("paramwise_cfg") or {})]
    if ours and CONSTRUCTOR not in str(wrapper.get("constructor")):
        raise UsageError(
            f"optim_wrapper.paramwise_cfg.{ours[0]} needs optim_wrapper.constructor="
            f"{CONSTRUCTOR!r}, got {wrapper.get('constructor')!r}"
        )
    model = cfg.get("model") or {}
    backbones = [node for node in walk(model) if node.get("type") in BACKBONES]
    imports = (cfg.get("custom_imports") or {}).get("imports") or []
    for backbone in backbones:
        name = backbone["type"]
        if "elsa_mm" not in ([imports] if isinstance(imports, str) else imports):
            raise UsageError(
                f"the config uses {name} and does not import it, add the line {IMPORT_LINE}"
            )
        try:
            with torch.device("meta"):  # without memory and without random numbers
                built = MODELS.build(backbone)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{name}: {one_line(error)}") from error
        if backbone is model.get("backbone"):
            _check_use(model, backbone)
            check_channels(cfg, backbone)
            _check_channels(model, [built.num_features[stage] for stage in built.out_indices])


def _check_use(model: dict, backbone: dict) -> None:
    """The backbone must be one for this kind of model."""
    name = backbone["type"]
    # The default of always_shift is the detectors'.
    is_classifier = str(model.get("type")).endswith("ImageClassifier")
    if is_classifier and name == "ELSASwin" and "always_shift" not in backbone:
        raise UsageError(
            "model.backbone.always_shift must be set in a classifier: False as the published "
            "ones, True only for one that was trained so"
        )
    tokens = name == "ELSAVoloTokens"
    head = str((model.get("head") or {}).get("type", "no head"))
    if tokens != head.endswith("VoloHead") and (tokens or is_classifier):
        raise UsageError(
            "the backbone ELSAVoloTokens and the head elsa_mm.volo_head.VoloHead need each other, "
            f"got {name} with {head}"
        )
    if tokens and not backbone.get("class_token", True) and model["head"].get("aux", True):
        raise UsageError(
            "model.head.aux must be False where model.backbone.class_token is, got True: the "
            "classifier of the patch tokens stands beside that of the class token"
        )
    neck = next((str(node.get("type")) for node in walk(model.get("neck"))), "")
    if name == "ELSAVolo" and neck.endswith("FPN") and not backbone.get("pyramid"):
        raise UsageError(
            f"model.backbone.pyramid must be True for the neck {neck}, whose maps halve from one "
            "to the next, got False"
        )


def _check_channels(model: dict, features: list[int]) -> None:
    """The parts that take the backbone's maps must expect their channels."""
    for name in _parts_fed_by_backbone(model):
        part = model.get(name)
        if not isinstance(part, dict) or "in_channels" not in part:
            continue
        wanted: Any = features
        got = part["in_channels"]
        indices = part.get("in_index")
        if isinstance(got, (list, tuple)):
            got = list(got)
            if isinstance(indices, (list, tuple)):
                wanted = [features[index] for index in indices if index in range(len(features))]
        elif isinstance(indices, int) and indices in range(-len(features), len(features)):
            wanted = features[indices]
        elif name == "head":  # of a classifier
            wanted = features[-1]
        else:
            continue
        if got != wanted:
            raise UsageError(f"model.{name}.in_channels must be the backbone's {wanted}, got {got}")


def _parts_fed_by_backbone(model: dict) -> list[str]:
    """The parts that take the backbone's maps, or something with their channels."""
    neck = model.get("neck")
    if not neck:
        return ["decode_head", "auxiliary_head", "panoptic_head", "head"]
    pooled = isinstance(neck, dict) and str(neck.get("type")).endswith("GlobalAveragePooling")
    return ["head"] if pooled else ["neck"]


def read_local(path: str) -> Any:
    """The content of a local checkpoint, which MMEngine loads later; None for an address.

    Raises UsageError if the file is missing, damaged or would execute code.
    """
    if not is_local(path):
        return None
    if not os.path.exists(path):
        raise UsageError(f"the checkpoint {path} does not exist")
    content = elsa_core.weights.read_ahead(path)
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise UsageError(f"the checkpoint {path} holds no state dict, got {kind}")
    return content


def check_data(cfg: Config, parts: Sequence[str]) -> None:
    """Raises UsageError if files that the data sets and evaluators name are missing or damaged.

    Args:
        parts: "train", "val", "test": the loaders that the run uses.
    """
    known: dict[tuple[str, bool], list[str]] = {}
    for part in parts:
        loader = cfg.get(f"{part}_dataloader")
        for dataset in datasets_in((loader or {}).get("dataset")):
            _check_dataset(dataset, part, known)
        for node in walk(cfg.get(f"{part}_evaluator") or {}):
            if isinstance(node.get("ann_file"), str) and not _is_remote(node):
                what = f"the {part} evaluator's annotation file"
                metric = node.get("metric") or ()
                masks = "segm" in ([metric] if isinstance(metric, str) else metric)
                _check_annotations(node["ann_file"], what, known, masks)


def build_data(runner: Runner, parts: Sequence[str]) -> None:
    """Loads the data sets; the first process of a node also checks the label maps.

    Raises UsageError for a data set without images and, in MMSegmentation, for one that would skip
    images, lacks label maps, or whose label maps hold no class.
    """
    segments = runner.cfg.get("default_scope") == "mmseg" and is_first_of_node()
    if segments:
        from . import label_maps
    for part in parts:
        loader = runner.cfg.get(f"{part}_dataloader") or {}
        for dataset in datasets_in(loader.get("dataset") if segments else None):
            if not _is_remote(dataset):
                label_maps.check_files(dataset, part)
        try:
            loop = getattr(runner, f"{part}_loop")
            size = None if loop is None else len(loop.dataloader.dataset)
        except (AssertionError, RuntimeError, ValueError) as error:
            if counts := _CLASS_FOLDERS.search(str(error)):
                raise UsageError(
                    f"the {part} data must have a folder for each of the data set's {counts[2]} "
                    f"classes, it has {counts[1]} folders"
                ) from error
            if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
                raise UsageError(f"the {part} data cannot be read: {one_line(error)}") from error
            if not any(words in str(error) for words in _NO_IMAGES):
                raise
            size = 0
        if size == 0:
            raise UsageError(
                f"the {part} data set is empty: no image, or none with objects of the classes"
            )
        if isinstance(loop, EpochBasedTrainLoop) and not len(loop.dataloader):
            raise UsageError(
                f"the {part} data must fill a batch in each process where {part}_dataloader."
                f"drop_last is set, got {size} images"
            )
        if loop is not None and part == "train":
            check_polygons(runner.cfg, loop.dataloader.dataset)
        if loop is not None and segments:
            label_maps.check_label_maps(loop.dataloader.dataset, part)


def check_classes(runner: Runner, parts: Sequence[str]) -> None:
    """Raises UsageError if the heads have another number of classes than the data.

    Args:
        parts: "train", "val", "test": the loaders that the run uses.
    """
    heads = {
        name: module.num_classes
        for name, module in model_of(runner).named_modules()
        if _HEADS.fullmatch(name) and isinstance(getattr(module, "num_classes", None), int)
    }
    for part in parts:
        loop = getattr(runner, f"{part}_loop")
        dataset = None if loop is None else loop.dataloader.dataset
        classes = (getattr(dataset, "metainfo", None) or {}).get("classes")
        if classes is None:
            continue
        for name, number in heads.items():
            if number != len(classes):
                place = name if name == "data_preprocessor" else f"model.{name}"
                raise UsageError(
                    f"{place}.num_classes must be the {len(classes)} classes of the {part} "
                    f"data, got {number}"
                )
        check_things(model_of(runner), dataset, part)
        found = getattr(dataset, "cat_ids", None)
        if found is not None and len(found) != len(classes):
            raise UsageError(
                f"the {part} data's annotation file must have all {len(classes)} classes of the "
                f"data set, it has {len(found)} of them"
            )


def check_batch(cfg: Config) -> None:
    """Raises UsageError if a training batch is empty or too small for batch normalisation."""
    size = cfg.train_dataloader.get("batch_size")
    if size is None:  # a batch sampler of its own
        return
    if not isinstance(size, int) or size < 1:
        raise UsageError(
            f"train_dataloader.batch_size must be an integer of at least 1, got {size}"
        )
    name, norm, least = _over_batch(cfg)
    if size < least:
        raise UsageError(
            f"train_dataloader.batch_size must be at least 2: {name} normalises maps of one "
            f"position over the batch ({norm}), got {size}"
        )


def check_last_batch(runner: Runner) -> None:
    """Raises UsageError if the last batch of an epoch is too small for batch normalisation in this
    process. The data must be loaded."""
    loop = runner.train_loop
    batches = loop.dataloader.batch_sampler
    sampler: Any = getattr(batches, "sampler", None)
    name, norm, least = _over_batch(runner.cfg)
    if type(batches) is not BatchSampler or isinstance(sampler, InfiniteSampler):
        return
    images, size = len(sampler), batches.batch_size
    ends = isinstance(loop, EpochBasedTrainLoop) or loop.max_iters >= len(batches)
    if ends and not batches.drop_last and 0 < images % size < least:
        raise UsageError(
            f"the last training batch of an epoch has 1 of the {images} images, in batches of "
            f"{size}, and {name} normalises maps of one position over the batch ({norm}): set "
            f"train_dataloader.drop_last=True or another batch_size"
        )


def _over_batch(cfg: Config) -> tuple[str, str, int]:
    """A head that normalises maps of one position over the batch, its norm, and the images that a
    process needs for it: 1 if there is no such head."""
    head = cfg.model.get("decode_head")
    if not isinstance(head, dict):
        return "", "", 1
    name, norm = str(head.get("type")), str((head.get("norm_cfg") or {}).get("type"))
    pools = name in ("UPerHead", "PSPHead") and 1 in head.get("pool_scales", (1, 2, 3, 6))
    pools |= name in ("ASPPHead", "DepthwiseSeparableASPPHead")  # the image's mean
    together = distributed.get_world_size() if distributed.is_initialized() else 1
    alone = norm == "BN" or norm == "SyncBN" and together == 1
    return name, norm, 2 if pools and alone else 1


def keep_images(runner: Runner, folder: str) -> None:
    """Raises UsageError if painted images would overwrite the test images in ``folder``."""
    dataset = runner.test_loop.dataloader.dataset
    if not os.path.isdir(folder) or not hasattr(dataset, "get_data_info"):
        return
    infos = map(dataset.get_data_info, range(len(dataset)))
    for place in {os.path.dirname(str(info.get("img_path"))) or "." for info in infos}:
        if os.path.isdir(place) and os.path.samefile(place, folder):
            raise UsageError(
                f"--show-dir must be another folder than that of the images, got {folder}"
            )


def _is_remote(node: dict) -> bool:
    backend = (node.get("backend_args") or {}).get("backend", "local")
    return backend != "local" or "://" in f"{node.get('data_root')} {node.get('ann_file')}"


def _check_dataset(dataset: dict, part: str, known: dict[tuple[str, bool], list[str]]) -> None:
    if _is_remote(dataset):
        return
    root = dataset.get("data_root") or ""
    images = []
    if dataset.get("ann_file"):
        path = os.path.join(root, dataset["ann_file"])
        masks = any(node.get("with_mask") for node in walk(dataset.get("pipeline") or []))
        what = f"the {part} data's annotation file"
        images = _check_annotations(path, what, known, masks)
    for name, folder in _folders(dataset).items():
        path = os.path.join(root, folder or "")
        if path and not os.path.isdir(path):
            raise UsageError(
                f"the {part} data's folder {os.path.abspath(path)} ({name}) does not exist"
            )
        missing = missing_files(path, images) if name == "img" else []
        if missing:
            raise UsageError(
                f"the {part} data's folder {os.path.abspath(path)} ({name}) lacks {len(missing)} "
                f"of the {len(images)} images in {dataset['ann_file']}, the first is {missing[0]}"
            )


def _folders(dataset: dict) -> dict[str, str]:
    """The folders that a data set names, by the setting that names them."""
    prefix = dataset.get("data_prefix") or {}
    if not prefix and str(dataset.get("type")).endswith("ImageNet"):
        return {"split": dataset.get("split") or ""}
    if isinstance(prefix, str):
        return {"data_prefix": prefix}
    # MMDetection's Mask2Former for instances inherits the panoptic data's, which nothing reads.
    steps = list(walk(dataset.get("pipeline") or []))
    if any("with_seg" in step or "Panoptic" in str(step.get("type")) for step in steps):
        return prefix
    return {name: folder for name, folder in prefix.items() if name != "seg"}


def _check_annotations(
    path: str, what: str, known: dict[tuple[str, bool], list[str]], masks: bool
) -> list[str]:
    """The names of the images in a file of COCO's format; none for other formats.

    Args:
        known: results for the files that have been read, with and without masks.
        masks: whether each annotation must have a mask.
    """
    path = os.path.abspath(path)
    for key in ((path, masks), (path, True)):
        if key in known:
            return known[key]
    if os.path.isdir(path):  # some data sets name a folder
        return []
    if not os.path.isfile(path):
        raise UsageError(f"{what} {path} does not exist")
    known[path, masks] = []
    if not path.endswith(".json"):
        return []
    try:
        content = read_json(path)
    except UsageError as error:
        raise UsageError(f"{what} {error}") from error
    lists = [content.get(key) for key in ("images", "categories")] if type(content) is dict else []
    if not lists or not all(isinstance(one, list) for one in lists):
        return []
    entries = content.get("annotations")
    if isinstance(entries, list) and entries:
        if all(isinstance(one, dict) and "segments_info" in one for one in entries):
            return []  # COCO's panoptic format, for MMDetection's own data set
    if problem := first_problem(content, masks):
        boxes = "must have a mask" in problem and first_problem(content, False) is None
        hint = ": without masks, a detector without mask_head trains on the boxes" if boxes else ""
        raise UsageError(f"{what} {path}: {problem}{hint}")
    known[path, masks] = [image["file_name"] for image in content["images"]]
    return known[path, masks]
