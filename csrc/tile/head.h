// A language-model head and the rows that count, ISA-free declarations.
#pragma once
#include "tile/types.h"

namespace uk {

// Logits z = scale (h weight^T + bias), then softcap tanh(z / softcap) unless softcap is 0, of the rows that count.
// Ignored rows are left out of every list.
struct LinearHead {
  const void* h;
  int64_t h_stride;  // of features
  Dtype h_dtype;
  Operand weight;  // outer: vocabulary, depth: features
  Operand bias;    // outer: vocabulary; data is null where there is none
  const int64_t* offsets;    // where each row begins in h, in elements
  const int64_t* positions;  // which row of the outputs it is
  const int64_t* labels;     // negative where a row has none
  int64_t rows, features, vocabulary;
  double scale = 1, softcap = 0;

  // The same head with some of its rows.
  LinearHead part(int64_t begin, int64_t count) const {
    LinearHead x = *this;
    x.offsets += begin;
    x.positions += begin;
    x.labels += begin;
    x.rows = count;
    return x;
  }
};

// Gradients to a head, in the dtypes of what they belong to; null where not wanted.
struct HeadGradients {
  void* d_h;       // (.., features) contiguous, rows at positions
  void* d_weight;  // (vocabulary, features) contiguous
  void* d_bias;    // (vocabulary,)
};

}  // namespace uk
