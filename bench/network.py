"""A training step of the whole MobileNetV1: its time, and the memory it needs at its peak.

    python -m bench.network [--batch 16] [--size 224] [--threads 1] [--rounds 5] [--clock wall] [--compile]

The same network and weights in five forms: in a chain of fused blocks (dsconv_cuda.models.mobilenet_v1 as it is), of
the same blocks one by one, of blocks that keep their input alone, and of stock modules in channels_last and in NCHW;
with --compile, those of torch.compile too. A step is forward, cross entropy and backward, without an optimiser.

Times are taken interleaved, in one process. The peak is that of a process of its own for each form: how far its
resident memory rises in one step above what was there before (weights, gradients, images), after a step that warms it
up. The C library gives every block above 64 KiB back as soon as it is freed there, so that the peak is of memory in
use. `kept` are the bytes that autograd keeps between forward and backward.
"""

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

import dsconv_cuda

from .plain import LAYOUTS, PlainSeparableConvBN2d
from .saved import saved_bytes
from .timing import CLOCKS, measure, thread_count

FORMS = {
    "dsconv_cuda, chain": "channels_last",
    "dsconv_cuda, blocks": "channels_last",
    "dsconv_cuda, blocks that keep x only": "channels_last",
    "PyTorch, channels_last": "channels_last",
    "PyTorch, NCHW": "nchw",
}


def make(form, batch, size):
    """(the model, a function that runs its forward and returns the loss)"""
    torch.manual_seed(0)
    model = dsconv_cuda.models.mobilenet_v1()
    if form.startswith("PyTorch"):
        model.blocks = nn.Sequential(*(_plain(block) for block in model.blocks))
    elif "blocks" in form:
        model.blocks = nn.Sequential(*model.blocks)
        for block in model.blocks:
            block.recompute_output = "only" in form
    memory_format = LAYOUTS[FORMS[form]]
    model = model.to(memory_format=memory_format)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=memory_format)
    labels = torch.randint(1000, (batch,))
    return model, lambda model=model: nn.functional.cross_entropy(model(images), labels)


def _plain(block):
    convolution = block.depthwise
    plain = PlainSeparableConvBN2d(
        convolution.in_channels, block.pointwise.out_channels, 3, convolution.stride, convolution.padding
    )
    plain.load_state_dict(block.state_dict())
    return plain


def step(model, loss):
    def run():
        model.zero_grad(set_to_none=False)
        loss().backward()

    return run


def memory_of(form, batch, size):
    """(peak, kept) in bytes, where this process has nothing else to do."""
    model, loss = make(form, batch, size)
    run = step(model, loss)
    run()
    kept = saved_bytes(model, loss)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before, kept


def _status(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def memory_in_a_process(form, arguments):
    command = [sys.executable, "-m", "bench.network", "--memory-of", form]
    command += ["--batch", str(arguments.batch), "--size", str(arguments.size), "--threads", str(arguments.threads)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def times(arguments):
    calls = {}
    for form in FORMS:
        model, loss = make(form, arguments.batch, arguments.size)
        calls[form] = step(model, loss)
        if arguments.compile and "only" not in form:
            compiled = torch.compile(model)
            calls[f"{form}, compiled"] = step(model, lambda loss=loss, compiled=compiled: loss(compiled))
    with thread_count(arguments.threads):
        return measure(calls, rounds=arguments.rounds, least_seconds=0, clock=CLOCKS[arguments.clock]())


def table(samples, memory):
    best = min(sample.median for form, sample in samples.items() if form.startswith("PyTorch"))
    peaks = [peak for form, (peak, _) in memory.items() if form.startswith("PyTorch")]
    kept = [kept for form, (_, kept) in memory.items() if form.startswith("PyTorch")]
    rows = []
    for form, sample in samples.items():
        cells = [form, f"{1e3 * sample.median:.0f}", f"{sample.spread:.2f}", f"{best / sample.median:.2f}"]
        if form in memory:
            cells += [f"{memory[form][0] / 2**20:.0f}", f"{memory[form][0] / min(peaks):.0%}"]
            cells += [f"{memory[form][1] / 2**20:.0f}", f"{memory[form][1] / min(kept):.0%}"]
        rows.append(cells)
    titles = ["form", "step ms", "p90 / p10", "x faster than the best of PyTorch", "peak MiB", "of PyTorch's"]
    return tabulate(rows, [*titles, "kept MiB", "of PyTorch's"], tablefmt="github", disable_numparse=True)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory-of", choices=FORMS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse_arguments(argv)
    if arguments.memory_of:
        with thread_count(arguments.threads):
            print(json.dumps(memory_of(arguments.memory_of, arguments.batch, arguments.size)))
        return
    memory = {form: memory_in_a_process(form, arguments) for form in FORMS}
    samples = times(arguments)
    print(
        f"MobileNetV1, {arguments.batch} images of {arguments.size} x {arguments.size}, {arguments.threads} thread(s)\n"
    )
    print(table(samples, memory))


if __name__ == "__main__":
    main()
