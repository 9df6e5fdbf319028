// Masks of exactly k elements of largest magnitude by radix selection, ties by place. Keys as on the CPU: the bits of
// |x| plus one, 0 for NaN. Counts are whole numbers, so atomic additions leave no choice of bits.
#pragma once
#include "cuda/elements.cuh"

namespace uk::cuda {

constexpr int kBins = 2048;

UK_DEVICE uint64_t key_of(float x) {
  const uint32_t magnitude = bits_of(x) & 0x7fffffff;
  return magnitude > 0x7f800000 ? 0 : uint64_t(magnitude) + 1;
}
UK_DEVICE uint64_t key_of(double x) {
  uint64_t magnitude;
  memcpy(&magnitude, &x, sizeof x);
  magnitude &= ~(uint64_t(1) << 63);
  return magnitude > 0x7ff0000000000000 ? 0 : magnitude + 1;
}

// Calls f(at, n, keys) for each group of thread t.
template <class T, class F>
UK_DEVICE void each_key(const Lists& lists, int64_t task, int t, const F& f) {
  const Row row(lists, 0, lists.positions[task]);
  each_group(lists, task, t, [&](int64_t at, int n) {
    T x[kGroup];
    uint64_t keys[kGroup];
    row.template load<kAny>(at, n, x);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) keys[i] = key_of(x[i]);
    f(at, n, keys);
  });
}

// histograms[mask] += of the digit from bit `shift` on, of the keys that begin with the mask's prefix.
template <class T>
struct DigitCounts {
  struct Shared {
    uint32_t bins[kBins];
  };
  Lists lists;
  int64_t above, shift, first;
  const int64_t* prefixes;
  unsigned long long* histograms;

  UK_DEVICE void operator()(int64_t block, Shared& shared) const {
    const int64_t task = block % lists.tasks, mask = block / lists.tasks;
    each_thread([&](int t) {
      for (int i = t; i < kBins; i += kThreads) shared.bins[i] = 0;
    });
    each_thread([&](int t) {
      const uint64_t prefix = uint64_t(prefixes[mask]), digits = (uint64_t(1) << (above - shift)) - 1;
      each_key<T>(lists, task, t, [&](int64_t, int n, const uint64_t* keys) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          if (i < n && (first || keys[i] >> above == prefix)) count_up(&shared.bins[keys[i] >> shift & digits], 1u);
      });
    });
    each_thread([&](int t) {
      for (int i = t; i < kBins; i += kThreads)
        if (shared.bins[i]) count_up(&histograms[mask * kBins + i], (unsigned long long)shared.bins[i]);
    });
  }
};

// Moves a mask's prefix to the bin of its last element, and `takes` to how many of that bin it takes.
struct ChooseBin {
  static constexpr int kEach = kBins / kThreads;
  struct Shared {
    int64_t sums[kThreads];
  };
  const unsigned long long* histograms;
  int64_t together, width;  // together: one histogram for all masks
  int64_t *prefixes, *takes;

  UK_DEVICE void operator()(int64_t mask, Shared& shared) const {
    const unsigned long long* counts = histograms + (together ? 0 : mask * kBins);
    each_thread([&](int t) {
      int64_t sum = 0;
      for (int i = 0; i < kEach; ++i) sum += int64_t(counts[t * kEach + i]);
      shared.sums[t] = sum;
    });
    each_thread([&](int t) {
      if (t > 0) return;
      int64_t left = takes[mask];
      int bin = 0;
      if (left > 0) {
        int range = kThreads - 1;
        for (; range > 0 && left > shared.sums[range]; --range) left -= shared.sums[range];
        bin = range * kEach + kEach - 1;
        for (; bin > range * kEach && left > int64_t(counts[bin]); --bin) left -= int64_t(counts[bin]);
      }
      prefixes[mask] = int64_t(uint64_t(prefixes[mask]) << width | uint64_t(bin));
      takes[mask] = left;
    });
  }
};

// ties[mask, task]: elements of a chunk whose key is the mask's.
template <class T>
struct TieCounts {
  struct Shared {
    unsigned long long count;
  };
  Lists lists;
  const int64_t* cuts;
  int64_t* ties;

  UK_DEVICE void operator()(int64_t block, Shared& shared) const {
    const int64_t task = block % lists.tasks, mask = block / lists.tasks;
    each_thread([&](int t) {
      if (t == 0) shared.count = 0;
    });
    each_thread([&](int t) {
      unsigned long long mine = 0;
      each_key<T>(lists, task, t, [&](int64_t, int n, const uint64_t* keys) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) mine += i < n && keys[i] == uint64_t(cuts[mask]);
      });
      if (mine) count_up(&shared.count, mine);
    });
    each_thread([&](int t) {
      if (t == 0) ties[block] = int64_t(shared.count);
    });
  }
};

