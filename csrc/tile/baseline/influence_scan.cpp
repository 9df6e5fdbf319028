#include "tile/baseline/isa.h"

#include "tile/influence_scan.inc"
