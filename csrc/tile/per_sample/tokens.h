// Arrays of (batch, tokens, features) as the per-sample kernels see them: no torch, no ISA.
#pragma once
#include "tile/types.h"

namespace uk {

// Strides count elements; any of them may be 0 or negative.
struct Tokens {
  const void* data;
  int64_t strides[3];
  Dtype dtype;
  int64_t batch, tokens, features;

  int64_t count() const { return batch * tokens; }
  Operand sample(int64_t i) const {
    return Operand{data, strides[1], strides[2], dtype}.from(i * strides[0]);
  }
  // Token n of all samples' tokens.
  Operand token(int64_t n) const { return sample(n / tokens).from(n % tokens * strides[1]); }
  // Whether one stride leads through all tokens of all samples.
  bool folds() const { return tokens == 1 || batch <= 1 || strides[0] == tokens * strides[1]; }
  Operand folded() const { return {data, tokens == 1 ? strides[0] : strides[1], strides[2], dtype}; }
};

}  // namespace uk
