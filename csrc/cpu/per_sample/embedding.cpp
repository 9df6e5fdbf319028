#include "cpu/common.h"

namespace uk {
namespace {

// ids (B, T) int32 or int64, g (B, T, d), any strides.
TokenGrads tokens_of(const char* op, const Tensor& ids, const Tensor& g, int64_t rows, int64_t padding) {
  STD_TORCH_CHECK(ids.dim() == 2 && g.dim() == 3, op, ": ids and g must have 2 and 3 dimensions, got ", ids.dim(),
                  " and ", g.dim());
  STD_TORCH_CHECK(ids.size(0) == g.size(0) && ids.size(1) == g.size(1), op,
                  ": ids and g must agree in batch and tokens, got (", ids.size(0), ", ", ids.size(1), ") and (",
                  g.size(0), ", ", g.size(1), ")");
  const bool wide = ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || ids.scalar_type() == ScalarType::Int, op, ": ids must be int32 or int64");
  STD_TORCH_CHECK(rows >= 0, op, ": num_embeddings must not be negative, got ", rows);
  const Ids table{ids.const_data_ptr(), wide, ids.stride(0), ids.stride(1), ids.size(0), ids.size(1), rows, padding};
  return {table, g.const_data_ptr(), {g.stride(0), g.stride(1), g.stride(2)}, dtype_of(g, "g"), g.size(2)};
}

double elements(const TokenGrads& p) { return double(p.ids.batch) * double(p.ids.tokens) * double(p.width); }

void check_range(const char* op, bool in_range, int64_t rows) {
  STD_TORCH_CHECK(in_range, op, ": ids must be in [0, ", rows, ")");
}

}  // namespace

Tensor embedding_sqnorms(const Tensor& ids, const Tensor& g, int64_t rows, int64_t padding) {
  constexpr const char* op = "embedding_sqnorms";
  EmbeddingNorms p{tokens_of(op, ids, g, rows, padding), nullptr};
  Tensor out = torch::stable::new_empty(g, {g.size(0)}, result_type(g));
  p.out = out.mutable_data_ptr();
  check_range(op, kernels().per_sample_embedding.sqnorms(p, pool_for(4 * elements(p.tokens))), rows);
  return out;
}

Tensor embedding_dots(const Tensor& ids1, const Tensor& g1, const Tensor& ids2, const Tensor& g2, int64_t rows,
                      int64_t padding, bool summed) {
  constexpr const char* op = "embedding_dots";
  EmbeddingDots p{tokens_of(op, ids1, g1, rows, padding), tokens_of(op, ids2, g2, rows, padding), summed, nullptr};
  STD_TORCH_CHECK(p.left.width == p.right.width, op, ": g1 and g2 must have the same width, got ", p.left.width,
                  " and ", p.right.width);
  STD_TORCH_CHECK(result_type(g1) == result_type(g2), op, ": float64 cannot be mixed with other dtypes");
  Tensor out = summed ? torch::stable::new_empty(g1, {g1.size(0)}, result_type(g1))
                      : torch::stable::new_empty(g1, {g1.size(0), g2.size(0)}, result_type(g1));
  p.out = out.mutable_data_ptr();
  const Pool pool = pool_for(4 * (elements(p.left) + elements(p.right)));
  check_range(op, kernels().per_sample_embedding.dots(p, pool), rows);
  return out;
}

// w (B,) float64, contiguous -> (rows, d) in the type of g, or in that of its sums where `wide`.
Tensor embedding_weighted_sum(const Tensor& ids, const Tensor& g, const Tensor& w, int64_t rows, int64_t padding,
                              bool wide) {
  constexpr const char* op = "embedding_weighted_sum";
  EmbeddingSum p{tokens_of(op, ids, g, rows, padding)};
  STD_TORCH_CHECK(w.dim() == 1 && w.size(0) == g.size(0) && w.scalar_type() == ScalarType::Double, op,
                  ": w must be a float64 vector of ", g.size(0), " elements");
  const Tensor weights = torch::stable::contiguous(w);
  p.weights = static_cast<const double*>(weights.const_data_ptr());
  Tensor out = torch::stable::new_empty(g, {rows, g.size(2)}, wide ? result_type(g) : g.scalar_type());
  p.out_dtype = dtype_of(out, "out");
  p.out = out.mutable_data_ptr();
  const Pool pool = pool_for(4 * elements(p.tokens) + double(rows) * double(p.tokens.width));
  check_range(op, kernels().per_sample_embedding.weighted_sum(p, pool), rows);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("embedding_sqnorms", TORCH_BOX(&embedding_sqnorms));
  m.impl("embedding_dots", TORCH_BOX(&embedding_dots));
  m.impl("embedding_weighted_sum", TORCH_BOX(&embedding_weighted_sum));
}

}  // namespace uk
