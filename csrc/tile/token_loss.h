// Losses of a language-model head, ISA-free declarations.
#pragma once
#include "tile/head.h"

namespace uk {

// nll = lse - z[label], lse = logsumexp z, both at positions of float (double for f64) arrays.
struct NllForward {
  LinearHead head;
  void* nll;
  void* lse;
  void* kept;    // for logits that the backward is to find again, of the accumulation type
  int64_t room;  // for so many elements
};

// Gradients of sum_t grad_t nll_t. grad and lse at positions of float (double) arrays.
struct NllBackward {
  LinearHead head;
  HeadGradients gradients;
  const void* grad;
  const void* lse;
  const void* kept;
  int64_t room;
};

// Forward and gradients in one sweep, some rows at a time. d_weight and d_bias in the accumulation type only.
struct NllSweep {
  LinearHead head;
  HeadGradients gradients;
  const void* grad;
  void* nll;
  // Unless null, a number for each sequence of so many positions: gradients are those of
  // (2 / beta) mean_s softplus(-beta (n_s - bounds_s)), n_s = sum grad nll.
  const void* bounds = nullptr;
  int64_t sequences = 0, sequence = 0;
  double beta = 1;
};

struct TokenLossKernels {
  void (*nll_forward)(const NllForward&, const Pool&);
  void (*nll_backward)(const NllBackward&, const Pool&);
  void (*nll_sweep)(const NllSweep&, const Pool&);
};

}  // namespace uk
