"""What detectors find, in COCO's results format, in supervision and in SAHI."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytest.importorskip("mmdet", reason="MMDetection is not installed")

from digit_models import DET, DIGITS, SEG, untrained

import elsa_tools.predict.cli
from elsa_core.runtime.errors import UsageError
from elsa_tools.predict import Detections, Segmentation
from elsa_tools.predict.inputs import read_image


@pytest.fixture(scope="module", params=DET)
def inferencer(request):
    return untrained(DET[request.param])


@pytest.fixture
def path(digits):
    return sorted((digits / "images/validation").glob("*.jpg"))[0]


def own_results(inferencer, path, found, folder):
    """As the framework's own evaluator writes them."""
    if inferencer.framework == "detectron2":
        from detectron2.evaluation.coco_evaluation import instances_to_coco_json

        raw = inferencer.predictor(read_image(str(path)))["instances"].to("cpu")
        return instances_to_coco_json(raw[raw.scores >= 0.1], 7)
    from mmdet.evaluation import CocoMetric

    metric = CocoMetric(metric=["bbox", "segm"], format_only=True, outfile_prefix=f"{folder}/x")
    metric.cat_ids = list(range(10))
    masks = [entry["segmentation"] for entry in found.to_coco(7, range(10))]
    one = dict(img_id=7, bboxes=found.boxes, scores=found.scores, labels=found.labels, masks=masks)
    files = metric.results2json([one], f"{folder}/x")
    boxes, masks = (json.loads(Path(files[kind]).read_text()) for kind in ("bbox", "segm"))
    return [{**box, **mask} for box, mask in zip(boxes, masks, strict=True)]


def test_coco_results_are_the_frameworks_own(inferencer, path, tmp_path):
    found = inferencer.predict(read_image(str(path))).above(0.1)
    entries = found.to_coco(7, range(10))
    wanted = own_results(inferencer, path, found, tmp_path)
    assert len(entries) == len(wanted) > 0
    for ours, theirs in zip(entries, wanted, strict=True):
        assert ours.pop("bbox") == pytest.approx(theirs.pop("bbox"), abs=1e-4)
        assert ours.pop("score") == pytest.approx(theirs.pop("score"))
        assert ours == theirs


def test_demo_writes_coco_results(inferencer, path, digits, tmp_path, monkeypatch, capsys):
    content = json.loads((digits / "annotations/instances_validation.json").read_text())
    for category in content["categories"]:
        category["id"] = 90 - category["id"]
    for annotation in content["annotations"]:
        annotation["category_id"] = 90 - annotation["category_id"]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    inferencer.classes = DIGITS
    monkeypatch.setattr("elsa_tools.predict.load.load_inferencer", lambda *_, **__: inferencer)
    best = inferencer.predict(read_image(str(path))).above(0)
    threshold = (best.scores[4] + best.scores[5]) / 2
    arguments = [str(path), "--config", "x.py", "--weights", "x.pth"]
    arguments += ["--out", f"{tmp_path}/out", "--score-threshold", f"{threshold:.9f}", "--coco"]
    assert elsa_tools.predict.cli.main([*arguments, f"{tmp_path}/annotations.json"]) == 0
    truth = COCO(tmp_path / "annotations.json")
    results = truth.loadRes(f"{tmp_path}/out/coco_results.json")
    (image,) = [one for one in content["images"] if one["file_name"].endswith(path.name)]
    found = results.loadAnns(results.getAnnIds(image["id"]))
    assert len(found) == len(results.anns) == 5
    labels = [int(truth.cats[one["category_id"]]["name"]) for one in found]
    assert labels == best.labels[:5].tolist()
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, results, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert 0 <= evaluation.stats[0] <= 1
    other = tmp_path / "other.json"
    image["file_name"] = "other.jpg"
    other.write_text(json.dumps(content))
    capsys.readouterr()
    assert elsa_tools.predict.cli.main([*arguments, str(other)]) == 2
    assert f"{other} has no image of the name of {path}" in capsys.readouterr().err
    content["categories"][3]["name"] = "three"
    other.write_text(json.dumps(content))
    assert elsa_tools.predict.cli.main([*arguments, str(other)]) == 2
    assert "must have the names of the model's classes, '3' is not" in capsys.readouterr().err


