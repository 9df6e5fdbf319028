// Masks of the elements of largest magnitude, and gradients under a mask: ISA-free declarations.
#pragma once
#include "tile/lists.h"

namespace uk {

// Several masks over one list, all of whose positions are flat. Mask m takes takes[m] elements.
struct TopKMasks {
  Walk walk;
  int64_t masks;
  const int64_t* takes;
  bool bits;          // eight elements a byte, the first in the lowest bit; otherwise a byte each, 0 or 1
  uint8_t* const* out;  // (masks, positions)
};

// List 0, all of whose positions are flat, is zeroed where its mask is.
struct ApplyMask {
  Walk walk;
  const uint8_t* const* masks;  // one a position
  const bool* bits;             // one a position
};

struct SurgeryMasksKernels {
  void (*topk)(const TopKMasks&, const Pool&);
  void (*apply)(const ApplyMask&, const Pool&);
};

}  // namespace uk
