"""What a suite found, as text and as JSON. Performance is told as multiples of the limit and as ratios only."""

import json
import statistics
from dataclasses import asdict

from tabulate import tabulate

from .ceilings import cache_sizes

CLOCK_NAMES = {"wall": "wall", "cpu": "CPU time of the process"}
QUIET_SPREAD = 1.08  # a quiet machine stays below
SHORT = {"channels_last": "CL", "nchw": "NCHW"}


def header(result):
    environment = result.environment
    lines = [
        f"{environment['date']}; {environment['cpu']}, {environment['logical_cpus']} logical CPUs, load average at "
        f"the start {environment['load_average_at_start']}",
        f"dsconv_cuda {environment['dsconv_cuda']} with {environment['kernels']}; torch {environment['torch']}; "
        f"allocator: {environment['allocator']}; clock: {CLOCK_NAMES[environment['clock']]}",
    ]
    for threads, ceilings in result.ceilings.items():
        peaks = ", ".join(f"{isa} {rates['float32'] / 1e9:.0f}" for isa, rates in ceilings.fma.items())
        bandwidth = ", ".join(f"{level} {rate / 1e9:.0f}" for level, rate in ceilings.bandwidth.items())
        lines.append(
            f"{threads} thread(s): GFLOP/s fp32 {peaks}; GB/s {bandwidth}; "
            f"peaks before and after within {1 - result.steadiness[threads]:.0%}"
        )
    sizes, told = cache_sizes()
    caches = ", ".join(f"{level} {size >> 10} KiB" for level, size in sizes.items())
    lines.append(f"caches: {caches}{'' if told else ' (assumed: the system does not tell)'}")
    return "\n".join(lines)


def tables(result):
    """One table for each mode and thread count."""
    groups = {}
    for measurement in result.measurements:
        groups.setdefault((measurement.problem.mode, measurement.threads), []).append(measurement)
    for (mode, threads), group in groups.items():
        dtype = str(group[0].problem.dtype).removeprefix("torch.")
        yield f"{mode}, {dtype}, {threads} thread(s): multiples of the limit\n\n{_table(result, group)}"


def _table(result, group):
    forms = list(group[0].samples)
    multiples = [result.multiples(measurement) for measurement in group]
    gains = [measurement.gains() for measurement in group]
    rows = [[m.problem.layer.name, result.limit(m)[1]] for m in group] + [["geometric mean", ""]]
    titles = ["layer", "limit"]
    for values, prefix, keys in ((multiples, "", forms), (gains, "gain ", list(gains[0]))):
        for form in keys:
            column = [value[form] for value in values]
            for row, figure in zip(rows, [*column, statistics.geometric_mean(column)], strict=True):
                row.append(f"{figure:.2f}")
            titles.append(f"{prefix}{form.method} {SHORT[form.layout]}")
    alignment = ["left", "left"] + ["right"] * (len(titles) - 2)
    return tabulate(rows, titles, tablefmt="github", disable_numparse=True, colalign=alignment)


def summary(result):
    spreads = [sample.spread for m in result.measurements for sample in m.samples.values()]
    text = (
        "CL: channels_last. limit: what bounds the layer; no form can be below 1.00.\n"
        "gain: time of the best PyTorch form in whichever layout over that of the fused op in this one.\n"
        "Every form was checked against fp64 before it was timed. Spread of a figure over its rounds (90th over 10th\n"
        f"percentile): median {statistics.median(spreads):.2f}, widest {max(spreads):.2f}."
    )
    if statistics.median(spreads) > QUIET_SPREAD:
        text += "\nThe machine was busy with something else too: do not rely on these figures."
    return text


def to_json(result):
    measurements = []
    for measurement in result.measurements:
        problem = measurement.problem
        limit, bound = result.limit(measurement)
        multiples, gains = result.multiples(measurement), measurement.gains()
        measurements.append(
            {
                "layer": asdict(problem.layer),
                "mode": problem.mode,
                "dtype": str(problem.dtype).removeprefix("torch."),
                "threads": measurement.threads,
                "flops": problem.flops,
                "least_bytes": problem.least_bytes,
                "limit_seconds": limit,
                "bound": bound,
                "forms": [
                    {
                        "method": form.method,
                        "layout": form.layout,
                        "times_limit": multiples[form],
                        "gain": gains.get(form),
                        **asdict(sample),
                    }
                    for form, sample in measurement.samples.items()
                ],
            }
        )
    return json.dumps(
        {
            "environment": result.environment,
            "ceilings": [asdict(ceilings) for ceilings in result.ceilings.values()],
            "steadiness": result.steadiness,
            "measurements": measurements,
        },
        indent=1,
    )
