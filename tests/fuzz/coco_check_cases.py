"""Damaged files in COCO's format through `prepare_data check`: each ends in a report."""

from coco_mutations import checked, written


def case(seed):
    written(seed)
    print(*checked())
