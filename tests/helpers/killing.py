"""Real trainings in processes that are killed by real signals, at moments named by what they do.

The processes are forks of one that has imported the framework, so that they start at once. Each
writes what it did into its folder: `losses.txt`, a line for each iteration, and `log.txt`. A signal
comes before a file is opened or renamed, so that no test depends on how long anything takes.
"""

import errno
import functools
import gc
import math
import multiprocessing
import os
import re
import resource
import signal
import socket
import sys
import time
from fnmatch import fnmatch
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]

PATIENCE = 600  # seconds after which a process is taken to hang
# What a process does to a file, its name, how often: a kill comes before the last.
ITERATION = ("open", "*losses.txt", 3)
CHECKPOINT = ("open", "*.pth.*.part", 1)
NAME = ("os.rename", "*.pth.*.part", 1)
NOTE = ("os.rename", "*last_checkpoint.*.part", 1)
STOPPED = {signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGKILL: -signal.SIGKILL}


def fork(target, *arguments, death=None):
    """Starts a process that has imported the target's module already.

    Args:
        death: the signal that the process sends itself, and the moment.
    """
    server = server_of(target.__module__)
    if death is not None:
        target, arguments = dying, (*death, target, *arguments)
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
    with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
        process.start()
    return process


def dying(number, moment, target, *arguments):
    """In the child: calls the target; a signal comes at the moment."""
    wanted, pattern, times = moment

    def look(event, values):
        nonlocal times
        if event == wanted and fnmatch(str(values[0]), pattern):
            times -= 1
            if times == 0:
                os.kill(os.getpid(), number)

    sys.addaudithook(look)
    target(*arguments)


