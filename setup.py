"""Builds and packages dsconv_cuda: one extension, dsconv_cuda._C, with the CUDA kernels wherever they can be compiled.

    pip install --no-build-isolation .          # torch, ninja and setuptools have to be installed already
    python setup.py build_ext --inplace         # for work on the sources: recompiles only what changed

Environment: FORCE_CUDA, DSCONV_CPU_ONLY, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, DEBUG, CXX, CXXFLAGS, NVCC_FLAGS.
What they mean, and what is compiled how, is in dsconv_cuda/_build.py.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)

# What `python -m bench --peers` measures beside PyTorch.
PEERS = ["onnxruntime", "onnx", "openvino", "ncnn", "ai-edge-litert", "flatbuffers", "jax"]

# What `python -m bench.static` reads machine code with, where neither the CUDA toolkit nor triton brings it along.
STATIC = ["nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"]

COMPILING_COMMANDS = {"build", "build_ext", "bdist", "bdist_wheel", "editable_wheel", "develop", "install"}


def load_build_module():
    """dsconv_cuda/_build.py by its path: the package itself cannot be imported before it is built."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        sys.exit(
            f"\ndsconv_cuda is compiled against the torch it will run with, and torch cannot be imported: {error}\n"
            "Install torch first, and build without isolation:\n\n"
            "    pip install torch ninja setuptools wheel\n"
            "    pip install --no-build-isolation .\n"
        )
    spec = importlib.util.spec_from_file_location("dsconv_cuda_build", ROOT / "dsconv_cuda" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def extension(parameters):
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    kind = CUDAExtension if parameters.cuda else CppExtension
    return kind(
        "dsconv_cuda._C",
        [os.path.relpath(source, ROOT) for source in parameters.sources],
        include_dirs=list(parameters.include_dirs),
        extra_compile_args={"cxx": parameters.cxx_flags, "nvcc": parameters.nvcc_flags},
    )


def version() -> str:
    return re.search(r'^__version__ = "(.+)"', (ROOT / "dsconv_cuda" / "__init__.py").read_text(), re.MULTILINE).group(
        1
    )


def packages_of_csrc() -> dict[str, str]:
    """csrc goes into the wheel as dsconv_cuda/csrc, so that an installed package can compile its own sources."""
    folders = [ROOT / "csrc", *(path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_dir())]
    relative = [folder.relative_to(ROOT) for folder in folders]
    return {".".join(("dsconv_cuda", *folder.parts)): folder.as_posix() for folder in relative}


def package(extensions=(), commands=None) -> None:
    csrc = packages_of_csrc()
    readme = ROOT / "README.md"
    setup(
        name="dsconv_cuda",
        version=version(),
        description="Depthwise-separable convolution for PyTorch, forward and backward each in one fused pass",
        long_description=readme.read_text() if readme.exists() else "",
        long_description_content_type="text/markdown",
        license="BSD-3-Clause",
        license_files=["LICENSE"],
        python_requires=">=3.10",
        install_requires=["torch>=2.10"],
        extras_require={"peers": PEERS, "static": STATIC},
        packages=find_packages(include=["dsconv_cuda", "dsconv_cuda.*"]) + list(csrc),
        package_dir=csrc,
        package_data={"dsconv_cuda": ["py.typed"], **{folder: ["*"] for folder in csrc}},
        include_package_data=False,
        ext_modules=list(extensions),
        cmdclass=commands or {},
        zip_safe=False,
        classifiers=[
            "Programming Language :: Python :: 3",
            "Programming Language :: C++",
            "Environment :: GPU :: NVIDIA CUDA",
            "Operating System :: POSIX :: Linux",
            "Topic :: Scientific/Engineering :: Artificial Intelligence",
        ],
    )


def compile_and_package() -> None:
    build = load_build_module()
    from torch.utils.cpp_extension import BuildExtension

    try:
        parameters = build.build_parameters(ROOT / "csrc")
    except build.BuildError as error:
        sys.exit(f"\ndsconv_cuda cannot be built: {error}\n")
    print(build.report(parameters), flush=True)
    with build.build_environment(parameters):
        package([extension(parameters)], {"build_ext": BuildExtension})


# Metadata and the sdist need neither torch nor a compiler.
if COMPILING_COMMANDS.intersection(sys.argv[1:]):
    compile_and_package()
else:
    package()
