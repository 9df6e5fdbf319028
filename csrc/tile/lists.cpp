#include "tile/lists.h"

#include <algorithm>
#include <numeric>

namespace uk {
namespace {

struct Layout {
  std::vector<int64_t> sizes;
  std::vector<std::vector<int64_t>> strides;  // one a list

  void erase(size_t d) {
    sizes.erase(sizes.begin() + d);
    for (auto& s : strides) s.erase(s.begin() + d);
  }
  // All elements adjacent, in the order of the one dimension that is left.
  bool dense() const {
    return sizes.empty() || (sizes.size() == 1 && std::all_of(strides.begin(), strides.end(),
                                                              [](const auto& s) { return s[0] == 1; }));
  }
};

// Dimensions of size 1 dropped, the rest with the largest strides first and joined where every list allows it.
Layout joint_layout(const std::vector<const View*>& views) {
  const View& first = *views[0];
  std::vector<int> order;
  for (int d = 0; d < first.dims; ++d)
    if (first.sizes[d] != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    for (const View* v : views)
      if (v->strides[a] != v->strides[b]) return v->strides[a] > v->strides[b];
    return false;
  });
  Layout out;
  out.strides.resize(views.size());
  for (int d : order) {
    out.sizes.push_back(first.sizes[d]);
    for (size_t k = 0; k < views.size(); ++k) out.strides[k].push_back(views[k]->strides[d]);
  }
  for (size_t d = out.sizes.size(); d-- > 1;) {
    const bool joins = std::all_of(out.strides.begin(), out.strides.end(),
                                   [&](auto& s) { return s[d - 1] == s[d] * out.sizes[d]; });
    if (!joins) continue;
    out.sizes[d] *= out.sizes[d - 1];
    out.erase(d - 1);
  }
  return out;
}

// Moves next to the last dimension the one that some list would rather have there. True if there is one.
bool second_choice(Layout& layout) {
  const size_t last = layout.sizes.size() - 1;
  for (const auto& s : layout.strides) {
    size_t best = last;
    for (size_t d = 0; d < last; ++d)
      if (s[d] != 0 && s[d] < s[best]) best = d;
    if (best == last) continue;
    std::swap(layout.sizes[best], layout.sizes[last - 1]);
    for (auto& t : layout.strides) std::swap(t[best], t[last - 1]);
    return true;
  }
  return false;
}

void tile(Position& p, Layout& layout) {
  while (layout.sizes.size() < 2) {
    layout.sizes.insert(layout.sizes.begin(), 1);
    for (auto& s : layout.strides) s.insert(s.begin(), 0);
  }
  const int64_t edge = second_choice(layout) ? 32 : kRun;
  const size_t d = layout.sizes.size();
  const int64_t rows = layout.sizes[d - 2], cols = layout.sizes[d - 1];
  p.tile_cols = std::min(cols, edge);
  p.tile_rows = std::min(rows, kRun / p.tile_cols);
  p.tile_cols = std::min(cols, kRun / p.tile_rows);
  p.dims = int(d);
  p.runs = (rows + p.tile_rows - 1) / p.tile_rows * ((cols + p.tile_cols - 1) / p.tile_cols);
  for (size_t i = 0; i + 2 < d; ++i) p.runs *= layout.sizes[i];
}

int64_t elements_of(const View& v) {
  return std::accumulate(v.sizes, v.sizes + v.dims, int64_t(1), std::multiplies<int64_t>());
}

}  // namespace

TensorLists::TensorLists(const std::vector<View>& views, int64_t lists, const std::vector<Segment>& segments)
    : lists_(lists) {
  const int64_t count = lists > 0 ? int64_t(views.size()) / lists : 0;
  positions_.reserve(count);
  data_.reserve(views.size());  // positions point into these two: they must not grow
  dtypes_.reserve(views.size());
  std::vector<const View*> here(lists);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t k = 0; k < lists; ++k) here[k] = &views[k * count + i];
    if (elements_of(*here[0]) > 0) add(here, segments.empty() ? Segment{} : segments[i]);
  }
  const int64_t* geometry = geometry_.data();
  for (Position& p : positions_) {
    p.sizes = geometry;
    p.strides = geometry + p.dims;
    geometry += p.dims * (lists + 1);
  }
}

void TensorLists::add(const std::vector<const View*>& views, const Segment& segment) {
  Position p{};
  p.segment = segment.index;
  p.row = segment.row;
  p.block = kBlockBytes / size_of(views[0]->dtype);
  if (p.row > 0) p.block = std::max<int64_t>(1, p.block / p.row) * p.row;
  p.data = data_.data() + data_.size();
  p.dtypes = dtypes_.data() + dtypes_.size();
  p.elements = elements_of(*views[0]);
  p.runs = (p.elements + kRun - 1) / kRun;
  p.uniform = p.flat = true;
  for (const View* v : views) {
    data_.push_back(v->data);
    dtypes_.push_back(v->dtype);
    p.flat = p.flat && v->contiguous;
    p.uniform = p.uniform && v->dtype == views[0]->dtype;
    p.has_f64 = p.has_f64 || v->dtype == Dtype::f64;
  }
  if (!p.flat) {
    Layout layout = joint_layout(views);
    p.flat = layout.dense();
    if (!p.flat) {
      tile(p, layout);
      geometry_.insert(geometry_.end(), layout.sizes.begin(), layout.sizes.end());
      for (const auto& s : layout.strides) geometry_.insert(geometry_.end(), s.begin(), s.end());
    }
  }
  p.first_block = blocks_;
  blocks_ += p.blocks();
  positions_.push_back(p);
}

int64_t TensorLists::bytes() const {
  int64_t sum = 0;
  for (const Position& p : positions_)
    for (int64_t k = 0; k < lists_; ++k) sum += p.elements * size_of(p.dtypes[k]);
  return sum;
}

}  // namespace uk
