"""Cityscapes in Detectron2: data sets, refusals, evaluation, and a short run of each config."""

import gc
import inspect
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

from conftest import load_tool
from d2_tiny import NARROW, REPOSITORY, read_metrics, run_in_process, train_and_resume
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import cityscapes as reader
from detectron2.data.datasets.builtin import register_all_cityscapes
from detectron2.evaluation import cityscapes_evaluation as evaluation
from detectron2.structures import Instances

from elsa_core.runtime.preemption import StopSignals
from elsa_d2 import SemSegTrainer, Trainer, UsageError, load_config, register_cityscapes_datasets
from elsa_d2.data import cityscapes as cityscapes_data
from elsa_d2.data.cityscapes import check_cityscapes_dataset
from elsa_d2.engine.preflight import check_run

CONFIGS = REPOSITORY / "configs/detectron2/Cityscapes"
DETECTOR, SEGMENTOR = "mask_rcnn_elsa_swin_{}_fpn", "upernet_elsa_swin_{}_80k"
SCORES = ("IoU", "iIoU", "IoU_sup", "iIoU_sup")
NAMES = [f"cityscapes_fine_{t}_{p}" for t in ("instance_seg", "sem_seg") for p in ("train", "val")]
SHORT = {
    "MODEL.DEVICE": "cpu",
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": [64, 80],
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.SEM_SEG.SCALE": [64, 32],
    "INPUT.SEM_SEG.CROP_SIZE": [32, 64],
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.STEPS": [],
    # Masks to judge, of a model that has learnt nothing.
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "TEST.DETECTIONS_PER_IMAGE": 5,
}

pytestmark = pytest.mark.usefixtures("clean_catalog")


def forget(names):
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def builtin(cityscapes):
    """Detectron2's own names, as they are with DETECTRON2_DATASETS set to the layout's parent."""
    names = [
        name for name in DatasetCatalog.list() if re.match(r"cityscapes_fine_(inst|sem)", name)
    ]
    usual = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    for folder in (str(cityscapes.parent), usual):
        forget(names)
        register_all_cityscapes(folder)
        if folder != usual:
            yield cityscapes


@pytest.fixture(scope="module")
def tool():
    return load_tool("train_net")


@pytest.fixture
def copy(cityscapes, tmp_path):
    """For a test to spoil."""
    return shutil.copytree(cityscapes, tmp_path / "copy")


