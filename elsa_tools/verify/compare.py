"""Compares the results of two frameworks for the same image."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# What counts as the same detections.
MAX_SCORE, MAX_PIXELS, MIN_IOU = 1e-3, 0.05, 0.99
# The same for a segmentation (share of pixels with the same class) and for features (relative).
MIN_AGREEMENT, MAX_FEATURE = 0.999, 1e-3


@dataclass
class Outcome:
    """``features``: maps [C, H, W] by name; ``proposals``: boxes [N, 4] in pixels of the resized
    image; ``boxes``: [M, 4] in pixels of the image, with ``scores`` [M], ``labels`` [M] and
    ``masks`` [M, H, W]; ``logits``: [K, H, W] of a segmentation."""

    features: dict[str, Tensor]
    proposals: Tensor | None = None
    boxes: Tensor | None = None
    scores: Tensor | None = None
    labels: Tensor | None = None
    masks: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class Differences:
    """``numbers`` by what they are about, and whether all are small enough to be ``same``."""

    numbers: dict[str, float] = field(default_factory=dict)
    same: bool = True
    lines: list[str] = field(default_factory=list)

    def say(self, what: str, value: float, good: bool, text: str) -> None:
        self.numbers[what] = value
        self.same = self.same and good
        self.lines.append(f"  {text}" + ("" if good else "  <- too much"))

    def __str__(self) -> str:
        verdict = "the same results" if self.same else "DIFFERENT results"
        return "\n".join([f"verified: Detectron2 and OpenMMLab give {verdict}", *self.lines])


def compare(ours: Outcome, theirs: Outcome) -> Differences:
    """Largest differences of everything that both outcomes have."""
    found = Differences()
    for name in sorted(ours.features.keys() & theirs.features.keys()):
        _compare_features(found, name, ours.features[name], theirs.features[name])
    if ours.proposals is not None and theirs.proposals is not None:
        _compare_proposals(found, ours.proposals, theirs.proposals)
    if ours.boxes is not None and theirs.boxes is not None:
        _compare_detections(found, ours, theirs)
    if ours.logits is not None and theirs.logits is not None:
        _compare_logits(found, ours.logits, theirs.logits)
    return found


def _compare_features(found: Differences, name: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        text = f"feature {name}: shapes {list(a.shape)} and {list(b.shape)}"
        found.say(f"feature {name}", float("inf"), False, text)
        return
    largest = (a - b).abs().max().item()
    size = b.abs().max().item()
    good = largest <= MAX_FEATURE * max(size, 1e-6)
    found.say(
        f"feature {name}",
        largest,
        good,
        f"feature {name}: at most {largest:.1e} apart, values up to {size:.1f}",
    )


def _compare_proposals(found: Differences, a: Tensor, b: Tensor) -> None:
    """Each proposal with the nearest one of the other side."""
    if not len(a) or not len(b):
        good = len(a) == len(b)
        found.say("proposals", 0.0, good, f"proposals: {len(a)} and {len(b)}")
        return
    nearest = (a[:, None] - b[None]).abs().amax(-1).amin(1)
    met = (nearest <= MAX_PIXELS).float().mean().item()
    worst = nearest[nearest <= MAX_PIXELS].max().item() if met else float("inf")
    found.say(
        "proposals",
        met,
        met >= MIN_IOU,
        f"proposals: {met:.1%} of {len(a)} met, boxes at most {worst:.1e} px apart",
    )


def match(ours: Outcome, theirs: Outcome) -> list[tuple[int, int]]:
    """One-to-one pairs of detections of the same class, nearest boxes first."""
    assert ours.boxes is not None and theirs.boxes is not None
    assert ours.labels is not None and theirs.labels is not None
    if not len(ours.boxes) or not len(theirs.boxes):
        return []
    distance = (ours.boxes[:, None] - theirs.boxes[None]).abs().amax(-1)
    distance[ours.labels[:, None] != theirs.labels[None]] = float("inf")
    pairs, free_ours, free_theirs = [], set(range(len(distance))), set(range(len(distance[0])))
    for index in distance.flatten().argsort(stable=True).tolist():
        i, j = divmod(index, distance.shape[1])
        if i in free_ours and j in free_theirs and distance[i, j] < 1:
            pairs.append((i, j))
            free_ours.remove(i)
            free_theirs.remove(j)
    return sorted(pairs)


def _compare_detections(found: Differences, ours: Outcome, theirs: Outcome) -> None:
    assert ours.boxes is not None and theirs.boxes is not None
    assert ours.scores is not None and theirs.scores is not None
    pairs = match(ours, theirs)
    alone = max(len(ours.boxes), len(theirs.boxes)) - len(pairs)
    found.say(
        "unmatched",
        alone,
        alone == 0,
        f"detections: {len(ours.boxes)} and {len(theirs.boxes)}, {len(pairs)} are the same object "
        "and class",
    )
    found.numbers["detections"] = len(pairs)
    if not pairs:
        found.lines.append("  nothing is detected here, another --image may say more")
        return
    left, right = (torch.tensor(indices) for indices in zip(*pairs, strict=True))
    boxes = (ours.boxes[left] - theirs.boxes[right]).abs().max().item()
    found.say("boxes", boxes, boxes <= MAX_PIXELS, f"boxes: at most {boxes:.1e} px apart")
    scores = (ours.scores[left] - theirs.scores[right]).abs().max().item()
    best = theirs.scores.max().item()
    found.say(
        "scores",
        scores,
        scores <= MAX_SCORE,
        f"scores: at most {scores:.1e} apart, values up to {best:.3f}",
    )
    if ours.masks is None or theirs.masks is None:
        return
    a, b = ours.masks[left].bool(), theirs.masks[right].bool()
    union = (a | b).flatten(1).sum(1)
    overlap = (a & b).flatten(1).sum(1)
    iou = torch.where(union > 0, overlap / union.clamp(min=1), 1.0).min().item()
    found.say("mask IoU", iou, iou >= MIN_IOU, f"masks: IoU at least {iou:.4f}")


def _compare_logits(found: Differences, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        text = f"segmentation: shapes {list(a.shape)} and {list(b.shape)}"
        found.say("classes", 0.0, False, text)
        return
    largest, size = (a - b).abs().max().item(), b.abs().max().item()
    text = f"class logits: at most {largest:.1e} apart, values up to {size:.1f}"
    found.say("logits", largest, largest <= MAX_FEATURE * max(size, 1e-6), text)
    agreement = (a.argmax(0) == b.argmax(0)).float().mean().item()
    good = agreement >= MIN_AGREEMENT
    found.say("classes", agreement, good, f"segmentation: {agreement:.3%} of pixels agree")
