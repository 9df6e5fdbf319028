// Gradient surgery over lists of tensors, ISA-free declarations.
#pragma once
#include "tile/lists.h"

namespace uk {

// (lists, lists) inner products of the lists, each taken as one long vector.
struct Gramian {
  Walk walk;
  double* out;
};

// List 0 is written: sum over k of weights[k] * list (first + k).
struct Combine {
  Walk walk;
  int64_t first;  // 0 where list 0 is itself a term, otherwise 1
  const double* weights;
};

struct SurgeryKernels {
  void (*gramian)(const Gramian&, const Pool&);
  void (*combine)(const Combine&, const Pool&);
};

}  // namespace uk
