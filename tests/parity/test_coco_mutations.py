"""What the checker accepts scores 100 in both frameworks; what it does not, both refuse."""

import copy
import json

import pytest
from coco_files import as_rle, content, crowds, rectangle, renamed, truth_of, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")

from test_law_of_truth import both, is_perfect

from elsa_core.data.coco import read_coco
from elsa_core.runtime.errors import UsageError
from elsa_d2 import load_config
from elsa_tools.data.annotations import validate

# Errors that only runs with masks have to refuse.
MASK_RULES = {"no-mask", "mask-form", "no-polygon", "polygon-form", "polygon-off-image"}
MASK_RULES |= {"rle-form", "rle-size", "rle-broken", "polygon-length"}
SIZE = (60, 40)
DELETE = "DELETE"

numbers = st.sampled_from([0, 1, -1, 2, 7, 0.5, 39, 60, -30, 1e-6, 1e5, 1e12, 2**70])
weird = st.sampled_from(
    [None, True, False, "", "1", "a", 1.0, float("nan"), float("inf"), -1e300, [], {}, [1], DELETE]
)
ids = st.one_of(
    st.integers(-2, 8), st.sampled_from(["1", "img_1", "ä", 2**53 + 1, 2**63, 2**70]), weird
)
boxes = st.one_of(
    st.lists(numbers, min_size=4, max_size=4),
    st.lists(st.one_of(numbers, weird), min_size=3, max_size=5),
    st.tuples(*[st.integers(-5, 50)] * 2, *[st.integers(0, 40)] * 2).map(list),
)
points = st.lists(st.integers(-9, 70).map(float), min_size=0, max_size=10)
rectangles = st.tuples(*[st.integers(0, 25)] * 4).map(lambda edges: rectangle(*edges))
rles = st.builds(
    as_rle, rectangles, st.sampled_from([SIZE, SIZE, SIZE[::-1], (33, 51)]), st.booleans()
)
broken_rles = st.builds(
    lambda counts, size: {"counts": counts, "size": size},
    st.one_of(st.text(max_size=9), st.lists(st.integers(-1, 2400), max_size=5), weird),
    st.sampled_from([[40, 60], [40.0, 60.0], [60, 40], [1], None]),
)
masks = st.one_of(
    rles,
    broken_rles,
    st.lists(st.one_of(rectangles, points), max_size=3),
    st.sampled_from([[["a"] * 6], [[1, 2, 3, 4, 5, float("nan")]], [[1e9] * 6], "mask", [1] * 6]),
    weird,
)
VALUES = {
    "images": {
        "id": ids,
        "file_name": st.one_of(st.sampled_from(["1.jpg", "ü/ß 1.png", "x/y.tif"]), weird),
        "width": st.one_of(st.integers(-1, 90), weird, st.sampled_from([2**16, 2**33, 60.0])),
        "height": st.one_of(st.integers(-1, 90), weird),
    },
    "categories": {"id": ids, "name": st.one_of(st.sampled_from(["ape", "new", "1"]), weird)},
    "annotations": {
        "id": ids,
        "image_id": ids,
        "category_id": ids,
        "bbox": st.one_of(boxes, weird),
        "area": st.one_of(numbers, weird),
        "iscrowd": st.one_of(st.sampled_from([0, 1, 2, "0"]), weird),
        "ignore": st.one_of(st.sampled_from([0, 1, 2, "0"]), weird),
        "segmentation": masks,
    },
}
keys = st.sampled_from([(what, key) for what in VALUES for key in VALUES[what]])
changes = keys.flatmap(
    lambda pair: st.tuples(st.just(pair), st.integers(0, 20), VALUES[pair[0]][pair[1]])
)
moves = st.tuples(
    st.sampled_from(list(VALUES)),
    st.integers(0, 20),
    st.sampled_from(["drop", "again", "again with another id", "backwards", "a number", "none"]),
)
renames = st.tuples(
    st.sampled_from(list(VALUES)), st.sampled_from(["from 0", "text", "gaps", "negative"])
)
mutations = st.lists(st.one_of(changes, changes, moves, renames), min_size=1, max_size=3)

