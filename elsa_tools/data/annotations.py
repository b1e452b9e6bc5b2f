"""Validates a file in COCO's format before a long training."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from elsa_core.data.coco import missing_files
from elsa_core.data.coco_rules import TOLERANCE, problems
from elsa_core.data.problems import ERROR, named

from .report import EXAMPLES, Finding


class Findings:
    """Counts problems by rule and keeps the first few examples of each."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.found: dict[str, Finding] = {}

    def add(self, level: str, rule: str, text: str, example: str) -> None:
        finding = self.found.setdefault(rule, Finding(level, rule, self.where, text, 0))
        finding.count += 1
        if len(finding.examples) < EXAMPLES:
            finding.examples.append(example)

    def list(self) -> list[Finding]:
        for finding in self.found.values():
            finding.text = finding.text.replace("{n}", f"{finding.count:,}")
        return list(self.found.values())


def validate(
    path: str,
    coco: dict[str, Any],
    *,
    categories: int | None = None,
    tolerance: float = TOLERANCE,
    progress: bool = False,
) -> list[Finding]:
    """Returns the problems of a file's content, without a look at the image files.

    Args:
        path: path of the file in the findings.
        coco: result of `coco.read_coco`.
        categories: required number of categories.
        tolerance: pixels by which a box may exceed its image.
    """
    findings = Findings(path)
    if categories is not None and len(coco["categories"]) != categories:
        text = f"has {len(coco['categories'])} categories instead of {categories}"
        names = ", ".join(str(named(entry.get("name"))) for entry in coco["categories"][:EXAMPLES])
        findings.add(ERROR, "number-of-categories", text, names)
    shown = tqdm(coco["annotations"], "annotations", disable=None if progress else True)
    for one in problems(coco, annotations=shown, tolerance=tolerance, deep=True):
        findings.add(one.level, one.rule, one.many, one.example)
    return findings.list()


def missing_images(path: str, coco: dict[str, Any], folder: str) -> list[Finding]:
    """Returns a finding if images have no file; lists each folder once."""
    names = [str(one["file_name"]) for one in coco["images"] if "file_name" in one]
    findings = Findings(path)
    for name in missing_files(folder, names):
        text = f"{{n}} of {len(names):,} images have no file in {folder}"
        findings.add(ERROR, "missing-image-file", text, named(name))
    return findings.list()
