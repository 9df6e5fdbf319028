#include "cpu/lists.h"

namespace uk {
namespace {

int64_t blocks_of(const Tensor& t) { return (t.numel() + kCodeBlock - 1) / kCodeBlock; }

// Codes and scales of the tensors that have elements, as the walk does.
struct Memory {
  Tensors made[2];
  std::vector<int8_t*> codes;
  std::vector<float*> scales;

  Memory(const char* op, const Tensors& tensors, const Tensors& given_codes, const Tensors& given_scales)
      : made{in_order(given_codes), in_order(given_scales)} {
    const Tensors &c = made[0], &s = made[1];
    STD_TORCH_CHECK(c.size() == tensors.size() && s.size() == tensors.size(), op, ": lists must have one length");
    for (size_t i = 0; i < tensors.size(); ++i) {
      STD_TORCH_CHECK(c[i].numel() == tensors[i].numel() && c[i].scalar_type() == ScalarType::Char, op, ": codes ", i,
                      " must be int8 of the tensor's size");
      STD_TORCH_CHECK(s[i].numel() == blocks_of(tensors[i]) && s[i].scalar_type() == ScalarType::Float, op,
                      ": scales ", i, " must be float32, one for ", kCodeBlock, " elements");
      if (tensors[i].numel() == 0) continue;
      codes.push_back(static_cast<int8_t*>(const_cast<void*>(c[i].const_data_ptr())));
      scales.push_back(static_cast<float*>(const_cast<void*>(s[i].const_data_ptr())));
    }
  }
  Compressed with(const TensorLists& lists) const { return {lists.walk(), codes.data(), scales.data()}; }
};

}  // namespace

std::tuple<Tensors, Tensors> compress(const Tensors& tensors) {
  const Tensors made = in_order(tensors);
  Tensors codes, scales;
  for (const Tensor& t : tensors) {
    codes.push_back(torch::stable::new_empty(t, t.sizes(), ScalarType::Char));
    const int64_t blocks = blocks_of(t);
    scales.push_back(torch::stable::new_empty(t, {blocks}, ScalarType::Float));
  }
  const Memory memory("compress", made, codes, scales);
  const TensorLists lists(views_of(made), 1);
  kernels().surgery_compressed.compress(memory.with(lists), pool_of(lists));
  return {codes, scales};
}

void decompress_(const Tensors& out, const Tensors& codes, const Tensors& scales) {
  const Tensors made = in_order(out);
  check_clash("decompress_", writable_views_of(out), {});
  const Memory memory("decompress_", made, codes, scales);
  const TensorLists lists(writable_views_of(made), 1);
  kernels().surgery_compressed.decompress(memory.with(lists), pool_of(lists));
  copy_back(out, made);
}

// A-GEM: forget -= min(0, <f, r>) / |r|^2 r. Writes nothing where there is no conflict.
std::tuple<Tensor, Tensor> project_conflict_compressed_(const Tensors& forget, const Tensors& codes,
                                                        const Tensors& scales) {
  STD_TORCH_CHECK(!forget.empty(), "project_conflict_compressed_: forget must have at least one tensor");
  check_clash("project_conflict_compressed_", writable_views_of(forget), {});
  const Tensors made = in_order(forget);
  const Memory memory("project_conflict_compressed_", made, codes, scales);
  const TensorLists lists(writable_views_of(made), 1);
  const Pool pool = pool_of(lists);
  Tensor gram = torch::stable::new_empty(forget[0], {2, 2}, ScalarType::Double);
  Tensor weights = torch::stable::new_empty(forget[0], {2}, ScalarType::Double);
  double* g = static_cast<double*>(gram.mutable_data_ptr());
  double* w = static_cast<double*>(weights.mutable_data_ptr());
  kernels().surgery_compressed.gramian({memory.with(lists), g}, pool);
  const double dot = g[1], square = g[3];
  const bool conflict = !(dot >= 0) && square != 0;  // a NaN is passed on, not hidden
  w[0] = 1;
  w[1] = conflict ? -dot / square : 0;
  if (!conflict) return {gram, weights};
  kernels().surgery_compressed.add({memory.with(lists), w[0], w[1]}, pool);
  copy_back(forget, made);
  return {gram, weights};
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("compress", TORCH_BOX(&compress));
  m.impl("decompress_", TORCH_BOX(&decompress_));
  m.impl("project_conflict_compressed_", TORCH_BOX(&project_conflict_compressed_));
}

}  // namespace uk
