"""Cityscapes: registration from the config, and checks before a run.

Images are in leftImg8bit/PART/CITY, annotations in gtFine/PART/CITY. Detectron2 itself registers
those in $DETECTRON2_DATASETS/cityscapes.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.machinery import ModuleSpec
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import cityscapes as reader
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.utils.comm import get_world_size

from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.runtime.packages import is_missing, need

from .registration import check_num_classes, entries, is_registered, wrong_form
from .safe_loading import read_pair
from .sem_seg import FILES_READ_BEFORE_A_RUN, IGNORE

INSTANCES, SEM_SEG = "cityscapes_instance", "cityscapes_sem_seg"
TASKS = {"instance_seg": INSTANCES, "sem_seg": SEM_SEG}
FORM = "[name, folder, part, task], where the task is instance_seg or sem_seg"
_IMAGE, _POLYGONS = "leftImg8bit.png", "gtFine_polygons.json"
_INSTANCES, _LABELS = "gtFine_instanceIds.png", "gtFine_labelIds.png"
_TRAIN_IDS = "gtFine_labelTrainIds.png"
FEW_IMAGES = 64
BUILTIN = "detectron2.data.datasets.builtin"  # where Detectron2 registers its own
# What newer versions of Detectron2 import cityscapesscripts from: a package that is not published.
UNPUBLISHED = "deeplearning.projects.cityscapesApi"
SCRIPTS: tuple[str, ...] = ("", ".helpers", ".helpers.labels", ".evaluation")
SCRIPTS += tuple(f".evaluation.eval{kind}LevelSemanticLabeling" for kind in ("Instance", "Pixel"))


def provide_cityscapesscripts() -> None:
    """Lets Detectron2 import cityscapesscripts by either of its two names.

    Since the end of 2024, Detectron2 imports it from an unpublished package. Without that package,
    its names become aliases of the published modules. Raises UsageError without cityscapesscripts.
    """
    need("cityscapesscripts", "Cityscapes")
    if not is_missing(UNPUBLISHED):
        return
    parts = UNPUBLISHED.split(".")
    for name in (".".join(parts[: i + 1]) for i in range(len(parts))):
        if is_missing(name):
            spec = ModuleSpec(name, None, is_package=True)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, sys.modules[name])
    for name in SCRIPTS:
        module = importlib.import_module(f"cityscapesscripts{name}")
        sys.modules[f"{UNPUBLISHED}.cityscapesscripts{name}"] = module
    vars(sys.modules[UNPUBLISHED])["cityscapesscripts"] = sys.modules["cityscapesscripts"]


def load_instances(image_dir: str, gt_dir: str) -> list[dict[str, Any]]:
    """Returns Detectron2's records of images and their instances.

    Detectron2's own function terminates its workers by SIGTERM, which they take for a preemption in
    a training and ignore. Here the workers end by themselves, and few files are read without them.
    """
    provide_cityscapesscripts()
    from cityscapesscripts.helpers.labels import labels

    files = reader._get_cityscapes_files(image_dir, gt_dir)
    read = partial(reader._cityscapes_files_to_dict, from_json=True, to_polygons=True)
    if len(files) <= FEW_IMAGES:
        records = [read(names) for names in files]
    else:
        processes = max(multiprocessing.cpu_count() // get_world_size() // 2, 4)
        with ProcessPoolExecutor(processes, initializer=provide_cityscapesscripts) as pool:
            records = list(pool.map(read, files, chunksize=-(-len(files) // (4 * processes))))
    counted = [label.id for label in labels if label.hasInstances and not label.ignoreInEval]
    for record in records:
        for one in record["annotations"]:
            one["category_id"] = counted.index(one["category_id"])
    return records


def register_cityscapes_datasets(cfg: CfgNode) -> None:
    """Registers the data sets that DATASETS.REGISTER_CITYSCAPES lists.

    The classes are those of Cityscapes, 8 for instances and 19 for semantic segmentation. Paths are
    relative to the working directory. Detectron2's own instance data sets that the run uses are
    registered again, with `load_instances`.

    Raises UsageError for entries of another form and for a name that is registered for another data
    set.
    """
    for name in {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} & set(DatasetCatalog.list()):
        metadata, theirs = MetadataCatalog.get(name), DatasetCatalog[name].__module__ == BUILTIN
        if theirs and metadata.get("evaluator_type") == INSTANCES:
            folders = {"image_dir": metadata.image_dir, "gt_dir": metadata.gt_dir}
            DatasetCatalog.remove(name)
            DatasetCatalog.register(name, partial(load_instances, **folders))
    for entry in entries(cfg, "REGISTER_CITYSCAPES", FORM, (str,) * 4):
        name, root, part, task = entry
        if task not in TASKS:
            raise wrong_form("REGISTER_CITYSCAPES", FORM, entry)
        folders = {
            "image_dir": os.path.join(root, "leftImg8bit", part),
            "gt_dir": os.path.join(root, "gtFine", part),
        }
        description = {**folders, "evaluator_type": TASKS[task]}
        if not is_registered("REGISTER_CITYSCAPES", name, description):
            load = load_instances if task == "instance_seg" else reader.load_cityscapes_semantic
            DatasetCatalog.register(name, partial(load, **folders))
            classes = _get_builtin_metadata("cityscapes")
            MetadataCatalog.get(name).set(ignore_label=IGNORE, **description, **classes)


def is_cityscapes(name: str) -> bool:
    """Whether a registered data set is evaluated by cityscapesscripts."""
    return MetadataCatalog.get(name).get("evaluator_type") in TASKS.values()


def check_cityscapes_dataset(
    cfg: CfgNode, name: str, sem_seg: bool, evaluated: bool, machines: int = 1
) -> None:
    """Raises UsageError unless a data set exists, matches the model, and a sample can be read.

    Every image must have annotations. At most 32 are read, spread over the data set.

    Args:
        name: a registered data set for which `is_cityscapes` holds.
        sem_seg: whether the model is a SemanticSegmentor rather than a detector.
        evaluated: whether the run evaluates on the data set.
        machines: number of machines of the run.
    """
    provide_cityscapesscripts()
    metadata = MetadataCatalog.get(name)
    if sem_seg != (metadata.evaluator_type == SEM_SEG):
        tasks = list(TASKS) if sem_seg else list(TASKS)[::-1]
        raise UsageError(
            f"data set {name!r} is of the task {tasks[0]}, but {cfg.MODEL.META_ARCHITECTURE} needs "
            f"one of the task {tasks[1]}"
        )
    if not sem_seg and not cfg.MODEL.MASK_ON:
        raise UsageError(
            f"data set {name!r} is evaluated by its masks: it needs MODEL.MASK_ON True"
        )
    classes = metadata.stuff_classes if sem_seg else metadata.thing_classes
    node = "SEM_SEG_HEAD" if sem_seg else "ROI_HEADS"
    check_num_classes(name, len(classes), node, cfg.MODEL[node].NUM_CLASSES)
    if evaluated and machines > 1:
        raise UsageError(
            f"data set {name!r} is evaluated on one machine only, got machines={machines}: train "
            "with DATASETS.TEST () and evaluate afterwards"
        )
    stems = _check_files(name, sem_seg, evaluated)
    chosen = stems[:: max(1, -(-len(stems) // FILES_READ_BEFORE_A_RUN))]
    for stem in chosen:
        annotations = os.path.join(metadata.gt_dir, stem)
        _check_polygons(annotations + _POLYGONS)
        if sem_seg:
            image = os.path.join(metadata.image_dir, stem + _IMAGE)
            pair = {"file_name": image, "sem_seg_file_name": annotations + _TRAIN_IDS}
            read_pair(pair, "RGB", len(metadata.stuff_classes))


def _check_files(name: str, sem_seg: bool, evaluated: bool) -> list[str]:
    """Returns CITY/CITY_NUMBER_NUMBER_ of each image, sorted; checks that each has annotations."""
    metadata = MetadataCatalog.get(name)
    images = _files(name, "image", metadata.image_dir)
    annotations = set(_files(name, "annotation", metadata.gt_dir))
    if not images:
        raise UsageError(f"image folder {metadata.image_dir} of data set {name!r} has no images")
    other = [file for file in images if not file.endswith("_" + _IMAGE)]
    if other:
        raise UsageError(
            f"images of data set {name!r} must be called CITY/*_{_IMAGE}, got {other[0]} in "
            f"{metadata.image_dir}"
        )
    stems = [file.removesuffix(_IMAGE) for file in images]
    for end in (_POLYGONS, _LABELS, _INSTANCES, *([_TRAIN_IDS] if sem_seg else [])):
        missing = [stem + end for stem in stems if stem + end not in annotations]
        if missing:
            hint = ": csCreateTrainIdLabelImgs makes them" if end == _TRAIN_IDS else ""
            raise UsageError(
                f"annotation folder {metadata.gt_dir} of data set {name!r} lacks {len(missing)} of "
                f"{len(stems)} files, the first is {missing[0]}{hint}"
            )
    surplus = {file for file in annotations if file.endswith(_INSTANCES)}
    surplus -= {stem + _INSTANCES for stem in stems}
    if evaluated and surplus:  # cityscapesscripts would end the process
        raise UsageError(
            f"annotation folder {metadata.gt_dir} of data set {name!r} has {len(surplus)} files "
            f"without an image, the first is {min(surplus)}"
        )
    return stems


def _files(name: str, what: str, folder: str) -> list[str]:
    """Returns CITY/FILE of all files two levels below a folder, sorted."""
    if not os.path.isdir(folder):
        raise UsageError(
            f"{what} folder {folder} of data set {name!r} does not exist (working directory: "
            f"{os.getcwd()}): set DETECTRON2_DATASETS to the folder that holds cityscapes, or list "
            "its place in DATASETS.REGISTER_CITYSCAPES"
        )
    cities = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
    return [
        f"{os.path.basename(city)}/{file}" for city in cities for file in sorted(os.listdir(city))
    ]


def _check_polygons(path: str) -> None:
    from cityscapesscripts.helpers.labels import name2label

    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        names = {one["label"] for one in content["objects"] if "deleted" not in one}
        sides = content["imgHeight"], content["imgWidth"]
    except (OSError, ValueError) as error:
        raise UsageError(f"polygons {path} cannot be read: {one_line(error)}") from error
    except (KeyError, TypeError) as error:
        raise UsageError(f"polygons {path} are not in Cityscapes' format: {error!r}") from error
    unknown = {
        n for n in names if n not in name2label and n.removesuffix("group") not in name2label
    }
    if unknown:
        raise UsageError(f"polygons {path} have an unknown label: {min(unknown)}")
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise UsageError(f"polygons {path} must have a height and a width, got {sides}")
