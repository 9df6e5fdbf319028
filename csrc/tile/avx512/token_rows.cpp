#include "tile/avx512/isa.h"

#if UK_X86_VARIANTS
#include "tile/token_rows.inc"
#endif
