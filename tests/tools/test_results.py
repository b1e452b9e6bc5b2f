"""elsa analyze results: the frameworks' own numbers by class, and matches that add up."""

import json

import numpy as np
import pytest
import torch
from coco_files import NAMES, content, crowds, truth_of, write

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")
pytest.importorskip("supervision")

import supervision
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from pycocotools.mask import decode

from elsa_core.data.coco import load_coco
from elsa_core.data.coco_eval import evaluate_detections
from elsa_core.runtime.errors import UsageError
from elsa_d2.evaluation.coco import COCOEvaluator
from elsa_mm.coco_metric import CocoMetric
from elsa_tools.inspect import cli
from elsa_tools.results.detections import analyse_detections
from elsa_tools.results.matching import best_score, match_images
from elsa_tools.results.read import read_results, tasks_of

IDS = {name: number for number, name in enumerate(NAMES, start=1)}
SIZES = [(240, 200), (64, 48), (33, 90), (300, 200), (150, 150)] * 3
OBJECTS = ((12, 22), (130, 120), (40, 40), (9, 30))


def a_file(folder, *changes):
    """A file with objects of all sizes, one class without an object, and changes of it."""
    coco = content(SIZES, OBJECTS)
    coco["categories"].append({"id": 9, "name": "unseen"})
    for change in changes:
        change(coco)
    return write(folder, coco), coco


def a_model(coco, seed=0):
    """What an imperfect model finds: objects moved, as another class, not at all, or twice."""
    random = np.random.default_rng(seed)
    found = []
    for one in truth_of(coco, "segm", seed):
        if random.uniform() < 0.15:
            continue
        shift = random.integers(-2, 3, 2)
        one.box = (np.array(one.box) + [*shift, *shift]).tolist()
        one.mask = np.roll(one.mask, shift[::-1], (0, 1))
        if random.uniform() < 0.2:
            one.name = NAMES[random.integers(len(NAMES))]
        found += [one] * (1 + (random.uniform() < 0.2))
    return found


def of_image(coco, found, classes):
    for image in coco["images"]:
        mine = [one for one in found if one.image == image["id"]]
        size = image["height"], image["width"]
        masks = np.stack([one.mask for one in mine]) if mine else np.zeros((0, *size), bool)
        yield (
            image["id"],
            size,
            torch.tensor([one.box for one in mine], dtype=torch.float32).reshape(-1, 4),
            torch.tensor([one.score for one in mine]),
            torch.tensor([classes.index(one.name) for one in mine]).long(),
            torch.from_numpy(masks),
        )


def by_detectron2(file, coco, found, folder, request):
    name = f"results_{folder}"
    DatasetCatalog.register(name, lambda: [])
    classes = [*NAMES, "unseen"]
    MetadataCatalog.get(name).set(
        json_file=str(file),
        thing_classes=classes,
        thing_dataset_id_to_contiguous_id={**{i: i - 1 for i in IDS.values()}, 9: 3},
    )
    evaluator = COCOEvaluator(name, ("bbox", "segm"), output_dir=str(folder))
    evaluator.reset()
    for image, size, boxes, scores, labels, masks in of_image(coco, found, classes):
        instances = Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=labels)
        instances.pred_masks = masks
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    own = evaluator.evaluate()
    keys = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    return {
        task: (
            folder / "coco_instances_results.json",
            [own[task][key] for key in keys],
            [own[task][f"AP-{name}"] for name in classes],
        )
        for task in ("bbox", "segm")
    }


