// One tile of a product: packs panels from two sources and hands every register tile to an epilogue.
// An epilogue is any type with
//   void tile(const T* a, const T* b, int64_t depth, int64_t i, int64_t j, bool first, bool last)
// called for each register tile at (i, j) of the tile, once per block of the reduction.
namespace UK_ISA {

// Panels of one worker: kRowBlock x kDepth of A, kDepth x cols of B.
template <class T>
struct Panels {
  T* a;
  T* b;

  static constexpr int64_t kA = Block<T>::kRowBlock * Block<T>::kDepth;
  static int64_t size(int64_t cols) { return kA + round_up(cols, Block<T>::kCols) * Block<T>::kDepth; }
  explicit Panels(T* memory) : a(memory), b(memory + kA) {}
};

struct Range {
  int64_t begin;
  int64_t size;
};

template <class T, class SourceA, class SourceB, class Epilogue>
void product(const SourceA& a, Range rows, const SourceB& b, Range cols, int64_t depth, const Panels<T>& panels,
             Epilogue&& epilogue) {
  using B = Block<T>;
  int64_t k = 0;
  do {  // once even for an empty reduction: its result is zeros
    const int64_t steps = depth - k < B::kDepth ? depth - k : B::kDepth;
    const bool first = k == 0, last = k + steps == depth;
    b.template pack<T, B::kCols>(panels.b, cols.begin, cols.size, k, steps);
    for (int64_t block = 0; block < rows.size; block += B::kRowBlock) {
      const int64_t height = rows.size - block < B::kRowBlock ? rows.size - block : B::kRowBlock;
      a.template pack<T, B::kRows>(panels.a, rows.begin + block, height, k, steps);
      for (int64_t j = 0; j < cols.size; j += B::kCols)
        for (int64_t i = 0; i < height; i += B::kRows)
          epilogue.tile(panels.a + i * steps, panels.b + j * steps, steps, block + i, j, first, last);
    }
    k += steps;
  } while (k < depth);
}

}  // namespace UK_ISA
