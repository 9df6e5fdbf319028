// The tile engine in the shapes that it has for 512-bit vectors, which the compiler splits for this processor.
#include <atomic>
#include <cmath>
#include <type_traits>

#include "tile/kernels.h"

#define UK_BITS 512
#define UK_X86 0
#define UK_ISA wide
#include "tile/engine.inc"

#include "tile/dense.inc"
#include "tile/per_sample/linear.inc"

static const uk::Pool kOneThread{1, [](const uk::Pool&, int64_t tasks, void* context,
                                       void (*body)(void*, int64_t, int)) {
                                   for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
                                 }};

// `pairs` takes the panels of the bf16 dot instruction.
extern "C" void wide_matmul(const void* a, const int64_t* a_strides, const void* b, const int64_t* b_strides,
                            int dtype, bool pairs, int64_t rows, int64_t cols, int64_t depth, void* out) {
  const auto type = uk::Dtype(dtype);
  const uk::Matmul p{{a, a_strides[0], a_strides[1], type}, {b, b_strides[0], b_strides[1], type},
                     rows, cols, depth, out};
  if (pairs)
    wide::matmul_as<wide::Bf16Pair>(p, kOneThread);
  else
    wide::matmul(p, kOneThread);
}

extern "C" void wide_norms(const void* a, const int64_t* a_strides, const void* g, const int64_t* g_strides, int dtype,
                           int64_t batch, int64_t tokens, int64_t inputs, int64_t outputs, int method, void* out) {
  uk::LinearNorms p{a, g, {}, {}, uk::Dtype(dtype), uk::Dtype(dtype)};
  for (int i = 0; i < 3; ++i) {
    p.a_strides[i] = a_strides[i];
    p.g_strides[i] = g_strides[i];
  }
  p.batch = batch;
  p.tokens = tokens;
  p.inputs = inputs;
  p.outputs = outputs;
  p.bias = true;
  p.method = uk::NormMethod(method);
  p.out = out;
  wide::linear_sqnorms(p, kOneThread);
}
