#include "cpu/lists.h"

namespace uk {
namespace {

Tensor like(const Tensors& tensors, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(tensors[0], sizes, ScalarType::Double);
}

}  // namespace

// Set by set, each of tensors.size() / sets tensors -> (sets, sets) float64.
Tensor gramian(const Tensors& tensors, int64_t sets) {
  STD_TORCH_CHECK(sets > 0 && !tensors.empty() && int64_t(tensors.size()) % sets == 0, "gramian: ", tensors.size(),
                  " tensors cannot be ", sets, " sets");
  const std::vector<View> views = views_of(tensors);
  check_shapes("gramian", views, views.size() / sets);
  const TensorLists lists(views, sets);
  Tensor out = like(tensors, {sets, sets});
  kernels().surgery.gramian({lists.walk(), static_cast<double*>(out.mutable_data_ptr())}, pool_of(lists));
  return out;
}

// out[i] = sum over k of weights[k] * tensors[k * out.size() + i].
void combine_(const Tensors& out, const Tensors& tensors, const Tensor& weights) {
  if (out.empty() && tensors.empty()) return;
  STD_TORCH_CHECK(!out.empty() && !tensors.empty() && tensors.size() % out.size() == 0, "combine_: ", tensors.size(),
                  " tensors cannot be sets of ", out.size());
  const int64_t sets = int64_t(tensors.size() / out.size());
  STD_TORCH_CHECK(weights.dim() == 1 && weights.size(0) == sets && weights.scalar_type() == ScalarType::Double &&
                      weights.is_contiguous(),
                  "combine_: weights must be a contiguous float64 vector of ", sets, " elements");
  std::vector<View> all = writable_views_of(out);
  const std::vector<View> views = views_of(tensors);
  check_clash("combine_", all, views);
  all.insert(all.end(), views.begin(), views.end());
  check_shapes("combine_", all, out.size());
  const TensorLists lists(all, sets + 1);
  kernels().surgery.combine({lists.walk(), 1, static_cast<const double*>(weights.const_data_ptr())}, pool_of(lists));
}

// A-GEM: forget -= min(0, <f, r>) / |r|^2 retain. Writes nothing where there is no conflict.
std::tuple<Tensor, Tensor> project_conflict_(const Tensors& forget, const Tensors& retain, int64_t rule) {
  STD_TORCH_CHECK(!forget.empty() && forget.size() == retain.size(), "project_conflict_: forget and retain must have ",
                  "the same number of tensors, at least one, got ", forget.size(), " and ", retain.size());
  STD_TORCH_CHECK(rule == 0, "project_conflict_: unknown rule ", rule);
  std::vector<View> all = writable_views_of(forget);
  const std::vector<View> views = views_of(retain);
  check_clash("project_conflict_", all, views);
  all.insert(all.end(), views.begin(), views.end());
  check_shapes("project_conflict_", all, forget.size());
  const TensorLists lists(all, 2);
  const Pool pool = pool_of(lists);
  Tensor gram = like(forget, {2, 2}), weights = like(forget, {2});
  double* g = static_cast<double*>(gram.mutable_data_ptr());
  double* w = static_cast<double*>(weights.mutable_data_ptr());
  kernels().surgery.gramian({lists.walk(), g}, pool);
  const double dot = g[1], square = g[3];
  const bool conflict = !(dot >= 0) && square != 0;  // a NaN is passed on, not hidden
  w[0] = 1;
  w[1] = conflict ? -dot / square : 0;
  if (conflict) kernels().surgery.combine({lists.walk(), 0, w}, pool);
  return {gram, weights};
}

std::tuple<int64_t, int64_t> find_clash_of(const Tensors& out, const Tensors& tensors) {
  const Clash clash = find_clash(views_of(out), views_of(tensors));
  return {clash.out, clash.other};
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("gramian", TORCH_BOX(&gramian));
  m.impl("combine_", TORCH_BOX(&combine_));
  m.impl("project_conflict_", TORCH_BOX(&project_conflict_));
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CompositeExplicitAutograd, m) {
  m.impl("find_clash", TORCH_BOX(&find_clash_of));
}

}  // namespace uk
