// Projections of per-sample gradients of linear layers, ISA-free declarations.
#pragma once
#include "tile/per_sample/tokens.h"

namespace uk {

// out (batch, left rows * right rows, then left rows for the bias) = L G_i^T A_i R^T, row by row, and L sum_t g_t.
struct LinearTwoSided {
  Tokens a, g;
  Operand left, right;  // (k_o, outputs), (k_i, inputs)
  int64_t left_rows, right_rows;
  bool bias;
  void* out;  // float, or double for f64 inputs

  int64_t width() const { return left_rows * (right_rows + bias); }
};

// out (batch, outputs of the sketch) = random signs of the flattened gradient, then the bias's, / sqrt(k).
struct LinearSketch {
  Tokens a, g;
  bool bias;
  int64_t outputs;
  uint64_t seed;
  void* out;

  int64_t dim() const { return g.features * (a.features + bias); }
};

struct LinearProjectKernels {
  void (*two_sided)(const LinearTwoSided&, const Pool&);
  void (*sketch)(const LinearSketch&, const Pool&);
};

}  // namespace uk
