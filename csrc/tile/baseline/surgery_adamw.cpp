#include "tile/baseline/isa.h"

#include "tile/surgery_adamw.inc"