def test_sahi_predicts_what_the_inferencer_predicts(inferencer, path):
    predict = pytest.importorskip("sahi.predict", reason="SAHI is not installed")
    from elsa_tools.predict.sahi import ElsaDetectionModel

    model = ElsaDetectionModel("", None, model=inferencer, confidence_threshold=0.1, device="cpu")
    image = read_image(str(path))
    options = dict(verbose=0, postprocess_match_threshold=1.1, perform_standard_pred=False)
    whole = predict.get_prediction(str(path), model).object_prediction_list
    found = inferencer.predict(image).above(0.1)
    assert [one.category.id for one in whole] == found.labels.tolist()
    assert [one.score.value for one in whole] == pytest.approx(found.scores.tolist())
    assert [one.category.name for one in whole] == [inferencer.classes[i] for i in found.labels]
    bare = [index for index, one in enumerate(whole) if one.mask is None]
    assert np.allclose([whole[i].bbox.to_xyxy() for i in bare], found.boxes[bare], atol=0.01)
    masked = [(one, found.masks[i]) for i, one in enumerate(whole) if one.mask is not None]
    kept = []
    for one, mask in masked:  # as polygons, without specks and holes
        rows, columns = np.nonzero(mask)
        left, top, right, bottom = one.bbox.to_xyxy()
        assert columns.min() <= left < right <= columns.max()
        assert rows.min() <= top < bottom <= rows.max()
        kept.append((one.mask.bool_mask & mask).sum() / mask.sum())
    assert np.median(kept) > 0.5
    sliced = predict.get_sliced_prediction(str(path), model, 64, 64, **options)
    corner = inferencer.predict(np.ascontiguousarray(image[-64:, -64:])).above(0.1)
    scores = {one.score.value: one for one in sliced.object_prediction_list}
    shifted = [scores.get(float(score)) for score in corner.scores]
    assert sum(one is not None for one in shifted) > 0
    for one, label in zip(shifted, corner.labels, strict=True):
        if one is not None:
            assert one.category.id == label and min(one.bbox.to_xyxy()[:2]) >= 96 - 64


def test_sahi_refuses_what_it_cannot_use():
    pytest.importorskip("sahi", reason="SAHI is not installed")
    from elsa_tools.predict.sahi import ElsaDetectionModel

    with pytest.raises(UsageError, match="INPUT.MIN_SIZE_TEST 800, got image_size=512"):
        ElsaDetectionModel(DET["detectron2"], None, image_size=512)
    segmentor = untrained(SEG["mmseg"])
    with pytest.raises(UsageError, match="SAHI needs a detector, got a model for segmentation"):
        ElsaDetectionModel("", None, model=segmentor, device="cpu")


def test_supervision_takes_instances_and_segmentations(inferencer, path):
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    image = read_image(str(path))
    found = inferencer.predict(image).above(0.1)
    detections = found.to_supervision(inferencer.classes)
    assert isinstance(detections, supervision.Detections) and len(detections) == len(found.labels)
    assert np.array_equal(detections.xyxy, found.boxes)
    assert np.array_equal(detections.confidence, found.scores)
    assert np.array_equal(detections.class_id, found.labels)
    assert np.array_equal(detections.mask, found.masks)
    assert detections["class_name"].tolist() == [inferencer.classes[i] for i in found.labels]
    painted = supervision.MaskAnnotator().annotate(image.copy(), detections.with_nms(0.5))
    assert painted.shape == image.shape and not np.array_equal(painted, image)
    none = Detections(*(array[:0] for array in (found.labels, found.scores, found.boxes)))
    assert len(none.to_supervision(inferencer.classes)) == 0
    labels = np.zeros((4, 6), np.int64)
    labels[1:3, 2:5] = 2
    regions = Segmentation(labels).to_supervision(["background", "a", "b"])
    assert regions.class_id.tolist() == [0, 2]
    assert regions["class_name"].tolist() == ["background", "b"]
    assert regions.xyxy.tolist() == [[0, 0, 5, 3], [2, 1, 4, 2]]
    assert np.array_equal(regions.mask[1], labels == 2)
