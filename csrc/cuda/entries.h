// What the extension calls: kernels by addresses and numbers, on a stream. Each returns nullptr or what went wrong.
#pragma once
#include <cstdint>

#define UK_CUDA_ENTRIES(X)                                                                          \
  X(gramian) X(combine) X(conflict_weights) X(elements) X(adamw) X(mask_digit) X(mask_ties) X(mask_take) \
  X(sign_sums) X(topk)

namespace uk::cuda::entries {

#define UK_DECLARE(name) const char* name(const int64_t* arguments, void* stream);
UK_CUDA_ENTRIES(UK_DECLARE)
#undef UK_DECLARE

}  // namespace uk::cuda::entries

// Defines one in a file that nvcc compiles.
#define UK_CUDA_ENTRY(name)                                                                 \
  const char* uk::cuda::entries::name(const int64_t* arguments, void* stream) {            \
    uk::cuda::name(uk::cuda::Arguments(arguments), static_cast<cudaStream_t>(stream));     \
    const cudaError_t error = cudaGetLastError();                                          \
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);                     \
  }
