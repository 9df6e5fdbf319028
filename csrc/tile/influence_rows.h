// Rows of a store as they are written: codes, scales of blocks, squared norms. ISA-free declarations.
#pragma once
#include "tile/types.h"

namespace uk {

// What is kept of a number: nothing, a float, or an unsigned integer with a scale for every block of columns.
enum class Coding { none, f32, bf16, bytes, nibbles };

constexpr int64_t kMostColumns = 256;  // that share a scale

// x (count, width). Integers are x / scale + levels + 1 with the greatest magnitude of a block levels * scale,
// rounded to the nearest or, `unbiased`, by the random numbers of rows `first`, first + 1, ... A block that is not
// finite has the scale NaN.
struct EncodeRows {
  Operand x;
  int64_t count, width;
  Coding coding;
  int64_t block;
  bool unbiased;
  uint64_t seed;
  int64_t first;
  void* codes;
  float* scales;
  double* sqnorms;

  int64_t blocks() const { return (width + block - 1) / block; }
};

struct InfluenceRowsKernels {
  void (*encode)(const EncodeRows&, const Pool&);
};

}  // namespace uk
