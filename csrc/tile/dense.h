// Plain products and measurements on the bare core: the yardsticks of the operators built on it.
#pragma once
#include "tile/types.h"

namespace uk {

// C (rows x cols, contiguous; float, or double for f64 inputs) = A B^T with A (rows x depth), B (cols x depth).
struct Matmul {
  Operand a, b;
  int64_t rows, cols, depth;
  void* out;
};

struct DenseKernels {
  void (*matmul)(const Matmul&, const Pool&);
  // Multiply-adds a loop of independent vector FMAs makes, times 2: the FLOPs of `iterations` steps.
  double (*fma_loop)(int64_t iterations);
};

}  // namespace uk
