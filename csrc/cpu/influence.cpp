#include <optional>

#include "cpu/common.h"

namespace uk {

static Operand matrix(const Tensor& t, const char* name) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), dtype_of(t, name)};
}

// g (B, dim), any strides -> (B, k) projections on random signs, scaled by 1/sqrt(k). `blocks`, int64 and contiguous,
// tells which 128 coordinates each 128 columns are.
Tensor rademacher_project(const Tensor& g, int64_t k, int64_t seed, const std::optional<Tensor>& blocks) {
  STD_TORCH_CHECK(g.dim() == 2, "rademacher_project: g must have 2 dimensions, got ", g.dim());
  STD_TORCH_CHECK(0 <= k && k <= INT64_C(1) << 32, "rademacher_project: k must be in [0, 2^32], got ", k);
  STD_TORCH_CHECK(g.size(1) <= INT64_C(1) << 39, "rademacher_project: dim must be at most 2^39, got ", g.size(1));
  STD_TORCH_CHECK(!blocks || (blocks->dim() == 1 && blocks->size(0) == (g.size(1) + 127) / 128 &&
                              blocks->scalar_type() == ScalarType::Long && blocks->is_contiguous()),
                  "rademacher_project: blocks must be a contiguous int64 vector of ", (g.size(1) + 127) / 128,
                  " elements");
  Tensor out = torch::stable::new_empty(g, {g.size(0), k}, result_type(g));
  const RademacherProjection p{matrix(g, "g"), g.size(0), g.size(1), k, uint64_t(seed), out.mutable_data_ptr(),
                               blocks ? static_cast<const int64_t*>(blocks->const_data_ptr()) : nullptr};
  kernels().influence.rademacher_project(p, pool_for(double(p.batch) * double(p.dim) * double(k)));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("rademacher_project", TORCH_BOX(&rademacher_project));
}

}  // namespace uk
