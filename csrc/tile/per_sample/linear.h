// Per-sample gradients of linear layers, ISA-free declarations.
#pragma once
#include "tile/types.h"

namespace uk {

enum class NormMethod : int { direct, gram, rank1, guarded_gram };

// A is (batch, tokens, inputs), G is (batch, tokens, outputs); strides count elements.
struct LinearNorms {
  const void* a;
  const void* g;
  int64_t a_strides[3];
  int64_t g_strides[3];
  Dtype a_dtype, g_dtype;
  int64_t batch, tokens, inputs, outputs;
  bool bias;
  NormMethod method;
  void* out;  // (batch,) float, or double for f64 inputs

  Operand sample_a(int64_t i) const {
    return Operand{a, a_strides[1], a_strides[2], a_dtype}.from(i * a_strides[0]);
  }
  Operand sample_g(int64_t i) const {
    return Operand{g, g_strides[1], g_strides[2], g_dtype}.from(i * g_strides[0]);
  }
};

struct PerSampleLinearKernels {
  void (*linear_sqnorms)(const LinearNorms&, const Pool&);
};

}  // namespace uk
