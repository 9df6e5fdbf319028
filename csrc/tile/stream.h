// Loops that pass once over arrays: loads of any type as lanes of T, stores that round once, lanes added up.
namespace UK_ISA {

// Half as many floats as a vector holds: what widens to a vector of doubles.
typedef VectorOf<float, kLanes<double>>::type Narrow;
typedef VectorOf<float, kLanes<double>>::unaligned NarrowInMemory;

inline Narrow load_narrow(const float* p) {
  return *reinterpret_cast<const NarrowInMemory*>(p);
}
inline Narrow load_narrow(const bf16* p) {
  typedef VectorOf<uint16_t, kLanes<double>>::unaligned Half;
  typedef VectorOf<uint32_t, kLanes<double>>::type Word;
  return (Narrow)(__builtin_convertvector(*reinterpret_cast<const Half*>(p), Word) << 16);
}
inline Narrow load_narrow(const f16* p) {
#if UK_X86 && UK_BITS == 512
  return (Narrow)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif UK_X86 && UK_BITS == 256
  return (Narrow)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  Narrow out;
  for (int i = 0; i < kLanes<double>; ++i) out[i] = widen(p[i]);
  return out;
#endif
}

// Between floats and as many doubles. Intrinsics, because g++ would convert a vector in two halves.
inline Vec<double> to_double(Narrow x) {
#if UK_X86 && UK_BITS == 512
  return (Vec<double>)_mm512_cvtps_pd((__m256)x);
#elif UK_X86 && UK_BITS == 256
  return (Vec<double>)_mm256_cvtps_pd((__m128)x);
#else
  return __builtin_convertvector(x, Vec<double>);
#endif
}
inline Narrow to_float(Vec<double> x) {
#if UK_X86 && UK_BITS == 512
  return (Narrow)_mm512_cvtpd_ps((__m512d)x);
#elif UK_X86 && UK_BITS == 256
  return (Narrow)_mm256_cvtpd_ps((__m256d)x);
#else
  return __builtin_convertvector(x, Narrow);
#endif
}

// kLanes<T> elements of type S. T is float (S not double) or double.
template <class T, class S>
inline Vec<T> load_as(const S* p) {
  if constexpr (std::is_same_v<Wide<S>, T>)
    return load_wide(p);
  else
    return to_double(load_narrow(p));
}

inline void narrow(double x, float* p) { *p = float(x); }
template <class S>
inline void narrow(double x, S* p) {
  narrow(float(x), p);
}

// Lanes of 32 bits to 16, the upper halves being zero.
typedef VectorOf<uint32_t, kLanes<float>>::type Words;
inline void store_halves(Words x, uint16_t* p) {
#if UK_X86 && UK_BITS == 512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)x));
#elif UK_X86 && UK_BITS == 256
  const __m256i v = (__m256i)x;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = uint16_t(x[i]);
#endif
}

// The bf16 nearest to each lane, in its upper half; anything in the lower. `round_number`: unless the lane is NaN.
inline Words round_number(Vec<float> v) {
  const Words bits = (Words)v;
  return bits + (((bits >> 16) & 1) + 0x7fff);
}
inline Words round_to_bf16(Vec<float> v) { return v == v ? round_number(v) : (Words)v | 0x400000; }

// Words of the upper halves of `low` below those of `high`.
inline Words upper_halves(Words low, Words high) {
#if UK_X86 && UK_BITS == 256
  return (Words)_mm256_blend_epi16((__m256i)(low >> 16), (__m256i)high, 0xaa);
#else
  return (low >> 16) | (high & 0xffff0000u);
#endif
}

// Whether some lane of either is NaN.
inline bool any_nan(Vec<float> a, Vec<float> b) {
#if UK_X86 && UK_BITS == 512
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
#elif UK_X86 && UK_BITS == 256
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
#else
  int found = 0;
  for (int i = 0; i < kLanes<float>; ++i) found |= (a[i] != a[i]) | (b[i] != b[i]);
  return found != 0;
#endif
}
inline void store_rounded(Vec<float> v, bf16* p) { store_halves(round_to_bf16(v) >> 16, &p->bits); }
inline void store_rounded(Vec<float> v, f16* p) {
#if UK_X86 && UK_BITS == 512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif UK_X86 && UK_BITS == 256
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) narrow(v[i], p + i);
#endif
}

// Lanes of T to elements of type S, rounded to the nearest.
template <class S, class T>
inline void store_as(S* p, Vec<T> v) {
  if constexpr (std::is_same_v<S, T>) {
    store(p, v);
  } else if constexpr (std::is_same_v<S, float>) {
    *reinterpret_cast<NarrowInMemory*>(p) = to_float(v);
  } else if constexpr (std::is_same_v<T, float>) {
    store_rounded(v, p);
  } else {
    for (int i = 0; i < kLanes<T>; ++i) narrow(v[i], p + i);
  }
}

// Vectors that one load brings. Two bf16 lie in a word: the even elements of a range are its lower halves and the
// odd ones its upper halves, at one operation a vector, where the order of lanes does not matter.
template <class T, class S>
inline constexpr int kGroup = std::is_same_v<S, bf16> && std::is_same_v<T, float> ? 2 : 1;
typedef VectorOf<uint32_t, kLanes<float>>::unaligned WordsInMemory;

template <class T, class S>
inline void load_group(const S* p, Vec<T>* x) {
  if constexpr (kGroup<T, S> == 2) {
    const Words words = *reinterpret_cast<const WordsInMemory*>(p);
    x[0] = (Vec<float>)(words << 16);
    x[1] = (Vec<float>)(words & 0xffff0000u);
  } else {
    x[0] = load_as<T>(p);
  }
}
template <class T, class S>
inline void store_group(S* p, const Vec<T>* x) {
  if constexpr (kGroup<T, S> == 2) {
    Words low = round_number(x[0]), high = round_number(x[1]);
    if (__builtin_expect(any_nan(x[0], x[1]), false)) {
      low = round_to_bf16(x[0]);
      high = round_to_bf16(x[1]);
    }
    *reinterpret_cast<WordsInMemory*>(p) = upper_halves(low, high);
  } else {
    store_as<S, T>(p, x[0]);
  }
}

// Adds lanes of T to lanes of double.
template <class T>
inline void fold(Vec<double>& total, Vec<T> lanes) {
  if constexpr (std::is_same_v<T, double>) {
    total += lanes;
  } else {
    float x[kLanes<float>];
    std::memcpy(x, &lanes, sizeof x);
    total += load_as<double>(x) + load_as<double>(x + kLanes<double>);
  }
}

// The last elements of an array, followed by zeros up to a whole vector.
template <class S, int N>
struct Tail {
  S data[N];

  Tail(const S* p, int64_t n) : data{} { std::memcpy(data, p, n * sizeof(S)); }
};

}  // namespace UK_ISA
