"""Writes the README's performance table from the JSON of a run, so that no figure there is typed by hand.

python -m bench.readme_table bench/results/quick.json
"""

import json
import re
import statistics
import sys
from pathlib import Path

from tabulate import tabulate

from .competitors import PYTORCH
from .report import QUIET_SPREAD

README = Path(__file__).resolve().parent.parent / "README.md"
MARKERS = re.compile(r"(<!-- performance: .*? -->\n).*?(\n<!-- end of performance -->)", re.DOTALL)


def table(path):
    """For each mode and thread count the layers, and for each form its multiple of the limit."""
    found = json.loads(Path(path).read_text())
    environment = found["environment"]
    rows = []
    for mode, threads in dict.fromkeys((m["mode"], m["threads"]) for m in found["measurements"]):
        group = [m for m in found["measurements"] if (m["mode"], m["threads"]) == (mode, threads)]
        figures = [_figures(measurement) for measurement in group]
        title = f"{mode}, {threads} thread" + ("s" if threads > 1 else "")
        for measurement, row in zip(group, figures, strict=True):
            rows.append([title, measurement["layer"]["name"], *row])
            title = ""
        rows.append(["", "geometric mean", *map(statistics.geometric_mean, zip(*figures, strict=True))])
    rows = [[*row[:2], *(f"{figure:.2f}" for figure in row[2:])] for row in rows]
    titles = ["", "layer", "ours, channels_last", "ours, NCHW", "best PyTorch", "gain channels_last", "gain NCHW"]
    text = tabulate(rows, titles, "github", disable_numparse=True, colalign=["left", "left"] + ["right"] * 5)
    spread = statistics.median(form["p90"] / form["p10"] for m in found["measurements"] for form in m["forms"])
    disturbed = ": the machine was busy with something else too, so compare the forms with one another, not with 1.00"
    disturbed = disturbed if spread > QUIET_SPREAD else ""
    return (
        f"{environment['date']}: {environment['cpu']}, {environment['logical_cpus']} logical CPUs, "
        f"load average {environment['load_average_at_start']} at the start, {environment['kernels']}, torch "
        f"{environment['torch']}, float32; spread of a figure over its rounds (90th over 10th percentile) "
        f"{spread:.2f} in the median{disturbed}.\n\n{text}"
    )


def _figures(measurement):
    forms = {(form["method"], form["layout"]): form for form in measurement["forms"]}
    ours = [forms["fused", layout] for layout in ("channels_last", "nchw")]
    best_pytorch = min(form["times_limit"] for (method, _), form in forms.items() if method in PYTORCH)
    return [*(form["times_limit"] for form in ours), best_pytorch, *(form["gain"] for form in ours)]


def replace(readme, text):
    if not MARKERS.search(readme):
        raise ValueError("the README has no markers of the performance table")
    return MARKERS.sub(lambda found: found[1] + text + found[2], readme)


if __name__ == "__main__":
    README.write_text(replace(README.read_text(), table(sys.argv[1])))
