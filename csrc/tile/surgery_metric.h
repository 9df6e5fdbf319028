// Inner products of gradients in the metric of Adam: ISA-free declarations.
#pragma once
#include "tile/lists.h"

namespace uk {

// (lists - 1)^2 sums of a b / (sqrt(scale v) + eps); v is the last list.
struct MetricGramian {
  Walk walk;
  const double* scales;  // one a position
  double eps;
  double* out;
};

struct SurgeryMetricKernels {
  void (*gramian)(const MetricGramian&, const Pool&);
};

}  // namespace uk
