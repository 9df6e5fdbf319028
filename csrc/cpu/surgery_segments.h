#pragma once

#include <algorithm>
#include <vector>

#include "cpu/lists.h"

namespace uk {

enum class Scope : int { global, group, tensor, row, element };

// Which sums each position of the lists is added to, and how many sums there are.
struct Segments {
  std::vector<Segment> of;
  int64_t count;
};

inline int64_t rows_of(const View& v) { return v.dims < 2 ? 1 : v.sizes[0]; }

inline View row_of(const View& v, int64_t row) {
  const char* data = static_cast<const char*>(v.data) + row * v.strides[0] * size_of(v.dtype);
  return {data, v.dtype, v.dims - 1, v.sizes + 1, v.strides + 1, v.contiguous};
}

// Rows that lie one after the other stay together as one position; others become a position each.
inline Segments split_rows(std::vector<View>& views, int64_t lists) {
  const size_t count = views.size() / lists;
  Segments out{{}, 0};
  std::vector<std::vector<View>> by_list(lists);
  for (size_t i = 0; i < count; ++i) {
    const View& first = views[i];
    const int64_t rows = rows_of(first);
    int64_t length = 1;
    bool together = true;
    for (int d = first.dims < 2 ? 0 : 1; d < first.dims; ++d) length *= first.sizes[d];
    for (int64_t k = 0; k < lists; ++k) together = together && views[k * count + i].contiguous;
    together = rows == 1 || length == 0 || (together && length <= kRun * kRunsPerBlock);
    for (int64_t row = 0; row < (together ? std::min<int64_t>(rows, 1) : rows); ++row) {
      out.of.push_back({out.count + row, together && rows > 1 ? length : 0});
      for (int64_t k = 0; k < lists; ++k) {
        const View& v = views[k * count + i];
        by_list[k].push_back(together ? v : row_of(v, row));
      }
    }
    out.count += rows;
  }
  views.clear();
  for (const auto& list : by_list) views.insert(views.end(), list.begin(), list.end());
  return out;
}

// May replace the views by those of rows.
inline Segments segments_of(const char* op, std::vector<View>& views, int64_t lists, Scope scope,
                            const std::vector<int64_t>& groups) {
  const int64_t count = int64_t(views.size()) / lists;
  if (scope == Scope::row) return split_rows(views, lists);
  Segments out{std::vector<Segment>(count), scope == Scope::tensor ? count : 1};
  if (scope == Scope::group) {
    STD_TORCH_CHECK(int64_t(groups.size()) == count, op, ": groups must have one number for each of ", count,
                    " tensors, got ", groups.size());
    for (int64_t group : groups) {
      STD_TORCH_CHECK(group >= 0 && group < count, op, ": groups must be in [0, ", count, "), got ", group);
      out.count = std::max(out.count, group + 1);
    }
  }
  for (int64_t i = 0; i < count; ++i)
    out.of[i].index = scope == Scope::tensor ? i : scope == Scope::group ? groups[i] : 0;
  return out;
}

inline Scope scope_of(const char* op, int64_t scope, int64_t most) {
  STD_TORCH_CHECK(scope >= 0 && scope <= most, op, ": unknown scope ", scope);
  return Scope(scope);
}

// The shape of one result a segment; no such dimension for the global scope.
inline Tensor per_segment(const Tensors& tensors, Scope scope, int64_t segments,
                          std::initializer_list<int64_t> sizes) {
  std::vector<int64_t> shape;
  if (scope != Scope::global) shape.push_back(segments);
  shape.insert(shape.end(), sizes);
  return torch::stable::new_empty(tensors[0], shape, ScalarType::Double);
}

}  // namespace uk
