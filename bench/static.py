"""Every CUDA kernel as nvcc compiles it, for every architecture: no GPU is needed, nvcc and cuobjdump are.

    python -m bench.static > bench/results/static.txt         # all kernels, all architectures: some minutes
    python -m bench.static --arch sm_90 --source cuda_forward_mma_f16.cu

A line for each kernel and architecture: registers and spills (which must be 0), static and dynamic shared memory, the
blocks that share a multiprocessor, how many the planner plans, how many __launch_bounds__ asks registers for, the
occupancy (warps over the most there can be), and counts of instructions in the machine code. Dynamic shared memory,
planned blocks and threads are those of the launchers, which the emulation of tests/cuda_host runs to ask them for all
layers; where shared memory differs from call to call, so do blocks and occupancy, and the least comes first. Blocks
follow from registers, shared memory and the architecture's limits; of every launch they must be as many as are planned.
The exit status is 1 where a kernel spills or breaks a rule below.
"""

import argparse
import sys
from dataclasses import dataclass

from tabulate import tabulate

import dsconv_cuda

from .sass import ARCHITECTURES, CompiledKernel, compile_kernels, sources
from .traffic import LaunchSizes, launches

REGISTERS = 65536  # of a multiprocessor of every architecture here
COLUMNS = ("HMMA", "LDSM", "LDGSTS", "LDG.128", "LDG", "STG.128", "STG", "LDS", "STS", "FFMA", "HFMA2", "DFMA", "BAR")
TENSOR_CORES = ("HMMA", "DMMA")


@dataclass(frozen=True)
class Row:
    kernel: CompiledKernel
    launch: LaunchSizes
    blocks: tuple[int, int]  # that share a multiprocessor, with the most dynamic shared memory and with the least
    bounded: int  # that __launch_bounds__ leaves: with no dynamic shared memory, or the least if none are planned
    planned: tuple[tuple[int, int, int], ...]  # (bytes of dynamic shared memory, blocks planned, blocks) of launches
    occupancy: tuple[float, float]


