#include "tile/avx512/isa.h"

#if UK_X86_VARIANTS
#include "tile/per_sample/lm_head.inc"
#endif
