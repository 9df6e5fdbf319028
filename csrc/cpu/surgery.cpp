#include <vector>

#include "cpu/surgery_segments.h"

namespace uk {

// Set by set, each of tensors.size() / sets tensors -> (sets, sets) float64, one a segment.
Tensor gramian(const Tensors& tensors, int64_t sets, int64_t scope, std::vector<int64_t> groups) {
  STD_TORCH_CHECK(sets > 0 && !tensors.empty() && int64_t(tensors.size()) % sets == 0, "gramian: ", tensors.size(),
                  " tensors cannot be ", sets, " sets");
  const Scope by = scope_of("gramian", scope, int64_t(Scope::row));
  std::vector<View> views = views_of(tensors);
  check_shapes("gramian", views, views.size() / sets);
  const Segments segments = segments_of("gramian", views, sets, by, groups);
  const TensorLists lists(views, sets, segments.of);
  Tensor out = per_segment(tensors, by, segments.count, {sets, sets});
  double* full = static_cast<double*>(out.mutable_data_ptr());
  std::vector<double> sums(segments.count * sets * (sets + 1) / 2);
  const Walk walk = lists.walk();
  kernels().surgery.gramian({walk, 0, walk.blocks, sums.data(), nullptr}, pool_of(lists));
  const double* sum = sums.data();
  for (int64_t segment = 0; segment < segments.count; ++segment, full += sets * sets)
    for (int64_t a = 0; a < sets; ++a)
      for (int64_t b = a; b < sets; ++b) full[a * sets + b] = full[b * sets + a] = *sum++;
  return out;
}

// out[i] = sum over k of weights[..., k] * tensors[k * out.size() + i].
void combine_(const Tensors& out, const Tensors& tensors, const Tensor& weights, int64_t scope,
              std::vector<int64_t> groups) {
  if (out.empty() && tensors.empty()) return;
  STD_TORCH_CHECK(!out.empty() && !tensors.empty() && tensors.size() % out.size() == 0, "combine_: ", tensors.size(),
                  " tensors cannot be sets of ", out.size());
  const Scope by = scope_of("combine_", scope, int64_t(Scope::row));
  const int64_t sets = int64_t(tensors.size() / out.size());
  std::vector<View> all = writable_views_of(out);
  const std::vector<View> views = views_of(tensors);
  check_clash("combine_", all, views);
  all.insert(all.end(), views.begin(), views.end());
  check_shapes("combine_", all, out.size());
  const Segments segments = segments_of("combine_", all, sets + 1, by, groups);
  const int64_t dims = by == Scope::global ? 1 : 2;
  STD_TORCH_CHECK(weights.dim() == dims && weights.size(dims - 1) == sets &&
                      (dims == 1 || weights.size(0) == segments.count) &&
                      weights.scalar_type() == ScalarType::Double && weights.is_contiguous(),
                  "combine_: weights must be contiguous float64, ", sets, " elements for each of ", segments.count,
                  " segments");
  const TensorLists lists(all, sets + 1, segments.of);
  const Walk walk = lists.walk();
  const double* w = static_cast<const double*>(weights.const_data_ptr());
  kernels().surgery.combine({walk, 0, walk.blocks, 1, w, false}, pool_of(lists));
}

std::tuple<int64_t, int64_t> find_clash_of(const Tensors& out, const Tensors& tensors) {
  const Clash clash = find_clash(views_of(out), views_of(tensors));
  return {clash.out, clash.other};
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("gramian", TORCH_BOX(&gramian));
  m.impl("combine_", TORCH_BOX(&combine_));
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CompositeExplicitAutograd, m) {
  m.impl("find_clash", TORCH_BOX(&find_clash_of));
}

}  // namespace uk
