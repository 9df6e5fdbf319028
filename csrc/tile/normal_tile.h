// A product with normal numbers that are made strip by strip in the nearest cache.
namespace UK_ISA {

// Strips of kCols rows of the matrix for one block of coordinates, [coordinate][row], in units of kNormalUnit.
class NormalStrips {
 public:
  static constexpr int kCols = 2 * kLanes<float>;
  static constexpr int64_t kDepth = 256;

  explicit NormalStrips(uint64_t seed) : seed_(seed), keys_(seed) {}

  // The next strips are of `depth` coordinates, at most kDepth, from `begin`, a multiple of kNormalBlock.
  void block(int64_t begin, int64_t depth) {
    calls_ = (depth + kNormalBlock - 1) / kNormalBlock;
    for (int64_t i = 0; i < calls_; ++i) index_[i] = IndexRounds(seed_, uint64_t(begin / kNormalBlock + i));
  }

  [[gnu::noinline]] void make(int64_t row, float* out) const {
    constexpr int W = kLanes<float>;
    for (int lane = 0; lane < kCols; lane += W) {
      const NormalRows rows(seed_, row + lane);
      float* at = out + lane;
      for (int64_t i = 0; i < calls_; ++i, at += kNormalBlock * kCols) {
        Vec<float> x[kNormalBlock];
        rows.at(index_[i], keys_, tables_, x);
#pragma GCC unroll 8
        for (int c = 0; c < kNormalBlock; ++c) store(at + c * kCols, x[c]);
      }
    }
  }

 private:
  uint64_t seed_;
  LastKeys keys_;
  NormalTables tables_;
  int64_t calls_ = 0;
  IndexRounds index_[kDepth / kNormalBlock];
};

// Register tiles of 6 rows, and of 4 where that leaves fewer rows empty: 32 are 4 of one kind and 2 of the other.
struct RowTiles {
  int64_t sixes, fours;

  explicit RowTiles(int64_t rows) {
    const int64_t rest = rows % 6;
    fours = rest == 0 || rest == 5 ? 0 : rest > 2 || rows < 6 ? 1 : 2;
    sixes = rows > 4 * fours ? (rows - 4 * fours + 5) / 6 : 0;
  }
  int64_t split() const { return 6 * sixes; }
  int64_t rows() const { return 6 * sixes + 4 * fours; }
};

// Samples by outputs of a projection, taken up block by block. An element is a sum over blocks in order, whatever the
// tile.
class NormalTile {
 public:
  static constexpr int kCols = NormalStrips::kCols;
  static constexpr int64_t kDepth = NormalStrips::kDepth;

  static int64_t floats(int64_t rows, int64_t cols) {
    return kDepth * kCols + (rows + 8) * (kDepth + round_up(cols, kCols));
  }
  NormalTile(float* memory, uint64_t seed, int64_t rows, Range cols)
      : strips_(seed), tiles_(rows), count_(rows), first_(cols.begin), ld_(round_up(cols.size, kCols)), strip_(memory),
        x_(memory + kDepth * kCols), sums_(x_ + tiles_.rows() * kDepth) {}

  void clear() { std::memset(sums_, 0, tiles_.rows() * ld_ * sizeof(float)); }

  // Takes up `depth` coordinates, at most kDepth, that begin at coordinate `begin`.
  void add(const uk::Operand& x, int64_t begin, int64_t depth) {
    const int64_t split = tiles_.split(), sixes = count_ < split ? count_ : split;
    Dense{x}.pack<float, 6>(x_, 0, sixes, 0, depth);
    Dense{x}.pack<float, 4>(x_ + split * depth, split, count_ - sixes, 0, depth);
    for (int64_t i = 0; i < tiles_.rows() * depth; ++i) x_[i] *= kNormalUnit;
    strips_.block(begin, depth);
    for (int64_t j = 0; j < ld_; j += kCols) {
      strips_.make(first_ + j, strip_);
      for (int64_t i = 0; i < split; i += 6) add_tile<6>(depth, i, j);
      for (int64_t i = split; i < tiles_.rows(); i += 4) add_tile<4>(depth, i, j);
    }
  }

  float sum(int64_t row, int64_t col) const { return sums_[row * ld_ + col]; }

 private:
  template <int R>
  [[gnu::noinline]] void add_tile(int64_t depth, int64_t row, int64_t col) const {
    constexpr int W = kLanes<float>;
    const float *x = x_ + row * depth, *b = strip_;
    Vec<float> acc[R][2];
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) acc[i][0] = acc[i][1] = Vec<float>{};
    for (int64_t k = 0; k < depth; ++k, x += R, b += kCols) {
      const Vec<float> b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 6
      for (int i = 0; i < R; ++i) {
        const Vec<float> a = splat(x[i]);
        acc[i][0] = fma<float>(a, b0, acc[i][0]);
        acc[i][1] = fma<float>(a, b1, acc[i][1]);
      }
    }
    float* c = sums_ + row * ld_ + col;
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i, c += ld_) {
      store(c, load(c) + acc[i][0]);
      store(c + W, load(c + W) + acc[i][1]);
    }
  }

  NormalStrips strips_;
  RowTiles tiles_;
  int64_t count_, first_, ld_;
  float *strip_, *x_, *sums_;
};

}  // namespace UK_ISA
