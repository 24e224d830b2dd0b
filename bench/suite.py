"""Runs a list of problems against every form that computes them."""

from dataclasses import dataclass, field

import torch

from .ceilings import Ceilings, measure_ceilings
from .competitors import COMPILED, EAGER, FUSED, PYTORCH, Arena, Form, WrongResult
from .environment import describe
from .peers import CannotDo
from .plain import LAYOUTS
from .problem import Problem
from .timing import CLOCKS, Sample, WallClock, measure, thread_count

METHODS = (FUSED, EAGER, COMPILED)
PAUSE = 0.01  # seconds; with several thread pools each call gets the cores to itself only after the others have stopped
SLOW, SLOW_SECONDS = 10, 0.1  # a peer is not timed whose call takes more than both: so many times PyTorch's, seconds
BEHIND = 1.03  # over_best() from which a layer is marked


@dataclass(frozen=True)
class Measurement:
    problem: Problem
    threads: int
    samples: dict[Form, Sample]
    refused: dict[str, str] = field(default_factory=dict)  # peer -> why it has no sample, or lacks one

    def best_pytorch(self):
        """(form, seconds) of PyTorch's fastest form; None where none was measured."""
        return self._fastest(lambda form: form.method in PYTORCH)

    def best_peer(self):
        """The same of the other libraries."""
        return self._fastest(lambda form: form.is_peer)

    def gains(self):
        """{form: time of the best PyTorch form over that of this fused form}"""
        best = self.best_pytorch()
        return {form: best[1] / seconds for form, seconds in self._ours().items()} if best else {}

    def over_best(self):
        """{form: time of this fused form over that of whatever else is fastest}"""
        best = self._fastest(lambda form: form.method != FUSED)
        return {form: seconds / best[1] for form, seconds in self._ours().items()} if best else {}

    def _fastest(self, wanted):
        medians = {form: sample.median for form, sample in self.samples.items() if wanted(form)}
        return min(medians.items(), key=lambda item: item[1], default=None)

    def _ours(self):
        return {form: sample.median for form, sample in self.samples.items() if form.method == FUSED}


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


@dataclass(frozen=True)
class Entrants:
    """Who takes part: our layouts, the methods of competitors.py, and the peers with those that are not installed."""

    methods: tuple[str, ...] = METHODS
    layouts: tuple[str, ...] = tuple(LAYOUTS)  # of the fused op; PyTorch's forms run in each
    peers: dict[str, object] = field(default_factory=dict)
    missing_peers: tuple[str, ...] = ()

    def forms(self):
        return [
            Form(method, layout) for method in self.methods for layout in (self.layouts if method == FUSED else LAYOUTS)
        ]


@dataclass(frozen=True)
class Timing:
    """How long everything is measured."""

    rounds: int
    least_seconds: float
    clock: str  # of CLOCKS


def run_suite(problems, entrants, timing, *, threads, allocator, starting, finished, isa=None):
    """Every problem in every form of the entrants and with every number of threads.

    isa: the fused op runs its kernels and the limit is that of this instruction set; None for the best.
    starting(text), finished(): called around each problem.
    """
    environment = describe(allocator, timing.clock, isa, entrants.peers, entrants.missing_peers)
    ceilings, steadiness, measurements = {}, {}, []
    for count in threads:
        before = measure_ceilings(count, isa=isa)
        for problem in problems:
            starting(f"{problem.layer.name}, {problem.mode}, {count} thread(s)")
            with thread_count(count):
                measurements.append(_measure(problem, count, entrants, timing))
            finished()
        after = measure_ceilings(count, isa=isa)
        ceilings[count] = before.best(after)
        peaks = sorted(measured.flops(torch.float32) for measured in (before, after))
        steadiness[count] = peaks[0] / peaks[1]
    return SuiteResult(environment, ceilings, steadiness, measurements)


def _measure(problem, threads, entrants, timing):
    torch.compiler.reset()  # what was compiled for another layer or thread count would only fill the caches
    arena = Arena(problem)
    calls = {form: arena.call(form) for form in entrants.forms()}
    arena.check(calls)
    reference = _seconds(arena.call(Form(EAGER, "channels_last")))
    refused = {}
    for name, peer in entrants.peers.items():
        try:
            calls.update(_checked_calls(arena, peer, name, threads, reference))
        except (CannotDo, WrongResult) as reason:
            refused[name] = str(reason)
        except Exception as error:  # a library's own failure: told, and the others go on
            refused[name] = f"{problem.layer.name}, {problem.mode}: {type(error).__name__}: {error}"
    clock = CLOCKS[timing.clock](PAUSE if threads > 1 and entrants.peers else 0.0)
    samples = measure(calls, rounds=timing.rounds, least_seconds=timing.least_seconds, clock=clock)
    return Measurement(problem, threads, samples, refused)


def _checked_calls(arena, peer, name, threads, reference):
    calls = {Form(name, layout): call for layout, call in peer.prepare(arena, threads).items()}
    arena.check({form: lambda call=call: call.results(call.run()) for form, call in calls.items()})
    seconds = min(_seconds(call.run) for call in calls.values())
    if seconds > max(SLOW_SECONDS, SLOW * reference):
        raise CannotDo(f"{arena.problem.layer.name}, {arena.problem.mode}: {seconds / reference:.0f} x PyTorch's time")
    return {form: call.run for form, call in calls.items()}


def _seconds(call):
    call()
    return WallClock().seconds(call, 1)
