#include "tile/influence_curvature.h"

#include <cstring>
#include <tuple>
#include <vector>

#include "cpu/per_sample/tokens.h"

namespace uk {
namespace {

Operand matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, " must have 2 dimensions, got ", t.dim());
  return {t.const_data_ptr(), t.stride(0), t.stride(1), dtype_of(t, name)};
}

// Rows that lie along their elements, float32.
const float* floats(const Tensor& t, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols && t.scalar_type() == ScalarType::Float &&
                      (t.stride(1) == 1 || cols <= 1),
                  "datainf_scores: every tensor must be float32 with rows of adjacent elements, (", rows, ", ", cols, ")");
  return static_cast<const float*>(t.const_data_ptr());
}

const double* doubles(const Tensor& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.is_contiguous() && t.numel() == size, name,
                  " must be float64 and contiguous with ", size, " elements");
  return static_cast<const double*>(t.const_data_ptr());
}

}  // namespace

// a (B, T, d), g (B, T, p), any strides -> (p, d).
Tensor squared_gradients(const Tensor& a, const Tensor& g) {
  check_layer("squared_gradients", a, g);
  Tensor out = torch::stable::new_empty(a, {g.size(2), a.size(2)}, result_type(a));
  const SquaredGradients p{tokens_of(a, "a"), tokens_of(g, "g"), out.mutable_data_ptr()};
  kernels().influence_curvature.squared_gradients(
      p, pool_for(2.0 * double(p.a.count()) * double(p.a.features) * double(p.g.features)));
  return out;
}

// x (B, d), any strides -> (d,).
Tensor squared_rows(const Tensor& x) {
  const Operand m = matrix(x, "x");
  Tensor out = torch::stable::new_empty(x, {x.size(1)}, result_type(x));
  const SquaredRows p{m, x.size(0), x.size(1), out.mutable_data_ptr()};
  kernels().influence_curvature.squared_rows(p, pool_for(4.0 * double(p.batch) * double(p.dim)));
  return out;
}

// x (rows, d), any strides -> (d, d).
Tensor covariance(const Tensor& x) {
  const Operand m = matrix(x, "x");
  Tensor out = torch::stable::new_empty(x, {x.size(1), x.size(1)}, result_type(x));
  const Covariance p{m, x.size(0), x.size(1), out.mutable_data_ptr()};
  kernels().influence_curvature.covariance(p, pool_for(double(p.rows) * double(p.dim) * double(p.dim)));
  return out;
}

// rows[l] (n, d_l), queries[l] (Q, d_l), float32; norms (L, n), damping (L,), float64 -> (Q, n) float64.
Tensor datainf_scores(const std::vector<Tensor>& rows, const std::vector<Tensor>& queries, const Tensor& norms,
                      const Tensor& damping) {
  STD_TORCH_CHECK(!rows.empty() && rows.size() == queries.size(), "datainf_scores: as many rows as queries, got ",
                  rows.size(), " and ", queries.size());
  STD_TORCH_CHECK(rows[0].dim() == 2 && queries[0].dim() == 2, "datainf_scores: every tensor must have 2 dimensions");
  const int64_t n = rows[0].size(0), count = queries[0].size(0), layers = int64_t(rows.size());
  const double* norm = doubles(norms, layers * n, "datainf_scores: norms");
  const double* lambda = doubles(damping, layers, "datainf_scores: damping");
  std::vector<DataInfLayer> list;
  double elements = 0;
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t dim = rows[l].dim() == 2 ? rows[l].size(1) : -1;
    list.push_back({floats(rows[l], n, dim), floats(queries[l], count, dim), n, count, dim, rows[l].stride(0),
                    queries[l].stride(0), norm + l * n, lambda[l]});
    elements += double(n) * double(dim);
  }
  Tensor out = torch::stable::new_empty(rows[0], {count, n}, ScalarType::Double);
  const DataInf p{list.data(), layers, n, count, static_cast<double*>(out.mutable_data_ptr())};
  kernels().influence_curvature.datainf(p, pool_for(6 * elements * double(count)));
  return out;
}

// factor (n, n), upper, and x (m, n), float64 and contiguous -> the factor with x^T x added or taken off, and how many
// of its pivots are positive.
std::tuple<Tensor, int64_t> cholesky_update(const Tensor& factor, const Tensor& x, bool downdate) {
  STD_TORCH_CHECK(factor.dim() == 2 && x.dim() == 2 && factor.size(0) == factor.size(1) && x.size(1) == factor.size(0),
                  "cholesky_update: factor (n, n) and x (m, n) expected");
  const int64_t n = factor.size(0), rows = x.size(0);
  const double* from = doubles(factor, n * n, "cholesky_update: factor");
  const double* vectors = doubles(x, rows * n, "cholesky_update: x");
  Tensor out = torch::stable::new_empty(factor, {n, n}, ScalarType::Double);
  double* to = static_cast<double*>(out.mutable_data_ptr());
  if (n > 0) std::memcpy(to, from, size_t(n) * size_t(n) * sizeof(double));
  Scratch<double> copy(rows * n);
  if (rows * n > 0) std::memcpy(copy.get(), vectors, size_t(rows) * size_t(n) * sizeof(double));
  const int64_t pivots = kernels().influence_curvature.cholesky_update({to, copy.get(), n, rows, n, downdate});
  return {out, pivots};
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("squared_gradients", TORCH_BOX(&squared_gradients));
  m.impl("squared_rows", TORCH_BOX(&squared_rows));
  m.impl("covariance", TORCH_BOX(&covariance));
  m.impl("datainf_scores", TORCH_BOX(&datainf_scores));
  m.impl("cholesky_update", TORCH_BOX(&cholesky_update));
}

}  // namespace uk
