// Random projections, ISA-free declarations.
#pragma once
#include "tile/types.h"

namespace uk {

// out (batch, outputs, contiguous; float, or double for f64) = g P^T / sqrt(outputs), g (batch, dim), P random signs.
struct RademacherProjection {
  Operand g;
  int64_t batch, dim, outputs;
  uint64_t seed;
  void* out;
  const int64_t* blocks;  // which 128 coordinates those of `g` are, 128 after 128; null for 0, 1, 2, ...
};

struct InfluenceKernels {
  void (*rademacher_project)(const RademacherProjection&, const Pool&);
};

}  // namespace uk
