// Glue between torch and the tile engine: tensors in, raw pointers and a thread pool out.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>

#include "tile/kernels.h"

namespace uk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

// What a sum over elements of this type is returned in.
inline ScalarType result_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Threads of torch, tasks handed out one by one so that a slow core does not hold up the rest.
// `flops` decides whether waking them is worth it.
inline Pool pool_for(double flops) {
  constexpr double kWorthAThread = 2e5;
  const int threads = int(torch::stable::get_num_threads());
  const double useful = flops / kWorthAThread;
  Pool pool;
  pool.workers = useful >= threads ? threads : useful >= 1 ? int(useful) : 1;
  pool.run = [](const Pool& self, int64_t tasks, void* context, void (*body)(void*, int64_t, int)) {
    if (self.workers == 1 || tasks <= 1) {
      for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
      return;
    }
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, self.workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker)
        for (int64_t task = next++; task < tasks; task = next++) body(context, task, int(worker));
    });
  };
  return pool;
}

}  // namespace uk
