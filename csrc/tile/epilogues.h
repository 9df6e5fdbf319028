// Epilogues: what is done with the accumulator tile while it is in registers or the nearest cache.
namespace UK_ISA {

// C = A B, in a cache tile or straight in memory that has room for whole register tiles.
template <class T>
struct Accumulate {
  T* c;
  int64_t ldc;

  template <class P, class Rows>
  void tile(Rows a, const P* b, int64_t depth, int64_t i, int64_t j, bool first, bool) const {
    micro_kernel(depth, a, b, c + i * ldc + j, ldc, !first);
  }
};

// C += A B in memory that has room for whole register tiles; from zero when `fresh`.
template <class T>
struct AddTo {
  T* c;
  int64_t ldc;
  bool fresh;

  template <class P, class Rows>
  void tile(Rows a, const P* b, int64_t depth, int64_t i, int64_t j, bool first, bool) const {
    micro_kernel(depth, a, b, c + i * ldc + j, ldc, !(first && fresh));
  }
};

// sum of x(r, c) over the part of a register tile that lies inside a rows x cols tile; `vector` gives
// whole vectors, `scalar` single elements where lanes are padding (which holds 0 * inf, not always 0).
template <class T, class VectorTerm, class ScalarTerm>
double sum_inside(int64_t rows, int64_t cols, VectorTerm&& vector, ScalarTerm&& scalar) {
  constexpr int64_t R = Block<T>::kRows, N = Block<T>::kCols;
  Vec<T> sums{};
  if (rows >= R && cols >= N) {
    for (int64_t r = 0; r < R; ++r)
      for (int64_t w = 0; w < N; w += kLanes<T>) sums = vector(r, w, sums);
    return sum_lanes<T>(sums);
  }
  double sum = 0;
  for (int64_t r = 0; r < (rows < R ? rows : R); ++r)
    for (int64_t w = 0; w < (cols < N ? cols : N); ++w) sum += scalar(r, w);
  return sum;
}

// sum += sum of C^2, C = A B.
template <class T>
struct SquareSum {
  T* c;
  int64_t ldc, rows, cols;
  double sum = 0;

  template <class P, class Rows>
  void tile(Rows a, const P* b, int64_t depth, int64_t i, int64_t j, bool first, bool last) {
    const T* at = c + i * ldc + j;
    micro_kernel(depth, a, b, c + i * ldc + j, ldc, !first);
    if (!last) return;
    sum += sum_inside<T>(
        rows - i, cols - j,
        [&](int64_t r, int64_t w, Vec<T> acc) { return fma<T>(load(at + r * ldc + w), load(at + r * ldc + w), acc); },
        [&](int64_t r, int64_t w) { return double(at[r * ldc + w]) * at[r * ldc + w]; });
  }
};

// sum += <weights, A B>, by blocks of the reduction: the second product is never stored.
template <class T>
struct HadamardSum {
  const T* weights;
  int64_t ldw, rows, cols;
  double sum = 0;

  template <class P, class Rows>
  void tile(Rows a, const P* b, int64_t depth, int64_t i, int64_t j, bool, bool) {
    constexpr int N = Block<T>::kCols;
    alignas(64) T local[Block<T>::kRows * N];
    micro_kernel(depth, a, b, local, N, false);
    const T* w = weights + i * ldw + j;
    sum += sum_inside<T>(
        rows - i, cols - j,
        [&](int64_t r, int64_t c, Vec<T> acc) { return fma<T>(load(local + r * N + c), load(w + r * ldw + c), acc); },
        [&](int64_t r, int64_t c) { return double(local[r * N + c]) * w[r * ldw + c]; });
  }
};

// Runs `inner` only on register tiles that reach the diagonal or lie above it. `offset` is the
// distance of the tile's first column from its first row.
template <class T, class Inner>
struct UpperTriangle {
  Inner inner;
  int64_t offset;

  template <class P, class Rows>
  void tile(Rows a, const P* b, int64_t depth, int64_t i, int64_t j, bool first, bool last) {
    if (j + Block<T>::kCols - 1 + offset >= i) inner.tile(a, b, depth, i, j, first, last);
  }
};

}  // namespace UK_ISA
