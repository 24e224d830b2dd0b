"""What this installation is and what it will run: ``python -m dsconv_cuda.info``.

Works where the operators cannot be loaded, and then says why.
"""

import os
import platform
import shutil
from collections.abc import Iterator

import torch

from . import _loader

Section = tuple[str, list[tuple[str, str]]]

SWITCHES = ("DSCONV_CPU_ISA", "DSCONV_JIT", "DSCONV_VERBOSE", "FORCE_CUDA", "DSCONV_CPU_ONLY", "CUDA_HOME")


def info() -> str:
    """The text that ``python -m dsconv_cuda.info`` prints."""
    try:
        library, failure = _loader.load_library(), None
    except ImportError as error:
        library, failure = None, str(error)
    sections = [_run_time()]
    if library is not None:
        sections += [_library(library), _build(library), _cpu(library), _cuda()]
    width = max(len(name) for _, rows in sections for name, _ in rows)
    text = "\n\n".join("\n".join(_lines(section, width)) for section in sections)
    return text if failure is None else f"{text}\n\nThe operators do not load\n  " + failure.replace("\n", "\n  ")


def _lines(section: Section, width: int) -> Iterator[str]:
    title, rows = section
    yield title
    for name, value in rows:
        yield f"  {name:<{width}}  {value}"


def _run_time() -> Section:
    from . import __version__

    switches = [f"{name}={os.environ[name]}" for name in SWITCHES if name in os.environ]
    return "This process", [
        ("dsconv_cuda", f"{__version__} in {os.path.dirname(__file__)}"),
        ("torch", torch.__version__),
        ("CUDA of torch", torch.version.cuda or "none"),
        ("Python", platform.python_version()),
        ("machine", f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"),
        ("compiler", _first_found("CXX", "c++", "g++", "clang++")),
        ("nvcc", shutil.which("nvcc") or "not on PATH"),
        ("switches", ", ".join(switches) or "none set"),
    ]


def _first_found(variable: str, *names: str) -> str:
    candidates = [os.environ[variable]] if os.environ.get(variable) else list(names)
    return next((path for name in candidates if (path := shutil.which(name))), "none found")


def _library(library: _loader.Library) -> Section:
    return "The library", [
        ("origin", library.origin),
        ("file", library.path or "unknown"),
        ("CUDA kernels", "yes" if _loader.cuda_kernels_loaded() else "no"),
    ]


def _build(library: _loader.Library) -> Section:
    if library.module is None:
        return "How it was built", [("unknown", "the operators were registered by a library of another origin")]
    built = library.module.build_info()
    rows = [
        ("torch", f"{built['torch']} (runs on 2.10 and later)"),
        ("Python", built["python"]),
        ("compiler", built["compiler"]),
        ("optimised", "yes" if built["optimized"] else "no: timings of this library mean nothing"),
        ("C++ flags", _or_unknown(built["cxx_flags"])),
    ]
    if built["cuda"] is None:
        rows.append(("CUDA", "not built in"))
    else:
        rows += [
            ("CUDA", built["cuda"]),
            ("architectures", _architectures(built["cuda_architectures"])),
            ("nvcc flags", _or_unknown(built["nvcc_flags"])),
        ]
    return "How it was built", rows


def _or_unknown(flags: str | None) -> str:
    return "not recorded (a build by hand)" if flags is None else flags


def _architectures(numbers: str) -> str:
    """ "750,800" -> "sm_75, sm_80" """
    return ", ".join(f"sm_{int(number) // 10}" for number in numbers.split(","))


def _cpu(library: _loader.Library) -> Section:
    if library.module is None:
        return "CPU kernels", [("unknown", "the library of another origin is not asked")]
    module = library.module
    try:
        active = module.isa_active()
    except RuntimeError as error:
        active = f"none: {error}"
    baseline = module.build_info()["baseline"]
    rows = [
        ("built", ", ".join(module.isa_built())),
        ("this machine runs", ", ".join(module.isa_available())),
        ("active", active),
        ("bfloat16", _bf16(module, active)),
    ]
    if baseline != "generic":
        rows.append(("note", f"compiled with flags for {baseline}: the generic kernels need a machine that has it"))
    return "CPU kernels", rows


def _bf16(module, active: str) -> str:
    """What a forward of bfloat16 multiplies; backward and float16 compute in float32."""
    if not module.bf16_dot_available():
        return "computed in float32 (no AVX512-BF16 in this machine or build)"
    if active.startswith("none: ") or not module.bf16_dot_active():
        return "computed in float32 (AVX512-BF16 goes with the avx512 kernels)"
    return "forward by AVX512-BF16"


def _cuda() -> Section:
    if not _loader.cuda_kernels_loaded():
        return "GPUs", [
            ("none used", "the library has no CUDA kernels; to build them: FORCE_CUDA=1 " + _loader.INSTALL)
        ]
    if not torch.cuda.is_available():
        return "GPUs", [("none found", "the CUDA kernels are in the library and wait for one")]
    devices = range(torch.cuda.device_count())
    return "GPUs", [(f"cuda:{index}", _device(index)) for index in devices]


def _device(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"


if __name__ == "__main__":
    print(info())
