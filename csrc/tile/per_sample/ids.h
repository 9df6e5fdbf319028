// Tokens in the order of their ids, so that those which share a row of an embedding lie together: no torch, no ISA.
#pragma once
#include "tile/types.h"

namespace uk {

// Ids (batch, tokens) of rows 0 ... rows - 1 of an embedding; tokens of the id `skipped` have no gradient.
struct Ids {
  const void* data;
  bool wide;  // int64, otherwise int32
  int64_t batch_stride, token_stride;
  int64_t batch, tokens, rows, skipped;

  int64_t at(int64_t sample, int64_t token) const {
    const int64_t i = sample * batch_stride + token * token_stride;
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct Token {
  int64_t id;
  int64_t place;  // sample * tokens + position
};

constexpr int64_t kOutOfRange = -1;

// The tokens of samples [begin, end) into `sorted`, by id and then by place; `spare` is as large. How many they
// are, or kOutOfRange where an id is no row. Linear time.
int64_t sort_tokens(const Ids& ids, int64_t begin, int64_t end, Token* sorted, Token* spare);

// The first of `count` sorted tokens whose id is at least `id`.
int64_t find_id(const Token* sorted, int64_t count, int64_t id);

// Where the ids that begin in one of `parts` equal shares of the tokens begin.
int64_t share_begin(const Token* sorted, int64_t count, int64_t part, int64_t parts);

}  // namespace uk
