#include "tile/per_sample/ids.h"

#include <algorithm>

namespace uk {
namespace {

constexpr int kDigit = 8;
constexpr int64_t kFew = 48;  // tokens that are sorted by insertion

void insert_sorted(Token* tokens, int64_t count) {
  for (int64_t i = 1; i < count; ++i) {
    const Token token = tokens[i];
    int64_t j = i;
    for (; j > 0 && tokens[j - 1].id > token.id; --j) tokens[j] = tokens[j - 1];
    tokens[j] = token;
  }
}

// Stable, by one digit of the ids.
void sort_by_digit(const Token* from, int64_t count, int shift, Token* to) {
  int64_t begin[(1 << kDigit) + 1] = {};
  const int64_t mask = (1 << kDigit) - 1;
  for (int64_t i = 0; i < count; ++i) ++begin[(from[i].id >> shift & mask) + 1];
  for (int64_t d = 0; d < mask; ++d) begin[d + 1] += begin[d];
  for (int64_t i = 0; i < count; ++i) to[begin[from[i].id >> shift & mask]++] = from[i];
}

bool before(const Token& token, int64_t id) { return token.id < id; }

}  // namespace

int64_t sort_tokens(const Ids& ids, int64_t begin, int64_t end, Token* sorted, Token* spare) {
  int64_t count = 0, bits = 0;
  for (int64_t b = begin; b < end; ++b)
    for (int64_t t = 0; t < ids.tokens; ++t) {
      const int64_t id = ids.at(b, t);
      if (id == ids.skipped) continue;
      if (id < 0 || id >= ids.rows) return kOutOfRange;
      sorted[count++] = {id, b * ids.tokens + t};
      bits |= id;
    }
  if (count <= kFew) {
    insert_sorted(sorted, count);
    return count;
  }
  Token *from = sorted, *to = spare;
  for (int shift = 0; shift < 64 && bits >> shift != 0; shift += kDigit) {
    sort_by_digit(from, count, shift, to);
    std::swap(from, to);
  }
  if (from != sorted) std::copy(from, from + count, sorted);
  return count;
}

int64_t find_id(const Token* sorted, int64_t count, int64_t id) {
  return std::lower_bound(sorted, sorted + count, id, before) - sorted;
}

int64_t share_begin(const Token* sorted, int64_t count, int64_t part, int64_t parts) {
  const int64_t at = part >= parts ? count : count / parts * part + count % parts * part / parts;
  if (at == 0 || at == count || sorted[at].id != sorted[at - 1].id) return at;
  return find_id(sorted, count, sorted[at].id + 1);
}

}  // namespace uk
