// Projection by random signs that are made in registers.
#pragma once
#include <type_traits>

#include "cuda/elements.cuh"
#include "cuda/random.cuh"

namespace uk::cuda {

// parts[b, j, part] = g[b] times the signs of row j over `length` coordinates. A thread has two rows of signs and the
// sums of kSamples samples; the block shares 128 coordinates of those samples.
template <class T>
struct SignSums {
  static constexpr int kSamples = 16, kCoordinates = 128, kRows = 2, kRun = 2048;
  static constexpr int kPitch = kSamples + int(16 / sizeof(T));  // rows of 16 bytes more: fewer threads meet in a bank
  struct Shared {
    alignas(16) T x[kCoordinates][kPitch];
  };
  int64_t g;  // the address
  int code;
  int64_t batch, dim, outputs, seed, length, g_b, g_d, sample_tiles, row_tiles, count;
  const int64_t* blocks;  // of coordinates that the columns are, or none
  T* parts;

  struct Sums {
    T of[kRows][kSamples];
  };

  UK_DEVICE void fetch(int64_t first, int64_t begin, int64_t end, int t, Shared& shared) const {
    for (int i = t; i < kCoordinates * kSamples; i += kThreads) {
      const int64_t c = i % kCoordinates, sample = first + i / kCoordinates;
      T x = T(0);
      if (sample < batch && begin + c < end)
        with_type<kAny>(g, code, [&](auto* base) { x = T(widened(base[sample * g_b + (begin + c) * g_d])); });
      shared.x[c][i / kCoordinates] = x;
    }
  }

  UK_DEVICE void operator()(int64_t block, Shared& shared) const {
    const int64_t part = block / (sample_tiles * row_tiles), tile = block % (sample_tiles * row_tiles);
    const int64_t first = tile / row_tiles * kSamples, row = tile % row_tiles * kThreads * kRows;
    const int64_t begin = part * length, end = begin + length < dim ? begin + length : dim;
    PerThread<Sums> sums, run;
    each_thread([&](int t) { sums[t] = run[t] = Sums{}; });
    for (int64_t at = begin; at < end; at += kCoordinates) {
      each_thread([&](int t) { fetch(first, at, end, t, shared); });
      each_thread([&](int t) {
        const int64_t place = at / kCoordinates, call = blocks ? blocks[place] : place;
        Words signs[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          signs[r] = philox({{uint32_t(row + r * kThreads + t), uint32_t(call), 0, 0}}, uint64_t(seed));
#pragma unroll
        for (int w = 0; w < 4; ++w)
          for (int bit = 0; bit < 32; ++bit) {
            const T* x = shared.x[32 * w + bit];
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              const T sign = signs[r].word[w] >> bit & 1 ? T(1) : T(-1);
#pragma unroll
              for (int s = 0; s < kSamples; ++s) run[t].of[r][s] += sign * x[s];
            }
          }
        if ((at + kCoordinates - begin) % kRun != 0 && at + kCoordinates < end) return;
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int s = 0; s < kSamples; ++s) {
            sums[t].of[r][s] += run[t].of[r][s];
            run[t].of[r][s] = T(0);
          }
      });
    }
    each_thread([&](int t) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t j = row + r * kThreads + t;
#pragma unroll
        for (int s = 0; s < kSamples; ++s)
          if (j < outputs && first + s < batch) parts[((first + s) * outputs + j) * count + part] = sums[t].of[r][s];
      }
    });
  }
};

// g, code, batch, dim, outputs, seed, length, g_b, g_d, blocks or 0, parts (batch * outputs, count).
inline void sign_sums(Arguments a, Stream stream) {
  const int64_t g = a.number(), code = a.number(), batch = a.number(), dim = a.number(), outputs = a.number(),
                seed = a.number(), length = a.number(), g_b = a.number(), g_d = a.number();
  const int64_t* blocks = a.pointer<int64_t>();
  const int64_t sample_tiles = (batch + 15) / 16, row_tiles = (outputs + 2 * kThreads - 1) / (2 * kThreads);
  const int64_t count = (dim + length - 1) / length, tasks = count * sample_tiles * row_tiles;
  const auto run = [&](auto* parts) {
    using T = std::remove_reference_t<decltype(*parts)>;
    launch(SignSums<T>{g, int(code), batch, dim, outputs, seed, length, g_b, g_d, sample_tiles, row_tiles, count, blocks,
                       parts},
           tasks, stream);
  };
  code == kF64 ? run(a.pointer<double>()) : run(a.pointer<float>());
}

}  // namespace uk::cuda
