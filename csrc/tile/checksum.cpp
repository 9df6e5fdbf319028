#include "tile/checksum.h"

#include <array>
#include <cstring>

#include "tile/kernels.h"

#if UK_X86_VARIANTS
#include <immintrin.h>
#endif

namespace uk {
namespace {

// Polynomials over two elements with the highest power in the lowest bit, modulo that of CRC-32.
constexpr uint32_t times_x(uint32_t r) { return r >> 1 ^ (r & 1 ? 0xEDB88320u : 0); }

constexpr std::array<uint32_t, 256> table_of_bytes() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t r = byte;
    for (int bit = 0; bit < 8; ++bit) r = times_x(r);
    table[byte] = r;
  }
  return table;
}
constexpr std::array<uint32_t, 256> kBytes = table_of_bytes();

uint32_t by_bytes(const uint8_t* bytes, int64_t size, uint32_t state) {
  for (int64_t i = 0; i < size; ++i) state = state >> 8 ^ kBytes[(state ^ bytes[i]) & 255];
  return state;
}

#if UK_X86_VARIANTS

// What a carry-less product of 64 bits has to be taken with to move them by `bits`. The product of two reflected
// numbers is one place short, and the factor itself stands 31 places higher.
constexpr int64_t factor(int bits) {
  uint32_t r = 0x80000000u;
  for (int n = 0; n < bits - 32; ++n) r = times_x(r);
  return int64_t(uint64_t(r) << 1);
}

[[gnu::target("pclmul,sse4.1")]] inline __m128i load_bytes(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

// x moved by the distance that `by` is made for, and what stands there.
[[gnu::target("pclmul,sse4.1")]] inline __m128i fold(__m128i x, __m128i by, __m128i there) {
  return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, by, 0x00), _mm_clmulepi64_si128(x, by, 0x11)), there);
}

// At least 64 bytes, by four chains of 16 each ("Fast CRC computation using PCLMULQDQ", Gopal et al., Intel, 2009).
[[gnu::target("pclmul,sse4.1")]] uint32_t by_products(const uint8_t* bytes, int64_t size, uint32_t state) {
  const __m128i by64 = _mm_set_epi64x(factor(512), factor(576)), by16 = _mm_set_epi64x(factor(128), factor(192));
  __m128i x[4];
  for (int n = 0; n < 4; ++n) x[n] = load_bytes(bytes + 16 * n);
  x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128(int(state)));
  for (bytes += 64, size -= 64; size >= 64; bytes += 64, size -= 64)
    for (int n = 0; n < 4; ++n) x[n] = fold(x[n], by64, load_bytes(bytes + 16 * n));
  for (int n = 1; n < 4; ++n) x[0] = fold(x[0], by16, x[n]);
  for (; size >= 16; bytes += 16, size -= 16) x[0] = fold(x[0], by16, load_bytes(bytes));
  uint8_t rest[16];
  std::memcpy(rest, x, 16);
  return by_bytes(bytes, size, by_bytes(rest, 16, 0));
}

bool has_products() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
}

#endif

}  // namespace

uint32_t crc32(const uint8_t* bytes, int64_t size, uint32_t crc) {
#if UK_X86_VARIANTS
  static const bool products = has_products();
  if (products && size >= 64) return ~by_products(bytes, size, ~crc);
#endif
  return ~by_bytes(bytes, size, ~crc);
}

}  // namespace uk
