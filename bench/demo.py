"""Trains one network three times on real digits, through BatchNorm: with fused blocks in a chain, with fused blocks one
by one, and with PyTorch's own modules.

    python -m bench.demo [--epochs 12] [--batch-size 64] [--activation relu6] [--layout channels_last] [--threads 2]
                         [--device cpu] [--output curves.png]

The networks start from the same weights and see the same batches in the same order; their epochs take turns, so that a
change in the machine's load meets all. Their tensors lie in channels_last, in which PyTorch's convolutions are faster
too. As a yardstick for rounding, PyTorch trains a fourth one for the first epoch in the other layout. At the end stand
a table and a picture of the loss curves.
"""

import argparse
import copy
import functools
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dsconv_cuda import DepthwiseSeparableConvBN2d, DepthwiseSeparableSequence, _loader

from .demo_report import draw, reading, table
from .digits import load_digits
from .mnist_net import MnistNet
from .plain import LAYOUTS, PlainSeparableConvBN2d
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

    def __init__(self, name, network, total_steps, layout):
        self.name = name
        self.network = network.to(memory_format=LAYOUTS[layout])
        self.layout = layout
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, functools.partial(share_of_peak_rate, total_steps=total_steps)
        )
        self.losses = []  # one a step
        self.accuracies = []  # one an epoch
        self.epoch_seconds = []
        self.saved_bytes = None

    def loss(self, images, labels):
        return F.cross_entropy(self.network(images.contiguous(memory_format=LAYOUTS[self.layout])), labels)

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
        self.network.eval()
        predicted = self.network(images).argmax(1)
        self.network.train()
        self.accuracies.append((predicted == labels).double().mean().item())

    def last_epoch_loss(self):
        return statistics.fmean(self.losses[-(len(self.losses) // len(self.epoch_seconds)) :])


def make_runs(device, total_steps, activation, layout, seed):
    """The chain, the blocks, the plain network, and that in the other layout, all from the same initial weights."""
    (other_layout,) = LAYOUTS.keys() - {layout}
    torch.manual_seed(seed)
    plain = MnistNet(PlainSeparableConvBN2d, activation).to(device)
    blocks = MnistNet(DepthwiseSeparableConvBN2d, activation).to(device)
    chain = MnistNet(DepthwiseSeparableConvBN2d, activation, DepthwiseSeparableSequence).to(device)
    for network in (blocks, chain):
        network.load_state_dict(plain.state_dict())
    return (
        Run("chain", chain, total_steps, layout),
        Run("blocks", blocks, total_steps, layout),
        Run("PyTorch", plain, total_steps, layout),
        Run(f"PyTorch {other_layout}", copy.deepcopy(plain), total_steps, other_layout),
    )


def train(runs, yardstick, digits, *, epochs, batch_size, device, seed, console):
    """Trains the runs for all epochs and the yardstick for the first."""
    test_images, test_labels = digits.test_images.to(device), digits.test_labels.to(device)
    first_images, first_labels = (t.to(device) for t in next(digits.batches(batch_size, seed)))
    for run in runs:
        run.saved_bytes = saved_bytes(run.network, functools.partial(run.loss, first_images, first_labels))
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=(len(runs) * epochs + 1) * (len(digits.train_labels) // batch_size))
        for epoch in range(epochs):
            batches = [(x.to(device), y.to(device)) for x, y in digits.batches(batch_size, seed + 1 + epoch)]
            first = epoch % len(runs)
            for run in (*runs[first:], *runs[:first], *(() if epoch else (yardstick,))):
                progress.update(task, description=run.name)
                run.train_epoch(batches, functools.partial(progress.advance, task))
                run.test(test_images, test_labels)
            summary = " | ".join(
                f"{run.name}: loss {run.last_epoch_loss():.4f}, test {run.accuracies[-1]:.1%}, "
                f"{run.epoch_seconds[-1]:.2f} s"
                for run in runs
            )
            progress.console.print(f"epoch {epoch + 1:2}/{epochs} | {summary}", highlight=False, soft_wrap=True)


def run_demo(*, epochs, batch_size, activation, layout, output, device, seed=0, per_class=None, console=None):
    console = console or Console()
    digits = load_digits(seed, per_class)
    steps_per_epoch = len(digits.train_labels) // batch_size
    runs = make_runs(device, epochs * steps_per_epoch, activation, layout, seed)
    parameters = sum(p.numel() for p in runs[0].network.parameters())
    console.print(
        f"{len(digits.train_labels)} training and {len(digits.test_labels)} test digits, {parameters} parameters, "
        f"batches of {batch_size}, {epochs} epochs of each network, {layout}, on {describe(device)}",
        highlight=False,
        soft_wrap=True,
    )
    started = time.perf_counter()
    *trained, yardstick = runs
    train(trained, yardstick, digits, epochs=epochs, batch_size=batch_size, device=device, seed=seed, console=console)
    draw(trained, output)
    # print, not console.print: a table must not be wrapped to the width of a terminal
    print(f"\n{table(trained, yardstick)}\n\n{reading(trained, yardstick)}\n")
    print(f"Trained in {time.perf_counter() - started:.0f} s. Loss curves: {output}")
    return runs


def describe(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU with {torch.get_num_threads()} thread(s)"


def pick_device():
    """A GPU where there is one and the library has kernels for it, else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    _loader.load_library()
    if _loader.batch_norm_kernels_loaded("cuda"):
        return "cuda"
    print("There is a GPU, but this build of dsconv_cuda has no CUDA kernels for the block: training on the CPU.")
    return "cpu"


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo",
        description="Trains a small MobileNet on 5,000 real digits: in a chain of fused blocks, one by one, and plain.",
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--activation", default="relu6", help="inside and after each block (default relu6)")
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_last")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--output", type=Path, default=DEFAULT_PICTURE, help="a PNG of the loss curves")
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or pick_device())
    run_demo(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        activation=arguments.activation,
        layout=arguments.layout,
        output=arguments.output,
        device=device,
    )


if __name__ == "__main__":
    main()
