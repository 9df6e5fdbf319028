#include "tile/baseline/isa.h"

#include "tile/token_loss.inc"
