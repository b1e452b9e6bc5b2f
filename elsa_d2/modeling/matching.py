"""Matchers that assign targets as MMDetection's MaxIoUAssigner does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.matcher import Matcher
from torch import Tensor


class MaxIoUMatcher(Matcher):
    """Matcher whose low-quality matches need a minimum IoU and change the target.

    The boxes that overlap most with an object are positive from ``min_quality`` on, and take this
    object as their target, the last of several. Detectron2's Matcher has no minimum, and keeps the
    object that such a box overlaps most with.

    Args:
        thresholds, labels: as in Matcher.
        min_quality: IoU from which the best boxes of an object are positive.
    """

    def __init__(
        self, thresholds: Sequence[float], labels: Sequence[int], min_quality: float
    ) -> None:
        super().__init__(list(thresholds), list(labels), allow_low_quality_matches=False)
        self.min_quality = min_quality

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Returns targets [N] and int8 labels [N] from the IoU [M, N] of M objects and N boxes."""
        matches, labels = super().__call__(match_quality_matrix)
        if match_quality_matrix.numel():
            best = match_quality_matrix.max(dim=1, keepdim=True).values
            forced = (match_quality_matrix == best) & (best >= self.min_quality)
            target, box = forced.nonzero(as_tuple=True)
            matches.scatter_reduce_(0, box, target, "amax", include_self=False)
            labels[box] = 1
        return matches, labels


class ProposalMatcher(Matcher):
    """Applies a matcher to proposals to which the M objects were appended.

    An appended object is its own target, and does not compete with proposals for the best overlap.
    """

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher
        self.thresholds, self.labels = matcher.thresholds, matcher.labels

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Returns targets [N] and int8 labels [N] from the IoU [M, N]; the last M are objects."""
        objects, boxes = match_quality_matrix.shape
        matches, labels = self.matcher(match_quality_matrix[:, : boxes - objects])
        themselves = torch.arange(objects, device=matches.device)
        return torch.cat([matches, themselves]), torch.cat([labels, labels.new_ones(objects)])
