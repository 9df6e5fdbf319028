#include "tile/baseline/isa.h"

#include "tile/per_sample/lm_head.inc"
