"""A training step of the whole MobileNetV1: its time, and the memory it needs at its peak.

    python -m bench.network [--batch 16] [--size 224] [--threads 1] [--rounds 5] [--clock wall] [--compile]
                            [--keep-memory]

The same network and weights in five forms: in a chain of fused blocks (dsconv_cuda.models.mobilenet_v1 as it is), of
the same blocks one by one, of blocks that keep their input alone, and of stock modules in channels_last and in NCHW;
with --compile, those of torch.compile too. A step is forward, cross entropy and backward, without an optimiser.

Every form has a process of its own, as in a training loop: what memory costs depends on what was there before. In a
round each form is started once and its time is the mean of some steps after others that warm it up. By default the C
library returns large blocks to the system when they are freed, and each step gets its pages anew; with --keep-memory
it keeps them, which leaves the arithmetic.

The peak is how far the resident memory rises in one step above what was there before (weights, gradients, images),
after a step that warms it up. The C library gives every block above 64 KiB back as soon as it is freed there, so that
the peak is of memory in use. `kept` are the bytes that autograd keeps between forward and backward.
"""

import argparse
import ctypes
import functools
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

from .environment import keep_freed_memory
from .plain import LAYOUTS, PlainSeparableConvBN2d
from .saved import saved_bytes
from .timing import CLOCKS, summary, thread_count

FORMS = {
    "dsconv_cuda, chain": "channels_last",
    "dsconv_cuda, blocks": "channels_last",
    "dsconv_cuda, blocks that keep x only": "channels_last",
    "PyTorch, channels_last": "channels_last",
    "PyTorch, NCHW": "nchw",
}
COMPILED = ", compiled"
WARM_UP_STEPS, STEPS = 8, 4  # memory that a virtual machine has not had before is slow at first


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


def seconds_of(form, arguments):
    """Of one step, where this process has nothing else to do."""
    if arguments.keep_memory:
        keep_freed_memory()
    compiled = form.endswith(COMPILED)
    model, loss = make(form.removesuffix(COMPILED), arguments.batch, arguments.size)
    run = step(model, functools.partial(loss, torch.compile(model)) if compiled else loss)
    for _ in range(WARM_UP_STEPS):
        run()
    return CLOCKS[arguments.clock]().seconds(run, STEPS)


def in_a_process(what, form, arguments, **environment):
    command = [sys.executable, "-m", "bench.network", what, form, "--clock", arguments.clock]
    command += ["--batch", str(arguments.batch), "--size", str(arguments.size), "--threads", str(arguments.threads)]
    command += ["--keep-memory"] * arguments.keep_memory
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory_in_a_process(form, arguments):
    eager = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
    return in_a_process("--memory-of", form, arguments, **eager)


def times(arguments):
    forms = list(FORMS)
    if arguments.compile:
        forms += [f"{form}{COMPILED}" for form in FORMS if "only" not in form]
    seconds = {form: [] for form in forms}
    for _ in range(arguments.rounds):
        for form in forms:
            seconds[form].append(in_a_process("--seconds-of", form, arguments))
    return {form: summary(values, STEPS) for form, values in seconds.items()}


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
    parser.add_argument("--keep-memory", action="store_true")
    parser.add_argument("--memory-of", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds-of", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse_arguments(argv)
    with thread_count(arguments.threads):
        if arguments.memory_of:
            return print(json.dumps(memory_of(arguments.memory_of, arguments.batch, arguments.size)))
        if arguments.seconds_of:
            return print(json.dumps(seconds_of(arguments.seconds_of, arguments)))
    memory = {form: memory_in_a_process(form, arguments) for form in FORMS}
    samples = times(arguments)
    print(
        f"MobileNetV1, {arguments.batch} images of {arguments.size} x {arguments.size}, {arguments.threads} thread(s)\n"
    )
    print(table(samples, memory))


if __name__ == "__main__":
    main()
