#include "tile/baseline/isa.h"

#include "tile/per_sample/linear_project.inc"
