#include <memory>

#include "cpu/lists.h"

namespace uk {
namespace {

int64_t mask_bytes(int64_t elements, bool bits) { return bits ? (elements + 7) / 8 : elements; }

// The masks of one walk over `tensors`, whose outputs are out[mask * stride + first + i].
void fill_masks(const Tensors& tensors, const Tensors& out, int64_t stride, int64_t first, const std::vector<int64_t>& takes,
                bool bits) {
  const int64_t masks = int64_t(takes.size());
  const TensorLists lists(views_of(tensors), 1);
  const Walk walk = lists.walk();
  int64_t elements = 0;
  std::vector<uint8_t*> data;  // of the tensors that have elements, as the walk does
  for (int64_t m = 0; m < masks; ++m)
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (m == 0) elements += tensors[i].numel();
      if (tensors[i].numel() > 0)
        data.push_back(static_cast<uint8_t*>(out[m * stride + first + int64_t(i)].mutable_data_ptr()));
    }
  for (int64_t take : takes)
    STD_TORCH_CHECK(0 <= take && take <= elements, "topk_mask: counts must be in [0, ", elements, "], got ", take);
  kernels().surgery_masks.topk({walk, masks, takes.data(), bits, data.data()}, pool_of(lists));
}

}  // namespace

// counts: a number a mask, or (by_tensor) one for each tensor mask by mask -> the masks, tensors of each together.
Tensors topk_mask(const Tensors& tensors, const std::vector<int64_t>& counts, bool by_tensor, bool bits) {
  const int64_t count = int64_t(tensors.size()), each = by_tensor ? count : 1;
  STD_TORCH_CHECK(each > 0 && int64_t(counts.size()) % each == 0, "topk_mask: ", counts.size(),
                  " counts cannot be masks of ", each);
  const int64_t masks = int64_t(counts.size()) / each;
  const Tensors ordered = in_order(tensors);
  Tensors out;
  out.reserve(masks * count);
  for (int64_t m = 0; m < masks; ++m)
    for (const Tensor& t : tensors) {
      const int64_t bytes = mask_bytes(t.numel(), bits);
      out.push_back(bits ? torch::stable::new_empty(t, {bytes}, ScalarType::Byte)
                         : torch::stable::new_empty(t, t.sizes(), ScalarType::Bool));
    }
  if (!by_tensor) {
    fill_masks(ordered, out, count, 0, counts, bits);
    return out;
  }
  for (int64_t i = 0; i < count; ++i) {
    std::vector<int64_t> takes;
    for (int64_t m = 0; m < masks; ++m) takes.push_back(counts[m * count + i]);
    fill_masks({ordered[i]}, out, count, i, takes, bits);
  }
  return out;
}

// tensors[i] = 0 where masks[i], of its shape or of bits, is 0.
void apply_mask_(const Tensors& tensors, const Tensors& masks) {
  STD_TORCH_CHECK(tensors.size() == masks.size(), "apply_mask_: tensors and masks must have the same length, got ",
                  tensors.size(), " and ", masks.size());
  const Tensors mask_memory = in_order(masks);
  const std::vector<View> written = writable_views_of(tensors);
  check_clash("apply_mask_", written, {});
  Tensors made;
  std::vector<View> views;
  std::vector<const uint8_t*> data;
  std::unique_ptr<bool[]> bits(new bool[tensors.size()]);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const bool packed = masks[i].scalar_type() == ScalarType::Byte;
    STD_TORCH_CHECK(packed || masks[i].scalar_type() == ScalarType::Bool, "apply_mask_: masks must be bool or uint8");
    STD_TORCH_CHECK(masks[i].numel() == mask_bytes(tensors[i].numel(), packed), "apply_mask_: mask ", i,
                    " does not fit its tensor");
    made.push_back(tensors[i].is_contiguous() ? tensors[i] : torch::stable::contiguous(tensors[i]));
    views.push_back(view_of(made[i], made[i].mutable_data_ptr()));
    if (tensors[i].numel() == 0) continue;
    bits[data.size()] = packed;
    data.push_back(static_cast<const uint8_t*>(mask_memory[i].const_data_ptr()));
  }
  const TensorLists lists(views, 1);
  kernels().surgery_masks.apply({lists.walk(), data.data(), bits.get()}, pool_of(lists));
  copy_back(tensors, made);
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("topk_mask", TORCH_BOX(&topk_mask));
  m.impl("apply_mask_", TORCH_BOX(&apply_mask_));
}

}  // namespace uk
