"""What nvcc makes of the CUDA kernels: registers, spills and shared memory by ptxas, instructions by cuobjdump.

Needs nvcc and cuobjdump, and no GPU. Every report is kept under .cache/nvcc by the hash of what it was made from.
"""

import functools
import glob
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dsconv_cuda import _build

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
CACHE = ROOT / ".cache" / "nvcc"
ARCHITECTURES = tuple("sm_" + name.replace(".", "") for name in _build.DEFAULT_ARCHITECTURES)
TOOLS = "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm (or pip install --no-build-isolation '.[static]')"

# Column -> the opcodes that it counts.
INSTRUCTIONS = {
    "HMMA": r"HMMA",
    "HMMA.16816": r"HMMA\.16816",  # 16 x 8 x 16
    "HMMA.1688": r"HMMA\.1688",  # 16 x 8 x 8
    "DMMA": r"DMMA",
    "LDSM": r"LDSM",
    "LDGSTS": r"LDGSTS",
    "LDG.128": r"LDG(\.\w+)*\.128",
    "LDG": r"LDG(?!STS)",
    "STG.128": r"STG(\.\w+)*\.128",
    "STG": r"STG",
    "LDS": r"LDS(?!M)",
    "STS": r"STS",
    "FFMA": r"FFMA",
    "HFMA2": r"HFMA2",
    "DFMA": r"DFMA",
    "BAR": r"BAR",
    "local": r"LDL|STL",
}
_PATTERNS = {column: re.compile(opcodes) for column, opcodes in INSTRUCTIONS.items()}

