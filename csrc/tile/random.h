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

// A standard normal number of four 4-bit digits d0 (lowest) to d3: (37 A[d0] + 32 B[d1] + 39 A[d2] + 40 B[d3]) / 4096,
// where bit 3 of a digit is a sign. Sums are integers of 16 bits, so every backend has the same bits; entries and weights
// were searched for such as bring all 65536 sums closest to the normal distribution.
struct NormalDigits {
  int8_t entries[2][16];
  uint8_t weights[2][2];  // of the digits of the lower and the upper byte, for A and for B
};
inline constexpr NormalDigits kNormalDigits{
    {{6, 22, 34, 40, 53, 56, 65, 111, -6, -22, -34, -40, -53, -56, -65, -111},
     {4, 5, 16, 25, 32, 40, 60, 125, -4, -5, -16, -25, -32, -40, -60, -125}},
    {{37, 39}, {32, 40}}};
inline constexpr float kNormalUnit = 0x1p-12f;

struct NormalTables {
#if UK_X86 && UK_BITS == 512
  // Weighted entries, twice: a look-up takes five bits. All that is done here leaves multipliers to other work.
  __m512i terms[4];
  NormalTables() {
    for (int d = 0; d < 4; ++d) {
      int16_t x[32];
      for (int i = 0; i < 32; ++i) x[i] = int16_t(kNormalDigits.weights[d % 2][d / 2] * kNormalDigits.entries[d % 2][i % 16]);
      std::memcpy(&terms[d], x, sizeof x);
    }
  }

  // Of the low and of the high half of each lane, in units of kNormalUnit.
  void normals(Word32 random, Vec<float>& low, Vec<float>& high) const {
    typedef typename VectorOf<int32_t, kWords>::type Int;
    typedef typename VectorOf<uint16_t, 2 * kWords>::type Short;
    const auto term = [&](int d) {
      return (Short)_mm512_permutexvar_epi16((__m512i)((Short)random >> 4 * d), terms[d]);
    };
    const Int x = (Int)(term(0) + term(1) + (term(2) + term(3)));
    low = __builtin_convertvector(x << 16 >> 16, Vec<float>);
    high = __builtin_convertvector(x >> 16, Vec<float>);
  }
#elif UK_X86 && UK_BITS == 256
  using Bytes = __m256i;
  static Bytes everywhere(__m128i x) { return _mm256_broadcastsi128_si256(x); }
  static Bytes everywhere(short x) { return _mm256_set1_epi16(x); }
  static Bytes sums(Bytes entries, Bytes weights, Bytes digits) {
    return _mm256_maddubs_epi16(weights, _mm256_shuffle_epi8(entries, digits));
  }
  static Bytes first_halves(Bytes x) { return _mm256_madd_epi16(x, _mm256_set1_epi32(1)); }
  Bytes entries[2], weights[2];
  NormalTables() {
    for (int i = 0; i < 2; ++i) {
      entries[i] = everywhere(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kNormalDigits.entries[i])));
      weights[i] = everywhere(short(kNormalDigits.weights[i][0] | kNormalDigits.weights[i][1] << 8));
    }
  }

  // Of the low and of the high half of each lane, in units of kNormalUnit.
  void normals(Word32 random, Vec<float>& low, Vec<float>& high) const {
    typedef typename VectorOf<int32_t, kWords>::type Int;
    typedef typename VectorOf<int16_t, 2 * kWords>::type Short;
    const Word32 digits = random & 0x0f0f0f0fu, others = random >> 4 & 0x0f0f0f0fu;
    const Short x = (Short)sums(entries[0], weights[0], (Bytes)digits) + (Short)sums(entries[1], weights[1], (Bytes)others);
    low = __builtin_convertvector((Int)first_halves((Bytes)x), Vec<float>);
    high = __builtin_convertvector((Int)x >> 16, Vec<float>);
  }
#else
  static float normal(uint32_t random) {
    int x = 0;
    for (int d = 0; d < 4; ++d) x += kNormalDigits.weights[d % 2][d / 2] * kNormalDigits.entries[d % 2][random >> 4 * d & 15];
    return float(x);
  }
  void normals(Word32 random, Vec<float>& low, Vec<float>& high) const {
    for (int lane = 0; lane < kWords; ++lane) {
      low[lane] = normal(random[lane]);
      high[lane] = normal(random[lane] >> 16);
    }
  }
#endif
};

// Rows row + 0 1 4 5 8 9 ... in the lanes: theirs and those of row + 2 are in order after `join`.
inline Long pair_lanes(int64_t row) {
  const Long lane = first_lanes(0, 1);
  return lane + (lane & ~uint64_t(1)) + uint64_t(row);
}

