// Per-sample gradients of a language-model head, ISA-free declarations.
#pragma once
#include "tile/head.h"

namespace uk {

enum class HeadMethod : int { direct = 0, gram = 1, automatic = 3 };

// The rows of some samples. lse and upstream at the rows' positions; no upstream for ones.
struct HeadSamples {
  LinearHead head;
  const void* lse;
  const void* upstream;
  const int64_t* begins;  // (samples + 1,) first row of each sample
  int64_t samples;

  int64_t rows(int64_t sample) const { return begins[sample + 1] - begins[sample]; }
};

struct HeadNorms {
  HeadSamples side;
  HeadMethod method;
  void* out;  // (samples,) float, or double for f64
};

struct HeadDots {
  HeadSamples left, right;
  HeadMethod method;
  void* out;  // (left.samples, right.samples)
};

// With the gradient of the embedding that shares the head's weight, E_i = sum_t onehot(ids_t) g_t^T.
struct TiedDots {
  HeadSamples side;
  const void* g;
  int64_t g_stride;  // of features
  Dtype g_dtype;
  const int64_t* g_offsets;  // of the embedding's tokens: where each begins in g,
  const int64_t* w_offsets;  // where its row begins in the weight,
  const int64_t* ids;        // and which row that is
  const int64_t* begins;     // (samples + 1,) first token of each sample
  void* out;                 // (samples,)
};

struct PerSampleLmHeadKernels {
  void (*sqnorms)(const HeadNorms&, const Pool&);
  void (*dots)(const HeadDots&, const Pool&);
  void (*tied_dots)(const TiedDots&, const Pool&);
};

}  // namespace uk
