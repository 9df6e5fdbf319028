// A product with normal numbers that are made strip by strip in the nearest cache.
namespace UK_ISA {

// Strips of kCols rows of the matrix for one block of coordinates, [coordinate][row], in units of kNormalUnit.
class NormalStrips {
 public:
  static constexpr int kVectors = 2;
  static constexpr int kCols = kVectors * kLanes<float>;
  static constexpr int64_t kDepth = 256;
  static constexpr int64_t kCalls = kDepth / kNormalBlock;  // of a vector of rows

  explicit NormalStrips(uint64_t seed) : seed_(seed), keys_(seed) {}

  // The next numbers are of kCols rows from `row` and of coordinates from `begin`, a multiple of kNormalBlock.
  void aim(int64_t begin, int64_t row) {
    if (begin != begin_)
      for (int64_t i = 0; i < kCalls; ++i) index_[i] = IndexRounds(seed_, uint64_t(begin / kNormalBlock + i));
    begin_ = begin;
    for (int v = 0; v < kVectors; ++v) rows_[v] = NormalRows(seed_, row + v * kLanes<float>);
  }

  // One vector of calls of the strip at `out`, of kVectors kCalls.
  NormalCalls calls(int64_t n) const { return {rows_[n / kCalls], index_[n % kCalls]}; }
  static float* place(int64_t n, float* out) {
    return out + n % kCalls * kNormalBlock * kCols + n / kCalls * kLanes<float>;
  }
  [[gnu::always_inline]] void stage(int n, NormalCalls& calls, float* at) const {
    calls.stage(n, keys_, tables_, [&](int c, Vec<float> x) { store(at + c * kCols, x); });
  }

  [[gnu::noinline]] void make(int64_t depth, float* out) const {
    for (int v = 0; v < kVectors; ++v)
      for (int64_t i = 0; i * kNormalBlock < depth; ++i) {
        NormalCalls all = calls(v * kCalls + i);
        float* at = place(v * kCalls + i, out);
        all.all(keys_, tables_, [&](int c, Vec<float> x) { store(at + c * kCols, x); });
      }
  }

 private:
  uint64_t seed_;
  int64_t begin_ = -1;
  LastKeys keys_;
  NormalTables tables_;
  NormalRows rows_[kVectors];
  IndexRounds index_[kCalls];
};

// Register tiles of kMany rows, and of 4 where that leaves fewer rows empty.
struct RowTiles {
  static constexpr int kMany = UK_BITS == 512 ? 8 : 6;
  int64_t many, fours;

  explicit RowTiles(int64_t rows) {
    const int64_t rest = rows % kMany;
    if (kMany == 8)
      fours = rest > 0 && rest <= 4 ? 1 : 0;
    else
      fours = rest == 0 || rest == 5 ? 0 : rest > 2 || rows < 6 ? 1 : 2;
    many = rows > 4 * fours ? (rows - 4 * fours + kMany - 1) / kMany : 0;
  }
  int64_t count() const { return many + fours; }
  int64_t split() const { return kMany * many; }
  int64_t rows() const { return kMany * many + 4 * fours; }
};

// Samples by outputs of a projection, taken up block by block. An element is a sum over blocks in order, whatever the
// tile.
class NormalTile {
 public:
  static constexpr int kCols = NormalStrips::kCols;
  static constexpr int64_t kDepth = NormalStrips::kDepth;

  static int64_t floats(int64_t rows, int64_t cols) {
    return kStrips * kStrip + (rows + 8) * (kDepth + round_up(cols, kCols));
  }
  NormalTile(float* memory, uint64_t seed, int64_t rows, Range cols)
      : strips_(seed), tiles_(rows), count_(rows), first_(cols.begin), ld_(round_up(cols.size, kCols)), strip_(memory),
        next_(memory + kStrip), x_(memory + kStrips * kStrip), sums_(x_ + tiles_.rows() * kDepth) {}

  void clear() { std::memset(sums_, 0, tiles_.rows() * ld_ * sizeof(float)); }

