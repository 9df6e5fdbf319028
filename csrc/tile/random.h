// Random numbers other than signs from Philox calls: counter (row, low word, high word, purpose).
namespace UK_ISA {

enum class Purpose : uint64_t { signs = 0, normals = 1, terms = 2, diagonal = 3, sides = 4, rounding = 6 };

inline constexpr int64_t kNormalBlock = 8;  // of one call
inline constexpr int64_t kTermBlock = 4;

inline Counters random_words(Long rows, Long index, Purpose purpose, uint64_t seed) {
  return philox({{rows, index, index >> 32, Long{} + uint64_t(purpose)}}, seed);
}

struct LaneNumbers {
  uint64_t lane[kLongs];
  constexpr LaneNumbers() : lane() {
    for (int i = 0; i < kLongs; ++i) lane[i] = uint64_t(i);
  }
};

// from, from + step, ... in the lanes.
inline Long first_lanes(int64_t from, int step) {
  static constexpr LaneNumbers numbers;
  Long lane;
  std::memcpy(&lane, numbers.lane, sizeof lane);
  return lane * uint64_t(step) + uint64_t(from);
}

using Word32 = typename VectorOf<uint32_t, UK_BITS / 32>::type;
inline constexpr int kWords = UK_BITS / 32;

// Quantiles of |x|, x standard normal: n of 32768 gives (n + 0.5) / 32768, in segments of two octaves, and in each a
// polynomial in the mantissa. Greatest deviation 7.5e-4; the variance over all n is 1 to 5e-8. Products and sums
// round apart, so that every backend has the same bits.
inline constexpr float kQuantiles[5][8] = {
    {4.314798f, 4.0180845f, 3.6848116f, 3.3194027f, 2.9155838f, 2.4612675f, 1.9357704f, 4.449272f},
    {-0.8358879f, -0.96586967f, -1.0704776f, -1.1943226f, -1.3631462f, -1.6192158f, -2.0608072f, -0.24871235f},
    {0.5284388f, 0.6428468f, 0.7152309f, 0.79211223f, 0.8895036f, 1.0223614f, 1.1896623f, 0.0f},
    {-0.19504431f, -0.24653499f, -0.27554646f, -0.30499974f, -0.3416312f, -0.39156106f, -0.46012053f, 0.0f},
    {0.029552637f, 0.038274374f, 0.0428587f, 0.04742859f, 0.05306438f, 0.060699213f, 0.069306776f, 0.0f}};

struct NormalTables {
#if UK_X86 && UK_BITS == 512
  __m512 table[5];
  NormalTables() {
    for (int i = 0; i < 5; ++i) table[i] = _mm512_broadcast_f32x8(_mm256_loadu_ps(kQuantiles[i]));
  }
  Vec<float> look_up(int i, Word32 segment) const {
    return (Vec<float>)_mm512_permutexvar_ps((__m512i)segment, table[i]);
  }
#elif UK_X86 && UK_BITS == 256
  __m256 table[5];
  NormalTables() {
    for (int i = 0; i < 5; ++i) table[i] = _mm256_loadu_ps(kQuantiles[i]);
  }
  Vec<float> look_up(int i, Word32 segment) const {
    return (Vec<float>)_mm256_permutevar8x32_ps(table[i], (__m256i)segment);
  }
#else
  Vec<float> look_up(int i, Word32 segment) const {
    Vec<float> out;
    for (int lane = 0; lane < kWords; ++lane) out[lane] = kQuantiles[i][segment[lane] & 7];
    return out;
  }
#endif

  // Of the low 16 bits of each lane; bit 15 is the sign.
  Vec<float> normals(Word32 random) const {
    typedef typename VectorOf<int32_t, kWords>::type Int;
    const Vec<float> n = __builtin_convertvector((Int)(random & 0x7fffu), Vec<float>) + 0.5f;
    const Word32 bits = (Word32)n, segment = bits >> 24;
    const Vec<float> m = (Vec<float>)((bits & 0x00ffffffu) | 0x3f000000u);
    Vec<float> x = look_up(4, segment);
#pragma GCC unroll 4
    for (int i = 3; i >= 0; --i) x = x * m + look_up(i, segment);
    return (Vec<float>)((Word32)x ^ ((random << 16) & 0x80000000u));
  }
};

// Low words of two vectors of calls, of even and of odd rows, as one vector of rows in order.
inline Word32 interleave(Long even, Long odd) { return (Word32)((even & 0xffffffffu) | (odd << 32)); }

// Coordinates 8 block ... 8 block + 7 of kLanes<float> rows from `row`; half h of word w is coordinate 2 w + h.
inline void normals_of(const NormalTables& tables, uint64_t seed, int64_t row, int64_t block, Vec<float>* out) {
  const Long index = Long{} + uint64_t(block);
  const Counters even = random_words(first_lanes(row, 2), index, Purpose::normals, seed);
  const Counters odd = random_words(first_lanes(row + 1, 2), index, Purpose::normals, seed);
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {
    const Word32 word = interleave(even.word[w], odd.word[w]);
    out[2 * w] = tables.normals(word);
    out[2 * w + 1] = tables.normals(word >> 16);
  }
}

// Panel source: outer is the row of P, depth the coordinate less `offset`, a multiple of 8.
struct PhiloxNormals {
  uint64_t seed;
  int64_t offset;

