"""The law of truth for label maps: the truth, given as predictions, scores full marks."""

import data_trees
import numpy as np
import pytest
import torch
from d2_sem_seg_tiny import DIGITS, LEAF
from d2_tiny import REPOSITORY
from detectron2.data import DatasetCatalog
from detectron2.structures import Instances
from mm_tiny import CONFIGS
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData
from PIL import Image

from elsa_d2 import SemSegTrainer, Trainer, load_config
from elsa_d2.data.safe_loading import read_labels
from elsa_d2.engine.preflight import check_run
from elsa_mm.label_maps import check_files, check_label_maps
from elsa_mm.safe_loading import SafeRunner
from examples.digits.dataset import SEGMENTATION_CLASSES

pytestmark = pytest.mark.usefixtures("clean_catalog")
MMSEG = REPOSITORY / "configs/mmseg/elsa_swin"
D2_CITYSCAPES = str(REPOSITORY / "configs/detectron2/Cityscapes/{}.yaml")
ODD = ("wall", "door", "roof")


def odd_files(root):
    """Images and label maps of many kinds, in subfolders, some turned by EXIF, some unlabelled."""
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[274] = 6
    for part in ("training", "validation"):
        for number, (name, kind) in enumerate(
            {
                "a.jpg": "L",
                "sub/B.PNG": "P",
                "sub/c.TIF": "I;16",
                "d.jpeg": "L",
                "e.webp": "1",
            }.items()
        ):
            file = root / "images" / part / name
            file.parent.mkdir(parents=True, exist_ok=True)
            size = (20 + 3 * number, 31 - number)
            image = Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))
            turn = {"exif": exif} if name.startswith(("d", "e")) else {}
            image.save(file, **turn)
            seen = size[::-1] if turn else size
            labels = random.choice([0, 1] if kind == "1" else [0, 1, 2, 255], seen)
            if kind == "I;16":
                map_ = Image.fromarray(labels.astype(np.uint16))
            elif kind == "1":
                map_ = Image.fromarray(labels.astype(bool))
            else:
                map_ = Image.fromarray(labels.astype(np.uint8))
            if kind == "P":
                map_.putpalette([90, 80, 70] * 256)
            place = root / "annotations" / part / (name.rpartition(".")[0] + ".png")
            place.parent.mkdir(parents=True, exist_ok=True)
            map_.save(place)
    return root


@pytest.fixture(scope="module")
def trees(digits, cityscapes, tmp_path_factory):
    """Layout -> folder, classes, whether 0 stands for none."""
    folder = tmp_path_factory.mktemp("trees")
    data_trees.ade20k(folder / "ade20k")
    names = [str(number) for number in range(150)]
    return {
        "digits": (digits, list(SEGMENTATION_CLASSES), True),
        "ade20k": (folder / "ade20k", names, True),
        "odd files": (odd_files(folder / "odd"), list(ODD), False),
        "cityscapes": (cityscapes, [], False),
    }


# Detectron2: the test loader and the evaluator of a run, with a model that looks up the truth.


class TruthInDetectron2(torch.nn.Module):
    def __init__(self, name, predict):
        super().__init__()
        self.records = {record["file_name"]: record for record in DatasetCatalog.get(name)}
        self.predict = predict

    def forward(self, inputs):
        return [self.predict(self.records[one["file_name"]]) for one in inputs]


def detectron2_config(layout, trees, config, **keys):
    root, classes, reduce = trees[layout]
    sets = [
        [f"truth_{p}", str(root / "images" / p), str(root / "annotations" / p), classes, reduce]
        for p in ("training", "validation")
    ]
    keys = {"MODEL.DEVICE": "cpu", "DATALOADER.NUM_WORKERS": 0, **keys}
    if layout != "cityscapes":
        keys |= {"DATASETS.REGISTER_SEM_SEG": sets, "MODEL.SEM_SEG_HEAD.NUM_CLASSES": len(classes)}
        keys["MODEL.SEM_SEG_HEAD.CLASS_WEIGHT"] = []
        keys |= {"DATASETS.TRAIN": ["truth_training"], "DATASETS.TEST": ["truth_validation"]}
    return load_config(config, [str(part) for pair in keys.items() for part in pair])


def one_hot(labels, number):
    labels = torch.from_numpy(labels).long()
    right = labels.where(labels < number, 0)  # where there is no class, anything
    return {"sem_seg": torch.nn.functional.one_hot(right, number).permute(2, 0, 1).float()}


@pytest.mark.parametrize("layout", ["digits", "ade20k", "odd files"])
def test_mean_iou_in_detectron2(layout, trees, tmp_path):
    config = LEAF.format("swin_t") if layout == "ade20k" else DIGITS
    cfg = detectron2_config(layout, trees, config, OUTPUT_DIR=tmp_path / "out")
    check_run(cfg)
    _, classes, reduce = trees[layout]

    def predict(record):
        labels = read_labels(record["sem_seg_file_name"], len(classes), reduce)
        return one_hot(labels, len(classes))

    found = SemSegTrainer.test(cfg, TruthInDetectron2("truth_validation", predict))["sem_seg"]
    scores = [found[name] for name in ("mIoU", "fwIoU", "mACC", "pACC")]
    assert scores == pytest.approx([100] * 4, rel=1e-14)  # fwIoU is a sum of fractions


def cityscapes_config(trees, task, leaf, tmp_path):
    root = trees["cityscapes"][0]
    sets = [[f"truth_{part}", str(root), part, task] for part in ("train", "val")]
    return detectron2_config(
        "cityscapes",
        trees,
        D2_CITYSCAPES.format(leaf),
        **{
            "OUTPUT_DIR": tmp_path / "out",
            "DATASETS.REGISTER_CITYSCAPES": sets,
            "DATASETS.TRAIN": ["truth_train"],
            "DATASETS.TEST": ["truth_val"],
        },
    )


