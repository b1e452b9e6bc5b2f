"""Ground truth given as predictions scores exactly 100 in both frameworks, or the file is refused.

Both are asked by the way that runs go: a registered data set and the trainer's evaluator in
Detectron2, a data set and a metric that are built from a config in MMDetection.
"""

import logging
import uuid
from collections import defaultdict

import numpy as np
import pytest
import torch
from coco_files import KINDS, NAMES, Detection, content, grid, renamed, truth_of, write

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from mmdet.registry import DATASETS as MMDET_DATASETS
from mmdet.registry import METRICS as MMDET_METRICS
from mmengine.config import Config
from mmengine.logging import MMLogger

from elsa_core.data.coco import read_coco
from elsa_core.data.coco_rules import is_crowd
from elsa_d2 import Trainer, load_config, register_coco_datasets
from elsa_d2.data.coco import check_dataset
from elsa_mm.preflight import check_data
from elsa_tools.data.annotations import validate

D2_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MM_NAMES = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")


@pytest.fixture(scope="module")
def cfg():
    return load_config()


def by_image(detections, limit):
    """As a model gives them: the best of an image, no more than the limit."""
    found = defaultdict(list)
    for one in sorted(detections, key=lambda one: -one.score):
        found[one.image].append(one)
    return {image: ones[:limit] for image, ones in found.items()}


def tensors_of(found, classes, size):
    """Boxes, scores, labels and masks of an image's detections; no masks where they have none."""
    masks = [torch.from_numpy(one.mask) for one in found if one.mask is not None]
    return (
        torch.tensor([one.box for one in found]).reshape(-1, 4),
        torch.tensor([one.score for one in found]),
        torch.tensor([classes.index(one.name) for one in found]).long(),
        torch.stack(masks) if masks else torch.zeros(0, *size),
    )


class InDetectron2:
    """A file as a run of Detectron2 sees it."""

    top = 100.0

    def __init__(self, cfg, folder, task, limit):
        self.name, self.task, self.limit = f"law_{uuid.uuid4().hex}", task, limit
        cfg = cfg.clone()
        entry = [self.name, str(folder / "annotations.json"), str(folder / "images")]
        cfg.DATASETS.REGISTER_COCO = [entry]
        cfg.DATASETS.TEST = [self.name]
        cfg.MODEL.MASK_ON = task == "segm"
        cfg.TEST.DETECTIONS_PER_IMAGE = limit
        cfg.OUTPUT_DIR = str(folder / "runs")
        self.cfg = cfg

    def check(self):
        register_coco_datasets(self.cfg)
        check_dataset(self.name, masks=self.task == "segm")

    def evaluator(self):
        register_coco_datasets(self.cfg)
        return Trainer.build_evaluator(self.cfg, self.name)

    def records(self):
        return DatasetCatalog.get(self.name)

    def learnt(self, coco):
        """(image, name, box, whether it is a crowd) of each annotation that training reads."""
        records, names = self.records(), MetadataCatalog.get(self.name).thing_classes
        return [
            (record["image_id"], names[one["category_id"]], one["bbox"], bool(one["iscrowd"]))
            for record in records
            for one in record["annotations"]
        ]

    def scores(self, coco, detections):
        records, found = self.records(), by_image(detections, self.limit)
        classes = MetadataCatalog.get(self.name).thing_classes
        evaluator = self.evaluator()
        evaluator.reset()
        for record in records:
            mine, size = found.get(record["image_id"], []), (record["height"], record["width"])
            boxes, scores, labels, masks = tensors_of(mine, classes, size)
            instances = Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=labels)
            if self.task == "segm":
                instances.pred_masks = masks
            evaluator.process([{"image_id": record["image_id"]}], [{"instances": instances}])
        scores = evaluator.evaluate()[self.task]
        return [scores[name] for name in D2_NAMES]


class InMMDetection:
    """A file as a run of MMDetection sees it."""

    top = 1.0

    def __init__(self, folder, task, limit):
        self.folder, self.task, self.limit = folder, task, limit
        self.cfg = Config(
            dict(
                test_dataloader=dict(
                    dataset=dict(
                        type="elsa_mm.coco.CocoDataset",
                        test_mode=True,
                        data_root=str(folder),
                        ann_file="annotations.json",
                        data_prefix=dict(img="images"),
                        pipeline=[],
                    )
                ),
                test_evaluator=dict(
                    type="elsa_mm.coco_metric.CocoMetric",
                    ann_file=str(folder / "annotations.json"),
                    metric=task,
                    max_dets=limit,
                ),
            )
        )

    def check(self):
        check_data(self.cfg, ["test"])

    def evaluator(self):
        return MMDET_METRICS.build(self.cfg.test_evaluator)

    def dataset(self, coco):
        classes = [one["name"] for one in coco["categories"]][::-1]  # any order will do
        cfg = {**self.cfg.test_dataloader.dataset, "metainfo": dict(classes=classes)}
        return MMDET_DATASETS.build({**cfg, "serialize_data": False})

    def learnt(self, coco):
        """As in Detectron2."""
        dataset = self.dataset(coco)
        names = dataset.metainfo["classes"]
        found = []
        for info in dataset:
            for one in info["instances"]:
                left, top, right, bottom = one["bbox"]
                # As they stand in the file: sums and differences of floats round.
                box = next(
                    each["bbox"]
                    for each in coco["annotations"]
                    if np.allclose(each["bbox"], [left, top, right - left, bottom - top], 1e-9)
                )
                crowd = bool(one["ignore_flag"])
                found.append((info["img_id"], names[one["bbox_label"]], box, crowd))
        return found

    def scores(self, coco, detections):
        found, dataset = by_image(detections, self.limit), self.dataset(coco)
        classes = dataset.metainfo["classes"]
        metric = self.evaluator()
        metric.dataset_meta = dataset.metainfo
        for info in dataset:
            mine, size = found.get(info["img_id"], []), (info["height"], info["width"])
            names = ("bboxes", "scores", "labels", "masks")[: 4 if self.task == "segm" else 3]
            instances = dict(zip(names, tensors_of(mine, classes, size), strict=False))
            sample = dict(img_id=info["img_id"], ori_shape=size, pred_instances=instances)
            metric.process({}, [sample])
        scores = metric.evaluate(size=len(coco["images"]))
        return [scores[f"coco/{self.task}_{name}"] for name in MM_NAMES]


