"""Runs Python in a process of its own, for what can be done only once in a process: loading a library of operators."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The forward and the backward of one layer against PyTorch's own convolutions, in fp64, by the budget of oracle.py.
CHECK_OPERATORS = """
import torch
from dsconv_cuda import depthwise_separable_conv2d

def fused(x, dw, pw, dw_bias, pw_bias):
    return depthwise_separable_conv2d(x, dw, pw, dw_bias, pw_bias, stride=2, padding=1, activation="relu")

def plain(x, dw, pw, dw_bias, pw_bias):
    z = torch.nn.functional.conv2d(x, dw, dw_bias, stride=2, padding=1, groups=x.shape[1])
    return torch.nn.functional.conv2d(z.relu(), pw, pw_bias)

generator = torch.Generator().manual_seed(0)
shapes = [(2, 5, 11, 9), (5, 1, 3, 3), (7, 5, 1, 1), (5,), (7,)]
arguments = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

def results(function, dtype):
    inputs = [t.to(dtype).requires_grad_() for t in arguments]
    y = function(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).reshape(y.shape)
    return [t.double() for t in (y, *torch.autograd.grad((y * weights).sum(), inputs))]

exact = results(plain, torch.float64)
for mine, theirs, reference in zip(results(fused, torch.float32), results(plain, torch.float32), exact, strict=True):
    budget = 2 * (theirs - reference).abs().max() + torch.finfo(torch.float32).eps * reference.abs().max()
    assert (mine - reference).abs().max() <= budget, ((mine - reference).abs().max(), budget)
print("operators agree with PyTorch")
"""


def run_python(code: str, *, package: Path = ROOT, python: str = sys.executable, check: bool = True, **environment):
    """Runs `code` with the dsconv_cuda that lies in the folder `package`; a variable given as None is unset."""
    return run([python, "-c", code], package=package, check=check, **environment)


def run(command: list, *, package: Path = ROOT, cwd: Path | None = None, check: bool = True, **environment):
    env = {**os.environ, "PYTHONPATH": str(package), **{k: v for k, v in environment.items() if v is not None}}
    for name, value in environment.items():
        if value is None:
            env.pop(name, None)
    # Not from the checkout: its own dsconv_cuda would come first in sys.path.
    where = cwd or Path(package).parent
    done = subprocess.run([str(c) for c in command], cwd=where, env=env, capture_output=True, text=True, check=False)
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def copy_of_sources(folder: Path) -> Path:
    """A checkout without anything that was built."""
    ignore = shutil.ignore_patterns(".*venv*", ".git", ".cache", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, folder, ignore=ignore))
