// Gramians and weighted sums over lists of tensors: two launches and one.
#pragma once
#include "cuda/elements.cuh"

namespace uk::cuda {

// parts[a, b, task] = <g_a, g_b> over a chunk, for K lists at once. With more lists, for all pairs of half as many:
// a block has rows 0 ... K/2 - 1 from one half and the others from the other.
template <int K, int kCode>
struct GramianOfChunk {
  static constexpr int kPairs = K * (K + 1) / 2, kHalf = K / 2, kAtOnce = kPairs < 8 ? kPairs : 8;
  struct Shared {
    double sums[kAtOnce][kThreads];
    double totals[kPairs];
  };
  Lists lists;
  int64_t sets, halves;
  bool single;
  double* parts;

  // Which lists a block takes: half i and half j.
  struct Rows {
    int64_t i, j;
    UK_DEVICE int64_t operator[](int k) const { return k < kHalf ? i * kHalf + k : j * kHalf + k - kHalf; }
  };

  template <class T>
  UK_DEVICE void add_up(int64_t task, const Rows& list, Shared& shared) const {
    struct Sums {
      T of[kPairs];
    };
    PerThread<Sums> sums;
    each_thread([&](int t) {
      Sums& s = sums[t];
#pragma unroll
      for (int p = 0; p < kPairs; ++p) s.of[p] = T(0);
      const int64_t position = lists.positions[task];
      each_group(lists, task, t, [&](int64_t at, int n) {
        T x[K][kGroup];
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
          for (int i = 0; i < kGroup; ++i) x[k][i] = T(0);
          if (list[k] < sets) Row(lists, list[k], position).template load<kCode>(at, n, x[k]);
        }
#pragma unroll
        for (int a = 0, p = 0; a < K; ++a)
#pragma unroll
          for (int b = a; b < K; ++b, ++p)
#pragma unroll
            for (int i = 0; i < kGroup; ++i) s.of[p] += x[a][i] * x[b][i];
      });
    });
#pragma unroll
    for (int first = 0; first < kPairs; first += kAtOnce) {
      each_thread([&](int t) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) shared.sums[i][t] = first + i < kPairs ? double(sums[t].of[(first + i) % kPairs]) : 0;
      });
      sum_up<kAtOnce>(shared.sums);
      each_thread([&](int t) {
        if (t < kAtOnce && first + t < kPairs) shared.totals[first + t] = shared.sums[t][0];
      });
    }
  }

  // Pairs of a half with itself are in several blocks: the first of them writes.
  UK_DEVICE bool mine(int a, int b, const Rows& list) const {
    const bool right_a = a >= kHalf, right_b = b >= kHalf;
    return halves <= 2 || right_a != right_b || (list.i == 0 && (right_a || list.j == 1));
  }

  UK_DEVICE void operator()(int64_t block, Shared& shared) const {
    const int64_t task = block % lists.tasks;
    int64_t pair = block / lists.tasks, i = 0;
    while (halves > 2 && pair >= halves - 1 - i) pair -= halves - 1 - i++;
    const Rows list{i, i + 1 + pair};
    if (single)
      add_up<float>(task, list, shared);
    else
      add_up<double>(task, list, shared);
    bool again = false;  // where squares leave the range of float
#pragma unroll
    for (int a = 0, p = 0; a < K; p += K - a, ++a)
      again = again || (list[a] < sets && !(shared.totals[p] >= 1e-24 && shared.totals[p] <= 1e36));
    each_thread([](int) {});  // all have read the totals
    if (single && again) add_up<double>(task, list, shared);
    each_thread([&](int t) {
      if (t > 0) return;
      for (int a = 0, p = 0; a < K; ++a)
        for (int b = a; b < K; ++b, ++p)
          if (list[a] < sets && list[b] < sets && mine(a, b, list))
            parts[(list[a] * sets + list[b]) * lists.tasks + task] =
                parts[(list[b] * sets + list[a]) * lists.tasks + task] = shared.totals[p];
    });
  }
};

// What thread t has of the sum of a value over the tasks of a segment.
UK_DEVICE double segment_share(const double* parts, const int64_t* firsts, int64_t segment, int t) {
  double sum = 0;
  for (int64_t task = firsts[segment] + t; task < firsts[segment + 1]; task += kThreads) sum += parts[task];
  return sum;
}

// out[segment, value] = sum of parts[value, task] over the segment's tasks.
struct SegmentSum {
  struct Shared {
    double sums[1][kThreads];
  };
  const double* parts;
  const int64_t* firsts;
  int64_t values, tasks;
  double* out;