def pairs(**changes):
    keys = {**SHORT, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [str(part) for pair in keys.items() for part in pair]


def entries(root, task, parts=("train", "val")):
    return [[f"{task}_{part}", str(root), part, task] for part in parts]


def own(root, task, **changes):
    """Keys for the config's own registration."""
    names = {"DATASETS__TRAIN": [f"{task}_train"], "DATASETS__TEST": [f"{task}_val"]}
    return pairs(DATASETS__REGISTER_CITYSCAPES=entries(root, task), **names, **changes)


def config(leaf, keys=()):
    return load_config(str(CONFIGS / f"{leaf}.yaml"), list(keys))


# --- short runs of the published configs


# Both variants are as narrow: tests/parity/test_cityscapes_configs.py has what tells them apart.
@pytest.mark.slow
@pytest.mark.parametrize(
    "leaf, task, scores, layer, classes",
    [
        (DETECTOR.format("t"), "segm", ("AP", "AP50"), "roi_heads.box_predictor.cls_score", 9),
        (SEGMENTOR.format("s"), "sem_seg", SCORES, "sem_seg_head.predictor", 19),
    ],
    ids=["mask_rcnn", "upernet"],
)
def test_a_shrunk_leaf_trains_evaluates_saves_and_resumes(
    leaf, task, scores, layer, classes, builtin, tmp_path, tool, monkeypatch
):
    output, file = tmp_path / "out", str(CONFIGS / f"{leaf}.yaml")
    arguments = ["--config-file", file, *pairs(OUTPUT_DIR=output, **NARROW)]
    _, evaluation, _, _ = train_and_resume(tool, monkeypatch, output, *arguments)
    assert all(0 <= evaluation[f"{task}/{name}"] <= 100 for name in scores)
    final = torch.load(output / "model_final.pth", mmap=True, weights_only=False)
    assert len(final["model"][f"{layer}.weight"]) == classes


@pytest.mark.slow
def test_evaluation_alone_and_at_several_scales(cityscapes, tmp_path, tool):
    """A folder anywhere, and a model so small that the mean over scales takes no time."""
    keys = own(
        cityscapes,
        "sem_seg",
        OUTPUT_DIR=tmp_path / "out",
        SOLVER__MAX_ITER=1,
        TEST__AUG__ENABLED=True,
        TEST__AUG__RATIOS=[0.5, 1.0],
        **NARROW,
    )
    file = ["--config-file", str(CONFIGS / f"{SEGMENTOR.format('t')}.yaml")]
    assert tool.main([*file, *keys]) == 0
    metrics = read_metrics(tmp_path / "out")[-1]
    keys += ["MODEL.WEIGHTS", str(tmp_path / "out/model_final.pth")]
    results = run_in_process(tool, [*file, "--eval-only", *keys])
    assert set(results) == {"sem_seg", "sem_seg_TTA"}
    for task, values in results.items():
        assert set(values) == set(SCORES)
        for name, value in values.items():
            assert value == pytest.approx(metrics[f"{task}/{name}"], nan_ok=True)


# --- evaluation


@pytest.fixture(params=["as installed", "newer"])
def version(request, monkeypatch):
    """Of Detectron2: newer ones import a package of Meta's instead of cityscapesscripts."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "deeplearning"]:
        monkeypatch.delitem(sys.modules, name)
    if request.param == "newer":
        where = "deeplearning.projects.cityscapesApi"
        for module in (reader, evaluation):
            source = re.sub(
                rf"(from|import) (?!{where})(\w+\.)*cityscapesscripts\.",
                rf"\1 {where}.cityscapesscripts.",
                inspect.getsource(module),
            )
            assert source.count(f"{where}.cityscapesscripts.") >= 3
            newer = types.ModuleType(module.__name__)
            newer.__package__ = module.__package__
            exec(source, vars(newer))
            if module is reader:
                read = newer._cityscapes_files_to_dict
                monkeypatch.setattr(reader, "_cityscapes_files_to_dict", read)
                continue
            for name in ("CityscapesInstanceEvaluator", "CityscapesSemSegEvaluator"):
                for method in ("process", "evaluate"):
                    theirs = getattr(getattr(newer, name), method)
                    monkeypatch.setattr(getattr(evaluation, name), method, theirs)
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "deeplearning"]:
        monkeypatch.delitem(sys.modules, name)


def test_instances_are_read(version, cityscapes):
    """Whatever Detectron2 calls cityscapesscripts, of which there is one copy."""
    folders = (str(cityscapes / kind / "val") for kind in ("leftImg8bit", "gtFine"))
    records = cityscapes_data.load_instances(*folders)
    assert len(records) == 4 and all(record["annotations"] for record in records)
    labels = sys.modules["deeplearning.projects.cityscapesApi.cityscapesscripts.helpers.labels"]
    assert labels is sys.modules["cityscapesscripts.helpers.labels"]


def test_the_truth_as_prediction_is_perfect(version, builtin):
    """In percent, by the evaluators that the trainer chooses."""
    cfg = config(SEGMENTOR.format("t"))
    evaluator = SemSegTrainer.build_evaluator(cfg, NAMES[3])
    evaluator.reset()
    for record in DatasetCatalog.get(NAMES[3]):
        labels = torch.from_numpy(np.array(Image.open(record["sem_seg_file_name"]))).long()
        logits = torch.nn.functional.one_hot(labels.clamp(max=18), 19).permute(2, 0, 1)
        evaluator.process([record], [{"sem_seg": logits}])
    assert evaluator.evaluate()["sem_seg"] == dict.fromkeys(SCORES, 100)

    evaluator = Trainer.build_evaluator(config(DETECTOR.format("t")), NAMES[1])
    evaluator.reset()
    classes = [24, 25, 26, 27, 28, 31, 32, 33]
    for record in DatasetCatalog.get(NAMES[1]):
        file = record["file_name"].replace("leftImg8bit.png", "gtFine_instanceIds.png")
        ids = np.array(Image.open(file.replace("leftImg8bit", "gtFine")))
        values = [v for v in np.unique(ids).tolist() if v // 1000 in classes]
        assert len(values) == len(record["annotations"])
        instances = Instances(ids.shape)
        instances.pred_classes = torch.tensor([classes.index(value // 1000) for value in values])
        instances.pred_masks = torch.stack([torch.from_numpy(ids == value) for value in values])
        instances.scores = torch.linspace(0.9, 0.5, len(values))
        evaluator.process([record], [{"instances": instances}])
    assert evaluator.evaluate()["segm"] == {"AP": 100, "AP50": 100}


# --- data sets


def test_registered_folders_hold_what_detectron2s_own_names_do(builtin):
    rows = [*entries(builtin, "instance_seg"), *entries(builtin, "sem_seg")]
    cfg = config(DETECTOR.format("t"), pairs(DATASETS__REGISTER_CITYSCAPES=rows))
    register_cityscapes_datasets(cfg)
    register_cityscapes_datasets(cfg)  # again, as each process of a run does
    for row, name in zip(rows, NAMES, strict=True):
        ours, theirs = DatasetCatalog.get(row[0]), DatasetCatalog.get(name)
        assert len(ours) == len(theirs) > 3
        assert ours == [{key: tidy(value) for key, value in record.items()} for record in theirs]
        for key in ("evaluator_type", "thing_classes", "stuff_classes", "ignore_label"):
            if key == "ignore_label" and "instance" in name:
                continue  # which Detectron2 itself leaves out
            assert MetadataCatalog.get(row[0]).get(key) == MetadataCatalog.get(name).get(key)


def tidy(value):
    """Detectron2's own folders end in a slash."""
    return value.replace("//", "/") if isinstance(value, str) else value


@pytest.mark.parametrize(
    "row, message",
    [
        (["x", "folder", "train"], "must be a list of .name, folder, part, task., .* got .'x'"),
        (["x", "folder", "train", "panoptic"], "task is instance_seg or sem_seg, got"),
        (["x", 1, "train", "sem_seg"], "must be a list of"),
        ([NAMES[3], "folder", "val", "sem_seg"], "registered as another data set"),
    ],
)
def test_entries_of_another_form_are_refused(row, message):
    cfg = load_config("", ["DATASETS.REGISTER_CITYSCAPES", str([row])])
    with pytest.raises(UsageError, match=message):
        register_cityscapes_datasets(cfg)


def first(root, kind, end=""):
    return sorted((root / kind).glob(f"*/*{end}"))[0]


def remove(end):
    return lambda root: first(root, "gtFine/train", end).unlink()


def write(kind, end, content):
    return lambda root: first(root, kind, end).write_bytes(content)


def rename(root):
    path = first(root, "leftImg8bit/train")
    path.rename(path.with_suffix(".jpg"))


def mislabel(root):
    path = first(root, "gtFine/train", "labelTrainIds.png")
    Image.fromarray(np.full((96, 192), 19, np.uint8)).save(path)


def relabel(root):
    path = first(root, "gtFine/train", "polygons.json")
    path.write_text(path.read_text().replace('"building"', '"skyscraper"'))


def empty(root):
    for city in (root / "leftImg8bit/train").iterdir():
        shutil.rmtree(city)


SPOILT = {
    "no images": (lambda root: shutil.rmtree(root / "leftImg8bit/train"),
        "image folder .*leftImg8bit/train .* does not exist .*DETECTRON2_DATASETS"),
    "empty folders": (empty, "image folder .* has no images"),
    "no annotations": (lambda root: shutil.rmtree(root / "gtFine/val"),
        "annotation folder .*gtFine/val .* does not exist"),
    "no instances": (remove("instanceIds.png"),
        "lacks 1 of 8 files, the first is digitburg/.*_000000_000019_gtFine_instanceIds.png"),
    "no train ids": (remove("labelTrainIds.png"), "labelTrainIds.png: csCreateTrainIdLabelImgs"),
    "an image of another name": (rename, r"must be called CITY/\*_leftImg8bit.png, got digitburg/"),
    "cut off polygons": (write("gtFine/train", "polygons.json", b'{"imgHeight": 9, "obj'),
        "polygons .*digitburg_000000_000019_gtFine_polygons.json cannot be read"),
    "polygons of another form": (write("gtFine/train", "polygons.json", b'{"objects": []}'),
        "polygons .*json are not in Cityscapes' format: KeyError"),
    "an unknown label": (relabel, "polygons .*json have an unknown label: skyscraper"),
    "a broken image": (write("leftImg8bit/train", "", b"PNG"), "image .*png cannot be read"),
    "a label too many": (mislabel, "labels must be 0..18 for 19 classes, .* got 19 in .*TrainIds"),
    "truth without an image": (
        lambda root: first(root, "leftImg8bit/val").unlink(), "has 1 files without an image"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, message", SPOILT.values(), ids=SPOILT)
def test_spoilt_data_is_refused(copy, tmp_path, tool, capfd, spoil, message):
    spoil(copy)
    keys = own(copy, "sem_seg", OUTPUT_DIR=tmp_path / "out")
    file = str(CONFIGS / f"{SEGMENTOR.format('t')}.yaml")
    assert tool.main(["--config-file", file, *keys]) == 2
    lines = capfd.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("train_net: ")]
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "leaf, task, changes, more, message",
    [
        (SEGMENTOR, "instance_seg", {}, [], "task instance_seg, but WholeImage.* the task sem_seg"),
        (DETECTOR, "sem_seg", {}, [], "is of the task sem_seg, but GeneralizedRCNN needs one of"),
        (DETECTOR, "instance_seg", {"MODEL__MASK_ON": False}, [], "it needs MODEL.MASK_ON True"),
        (DETECTOR, "instance_seg", {"MODEL__ROI_HEADS__NUM_CLASSES": 80}, [],
            "has 8 classes, but MODEL.ROI_HEADS.NUM_CLASSES is 80"),
        (SEGMENTOR, "sem_seg", {"MODEL__SEM_SEG_HEAD__NUM_CLASSES": 150}, [],
            "has 19 classes, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is 150"),
        (SEGMENTOR, "sem_seg", {}, ["--num-machines", "2"],
            "evaluated on one machine only, got machines=2: train with DATASETS.TEST"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused(
    leaf, task, changes, more, message, cityscapes, tmp_path, tool, capfd
):
    keys = own(cityscapes, task, OUTPUT_DIR=tmp_path / "out", **changes)
    file = str(CONFIGS / f"{leaf.format('t')}.yaml")
    assert tool.main(["--config-file", file, *more, *keys]) == 2
    assert re.search(message, capfd.readouterr().err)


def test_several_machines_may_train_without_evaluation(cityscapes, tmp_path):
    keys = own(cityscapes, "sem_seg", OUTPUT_DIR=tmp_path / "out") + ["DATASETS.TEST", "()"]
    cfg = config(SEGMENTOR.format("t"), keys)
    check_run(cfg, machines=2)
    assert SemSegTrainer.test(cfg, torch.nn.Identity()) == {}


def test_instances_need_no_train_ids(copy, tmp_path):
    for path in copy.rglob("*labelTrainIds.png"):
        path.unlink()
    cfg = config(DETECTOR.format("t"), own(copy, "instance_seg"))
    register_cityscapes_datasets(cfg)
    for name in ("instance_seg_train", "instance_seg_val"):
        check_cityscapes_dataset(cfg, name, sem_seg=False, evaluated=True)
    (path,) = [p for p in copy.rglob("*countwick_000001*polygons.json")]
    path.write_text(json.dumps({"objects": [], "imgHeight": 0, "imgWidth": "x"}))
    with pytest.raises(UsageError, match="must have a height and a width, got .0, 'x'"):
        check_cityscapes_dataset(cfg, "instance_seg_val", sem_seg=False, evaluated=True)


@pytest.mark.slow
@pytest.mark.parametrize("few", [0, 64], ids=["in other processes", "in this one"])
def test_instances_are_read_while_a_training_listens_for_signals(few, builtin, monkeypatch):
    """Detectron2's own pool is ended with SIGTERM, which its processes would then wait out."""

    def give_up(number, frame):
        raise TimeoutError

    expected = DatasetCatalog.get(NAMES[1])
    others = multiprocessing.active_children()
    register_cityscapes_datasets(config(DETECTOR.format("t")))
    monkeypatch.setattr(cityscapes_data, "FEW_IMAGES", few)
    signals = StopSignals()
    signals.listen()
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    try:
        for _ in range(5):
            assert DatasetCatalog.get(NAMES[1]) == expected
            assert set(multiprocessing.active_children()) <= set(others)
            gc.collect()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        signals.close()
    assert signals.received == 0 and len(expected) == 4
