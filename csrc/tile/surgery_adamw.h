// AdamW on a weighted sum of gradients that is never in memory: ISA-free declarations.
#pragma once
#include "tile/lists.h"

namespace uk {

// What AdamW does to the tensors of one position. exp_avg = beta1 exp_avg + (1 - beta1) g, exp_avg_sq likewise with
// g^2; parameter = decay parameter - size exp_avg / (root sqrt(exp_avg_sq) + eps).
struct AdamwScalars {
  double beta1, beta2, decay, size, root, eps;
  double sign;    // of the gradient: -1 to maximize
  uint32_t step;  // with the position's number, what the random bits depend on
  uint32_t place;
};

// Lists: parameter, exp_avg, exp_avg_sq, then the gradients. Lists whose weight is 0 are not read.
struct SurgicalAdamw {
  Walk walk;
  const double* weights;        // one a gradient
  const AdamwScalars* scalars;  // one a position
  bool stochastic;              // bfloat16 parameters are rounded up or down at random
  uint64_t seed;
};

struct SurgeryAdamwKernels {
  void (*step)(const SurgicalAdamw&, const Pool&);
};

}  // namespace uk