// Low words of two vectors of calls, pairs of lanes in turns.
inline Word32 join(Long first, Long second) {
#if UK_X86 && UK_BITS == 512
  return (Word32)_mm512_shuffle_ps((__m512)first, (__m512)second, 0x88);
#elif UK_X86 && UK_BITS == 256
  return (Word32)_mm256_shuffle_ps((__m256)first, (__m256)second, 0x88);
#else
  return __builtin_shuffle((Word32)first, (Word32)second, Word32{0, 2, 4, 6});
#endif
}

// Calls (row, index, purpose) of many rows and indices. What the first two rounds have of the row alone is made once for
// all indices, what they have of the index alone once for all lanes; keys are in lanes, where registers are too few.
struct IndexRounds {
  uint64_t first, second, product;
  IndexRounds() = default;
  IndexRounds(uint64_t seed, uint64_t index) {
    const uint64_t p1 = (index >> 32) * 0xCD9E8D57u;
    product = uint64_t(uint32_t(p1 >> 32 ^ index ^ seed)) * 0xD2511F53u;
    first = p1 ^ first_key(seed, 1);
    second = product >> 32 ^ second_key(seed, 1);
  }
};
struct LastKeys {
  Long key[8][2];
  explicit LastKeys(uint64_t seed) {
    for (int i = 0; i < 8; ++i) {
      key[i][0] = Long{} + first_key(seed, i + 2);
      key[i][1] = Long{} + second_key(seed, i + 2);
    }
  }
};
struct RowRounds {
  Long low, product;
  RowRounds() = default;
  RowRounds(uint64_t seed, Long rows, Purpose purpose)
      : low(multiply_low(rows, 0xD2511F53u)),
        product(multiply_low(low >> 32 ^ (uint64_t(purpose) ^ seed >> 32), 0xCD9E8D57u)) {}
  Counters after_two(const IndexRounds& i) const {
    return {{product >> 32 ^ i.first, product, low ^ i.second, Long{} + i.product}};
  }
};

// Coordinates 8 index ... 8 index + 7 of kLanes<float> rows, in units of kNormalUnit; half h of word w is coordinate
// 2 w + h.
struct NormalRows {
  RowRounds first, second;
  NormalRows() = default;
  NormalRows(uint64_t seed, int64_t row)
      : first(seed, pair_lanes(row), Purpose::normals), second(seed, pair_lanes(row + 2), Purpose::normals) {}
};

// They are made in kStages stages of about as many instructions, between which other work may be done.
struct NormalCalls {
  static constexpr int kStages = 12;
  Counters first, second;

  NormalCalls(const NormalRows& rows, const IndexRounds& index)
      : first(rows.first.after_two(index)), second(rows.second.after_two(index)) {}

  // put(c, x): x are coordinate c of the rows.
  template <class Put>
  [[gnu::always_inline]] void stage(int n, const LastKeys& keys, const NormalTables& tables, Put&& put) {
    if (n < 8) {
      first = philox_round(first, keys.key[n][0], keys.key[n][1]);
      second = philox_round(second, keys.key[n][0], keys.key[n][1]);
      return;
    }
    Vec<float> low, high;
    tables.normals(join(first.word[n - 8], second.word[n - 8]), low, high);
    put(2 * (n - 8), low);
    put(2 * (n - 8) + 1, high);
  }
  template <class Put>
  [[gnu::always_inline]] void all(const LastKeys& keys, const NormalTables& tables, Put&& put) {
#pragma GCC unroll 12
    for (int n = 0; n < kStages; ++n) stage(n, keys, tables, put);
  }
};

// Panel source: outer is the row of P, depth the coordinate less `offset`, a multiple of 8.
struct PhiloxNormals {
  uint64_t seed;
  int64_t offset;

  template <class T, int kStrip>
  [[gnu::noinline]] void pack(T* out, int64_t outer, int64_t outers, int64_t k, int64_t depth) const {
    constexpr int W = kLanes<float>;
    const NormalTables tables;
    const LastKeys keys(seed);
    for (int64_t o = 0; o < outers; o += kStrip, out += kStrip * depth)
      for (int lane = 0; lane < kStrip; lane += W) {
        const NormalRows rows(seed, outer + o + lane);
        for (int64_t step = 0; step < depth; step += kNormalBlock) {
          Vec<float> x[kNormalBlock];
          NormalCalls calls(rows, IndexRounds(seed, uint64_t(offset + k + step) / kNormalBlock));
          calls.all(keys, tables, [&](int c, Vec<float> y) { x[c] = y; });
          T* at = out + step * kStrip + lane;
          if (std::is_same_v<T, float> && kStrip % W == 0 && step + kNormalBlock <= depth) {
#pragma GCC unroll 8
            for (int c = 0; c < kNormalBlock; ++c) store(reinterpret_cast<float*>(at) + c * kStrip, x[c] * kNormalUnit);
            continue;
          }
          for (int64_t c = 0; c < kNormalBlock && step + c < depth; ++c)
            for (int i = 0; i < W && lane + i < kStrip; ++i) at[c * kStrip + i] = T(x[c][i] * kNormalUnit);
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
