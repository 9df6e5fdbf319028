// The best of many scores, as keys: whole numbers that are all different, greater is better, 0 is none.
#pragma once
#include "cuda/elements.cuh"

namespace uk::cuda {

// Score bits above 32 bits of the index.
template <class T>
struct Ranks;
template <>
struct Ranks<float> {
  using Bits = uint32_t;
  using Key = uint64_t;
};
template <>
struct Ranks<double> {
  using Bits = uint64_t;
  using Key = unsigned __int128;
};

// NaN is above every number, 0 and -0 are equal; equal scores by index, below 2^32 - 1.
template <class T>
UK_DEVICE typename Ranks<T>::Key ranked(T score, int64_t index, bool largest) {
  using Bits = typename Ranks<T>::Bits;
  constexpr Bits kTop = Bits(1) << (8 * sizeof(Bits) - 1);
  Bits bits;
  memcpy(&bits, &score, sizeof bits);
  if (score == 0) bits = 0;
  if (score != score) bits = Bits(~kTop);
  const Bits rising = bits & kTop ? Bits(~bits) : Bits(bits | kTop);
  return typename Ranks<T>::Key(largest ? rising : Bits(~rising)) << 32 | uint32_t(0xffffffff - index);
}

// The score of a key.
template <class T>
UK_DEVICE T score_of(typename Ranks<T>::Key key, bool largest) {
  using Bits = typename Ranks<T>::Bits;
  constexpr Bits kTop = Bits(1) << (8 * sizeof(Bits) - 1);
  const Bits rising = largest ? Bits(key >> 32) : Bits(~Bits(key >> 32));
  const Bits bits = rising & kTop ? Bits(rising ^ kTop) : Bits(~rising);
  T score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

template <class Key>
struct Selection {
  Key prefix;
  uint32_t bins[kThreads], ranges[16];
  uint32_t left, kept, whole;
};

// The bin of the last key that is taken: `left` of its keys are; `whole` if those are all.
template <class Key>
UK_DEVICE void choose_bin(Selection<Key>& s) {
  uint32_t left = s.left;
  int range = 15;
  for (; range > 0 && left > s.ranges[range]; --range) left -= s.ranges[range];
  int bin = range * 16 + 15;
  for (; bin > range * 16 && left > s.bins[bin]; --bin) left -= s.bins[bin];
  s.prefix = s.prefix << 8 | unsigned(bin);
  s.left = left;
  s.whole = s.bins[bin] == left;
}

// Moves the `most` best of more keys to the front, in any order; so many of them are not 0. Returns a bound, not 0, that
// no other key is above and none of them below.
template <class Key, class Keys>
UK_DEVICE Key keep_best(const Keys& keys, int64_t count, int64_t most, Selection<Key>& s) {
  constexpr int kBits = 8 * sizeof(Key);
  each_thread([&](int t) {
    if (t > 0) return;
    s.prefix = 0;
    s.left = uint32_t(most);
    s.kept = s.whole = 0;
  });
  int shift = kBits;
  while (!s.whole && shift > 0) {
    shift -= 8;
    each_thread([&](int t) { s.bins[t] = 0; });
    each_thread([&](int t) {
      for (int64_t i = t; i < count; i += kThreads) {
        const Key key = keys[i];
        if (shift + 8 == kBits || key >> (shift + 8) % kBits == s.prefix)
          count_up(&s.bins[unsigned(key >> shift) & 255], 1u);
      }
    });
    each_thread([&](int t) {
      if (t >= 16) return;
      uint32_t sum = 0;
      for (int i = 0; i < 16; ++i) sum += s.bins[16 * t + i];
      s.ranges[t] = sum;
    });
    each_thread([&](int t) {
      if (t == 0) choose_bin(s);
    });
  }
  const Key bound = s.prefix << shift;
  for (int64_t first = 0; first < count; first += kThreads) {
    PerThread<Key> mine;
    each_thread([&](int t) { mine[t] = first + t < count ? keys[first + t] : Key(0); });
    each_thread([&](int t) {
      if (mine[t] >= bound) keys[take_up(&s.kept, 1u)] = mine[t];
    });
  }
  return bound;
}

// Puts the best first: a bitonic network in which what is missing is worst.
template <class Key, class Keys>
UK_DEVICE void sort_down(const Keys& keys, int64_t count) {
  for (int64_t size = 2; size / 2 < count; size *= 2)
    for (int64_t stride = size / 2; stride > 0; stride /= 2)
      each_thread([&](int t) {
        for (int64_t pair = t;; pair += kThreads) {
          const int64_t a = (pair & -stride) * 2 + (pair & (stride - 1));
          const int64_t b = stride == size / 2 ? a ^ (size - 1) : a + stride;
          if (a >= count) break;
          if (b >= count) continue;
          const Key left = keys[a], right = keys[b];
          if (left >= right) continue;
          keys[a] = right;
          keys[b] = left;
        }
      });
}

}  // namespace uk::cuda