  UK_DEVICE void operator()(int64_t block, Shared& shared) const {
    const int64_t segment = block / values, value = block % values;
    each_thread([&](int t) { shared.sums[0][t] = segment_share(parts + value * tasks, firsts, segment, t); });
    sum_up<1>(shared.sums);
    each_thread([&](int t) {
      if (t == 0) out[block] = shared.sums[0][0];
    });
  }
};

// List 0 = sum of weights[segment, k] * list first + k over a chunk. Sparing: lists of weight 0 are not read, and
// nothing is done where the weights are 1, 0, 0, ...
template <int kCode, class T>
struct CombineChunk {
  struct Shared {};
  Lists lists;
  int64_t first, sets, sparing;
  const double* weights;

  UK_DEVICE bool changes(const double* w) const {
    bool differ = false;
    for (int64_t k = 0; k < sets; ++k) differ = differ || w[k] != (k == 0 ? 1 : 0);
    return differ;
  }

  UK_DEVICE void operator()(int64_t task, Shared&) const {
    const double* w = weights + lists.segments[task] * sets;
    if (sparing && !changes(w)) return;
    each_thread([&](int t) {
      const int64_t position = lists.positions[task];
      each_group(lists, task, t, [&](int64_t at, int n) {
        T sum[kGroup] = {};
#pragma unroll(kCode == kAny ? 1 : 2)
        for (int64_t k = 0; k < sets; ++k) {
          if (sparing && w[k] == 0) continue;
          T x[kGroup];
          Row(lists, first + k, position).template load<kCode>(at, n, x);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) sum[i] += T(w[k]) * x[i];
        }
        Row(lists, 0, position).template store<kCode>(at, n, sum);
      });
    });
  }
};

template <int kCode>
void gramian_as(const Lists& lists, int64_t sets, bool single, double* parts, Stream stream) {
  const int64_t halves = (sets + 3) / 4, pairs = halves > 2 ? halves * (halves - 1) / 2 : 1;
  if (sets <= 2)
    launch(GramianOfChunk<2, kCode>{lists, sets, 2, single, parts}, lists.tasks, stream);
  else if (sets <= 4)
    launch(GramianOfChunk<4, kCode>{lists, sets, 2, single, parts}, lists.tasks, stream);
  else
    launch(GramianOfChunk<8, kAny>{lists, sets, halves, single, parts}, lists.tasks * pairs, stream);
}

inline void gramian_parts(const Lists& lists, int64_t sets, int64_t code, bool single, double* parts, Stream stream) {
  switch (code) {
    case kF32: gramian_as<kF32>(lists, sets, single, parts, stream); break;
    case kBf16: gramian_as<kBf16>(lists, sets, single, parts, stream); break;
    default: gramian_as<kAny>(lists, sets, single, parts, stream);
  }
}

// Lists, then sets, code, single, parts (sets^2, tasks), firsts, segments, out (segments, sets^2).
inline void gramian(Arguments a, Stream stream) {
  const Lists lists(a);
  const int64_t sets = a.number(), code = a.number();
  const bool single = a.number() != 0;
  double* parts = a.pointer<double>();
  const int64_t* firsts = a.pointer<int64_t>();
  const int64_t segments = a.number();
  gramian_parts(lists, sets, code, single, parts, stream);
  launch(SegmentSum{parts, firsts, sets * sets, lists.tasks, a.pointer<double>()}, segments * sets * sets, stream);
}

// Lists, then first, sets, code, single, sparing, weights (segments, sets).
inline void combine(Arguments a, Stream stream) {
  const Lists lists(a);
  const int64_t first = a.number(), sets = a.number(), code = a.number();
  const bool single = a.number() != 0;
  const int64_t sparing = a.number();
  const double* weights = a.pointer<double>();
  if (code == kF32)
    launch(CombineChunk<kF32, double>{lists, first, sets, sparing, weights}, lists.tasks, stream);
  else if (code == kBf16)
    launch(CombineChunk<kBf16, float>{lists, first, sets, sparing, weights}, lists.tasks, stream);
  else if (single)
    launch(CombineChunk<kAny, float>{lists, first, sets, sparing, weights}, lists.tasks, stream);
  else
    launch(CombineChunk<kAny, double>{lists, first, sets, sparing, weights}, lists.tasks, stream);
}

}  // namespace uk::cuda
