"""The CUDA kernels under ASan + UBSan and under TSan, on the host and without torch.

cuda_host/driver.cpp makes a matrix of calls and compares every result with an oracle. It runs plain and under
ASan + UBSan whole, under TSan thinned, and each time in three orders of threads, which must not change a bit of any
output.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
from cuda_host.build import build_driver

BUILD_DIR = Path(__file__).resolve().parents[1] / ".cache" / "cuda_host"
ORDERS = ("forward", "reverse", "random:1")


def run_driver(sanitizer: str | None, order: str, *arguments: int) -> dict[str, str]:
    program = build_driver(BUILD_DIR, sanitizer)
    done = subprocess.run(
        [program, *map(str, arguments)],
        env=os.environ | {"CUDA_HOST_ORDER": order, "TSAN_OPTIONS": "atexit_sleep_ms=0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout
    return dict(re.findall(r"^(cases|digest|layer) (\S+)$", done.stdout, re.MULTILINE))


def check_orders(capsys, sanitizer: str | None, every: int, firsts: tuple[int, ...]) -> None:
    """Runs the calls first, first + every, ... in the three orders; each order takes its turn at the next `first`."""
    name = sanitizer or "no sanitizer"
    results = [run_driver(sanitizer, order, every, first) for order, first in zip(ORDERS, firsts, strict=True)]
    cases = sum(int(result["cases"]) for result in results)
    assert all(int(result["cases"]) > 0 for result in results)
    if len(set(firsts)) == 1:
        assert len({result["digest"] for result in results}) == 1, "the order of threads changes the result"
    with capsys.disabled():
        seconds = ", ".join(result["layer"] for result in results if "layer" in result)
        print(f"\n{name}: {cases} cases in {len(ORDERS)} thread orders; 32 -> 64 channels on 28 x 28: {seconds} s")


def test_plain(capsys):
    check_orders(capsys, None, 1, (0, 0, 0))


@pytest.mark.parametrize("sanitizer", ["address,undefined"])
def test_address_and_undefined(capsys, sanitizer):
    check_orders(capsys, sanitizer, 1, (0, 0, 0))


# 7 has no factor in common with the 4 dtypes, so the calls left in have every dtype, layout and kernel.
@pytest.mark.parametrize("sanitizer", ["thread"])
def test_races(capsys, sanitizer):
    check_orders(capsys, sanitizer, 7, (0, 2, 4))
