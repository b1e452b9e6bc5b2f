"""A Detectron2 training that takes seconds on a CPU: the digits config with a tiny model."""

import json
import math
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = str(REPOSITORY / "configs/detectron2/digits/mask_rcnn_elsa_swin_digits.yaml")
VOLO_CONFIG = CONFIG.replace("swin", "volo")
TOOL = str(REPOSITORY / "tools/train_net.py")
# Of VOLO_CONFIG.
TINY_VOLO = {
    "MODEL.ELSA_VOLO.CUSTOM_ARCH.DEPTHS": [2, 1, 1, 1],
    "MODEL.ELSA_VOLO.CUSTOM_ARCH.EMBED_DIMS": [12, 24],
    "MODEL.ELSA_VOLO.CUSTOM_ARCH.NUM_HEADS": [2, 3],
    "MODEL.ELSA_VOLO.CUSTOM_ARCH.STEM_DIM": 8,
    "MODEL.ELSA_VOLO.CUSTOM_ARCH.GROUP_WIDTH": 4,
    "MODEL.ELSA_VOLO.IMG_SIZE": 64,
}
TINY = {
    **TINY_VOLO,
    "MODEL.ELSA_SWIN.CUSTOM_ARCH.EMBED_DIM": 12,
    "MODEL.ELSA_SWIN.CUSTOM_ARCH.DEPTHS": [1, 1, 1, 2],
    "MODEL.ELSA_SWIN.CUSTOM_ARCH.NUM_HEADS": [1, 2, 3, 4],
    "MODEL.ELSA_SWIN.CUSTOM_ARCH.GROUP_WIDTH": 4,
    "MODEL.ELSA_SWIN.CUSTOM_ARCH.KERNEL_SIZE": 3,
    "MODEL.ELSA_SWIN.CUSTOM_ARCH.WINDOW_SIZE": 3,
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.FPN.NORM": "",
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    # So that a model that has hardly learnt detects something.
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "INPUT.MIN_SIZE_TRAIN": [96],
    "INPUT.MIN_SIZE_TEST": 96,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.MAX_ITER": 4,
}
# Of the published configs: the widths of all parts, and nothing else.
NARROW = {
    "MODEL.ELSA_SWIN.ARCH": "custom",
    **{key: value for key, value in TINY.items() if "CUSTOM_ARCH" in key},
    "MODEL.ELSA_SWIN.CUSTOM_ARCH.EMBED_DIM": 16,
    "MODEL.ELSA_SWIN.CUSTOM_ARCH.NUM_HEADS": [1, 2, 4, 8],
    "MODEL.ELSA_SWIN.CUSTOM_ARCH.GROUP_WIDTH": 8,
    "MODEL.ELSA_VOLO.ARCH": "custom",
    **TINY_VOLO,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 16,
    "MODEL.SEM_SEG_HEAD.AUX_CONVS_DIM": 16,
}


def overrides(data: Path, **changes) -> list[str]:
    """KEY VALUE pairs; ``changes`` have two underscores for each point of a key."""
    keys = {**TINY, "DATASETS.REGISTER_COCO": datasets(data)}
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    return [str(part) for pair in keys.items() for part in pair]


def datasets(data: Path) -> list[list[str]]:
    return [
        [name, f"{data}/annotations/instances_{part}.json", f"{data}/images/{part}"]
        for part, name in (("training", "digits_training"), ("validation", "digits_validation"))
    ]


def few_images(data: Path, folder: Path, number: int) -> list[list[str]]:
    """The digits' data sets, of the validation's the first images."""
    training, (name, file, images) = datasets(data)
    content = json.loads(Path(file).read_text())
    content["images"] = content["images"][:number]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    file = folder / "instances_validation.json"
    file.write_text(json.dumps(content))
    return [training, [name, str(file), images]]


def arguments_of(data: Path, *flags: str, **changes) -> list[str]:
    """Arguments of tools/train_net.py."""
    return ["--config-file", CONFIG, *flags, *overrides(data, **changes)]


def read_metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def run_in_process(tool, arguments: list[str]) -> dict | None:
    """Runs a tool without its checks; returns the metrics of an evaluation."""
    command = tool.command()
    return command.run(command.parse_arguments(arguments))


def train_and_resume(tool, monkeypatch, output: Path, *arguments: str) -> list[dict]:
    """Trains for an iteration, which writes checkpoints, and for another one after --resume.

    Returns the metrics of the first iteration, its evaluation, and the same of the second.
    """
    assert tool.main([*arguments, "SOLVER.MAX_ITER", "1"]) == 0
    saved = _note_checkpoints(monkeypatch)
    assert tool.main(["--resume", *arguments, "SOLVER.MAX_ITER", "2"]) == 0
    assert saved == [("model_final", 1, {2})]
    first, evaluation, second, evaluation_again = metrics = read_metrics(output)
    assert math.isfinite(first["total_loss"]) and math.isfinite(second["total_loss"])
    assert evaluation["iteration"] == second["iteration"] == 1
    assert evaluation_again["iteration"] == 2
    return metrics


def _note_checkpoints(monkeypatch) -> list[tuple[str, int, set[int]]]:
    """From now on, trainings write no checkpoints.

    Returns the list to which each one's name, iteration and numbers of the optimizer's steps go.
    """
    from elsa_d2 import AtomicCheckpointer

    saved = []

    def save(self, name, **extra):
        state = self.checkpointables["trainer"].state_dict()["_trainer"]["optimizer"]["state"]
        steps = {int(values["step"]) for values in state.values()}
        saved.append((name, extra["iteration"], steps))

    monkeypatch.setattr(AtomicCheckpointer, "save", save)
    return saved