def by_mmdetection(file, coco, found, folder, request):
    metric = CocoMetric(
        str(file), metric=["bbox", "segm"], classwise=True, outfile_prefix=str(folder / "results")
    )
    classes = ["unseen", *NAMES[::-1]]  # any order
    metric.dataset_meta = {"classes": classes}
    for image, size, boxes, scores, labels, masks in of_image(coco, found, classes):
        instances = dict(bboxes=boxes, scores=scores, labels=labels, masks=masks)
        metric.process({}, [dict(img_id=image, ori_shape=size, pred_instances=instances)])
    own = metric.evaluate(size=len(coco["images"]))
    keys = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
    return {
        task: (
            folder / f"results.{task}.json",
            [100 * own[f"coco/{task}_{key}"] for key in keys],
            [100 * own[f"coco/{task}_{name}_precision"] for name in [*NAMES, "unseen"]],
        )
        for task in ("bbox", "segm")
    }


@pytest.mark.usefixtures("clean_catalog")
@pytest.mark.parametrize("framework", [by_detectron2, by_mmdetection])
def test_scores_are_those_of_the_framework(framework, tmp_path, request):
    file, coco = a_file(tmp_path, crowds)
    own = framework(file, coco, a_model(coco), tmp_path, request)
    for task, (results, summary, by_class) in own.items():
        entries = read_results(str(results))
        assert task in tasks_of(entries)
        analysis = analyse_detections(str(file), entries, task)
        ours = list(analysis.summary.values())[:6]
        theirs = [None if np.isnan(value) or value < 0 else value for value in summary]
        assert ours == pytest.approx(theirs, abs=1e-9) and all(ours)
        assert [one.name for one in analysis.by_class] == [*NAMES, "unseen"]
        assert [one.scores["AP"] for one in analysis.by_class[:3]] == pytest.approx(by_class[:3])
        assert set(analysis.by_class[3].scores.values()) == {None}
        assert list(analysis.curves) == list(NAMES)
        assert np.mean(list(analysis.by_iou.values())) == pytest.approx(summary[0])
        json.dumps(analysis.record(), allow_nan=False)


def entries_of(found):
    return [
        {
            "image_id": one.image,
            "category_id": IDS[one.name],
            "score": one.score,
            "bbox": [*one.box[:2], one.box[2] - one.box[0], one.box[3] - one.box[1]],
            "segmentation": rle(one.mask),
        }
        for one in found
    ]


