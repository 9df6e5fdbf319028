// Kernels for AVX2; nothing where the compiler or the processor's family cannot have them.
#pragma once
#include <atomic>
#include <cmath>
#include <type_traits>

#include "tile/kernels.h"

#if UK_X86_VARIANTS
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c,bmi2")
#define UK_BITS 256
#define UK_X86 1
#define UK_ISA uk_avx2
#include "tile/engine.inc"
#endif
