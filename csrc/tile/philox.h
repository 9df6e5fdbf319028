// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a vector of counters at
// a time, and the random signs made of it. Sign of (row, coordinate): the call with counter (row, coordinate / 128)
// gives 128 of them; word w, bit b is coordinate 32 w + b of the block, a set bit is +1. The key is the seed.
namespace UK_ISA {

using Long = typename VectorOf<uint64_t, UK_BITS / 64>::type;
inline constexpr int kLongs = UK_BITS / 64;
inline constexpr int64_t kSignBlock = 128;

// Low half of each lane times m, 64 bits wide.
inline Long multiply_low(Long a, uint32_t m) {
#if UK_X86 && UK_BITS == 512
  return (Long)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif UK_X86 && UK_BITS == 256
  return (Long)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return (a & 0xffffffffu) * uint64_t(m);
#endif
}

// One 32-bit word of each counter in the low half of a lane; the high halves hold anything.
struct Counters {
  Long word[4];
};

template <class Key>
inline Counters philox_round(const Counters& x, const Key& k0, const Key& k1) {
  const Long p0 = multiply_low(x.word[0], 0xD2511F53u), p1 = multiply_low(x.word[2], 0xCD9E8D57u);
  return {{(p1 >> 32) ^ x.word[1] ^ k0, p1, (p0 >> 32) ^ x.word[3] ^ k1, p0}};
}

// The two keys of a round.
inline uint64_t first_key(uint64_t seed, int round) { return uint32_t(uint32_t(seed) + uint32_t(round) * 0x9E3779B9u); }
inline uint64_t second_key(uint64_t seed, int round) {
  return uint32_t(uint32_t(seed >> 32) + uint32_t(round) * 0xBB67AE85u);
}

inline Counters philox(Counters x, uint64_t seed) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) x = philox_round(x, first_key(seed, round), second_key(seed, round));
  return x;
}

// The first and the second 64 signs of a block, for `count` rows from `row`; rounded up to whole vectors.
inline void sign_words(uint64_t seed, int64_t row, int64_t count, int64_t block, uint64_t* first, uint64_t* second) {
  Long lane;
  for (int i = 0; i < kLongs; ++i) lane[i] = uint64_t(row) + i;
  const Long low = Long{} + 0xffffffffu;
  for (int64_t j = 0; j < count; j += kLongs) {
    const Counters x = philox({{lane + uint64_t(j), Long{} + uint64_t(block), Long{}, Long{}}}, seed);
    const Long a = (x.word[0] & low) | (x.word[1] << 32), b = (x.word[2] & low) | (x.word[3] << 32);
    std::memcpy(first + j, &a, sizeof a);
    std::memcpy(second + j, &b, sizeof b);
  }
}

}  // namespace UK_ISA
