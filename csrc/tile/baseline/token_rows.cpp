#include "tile/baseline/isa.h"

#include "tile/token_rows.inc"
