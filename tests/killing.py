"""Real trainings in processes that are killed by real signals, at random moments.

The processes are forks of one that has imported the framework, so that they start at once. Each
writes what it did into its folder: `losses.txt`, a line for each iteration, and `log.txt`.
"""

import functools
import gc
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]

# Kills by each signal and in each framework; ELSA_KILLS=10 takes minutes.
KILLS = int(os.environ.get("ELSA_KILLS", "2"))
STOPPED = {signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGKILL: -signal.SIGKILL}


def fork(target, *arguments):
    """Starts a process that has imported the target's module already."""
    server = server_of(target.__module__)
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
    with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
        process.start()
    return process


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


def statuses_of(processes, seconds):
    """The exit statuses of forks, each of which has so many seconds before it is killed."""
    try:
        for process in processes:
            process.join(seconds)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def two_ranks(names=("RANK", "WORLD_SIZE", "LOCAL_RANK"), **values):
    """Environments of the two processes of a distributed run."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **values}
    return [
        {**address, **dict(zip(names, (str(rank), "2", str(rank)), strict=True))} for rank in (0, 1)
    ]


class Trainings:
    """One training in a folder, killed and resumed again and again.

    Args:
        target: a function of (folder, resume), in a module that imports the framework.
        folder: where it trains.
        seed: of the random moments.
    """

    def __init__(self, target, folder, seed):
        self.target, self.folder = target, Path(folder)
        self.folder.mkdir()
        self.random = random.Random(seed)
        self.moments = []

    def start(self, resume):
        return fork(self.target, str(self.folder), resume)

    def kill(self, number, resume=True):
        """Starts the training and sends it a signal; returns its exit status.

        Half of the signals come at any time within a second of the first iteration, the others
        while a checkpoint is written.
        """
        before = len(self.losses())
        process = self.start(resume)
        try:
            self._wait(lambda: len(self.losses()) > before, process)
            moment = self.random.choice(["saving", self.random.uniform(0, 1)])
            self.moments.append(moment)
            if moment == "saving":
                self._wait(lambda: any(self.folder.rglob("*.part")), process, pause=0)
            else:
                time.sleep(moment)
            os.kill(process.pid, number)
            process.join(60)
            assert process.exitcode is not None, f"still there, {self}"
        finally:
            process.kill()
            process.join()
        return process.exitcode

    def run_until(self, iterations):
        """Trains for so many iterations at least; returns their losses by iteration."""
        process = self.start(False)
        try:
            self._wait(lambda: len(self.losses()) >= iterations, process)
        finally:
            process.kill()
            process.join()
        return dict(self.losses())

    def _wait(self, condition, process, seconds=120, pause=0.01):
        end = time.monotonic() + seconds
        while not condition():
            assert process.exitcode is None and time.monotonic() < end, f"{self}"
            time.sleep(pause)

    def losses(self):
        return read_losses(self.folder)

    def __str__(self):
        log = self.folder / "log.txt"
        tail = log.read_text()[-3000:] if log.exists() else ""
        return f"signals at {json.dumps(self.moments)}\n{tail}"


def check_kills(trainings, number, last_iteration, times=KILLS):
    """Kills a training several times; checks that each goes on from its last whole checkpoint.

    Args:
        last_iteration: a function that loads the last checkpoint and returns its iterations.

    Returns the losses by iteration, each of which may have been computed several times.
    """
    values, done, start = {}, 0, 0
    for time_ in range(times):
        status = trainings.kill(number, resume=time_ > 0)
        assert status == STOPPED[number], f"{status=}, {trainings}"
        new = trainings.losses()[start:]
        start += len(new)
        first, last = new[0][0], new[-1][0]
        # From the last checkpoint on, and one after the other.
        assert [iteration for iteration, _ in new] == list(range(done + 1, last + 1)), trainings
        for iteration, loss in new:
            values.setdefault(iteration, set()).add(loss)
        done = last_iteration()
        assert first - 1 <= done <= last, f"{done=} {first=} {last=} {trainings}"
        if number != signal.SIGKILL:
            assert done == last, trainings  # nothing is lost
    return values


def check_curve(values, reference):
    """The losses are those of a training that nothing has interrupted, in `reference`."""
    assert set(values) == set(range(1, max(values) + 1))
    for iteration, found in values.items():
        (loss,) = found  # the same each time
        assert loss == reference[iteration], f"iteration {iteration}: {loss}"


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
