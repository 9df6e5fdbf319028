// Random projections other than signs, ISA-free declarations.
#pragma once
#include "tile/per_sample/tokens.h"
#include "tile/types.h"

namespace uk {

// The first column of `g` is coordinate `offset` of the whole gradient. All results are scaled so that E[P^T P] = I.

// out (batch, outputs; float, or double for f64) = g P^T / sqrt(outputs), P standard normal. offset: of 8.
struct NormalProjection {
  Operand g;
  int64_t batch, dim, outputs;
  uint64_t seed;
  int64_t offset;
  void* out;
};

// out (batch, dim) = y P / sqrt(outputs), y (batch, outputs): what the projection's transpose makes of y, for
// coordinates offset ... offset + dim - 1. P normal (offset: of 8), or signs (of 128).
struct DenseAdjoint {
  Operand y;
  int64_t batch, outputs, dim;
  uint64_t seed;
  int64_t offset;
  bool normal;
  void* out;
};

// Every coordinate goes to one output of each of `terms` equal shares of them, with a random sign. With inner > 0 a
// coordinate is (o, i) = (c / inner, c % inner), its output h(o) xor h'(i), and terms is 1. offset: of 4.
struct SparseProjection {
  Operand g;
  int64_t batch, dim, outputs, terms;
  uint64_t seed;
  int64_t offset, inner;
  void* out;
};

// out[b, j] = sum_c (-1)^popcount(c & rows[j]) s_c g[b, c] / sqrt(outputs), s random signs. offset: of kHadamardBlock.
struct HadamardProjection {
  Operand g;
  int64_t batch, dim, outputs;
  const int64_t* rows;
  uint64_t seed;
  int64_t offset;
  void* out;
};
constexpr int64_t kHadamardBlock = 4096;

// out (batch, outputs, a power of two) = the sparse projection of sum_t g_t a_t^T with inner = a.features, from the
// factors. With `bias` a row has one coordinate more, of input 1.
struct TensorSketch {
  Tokens a, g;
  bool bias;
  int64_t outputs;
  uint64_t seed;
  void* out;
};

struct InfluenceSketchKernels {
  void (*normal)(const NormalProjection&, const Pool&);
  void (*adjoint)(const DenseAdjoint&, const Pool&);
  void (*sparse)(const SparseProjection&, const Pool&);
  void (*hadamard)(const HadamardProjection&, const Pool&);
  void (*tensor)(const TensorSketch&, const Pool&);
};

}  // namespace uk
