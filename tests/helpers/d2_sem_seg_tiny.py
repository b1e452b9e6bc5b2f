"""The digits in ADE20K's layout for Detectron2, and what makes a training on them short."""

from pathlib import Path

from examples.digits.dataset import SEGMENTATION_CLASSES

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs/detectron2"
LEAF = str(CONFIGS / "ADE20K-SemanticSegmentation/upernet_elsa_{}_160k.yaml")
DIGITS = str(CONFIGS / "digits/upernet_elsa_swin_digits.yaml")
NAMES = ["digits_sem_seg_training", "digits_sem_seg_validation"]
TINY = {
    "MODEL.DEVICE": "cpu",
    "INPUT.SEM_SEG.SCALE": [64, 48],
    "INPUT.SEM_SEG.CROP_SIZE": [32, 32],
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
}


def entry(name, root, part, classes=SEGMENTATION_CLASSES):
    folders = [str(root / kind / part) for kind in ("images", "annotations")]
    return [name, *folders, list(classes), True]


def overrides(root, **changes):
    """KEY VALUE pairs; in ``changes`` two underscores stand for a point."""
    parts = zip(NAMES, ("training", "validation"), strict=True)
    keys = {**TINY, "DATASETS.REGISTER_SEM_SEG": [entry(n, root, part) for n, part in parts]}
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    return [str(part) for pair in keys.items() for part in pair]


def few_images(root, folder):
    """Copies 3 + 3 images and label maps, for a test to spoil."""
    for kind in ("images", "annotations"):
        for part in ("training", "validation"):
            (folder / kind / part).mkdir(parents=True)
            for file in sorted((root / kind / part).iterdir())[:3]:
                (folder / kind / part / file.name).write_bytes(file.read_bytes())
    return folder


def overwrite(folder, content):
    """A function that overwrites the second file in a folder of a data set."""

    def spoil(root):
        sorted((root / folder).iterdir())[1].write_bytes(content)

    return spoil