def test_semantic_scores_of_cityscapes_in_detectron2(trees, tmp_path):
    cfg = cityscapes_config(trees, "sem_seg", "upernet_elsa_swin_t_80k", tmp_path)
    check_run(cfg)

    def predict(record):
        return one_hot(read_labels(record["sem_seg_file_name"], 19), 19)

    found = SemSegTrainer.test(cfg, TruthInDetectron2("truth_val", predict))["sem_seg"]
    assert found == dict.fromkeys(("IoU", "iIoU", "IoU_sup", "iIoU_sup"), 100)


def instances_in(path):
    """Masks [N, H, W] and classes 0..7 of the instances in an instance map."""
    from cityscapesscripts.helpers.labels import id2label

    ids = np.asarray(Image.open(path))
    found = [int(number) for number in np.unique(ids) if number >= 1000]
    classes = [id2label[number // 1000].trainId - 11 for number in found]
    masks = [ids == number for number in found]
    return np.stack(masks), torch.tensor(classes)


def test_instance_scores_of_cityscapes_in_detectron2(trees, tmp_path):
    cfg = cityscapes_config(trees, "instance_seg", "mask_rcnn_elsa_swin_t_fpn", tmp_path)
    check_run(cfg)

    def predict(record):
        path = record["file_name"].replace("leftImg8bit", "gtFine", 1)
        masks, classes = instances_in(path.replace("_leftImg8bit.png", "_gtFine_instanceIds.png"))
        found = Instances(masks.shape[1:])
        found.pred_masks, found.pred_classes = torch.from_numpy(masks), classes
        found.scores = torch.ones(len(classes))
        return {"instances": found}

    found = Trainer.test(cfg, TruthInDetectron2("truth_val", predict))["segm"]
    assert found == {"AP": 100, "AP50": 100}


# OpenMMLab: the runner, data sets and evaluators of a run, with a model that gives the truth back.


class TruthInOpenMMLab(BaseModel):
    def forward(self, inputs, data_samples, mode):
        for sample in data_samples:
            if "gt_sem_seg" in sample:
                labels = sample.gt_sem_seg.data
                right = labels.where(labels < len(sample_classes(self)), 0)
                sample.pred_sem_seg = PixelData(data=right)
            else:
                path = sample.img_path.replace("leftImg8bit", "gtFine", 1)
                path = path.replace("_leftImg8bit.png", "_gtFine_instanceIds.png")
                masks, classes = instances_in(path)
                boxes = [
                    [*np.argwhere(m).min(0)[::-1], *np.argwhere(m).max(0)[::-1] + 1] for m in masks
                ]
                sample.pred_instances = InstanceData(
                    masks=torch.from_numpy(masks),
                    labels=classes,
                    scores=torch.ones(len(classes)),
                    bboxes=torch.tensor(np.array(boxes)).float(),
                )
        return data_samples


def sample_classes(model):
    return model.classes


def openmmlab_scores(path, tmp_path, change):
    cfg = Config.fromfile(path)
    scope = cfg.default_scope
    cfg.work_dir = str(tmp_path / "work")
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    change(cfg)
    cfg.model = dict(type=TruthInOpenMMLab)
    with DefaultScope.overwrite_default_scope(scope):
        runner = SafeRunner.from_cfg(cfg)
        runner.model.classes = runner.test_loop.dataloader.dataset.metainfo["classes"]
        if scope == "mmseg":
            check_files(cfg.test_dataloader.dataset, "test")
            check_label_maps(runner.test_loop.dataloader.dataset, "test")
        return runner.test()


@pytest.mark.parametrize("layout", ["digits", "ade20k", "odd files"])
def test_mean_iou_in_mmsegmentation(layout, trees, tmp_path):
    root, classes, reduce = trees[layout]

    def change(cfg):
        cfg.test_dataloader.dataset.data_root = str(root)
        if layout == "odd files":
            dataset = cfg.test_dataloader.dataset
            dataset.update(metainfo=dict(classes=classes, palette=[]), reduce_zero_label=reduce)
            dataset.pop("indices", None)
            cfg.test_dataloader.batch_size = 1

    path = next(MMSEG.glob("*tiny*ade20k*.py")) if layout == "ade20k" else CONFIGS["mmseg"]
    found = openmmlab_scores(path, tmp_path, change)
    assert {found[name] for name in ("aAcc", "mIoU", "mAcc")} == {100}


def test_semantic_scores_of_cityscapes_in_mmsegmentation(trees, tmp_path):
    def change(cfg):
        cfg.test_dataloader.dataset.data_root = str(trees["cityscapes"][0])

    found = openmmlab_scores(next(MMSEG.glob("*tiny*cityscapes*.py")), tmp_path, change)
    names = ["mIoU", *(f"cityscapes/{name}" for name in ("IoU", "iIoU", "IoU_sup", "iIoU_sup"))]
    assert {found[name] for name in names} == {100}


def test_instance_scores_of_cityscapes_in_mmdetection(trees, tmp_path):
    root = trees["cityscapes"][0]

    def change(cfg):
        cfg.test_dataloader.dataset.data_root = str(root)
        file = f"{root}/annotations/instancesonly_filtered_gtFine_val.json"
        cfg.test_evaluator[0].ann_file = file
        cfg.test_evaluator[1].seg_prefix = f"{root}/gtFine/val"

    leaf = next((REPOSITORY / "configs/mmdet/elsa_swin").glob("mask-rcnn*-t-*cityscapes*.py"))
    found = openmmlab_scores(leaf, tmp_path, change)
    assert found["cityscapes/mAP"] == found["cityscapes/AP@50"] == 1
