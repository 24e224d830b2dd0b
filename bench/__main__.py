"""Compares the fused op with PyTorch's own forms of it, as ratios and as multiples of what the machine can do at best.

    python -m bench                                   # the quick layers, a few minutes
    python -m bench --layers all --threads 1 --json bench/results/local/all.json
    python -m bench --layers mbv1_b01,convnext_k7 --mode forward --layout nchw
    python -m bench --peers                           # other libraries too: pip install .[peers]
    python -m bench --sweep 40 --seed 1               # random layers, the worst ten
    python -m bench --threads 1 --clock cpu --methods fused eager --rounds 5 --least-ms 3   # short, on a busy machine
    python -m bench --isa avx2                        # these kernels against the limit of their instruction set
    python -m bench --device cuda                     # on a GPU (bench/gpu.py)

Columns are multiples of the limit of bench/problem.py (1.00 cannot be beaten); "gain" is the time of the best PyTorch
form, whatever its layout, over that of the fused op in the layout named. Layouts are marked CL (channels_last), NCHW,
and "blocked": a peer's own.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import gpu
from . import problem as problems
from .ceilings import ISAS
from .competitors import EAGER, FUSED
from .device import NoGpu
from .environment import keep_freed_memory, use_isa
from .gpu import PRECISIONS
from .layers import select
from .peers import NAMES, find_peers
from .plain import LAYOUTS
from .report import header, summary, tables, to_json
from .suite import METHODS, Entrants, Timing, run_suite
from .sweep import random_layers, sweep_tables
from .timing import CLOCKS

DEFAULT_ROUNDS = 11
SWEEP_ROUNDS = 5
SWEEP_METHODS = (FUSED, EAGER)
DEFAULT_LEAST_SECONDS = 0.01


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", type=int, metavar="N", help="N random layers instead of those of the list")
    parser.add_argument("--seed", type=int, default=0, help="of the sweep")
    parser.add_argument(
        "--layers", default="quick", help="quick (default), all, rows, volumes, or names separated by commas"
    )
    parser.add_argument("--mode", nargs="+", choices=problems.MODES, default=problems.MODES)
    parser.add_argument("--dtype", choices=problems.DTYPES, default="float32")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="of the fused op")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default all, of a sweep without compile")
    parser.add_argument(
        "--peers", nargs="*", choices=NAMES, help="other libraries too: all that are installed, or these"
    )
    parser.add_argument("--isa", choices=ISAS, help="of the fused op and of the limit; default the best there is")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="on a GPU")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, help=f"default {DEFAULT_ROUNDS}, of a sweep {SWEEP_ROUNDS}")
    parser.add_argument(
        "--least-ms",
        type=float,
        default=1e3 * DEFAULT_LEAST_SECONDS,
        help="of one measurement (default 10)",
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: this process's own time, for --threads 1 on a busy machine",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write every figure, with the environment, to this file")
    arguments = parser.parse_args(argv)
    on_gpu = arguments.device == "cuda"
    if on_gpu and (arguments.sweep is not None or arguments.peers is not None or arguments.isa):
        parser.error("--sweep, --peers and --isa are for the CPU")
    if arguments.isa:
        try:
            use_isa(arguments.isa)
        except RuntimeError as error:
            parser.error(str(error))
    if arguments.clock == "cpu" and arguments.threads != [1]:
        parser.error("--clock cpu adds up the threads' times: use it with --threads 1")
    sweep = arguments.sweep is not None
    arguments.rounds = arguments.rounds or (SWEEP_ROUNDS if sweep else DEFAULT_ROUNDS)
    arguments.methods = arguments.methods or (SWEEP_METHODS if sweep else METHODS)
    try:
        arguments.layers = random_layers(arguments.sweep, arguments.seed) if sweep else select(arguments.layers, on_gpu)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)
    if arguments.device == "cuda":
        try:
            return gpu.main(arguments)
        except NoGpu as missing:
            sys.exit(str(missing))
    allocator = keep_freed_memory()
    peers, missing = ({}, []) if arguments.peers is None else find_peers(arguments.peers or None)
    tasks = [
        problems.Problem(layer, mode, problems.DTYPES[arguments.dtype])
        for mode in arguments.mode
        for layer in arguments.layers
        if mode != problems.TRAINING_BN or len(layer.kernel) == 2  # there is no block with norms in 3-D
    ]
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("ceilings of this machine", total=len(tasks) * len(arguments.threads))
        result = run_suite(
            tasks,
            Entrants(tuple(arguments.methods), tuple(arguments.layout), peers, tuple(missing)),
            Timing(arguments.rounds, arguments.least_ms / 1e3, arguments.clock),
            threads=arguments.threads,
            isa=arguments.isa,
            allocator=allocator,
            starting=lambda text: progress.update(bar, description=text),
            finished=lambda: progress.advance(bar),
        )
    print(header(result))
    for table in (tables if arguments.sweep is None else sweep_tables)(result):
        print(f"\n{table}")
    print(f"\n{summary(result)}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(to_json(result))
        print(f"\nEvery figure: {arguments.json}")


if __name__ == "__main__":
    sys.exit(main())
