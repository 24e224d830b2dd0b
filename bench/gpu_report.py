"""What `python -m bench --device cuda` found, as a page."""

import statistics

from tabulate import tabulate

from .competitors import EAGER, FUSED, PYTORCH, Form
from .gpu import GRAPH

OURS = (Form(FUSED, "channels_last"), Form(FUSED, "nchw"))
SHORT = {"channels_last": "CL", "nchw": "NCHW"}
NONE = "-"


def page(result):
    parts = [_header(result)]
    for mode, precision in dict.fromkeys((m.problem.mode, m.precision) for m in result.measurements):
        group = [m for m in result.measurements if (m.problem.mode, m.precision) == (mode, precision)]
        parts.append(f"## {mode}, {precision}\n\n{_table(result, group)}")
    parts.append(_summary(result))
    return "\n\n".join(parts)


def _header(result):
    e = result.environment
    before, after = (f"{rate / 1e9:.0f}" for rate in result.copy_bandwidth)
    return (
        f"# {e['gpu']}\n\n"
        f"{e['date']}; {e['capability']}, {e['multiprocessors']} multiprocessors, L2 {e['l2_bytes'] >> 20} MiB, "
        f"driver {e['driver']}, CUDA {e['cuda']}, cuDNN {e['cudnn']}, torch {e['torch']}, dsconv_cuda "
        f"{e['dsconv_cuda']}; host {e['cpu']}.\n\n"
        f"A copy moves {before} GB/s, read and written, before the layers and {after} after them. Times are medians of "
        f"{e['clock']}."
    )


def _table(result, group):
    titles = ["layer", "ours CL us", "ours NCHW us", "best PyTorch us", "is", "gain CL", "gain NCHW", "GB/s", "of copy"]
    titles += ["graph us", "gain, graphs", "predicted us", "peak MB", "eager's", "spread"]
    rows, gains = [], {form: [] for form in OURS}
    for m in group:
        best = m.best(PYTORCH)
        ours = m.best((FUSED,))
        replayed = m.best((FUSED + GRAPH,))
        for form in OURS:
            gains[form].append(m.gain(form))
        rows.append(
            [
                m.problem.layer.name,
                *(_microseconds(m.samples.get(form)) for form in OURS),
                f"{best[1] * 1e6:.1f}" if best else NONE,
                f"{best[0].method} {SHORT[best[0].layout]}" if best else NONE,
                *(_ratio(m.gain(form)) for form in OURS),
                f"{m.bytes_per_second(ours[0]) / 1e9:.0f}" if ours else NONE,
                f"{m.bytes_per_second(ours[0]) / result.bandwidth:.0%}" if ours else NONE,
                f"{replayed[1] * 1e6:.1f}" if replayed else NONE,
                _ratio(m.gain(replayed[0]) if replayed else None),
                f"{m.predicted * 1e6:.1f}" if m.predicted else NONE,
                _least_megabytes(m, FUSED),
                _least_megabytes(m, EAGER),
                f"{max(sample.spread for sample in m.samples.values()):.2f}" if m.samples else NONE,
            ]
        )
    means = [_ratio(statistics.geometric_mean(gains[form]) if all(gains[form]) else None) for form in OURS]
    rows.append(["geometric mean", *[""] * 4, *means, *[""] * 8])
    alignment = ["left", *["right"] * 3, "left", *["right"] * 10]
    return tabulate(rows, titles, tablefmt="github", disable_numparse=True, colalign=alignment)


def _microseconds(sample):
    return f"{sample.median * 1e6:.1f}" if sample else NONE


def _ratio(value):
    return f"{value:.2f}" if value else NONE


def _least_megabytes(m, method):
    sizes = [size for form, size in m.peak_bytes.items() if form.method == method]
    return f"{min(sizes) / 1e6:.1f}" if sizes else NONE


def _summary(result):
    lines = [
        "CL: channels_last. gain: time of the best PyTorch form in whichever layout, eager with cuDNN's search or",
        "compiled, over that of the fused op in this one; of graphs, eager's replay over ours. GB/s: the least bytes",
        "over the time of our faster layout; of copy: over the bandwidth of a copy in the same run. predicted: by the",
        "planner, channels_last. peak: bytes that a call allocates. spread: 90th over 10th percentile, the widest.",
    ]
    for where, text in result.wrong.items():
        lines.append(f"\nWRONG: {where}: {text}")
    refused = {}
    for m in result.measurements:
        for form, reason in m.refused.items():
            refused.setdefault(f"{form}: {reason}", []).append(
                f"{m.problem.layer.name}, {m.problem.mode}, {m.precision}"
            )
    lines += [f"\nNot measured: {what} ({'; '.join(where)})" for what, where in refused.items()]
    return "\n".join(lines)
