"""Detectron2 runs in processes of their own: the tool, ranks, the training of test_killed.py."""

import importlib
import importlib.util
import os
import runpy
import signal
import sys
from pathlib import Path

import torch
from d2_sem_seg_tiny import DIGITS, REPOSITORY, overrides
from d2_tiny import TOOL
from detectron2.engine import SimpleTrainer
from killing import fill_disk, fork, note_loss, run_in, statuses_of

import elsa_d2.engine.preflight  # noqa: F401  what the tool imports late
import elsa_d2.engine.trainer  # noqa: F401
from elsa_d2 import AtomicCheckpointer

start_processes = torch.multiprocessing.start_processes

KEYS = {
    "OUTPUT_DIR": "out",
    "MODEL__ELSA_SWIN__CUSTOM_ARCH__EMBED_DIM": 16,
    "MODEL__ELSA_SWIN__CUSTOM_ARCH__NUM_HEADS": [1, 1, 2, 2],
    "MODEL__SEM_SEG_HEAD__CONVS_DIM": 8,
    "MODEL__SEM_SEG_HEAD__AUX_CONVS_DIM": 8,
    "INPUT__SEM_SEG__SCALE": [48, 48],
    "INPUT__SEM_SEG__RATIO_RANGE": [0.7, 1.5],
    "INPUT__SEM_SEG__CROP_SIZE": [32, 32],
    "MODEL__ELSA_SWIN__DROP_PATH_RATE": 0.2,
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


def evaluate(folder, checkpoint):
    run_in(folder)
    keys = overrides(Path(folder).parent / "data", **KEYS, MODEL__WEIGHTS=checkpoint)
    sys.exit(tool().main(["--config-file", DIGITS, "--eval-only", *keys]))


FIRST = 0  # number of a checkpoint after one iteration
FULL_DISK = (
    r"^train_net: the checkpoint out/model_(\d+)\.pth cannot be written: {reason}; "
    r"--resume continues from out/{last}$"
)


def last_checkpoint(output):
    return AtomicCheckpointer(torch.nn.Module(), str(output)).get_checkpoint_file()


def last_iteration(output):
    """Iterations of the last checkpoint, which must be whole."""
    if not (last := last_checkpoint(output)):
        return 0
    state = torch.load(last, weights_only=False)
    iteration, trainer = state["iteration"] + 1, state["trainer"]
    steps = {int(one["step"]) for one in trainer["_trainer"]["optimizer"]["state"].values()}
    assert steps == {iteration} == {trainer["hooks"]["LRScheduler"]["last_epoch"]}
    return iteration


def train_on_full_disk(folder, size):
    """No file can have more than so many bytes."""
    fill_disk(size)
    train(folder, True)


def run_tool(folder, arguments):
    """Does in a folder, without CUDA, what ``python tools/train_net.py`` does.

    The processes that it starts are forks, too; all of them are in a session of their own.
    """
    os.setsid()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    run_in(folder)
    sys.argv = [TOOL, *arguments]
    torch.multiprocessing.start_processes = start_forks
    runpy.run_path(TOOL, run_name="__main__")


def start_forks(function, args=(), nprocs=1, **options):
    arguments = (function, *args)
    return start_processes(with_own_signals, arguments, nprocs, start_method="fork", **options)


def with_own_signals(rank, function, *arguments):
    """A new interpreter does not have the handlers of the one that starts it."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    function(rank, *arguments)


def in_two_processes(folder, function, *arguments):
    """Calls a function in two processes that Detectron2 has connected, without CUDA."""
    processes = [fork(be_rank, rank, folder, function, arguments) for rank in (0, 1)]
    assert statuses_of(processes) == [0, 0], (folder / "log.txt").read_text()


def be_rank(rank, folder, function, arguments):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    run_in(folder)
    worker = importlib.import_module("detectron2.engine.launch")._distributed_worker
    worker(rank, function, 2, 2, 0, f"file://{folder}/ranks", arguments)


def save_forever(folder):
    checkpointer = AtomicCheckpointer(torch.nn.Linear(2000, 2000), folder)
    while True:
        checkpointer.save("model")


def tool():
    spec = importlib.util.spec_from_file_location("train_net", REPOSITORY / "tools/train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
