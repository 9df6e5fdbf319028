// One tile of a product: packs panels from two sources and hands every register tile to an epilogue.
// P is what panels hold: float, double, or Bf16Pair (two steps in one). An epilogue is any type with
//   template <class P, class Rows>
//   void tile(Rows a, const P* b, int64_t depth, int64_t i, int64_t j, bool first, bool last)
// called for each register tile at (i, j) of the tile, once per block of the reduction.
namespace UK_ISA {

// Panels of one worker: kRowBlock x kDepth of A, kDepth x cols of B.
template <class P>
struct Panels {
  P* a;
  P* b;

  static constexpr int64_t kA = Block<P>::kRowBlock * Block<P>::kDepth;
  static int64_t size(int64_t cols) { return kA + round_up(cols, Block<P>::kCols) * Block<P>::kDepth; }
  explicit Panels(P* memory) : a(memory), b(memory + kA) {}
};

struct Range {
  int64_t begin;
  int64_t size;
};

// Whether a source may have its rows read where they lie.
template <class P, class Source, class = void>
inline constexpr bool kHasRows = false;
template <class P, class Source>
inline constexpr bool kHasRows<P, Source, std::void_t<decltype(&Source::template rows<P>)>> = true;

// Whether rows can be asked for ahead of their use.
template <class P, class Source, class = void>
inline constexpr bool kHasPrefetch = false;
template <class P, class Source>
inline constexpr bool kHasPrefetch<P, Source, std::void_t<decltype(&Source::template prefetch<P>)>> = true;

// Whether a source holds its strips packed.
template <class P, class Source, class = void>
inline constexpr bool kHasStrips = false;
template <class P, class Source>
inline constexpr bool kHasStrips<P, Source, std::void_t<decltype(&Source::template strips<P>)>> = true;

template <class P, class SourceA, class SourceB, class Epilogue>
void product(const SourceA& a, Range rows, const SourceB& b, Range cols, int64_t depth, const Panels<P>& panels,
             Epilogue&& epilogue) {
  using B = Block<P>;
  constexpr int64_t kBlock = B::kDepth * PanelTraits<P>::kSteps;
  // Equal blocks: a last one of few rows would not pay for streaming the columns' panel again.
  const int64_t blocks = (rows.size + B::kRowBlock - 1) / B::kRowBlock;
  const int64_t most = round_up((rows.size + blocks - 1) / (blocks > 0 ? blocks : 1), B::kRows);
  int64_t k = 0;
  do {  // once even for an empty reduction: its result is zeros
    const int64_t size = depth - k < kBlock ? depth - k : kBlock;
    const int64_t steps = (size + PanelTraits<P>::kSteps - 1) / PanelTraits<P>::kSteps;
    const bool first = k == 0, last = k + size == depth;
    const P* columns = panels.b;
    if constexpr (kHasStrips<P, SourceB>)
      columns = b.template strips<P>(cols.begin, k, size);
    else
      b.template pack<P, B::kCols>(panels.b, cols.begin, cols.size, k, size);
    for (int64_t block = 0; block < rows.size; block += most) {
      const int64_t height = rows.size - block < most ? rows.size - block : most;
      // All columns for the rows from `begin` of the block to `end`.
      const auto sweep = [&](int64_t begin, int64_t end, auto&& rows_at) {
        for (int64_t j = 0; j < cols.size; j += B::kCols)
          for (int64_t i = begin; i < end; i += B::kRows)
            epilogue.tile(rows_at(i, j), columns + j * steps, steps, block + i, j, first, last);
      };
      const int64_t outer = rows.begin + block;
      int64_t in_place = 0;
      if constexpr (kHasRows<P, SourceA>) {
        in_place = a.template rows_in_place<P>(height, size);
        // Short pieces of many rows are more than hardware foresees: those of the next block are asked for early.
        const bool wraps = block + most >= rows.size;
        const int64_t next_outer = wraps ? rows.begin : outer + most, next_k = wraps ? k + size : k;
        const int64_t ahead = depth - next_k < kBlock ? depth - next_k : kBlock;
        sweep(0, in_place, [&](int64_t i, int64_t j) {
          if constexpr (kHasPrefetch<P, SourceA>)
            if (j == 0) a.template prefetch<P>(next_outer + i, next_k, ahead);
          return a.template rows<P>(outer + i, k, size);
        });
      }
      if (in_place >= height) continue;
      a.template pack<P, B::kRows>(panels.a, outer + in_place, height - in_place, k, size);
      sweep(in_place, height, [&](int64_t i, int64_t) { return static_cast<const P*>(panels.a + (i - in_place) * steps); });
    }
    k += size;
  } while (k < depth);
}

}  // namespace UK_ISA
