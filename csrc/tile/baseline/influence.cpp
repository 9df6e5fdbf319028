#include "tile/baseline/isa.h"

#include "tile/influence.inc"
