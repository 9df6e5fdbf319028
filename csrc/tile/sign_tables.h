// Sums of +-x over few terms by table ("the method of the four Russians"): for every group of 4 coordinates the 16
// signed sums are made once, and each output adds one of them instead of 4 multiply-adds. Lanes run over samples.
// Additions are in the same order whatever the number of lanes: a sample has the same bits in every batch and ISA.
namespace UK_ISA {

// kVectors vectors of samples; tables of 64 coordinates, so that one 64-bit word holds an output's signs.
template <int kVectors>
struct SignTables {
  static constexpr int kWidth = kVectors * kLanes<float>;
  static constexpr int kCoordinates = 64;
  static constexpr int kGroups = kCoordinates / 4;
  static constexpr int kSize = kGroups * 16 * kWidth;
  static constexpr int kAtOnce = 8 / kVectors;  // outputs: 8 sums in registers hide the latency of an addition

  // x is [64][kWidth]; table becomes [16 groups][16 sign patterns][kWidth].
  static void build(const float* x, float* table) {
    constexpr int W = kLanes<float>;
    for (int group = 0; group < kGroups; ++group, x += 4 * kWidth, table += 16 * kWidth)
      for (int v = 0; v < kWidth; v += W) {
        const Vec<float> a = load(x + v), b = load(x + kWidth + v);
        const Vec<float> c = load(x + 2 * kWidth + v), d = load(x + 3 * kWidth + v);
        const Vec<float> low[4] = {-a - b, a - b, b - a, a + b}, high[4] = {-c - d, c - d, d - c, c + d};
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) store(table + i * kWidth + v, low[i % 4] + high[i / 4]);
      }
  }

  // sums[j] += signed sum of the 64 coordinates, for `outputs` (a multiple of kAtOnce) sign words.
  static void add(const uint64_t* words, const float* table, int64_t outputs, float* sums) {
    for (int64_t j = 0; j < outputs; j += kAtOnce) add_few(words + j, table, sums + j * kWidth);
  }

 private:
  static void add_few(const uint64_t* words, const float* table, float* sums) {
    constexpr int W = kLanes<float>, N = kAtOnce;
    constexpr int kEntryBits = __builtin_ctz(kWidth * sizeof(float));
    constexpr uint64_t kMask = uint64_t(15) << kEntryBits;
    Vec<float> sum[N][kVectors];
    uint64_t word[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      word[n] = words[n];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[n][v] = load(sums + n * kWidth + v * W);
    }
#pragma GCC unroll 16
    for (int group = 0; group < kGroups; ++group) {
      // Keeps the compiler from working out all offsets first and spilling them.
      std::atomic_signal_fence(std::memory_order_seq_cst);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const int shift = 4 * group - kEntryBits;
        const uint64_t offset = (shift < 0 ? word[n] << (-shift & 63) : word[n] >> (shift & 63)) & kMask;
        const float* entry = table + group * 16 * kWidth + offset / sizeof(float);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[n][v] += load(entry + v * W);
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store(sums + n * kWidth + v * W, sum[n][v]);
  }
};

}  // namespace UK_ISA
