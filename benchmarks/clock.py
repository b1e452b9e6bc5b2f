"""The clock of all benchmarks; needs torch alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

Run = Callable[[], object]


def captured(run: Run) -> Run:
    """Returns the replay of a call's kernels as a CUDA graph.

    The call runs three times before, so that libraries have their handles and work space.

    Raises:
        RuntimeError: the call waits for the device, or does what graphs cannot hold.
    """
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Clock:
    """Times one call.

    On the CPU with one thread it counts the process's own CPU time, so that other work on the
    machine counts as little as it can; with more threads the time that passes. On a GPU it counts
    the device's own time, with cold caches: a long fill before the call empties them, and leaves
    Python the time to queue the call's kernels, so that small ones are not timed by their launches.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.name = "time on the device"
            self.time = self._time_on_device
            self._now = self._now_on_device
            self._filled = torch.empty(2**28, dtype=torch.int8, device=device)
            return
        own = torch.get_num_threads() == 1
        self.name = "CPU time of the process" if own else "wall time"
        self._now = time.process_time if own else time.perf_counter

    def time(self, run: Run) -> float:
        """Seconds."""
        start = self._now()
        run()
        return self._now() - start

    def split(self, parts: Iterator[str]) -> Iterator[tuple[str, float]]:
        """Yields the name and seconds of each part, which the iterator names when it is done.

        On a GPU the wall time until the device has done the part.
        """
        start = self._now()
        for name in parts:
            end = self._now()
            yield name, end - start
            start = self._now()

    def _now_on_device(self) -> float:
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _time_on_device(self, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            for _ in range(4):
                self._filled.zero_()
            start.record()
            run()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
