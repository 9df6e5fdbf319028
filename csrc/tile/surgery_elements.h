// Gradient surgery element by element, ISA-free declarations.
#pragma once
#include "tile/lists.h"

namespace uk {

// List 0, f, is written from itself and list 1, r.
// Signs: conflict * r where f and r have opposite signs, elsewhere gamma * f + agree * r (no second term if `agree`
// is 0). Drop: keeps or drops the positive and the negative numbers of an element by chance; list 2 has no memory, its
// addresses are the numbers of the elements.
struct Elements {
  Walk walk;
  bool drop;
  double gamma, conflict, agree;
  double leaks[2];    // what is left of a number that is dropped from f, from r
  uint64_t seed;
  double* conflicts;  // (segments), added to: elements of opposite signs
};

struct SurgeryElementsKernels {
  void (*project)(const Elements&, const Pool&);
};

}  // namespace uk
