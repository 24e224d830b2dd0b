"""Trains one network twice on real digits: with the fused op, and with PyTorch's own convolutions.

    python -m bench.demo [--epochs 15] [--batch-size 64] [--activation relu6] [--threads 2] [--output curves.png]

Both networks start from the same weights and see the same batches in the same order; their epochs alternate, so that a
change in the machine's load meets both. At the end stand a table and a picture of the loss curves.
"""

import argparse
import functools
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tabulate import tabulate

from dsconv_cuda import DepthwiseSeparableConv2d

from .digits import load_digits
from .mnist_net import MnistNet
from .plain import PlainSeparableConv2d
from .saved import saved_bytes

PEAK_LEARNING_RATE = 6e-3
WARM_UP_SHARE = 0.2
WEIGHT_DECAY = 1e-2
DEFAULT_PICTURE = Path(__file__).parent / "results" / "local" / "demo.png"


def share_of_peak_rate(step, total_steps):
    """Up in a straight line, down along a cosine."""
    done = (step + 1) / total_steps
    if done < WARM_UP_SHARE:
        return done / WARM_UP_SHARE
    return (1 + math.cos(math.pi * (done - WARM_UP_SHARE) / (1 - WARM_UP_SHARE))) / 2


class Run:
    """One network with its optimizer and what has been measured of it."""

    def __init__(self, name, network, total_steps):
        self.name = name
        self.network = network
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, functools.partial(share_of_peak_rate, total_steps=total_steps)
        )
        self.losses = []  # one a step
        self.accuracies = []  # one an epoch
        self.epoch_seconds = []
        self.saved_bytes = None

    def loss(self, images, labels):
        return F.cross_entropy(self.network(images), labels)

    def train_epoch(self, batches, after_step):
        started = time.perf_counter()
        for images, labels in batches:
            loss = self.loss(images, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.losses.append(loss.item())  # waits for the device, so that the clock sees the whole step
            after_step()
        self.epoch_seconds.append(time.perf_counter() - started)

    @torch.no_grad()
    def test(self, images, labels):
        predicted = self.network(images).argmax(1)
        self.accuracies.append((predicted == labels).double().mean().item())

    def last_epoch_loss(self):
        return statistics.fmean(self.losses[-(len(self.losses) // len(self.epoch_seconds)) :])


def make_runs(device, total_steps, activation, seed):
    """The fused network and the plain one, from the same initial weights."""
    torch.manual_seed(seed)
    plain = MnistNet(PlainSeparableConv2d, activation)
    fused = MnistNet(DepthwiseSeparableConv2d, activation)
    fused.load_state_dict(plain.state_dict())
    return (
        Run("dsconv_cuda", fused.to(device), total_steps),
        Run("PyTorch", plain.to(device), total_steps),
    )


def train(runs, digits, *, epochs, batch_size, device, seed, console):
    steps_per_epoch = len(digits.train_labels) // batch_size
    test_images, test_labels = digits.test_images.to(device), digits.test_labels.to(device)
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    first_images, first_labels = (t.to(device) for t in next(digits.batches(batch_size, seed)))
    for run in runs:
        run.saved_bytes = saved_bytes(run.network, functools.partial(run.loss, first_images, first_labels))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=epochs * steps_per_epoch * len(runs))
        for epoch in range(epochs):
            batches = [(x.to(device), y.to(device)) for x, y in digits.batches(batch_size, seed + 1 + epoch)]
            for run in runs if epoch % 2 == 0 else runs[::-1]:
                progress.update(task, description=run.name)
                run.train_epoch(batches, functools.partial(progress.advance, task))
                run.test(test_images, test_labels)
            summary = " | ".join(
                f"{run.name}: loss {run.last_epoch_loss():.4f}, test {run.accuracies[-1]:.1%}, "
                f"{run.epoch_seconds[-1]:.2f} s"
                for run in runs
            )
            progress.console.print(f"epoch {epoch + 1:2}/{epochs} | {summary}", highlight=False, soft_wrap=True)


def loss_difference(runs):
    """Largest difference between the two loss curves, over all steps and over those of the first epoch."""
    fused, plain = runs
    differences = [abs(a - b) for a, b in zip(fused.losses, plain.losses, strict=True)]
    first_epoch = differences[: len(differences) // len(fused.accuracies)]
    return max(differences), max(first_epoch)


def table(runs):
    fused, plain = runs
    over_all, in_first_epoch = loss_difference(runs)

    def row(title, value, text):
        a, b = value(fused), value(plain)
        return [title, text(a), text(b), f"{b / a:.2f}"]

    rows = [
        row("test accuracy", lambda r: r.accuracies[-1], "{:.1%}".format),
        row("loss of the last epoch", Run.last_epoch_loss, "{:.4f}".format),
        row("seconds an epoch (median)", lambda r: statistics.median(r.epoch_seconds), "{:.2f}".format),
        row("saved for backward a step", lambda r: r.saved_bytes / 1e6, "{:.2f} MB".format),
        ["largest difference of the loss curves", f"{over_all:.1e}", "", ""],
        ["the same, within the first epoch", f"{in_first_epoch:.1e}", "", ""],
    ]
    return tabulate(
        rows, headers=["", fused.name, plain.name, "plain / fused"], tablefmt="github", disable_numparse=True
    )


def reading(runs):
    """What the table says and what it does not, in sentences."""
    fused, plain = runs
    seconds = statistics.median(plain.epoch_seconds) / statistics.median(fused.epoch_seconds)
    apart = abs(fused.accuracies[-1] - plain.accuracies[-1])
    return (
        f"For backward the fused network keeps {fused.saved_bytes / plain.saved_bytes:.0%} of the bytes that the plain "
        "one keeps; the images and\nthe layers around the blocks count in both columns. Its epoch is "
        f"{max(seconds, 1 / seconds):.2f} times {'faster' if seconds >= 1 else 'slower'} than the plain one's here.\n"
        "Both compute the same function, rounded in another order, and training enlarges such differences from step\n"
        f"to step: the first losses are {abs(fused.losses[0] - plain.losses[0]):.1e} apart, the test accuracies at the "
        f"end {100 * apart:.1f} points."
    )


def draw(runs, path):
    fused, plain = runs
    figure = Figure(figsize=(11, 4.2), layout="constrained")  # without pyplot: needs no display
    losses, accuracy = figure.subplots(1, 2)
    styles = (
        (plain, {"color": "tab:orange", "linewidth": 3.5, "alpha": 0.55}),
        (fused, {"color": "tab:blue", "linewidth": 1}),
    )
    epochs = len(fused.accuracies)
    steps_per_epoch = len(fused.losses) // epochs
    for run, style in styles:
        losses.plot([(i + 1) / steps_per_epoch for i in range(len(run.losses))], run.losses, label=run.name, **style)
        accuracy.plot(range(1, epochs + 1), [100 * a for a in run.accuracies], label=run.name, marker="o", **style)
    losses.set(xlabel="epoch", ylabel="training loss of a batch", yscale="log", title="Loss curves")
    accuracy.set(xlabel="epoch", ylabel="correct test digits (%)", title="Test accuracy")
    for axes in (losses, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("The same network trained with dsconv_cuda and with PyTorch's own convolutions")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def run_demo(*, epochs, batch_size, activation, output, device, seed=0, per_class=None, console=None):
    console = console or Console()
    digits = load_digits(seed, per_class)
    steps_per_epoch = len(digits.train_labels) // batch_size
    runs = make_runs(device, epochs * steps_per_epoch, activation, seed)
    parameters = sum(p.numel() for p in runs[0].network.parameters())
    console.print(
        f"{len(digits.train_labels)} training and {len(digits.test_labels)} test digits, {parameters} parameters, "
        f"batches of {batch_size}, {epochs} epochs of either network, on {describe(device)}",
        highlight=False,
        soft_wrap=True,
    )
    started = time.perf_counter()
    train(runs, digits, epochs=epochs, batch_size=batch_size, device=device, seed=seed, console=console)
    draw(runs, output)
    # print, not console.print: a table must not be wrapped to the width of a terminal
    print(f"\n{table(runs)}\n\n{reading(runs)}\n")
    print(f"Both networks trained in {time.perf_counter() - started:.0f} s. Loss curves: {output}")
    return runs


def describe(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU with {torch.get_num_threads()} thread(s)"


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description="Trains a small MobileNet on 5,000 real digits, fused and plain."
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--activation", default="relu6", help="inside and after each block (default relu6)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--output", type=Path, default=DEFAULT_PICTURE, help="a PNG of the loss curves")
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    run_demo(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        activation=arguments.activation,
        output=arguments.output,
        device=device,
    )


if __name__ == "__main__":
    main()
