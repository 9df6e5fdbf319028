#include <tuple>

#include "cpu/per_sample/tokens.h"

namespace uk {

using Sums = std::tuple<Tensor, Tensor>;

static Sums run(LinearSums p, Tensor weight, Tensor bias, bool want_bias) {
  p.weight = weight.mutable_data_ptr();
  p.bias = want_bias ? bias.mutable_data_ptr() : nullptr;
  p.dtype = dtype_of(weight, "weight");
  kernels().linear_sums.linear_sums(p, pool_for(double(p.a.count()) * double(p.a.features) * double(p.g.features)));
  return {weight, bias};
}

// a (B, T, d), g (B, T, p), any strides; w (B,) contiguous, float32 (float64 for float64) -> the weighted sum (p, d)
// and that of the bias's gradients, (p,) or empty, in the dtype of g.
Sums linear_weighted_sum(const Tensor& a, const Tensor& g, const Tensor& w, bool bias) {
  check_layer("linear_weighted_sum", a, g);
  STD_TORCH_CHECK(w.dim() == 1 && w.size(0) == a.size(0) && w.is_contiguous(),
                  "linear_weighted_sum: w must be contiguous and have one element a sample");
  STD_TORCH_CHECK(w.scalar_type() == result_type(a), "linear_weighted_sum: w must be of the type of the sums");
  const LinearSums p{tokens_of(a, "a"), tokens_of(g, "g"), w.const_data_ptr(), true};
  return run(p, torch::stable::new_empty(g, {g.size(2), a.size(2)}),
             torch::stable::new_empty(g, {bias ? g.size(2) : 0}), bias);
}

// The gradients (B, p, d) and, of the bias, (B, p) or empty; float32 (float64 for float64).
Sums linear_grads(const Tensor& a, const Tensor& g, bool bias) {
  check_layer("linear_grads", a, g);
  const LinearSums p{tokens_of(a, "a"), tokens_of(g, "g"), nullptr, false};
  return run(p, torch::stable::new_empty(g, {g.size(0), g.size(2), a.size(2)}, result_type(a)),
             torch::stable::new_empty(g, {bias ? g.size(0) : 0, g.size(2)}, result_type(a)), bias);
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("linear_weighted_sum", TORCH_BOX(&linear_weighted_sum));
  m.impl("linear_grads", TORCH_BOX(&linear_grads));
}

}  // namespace uk
