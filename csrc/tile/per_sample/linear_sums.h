// Sums of per-sample gradients of linear layers, ISA-free declarations.
#pragma once
#include "tile/per_sample/tokens.h"

namespace uk {

// weight (groups, outputs, inputs) = sum of w_i G_i^T A_i over the samples of a group, bias (groups, outputs)
// likewise; a group is one sample, or all of them.
struct LinearSums {
  Tokens a, g;
  const void* weights;  // (batch,) float, or double for f64 inputs; null for ones
  bool all;             // one group of all samples
  void *weight, *bias;  // contiguous; bias may be null
  Dtype dtype;          // of both

  int64_t groups() const { return all ? 1 : a.batch; }
};

struct LinearSumsKernels {
  void (*linear_sums)(const LinearSums&, const Pool&);
};

}  // namespace uk
