"""The training of tests/test_killed_d2.py, in a process of its own."""

import importlib.util
import sys
from pathlib import Path

from d2_semantic_tiny import DIGITS, REPOSITORY, overrides
from detectron2.engine import SimpleTrainer
from killing import fill_disk, note_loss, run_in

import elsa_d2.preflight  # noqa: F401  what the tool imports late
import elsa_d2.trainer  # noqa: F401

KEYS = {
    "OUTPUT_DIR": "out",
    "MODEL__ELSA_SWIN__FREE_ARCH__EMBED_DIM": 16,
    "MODEL__ELSA_SWIN__FREE_ARCH__NUM_HEADS": [1, 1, 2, 2],
    "MODEL__SEM_SEG_HEAD__CONVS_DIM": 8,
    "MODEL__SEM_SEG_HEAD__AUX_CONVS_DIM": 8,
    # Nothing is random but the order of the images.
    "INPUT__SEM_SEG__SCALE": [32, 32],
    "INPUT__SEM_SEG__RATIO_RANGE": [1.0, 1.0],
    "INPUT__SEM_SEG__CROP_SIZE": [32, 32],
    "SOLVER__MAX_ITER": 100000,
    "SOLVER__CHECKPOINT_PERIOD": 4,
    "TEST__EVAL_PERIOD": 0,
}


def train(folder, resume):
    """Trains on the data in ``data`` beside ``folder``; exits as tools/train_net.py does."""
    run_in(folder)
    write = SimpleTrainer._write_metrics

    def write_metrics(self, losses, *args, **kwargs):
        note_loss(self.iter + 1, float(sum(losses.values())))
        write(self, losses, *args, **kwargs)

    SimpleTrainer._write_metrics = write_metrics
    keys = overrides(Path(folder).parent / "data", **KEYS)
    flags = ["--resume"] if resume else []
    sys.exit(tool().main(["--config-file", DIGITS, *flags, *keys]))


def train_on_full_disk(folder, size):
    """No file can have more than so many bytes."""
    fill_disk(size)
    train(folder, True)


def tool():
    spec = importlib.util.spec_from_file_location("train_net", REPOSITORY / "tools/train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
