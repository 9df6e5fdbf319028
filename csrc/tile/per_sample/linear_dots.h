// Inner products of per-sample gradients of linear layers, ISA-free declarations.
#pragma once
#include "tile/per_sample/tokens.h"

namespace uk {

// tokens: sum over t, s of (a_t . a'_s)(g_t . g'_s). direct: tiles of the gradients themselves.
enum class DotMethod : int { tokens, direct };

// Sides 1 and 2 differ in batch and tokens, not in features.
struct LinearDots {
  Tokens a1, g1, a2, g2;
  bool summed, bias;
  DotMethod method;
  void* out;  // (batch 1, batch 2), or (batch 1,) when summed; float, or double for f64 inputs

  int64_t columns() const { return summed ? 1 : a2.batch; }
};

struct LinearDotsKernels {
  void (*linear_dots)(const LinearDots&, const Pool&);
};

}  // namespace uk
