#include "tile/baseline/isa.h"

#include "tile/influence_rows.inc"
