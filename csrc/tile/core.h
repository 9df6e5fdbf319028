// The register-blocked product that every tile operator is built on.
//
// A tile C (rows x cols, row-major in cache) is accumulated over blocks of the reduction dimension:
//   pack B (kc x cols) -> for each sub-block of rows: pack A (kc x kRowBlock) -> micro-kernels.
// Panels are packed in strips, [strip][k][lane], zero-padded to whole strips, so the micro-kernel has
// no edges. Each element of C is summed in the order of k whatever the tile or thread: the same bits.
namespace UK_ISA {

template <class T>
struct Block {
  static constexpr int kVectors = 2;
  static constexpr int kRows = UK_BITS == 512 ? 14 : 6;
  static constexpr int kCols = kVectors * kLanes<T>;
  static constexpr int kDepth = UK_BITS == 512 ? 192 : 256;
  static constexpr int kRowBlock = UK_BITS == 512 ? 112 : 96;
};

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// c (+)= a^T b over `depth` packed steps; one register tile.
template <class T>
inline void micro_kernel(int64_t depth, const T* a, const T* b, T* c, int64_t ldc, bool accumulate) {
  constexpr int R = Block<T>::kRows, N = Block<T>::kVectors, W = kLanes<T>;
  Vec<T> acc[R][N];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) acc[i][j] = accumulate ? load(c + i * ldc + j * W) : Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> bk[N];
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) bk[j] = load(b + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vec<T> ai = splat(a[i]);
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) acc[i][j] = fma<T>(ai, bk[j], acc[i][j]);
    }
    a += R;
    b += N * W;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) store(c + i * ldc + j * W, acc[i][j]);
}

}  // namespace UK_ISA
