// A language-model head and the rows that count, ISA-free declarations.
#pragma once
#include "tile/types.h"

namespace uk {

// Logits z = h weight^T + bias of the rows that count. Ignored rows are left out of every list.
struct LinearHead {
  const void* h;
  int64_t h_stride;  // of features
  Dtype h_dtype;
  Operand weight;  // outer: vocabulary, depth: features
  Operand bias;    // outer: vocabulary; data is null where there is none
  const int64_t* offsets;    // where each row begins in h, in elements
  const int64_t* positions;  // which row of the outputs it is
  const int64_t* labels;
  int64_t rows, features, vocabulary;

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

}  // namespace uk
