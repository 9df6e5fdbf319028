#include "tile/avx2/isa.h"

#if UK_X86_VARIANTS
#include "tile/influence_rows.inc"
#endif
