// Gradient surgery over lists of tensors, ISA-free declarations.
#pragma once
#include "tile/lists.h"

namespace uk {

// Inner products of the lists, over the blocks [begin, end).
struct Gramian {
  Walk walk;
  int64_t begin, end;
  double* sums;  // (segments, pairs), pairs (a, b) with a <= b row by row; added to, rows are overwritten
  double* parts;  // (end - begin, pairs) to leave the sums of the blocks in instead; null otherwise. Not for rows
};

// List 0 is written: sum over k of weights[segment][k] * list (first + k), over the blocks [begin, end).
struct Combine {
  Walk walk;
  int64_t begin, end;
  int64_t first;  // 0 where list 0 is itself a term, otherwise 1
  const double* weights;  // (segments, terms)
  bool sparing;  // with first = 0: terms of weight 0 are not read, and weights (1, 0, ...) write nothing
};

struct SurgeryKernels {
  void (*gramian)(const Gramian&, const Pool&);
  void (*combine)(const Combine&, const Pool&);
};

}  // namespace uk
