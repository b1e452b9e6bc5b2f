"""Class names stand for each other whatever the ids and the order of the categories are."""

import pytest

from elsa_core.data.classes import difference, labels_by_name, ordered_names
from elsa_core.runtime.errors import UsageError

NAMES = ["cat", "dog", "owl"]


def categories(**ids):
    return [{"id": number, "name": name} for name, number in ids.items()]


@pytest.mark.parametrize(
    "given",
    [
        categories(cat=1, dog=2, owl=3),
        categories(owl=3, dog=2, cat=1),
        categories(cat=3, dog=2, owl=1),
        categories(dog=0, cat=70, owl=9),
        categories(owl="10", cat="9", dog="1"),
    ],
)
def test_categories_become_labels_by_name(given):
    labels = labels_by_name(NAMES, given)
    assert {one["name"]: NAMES[labels[one["id"]]] for one in given} == {n: n for n in NAMES}
    assert list(labels.values()) == [0, 1, 2]
    assert ordered_names(given) == [c["name"] for c in sorted(given, key=lambda c: c["id"])]


@pytest.mark.parametrize(
    "given, message",
    [
        (categories(cat=1, dog=2), "no category is called 'owl': the categories are cat, dog"),
        (categories(cat=1), "'dog', 2 of the 3 classes are missing"),
        (
            categories(cat=1, dog=2, owl=3, pet=0),
            "category 'pet' is not among the classes cat, dog",
        ),
        ([{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}], "categories 1 and 2 .* name 'cat'"),
        ([{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}], "each there once, got 1"),
        ([{"name": "cat"}], "numbers or text, each there once, got None"),
        ([{"id": True, "name": "cat"}], "got True"),
        ([{"id": 1}], "category 1 must have a name, got None"),
        (categories(cat=1, dog="2"), "all numbers or all text"),
    ],
)
def test_what_has_no_name_of_its_own_is_refused(given, message):
    with pytest.raises(UsageError, match=message):
        labels_by_name(NAMES, given)


def test_other_categories_may_be_left_out_and_classes_must_differ():
    labels = labels_by_name(["owl", "cat"], categories(cat=1, dog=2, owl=3), others=True)
    assert labels == {3: 0, 1: 1}
    with pytest.raises(UsageError, match="the classes have 'cat' twice"):
        labels_by_name(["cat", "cat"], categories(cat=1))


WORDS = ["wall", "road, route", "tub", *map(str, range(20))]


@pytest.mark.parametrize(
    "others, strict, spelling",
    [
        (WORDS, None, None),
        (["wall", "road", "bathtub", *WORDS[3:]], (1, "road, route", "road"), None),
        (["road", "wall", *WORDS[2:]], (0, "wall", "road"), (0, "wall", "road")),
        (["x", "y", "z", *WORDS[3:]], (0, "wall", "x"), (0, "wall", "x")),
    ],
)
def test_names_of_label_maps_may_be_spelt_otherwise_but_not_moved(others, strict, spelling):
    assert difference(WORDS, others) == strict
    assert difference(WORDS, others, spelling=True) == spelling
