#include "tile/baseline/isa.h"

#include "tile/dense.inc"
