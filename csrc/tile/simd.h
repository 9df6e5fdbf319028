// Vectors of the ISA that the including translation unit is compiled for.
// The including kernels_*.cpp sets UK_BITS (128, 256, 512), UK_ISA (the namespace) and UK_X86: whether
// intrinsics of that width may be used (g++ does not define __FMA__ and the like after a target pragma).
// GCC vector extensions carry the arithmetic, so one source serves every width; only the fused
// multiply-add and the half-precision conversions need intrinsics.
#include <cstdint>
#include <cstring>

namespace UK_ISA {

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias));
};

template <class T>
inline constexpr int kLanes = UK_BITS / 8 / sizeof(T);
template <class T>
using Vec = typename VectorOf<T, kLanes<T>>::type;
using Quad = VectorOf<float, 4>::type;

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T, kLanes<T>>::unaligned*>(p);
}
template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T, kLanes<T>>::unaligned*>(p) = v;
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // folds to a broadcast; 0 + x would not (it changes -0)
}

// The same from memory. Zen 4 shuffles for a vbroadcastss of 512 bits; vpbroadcastd is a load alone.
inline Vec<float> spread(const float* p) {
#if UK_X86 && UK_BITS == 512
  int bits;
  std::memcpy(&bits, p, 4);
  return (Vec<float>)_mm512_set1_epi32(bits);
#else
  return splat(*p);
#endif
}
inline Vec<double> spread(const double* p) {
#if UK_X86 && UK_BITS == 512
  long long bits;
  std::memcpy(&bits, p, 8);
  return (Vec<double>)_mm512_set1_epi64(bits);
#else
  return splat(*p);
#endif
}

// a * b + c with one rounding where the ISA has it.
template <class T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
#if UK_X86 && UK_BITS == 512
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif UK_X86 && UK_BITS == 256
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#endif
  return a * b + c;
}

struct Plus {
  template <class V>
  static V of(V a, V b) { return a + b; }
};
struct Larger {
  template <class V>
  static V of(V a, V b) { return a > b ? a : b; }
};

// Of all lanes in a fixed order: of the halves of a vector, of the halves of the lower half, ...
template <class Op, class T>
inline T reduce_lanes(Vec<T> v) {
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typename VectorOf<Index, kLanes<T>>::type lanes;
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i;
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2) v = Op::of(v, __builtin_shuffle(v, lanes ^ half));
  return v[0];
}
template <class T>
inline T sum_lanes(Vec<T> v) {
  return reduce_lanes<Plus, T>(v);
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Two neighbouring steps of the reduction, what a bf16 dot instruction takes.
struct Bf16Pair {
  bf16 first, second;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float widen(f16 x) {
#if UK_X86 && UK_BITS >= 256
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  uint32_t bits;
  float out;
  if (magnitude >= 0x7c00u) {
    bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else {
    // Shift into place, then rescale: exact for normals and subnormals alike.
    bits = magnitude << 13;
    std::memcpy(&out, &bits, 4);
    out *= 0x1p112f;
    std::memcpy(&bits, &out, 4);
    bits |= sign;
  }
  std::memcpy(&out, &bits, 4);
  return out;
#endif
}

// A vector of the accumulation type from memory of any input type.
inline Vec<float> load_wide(const float* p) { return load(p); }
inline Vec<double> load_wide(const double* p) { return load(p); }
inline Vec<float> load_wide(const bf16* p) {
#if UK_X86 && UK_BITS == 512
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif UK_X86 && UK_BITS == 256
  // g++ would convert a vector in two halves here.
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  typedef typename VectorOf<uint16_t, kLanes<float>>::unaligned Half;
  typedef typename VectorOf<uint32_t, kLanes<float>>::type Word;
  const Word words = __builtin_convertvector(*reinterpret_cast<const Half*>(p), Word) << 16;
  return (Vec<float>)words;
#endif
}
inline Vec<float> load_wide(const f16* p) {
#if UK_X86 && UK_BITS == 512
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif UK_X86 && UK_BITS == 256
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> out;
  for (int i = 0; i < kLanes<float>; ++i) out[i] = widen(p[i]);
  return out;
#endif
}

// Pairs are moved as 32-bit words.
inline float widen(Bf16Pair x) {
  float out;
  std::memcpy(&out, &x, 4);
  return out;
}
inline Quad load_quad(const Bf16Pair* p) {
  Quad out;
  std::memcpy(&out, p, 16);
  return out;
}
inline Quad load_quad(const float* p) {
  return *reinterpret_cast<const VectorOf<float, 4>::unaligned*>(p);
}
template <class S>
inline Quad load_quad(const S* p) {
  return Quad{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
inline Quad load_quad(const bf16* p) {
  typedef VectorOf<uint16_t, 4>::unaligned Half;
  typedef VectorOf<uint32_t, 4>::type Word;
  return (Quad)(__builtin_convertvector(*reinterpret_cast<const Half*>(p), Word) << 16);
}

// The type that inputs of type S are accumulated in.
template <class S>
using Wide = decltype(widen(S{}));

// The same for what panels hold: float, double, or pairs for the bf16 dot instruction.
template <class P>
struct PanelTraits {
  using Sum = P;
  static constexpr int kSteps = 1;
};
template <>
struct PanelTraits<Bf16Pair> {
  using Sum = float;
  static constexpr int kSteps = 2;
};
template <class P>
using Sum = typename PanelTraits<P>::Sum;

// Whether Bf16Pair panels are worth packing on this processor.
inline bool has_bf16_dot() {
#if UK_X86 && UK_BITS == 512
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace UK_ISA
