#include <optional>
#include <tuple>

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

// queries (Q, D), rows (N, D), any strides -> values (Q, k) and indices (Q, k) of the best inner products.
std::tuple<Tensor, Tensor> topk(const Tensor& queries, const Tensor& rows, int64_t k, bool largest) {
  STD_TORCH_CHECK(queries.dim() == 2 && rows.dim() == 2, "topk: queries and rows must have 2 dimensions, got ",
                  queries.dim(), " and ", rows.dim());
  STD_TORCH_CHECK(queries.size(1) == rows.size(1), "topk: queries and rows must have the same width, got ",
                  queries.size(1), " and ", rows.size(1));
  STD_TORCH_CHECK(result_type(queries) == result_type(rows), "topk: float64 cannot be mixed with other dtypes");
  STD_TORCH_CHECK(0 <= k && k <= rows.size(0), "topk: k must be in [0, ", rows.size(0), "], got ", k);
  Tensor values = torch::stable::new_empty(queries, {queries.size(0), k}, result_type(queries));
  Tensor indices = torch::stable::new_empty(queries, {queries.size(0), k}, ScalarType::Long);
  const TopK p{matrix(queries, "queries"), matrix(rows, "rows"), queries.size(0), rows.size(0), queries.size(1), k,
               largest, values.mutable_data_ptr(), static_cast<int64_t*>(indices.mutable_data_ptr())};
  kernels().influence.topk(p, pool_for(double(p.count) * double(p.size) * double(p.depth)));
  return {values, indices};
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("rademacher_project", TORCH_BOX(&rademacher_project));
  m.impl("topk", TORCH_BOX(&topk));
}

}  // namespace uk
