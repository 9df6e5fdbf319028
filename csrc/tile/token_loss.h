// Losses of a language-model head, ISA-free declarations.
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
};

// nll = lse - z[label], lse = logsumexp z, both at positions of float (double for f64) arrays.
struct NllForward {
  LinearHead head;
  void* nll;
  void* lse;
};

// Gradients of sum_t grad_t nll_t in the dtypes of what they belong to; null where not wanted.
struct NllBackward {
  LinearHead head;
  const void* grad;
  const void* lse;
  void* d_h;       // (.., features) contiguous, rows at positions
  void* d_weight;  // (vocabulary, features) contiguous
  void* d_bias;    // (vocabulary,)
};

struct TokenLossKernels {
  void (*nll_forward)(const NllForward&, const Pool&);
  void (*nll_backward)(const NllBackward&, const Pool&);
};

}  // namespace uk
