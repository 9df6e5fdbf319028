// Schedules: the tiles of a product and the memory of those who work on them. Tiles are cut by the shape
// alone, never by the number of threads, and no reduction is split: the same bits at every thread count.
namespace UK_ISA {

// Tiles of a rows x cols result, by default sized so that a worker's accumulator tile and panels
// stay under 0.5 MB.
struct TileGrid {
  int64_t rows, cols, tile_rows, tile_cols;

  template <class P>
  static TileGrid of(int64_t rows, int64_t cols) {
    return within<P>(rows, cols, 2 * Block<P>::kRowBlock, 192);
  }
  template <class P>
  static TileGrid within(int64_t rows, int64_t cols, int64_t most_rows, int64_t most_cols) {
    return {rows, cols, even(rows, most_rows, Block<P>::kRows), even(cols, most_cols, Block<P>::kCols)};
  }
  int64_t across() const { return (cols + tile_cols - 1) / tile_cols; }
  int64_t down() const { return (rows + tile_rows - 1) / tile_rows; }
  int64_t count() const { return down() * across(); }
  Range row_range(int64_t tile) const { return clip(tile / across() * tile_rows, tile_rows, rows); }
  Range col_range(int64_t tile) const { return clip(tile % across() * tile_cols, tile_cols, cols); }

 private:
  // Equal shares of at most `most`, in whole strips.
  static int64_t even(int64_t n, int64_t most, int64_t strip) {
    if (n == 0) return strip;
    const int64_t parts = (n + most - 1) / most;
    return round_up((n + parts - 1) / parts, strip);
  }
  static Range clip(int64_t begin, int64_t size, int64_t end) {
    return {begin, end - begin < size ? end - begin : size};
  }
};

// One accumulator tile and one pair of panels a worker.
template <class P>
struct TileScratch {
  static_assert(sizeof(P) == sizeof(Sum<P>));
  TileGrid grid;
  int64_t per_worker;
  uk::Scratch<Sum<P>> memory;

  TileScratch(const TileGrid& grid, int workers)
      : grid(grid),
        per_worker(grid.tile_rows * grid.tile_cols + Panels<P>::size(grid.tile_cols)),
        memory(per_worker * workers) {}
  Sum<P>* tile(int worker) const { return memory.get() + worker * per_worker; }
  Panels<P> panels(int worker) const {
    return Panels<P>(reinterpret_cast<P*>(tile(worker) + grid.tile_rows * grid.tile_cols));
  }
};

}  // namespace UK_ISA
