// The best of a stream of scored rows, and the epilogue that feeds it from register tiles.
namespace UK_ISA {

// NaN is above every number, as in torch.topk; equal values are ordered by index.
template <class T>
struct Scored {
  T value;
  int64_t index;
};

template <class T, bool kLargest>
inline bool before(const Scored<T>& a, const Scored<T>& b) {
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan == kLargest;
  if (!a_nan && a.value != b.value) return (a.value > b.value) == kLargest;
  return a.index < b.index;
}

// The `capacity` best of what was pushed, in whatever order it came: a heap with the last of them on top.
template <class T, bool kLargest>
struct Ranking {
  Scored<T>* heap;
  int64_t capacity;
  int64_t count = 0;

  // A score x that fails `passes(x)` cannot enter; NaN lets all pass.
  T threshold() const { return count < capacity ? T(NAN) : heap[0].value; }

  void push(const Scored<T>& x) {
    if (count < capacity) {
      int64_t at = count++;
      for (; at > 0 && before<T, kLargest>(heap[(at - 1) / 2], x); at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
      heap[at] = x;
    } else if (before<T, kLargest>(x, heap[0])) {
      sink(x, count);
    }
  }

  // Leaves the heap sorted, best first.
  void sort() {
    for (int64_t size = count; size > 1;) {
      const Scored<T> last = heap[0];
      --size;
      sink(heap[size], size);
      heap[size] = last;
    }
  }

 private:
  // Puts x in the place of the top of a heap of `size`.
  void sink(const Scored<T>& x, int64_t size) {
    int64_t at = 0;
    for (int64_t child = 1; child < size; child = 2 * at + 1) {
      if (child + 1 < size && before<T, kLargest>(heap[child], heap[child + 1])) ++child;
      if (!before<T, kLargest>(x, heap[child])) break;
      heap[at] = heap[child];
      at = child;
    }
    heap[at] = x;
  }
};

// C = A B, rows of a store by queries; finished register tiles go to a ranking a query.
template <class T, bool kLargest>
struct Rank {
  T* c;
  int64_t ldc, rows, queries, first_index;
  Ranking<T, kLargest>* rankings;
  T* thresholds;   // of the rankings, a lane each
  bool long_sums;  // adds up the blocks of the reduction apart, so that no chain of additions is long

  template <class P, class Rows>
  void tile(Rows a, const P* b, int64_t depth, int64_t i, int64_t j, bool first, bool last) {
    constexpr int R = Block<T>::kRows, N = Block<T>::kCols, W = kLanes<T>;
    T* at = c + i * ldc + j;
    if (first || !long_sums) {
      micro_kernel(depth, a, b, at, ldc, !first);
    } else {
      alignas(64) T part[R * N];
      micro_kernel(depth, a, b, part, N, false);
      for (int r = 0; r < R; ++r)
        for (int w = 0; w < N; w += W) store(at + r * ldc + w, load(at + r * ldc + w) + load(part + r * N + w));
    }
    if (last && any_passes(at, j)) offer(at, i, j);
  }

 private:
  // Whether any element of a register tile may enter its ranking.
  bool any_passes(const T* at, int64_t j) const {
    constexpr int W = kLanes<T>;
    typedef decltype(Vec<T>{} < Vec<T>{}) Mask;
    Mask out = ~Mask{};
    for (int w = 0; w < Block<T>::kCols; w += W) {
      const Vec<T> limit = load(thresholds + j + w);
      for (int r = 0; r < Block<T>::kRows; ++r) {
        const Vec<T> x = load(at + r * ldc + w);
        out &= kLargest ? x < limit : x > limit;
      }
    }
    uint64_t words[sizeof out / 8], all = ~uint64_t(0);
    std::memcpy(words, &out, sizeof out);
    for (uint64_t word : words) all &= word;
    return all != ~uint64_t(0);
  }

  void offer(const T* at, int64_t i, int64_t j) const {
    for (int64_t q = j; q < queries && q < j + Block<T>::kCols; ++q) {
      for (int64_t r = 0; r < Block<T>::kRows && i + r < rows; ++r)
        rankings[q].push({at[r * ldc + q - j], first_index + i + r});
      thresholds[q] = rankings[q].threshold();
    }
  }
};

}  // namespace UK_ISA