def blocks_per_multiprocessor(gpu, *, registers: int, threads: int, shared: int) -> int:
    """As many as the limits of the architecture let share one multiprocessor; `shared` in bytes, static and dynamic."""
    warps = -(-threads // 32)
    # A warp gets registers by 256, and each of the four parts of a multiprocessor holds whole warps.
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // 4 // warp_registers * 4 // warps
    by_threads = gpu.threads_per_multiprocessor // (32 * warps)
    # Shared memory is given out by 128 bytes (256 on sm_75).
    unit = 256 if gpu.capability < 80 else 128
    each = -(-(shared + gpu.shared_reserved) // unit) * unit
    by_shared = gpu.shared_per_multiprocessor // each if each else gpu.blocks_per_multiprocessor
    if shared > gpu.shared_per_block:
        return 0
    return min(by_registers, by_threads, by_shared, gpu.blocks_per_multiprocessor)


def rows_of(kernels: list[CompiledKernel], launched: dict[tuple[str, str], LaunchSizes]) -> list[Row]:
    gpus = dsconv_cuda.gpus()
    rows = []
    for kernel in kernels:
        gpu = gpus[kernel.architecture]
        launch = launched.get((kernel.architecture, kernel.symbol), LaunchSizes(kernel.most_threads))

        def reached(dynamic, gpu=gpu, kernel=kernel, launch=launch):
            return blocks_per_multiprocessor(
                gpu, registers=kernel.registers, threads=launch.threads, shared=kernel.static_shared + dynamic
            )

        blocks = reached(launch.most_shared), reached(launch.least_shared)
        planned = tuple((shared, count, reached(shared)) for shared, count in sorted(launch.launches) if count > 0)
        occupancy = tuple(count * launch.threads / gpu.threads_per_multiprocessor for count in blocks)
        bounded = reached(0) if planned else blocks[1]
        rows.append(Row(kernel, launch, blocks, bounded, planned, occupancy))
    return rows


def broken_rules(rows: list[Row], launched=None) -> list[str]:
    """What must not be, in words; nothing where all is well."""
    texts = []
    for row in rows:
        kernel, found = row.kernel, row.kernel.instructions
        where = f"{kernel.name} on {kernel.architecture}"
        if kernel.spills or kernel.stack or found["local"]:
            texts.append(
                f"{where}: {kernel.spills} bytes of spills, {kernel.stack} bytes of stack, {found['local']} accesses "
                f"of local memory"
            )
        # z of a box of the norms takes half of the 64 KiB that a multiprocessor of sm_75 has.
        if row.bounded < kernel.least_blocks and (row.planned or kernel.architecture != "sm_75"):
            texts.append(f"{where}: {row.bounded} blocks share a multiprocessor, {kernel.least_blocks} are asked for")
        for shared, planned, blocks in _not_reached(row):
            texts.append(f"{where}: {blocks} blocks of {shared} bytes share a multiprocessor, {planned} are planned")
        # sm_75 has no bf16 and no TF32 on its tensor cores, and the planner sends it neither, nor square tiles: these
        # kernels are empty there.
        unplanned = kernel.architecture == "sm_75" and ("Half" not in kernel.name or not row.launch.launches)
        if "mma" in kernel.name.lower() and not unplanned and not any(found[column] for column in TENSOR_CORES):
            texts.append(f"{where}: no tensor core instruction")
        if found["HMMA"] and kernel.architecture != "sm_75" and not (found["LDSM"] and found["LDGSTS"]):
            texts.append(f"{where}: HMMA without ldmatrix ({found['LDSM']}) or cp.async ({found['LDGSTS']})")
    if launched is not None:
        known = {symbol for _, symbol in launched}
        never = sorted({row.kernel.name for row in rows if row.kernel.symbol not in known})
        texts += [f"{name}: no layer and no call of tests/cuda_host/driver_calls.h comes to it" for name in never]
    return texts


def _not_reached(row: Row):
    return [launch for launch in row.planned if launch[2] < launch[1]]


def table(rows: list[Row]) -> str:
    titles = ["kernel", "threads", "registers", "spills", "static", "dynamic"]
    titles += ["blocks/SM", "planned", "asked", "occupancy"]
    lines = [
        [
            row.kernel.name,
            row.launch.threads,
            row.kernel.registers,
            row.kernel.spills,
            row.kernel.static_shared,
            _range(row.launch.least_shared, row.launch.most_shared),
            _range(*row.blocks),
            _range(*(pick((count for _, count, _ in row.planned), default="") for pick in (min, max))),
            row.kernel.least_blocks,
            _range(*(f"{share:.0%}" for share in row.occupancy)),
            *(row.kernel.instructions[column] for column in (*COLUMNS, "all")),
        ]
        for row in rows
    ]
    alignment = ["left", *["right"] * (len(titles) + len(COLUMNS))]
    return tabulate(lines, [*titles, *COLUMNS, "all"], tablefmt="github", colalign=alignment)


def _range(least, most):
    return str(least) if least == most else f"{least}-{most}"


def summary(rows: list[Row]) -> str:
    """A line for each architecture."""
    titles = ["", "kernels", "spilling", "most registers", "least occupancy"]
    titles += ["planned blocks reached", "with two blocks in every launch", "with HMMA"]
    lines = []
    for architecture in dict.fromkeys(row.kernel.architecture for row in rows):
        group = [row for row in rows if row.kernel.architecture == architecture]
        lines.append(
            [
                architecture,
                len(group),
                sum(row.kernel.spills > 0 for row in group),
                max(row.kernel.registers for row in group),
                f"{min(row.occupancy[1] for row in group):.0%}",
                f"{sum(not _not_reached(row) for row in group)} of {len(group)}",
                sum(row.blocks[0] >= 2 for row in group),
                sum(row.kernel.instructions["HMMA"] > 0 for row in group),
            ]
        )
    return tabulate(lines, titles, tablefmt="github")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.static", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--source", nargs="+", choices=sources(), default=sources(), help="files of csrc/cuda")
    parser.add_argument("--threads", type=int, default=1, help="architectures that nvcc compiles at a time")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    kernels = []
    for source in arguments.source:
        print(f"compiling {source}", file=sys.stderr)
        kernels += compile_kernels(source, tuple(arguments.arch), threads=arguments.threads)
    launched = launches([dsconv_cuda.gpus()[architecture] for architecture in arguments.arch])
    rows = rows_of(kernels, launched)
    print(f"The CUDA kernels as compiled, without a GPU\n\n{summary(rows)}")
    broken = broken_rules(rows, launched)
    print("\n".join(["", *(f"broken: {text}" for text in broken)]) if broken else "\nNo rule is broken.")
    for architecture in arguments.arch:
        group = [row for row in rows if row.kernel.architecture == architecture]
        print(f"\n{dsconv_cuda.gpus()[architecture].architecture}\n\n{table(group)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