def rle(mask):
    from pycocotools.mask import encode

    code = encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def as_supervision(coco, entries, task, image):
    mine = [one for one in entries if one["image_id"] == image]
    boxes = np.array([one["bbox"] for one in mine], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return supervision.Detections(
        xyxy=boxes,
        mask=np.stack([decode(one["segmentation"]) for one in mine]).astype(bool)
        if task == "segm" and mine
        else None,
        class_id=np.array([one["category_id"] - 1 for one in mine], int),
        confidence=np.array([one.get("score", 1) for one in mine]),
    )


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("score", [None, 0.5])
def test_confusion_matrix_is_supervisions(task, score, tmp_path):
    file, coco = a_file(tmp_path)
    entries = entries_of(a_model(coco, seed=3))
    analysis = analyse_detections(str(file), json.loads(json.dumps(entries)), task, score=score)
    least = float(analysis.confusion.rule.split(" at least ")[1].split()[0].strip(","))
    masks = {one["id"]: one for one in coco["images"]}
    truths = [
        {**one, "segmentation": rle(mask)}
        for one in coco["annotations"]
        for mask in [polygon_mask(one, masks[one["image_id"]])]
    ]
    judge = supervision.ConfusionMatrix.from_detections(
        [as_supervision(coco, entries, task, image) for image in masks],
        [as_supervision(coco, truths, task, image) for image in masks],
        [*NAMES, "unseen"],
        conf_threshold=least - 1e-3,
        iou_threshold=0.5,
        metric_target=supervision.metrics.MetricTarget[{"bbox": "BOXES", "segm": "MASKS"}[task]],
    )
    assert analysis.confusion.matrix.tolist() == judge.matrix.tolist()
    off = judge.matrix * (1 - np.eye(5, dtype=int))
    assert off[:-1, :-1].any() and off[-1].any() and off[:, -1].any()


def polygon_mask(one, image):
    from coco_files import mask_of

    return mask_of(one["segmentation"], image["height"], image["width"])


@pytest.mark.parametrize("iou", [0.5, 0.75])
def test_score_of_the_best_f1(iou, tmp_path):
    file, coco = a_file(tmp_path, crowds)
    entries = entries_of(a_model(coco, seed=1))
    for one in entries:
        one["score"] = round(one["score"], 1)  # many are equal
        one["category_id"] -= 1
    labels = {number: number - 1 for number in (*IDS.values(), 4)}
    evaluation = evaluate_detections(load_coco(str(file)), labels, entries, "bbox")
    score, best = best_score(evaluation, iou)

    def f1(least):
        right = objects = found = 0
        for match in match_images(evaluation, iou, least).values():
            right += len(match.pairs)
            objects += len(match.pairs) + len(match.confused) + len(match.missed)
            found += len(match.pairs) + len(match.confused) + len(match.extra)
        return 2 * right / (objects + found)

    every = {one["score"]: f1(one["score"]) for one in entries}
    assert best == pytest.approx(max(every.values()))
    assert score == max(key for key, value in every.items() if value == max(every.values()))


def test_mistakes_by_hand(tmp_path):
    """A crowd takes a detection, an ape is found as a zebra, one zebra twice, one not at all."""
    coco = content([(100, 100), (100, 100)], objects=[(9, 9)] * 3)
    crowd = {**coco["annotations"][0], "id": 50, "bbox": [50, 50, 40, 40], "iscrowd": 1}
    coco["annotations"].append(crowd | {"segmentation": None})
    file = write(tmp_path, coco)
    first, second, third = (one["bbox"] for one in coco["annotations"][:3])
    found = [(1, 1, 0.9, first), (1, 1, 0.8, first), (1, 1, 0.75, second)]
    found += [(1, 3, 0.95, third), (1, 1, 0.7, [60, 60, 10, 10]), (1, 2, 0.1, second)]
    entries = [
        {"image_id": image, "category_id": category, "score": score, "bbox": box}
        for image, category, score, box in found
    ]
    analysis = analyse_detections(str(file), entries, "bbox", score=0.5)
    assert analysis.confusion.matrix.tolist() == [
        [1, 0, 0, 1],
        [1, 0, 0, 1],
        [0, 0, 1, 1],
        [1, 0, 0, 0],
    ]
    assert [(one.file_name, round(one.severity, 9)) for one in analysis.images] == [
        ("2.jpg", 3),
        ("1.jpg", 1 + 0.75 + 0.8),
    ]
    truths, drawn = analysis.images[1].drawn()
    assert [(one.label, one.wrong) for one in truths] == [(0, False), (2, False), (1, True)]
    assert [(one.label, one.score, one.wrong) for one in drawn] == [
        (0, 0.9, False),
        (2, 0.95, False),
        (0, 0.75, True),
        (0, 0.8, True),
    ]
    assert [one.text for one in analysis.images] == [
        "found: 0 of 3; missed: 3",
        "found: 2 of 3; as another class: 1; detections of nothing: 1",
    ]
    assert analysis.confusion.confused(1) == [(NAMES[0], "background", 1)]


def test_nothing_found_right_scores_0(tmp_path):
    file, coco = a_file(tmp_path)
    entry = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [0, 0, 1, 1]}
    for entries in ([entry], []):
        analysis = analyse_detections(str(file), entries, "bbox")
        assert analysis.summary["AP"] == 0
        assert "at least 0, as none matches an object, are matched" in analysis.confusion.rule
        assert analysis.confusion.matrix[3].sum() == 0  # the class without objects
        assert analysis.confusion.matrix[-1].sum() == len(entries)


def damaged(**values):
    def change(entries, coco):
        entries[1].update(values)

    return change


