// Panels of integers, whose products are summed in 32 bits.
namespace UK_ISA {

// Two neighbouring steps of the reduction.
struct ShortPair {
  int16_t first, second;
};
template <>
struct PanelTraits<ShortPair> {
  using Sum = int32_t;
  static constexpr int kSteps = 2;
};

// Four of them: unsigned in a, signed in b.
struct ByteQuad {
  uint8_t byte[4];
};
template <>
struct PanelTraits<ByteQuad> {
  using Sum = int32_t;
  static constexpr int kSteps = 4;
};

inline Vec<int32_t> load_panel(const ShortPair* p) { return load(reinterpret_cast<const int32_t*>(p)); }
inline Vec<int32_t> load_panel(const ByteQuad* p) { return load(reinterpret_cast<const int32_t*>(p)); }

// Whether products of ByteQuad are one instruction.
inline bool has_byte_dot() {
#if UK_X86 && UK_BITS == 512
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

[[gnu::always_inline]] inline Vec<int32_t> multiply_add(ShortPair a, Vec<int32_t> b, Vec<int32_t> c) {
  int32_t bits;
  std::memcpy(&bits, &a, 4);
#if UK_X86 && UK_BITS == 512
  return c + (Vec<int32_t>)_mm512_madd_epi16(_mm512_set1_epi32(bits), (__m512i)b);
#elif UK_X86 && UK_BITS == 256
  return c + (Vec<int32_t>)_mm256_madd_epi16(_mm256_set1_epi32(bits), (__m256i)b);
#else
  return c + int32_t(a.first) * ((b << 16) >> 16) + int32_t(a.second) * (b >> 16);
#endif
}

#if UK_X86 && UK_BITS == 512
#pragma GCC push_options
#pragma GCC target("avx512vnni")

[[gnu::always_inline]] inline Vec<int32_t> multiply_add(ByteQuad a, Vec<int32_t> b, Vec<int32_t> c) {
  int32_t bits;
  std::memcpy(&bits, &a, 4);
  return (Vec<int32_t>)_mm512_dpbusd_epi32((__m512i)c, _mm512_set1_epi32(bits), (__m512i)b);
}
#pragma GCC pop_options
#endif

}  // namespace UK_ISA
