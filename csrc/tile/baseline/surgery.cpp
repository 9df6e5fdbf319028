#include "tile/baseline/isa.h"

#include "tile/surgery.inc"
