// Per-sample gradients of normalisation layers, ISA-free declarations.
#pragma once
#include "tile/types.h"

namespace uk {

enum class NormKind : int { layer, rms, group };

// Inputs and output gradients, (batch, lines, length), any strides. A line is a token of `length` features
// (layer, rms) or a channel of `length` positions (group). Statistics are those of a token, or of the lines of a
// group; a feature, or a channel, has one scale.
struct NormGrads {
  const void *x, *g;
  int64_t x_strides[3], g_strides[3];
  Dtype x_dtype, g_dtype;
  int64_t batch, lines, length, groups;
  double eps;
  NormKind kind;
  bool bias;
  void* norms;  // (batch,), or null
  void* grads;  // (batch, 1 + bias, scales): the scale's gradient, then the bias's; or null. Float, double for f64.

  int64_t scales() const { return kind == NormKind::group ? lines : length; }
};

struct PerSampleNormKernels {
  void (*norm_grads)(const NormGrads&, const Pool&);
};

}  // namespace uk