WRONG = {
    "is on image 99, which the annotations": damaged(image_id=99),
    "is on image 1.0, which": damaged(image_id=1.0),
    "has category None, which the annotations": damaged(category_id=None),
    "must have a finite number as its score, got nan": damaged(score=float("nan")),
    "must have a finite number as its score, got '0.5'": damaged(score="0.5"),
    "must have a finite number as its score, got 10000000": damaged(score=10**400),
    "must have a bbox [x, y, width, height] of finite numbers, got [1, 2, 3]": damaged(
        bbox=[1, 2, 3]
    ),
    "of finite numbers, got [1, 2, -3, 4]": damaged(bbox=[1, 2, -3, 4]),
    "detection 2 must have RLE whose counts add up": damaged(
        segmentation={"size": [200, 300], "counts": [5]}
    ),
    "has no detections": lambda entries, coco: entries.clear(),
    "without a box and without a mask": lambda entries, coco: [
        (one.pop("bbox"), one.pop("segmentation")) for one in entries
    ],
    "no annotation is an object": lambda entries, coco: coco["annotations"].clear(),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_refusals(sentence, tmp_path, capsys):
    _, coco = a_file(tmp_path)
    entries = entries_of(a_model(coco))
    WRONG[sentence](entries, coco)
    file = write(tmp_path, coco)
    (tmp_path / "results.json").write_text(json.dumps(entries))
    assert run(file, tmp_path / "results.json", "--json", tmp_path / "out.json") == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--results", "{annotations}"], "is a file of annotations, results are a list"),
        (["--results", "{annotations}.gone"], "cannot be read: No such file"),
        (["--iou", "0.52"], "iou must be 0.5, 0.55, ... or 0.95, got 0.52"),
        (["--classes", "zebra", "cow"], "no category is called 'cow'"),
        (["--classes", "zebra"], "has category 3, which the annotations do not have"),
        (["--json", "{annotations}"], "--json must be another file than"),
        (["--score", "nan"], "score must be a finite number"),
    ],
)
def test_refused_arguments(options, sentence, tmp_path, capsys):
    file, coco = a_file(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(entries_of(a_model(coco))))
    before = file.read_bytes()
    options = [one.format(annotations=file) for one in options]
    assert run(file, tmp_path / "results.json", *options) == 2
    assert sentence in capsys.readouterr().err
    assert file.read_bytes() == before


def run(annotations, results, *options):
    arguments = ["--annotations", annotations, "--results", results, *options]
    return cli.main(["results", *map(str, arguments)])


def test_tables_and_json_of_the_command(tmp_path, capsys):
    file, coco = a_file(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(entries_of(a_model(coco))))
    assert run(file, tmp_path / "results.json", "--json", tmp_path / "out.json") == 0
    shown = capsys.readouterr().out
    assert "boxes, percent" in shown and "masks, percent" in shown and "AP by IoU" in shown
    row = next(line.split() for line in shown.splitlines() if line.startswith("unseen"))
    assert row == ["unseen", "0", "0", *"-" * 10]
    record = json.loads((tmp_path / "out.json").read_text())
    assert set(record) == {"bbox", "segm"}
    assert f"{record['bbox']['summary']['AP']:.1f}" in shown
    assert record["bbox"]["by_class"][3]["AP"] is None
    assert [one["mistakes"] for one in record["bbox"]["images"]][0] in shown


def test_other_categories_are_not_evaluated(tmp_path):
    file, coco = a_file(tmp_path)
    entries = [one for one in entries_of(a_model(coco)) if one["category_id"] == 2]
    analysis = analyse_detections(str(file), entries, "bbox", classes=[NAMES[1]])
    assert analysis.confusion.names == (NAMES[1], "background")
    everything = analyse_detections(str(file), entries, "bbox")
    assert analysis.summary["AP"] == everything.by_class[1].scores["AP"]
    with pytest.raises(UsageError, match="has no object of the classes to evaluate"):
        analyse_detections(str(file), [], "bbox", classes=["unseen"])
    with pytest.raises(UsageError, match="twice"):
        analyse_detections(str(file), entries, "bbox", classes=[NAMES[1]] * 2)
