// Glue that the operators over lists of tensors share.
#pragma once
#include <vector>

#include "cpu/common.h"

namespace uk {

using Tensors = std::vector<Tensor>;

inline View view_of(const Tensor& t, const void* data) {
  return {data, dtype_of(t, "every tensor"), int(t.dim()), t.sizes().data(), t.strides().data(), t.is_contiguous()};
}

inline std::vector<View> views_of(const Tensors& tensors) {
  std::vector<View> out;
  out.reserve(tensors.size());
  for (const Tensor& t : tensors) out.push_back(view_of(t, t.const_data_ptr()));
  return out;
}

// To be asked for before any const view: making shared memory writable may move it.
inline std::vector<View> writable_views_of(const Tensors& tensors) {
  std::vector<View> out;
  out.reserve(tensors.size());
  for (const Tensor& t : tensors) out.push_back(view_of(t, t.mutable_data_ptr()));
  return out;
}

// views[i] has the shape of views[i - count].
inline void check_shapes(const char* op, const std::vector<View>& views, size_t count) {
  for (size_t i = count; i < views.size(); ++i) {
    const View &a = views[i - count], &b = views[i];
    bool same = a.dims == b.dims;
    for (int d = 0; same && d < a.dims; ++d) same = a.sizes[d] == b.sizes[d];
    STD_TORCH_CHECK(same, op, ": shapes of tensor ", i % count, " differ between the lists");
  }
}

inline void check_clash(const char* op, const std::vector<View>& out, const std::vector<View>& views) {
  const Clash clash = find_clash(out, views);
  STD_TORCH_CHECK(!clash, op, ": tensor ", clash.out, " overlaps in memory with ",
                  clash.other < 0 ? "itself or another tensor that is written" : "another tensor");
}

// For what follows the order of the indices: tensors whose memory does, copies where need be.
inline Tensors in_order(const Tensors& tensors) {
  Tensors out;
  out.reserve(tensors.size());
  for (const Tensor& t : tensors) out.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
  return out;
}

// Takes what was written to those copies back.
inline void copy_back(const Tensors& tensors, const Tensors& made) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    Tensor to = tensors[i];
    if (!to.is_contiguous()) torch::stable::copy_(to, made[i]);
  }
}

// Arithmetic hides behind memory here: about two operations a byte.
inline Pool pool_of(const TensorLists& lists) { return pool_for(2.0 * double(lists.bytes())); }

}  // namespace uk