  template <class T, int kStrip>
  [[gnu::noinline]] void pack(T* out, int64_t outer, int64_t outers, int64_t k, int64_t depth) const {
    constexpr int W = kLanes<float>;
    const NormalTables tables;
    for (int64_t o = 0; o < outers; o += kStrip, out += kStrip * depth)
      for (int lane = 0; lane < kStrip; lane += W)
        for (int64_t step = 0; step < depth; step += kNormalBlock) {
          Vec<float> x[kNormalBlock];
          normals_of(tables, seed, outer + o + lane, (offset + k + step) / kNormalBlock, x);
          for (int64_t c = 0; c < kNormalBlock && step + c < depth; ++c) {
            T* at = out + (step + c) * kStrip + lane;
            if constexpr (std::is_same_v<T, float> && kStrip % W == 0)
              store(at, x[c]);
            else
              for (int i = 0; i < W && lane + i < kStrip; ++i) at[i] = T(x[c][i]);
          }
        }
  }
};

// The same numbers with outer the coordinate and depth the row. Source must give blocks of kSignBlock coordinates.
template <class Source>
struct Transposed {
  Source source;

  template <class T, int kStrip>
  [[gnu::noinline]] void pack(T* out, int64_t outer, int64_t outers, int64_t k, int64_t depth) const {
    T block[kSignBlock * kStrip];
    for (int64_t row = 0; row < depth; row += kStrip) {
      const int64_t rows = depth - row < kStrip ? depth - row : kStrip;
      for (int64_t c = 0; c < outers;) {
        const int64_t skip = (outer + c) % kSignBlock, room = kSignBlock - skip, left = outers - c;
        const int64_t n = left < room ? left : room;
        source.template pack<T, kStrip>(block, k + row, kStrip, outer + c - skip, skip + n);
        for (int64_t i = 0; i < n; ++i, ++c)
          for (int64_t r = 0; r < rows; ++r)
            out[c / kStrip * kStrip * depth + (row + r) * kStrip + c % kStrip] = block[(skip + i) * kStrip + r];
      }
    }
    const int64_t end = round_up(outers, kStrip);
    for (int64_t c = outers; c < end; ++c)
      for (int64_t r = 0; r < depth; ++r) out[c / kStrip * kStrip * depth + r * kStrip + c % kStrip] = T(0);
  }
};

// Where a coordinate goes: one of `width` outputs from `first`, times +1 or, with the sign bit set, -1.
struct Target {
  uint32_t output, sign;
};

inline Target target(uint32_t word, int64_t first, int64_t width) {
  return {uint32_t(first + int64_t((uint64_t(word >> 1) * uint64_t(width)) >> 31)), word << 31 ^ 0x80000000u};
}

// Targets of `count` coordinates from `begin`, a multiple of 4: word c % 4 of the call (row, c / 4). A set low bit is
// +1. `out` has room for whole vectors of calls, 4 kLongs.
inline void targets_of(uint64_t seed, int64_t row, Purpose purpose, int64_t begin, int64_t count, int64_t first,
                       int64_t width, Target* out) {
  for (int64_t c = 0; c < count; c += kTermBlock * kLongs) {
    const Counters x = random_words(Long{} + uint64_t(row), first_lanes((begin + c) / kTermBlock, 1), purpose, seed);
    for (int w = 0; w < 4; ++w)
      for (int lane = 0; lane < kLongs; ++lane)
        out[c + 4 * lane + w] = target(uint32_t(x.word[w][lane]), first, width);
  }
}

// 128 signs of call (0, block) of the diagonal, as 4 words.
inline void diagonal_words(uint64_t seed, int64_t block, uint32_t* out) {
  const Counters x = random_words(Long{}, Long{} + uint64_t(block), Purpose::diagonal, seed);
  for (int w = 0; w < 4; ++w) out[w] = uint32_t(x.word[w][0]);
}

}  // namespace UK_ISA
