// How this library was built, as Python's build_info() gives it.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

// Defined in cuda/cuda_build_info.cu, and thus null in a library without the .cu files.
extern "C" const char* dsconv_cuda_toolkit_version() __attribute__((weak));
extern "C" const char* dsconv_cuda_architectures() __attribute__((weak));
extern "C" const char* dsconv_cuda_nvcc_flags() __attribute__((weak));

namespace dsconv {

inline pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["python"] = PY_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#ifdef __OPTIMIZE__
  info["optimized"] = true;
#else
  info["optimized"] = false;
#endif
// dsconv_cuda/_build.py defines it; a hand-written torch.utils.cpp_extension.load() need not.
#ifdef DSCONV_BUILD_FLAGS
  info["cxx_flags"] = DSCONV_BUILD_FLAGS;
#else
  info["cxx_flags"] = pybind11::none();
#endif
  // What the whole file is compiled for: "generic" kernels of a build with -march=native are not generic.
#if defined(__AVX512F__)
  info["baseline"] = "avx512";
#elif defined(__AVX2__)
  info["baseline"] = "avx2";
#else
  info["baseline"] = "generic";
#endif
  const auto text = [](const char* (*get)()) -> pybind11::object {
    const char* value = get != nullptr ? get() : nullptr;
    return value != nullptr ? pybind11::object(pybind11::str(value)) : pybind11::none();
  };
  info["cuda"] = text(dsconv_cuda_toolkit_version);
  info["cuda_architectures"] = text(dsconv_cuda_architectures);
  info["nvcc_flags"] = text(dsconv_cuda_nvcc_flags);
  return info;
}

}  // namespace dsconv
