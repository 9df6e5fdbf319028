// The CUDA extension: operators `unlearn_kernels_cuda::<name>(int[] arguments, int stream)` and an empty Python module.
// The launchers in unlearn_kernels/cuda_kernels have checked what they pass. No tensor crosses, so nothing here depends
// on torch's CUDA library.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "cuda/entries.h"

namespace {

template <const char* (*kEntry)(const int64_t*, void*)>
void run(std::vector<int64_t> arguments, int64_t stream) {
  const char* error = kEntry(arguments.data(), reinterpret_cast<void*>(stream));
  STD_TORCH_CHECK(error == nullptr, "a CUDA kernel was not launched: ", error);
}

}  // namespace

STABLE_TORCH_LIBRARY(unlearn_kernels_cuda, m) {
#define UK_DEFINE(name) m.def(#name "(int[] arguments, int stream) -> ()");
  UK_CUDA_ENTRIES(UK_DEFINE)
#undef UK_DEFINE
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels_cuda, CompositeExplicitAutograd, m) {
#define UK_IMPLEMENT(name) m.impl(#name, TORCH_BOX(&run<uk::cuda::entries::name>));
  UK_CUDA_ENTRIES(UK_IMPLEMENT)
#undef UK_IMPLEMENT
}

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C_cuda(void) { return PyModule_Create(&definition); }
