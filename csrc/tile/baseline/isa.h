// Kernels for any processor.
#pragma once
#include <atomic>
#include <cmath>
#include <type_traits>

#include "tile/kernels.h"

#define UK_BITS 128
#define UK_X86 0
#define UK_ISA uk_baseline
#include "tile/engine.inc"
