#include <atomic>
#include <cmath>
#include <type_traits>

#include "tile/kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2")
#define UK_BITS 512
#define UK_X86 1
#define UK_ISA uk_avx512
#include "tile/variant.inc"

namespace uk {
const Kernels kAvx512 = UK_KERNELS_OF("avx512");
}
#else
namespace uk {
const Kernels kAvx512{};
}
#endif
