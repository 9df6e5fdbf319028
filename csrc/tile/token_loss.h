// Losses of a language-model head, ISA-free declarations.
#pragma once
#include "tile/head.h"

namespace uk {

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
