// Per-sample gradients of an embedding, ISA-free declarations. Row v of a sample's gradient is the sum of the
// output gradients of its tokens with the id v.
#pragma once
#include "tile/per_sample/ids.h"

namespace uk {

// Ids and the gradients (batch, tokens, width) at the embedding's outputs, any strides.
struct TokenGrads {
  Ids ids;
  const void* g;
  int64_t strides[3];
  Dtype dtype;
  int64_t width;

  Operand row(int64_t place, int64_t column) const {
    const int64_t sample = place / ids.tokens, token = place % ids.tokens;
    return Operand{g, 0, strides[2], dtype}.from(sample * strides[0] + token * strides[1] + column * strides[2]);
  }
};

struct EmbeddingNorms {
  TokenGrads tokens;
  void* out;  // (batch,) float, or double for f64
};

// Inner products of the gradients of two sides, (left batch, right batch), or (left batch,) with the sum of the right.
struct EmbeddingDots {
  TokenGrads left, right;
  bool summed;
  void* out;  // float, or double for f64

  int64_t right_samples() const { return summed ? 1 : right.ids.batch; }
};

// out (rows, width, contiguous): sum over the samples of weights[sample] times its gradient.
struct EmbeddingSum {
  TokenGrads tokens;
  const double* weights;
  Dtype out_dtype;
  void* out;
};

// Each returns false, with nothing of use in `out`, where an id is out of range.
struct PerSampleEmbeddingKernels {
  bool (*sqnorms)(const EmbeddingNorms&, const Pool&);
  bool (*dots)(const EmbeddingDots&, const Pool&);
  bool (*weighted_sum)(const EmbeddingSum&, const Pool&);
};

}  // namespace uk
