// Gradients kept in 8 bits an element, and a projection that reads them so: ISA-free declarations.
#pragma once
#include "tile/lists.h"

namespace uk {

constexpr int64_t kCodeBlock = 256;  // elements that share a scale; divides kRun

// One list, all of whose positions are flat. x = scale code; codes and scales of one position each.
struct Compressed {
  Walk walk;
  int8_t* const* codes;
  float* const* scales;
};

// A list and a compressed one of the same positions: (2, 2) inner products.
struct CompressedGramian {
  Compressed lists;
  double* out;
};

// List 0 += weight * the compressed one.
struct CompressedAdd {
  Compressed lists;
  double own, weight;
};

struct SurgeryCompressedKernels {
  void (*compress)(const Compressed&, const Pool&);
  void (*decompress)(const Compressed&, const Pool&);
  void (*gramian)(const CompressedGramian&, const Pool&);
  void (*add)(const CompressedAdd&, const Pool&);
};

}  // namespace uk