NEW_IDS = {
    "from 0": lambda i: i - 1,
    "text": lambda i: f"x{i}",
    "gaps": lambda i: i * 10**12,
    "negative": lambda i: -i,
}


def valid():
    """3 images with objects in all forms of masks, and a crowd."""
    coco = content([SIZE, SIZE, (33, 51)], objects=[(9, 9), (20, 15), (12, 36)])
    crowds(coco)
    for number, one in enumerate(coco["annotations"][3:6]):
        one["segmentation"] = as_rle(one["segmentation"][0], SIZE, number % 2 == 0)
    return coco


def mutate(coco, mutation):
    if len(mutation) == 2:
        what, new = mutation
        # What has been spoilt before may have no id to rename.
        if all(type(one) is dict and type(one.get("id")) is int for one in coco[what]):
            known = {one["id"] for one in coco[what]}
            key = {"images": "image_id", "categories": "category_id"}.get(what, "id")
            if all(type(one) is dict and one.get(key) in known for one in coco["annotations"]):
                renamed(what, NEW_IDS[new])(coco)
        return
    where, index, value = mutation
    entries = coco[where[0] if isinstance(where, tuple) else where]
    if not entries:
        return
    one = entries[index % len(entries)]
    if isinstance(where, tuple):
        if isinstance(one, dict):
            one.update({where[1]: copy.deepcopy(value)})
            if isinstance(value, str) and value == DELETE:
                del one[where[1]]
    elif value == "drop":
        entries.remove(one)
    elif value.startswith("again"):
        entries.append(copy.deepcopy(one))
        if value != "again" and isinstance(one, dict):
            entries[-1]["id"] = 77
    elif value == "backwards":
        entries.reverse()
    else:
        entries.append(7 if value == "a number" else None)


def is_refused(function):
    """Whether it raises a UsageError of one line; any other error is a fault."""
    try:
        function()
    except UsageError as error:
        assert "\n" not in str(error)
        return True
    return False


@pytest.fixture(scope="module")
def cfg():
    return load_config()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mutations")


@pytest.mark.slow
def test_the_checker_and_the_law_never_disagree(cfg, folder, clean_catalog):
    seen = {"accepted": 0, "refused": 0}

    @settings(
        max_examples=200,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations=mutations)
    def check(mutations):
        coco = valid()
        for mutation in mutations:
            mutate(coco, mutation)
        file = write(folder, coco)
        coco = json.loads(file.read_text())
        try:
            findings = {one.rule: one for one in validate(str(file), read_coco(str(file)))}
            errors = {rule for rule, one in findings.items() if one.level == "error"}
        except UsageError:
            findings, errors = {}, {"unreadable"}
        seen["refused" if errors else "accepted"] += 1
        boxes, masks = errors - MASK_RULES, errors | ({"no-masks"} & set(findings))
        for task, wrong in (("bbox", boxes), ("segm", masks)):
            for run in both(cfg, folder, task, 100):
                assert is_refused(run.check) == bool(wrong), (type(run), task, wrong)
                if wrong:
                    assert is_refused(run.evaluator)
                else:
                    assert_law(run, coco, findings)

    check()
    assert min(seen.values()) > 40, seen


def assert_law(run, coco, findings):
    truth = truth_of(coco, run.task)
    if truth:  # else no mask covers a pixel
        assert is_perfect(run.scores(coco, truth), run.top), (type(run), run.task, findings)
    objects = [
        one for one in coco["annotations"] if not one.get("iscrowd") and not one.get("ignore")
    ]
    named = {"box-without-area"} | ({"mask-empty"} if run.task == "segm" else set())
    # What is left out, the checker names.
    assert len(truth) == len(objects) or named & set(findings)
