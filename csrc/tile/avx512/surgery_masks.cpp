#include "tile/avx512/isa.h"

#if UK_X86_VARIANTS
#include "tile/surgery_masks.inc"
#endif
