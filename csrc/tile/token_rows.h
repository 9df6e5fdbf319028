// Statistics and distances of the rows of a language-model head, ISA-free declarations.
#pragma once
#include "tile/head.h"

namespace uk {

// What is made of a row of logits z and, but for `stats`, of the same row r of a reference; p = softmax z,
// q = softmax r. Fields lie one after the other, each at positions of a float (double for f64) array.
enum class RowKind : int { stats, pair, softplus };

// Tails are what rounding took from the log-sum-exps. stats. `ceu`: cross-entropy to p without the label, renormalised, which counts as a constant.
enum StatField { kNll, kLse, kMean, kStd, kMargin, kPeak, kAverage, kCeu, kLseTail, kStatFields };
// pair. `soft`: cross-entropy to softmax(r - beta onehot), which counts as a constant.
enum PairField {
  kPairNll, kPairLse, kPairMean, kKl, kReverseKl, kSoft, kRefNll, kRefLse, kRefMean, kPairLseTail, kRefLseTail, kPairFields
};
// softplus: sum_v softplus(beta (z - r)), r the offset where there is no reference.
inline constexpr int kSoftplusFields = 1;

inline int fields_of(RowKind kind) {
  return kind == RowKind::stats ? int(kStatFields) : kind == RowKind::pair ? int(kPairFields) : kSoftplusFields;
}

struct RowTask {
  RowKind kind;
  LinearHead head, reference;  // the reference's `h` is null where there is none
  double beta, offset;
  int64_t count;  // positions: from field to field
};

struct RowForward {
  RowTask task;
  void* fields;
  int64_t* argmax;  // stats: at positions
};

struct RowBackward {
  RowTask task;
  HeadGradients gradients;
  const void* upstream;  // as many fields, those that are differentiable counting
  const void* fields;
  const int64_t* argmax;
};

// Forward and the gradients of sum(upstream fields), some rows at a time; d_weight and d_bias in the accumulation type.
struct RowSweep {
  RowForward forward;
  HeadGradients gradients;
  const void* upstream;
};

struct TokenRowsKernels {
  void (*forward)(const RowForward&, const Pool&);
  void (*backward)(const RowBackward&, const Pool&);
  void (*sweep)(const RowSweep&, const Pool&);
};

}  // namespace uk