_PTXAS = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<architecture>sm_\d+)a?f?'\s*"
    r"(?:ptxas info\s*: )?Function properties for \w+\s+"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s+"
    r"ptxas info\s*: Used (?P<registers>\d+) registers(?P<rest>[^\n]*)"
)
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+([^;]*;)", re.MULTILINE)
_OPCODE = re.compile(r"(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_JUMP = re.compile(r"(?:@!?U?P\w+\s+)?BRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?`?\(?(?:\.L_x_\d+|0x([0-9a-f]+))")
_MOVED_CONSTANT = re.compile(r"HFMA2(\.\w+)* \w+, -RZ, RZ,")  # how ptxas may load a constant: no multiply-add


class MissingTool(RuntimeError):
    """A program of the CUDA toolkit was not found; the message names it and what to install."""


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one architecture."""

    symbol: str  # as the linker has it
    name: str
    source: str
    architecture: str
    registers: int  # a thread
    stack: int  # bytes a thread
    spills: int  # bytes of spill stores and loads
    static_shared: int  # bytes
    most_threads: int  # of a block, by __launch_bounds__; 0 where there are none
    least_blocks: int  # of a multiprocessor, by __launch_bounds__
    instructions: dict[str, int]  # by column of INSTRUCTIONS, and "all"
    loops: list[dict[str, int]] = field(default_factory=list)  # the same of each innermost loop
    tensor_stretch: dict[str, int] = field(default_factory=dict)  # and from the first HMMA or LDSM to the last HMMA


def sources() -> list[str]:
    """The torch-free CUDA files that have kernels."""
    return sorted(path.name for path in CUDA.glob("cuda_*.cu") if path.name != "cuda_build_info.cu")


def nvcc() -> str:
    found = _build._find_nvcc()
    if found is None:
        raise MissingTool("nvcc was not found in CUDA_HOME, PATH and /usr/local/cuda*: install the CUDA toolkit")
    return found


@functools.cache
def cuobjdump() -> str:
    """On PATH, beside nvcc, in NVIDIA's package of that name, or in triton, which torch with CUDA brings along."""
    if found := shutil.which("cuobjdump"):
        return found
    folders = []
    home = _build._toolkit_home(nvcc())
    if home is not None:
        folders.append(os.path.join(home, "bin"))
    for package, below in (("nvidia", "**/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or []:
            folders += sorted(glob.glob(os.path.join(place, below), recursive=True), reverse=True)
    for folder in folders:
        if found := shutil.which("cuobjdump", path=folder):
            return found
    raise MissingTool(f"cuobjdump was not found: {TOOLS}")


def compile_kernels(source: str, architectures=ARCHITECTURES, *, threads: int = 1) -> list[CompiledKernel]:
    """Every kernel of a file of csrc/cuda, for each architecture. Raises RuntimeError with nvcc's words."""
    flags = ["-std=c++20", "-O3", "-Xptxas=-v"]
    flags += [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in architectures]
    kept = CACHE / f"{source}-{_digest(source, flags)}.json"
    if kept.exists():
        return [CompiledKernel(**kernel) for kernel in json.loads(kept.read_text())]
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        image = os.path.join(scratch, "kernels.fatbin")
        report = _run([nvcc(), *flags, f"--threads={threads}", "-fatbin", str(CUDA / source), "-o", image])
        if "warning" in report.lower():
            raise RuntimeError(f"{source}: nvcc warns\n{report}")
        assembly = os.path.join(scratch, "kernels.ptx")
        bounds = [*flags[:2], f"-arch=compute_{architectures[0][3:]}", "-ptx", str(CUDA / source), "-o", assembly]
        _run([nvcc(), *bounds])
        listing = _run([cuobjdump(), "-sass", image])
        kernels = _kernels(source, report, listing, launch_bounds(Path(assembly).read_text()))
        unfinished = Path(scratch, "kernels.json")
        unfinished.write_text(json.dumps([asdict(kernel) for kernel in kernels]))
        unfinished.rename(kept)
    return kernels


def _digest(source: str, flags: list[str]) -> str:
    digest = hashlib.sha256(repr((flags, _build._output_of(nvcc(), "--version"), INSTRUCTIONS)).encode())
    headers = [path for pattern in ("*.h", "cuda/*.h", "cuda/*.cuh") for path in (ROOT / "csrc").glob(pattern)]
    for path in [CUDA / source, Path(__file__), *sorted(headers)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def launch_bounds(ptx: str) -> dict[str, tuple[int, int]]:
    """{symbol: (threads of a block, blocks of a multiprocessor)} as __launch_bounds__ says; 0 where it says nothing."""
    bounds = {}
    for part in re.split(r"^(?=(?:\.visible |\.weak )?\.entry )", ptx, flags=re.MULTILINE)[1:]:
        symbol = re.match(r"(?:\.\w+ )*\.entry (\w+)", part)[1]
        head = part[: part.index("{")]
        threads = re.search(r"\.maxntid\s+(\d+)", head)
        blocks = re.search(r"\.minnctapersm\s+(\d+)", head)
        bounds[symbol] = (int(threads[1]) if threads else 0, int(blocks[1]) if blocks else 0)
    return bounds


def _kernels(source: str, report: str, listing: str, bounds: dict) -> list[CompiledKernel]:
    counted = instruction_counts(listing)
    found = list(_PTXAS.finditer(report))
    names = demangle([match["symbol"] for match in found])
    kernels = []
    for match, name in zip(found, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels.append(
            CompiledKernel(
                match["symbol"],
                name,
                source,
                match["architecture"],
                int(match["registers"]),
                int(match["stack"]),
                int(match["stores"]) + int(match["loads"]),
                int(shared[1]) if shared else 0,
                *bounds[match["symbol"]],
                *counted[match["architecture"], match["symbol"]],
            )
        )
    return kernels


def instruction_counts(listing: str) -> dict[tuple[str, str], tuple[dict, list[dict], dict]]:
    """{(architecture, symbol): ({column: instructions}, of each innermost loop, of the stretch of tensor core code)} of
    what cuobjdump prints."""
    counts, architecture = {}, ""
    for part in re.split(r"^(?=\s*(?:Function : |code for |\.target\s))", listing, flags=re.MULTILINE):
        if found := re.match(r"\s*(?:code for|\.target)\s+(sm_\d+)", part):
            architecture = found[1]
        elif found := re.match(r"\s*Function : (\w+)", part):
            code = [(int(at, 16), text) for at, text in _LINE.findall(part)]
            loops = [_count(loop) for loop in _innermost_loops(code)]
            counts[architecture, found[1]] = (_count(code), loops, _count(_tensor_stretch(code)))
    return counts


def _count(code) -> dict[str, int]:
    opcodes = Counter(_OPCODE.match(_MOVED_CONSTANT.sub("MOV", text))[1] for _, text in code)
    opcodes.pop("NOP", None)
    return {"all": opcodes.total()} | {
        column: sum(count for opcode, count in opcodes.items() if pattern.match(opcode))
        for column, pattern in _PATTERNS.items()
    }


def _innermost_loops(code):
    """The code from each target of a jump back to the jump, of those that hold no other such stretch."""
    jumps = [(int(target[1], 16), at) for at, text in code if (target := _JUMP.match(text)) and target[1]]
    loops = sorted({(begin, end) for begin, end in jumps if begin <= end and begin != end})
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [[line for line in code if begin <= line[0] <= end] for begin, end in inner]


def _tensor_stretch(code):
    """A product on tensor cores is unrolled in a loop that has others beside it, so no innermost one is its own."""
    opcodes = [_OPCODE.match(text)[1] for _, text in code]
    products = [i for i, opcode in enumerate(opcodes) if _PATTERNS["HMMA"].match(opcode)]
    if not products:
        return []
    loads = [i for i, opcode in enumerate(opcodes[: products[-1]]) if _PATTERNS["LDSM"].match(opcode)]
    return code[min([products[0], *loads[:1]]) : products[-1] + 1]


def demangle(symbols: list[str]) -> list[str]:
    """C++ names without namespace, arguments and return type; the symbols themselves where there is no c++filt."""
    filt = shutil.which("c++filt") or shutil.which("cu++filt")
    if filt is None or not symbols:
        return symbols
    done = subprocess.run([filt], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [short_name(name) for name in done.stdout.splitlines()]


def short_name(name: str) -> str:
    """`void dsconv::kernel<dsconv::Half, 3>(int)` -> `kernel<Half, 3>`"""
    name = name.removeprefix("void ").replace("dsconv::", "").replace("(anonymous namespace)::", "")
    depth = 0
    for index, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:index]
    return name
