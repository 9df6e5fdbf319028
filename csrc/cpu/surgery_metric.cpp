#include "cpu/lists.h"

namespace uk {

// Set by set, and a second moment v for each place -> (sets, sets) float64, sums of a b / (sqrt(scale v) + eps).
Tensor weighted_gramian(const Tensors& tensors, int64_t sets, const Tensors& seconds, const Tensor& scales, double eps) {
  const size_t count = seconds.size();
  STD_TORCH_CHECK(sets > 0 && count > 0 && tensors.size() == count * size_t(sets), "weighted_gramian: ", tensors.size(),
                  " tensors and ", count, " second moments cannot be ", sets, " sets");
  STD_TORCH_CHECK(scales.numel() == int64_t(count) && scales.scalar_type() == ScalarType::Double && scales.is_contiguous(),
                  "weighted_gramian: scales must be ", count, " contiguous float64 numbers");
  std::vector<View> views = views_of(tensors);
  const std::vector<View> moments = views_of(seconds);
  views.insert(views.end(), moments.begin(), moments.end());
  check_shapes("weighted_gramian", views, count);
  std::vector<double> kept;  // of the places that have elements, as the walk does
  for (size_t i = 0; i < count; ++i)
    if (seconds[i].numel() > 0) kept.push_back(static_cast<const double*>(scales.const_data_ptr())[i]);
  const TensorLists lists(views, sets + 1);
  Tensor out = torch::stable::new_empty(tensors[0], {sets, sets}, ScalarType::Double);
  kernels().surgery_metric.gramian({lists.walk(), kept.data(), eps, static_cast<double*>(out.mutable_data_ptr())},
                                   pool_of(lists));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) { m.impl("weighted_gramian", TORCH_BOX(&weighted_gramian)); }

}  // namespace uk
