"""Interleaved timing: in every round each call is measured once, so that a change of the machine's load meets them all.

Everything is hot: a call's tensors were touched by the same call just before. Where the work is asynchronous, another
clock is passed, one whose seconds() ends with the device's work.
"""

import math
import statistics
import time
from dataclasses import dataclass

import torch

WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Sample:
    """Seconds of one call, over the rounds."""

    median: float
    p10: float
    p90: float
    rounds: int
    repeats: int  # calls in a row whose mean is one measurement

    @property
    def spread(self):
        return self.p90 / self.p10


class WallClock:
    """For work that has ended when the call returns."""

    now = staticmethod(time.perf_counter)

    def __init__(self, pause=0.0):
        self.pause = pause  # seconds in which the threads that ran the call before stop waiting for more by spinning

    def seconds(self, call, repeats):
        """Mean over `repeats` calls in a row, after one that warms the caches again."""
        time.sleep(self.pause)
        call()
        begin = self.now()
        for _ in range(repeats):
            call()
        return (self.now() - begin) / repeats


class CpuClock(WallClock):
    """The time that this process ran, of all its threads: for one thread on a machine that others use too."""

    now = staticmethod(time.process_time)


CLOCKS = {"wall": WallClock, "cpu": CpuClock}


def measure(calls, *, rounds, least_seconds, clock):
    """{name: call} -> {name: Sample}; one measurement repeats its call for at least `least_seconds`."""
    repeats = {}
    for name, call in calls.items():
        once = min(clock.seconds(call, 1) for _ in range(WARM_UP_CALLS))
        repeats[name] = max(1, math.ceil(least_seconds / once))
    seconds = {name: [] for name in calls}
    names = list(calls)
    for round_number in range(rounds):
        shift = round_number % len(names)  # nobody always follows the same neighbour's cache contents from the start
        for name in names[shift:] + names[:shift]:
            seconds[name].append(clock.seconds(calls[name], repeats[name]))
    return {name: summary(values, repeats[name]) for name, values in seconds.items()}


def summary(values, repeats):
    """The Sample of some rounds' seconds."""
    if len(values) == 1:
        return Sample(values[0], values[0], values[0], 1, repeats)
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Sample(statistics.median(values), deciles[0], deciles[-1], len(values), repeats)


class thread_count:
    """Runs its body with this many of PyTorch's threads."""

    def __init__(self, threads):
        self.threads = threads

    def __enter__(self):
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def __exit__(self, *_):
        torch.set_num_threads(self.before)
