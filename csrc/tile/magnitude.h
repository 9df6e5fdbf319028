// The largest of some magnitudes, NaN where one is not finite: bits of magnitudes are ordered as they are, NaN and
// infinity above all others.
namespace UK_ISA {

inline float magnitude_of(const float* x, int64_t n) {
  int32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  if (most >= 0x7f800000) return NAN;
  float size;
  std::memcpy(&size, &most, sizeof(size));
  return size;
}

}  // namespace UK_ISA
