#include "cpu/per_sample/tokens.h"

namespace uk {

// a (B, T, d), g (B, T, p), left (k_o, p), right (k_i, d), any strides -> (B, k_o k_i), and k_o more for the bias.
Tensor linear_two_sided(const Tensor& a, const Tensor& g, const Tensor& left, const Tensor& right, bool bias) {
  check_layer("linear_two_sided", a, g);
  STD_TORCH_CHECK(left.dim() == 2 && right.dim() == 2 && left.size(1) == g.size(2) && right.size(1) == a.size(2),
                  "linear_two_sided: left and right must be matrices with ", g.size(2), " and ", a.size(2), " columns");
  STD_TORCH_CHECK(result_type(left) == result_type(a) && result_type(right) == result_type(a),
                  "linear_two_sided: float64 cannot be mixed with other dtypes");
  LinearTwoSided p{tokens_of(a, "a"),
                   tokens_of(g, "g"),
                   {left.const_data_ptr(), left.stride(0), left.stride(1), dtype_of(left, "left")},
                   {right.const_data_ptr(), right.stride(0), right.stride(1), dtype_of(right, "right")},
                   left.size(0),
                   right.size(0),
                   bias};
  Tensor out = torch::stable::new_empty(a, {a.size(0), p.width()}, result_type(a));
  p.out = out.mutable_data_ptr();
  const double sides = double(p.left_rows) * double(p.g.features) + double(p.right_rows) * double(p.a.features);
  kernels().linear_project.two_sided(p, pool_for(double(p.a.count()) * sides));
  return out;
}

// a (B, T, d), g (B, T, p), any strides -> (B, k) sketches of the flattened gradients (and the biases') by signs.
Tensor linear_sketch(const Tensor& a, const Tensor& g, bool bias, int64_t k, int64_t seed) {
  check_layer("linear_sketch", a, g);
  STD_TORCH_CHECK(0 <= k && k <= INT64_C(1) << 32, "linear_sketch: k must be in [0, 2^32], got ", k);
  LinearSketch p{tokens_of(a, "a"), tokens_of(g, "g"), bias, k, uint64_t(seed)};
  STD_TORCH_CHECK(p.dim() <= INT64_C(1) << 39, "linear_sketch: a gradient must have at most 2^39 elements, got ", p.dim());
  Tensor out = torch::stable::new_empty(a, {a.size(0), k}, result_type(a));
  p.out = out.mutable_data_ptr();
  kernels().linear_project.sketch(p, pool_for(double(a.size(0)) * double(p.dim()) * double(k + p.a.tokens)));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("linear_two_sided", TORCH_BOX(&linear_two_sided));
  m.impl("linear_sketch", TORCH_BOX(&linear_sketch));
}

}  // namespace uk
