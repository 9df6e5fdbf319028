#include "tile/baseline/isa.h"

#include "tile/per_sample/embedding.inc"
