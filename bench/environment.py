"""The conditions of a measurement: what they were, and the one that has to be set, the allocator."""

import ctypes
import os
import platform
from datetime import datetime, timezone

import torch

import dsconv_cuda
from dsconv_cuda import _loader

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory():
    """Tells glibc not to give freed blocks back to the system; returns what was done, in words.

    By default it maps a large block anew for every allocation, and a training step then spends much of its time in page
    faults, which has nothing to do with the convolutions. It is the same for every competitor.
    """
    if platform.libc_ver()[0] != "glibc":
        return "system default"
    libc = ctypes.CDLL(None)
    done = libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1)
    return "glibc, freed memory kept by the process" if done else "glibc default (mallopt refused)"


def cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def kernels():
    """Which CPU kernels dsconv_cuda runs here, and whether the compiler was asked to make them fast."""
    module = _loader.load_library().module
    if module is None:
        return "unknown kernels (a library of another origin)"
    optimized = "" if module.build_info()["optimized"] else ", NOT OPTIMISED: these times mean nothing"
    return f"{module.isa_active()} kernels{optimized}"


def use_isa(name):
    """Makes the fused op run these CPU kernels; RuntimeError where there are none."""
    module = _loader.load_library().module
    if module is None:
        raise RuntimeError("a library of another origin does not let its kernels be chosen")
    module.set_isa(name)


def describe(allocator, clock, isa=None, peers=None, missing_peers=()):
    versions = {}
    for peer in (peers or {}).values():
        versions.update(peer.versions())
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_name(),
        "logical_cpus": os.cpu_count(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "dsconv_cuda": dsconv_cuda.__version__,
        "kernels": kernels(),
        "allocator": allocator,
        "clock": clock,
        "isa": isa,
        "peers": versions,
        "missing_peers": list(missing_peers),
    }
