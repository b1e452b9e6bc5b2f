"""elsa analyze results on label maps: the frameworks' own IoU, from the files that they write."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")
pytest.importorskip("mmseg")

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from mmseg.evaluation import IoUMetric

from elsa_core.runtime.errors import UsageError
from elsa_d2.evaluation.sem_seg import build_sem_seg_evaluator
from elsa_tools.inspect import cli
from elsa_tools.results.label_maps import analyse_label_maps

CLASSES = ["sky", "sea", "never there", "nowhere at all", "sand"]
STEMS = ("a", "sub/b", "sub/c")


@pytest.fixture(params=[False, True], ids=["0 is a class", "0 is none"])
def maps(request, tmp_path):
    """(folder, truths, predictions, whether 0 means no class in the files)."""
    random = np.random.default_rng(0)
    reduce = request.param
    truths, found = {}, {}
    for number, stem in enumerate(STEMS):
        size = (20 + number, 31 - number)
        truths[stem] = random.choice([0, 1, 4, 255], size, p=[0.5, 0.3, 0.1, 0.1])
        guess = np.where(truths[stem] == 255, 0, truths[stem])
        wrong = random.uniform(size=size) < 0.3
        found[stem] = np.where(wrong, random.choice([0, 1, 2, 4], size), guess)
        for folder, pixels in (("images", np.stack([guess * 40] * 3, -1)), ("maps", truths[stem])):
            if folder == "maps" and reduce:
                pixels = np.where(pixels == 255, 0, pixels + 1)
            path = tmp_path / folder / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path, truths, found, reduce


def by_detectron2(root, truths, found, reduce):
    name = f"maps_{root}"
    paths = {stem: str(root / "images" / f"{stem}.png") for stem in truths}
    records = [
        {"file_name": path, "sem_seg_file_name": str(root / "maps" / f"{stem}.png")}
        for stem, path in paths.items()
    ]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(stuff_classes=CLASSES, ignore_label=255, reduce_zero_label=reduce)
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(root)
    evaluator = build_sem_seg_evaluator(cfg, name)
    evaluator.reset()
    for stem, path in paths.items():
        logits = torch.nn.functional.one_hot(torch.from_numpy(found[stem]), len(CLASSES))
        evaluator.process([{"file_name": path}], [{"sem_seg": logits.permute(2, 0, 1)}])
    own = evaluator.evaluate()["sem_seg"]
    scores = {"mIoU": own["mIoU"], "mAcc": own["mACC"], "aAcc": own["pACC"], "fwIoU": own["fwIoU"]}
    ious = [own[f"IoU-{one}"] for one in CLASSES]
    return root / "inference/sem_seg_predictions.json", scores, ious


def by_mmsegmentation(root, truths, found, reduce):
    out = root / "predicted"
    metric = IoUMetric(output_dir=str(out))
    metric.dataset_meta = {"classes": CLASSES}
    for stem in truths:
        sample = {
            "pred_sem_seg": {"data": torch.from_numpy(found[stem])[None]},
            "gt_sem_seg": {"data": torch.from_numpy(truths[stem])[None]},
            "img_path": str(root / "images" / f"{stem}.png"),
            "reduce_zero_label": reduce,
        }
        metric.process({}, [sample])
    areas = [sum(one) for one in zip(*metric.results, strict=True)]
    ious = 100 * areas[0].double() / areas[1].double()
    own = metric.evaluate(size=len(truths))
    return out, {"mIoU (MMSegmentation)": own["mIoU"], "mAcc": own["mAcc"]}, ious.tolist()


@pytest.mark.usefixtures("clean_catalog")
@pytest.mark.parametrize("framework", [by_detectron2, by_mmsegmentation])
def test_scores_are_those_of_the_framework(framework, maps):
    root, truths, found, reduce = maps
    results, scores, ious = framework(root, truths, found, reduce)
    analysis = analyse_label_maps(
        str(root / "maps"),
        str(results),
        CLASSES,
        images=str(root / "images"),
        reduce_zero_label=reduce,
    )
    digits = 0.005 if framework is by_mmsegmentation else 1e-9  # it rounds to two
    assert {key: analysis.summary[key] for key in scores} == pytest.approx(scores, abs=digits)
    ours = [one.scores["IoU"] for one in analysis.by_class]
    there = [0, 1, 4]
    assert [ours[i] for i in there] == pytest.approx([ious[i] for i in there])
    assert ours[2:4] == [None, None]  # MMSegmentation: 0 and nan
    matrix = analysis.confusion.matrix
    for row in range(len(CLASSES)):
        for column in range(len(CLASSES)):
            pairs = [(truths[s] == row) & (found[s] == column) for s in STEMS]
            assert matrix[row, column] == sum(int(pair.sum()) for pair in pairs)
    assert {one.file_name for one in analysis.images} == {f"{stem}.png" for stem in STEMS}
    severities = [one.severity for one in analysis.images]
    assert severities == sorted(severities, reverse=True) and severities[-1] > 0
    for one in analysis.images:
        stem = one.file_name.removesuffix(".png")
        truth, drawn = one.drawn()
        assert np.array_equal(truth, np.where(truths[stem] == 255, 5, truths[stem]))
        assert np.array_equal(drawn, found[stem])
        assert f"right: {int((truths[stem] == found[stem]).sum()):,} of" in one.text
    json.dumps(analysis.record(), allow_nan=False)


def write_maps(folder, found, offset):
    for stem, labels in found.items():
        path = folder / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((labels + offset).astype(np.uint8)).save(path)


def test_first_label(maps, capsys):
    root, _, found, reduce = maps
    write_maps(root / "zero", found, 0)
    write_maps(root / "one", found, 1)
    arguments = ["--annotations", root / "maps", "--classes", *CLASSES]
    arguments += ["--reduce-zero-label"] if reduce else []
    rows = []
    for folder, first in (("zero", ["--first-label", "0"]), ("one", ["--first-label", "1"])):
        assert run("--results", root / folder, *arguments, *first) == 0
        rows.append(capsys.readouterr().out)
    assert rows[0] == rows[1] and "never there" in rows[0]
    assert run("--results", root / ("zero" if reduce else "one"), *arguments) == 2
    error = capsys.readouterr().err
    assert ("--first-label 0" if reduce else "labels must be 0..4 for 5 classes") in error


def run(*arguments):
    return cli.main(["results", *map(str, arguments)])


def test_refusals(maps):
    root, _, found, reduce = maps

    def refused(results, sentence, classes=CLASSES):
        with pytest.raises(UsageError, match=sentence):
            analyse_label_maps(
                str(root / "maps"), str(results), classes, reduce_zero_label=reduce, first_label=0
            )

    out = root / "out"
    write_maps(out, {stem: found[stem] for stem in STEMS[:2]}, 0)
    refused(out, "lacks results for 1 of 3 label maps, the first is sub/c")
    write_maps(out, {"sub/c": found["a"]}, 0)
    refused(out, "must be as large as its image")
    write_maps(out, {"sub/c": found["sub/c"], "elsewhere": found["a"]}, 0)
    refused(out, "'elsewhere.png' fits no label map")
    refused(root / "images/sub", "fits no label map|lacks results|must have one channel")
    refused(root / "gone.json", "cannot be read: No such file")
    (root / "empty").mkdir()
    refused(root / "empty", "has no label maps")
    results, entry = root / "results.json", {"file_name": "a.png", "category_id": 0}
    for content, sentence in (
        ([], "lacks results for 3"),
        ({}, "has no label maps: they are"),
        ([entry], "has no label maps: they are"),
        ([entry | {"category_id": 5, "segmentation": {}}], "has no label maps: they are"),
    ):
        results.write_text(json.dumps(content))
        refused(results, sentence)
    mask = {"size": [20, 31], "counts": [20 * 31 - 1, 1]}
    entries = [{**entry, "file_name": f"{s}.png", "segmentation": mask} for s in STEMS]
    results.write_text(json.dumps(entries))
    refused(results, "must give one class to each pixel of 'a.png'")
    entries[0] = entries[0] | {"category_id": 7}
    results.write_text(json.dumps(entries))
    refused(results, "labels must be 0..4, got 7")
    write_maps(root / "twice", {"x/a": found["a"], "y/a": found["a"]}, 0)
    refused(root / "twice", "has two results for label map a")


@pytest.mark.parametrize(
    "options, sentence",
    [
        ([], "--classes must name the classes"),
        (["--classes", "a", "--task", "bbox"], "task bbox does not go with --annotations"),
    ],
)
def test_refused_arguments(options, sentence, tmp_path, capsys):
    assert run("--annotations", tmp_path, "--results", tmp_path, *options) == 2
    assert sentence in capsys.readouterr().err
