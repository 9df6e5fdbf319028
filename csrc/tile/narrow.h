// From the accumulation type back to memory of any type, rounded to nearest even.
namespace UK_ISA {

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(double x, double* out) { *out = x; }
inline void narrow(float x, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = nan ? uint16_t(bits >> 16 | 0x40u) : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void narrow(float x, f16* out) {
#if UK_X86 && UK_BITS >= 256
  out->bits = uint16_t(_cvtss_sh(x, 0));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    float shifted;
    std::memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    std::memcpy(&half, &shifted, 4);
    half -= 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = uint16_t(sign | half);
#endif
}

// n elements of the accumulation type to `out`, memory of type `dtype`, from its element `at` on.
template <class T>
inline void narrow(const T* from, int64_t n, void* out, int64_t at, uk::Dtype dtype) {
  if constexpr (std::is_same_v<T, double>) {
    std::memcpy(static_cast<double*>(out) + at, from, n * sizeof(double));
  } else {
    switch (dtype) {
      case uk::Dtype::bf16:
        for (int64_t i = 0; i < n; ++i) narrow(from[i], static_cast<bf16*>(out) + at + i);
        break;
      case uk::Dtype::f16:
        for (int64_t i = 0; i < n; ++i) narrow(from[i], static_cast<f16*>(out) + at + i);
        break;
      default: std::memcpy(static_cast<float*>(out) + at, from, n * sizeof(float));
    }
  }
}

}  // namespace UK_ISA
