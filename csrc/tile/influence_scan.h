// Search in a store of rows for the ends of each query's ranking, ISA-free declarations.
#pragma once
#include "tile/types.h"

namespace uk {

enum class Rows { dense, bytes, nibbles };

// Stored rows. `bytes`: value (byte - 128) scale; `nibbles`: (nibble - 8) scale, the low one of a byte first; a scale for
// every `block` columns of a row.
struct StoredRows {
  Rows kind;
  Operand dense;
  const uint8_t* codes;
  int64_t row_bytes;
  const float* scales;
  int64_t block;

  int64_t blocks(int64_t depth) const { return (depth + block - 1) / block; }
};

// The k largest and the k smallest of queries times rows, or only one of them: values and indices
// (ends, count, k), the largest in falling, the smallest in rising order; equal ones by index.
struct Scan {
  Operand queries;             // (count, depth), for dense rows; f64 if and only if those are
  const int16_t* codes;        // (count, depth), contiguous, for coded ones: value code * scale
  const float* query_scales;   // (count,)
  StoredRows rows;
  int64_t count, size, depth, k;
  bool largest, smallest;
  void* values;  // float, or double for f64
  int64_t* indices;
};

struct InfluenceScanKernels {
  void (*scan)(const Scan&, const Pool&);
};

}  // namespace uk
