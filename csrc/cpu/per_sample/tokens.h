// (batch, tokens, features) tensors for the per-sample kernels.
#pragma once
#include "cpu/common.h"
#include "tile/per_sample/tokens.h"

namespace uk {

inline Tokens tokens_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3, name, " must have 3 dimensions, got ", x.dim());
  Tokens m{x.const_data_ptr(), {x.stride(0), x.stride(1), x.stride(2)}, dtype_of(x, name)};
  m.batch = x.size(0);
  m.tokens = x.size(1);
  m.features = x.size(2);
  return m;
}

// Inputs and output gradients of one layer: the same samples and tokens, both float64 or neither.
inline void check_layer(const char* op, const Tensor& a, const Tensor& g) {
  STD_TORCH_CHECK(a.dim() == 3 && g.dim() == 3, op, ": a and g must have 3 dimensions, got ", a.dim(), " and ",
                  g.dim());
  STD_TORCH_CHECK(a.size(0) == g.size(0) && a.size(1) == g.size(1), op,
                  ": a and g must agree in batch and tokens, got (", a.size(0), ", ", a.size(1), ") and (", g.size(0),
                  ", ", g.size(1), ")");
  STD_TORCH_CHECK(result_type(a) == result_type(g), op, ": float64 cannot be mixed with other dtypes");
}

}  // namespace uk
