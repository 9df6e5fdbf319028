// Search in a store of quantised rows, ISA-free declarations.
#pragma once
#include "tile/types.h"

namespace uk {

// Rows of unsigned bytes, value (byte - 128) scale, or of nibbles, (nibble - 8) scale, the low one first; a scale for
// every `block` columns of a row. Queries are the same with signed bytes of at most 63, or 127 for nibbles.
struct QuantisedScan {
  const int8_t* queries;      // (count, depth), contiguous
  const float* query_scales;  // (count, blocks)
  const uint8_t* rows;        // (size, row_bytes)
  const float* row_scales;    // (size, blocks)
  int64_t count, size, depth, row_bytes, block, k;
  bool nibbles, both;         // both: the k largest, then the k smallest
  bool largest;
  float* values;              // (count, k), or (2, count, k)
  int64_t* indices;
};

struct InfluenceScanKernels {
  void (*scan)(const QuantisedScan&, const Pool&);
};

}  // namespace uk
