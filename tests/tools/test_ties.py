"""Ties in the order of index, in PyTorch and in the frameworks' operators."""

import pytest
import torch

from elsa_tools.verify.ties import TiesByIndex


@pytest.mark.parametrize("descending", [False, True])
def test_sorts_are_stable(descending):
    x = torch.rand(4, 1000, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    wanted = x.sort(stable=True, descending=descending)
    with TiesByIndex():
        found = x.sort(descending=descending), x.T.sort(0, descending)
        order = x.argsort(descending=descending)
    for values, indices in (found[0], [part.T for part in found[1]]):
        assert torch.equal(values, wanted.values) and torch.equal(indices, wanted.indices)
    assert torch.equal(order, wanted.indices)


def test_sorts_in_operators_are_stable():
    """The first of many boxes with one score suppresses the others."""
    nms = pytest.importorskip("mmcv.ops").nms
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(500, 1)
    boxes[::2] += 100
    scores = torch.full((500,), 0.5)
    assert nms(boxes, scores, 0.5)[1].tolist() != [0, 1]  # else the mode is not needed
    with TiesByIndex():
        assert nms(boxes, scores, 0.5)[1].tolist() == [0, 1]