// Writes the masks: keys above the cut, and of the equal ones the first; `before` of them are in earlier chunks.
template <class T>
struct TakeChunk {
  struct Shared {
    int64_t equal[kThreads];
  };
  Lists lists;
  const int64_t *cuts, *takes, *before, *outs;
  int64_t bits;

  UK_DEVICE void put(int64_t address, int64_t at, int n, uint32_t taken) const {
    uint8_t* out = reinterpret_cast<uint8_t*>(address);
    if (bits) {
      out[at / kGroup] = uint8_t(taken);
    } else {
      for (int i = 0; i < n; ++i) out[at + i] = taken >> i & 1;
    }
  }

  UK_DEVICE void operator()(int64_t block, Shared& shared) const {
    const int64_t task = block % lists.tasks, mask = block / lists.tasks;
    const int64_t out = outs[mask * lists.count + lists.positions[task]];
    const uint64_t cut = uint64_t(cuts[mask]);
    const bool any = takes[mask] > 0;
    int64_t left = takes[mask] - before[block];
    const int64_t start = lists.starts[task], stop = lists.stops[task];
    const Row row(lists, 0, lists.positions[task]);
    for (int64_t first = start; first < stop; first += kThreads * kGroup) {
      PerThread<uint32_t> above, equal;
      each_thread([&](int t) {
        const int64_t at = first + int64_t(t) * kGroup;
        const int n = at < stop ? (stop - at < kGroup ? int(stop - at) : kGroup) : 0;
        T x[kGroup];
        row.template load<kAny>(at, n, x);
        uint32_t more = 0, same = 0;
        int64_t count = 0;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const uint64_t key = key_of(x[i]);
          more |= uint32_t(i < n && any && key > cut) << i;
          same |= uint32_t(i < n && key == cut) << i;
          count += i < n && key == cut;
        }
        above[t] = more;
        equal[t] = same;
        shared.equal[t] = count;
      });
      for (int step = 1; step < kThreads; step *= 2) {
        PerThread<int64_t> earlier;
        each_thread([&](int t) { earlier[t] = t >= step ? shared.equal[t - step] : 0; });
        each_thread([&](int t) { shared.equal[t] += earlier[t]; });
      }
      each_thread([&](int t) {
        const int64_t at = first + int64_t(t) * kGroup;
        if (at >= stop) return;
        int64_t rest = left - (t > 0 ? shared.equal[t - 1] : 0);
        uint32_t taken = above[t];
        for (int i = 0; i < kGroup; ++i)
          if (equal[t] >> i & 1 && rest-- > 0) taken |= 1u << i;
        put(out, at, stop - at < kGroup ? int(stop - at) : kGroup, taken);
      });
      left -= shared.equal[kThreads - 1];
      each_thread([](int) {});  // all have read the count
    }
  }
};

// Lists, then masks, single, above, shift, first, prefixes, takes, histograms (masks or 1, 2048), zero.
inline void mask_digit(Arguments a, Stream stream) {
  const Lists lists(a);
  const int64_t masks = a.number();
  const bool single = a.number() != 0;
  const int64_t above = a.number(), shift = a.number(), first = a.number();
  int64_t *prefixes = a.pointer<int64_t>(), *takes = a.pointer<int64_t>();
  unsigned long long* histograms = a.pointer<unsigned long long>();
  const int64_t blocks = lists.tasks * (first ? 1 : masks);
  if (single)
    launch(DigitCounts<float>{lists, above, shift, first, prefixes, histograms}, blocks, stream);
  else
    launch(DigitCounts<double>{lists, above, shift, first, prefixes, histograms}, blocks, stream);
  launch(ChooseBin{histograms, first, above - shift, prefixes, takes}, masks, stream);
}

// Lists, then masks, single, cuts, ties (masks, tasks).
inline void mask_ties(Arguments a, Stream stream) {
  const Lists lists(a);
  const int64_t masks = a.number();
  const bool single = a.number() != 0;
  const int64_t* cuts = a.pointer<int64_t>();
  int64_t* ties = a.pointer<int64_t>();
  if (single)
    launch(TieCounts<float>{lists, cuts, ties}, lists.tasks * masks, stream);
  else
    launch(TieCounts<double>{lists, cuts, ties}, lists.tasks * masks, stream);
}

// Lists, then masks, single, cuts, takes, before (masks, tasks), outs (masks, count), bits.
inline void mask_take(Arguments a, Stream stream) {
  const Lists lists(a);
  const int64_t masks = a.number();
  const bool single = a.number() != 0;
  const int64_t *cuts = a.pointer<int64_t>(), *takes = a.pointer<int64_t>(), *before = a.pointer<int64_t>(),
                *outs = a.pointer<int64_t>(), bits = a.number();
  if (single)
    launch(TakeChunk<float>{lists, cuts, takes, before, outs, bits}, lists.tasks * masks, stream);
  else
    launch(TakeChunk<double>{lists, cuts, takes, before, outs, bits}, lists.tasks * masks, stream);
}

}  // namespace uk::cuda
