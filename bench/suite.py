"""Runs a list of problems against every form that computes them."""

from dataclasses import dataclass

import torch

from .ceilings import Ceilings, measure_ceilings
from .competitors import COMPILED, EAGER, FUSED, Arena, Form
from .environment import describe
from .plain import LAYOUTS
from .problem import Problem
from .timing import CLOCKS, Sample, measure, thread_count

METHODS = (FUSED, EAGER, COMPILED)


@dataclass(frozen=True)
class Measurement:
    problem: Problem
    threads: int
    samples: dict[Form, Sample]

    def best_pytorch(self):
        """Seconds of the fastest form that is not ours; None where none was measured."""
        return min((sample.median for form, sample in self.samples.items() if form.method != FUSED), default=None)

    def gains(self):
        """{form: time of the best PyTorch form over that of this fused form}"""
        best = self.best_pytorch()
        if best is None:
            return {}
        return {form: best / sample.median for form, sample in self.samples.items() if form.method == FUSED}


@dataclass(frozen=True)
class SuiteResult:
    environment: dict
    ceilings: dict[int, Ceilings]  # by the number of threads
    steadiness: dict[int, float]  # the lower over the higher FMA peak, of those measured before and after the layers
    measurements: list[Measurement]

    def multiples(self, measurement):
        """{form: time over the machine's limit}"""
        limit, _ = self.limit(measurement)
        return {form: sample.median / limit for form, sample in measurement.samples.items()}

    def limit(self, measurement):
        return measurement.problem.limit(self.ceilings[measurement.threads])


def run_suite(problems, *, methods, layouts, threads, rounds, least_seconds, clock, allocator, starting, finished):
    """Every problem in every form and with every number of threads.

    layouts: of the fused op; PyTorch's forms run in each. starting(text), finished(): called around each problem.
    """
    forms = [Form(method, layout) for method in methods for layout in (layouts if method == FUSED else LAYOUTS)]
    environment = describe(allocator, clock)
    ceilings, steadiness, measurements = {}, {}, []
    for count in threads:
        before = measure_ceilings(count)
        for problem in problems:
            starting(f"{problem.layer.name}, {problem.mode}, {count} thread(s)")
            with thread_count(count):
                measurements.append(Measurement(problem, count, _measure(problem, forms, rounds, least_seconds, clock)))
            finished()
        after = measure_ceilings(count)
        ceilings[count] = before.best(after)
        peaks = sorted(measured.flops(torch.float32) for measured in (before, after))
        steadiness[count] = peaks[0] / peaks[1]
    return SuiteResult(environment, ceilings, steadiness, measurements)


def _measure(problem, forms, rounds, least_seconds, clock):
    torch.compiler.reset()  # what was compiled for another layer or thread count would only fill the caches
    arena = Arena(problem)
    calls = {form: arena.call(form) for form in forms}
    arena.check(calls)
    return measure(calls, rounds=rounds, least_seconds=least_seconds, clock=CLOCKS[clock]())
