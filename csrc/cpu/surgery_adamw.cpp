#include <cmath>

#include "cpu/lists.h"

namespace uk {
namespace {

constexpr int64_t kGroupFields = 6;  // lr, beta1, beta2, eps, weight decay, sign

// Adds one to a step, float32 or float64 of one element, and returns it.
double advance(const Tensor& step) {
  STD_TORCH_CHECK(step.numel() == 1, "surgical_adamw_: steps must have one element each, got ", step.numel());
  if (step.scalar_type() == ScalarType::Double) return ++*static_cast<double*>(step.mutable_data_ptr());
  STD_TORCH_CHECK(step.scalar_type() == ScalarType::Float, "surgical_adamw_: steps must be float32 or float64");
  return ++*static_cast<float*>(step.mutable_data_ptr());
}

AdamwScalars scalars_of(const double* group, double step, size_t place) {
  const double lr = group[0], beta1 = group[1], beta2 = group[2], eps = group[3], decay = group[4];
  AdamwScalars s{};
  s.beta1 = beta1;
  s.beta2 = beta2;
  s.decay = 1 - lr * decay;
  s.size = lr / (1 - std::pow(beta1, step));
  s.root = 1 / std::sqrt(1 - std::pow(beta2, step));
  s.eps = eps;
  s.sign = group[5];
  s.step = uint32_t(step);
  s.place = uint32_t(place);
  return s;
}

Tensor vector_of(const char* name, const Tensor& t, int64_t elements) {
  STD_TORCH_CHECK(t.numel() == elements && t.scalar_type() == ScalarType::Double, "surgical_adamw_: ", name,
                  " must be ", elements, " float64 numbers");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

}  // namespace

// AdamW with the gradient sum_k weights[k] g_k, which is never in memory.
void surgical_adamw_(const Tensors& params, const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& steps,
                     const Tensors& gradients, const Tensor& weights, const Tensor& groups,
                     const std::vector<int64_t>& group_of, bool stochastic, int64_t seed) {
  const size_t n = params.size();
  if (n == 0) return;
  STD_TORCH_CHECK(exp_avgs.size() == n && exp_avg_sqs.size() == n && steps.size() == n && group_of.size() == n &&
                      gradients.size() % n == 0,
                  "surgical_adamw_: lists must have one length");
  const int64_t sets = int64_t(gradients.size() / n);
  const Tensor of_sets = vector_of("weights", weights, sets);
  const Tensor table = vector_of("groups", groups, groups.numel() / kGroupFields * kGroupFields);
  const double* w = static_cast<const double*>(of_sets.const_data_ptr());
  for (int64_t k = 0; k < sets; ++k)
    if (!std::isfinite(w[k])) return;
  std::vector<View> all;
  for (const Tensors* list : {&params, &exp_avgs, &exp_avg_sqs})
    for (const View& v : writable_views_of(*list)) all.push_back(v);
  const std::vector<View> views = views_of(gradients);
  check_clash("surgical_adamw_", all, {});
  check_clash("surgical_adamw_", {all.begin(), all.begin() + n}, views);
  all.insert(all.end(), views.begin(), views.end());
  check_shapes("surgical_adamw_", all, n);
  std::vector<AdamwScalars> scalars;  // of the parameters that have elements, as the walk does
  for (size_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(0 <= group_of[i] && group_of[i] < groups.numel() / kGroupFields, "surgical_adamw_: no group ",
                    group_of[i]);
    const double step = advance(steps[i]);
    const double* group = static_cast<const double*>(table.const_data_ptr()) + group_of[i] * kGroupFields;
    if (params[i].numel() > 0) scalars.push_back(scalars_of(group, step, i));
  }
  const TensorLists lists(all, 3 + sets);
  kernels().surgery_adamw.step({lists.walk(), w, scalars.data(), stochastic, uint64_t(seed)}, pool_of(lists));
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) { m.impl("surgical_adamw_", TORCH_BOX(&surgical_adamw_)); }

}  // namespace uk
