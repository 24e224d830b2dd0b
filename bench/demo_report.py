"""The demo's table, what it says in sentences, and the picture of the curves."""

import statistics

from matplotlib.figure import Figure
from tabulate import tabulate


def largest_difference(run, other):
    """Of the two loss curves, as far as both reach."""
    return max(abs(a - b) for a, b in zip(run.losses, other.losses, strict=False))


def table(fused, plain, yardstick):
    seconds = [statistics.median(run.epoch_seconds) for run in (fused, plain)]
    megabytes = [run.saved_bytes / 1e6 for run in (fused, plain)]
    rows = [
        ["test accuracy", *(f"{run.accuracies[-1]:.1%}" for run in (fused, plain))],
        ["loss of the last epoch", *(f"{run.last_epoch_loss():.4f}" for run in (fused, plain))],
        ["seconds an epoch (median)", *(f"{s:.2f}" for s in seconds), f"{seconds[1] / seconds[0]:.2f}"],
        ["saved for backward a step", *(f"{m:.2f} MB" for m in megabytes), f"{megabytes[1] / megabytes[0]:.2f}"],
        ["largest difference of the loss curves", f"{largest_difference(fused, plain):.1e}"],
    ]
    first = len(yardstick.losses)
    in_first = max(abs(a - b) for a, b in zip(fused.losses[:first], plain.losses[:first], strict=True))
    rows.append(
        [f"the same, first {first} steps", f"{in_first:.1e}", f"{largest_difference(yardstick, plain):.1e} (*)"]
    )
    titles = ["", fused.name, plain.name, "PyTorch / dsconv_cuda"]
    return tabulate(rows, titles, tablefmt="github", disable_numparse=True)


def reading(fused, plain, yardstick):
    """What the table says and what it does not, in sentences."""
    kept = fused.saved_bytes / plain.saved_bytes
    times = statistics.median(fused.epoch_seconds) / statistics.median(plain.epoch_seconds)
    first_apart = abs(fused.losses[0] - plain.losses[0])
    points_apart = 100 * abs(fused.accuracies[-1] - plain.accuracies[-1])
    return (
        f"(*) PyTorch against itself, with its tensors in {yardstick.layout}: the same mathematics rounded in another\n"
        "order, and training enlarges the difference from step to step. The two columns differ in the same way: their\n"
        f"first losses are {first_apart:.1e} apart, their final test accuracies {points_apart:.1f} points.\n"
        f"For backward the fused network keeps {kept:.0%} of the bytes that the plain one keeps. The images and the\n"
        f"layers around the blocks count in both. Its epoch took {times:.2f} times as long as the plain one's, with\n"
        "whatever else this machine was doing; speed is what `make bench` measures."
    )


def running_means(values, window):
    return [statistics.fmean(values[i : i + window]) for i in range(len(values) - window + 1)]


def draw(fused, plain, path):
    figure = Figure(figsize=(11, 4.2), layout="constrained")  # without pyplot: needs no display
    losses, accuracy = figure.subplots(1, 2)
    styles = (
        (plain, {"color": "tab:orange", "linewidth": 3.5, "alpha": 0.55}),
        (fused, {"color": "tab:blue", "linewidth": 1}),
    )
    epochs = len(fused.accuracies)
    steps_per_epoch = len(fused.losses) // epochs
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
