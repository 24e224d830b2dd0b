"""Builds the extension with the AVX-512 kernels on emulated intrinsics (immintrin.h beside this file)."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
NAME = "dsconv_cuda_emulated_avx512"

# Loading registers the ops, which a process can do once: so the build has a process of its own.
# -O2 would take twice as long to compile; of what it adds to -O1, the emulated multiply-adds have to be fused.
_BUILD = """
import sys
from torch.utils.cpp_extension import load
name, build_dir, include, *sources = sys.argv[1:]
load(name, sources, build_directory=build_dir, extra_include_paths=[include],
     extra_cflags=["-O1", "-fexpensive-optimizations", "-Wno-psabi", "-DDSCONV_EMULATE_AVX512"], is_python_module=True)
"""


def can_emulate() -> bool:
    """The emulation is compiled for AVX2, and for g++'s vector types."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return all(f" {name} " in flags for name in ("avx2", "fma", "f16c"))


def build_emulated_avx512(build_dir) -> Path:
    """Compiles the CPU-only extension into build_dir (again only what has changed) and returns the library.

    Loaded by torch.ops.load_library or as a Python module, it runs the AVX-512 kernels by default.
    """
    build_dir = Path(build_dir)
    build_dir.mkdir(parents=True, exist_ok=True)
    sources = [path for folder in ("", "cpu", "cuda") for path in sorted((CSRC / folder).glob("*.cpp"))]
    command = [sys.executable, "-c", _BUILD, NAME, str(build_dir), str(HERE), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"building the emulated AVX-512 extension failed:\n{done.stdout}\n{done.stderr}")
    return build_dir / f"{NAME}.so"


if __name__ == "__main__":
    print(build_emulated_avx512(sys.argv[1]))