  // Takes up `depth` coordinates, at most kDepth, that begin at coordinate `begin`. `more`: kDepth coordinates follow.
  void add(const uk::Operand& x, int64_t begin, int64_t depth, bool more) {
    const int64_t split = tiles_.split(), many = count_ < split ? count_ : split;
    Dense{x}.pack<float, RowTiles::kMany>(x_, 0, many, 0, depth);
    Dense{x}.pack<float, 4>(x_ + split * depth, split, count_ - many, 0, depth);
    for (int64_t i = 0; i < tiles_.rows() * depth; ++i) x_[i] *= kNormalUnit;
    const bool overlaps = kOverlaps && depth == kDepth;
    if (!overlaps) {
      for (int64_t j = 0; j < ld_; j += kCols) {
        strips_.aim(begin, first_ + j);
        strips_.make(depth, strip_);
        for_tiles([&](auto rows, int64_t i) { add_tile<rows, 0>(depth, i, j, 0); });
      }
      return;
    }
    if (ready_ != begin) {
      strips_.aim(begin, first_);
      strips_.make(depth, strip_);
    }
    for (int64_t j = 0; j < ld_; j += kCols) {
      const bool last = j + kCols == ld_;
      strips_.aim(last ? begin + kDepth : begin, last ? first_ : first_ + j + kCols);
      int64_t made = last && !more ? kStripCalls : 0;
      for_tiles([&](auto rows, int64_t i) {
        const auto add = [&](auto steps) {
          add_tile<rows, steps>(depth, i, j, made);
          if constexpr (steps > 0) made += kDepth / steps;
        };
        if (made == kStripCalls) return add(std::integral_constant<int, 0>{});
        if (tiles_.count() >= 4) return add(std::integral_constant<int, 16>{});
        if (tiles_.count() >= 2) return add(std::integral_constant<int, 8>{});
        add(std::integral_constant<int, 4>{});
      });
      std::swap(strip_, next_);
    }
    ready_ = begin + kDepth;
  }

  float sum(int64_t row, int64_t col) const { return sums_[row * ld_ + col]; }

 private:
  static constexpr int64_t kStrip = kDepth * kCols, kStripCalls = NormalStrips::kVectors * NormalStrips::kCalls;
  static constexpr bool kOverlaps = UK_BITS == 512;  // registers are enough to make a strip beside the multiplications
  static constexpr int kStrips = kOverlaps ? 2 : 1;

  template <class F>
  void for_tiles(F&& f) const {
    for (int64_t i = 0; i < tiles_.split(); i += RowTiles::kMany) f(std::integral_constant<int, RowTiles::kMany>{}, i);
    for (int64_t i = tiles_.split(); i < tiles_.rows(); i += 4) f(std::integral_constant<int, 4>{}, i);
  }

  // With kSteps > 0 a vector of calls of the next strip, from `call`, is made every so many steps: besides the multiplier
  // this takes units that are idle here.
  template <int R, int kSteps>
  [[gnu::noinline]] void add_tile(int64_t depth, int64_t row, int64_t col, int64_t call) const {
    constexpr int W = kLanes<float>;
    const float *x = x_ + row * depth, *b = strip_;
    Vec<float> acc[R][2];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) acc[i][0] = acc[i][1] = Vec<float>{};
    const auto step = [&]() [[gnu::always_inline]] {
      const Vec<float> b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const Vec<float> a = spread(x + i);
        acc[i][0] = fma<float>(a, b0, acc[i][0]);
        acc[i][1] = fma<float>(a, b1, acc[i][1]);
      }
      x += R;
      b += kCols;
    };
    if constexpr (kSteps == 0)
      for (int64_t k = 0; k < depth; ++k) step();
    else
      for (int64_t k = 0; k < kDepth; k += kSteps, ++call) {
        NormalCalls calls = strips_.calls(call);
        float* at = NormalStrips::place(call, next_);
#pragma GCC unroll 16
        for (int s = 0; s < kSteps; ++s) {
          step();
          constexpr int kStages = NormalCalls::kStages;
#pragma GCC unroll 3
          for (int n = s * kStages / kSteps; n < (s + 1) * kStages / kSteps; ++n) strips_.stage(n, calls, at);
        }
      }
    float* c = sums_ + row * ld_ + col;
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i, c += ld_) {
      store(c, load(c) + acc[i][0]);
      store(c + W, load(c + W) + acc[i][1]);
    }
  }

  NormalStrips strips_;
  RowTiles tiles_;
  int64_t count_, first_, ld_, ready_ = -1;
  float *strip_, *next_, *x_, *sums_;
};

}  // namespace UK_ISA
