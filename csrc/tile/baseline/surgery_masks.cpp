#include "tile/baseline/isa.h"

#include "tile/surgery_masks.inc"
