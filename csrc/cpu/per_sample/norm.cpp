#include "cpu/common.h"

namespace uk {
namespace {

// x and g (B, L, n), any strides; see NormGrads for what a line is.
NormGrads layer_of(const char* op, const Tensor& x, const Tensor& g, int64_t kind, int64_t groups, double eps,
                   bool bias) {
  STD_TORCH_CHECK(x.dim() == 3 && g.dim() == 3, op, ": x and g must have 3 dimensions, got ", x.dim(), " and ", g.dim());
  STD_TORCH_CHECK(x.size(0) == g.size(0) && x.size(1) == g.size(1) && x.size(2) == g.size(2), op,
                  ": x and g must have the same shape, got (", x.size(0), ", ", x.size(1), ", ", x.size(2), ") and (",
                  g.size(0), ", ", g.size(1), ", ", g.size(2), ")");
  STD_TORCH_CHECK(result_type(x) == result_type(g), op, ": float64 cannot be mixed with other dtypes");
  STD_TORCH_CHECK(0 <= kind && kind <= 2, op, ": unknown kind ", kind);
  STD_TORCH_CHECK(kind != 2 || (groups > 0 && x.size(1) % groups == 0), op, ": ", x.size(1),
                  " channels cannot be cut into ", groups, " groups");
  NormGrads p{x.const_data_ptr(), g.const_data_ptr(), {}, {}, dtype_of(x, "x"), dtype_of(g, "g")};
  for (int i = 0; i < 3; ++i) {
    p.x_strides[i] = x.stride(i);
    p.g_strides[i] = g.stride(i);
  }
  p.batch = x.size(0);
  p.lines = x.size(1);
  p.length = x.size(2);
  p.groups = groups;
  p.eps = eps;
  p.kind = NormKind(kind);
  p.bias = bias;
  p.norms = p.grads = nullptr;
  return p;
}

void run(const NormGrads& p) {
  kernels().per_sample_norm.norm_grads(p, pool_for(10.0 * double(p.batch) * double(p.lines) * double(p.length)));
}

}  // namespace

Tensor norm_sqnorms(const Tensor& x, const Tensor& g, int64_t kind, int64_t groups, double eps, bool bias) {
  NormGrads p = layer_of("norm_sqnorms", x, g, kind, groups, eps, bias);
  Tensor out = torch::stable::new_empty(x, {p.batch}, result_type(x));
  p.norms = out.mutable_data_ptr();
  run(p);
  return out;
}

Tensor norm_grads(const Tensor& x, const Tensor& g, int64_t kind, int64_t groups, double eps, bool bias) {
  NormGrads p = layer_of("norm_grads", x, g, kind, groups, eps, bias);
  Tensor out = torch::stable::new_empty(x, {p.batch, 1 + int64_t(bias), p.scales()}, result_type(x));
  p.grads = out.mutable_data_ptr();
  run(p);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("norm_sqnorms", TORCH_BOX(&norm_sqnorms));
  m.impl("norm_grads", TORCH_BOX(&norm_grads));
}

}  // namespace uk
