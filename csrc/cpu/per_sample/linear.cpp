#include "cpu/common.h"

namespace uk {

// a (B, T, d), g (B, T, p), any strides -> (B,) squared norms of the gradients g_b^T a_b.
Tensor linear_sqnorms(const Tensor& a, const Tensor& g, bool bias, int64_t method) {
  STD_TORCH_CHECK(a.dim() == 3 && g.dim() == 3, "linear_sqnorms: a and g must have 3 dimensions, got ", a.dim(),
                  " and ", g.dim());
  STD_TORCH_CHECK(a.size(0) == g.size(0) && a.size(1) == g.size(1),
                  "linear_sqnorms: a and g must agree in batch and tokens, got (", a.size(0), ", ", a.size(1),
                  ") and (", g.size(0), ", ", g.size(1), ")");
  STD_TORCH_CHECK(result_type(a) == result_type(g), "linear_sqnorms: float64 cannot be mixed with other dtypes");
  STD_TORCH_CHECK(method >= 0 && method <= 3 && (method != 2 || a.size(1) == 1),
                  "linear_sqnorms: method ", method, " does not fit ", a.size(1), " tokens");
  LinearNorms p{a.const_data_ptr(), g.const_data_ptr(), {}, {}, dtype_of(a, "a"), dtype_of(g, "g")};
  for (int i = 0; i < 3; ++i) {
    p.a_strides[i] = a.stride(i);
    p.g_strides[i] = g.stride(i);
  }
  p.batch = a.size(0);
  p.tokens = a.size(1);
  p.inputs = a.size(2);
  p.outputs = g.size(2);
  p.bias = bias;
  p.method = NormMethod(method);
  Tensor out = torch::stable::new_empty(a, {p.batch}, result_type(a));
  p.out = out.mutable_data_ptr();
  const double rows = double(p.batch) * double(p.tokens);
  const double work = p.method == NormMethod::rank1    ? rows * double(p.inputs + p.outputs)
                      : p.method == NormMethod::direct ? rows * double(p.inputs) * double(p.outputs)
                                                       : rows * double(p.tokens) * double(p.inputs + p.outputs);
  kernels().per_sample_linear.linear_sqnorms(p, pool_for(work));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) { m.impl("linear_sqnorms", TORCH_BOX(&linear_sqnorms)); }

static std::string isa() { return kernels().isa; }
STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }

}  // namespace uk
