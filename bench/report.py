"""What a suite found, as text and as JSON. Performance is told as multiples of the limit and as ratios only."""

import json
import statistics
from dataclasses import asdict

import torch
from tabulate import tabulate

from .ceilings import cache_sizes
from .competitors import FUSED
from .suite import BEHIND

CLOCK_NAMES = {"wall": "wall", "cpu": "CPU time of the process"}
QUIET_SPREAD = 1.08  # a quiet machine stays below
SHORT = {"channels_last": "CL", "nchw": "NCHW", "blocked": "blocked"}
NONE = "-"  # where a form has no figure


def header(result):
    environment = result.environment
    lines = [
        f"{environment['date']}; {environment['cpu']}, {environment['logical_cpus']} logical CPUs, load average at "
        f"the start {environment['load_average_at_start']}",
        f"dsconv_cuda {environment['dsconv_cuda']} with {environment['kernels']}; torch {environment['torch']}; "
        f"allocator: {environment['allocator']}; clock: {CLOCK_NAMES[environment['clock']]}",
    ]
    if environment["peers"] or environment["missing_peers"]:
        versions = ", ".join(f"{package} {version}" for package, version in environment["peers"].items())
        lines.append(f"peers: {versions or 'none'}; not installed: {', '.join(environment['missing_peers']) or 'none'}")
    if environment["isa"]:
        lines.append(f"limit and fused op: {environment['isa']} code; the others run what they choose")
    bf16 = any(measurement.problem.dtype == torch.bfloat16 for measurement in result.measurements)
    for threads, ceilings in result.ceilings.items():
        peaks = ", ".join(f"{isa} {rates['float32'] / 1e9:.0f}" for isa, rates in ceilings.fma.items())
        if bf16:
            peaks += (
                f", of bf16 the limit is the dot product's {ceilings.dot_bf16 / 1e9:.0f}"
                if ceilings.dot_bf16
                else "; of bf16 the limit is that of fp32 multiply-adds, for lack of a dot product"
            )
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
    """For each mode and thread count one table of every form, and where there are rivals, one of the fastest."""
    groups = {}
    for measurement in result.measurements:
        groups.setdefault((measurement.problem.mode, measurement.threads), []).append(measurement)
    for (mode, threads), group in groups.items():
        dtype = str(group[0].problem.dtype).removeprefix("torch.")
        title = f"{mode}, {dtype}, {threads} thread(s): "
        yield f"{title}multiples of the limit\n\n{_table(result, group)}"
        if any(measurement.best_peer() for measurement in group):
            yield f"{title}ours and the fastest of the others\n\n{_rivals_table(result, group)}"


def _table(result, group):
    forms = list(dict.fromkeys(form for measurement in group for form in measurement.samples))
    multiples = [result.multiples(measurement) for measurement in group]
    gains = [measurement.gains() for measurement in group]
    titles, columns = [], []
    for values, prefix, keys in ((multiples, "", forms), (gains, "gain ", list(gains[0]))):
        for form in keys:
            titles.append(f"{prefix}{form.method} {SHORT[form.layout]}")
            columns.append(_with_mean([value.get(form) for value in values]))
    return _text(result, group, titles, columns)


def _rivals_table(result, group):
    """Ours in each layout, PyTorch's fastest form, the fastest peer, and our time over the fastest of all of them."""
    multiples = [result.multiples(measurement) for measurement in group]
    over = [measurement.over_best() for measurement in group]
    ours = [form for form in group[0].samples if form.method == FUSED]
    titles = [f"ours {SHORT[form.layout]}" for form in ours]
    columns = [_with_mean([value[form] for value in multiples]) for form in ours]
    for title, fastest in (
        ("PyTorch", [measurement.best_pytorch() for measurement in group]),
        ("peer", [measurement.best_peer() for measurement in group]),
    ):
        forms = [found and found[0] for found in fastest]
        titles += [f"best {title}", "is"]
        columns.append(_with_mean([form and value[form] for form, value in zip(forms, multiples, strict=True)]))
        columns.append([f"{form.method} {SHORT[form.layout]}" if form else NONE for form in forms] + [""])
    for form in ours:
        titles.append(f"over best, {SHORT[form.layout]}")
        ratios = [value.get(form) for value in over]
        marks = ["*" if ratio and ratio > BEHIND else " " for ratio in ratios] + [" "]
        columns.append([figure + mark for figure, mark in zip(_with_mean(ratios), marks, strict=True)])
    return _text(result, group, titles, columns)


def _with_mean(figures):
    """As text, with the geometric mean at the end; it is told only where every layer has a figure."""
    mean = statistics.geometric_mean(figures) if all(figures) else None
    return [f"{figure:.2f}" if figure else NONE for figure in (*figures, mean)]


def _text(result, group, titles, columns):
    left = [[measurement.problem.layer.name for measurement in group] + ["geometric mean"]]
    left.append([result.limit(measurement)[1] for measurement in group] + [""])
    alignment = ["left", "left"] + ["left" if title == "is" else "right" for title in titles]
    return tabulate(
        list(zip(*left, *columns, strict=True)),
        ["layer", "limit", *titles],
        tablefmt="github",
        disable_numparse=True,
        colalign=alignment,
    )


def summary(result):
    spreads = [sample.spread for m in result.measurements for sample in m.samples.values()]
    text = (
        "CL: channels_last. limit: what bounds the layer; no form can be below 1.00.\n"
        "gain: time of the best PyTorch form in whichever layout over that of the fused op in this one.\n"
        "Every form was checked against fp64 before it was timed. Spread of a figure over its rounds (90th over 10th\n"
        f"percentile): median {statistics.median(spreads):.2f}, widest {max(spreads):.2f}."
    )
    if any(measurement.best_peer() for measurement in result.measurements):
        text += (
            "\nover best: time of the fused op over that of the fastest form of all others; "
            f"* where that is above {BEHIND}."
        )
    for peer, reasons in _refusals(result).items():
        text += f"\n{peer}, {NONE}: {'; '.join(reasons)}"
    if statistics.median(spreads) > QUIET_SPREAD:
        text += "\nThe machine was busy with something else too: do not rely on these figures."
    return text


def _refusals(result):
    """{peer: its reasons, each once}"""
    reasons = {}
    for measurement in result.measurements:
        for peer, reason in measurement.refused.items():
            reasons.setdefault(peer, {})[reason] = None
    return reasons


def _fastest(found):
    return found and {"method": found[0].method, "layout": found[0].layout, "seconds": found[1]}


def to_json(result):
    measurements = []
    for measurement in result.measurements:
        problem = measurement.problem
        limit, bound = result.limit(measurement)
        multiples, gains, over = result.multiples(measurement), measurement.gains(), measurement.over_best()
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
                "best_pytorch": _fastest(measurement.best_pytorch()),
                "best_peer": _fastest(measurement.best_peer()),
                "refused": measurement.refused,
                "forms": [
                    {
                        "method": form.method,
                        "layout": form.layout,
                        "times_limit": multiples[form],
                        "gain": gains.get(form),
                        "over_best": over.get(form),
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
