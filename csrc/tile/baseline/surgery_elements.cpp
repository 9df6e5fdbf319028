#include "tile/baseline/isa.h"

#include "tile/surgery_elements.inc"
