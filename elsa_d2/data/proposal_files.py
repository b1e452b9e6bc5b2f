"""Checks the files of precomputed proposals that MODEL.LOAD_PROPOSALS uses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from elsa_core.runtime.errors import UsageError
from elsa_core.weights import read_checkpoint

# What a file must have, under Detectron2's names and those of Detectron 1.
FIELDS = (("ids", "indexes"), ("boxes",), ("objectness_logits", "scores"))


def check_proposals(cfg: CfgNode, eval_only: bool = False) -> None:
    """Raises UsageError unless each data set of a run has a file with proposals for its images.

    Detectron2 reads these files with pickle: a local file that would execute code is refused. URLs
    are not checked.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    for part in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        names, key = cfg.DATASETS[part], f"DATASETS.PROPOSAL_FILES_{part}"
        files = cfg.DATASETS[f"PROPOSAL_FILES_{part}"]
        if len(files) != len(names):
            raise UsageError(
                f"MODEL.LOAD_PROPOSALS needs a file for each data set: {key} must have as many as "
                f"DATASETS.{part}, which has {len(names)}, got {len(files)}"
            )
        for name, file in zip(names, files, strict=True):
            if "://" not in file:
                _check_file(f"{key} {file}", file, name)


def _check_file(what: str, file: str, name: str) -> None:
    if not os.path.isfile(file):
        raise UsageError(f"{what} does not exist (working directory: {os.getcwd()})")
    content: Any = read_checkpoint(file)
    content = content if isinstance(content, Mapping) else {}
    found = [next((key for key in keys if key in content), None) for keys in FIELDS]
    if None in found:
        raise UsageError(f"{what} holds no proposals: it has no {FIELDS[found.index(None)][0]}")
    sizes = [len(content[key]) for key in found]
    if len(set(sizes)) > 1:
        raise UsageError(f"{what} must have boxes and scores for each of {sizes[0]} images")
    known = set(map(str, content[found[0]]))
    images = [str(record["image_id"]) for record in DatasetCatalog.get(name)]
    if missing := [image for image in images if image not in known]:
        raise UsageError(
            f"{what} has no proposals for {len(missing)} of the {len(images)} images of data set "
            f"{name!r}, the first is {missing[0]}"
        )
