#include "tile/baseline/isa.h"

#include "tile/influence_sketch.inc"
