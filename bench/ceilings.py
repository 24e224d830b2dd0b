"""The ceilings that times are compared with: multiply-adds a second, and the read bandwidth of each memory level.

They are measured in the run that uses them, by the small kernels of ceilings.cpp.
"""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("ceilings.cpp")
FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-pthread", "-ffp-contract=fast")
CACHE_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")
ASSUMED_CACHES = {"L2": 1 << 20, "L3": 32 << 20}  # where the system does not tell
DRAM_BYTES = 256 << 20  # read for the DRAM bandwidth; more where the L3 is large
ISAS = ("generic", "avx2", "avx512")  # the names of the CPU kernels, in the order of ceilings.cpp
SECONDS = 0.25  # for each ceiling: of its measurements the best counts, since only disturbances differ


@dataclass(frozen=True)
class Ceilings:
    threads: int
    fma: dict[str, dict[str, float]]  # ISA -> {"float32": FLOP/s, "float64": FLOP/s} of all threads
    dot_bf16: float  # FLOP/s of the bf16 dot product, 0 where there is none
    bandwidth: dict[str, float]  # L2, L3, DRAM -> bytes/s of all threads
    capacity: dict[str, int]  # L2, L3 -> bytes that all threads have together

    def flops(self, dtype):
        """The peak of the best instruction set; 16-bit types count as their fp32 sums, or the bf16 dot product."""
        wide = "float64" if dtype == torch.float64 else "float32"
        peak = max(rates[wide] for rates in self.fma.values())
        return max(peak, self.dot_bf16) if dtype == torch.bfloat16 else peak

    def level(self, size):
        """The nearest memory level that holds `size` bytes."""
        for name, capacity in self.capacity.items():
            if size <= capacity:
                return name
        return "DRAM"

    def best(self, other):
        """The higher of two measurements, ceiling by ceiling."""

        def higher(a, b):
            return {key: max(a[key], b[key]) for key in a}

        return Ceilings(
            self.threads,
            {isa: higher(rates, other.fma[isa]) for isa, rates in self.fma.items()},
            max(self.dot_bf16, other.dot_bf16),
            higher(self.bandwidth, other.bandwidth),
            self.capacity,
        )


@functools.cache
def _library():
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "ceilings.so"
        command = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, str(SOURCE), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        library = ctypes.CDLL(str(target))
    integer, long, double = ctypes.c_int, ctypes.c_int64, ctypes.c_double
    for name, result, arguments in (
        ("isa_count", integer, ()),
        ("isa_name", ctypes.c_char_p, (integer,)),
        ("isa_available", ctypes.c_bool, (integer,)),
        ("fma_flops_f32", double, (integer, integer)),
        ("fma_flops_f64", double, (integer, integer)),
        ("dot_flops_bf16", double, (integer,)),
        ("read_bandwidth", double, (integer, integer, long)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def cache_sizes():
    """Bytes of the L2 of one core and of the L3, and whether the system told them."""
    sizes = {}
    for index in sorted(CACHE_FOLDER.glob("index*")):
        try:
            level, size = (index / "level").read_text().strip(), (index / "size").read_text().strip()
        except OSError:
            continue
        if f"L{level}" in ASSUMED_CACHES and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) << 10
    told = sizes.keys() == ASSUMED_CACHES.keys()
    return (sizes if told else dict(ASSUMED_CACHES)), told


def measure_ceilings(threads, seconds=SECONDS, isa=None):
    """Those of this machine, or of what the instruction set `isa` (a name of the CPU kernels) has."""
    library = _library()
    isas = [number for number in range(library.isa_count()) if library.isa_available(number)]
    if isa is not None:
        isas = [number for number in isas if number <= ISAS.index(isa)]
    sizes, _ = cache_sizes()

    def best(function, *arguments):
        end = time.perf_counter() + seconds
        highest = function(*arguments)
        while time.perf_counter() < end:
            highest = max(highest, function(*arguments))
        return highest

    # Each thread reads its own part: half of its L2, several times its L2 but well inside the L3, far more than the L3.
    per_thread = {
        "L2": sizes["L2"] // 2,
        "L3": min(4 * sizes["L2"], sizes["L3"] // (2 * threads)),
        "DRAM": max(DRAM_BYTES, 4 * sizes["L3"]) // threads,
    }
    return Ceilings(
        threads,
        {
            library.isa_name(number).decode(): {
                "float32": best(library.fma_flops_f32, number, threads),
                "float64": best(library.fma_flops_f64, number, threads),
            }
            for number in isas
        },
        best(library.dot_flops_bf16, threads) if isa in (None, "avx512") else 0.0,
        {level: best(library.read_bandwidth, isas[-1], threads, size) for level, size in per_thread.items()},
        {"L2": threads * sizes["L2"], "L3": sizes["L3"]},
    )
