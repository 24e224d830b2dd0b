"""The engine that runs CUDA kernels on the host reports what it is there to report.

cuda_host/engine_cases.cpp holds small kernels, sound ones and the same with one planted bug. The sound ones pass in
every build and in every order of threads; each bug is reported by the build that is meant to see it.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
from cuda_host.build import build_engine_cases

BUILD_DIR = Path(__file__).resolve().parents[1] / ".cache" / "cuda_host"
ORDERS = ("forward", "reverse", "random:1", "random:2")

PLAIN, ASAN, TSAN = None, "address,undefined", "thread"
SANITIZERS = pytest.mark.parametrize("sanitizer", [PLAIN, ASAN, TSAN], ids=["plain", "asan", "tsan"])

SOUND = (
    "barrier",
    "barrier-before-reuse",
    "syncwarp",
    "blocks-apart",
    "copy",
    "copy-sizes",
    "vectors",
    "mma-f16",
    "mma-bf16",
    "mma-tf32",
    "mma-f16-by-hand",
    "mma-bf16-by-hand",
    "mma-tf32-by-hand",
    "mma-f16-transposed",
    "mma-half-step",
    "round-to-tf32",
    "global",
    "static",
    "dynamic",
    "initialised",
    "barrier-for-all",
    "shuffle",
    "exchange",
    "shared-of-function",
    "three-dimensions",
    "limits",
    "static-and-dynamic",
)

WRONG, FAILED = "wrong: ", "launch: cudaErrorLaunchFailure: "

# (case, the build that sees it, what it prints)
REPORTED = (
    ("barrier-dropped", PLAIN, WRONG + ".* is .*nan"),
    ("barrier-dropped", TSAN, "data race .* in reverse_through_shared"),
    ("barrier-before-reuse-dropped", TSAN, "data race .* in reverse_twice"),
    ("syncwarp-dropped", TSAN, "data race .* in reverse_within_warps"),
    ("blocks-collide", TSAN, "data race .* in write_by_block"),
    ("copy-waited-too-late", PLAIN, WRONG + ".* is .*nan"),
    ("copy-wrong-count", PLAIN, WRONG + ".* is .*nan"),
    ("copy-never-waited", PLAIN, FAILED + ".* returns with asynchronous copies that it has not waited for"),
    ("copy-misaligned", PLAIN, FAILED + ".* no multiple of 16"),
    ("copy-beyond", PLAIN, FAILED + ".* with 18 of them valid"),
    ("vectors-misaligned", PLAIN, r"^$"),  # an illegal instruction, as in the library that pytest loads
    ("vectors-misaligned", ASAN, "misaligned address .* which requires 8 byte alignment"),
    ("mma-lane-missing", PLAIN, FAILED + ".*mma.sync.*lanes 0x80"),
    ("ldmatrix-misaligned", PLAIN, FAILED + ".* ldmatrix of a row whose address is no multiple of 16"),
    ("ldmatrix-barrier-dropped", PLAIN, WRONG),
    ("ldmatrix-barrier-dropped", TSAN, "data race .* in"),
    ("global-off-by-one", ASAN, "heap-buffer-overflow .* in write_global"),
    ("static-read-off-by-one", ASAN, "use-after-poison .* in touch_static"),
    ("static-write-off-by-one", ASAN, "use-after-poison .* in touch_static"),
    ("static-write-off-by-one", PLAIN, FAILED + ".* written just outside"),
    ("dynamic-read-off-by-one", ASAN, "use-after-poison .* in touch_dynamic"),
    ("dynamic-write-off-by-one", ASAN, "use-after-poison .* in touch_dynamic"),
    ("dynamic-write-off-by-one", PLAIN, FAILED + ".* written just outside"),
    ("uninitialised", PLAIN, WRONG + ".* is .*nan"),
    ("barrier-in-branch", PLAIN, FAILED + ".* waits at the barrier .* 48 of the block's 96 threads have returned"),
    ("barrier-after-return", PLAIN, FAILED + ".* waits at the barrier .* 48 of the block's 96 threads have returned"),
    ("barrier-in-two-places", PLAIN, FAILED + ".* wait at different barriers"),
    ("mask-without-self", PLAIN, FAILED + ".*__shfl_sync"),
    ("mask-without-source", PLAIN, FAILED + ".* reads a lane that the mask does not name"),
    ("mask-beyond-block", PLAIN, FAILED + ".* names lanes that the block does not have"),
    ("mask-lane-returned", PLAIN, FAILED + ".* lanes .*returned"),
    ("mask-lane-elsewhere", PLAIN, FAILED + ".* is in __"),
    ("mask-lanes-disagree", PLAIN, FAILED + ".*__shfl_sync"),
    ("static-above-48-KiB", PLAIN, FAILED + ".* static shared memory: more than 49152 bytes"),
    ("static-and-dynamic-above-48-KiB", PLAIN, FAILED + ".* exceed 48 KiB"),
)

# Tells the orders apart by a race of its own.
PLAIN_ONLY = ("orders",)


def run(program: Path, *arguments: str, order: str = "forward") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_HOST_ORDER": order, "TSAN_OPTIONS": "atexit_sleep_ms=0"}
    return subprocess.run(
        [program, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )


@SANITIZERS
@pytest.mark.parametrize("order", ORDERS)
def test_sound_kernels_pass(sanitizer, order):
    program = build_engine_cases(BUILD_DIR, sanitizer)
    done = run(program, *SOUND, order=order)
    assert done.returncode == 0, done.stdout
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("case", "sanitizer", "text"), REPORTED, ids=[f"{case}-{build or 'plain'}" for case, build, _ in REPORTED]
)
@pytest.mark.parametrize("order", ORDERS)
def test_planted_bug_is_reported(case, sanitizer, text, order):
    done = run(build_engine_cases(BUILD_DIR, sanitizer), case, order=order)
    assert done.returncode not in (0, 3), done.stdout
    assert re.search(text, done.stdout), done.stdout


def test_orders_differ_and_seeds_repeat():
    done = run(build_engine_cases(BUILD_DIR), "orders")
    assert done.returncode == 0, done.stdout


def test_unknown_order_is_refused():
    done = run(build_engine_cases(BUILD_DIR), "barrier", order="sideways")
    assert done.returncode != 0
    assert "CUDA_HOST_ORDER must be" in done.stdout


def test_portable_fibers():
    """The ucontext form, which machines other than x86-64 use."""
    program = build_engine_cases(BUILD_DIR, ucontext=True)
    done = run(program, *SOUND)
    assert done.returncode == 0, done.stdout
    assert "wait at different barriers" in run(program, "barrier-in-two-places").stdout


def test_every_case_is_run():
    listed = run(build_engine_cases(BUILD_DIR)).stdout.split()
    assert sorted(listed) == sorted({*SOUND, *PLAIN_ONLY, *(case for case, _, _ in REPORTED)})
