"""The demo's table, what it says in sentences, and the picture of the curves."""

import statistics

from matplotlib.figure import Figure
from tabulate import tabulate


def largest_difference(run, other):
    """Of the two loss curves, as far as both reach."""
    return max(abs(a - b) for a, b in zip(run.losses, other.losses, strict=False))


def seconds(run):
    return statistics.median(run.epoch_seconds)


def table(runs, yardstick):
    """A column a run, the last of which is PyTorch's."""
    plain = runs[-1]
    first = len(yardstick.losses)
    rows = [
        ["test accuracy", *(f"{run.accuracies[-1]:.1%}" for run in runs)],
        ["loss of the last epoch", *(f"{run.last_epoch_loss():.4f}" for run in runs)],
        ["seconds an epoch (median)", *(f"{seconds(run):.2f}" for run in runs)],
        ["  beside PyTorch's", *(f"{seconds(run) / seconds(plain):.2f}" for run in runs)],
        ["saved for backward a step", *(f"{run.saved_bytes / 1e6:.2f} MB" for run in runs)],
        ["  beside PyTorch's", *(f"{run.saved_bytes / plain.saved_bytes:.0%}" for run in runs)],
        ["largest difference from PyTorch's loss", *(f"{largest_difference(run, plain):.1e}" for run in runs[:-1])],
        [
            f"the same, first {first} steps",
            *(f"{max(abs(a - b) for a, b in zip(r.losses[:first], plain.losses[:first], strict=True)):.1e}"
              for r in runs[:-1]),
            f"{largest_difference(yardstick, plain):.1e} (*)",
        ],
    ]  # fmt: skip
    titles = ["", *(f"dsconv_cuda, {run.name}" for run in runs[:-1]), plain.name]
    return tabulate(rows, titles, tablefmt="github", disable_numparse=True)


def reading(runs, yardstick):
    """What the table says and what it does not, in sentences."""
    plain = runs[-1]
    first_apart = max(abs(run.losses[0] - plain.losses[0]) for run in runs)
    points_apart = 100 * max(abs(run.accuracies[-1] - plain.accuracies[-1]) for run in runs)
    kept = [run.saved_bytes / plain.saved_bytes for run in runs]
    times = [seconds(run) / seconds(plain) for run in runs]
    return (
        f"(*) PyTorch against itself, with its tensors in {yardstick.layout}: the same mathematics rounded in another\n"
        "order, and training enlarges the difference from step to step. The columns differ in the same way: their\n"
        f"first losses are up to {first_apart:.1e} apart, their final test accuracies {points_apart:.1f} points.\n"
        f"For backward the chain keeps {kept[0]:.0%} of the bytes that the plain network keeps, the blocks one by one\n"
        f"{kept[1]:.0%}. The images and the layers around the blocks count in all. An epoch took {times[0]:.2f} and\n"
        f"{times[1]:.2f} times as long as the plain one's, with whatever else this machine was doing; speed is what\n"
        "`make bench` measures."
    )


def running_means(values, window):
    return [statistics.fmean(values[i : i + window]) for i in range(len(values) - window + 1)]


def draw(runs, path):
    figure = Figure(figsize=(11, 4.2), layout="constrained")  # without pyplot: needs no display
    losses, accuracy = figure.subplots(1, 2)
    chain, blocks, plain = runs
    styles = (
        (plain, {"color": "tab:orange", "linewidth": 5, "alpha": 0.45}),
        (blocks, {"color": "tab:blue", "linewidth": 2}),
        (chain, {"color": "black", "linewidth": 0.8}),
    )
    epochs = len(plain.accuracies)
    steps_per_epoch = len(plain.losses) // epochs
    window = max(1, steps_per_epoch // 4)
    for run, style in styles:
        means = running_means(run.losses, window)
        losses.plot([(i + window) / steps_per_epoch for i in range(len(means))], means, label=run.name, **style)
        accuracy.plot(range(1, epochs + 1), [100 * a for a in run.accuracies], label=run.name, marker="o", **style)
    losses.set(xlabel="epoch", ylabel=f"training loss, mean of {window} batches", yscale="log", title="Loss curves")
    accuracy.set(xlabel="epoch", ylabel="correct test digits (%)", title="Test accuracy")
    for axes in (losses, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("The same network trained with dsconv_cuda and with PyTorch's own convolutions")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
