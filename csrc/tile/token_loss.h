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
struct HeadGradients {
  const void* grad;  // at positions of a float (double) array
  void* d_h;         // (.., features) contiguous, rows at positions
  void* d_weight;    // (vocabulary, features) contiguous
  void* d_bias;      // (vocabulary,)
};

struct NllBackward {
  LinearHead head;
  HeadGradients gradients;
  const void* lse;
};

// Forward and gradients in one sweep, some rows at a time. d_weight and d_bias in the accumulation type only.
struct NllSweep {
  LinearHead head;
  HeadGradients gradients;
  void* nll;
};

struct TokenLossKernels {
  void (*nll_forward)(const NllForward&, const Pool&);
  void (*nll_backward)(const NllBackward&, const Pool&);
  void (*nll_sweep)(const NllSweep&, const Pool&);
};

}  // namespace uk
