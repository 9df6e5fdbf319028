// Rules that look at one element of two gradients at a time: one pass, written in place.
#pragma once
#include "cuda/random.cuh"
#include "cuda/surgery.cuh"

namespace uk::cuda {

// Zeros and NaN have no sign. Not f r < 0, which underflows.
template <class T>
UK_DEVICE bool opposite(T f, T r) {
  return (f < 0 && r > 0) || (f > 0 && r < 0);
}

// The words of eight elements from number `first` on, a multiple of 4: word i % 4 of the Philox call with counter i / 4.
UK_DEVICE void draw(uint64_t seed, uint64_t first, Words* random) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint64_t call = first / 4 + half;
    random[half] = philox({{uint32_t(call), uint32_t(call >> 32), 0, 0}}, seed);
  }
}

// List 0, f, is written from itself and list 1, r. Signs: clash * r where f and r have opposite signs, elsewhere
// gamma * f + agree * r (no second term if `agree` is 0). Drop: keeps or drops the positive and the negative numbers of
// an element by chance. clashes[task]: how many signs differ, NaN for a step that is skipped.
template <int kCode, bool kDrop>
struct ElementsChunk {
  struct Shared {
    unsigned long long clashes;
  };
  Lists lists;
  const int64_t* numbering;  // of each position's first element, a multiple of 4
  const double* total;       // the Gramian of all, or none: a step that is not finite is skipped
  const double* numbers;
  int64_t seed, drops_clashes, adds;
  double* clashes;

  template <class T>
  struct Numbers {
    T gamma, clash, agree, leaks[2];

    UK_DEVICE Numbers(const double* x, bool drops_clashes, bool adds)
        : gamma(T(x[0])), clash(drops_clashes ? T(0) : T(x[1])), agree(adds ? T(x[1]) : T(0)),
          leaks{T(x[7]), T(x[8])} {}
    UK_DEVICE T by_sign(T f, T r) const {
      const T kept = gamma * f;
      return opposite(f, r) ? clash * r : agree != 0 ? kept + agree * r : kept;
    }
    UK_DEVICE T kept(T x, T positive, T u, int list) const {
      const bool chosen = (x > 0 && positive > u) || (x < 0 && positive <= u);
      return (chosen ? T(1) : leaks[list]) * x;
    }
    UK_DEVICE T by_chance(T f, T r, uint32_t word) const {
      const T u = T(word >> 8) * T(0x1p-24);
      const T positive = T(0.5) + T(0.5) * ((f + r) / ((f < 0 ? -f : f) + (r < 0 ? -r : r)));
      return kept(f, positive, u, 0) + kept(r, positive, u, 1);
    }
  };

  template <class T>
  UK_DEVICE unsigned act(int64_t task, int t) const {
    const int64_t position = lists.positions[task];
    const Row f_row(lists, 0, position), r_row(lists, 1, position);
    const Numbers<T> rule(numbers, drops_clashes != 0, adds != 0);
    unsigned found = 0;
    each_group(lists, task, t, [&](int64_t at, int n) {
      T f[kGroup], r[kGroup];
      Words random[2];
      f_row.template load<kCode>(at, n, f);
      r_row.template load<kCode>(at, n, r);
      if (kDrop) draw(uint64_t(seed), uint64_t(numbering[position] + at), random);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        found += opposite(f[i], r[i]);
        f[i] = kDrop ? rule.by_chance(f[i], r[i], random[i / 4].word[i % 4]) : rule.by_sign(f[i], r[i]);
      }
      f_row.template store<kCode>(at, n, f);
    });
    return found;
  }

  UK_DEVICE bool skips() const {
    bool finite = true;
    for (int i = 0; total != nullptr && i < 4; ++i) finite = finite && total[i] - total[i] == 0;
    return !finite;
  }

  UK_DEVICE void operator()(int64_t task, Shared& shared) const {
    const bool skip = skips();
    each_thread([&](int t) {
      if (t == 0) shared.clashes = 0;
    });
    if (!skip) {
      const int64_t position = lists.positions[task];
      const bool wide = kCode == kAny && (lists.codes[position] == kF64 || lists.codes[lists.count + position] == kF64);
      each_thread([&](int t) {
        const unsigned mine = wide ? act<double>(task, t) : act<float>(task, t);
        if (mine > 0) count_up(&shared.clashes, (unsigned long long)mine);
      });
    }
    each_thread([&](int t) {
      if (t == 0) clashes[task] = skip ? double(NAN) : double(shared.clashes);
    });
  }
};

// Two lists, then code, numbering, total or 0, numbers, seed, drop, drops_clashes, adds, clashes (tasks,), firsts,
// segments, out (segments,).
inline void elements(Arguments a, Stream stream) {
  const Lists lists(a);
  const int64_t code = a.number();
  const int64_t* numbering = a.pointer<int64_t>();
  const double *total = a.pointer<double>(), *numbers = a.pointer<double>();
  const int64_t seed = a.number(), drop = a.number(), drops_clashes = a.number(), adds = a.number();
  double* clashes = a.pointer<double>();
  const int64_t* firsts = a.pointer<int64_t>();
  const int64_t segments = a.number();
  const auto made_of = [&](auto chunk) { chunk(lists, numbering, total, numbers, seed, drops_clashes, adds, clashes); };
  const auto run = [&](auto body) { launch(body, lists.tasks, stream); };
  made_of([&](auto... x) {
    if (code == kF32)
      drop ? run(ElementsChunk<kF32, true>{x...}) : run(ElementsChunk<kF32, false>{x...});
    else if (code == kBf16)
      drop ? run(ElementsChunk<kBf16, true>{x...}) : run(ElementsChunk<kBf16, false>{x...});
    else
      drop ? run(ElementsChunk<kAny, true>{x...}) : run(ElementsChunk<kAny, false>{x...});
  });
  launch(SegmentSum{clashes, firsts, 1, lists.tasks, a.pointer<double>()}, segments, stream);
}

}  // namespace uk::cuda
