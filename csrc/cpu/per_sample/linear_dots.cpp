#include "cpu/per_sample/tokens.h"

namespace uk {

// a1 (B1, T1, d), g1 (B1, T1, p), a2 (B2, T2, d), g2 (B2, T2, p), any strides -> (B1, B2), or (B1,) when summed.
Tensor linear_dots(const Tensor& a1, const Tensor& g1, const Tensor& a2, const Tensor& g2, bool summed, bool bias,
                   int64_t method) {
  check_layer("linear_dots", a1, g1);
  check_layer("linear_dots", a2, g2);
  STD_TORCH_CHECK(a1.size(2) == a2.size(2) && g1.size(2) == g2.size(2),
                  "linear_dots: the sides must agree in features, got ", a1.size(2), ", ", g1.size(2), " and ",
                  a2.size(2), ", ", g2.size(2));
  STD_TORCH_CHECK(result_type(a1) == result_type(a2), "linear_dots: float64 cannot be mixed with other dtypes");
  STD_TORCH_CHECK(method == 0 || method == 1, "linear_dots: method must be 0 or 1, got ", method);
  LinearDots p{tokens_of(a1, "a1"), tokens_of(g1, "g1"), tokens_of(a2, "a2"), tokens_of(g2, "g2"),
               summed,              bias,                DotMethod(method)};
  Tensor out = summed ? torch::stable::new_empty(a1, {a1.size(0)}, result_type(a1))
                      : torch::stable::new_empty(a1, {a1.size(0), a2.size(0)}, result_type(a1));
  p.out = out.mutable_data_ptr();
  const double d = double(p.a1.features), o = double(p.g1.features);
  const double n1 = double(p.a1.count()), n2 = double(p.a2.count());
  kernels().linear_dots.linear_dots(p, pool_for(p.method == DotMethod::tokens ? n1 * n2 * (d + o) : (n1 + n2) * d * o));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) { m.impl("linear_dots", TORCH_BOX(&linear_dots)); }

}  // namespace uk
