// Weights of a pair of gradients from their inner products: one launch to look, and a small one to decide.
#pragma once
#include "cpu/surgery_rules.h"
#include "cuda/surgery.cuh"

namespace uk::cuda {

// A rule and its numbers, which are on the device in the order of the schema.
struct PairRule {
  const double* numbers;
  int64_t rule, flags;

  UK_DEVICE PairWeights weights(const Products& p, double f, double r) const {
    const double* x = numbers;
    return clipped_weights({Rule(rule), x[0], x[1], x[2], x[3], x[4], (flags & 1) != 0, (flags & 2) != 0}, p, f, r);
  }
  UK_DEVICE double clip(double square) const { return clip_factor(square, numbers[5]); }
  UK_DEVICE double clip_result(double square) const { return clip_factor(square < 0 ? 0 : square, numbers[6]); }
  UK_DEVICE bool skips(const Products& total) const { return (flags & 8) != 0 && !total.finite(); }
};

UK_DEVICE void store(const PairWeights& w, double c, bool skip, double* to) {
  to[0] = skip ? 1 : w.f * c;
  to[1] = skip ? 0 : w.r * c;
}

// The Gramian of a segment from its chunks, and its weights unless those of all segments hang together.
struct WeighSegment {
  struct Shared {
    double sums[3][kThreads];
  };
  PairRule rule;
  const double* parts;  // (4, tasks)
  const int64_t* firsts;
  int64_t tasks, together;
  double *gramians, *weights;

  UK_DEVICE void operator()(int64_t segment, Shared& shared) const {
    each_thread([&](int t) {
      shared.sums[0][t] = segment_share(parts, firsts, segment, t);
      shared.sums[1][t] = segment_share(parts + tasks, firsts, segment, t);
      shared.sums[2][t] = segment_share(parts + 3 * tasks, firsts, segment, t);
    });
    sum_up<3>(shared.sums);
    each_thread([&](int t) {
      if (t > 0) return;
      const Products p{shared.sums[0][0], shared.sums[1][0], shared.sums[2][0]};
      double* G = gramians + segment * 4;
      G[0] = p.ff;
      G[1] = G[2] = p.fr;
      G[3] = p.rr;
      if (together) return;
      const PairWeights w = rule.weights(p, rule.clip(p.ff), rule.clip(p.rr));
      store(w, rule.clip_result(square_of(w, p)), rule.skips(p), weights + segment * 2);
    });
  }
};

// The weights of all segments where clips or a test of the whole step tie them together: one block.
struct WeighTogether {
  struct Shared {
    double sums[3][kThreads];
  };
  PairRule rule;
  const double* gramians;
  int64_t segments;
  double* weights;

  UK_DEVICE Products of(int64_t segment) const {
    const double* G = gramians + segment * 4;
    return {G[0], G[1], G[3]};
  }

  UK_DEVICE void operator()(int64_t, Shared& shared) const {
    each_thread([&](int t) {
      Products sum{0, 0, 0};
#pragma unroll 1
      for (int64_t i = t; i < segments; i += kThreads) {
        const Products p = of(i);
        sum = {sum.ff + p.ff, sum.fr + p.fr, sum.rr + p.rr};
      }
      shared.sums[0][t] = sum.ff;
      shared.sums[1][t] = sum.fr;
      shared.sums[2][t] = sum.rr;
    });
    sum_up<3>(shared.sums);
    const Products total{shared.sums[0][0], shared.sums[1][0], shared.sums[2][0]};
    const double f = rule.clip(total.ff), r = rule.clip(total.rr);
    each_thread([](int) {});  // all have read the sums
    each_thread([&](int t) {
      double square = 0;
#pragma unroll 1
      for (int64_t i = t; i < segments; i += kThreads) square += square_of(rule.weights(of(i), f, r), of(i));
      shared.sums[0][t] = square;
    });
    sum_up<1>(shared.sums);
    const double c = rule.clip_result(shared.sums[0][0]);
    each_thread([&](int t) {
#pragma unroll 1
      for (int64_t i = t; i < segments; i += kThreads)
        store(rule.weights(of(i), f, r), c, rule.skips(total), weights + i * 2);
    });
  }
};

// Two lists, then code, single, parts (4, tasks), firsts, segments, numbers, rule, flags, together,
// gramians (segments, 2, 2), weights (segments, 2).
inline void conflict_weights(Arguments a, Stream stream) {
  const Lists lists(a);
  const int64_t code = a.number();
  const bool single = a.number() != 0;
  double* parts = a.pointer<double>();
  const int64_t* firsts = a.pointer<int64_t>();
  const int64_t segments = a.number();
  const double* numbers = a.pointer<double>();
  const int64_t number = a.number(), flags = a.number(), together = a.number();
  double *gramians = a.pointer<double>(), *weights = a.pointer<double>();
  const PairRule rule{numbers, number, flags};
  gramian_parts(lists, 2, code, single, parts, stream);
  launch(WeighSegment{rule, parts, firsts, lists.tasks, together, gramians, weights}, segments, stream);
  if (together) launch(WeighTogether{rule, gramians, segments, weights}, 1, stream);
}

}  // namespace uk::cuda
