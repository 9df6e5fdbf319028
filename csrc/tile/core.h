// The register-blocked product that every tile operator is built on.
//
// A tile C (rows x cols, row-major in cache) is accumulated over blocks of the reduction dimension:
//   pack B (kc x cols) -> for each sub-block of rows: pack A (kc x kRowBlock) -> micro-kernels.
// Panels are packed in strips, [strip][k][lane], zero-padded to whole strips, so the micro-kernel has
// no edges. Rows of A that lie along the reduction are broadcast from where they are, without a panel.
// Each element of C is a sum of sums over blocks of k, in order, whatever the tile or thread: the same
// bits, and rounding errors that grow with the length of a block instead of the whole reduction.
namespace UK_ISA {

template <class P>
struct Block {
  static constexpr int kVectors = 2;
  static constexpr int kRows = UK_BITS == 512 ? 14 : 6;
  static constexpr int kCols = kVectors * kLanes<Sum<P>>;
  // Steps of a block. A pair of bf16 takes two additions, and no chain of them shall be longer for it.
  static constexpr int kDepth = (UK_BITS == 512 ? 192 : 256) / (std::is_same_v<P, Bf16Pair> ? 2 : 1);
  static constexpr int kRowBlock = UK_BITS == 512 ? 112 : 96;
};

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The rows of a register tile where they lie in memory. A base for every five of them: multiples of the stride up
// to 4 need no further registers.
template <class P>
struct RowsInPlace {
  static constexpr int kBases = (Block<P>::kRows + 4) / 5;
  const P* base[kBases];
  int64_t stride;  // from row to row, in P

  RowsInPlace(const P* at, int64_t stride) : stride(stride) {
    for (int n = 0; n < kBases; ++n) base[n] = at + 5 * n * stride;
  }
  [[gnu::always_inline]] P operator[](int i) const { return base[i / 5][i % 5 * stride]; }
};

// To the next step of the reduction.
template <class P>
inline void next(const P*& packed) {
  packed += Block<P>::kRows;
}
template <class P>
inline void next(RowsInPlace<P>& rows) {
  for (const P*& base : rows.base) ++base;
}

#if UK_X86 && UK_BITS == 512
#pragma GCC push_options
#pragma GCC target("avx512bf16")
#endif

inline Vec<float> multiply_add(float a, Vec<float> b, Vec<float> c) { return fma<float>(spread(&a), b, c); }
inline Vec<double> multiply_add(double a, Vec<double> b, Vec<double> c) { return fma<double>(spread(&a), b, c); }

// c + a.first * b.first + a.second * b.second; the instruction flushes subnormals.
inline Vec<float> multiply_add(Bf16Pair a, Vec<float> b, Vec<float> c) {
#if UK_X86 && UK_BITS == 512
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(int(bits)), (__m512bh)b);
#else
  typedef typename VectorOf<uint32_t, kLanes<float>>::type Word;
  const Vec<float> low = (Vec<float>)((Word)b << 16), high = (Vec<float>)((Word)b & 0xffff0000u);
  return fma<float>(splat(widen(a.first)), low, fma<float>(splat(widen(a.second)), high, c));
#endif
}

inline Vec<float> load_panel(const Bf16Pair* p) { return load(reinterpret_cast<const float*>(p)); }
inline Vec<float> load_panel(const float* p) { return load(p); }
inline Vec<double> load_panel(const double* p) { return load(p); }

// c (+)= a^T b over `depth` steps; one register tile. Rows are a packed strip, const P*, or RowsInPlace<P>.
template <class P, class Rows>
[[gnu::noinline]] void micro_kernel(int64_t depth, Rows a, const P* b, Sum<P>* c, int64_t ldc, bool accumulate) {
  using T = Sum<P>;
  constexpr int R = Block<P>::kRows, N = Block<P>::kVectors, W = kLanes<T>;
  Vec<T> acc[R][N];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) acc[i][j] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> bk[N];
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) bk[j] = load_panel(b + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) acc[i][j] = multiply_add(a[i], bk[j], acc[i][j]);
    next(a);
    b += N * W;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j)
      store(c + i * ldc + j * W, accumulate ? load(c + i * ldc + j * W) + acc[i][j] : acc[i][j]);
}

#if UK_X86 && UK_BITS == 512
#pragma GCC pop_options
#endif

}  // namespace UK_ISA