@functools.cache
def server_of(module):
    """A process that has imported a module and forks; multiprocessing's own knows only one."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload([module])
    # Before Python 3.13, sys.path is not handed on for the preload.
    places = [str(Path(__file__).parent), str(REPOSITORY)]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *places]))
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        server.ensure_running()
    return server


def statuses_of(processes):
    """The exit statuses of forks; None for one that hangs, which is killed."""
    try:
        for process in processes:
            process.join(PATIENCE)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def wait_until(condition, processes):
    """Polls while all processes run."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end and all(p.exitcode is None for p in processes)
        time.sleep(0.02)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def two_ranks(nodes=1):
    """Environments of the two processes of a distributed run, on one machine or one on each."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    return [
        {**address, "RANK": str(rank), "LOCAL_RANK": str(rank if nodes == 1 else 0)}
        for rank in (0, 1)
    ]


class Trainings:
    """One training in a folder, killed and resumed again and again.

    Args:
        target: a function of (folder, resume), in a module that imports the framework.
        folder: where it trains.
    """

    def __init__(self, target, folder):
        self.target, self.folder = target, Path(folder)
        self.folder.mkdir()

    def kill(self, number, moment=ITERATION, resume=True):
        """Starts the training, which a signal ends at the moment; returns its exit status."""
        process = fork(self.target, str(self.folder), resume, death=(number, moment))
        (status,) = statuses_of([process])
        return status

    def run_for(self, iterations):
        """Trains for so many iterations; returns their losses by iteration."""
        self.kill(signal.SIGKILL, ("open", "*losses.txt", iterations + 1), resume=False)
        return dict(self.losses())

    def losses(self):
        return read_losses(self.folder)

    def __str__(self):
        log = self.folder / "log.txt"
        return log.read_text()[-3000:] if log.exists() else ""


class References:
    """Losses by iteration of trainings in a folder that nothing interrupts."""

    def __init__(self, folder):
        self.folder, self.known = folder, {}

    def __call__(self, target, iterations):
        """Those of at least so many iterations of a target."""
        losses = self.known.setdefault(target, {})
        if len(losses) < iterations:
            folder = self.folder / f"whole_{target.__name__}_{iterations}"
            losses.update(Trainings(target, folder).run_for(iterations))
        return losses


def check_kills(trainings, number, last_iteration, references):
    """Kills a training at each moment; checks that it goes on from its last whole checkpoint, with
    the losses of a training that nothing has interrupted.

    Args:
        last_iteration: a function that loads the last checkpoint of a folder and returns its
            iterations.
        references: those of the losses.
    """
    values, done, start = {}, 0, 0
    # After SIGKILL only NOTE leaves a checkpoint, from which the last two go on.
    for moment in (CHECKPOINT, NOTE, NAME, ITERATION):
        status = trainings.kill(number, moment, resume=moment is not CHECKPOINT)
        assert status == STOPPED[number], f"{moment=} {status=} {trainings}"
        new = trainings.losses()[start:]
        start += len(new)
        first, last = new[0][0], new[-1][0]
        # From the last checkpoint on, and one after the other.
        assert [iteration for iteration, _ in new] == list(range(done + 1, last + 1)), trainings
        for iteration, loss in new:
            values.setdefault(iteration, set()).add(loss)
        done = last_iteration(trainings.folder / "out")
        assert first - 1 <= done <= last, f"{done=} {first=} {last=} {trainings}"
        if number != signal.SIGKILL:
            assert done == last, trainings  # nothing is lost
    assert first > 1, trainings
    assert set(values) == set(range(1, max(values) + 1))
    reference = references(trainings.target, max(values))
    for iteration, found in values.items():
        (loss,) = found  # the same each time
        assert loss == reference[iteration], f"iteration {iteration}: {loss}"


def check_alone(trainings, evaluate):
    """While a training runs, another one in its folder is refused, and an evaluation is not; when
    the first is killed, it goes on at once.

    Args:
        evaluate: a function of (folder, checkpoint).
    """
    folder, log = trainings.folder, trainings.folder / "log.txt"
    first = fork(trainings.target, str(folder), False)
    try:
        wait_until(lambda: list(folder.glob("out/*.pth")), [first])
        checkpoint = folder / "kept.pth"
        os.link(sorted(folder.glob("out/*.pth"))[-1], checkpoint)
        start = len(log.read_text())
        second = fork(trainings.target, str(folder), True)
        assert statuses_of([second]) == [2]
        owner = rf"\(process {first.pid} on \S+ since [\d: -]+\)"
        assert re.search(rf"out is in use by another training {owner}: wait", log.read_text())
        assert "Traceback" not in log.read_text()[start:]
        assert statuses_of([fork(evaluate, str(folder), str(checkpoint))]) == [0], trainings
        assert first.exitcode is None
    finally:
        assert statuses_of_killed(first) == [-signal.SIGKILL]
    assert trainings.kill(signal.SIGTERM) == STOPPED[signal.SIGTERM], trainings
    left = [path.name for path in folder.glob("out/.*")]
    assert not left, left


def check_full_disk(trainings, side):
    """A disk that fills up while a checkpoint is written ends the training with status 1 and one
    sentence, the previous checkpoint stays whole, and a resumed training continues from it.

    Args:
        side: `killing_d2` or `killing_mm`.
    """
    output, log = trainings.folder / "out", trainings.folder / "log.txt"
    assert trainings.kill(signal.SIGTERM, resume=False) == STOPPED[signal.SIGTERM]
    iteration, last = side.last_iteration(output), Path(side.last_checkpoint(output)).name
    before = len(log.read_text())
    size = (output / last).stat().st_size
    statuses = statuses_of([fork(side.train_on_full_disk, str(trainings.folder), size * 3 // 4)])
    text = log.read_text()[before:]
    assert statuses == [1] and "Traceback" not in text, text[-3000:]
    pattern = side.FULL_DISK.format(reason=os.strerror(errno.EFBIG), last=last)
    (found,) = re.findall(pattern, text, re.MULTILINE)
    assert int(found) - side.FIRST >= iteration  # of the checkpoint that was not written
    assert side.last_iteration(output) == iteration and not list(output.rglob("*.part"))
    done = len(trainings.losses())
    assert trainings.kill(signal.SIGTERM) == STOPPED[signal.SIGTERM]
    assert trainings.losses()[done][0] == iteration + 1


def statuses_of_killed(process):
    process.kill()
    return statuses_of([process])


def nan_like(value):
    """Outputs of a model, all of them NaN."""
    import torch

    return torch.utils._pytree.tree_map(lambda tensor: tensor * math.nan, value)


def read_losses(folder):
    """(iteration, loss) in the order in which they were computed; iterations count from 1."""
    file = Path(folder) / "losses.txt"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [(int(i), float(loss)) for i, loss in (line.split() for line in lines)]


def run_in(folder, log="log.txt"):
    """In the child: its folder, its log and one thread."""
    import torch

    gc.freeze()  # else each collection, of which a run has many, goes through all modules
    os.chdir(folder)
    log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    sys.argv = ["training"]
    torch.set_num_threads(1)


def fill_disk(size):
    """In the child: no file can grow beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def note_loss(iteration, loss):
    with open("losses.txt", "a") as file:
        file.write(f"{iteration} {loss!r}\n")
