#include <atomic>
#include <cmath>
#include <type_traits>

#include "tile/kernels.h"

#define UK_BITS 128
#define UK_X86 0
#define UK_ISA uk_baseline
#include "tile/variant.inc"

namespace uk {
const Kernels kBaseline = UK_KERNELS_OF("baseline");
}
