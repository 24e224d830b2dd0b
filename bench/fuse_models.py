"""What dsconv_cuda.fuse() does for whole networks: chains taken and left, and speed against the original.

    python -m bench.fuse_models [NAME ...] [--batch 1] [--size 224] [--train] [--compile] [--nchw]

NAME is a network of torchvision or of timm, whichever is installed, or one of dsconv_cuda.models. Each is timed in
evaluation without gradients, and with --train also one step of training (forward, backward, no optimiser), with random
weights, one thread by default, interleaved with the original. `gain` is the time of the original over ours.
"""

import argparse
import copy

import torch
from tabulate import tabulate

import dsconv_cuda

from .timing import CLOCKS, measure, thread_count

NETWORKS = (
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mnasnet1_0",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "convnext_tiny",
    "mobilenetv1_100",
    "legacy_xception",
    "efficientnet_lite0",
    "mixnet_s",
)


def network(name):
    """(the network, where it is from); None for the network where neither library has it."""
    if name in ("mobilenet_v1", "xception"):
        return getattr(dsconv_cuda.models, name)(), "dsconv_cuda"
    try:
        from torchvision import models

        if name in models.list_models():
            return models.get_model(name), "torchvision"
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision for CUDA beside a torch without
        pass
    try:
        import timm

        if timm.is_model(name):
            return timm.create_model(name), "timm"
    except (ImportError, RuntimeError):
        pass
    return None, "not installed, or not for this torch"


def step(model, x):
    """Forward and backward; gradients are made anew each time."""

    def run():
        model.zero_grad(set_to_none=True)
        model(x).sum().backward()

    return run


def inference(model, x):
    def run():
        with torch.no_grad():
            model(x)

    return run


def seconds(make, model, x, *, compiled, rounds, clock):
    """{form: Sample} of the original, the fused one and the compiled original."""
    forms = {"original": model, "fused": dsconv_cuda.fuse(copy.deepcopy(model))}
    if compiled:
        forms["compiled"] = torch.compile(copy.deepcopy(model))
        forms["fused, compiled"] = torch.compile(dsconv_cuda.fuse(copy.deepcopy(model)))
    calls = {name: make(form, x) for name, form in forms.items()}
    return measure(calls, rounds=rounds, least_seconds=0.02, clock=clock)


def row(name, arguments):
    model, source = network(name)
    if model is None:
        return [name, source]
    if not arguments.nchw:
        model = model.to(memory_format=torch.channels_last)
    explanation = dsconv_cuda.explain_fusion(model)
    cells = [name, source, f"{len(explanation.taken)} of {len(explanation)}"]
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    x = x.contiguous(memory_format=torch.contiguous_format if arguments.nchw else torch.channels_last)
    for mode in ("inference", "training")[: 1 + arguments.train]:
        model.train(mode == "training")
        samples = seconds(
            step if mode == "training" else inference,
            model,
            x,
            compiled=arguments.compile,
            rounds=arguments.rounds,
            clock=CLOCKS[arguments.clock](),
        )
        original, fused = samples["original"].median, samples["fused"].median
        cells += [f"{original * 1e3:.1f}", f"{fused * 1e3:.1f}", f"{original / fused:.2f}"]
        if arguments.compile:
            best, ours = samples["compiled"].median, samples["fused, compiled"].median
            cells += [f"{best * 1e3:.1f}", f"{ours * 1e3:.1f}", f"{best / ours:.2f}"]
    reasons = {}
    for finding in explanation.left:
        reasons[finding.reason] = reasons.get(finding.reason, 0) + 1
    return [*cells, "; ".join(f"{count}: {reason}" for reason, count in reasons.items())]


def titles(arguments):
    result = ["network", "of", "chains taken"]
    for mode in ("inference", "training")[: 1 + arguments.train]:
        result += [f"{mode}: original ms", "fused ms", "gain"]
        if arguments.compile:
            result += ["compiled ms", "fused, compiled ms", "gain"]
    return [*result, "left"]


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NETWORKS, metavar="NAME")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--nchw", action="store_true")
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse_arguments(argv)
    torch.manual_seed(0)
    with thread_count(arguments.threads):
        rows = [row(name, arguments) for name in arguments.names]
    print(tabulate(rows, titles(arguments), tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