def both(cfg, folder, task, limit):
    return InDetectron2(cfg, folder, task, limit), InMMDetection(folder, task, limit)


def is_perfect(scores, top):
    """`top` where there are objects; AP, AP50 and AP75 must have some."""
    rest = {score for score in scores[3:] if score == score and score != -1}
    return scores[:3] == [top] * 3 and rest <= {top}


def checker_errors(coco_file):
    coco = read_coco(str(coco_file))
    return [one for one in validate(str(coco_file), coco) if one.level == "error"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "names in a file with a byte order mark"])
def test_truth_scores_100(cfg, tmp_path, kind):
    coco = content()
    KINDS[kind.partition(" in a file")[0]](coco)
    file = write(tmp_path, coco, "utf-8-sig" if kind.endswith("mark") else "utf-8")
    assert not checker_errors(file)
    limit = 400 if kind == "400 objects" else 100
    names = {one["id"]: one["name"] for one in coco["categories"]}
    learnt = sorted(
        (one["image_id"], names[one["category_id"]], one["bbox"], is_crowd(one))
        for one in coco["annotations"]
        if one["bbox"][2] > 0
    )
    for task in ("bbox", "segm"):
        truth = truth_of(coco, task)
        for run in both(cfg, tmp_path, task, limit):
            run.check()
            assert is_perfect(run.scores(coco, truth), run.top)
            assert sorted(run.learnt(coco)) == learnt


def imperfect(coco, task, number=150, seed=0):
    """Moved, misnamed and invented objects, with equal scores among them."""
    random = np.random.default_rng(seed)
    truth, found = truth_of(coco, task), []
    while len(found) < number:
        one = truth[random.integers(len(truth))]
        shift = random.normal(0, 2, 4) * (random.random() < 0.8)
        box = [float(np.float32(edge)) for edge in np.add(one.box, shift)]
        box[2:] = [max(box[0] + 1, box[2]), max(box[1] + 1, box[3])]
        name = one.name if random.random() < 0.8 else random.choice(NAMES)
        mask = None if one.mask is None else np.roll(one.mask, int(shift[0]), axis=1)
        found.append(Detection(one.image, str(name), box, mask, round(random.random(), 1)))
    return found


@pytest.mark.parametrize("limit", [40, 100, 400])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_the_same_detections_score_the_same(cfg, tmp_path, task, limit):
    """Below, at and above COCO's 100 detections, of 150 in an image and of 30 in another one."""
    coco = content([(240, 200)] * 2, objects=[(8, 8), (20, 30), (60, 40), (100, 101)])
    renamed("categories", lambda i: 50 - i)(coco)
    write(tmp_path, coco)
    found = imperfect(coco, task)
    for one in found[::5]:
        one.image = 1
    detectron2, mmdetection = both(cfg, tmp_path, task, limit)
    detectron2.check(), mmdetection.check()
    ours, theirs = detectron2.scores(coco, found), mmdetection.scores(coco, found)
    assert theirs == pytest.approx(np.divide(ours, 100), abs=1e-12)
    assert 0.05 < theirs[0] < theirs[1] < 0.95 and min(theirs[3:]) > 0


def test_a_limit_below_the_objects_caps_every_score_and_says_so(cfg, tmp_path, caplog, request):
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    request.addfinalizer(lambda: logger.removeHandler(caplog.handler))
    coco = grid()
    write(tmp_path, coco)
    detectron2, mmdetection = both(cfg, tmp_path, "bbox", 100)
    register_coco_datasets(detectron2.cfg)
    truth = truth_of(coco, "bbox")
    with caplog.at_level(logging.WARNING):
        ours = detectron2.scores(coco, truth)
        theirs = mmdetection.scores(coco, truth)
    assert ours[:3] == pytest.approx([100 * score for score in theirs[:3]], abs=1e-10)
    assert len(set(ours[:4])) == 1 and 20 < ours[0] < 30  # a quarter of the objects
    said = [
        one.getMessage() for one in caplog.records if "more than the 100 objects" in one.message
    ]
    assert len(said) == 2 and all("1 of 1 images have" in one for one in said)
    assert "TEST.DETECTIONS_PER_IMAGE" in said[0] and "model.test_cfg" in said[1]


def test_a_model_that_detects_nothing_scores_0(cfg, tmp_path):
    coco = content()
    write(tmp_path, coco)
    detectron2, mmdetection = both(cfg, tmp_path, "segm", 100)
    detectron2.check()
    assert detectron2.scores(coco, []) == mmdetection.scores(coco, []) == [0] * 6
