#include "tile/influence_sketch.h"

#include "cpu/per_sample/tokens.h"

namespace uk {
namespace {

constexpr int64_t kMostOutputs = INT64_C(1) << 31, kMostCoordinates = INT64_C(1) << 39;

void check(const char* op, const Tensor& x, int64_t dim, int64_t k, int64_t offset, int64_t of) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": the first argument must have 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(0 <= k && k <= kMostOutputs, op, ": k must be in [0, 2^31], got ", k);
  STD_TORCH_CHECK(offset >= 0 && offset % of == 0, op, ": offset must be a multiple of ", of, ", got ", offset);
  STD_TORCH_CHECK(0 <= dim && dim <= kMostCoordinates - offset, op, ": coordinates must be below 2^39, got ", offset,
                  " + ", dim);
}

Operand matrix(const Tensor& t, const char* name) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), dtype_of(t, name)};
}

Tensor result(const Tensor& like, int64_t rows, int64_t cols) {
  return torch::stable::new_empty(like, {rows, cols}, result_type(like));
}

}  // namespace

// g (B, dim), any strides -> (B, k).
Tensor normal_project(const Tensor& g, int64_t k, int64_t seed, int64_t offset) {
  check("normal_project", g, g.size(1), k, offset, 8);
  Tensor out = result(g, g.size(0), k);
  const NormalProjection p{matrix(g, "g"), g.size(0), g.size(1), k, uint64_t(seed), offset, out.mutable_data_ptr()};
  kernels().influence_sketch.normal(p, pool_for(2.0 * double(p.batch + 8) * double(p.dim) * double(k)));
  return out;
}

// y (B, k), any strides -> (B, dim).
Tensor dense_adjoint(const Tensor& y, int64_t dim, int64_t seed, int64_t offset, bool normal) {
  check("dense_adjoint", y, dim, y.size(1), offset, normal ? 8 : 128);
  Tensor out = result(y, y.size(0), dim);
  const DenseAdjoint p{matrix(y, "y"), y.size(0), y.size(1), dim, uint64_t(seed), offset, normal,
                       out.mutable_data_ptr()};
  kernels().influence_sketch.adjoint(p, pool_for(2.0 * double(p.batch + 8) * double(dim) * double(p.outputs)));
  return out;
}

// g (B, dim), any strides -> (B, k).
Tensor sparse_project(const Tensor& g, int64_t k, int64_t terms, int64_t seed, int64_t offset, int64_t inner) {
  check("sparse_project", g, g.size(1), k, offset, 4);
  STD_TORCH_CHECK(1 <= terms && terms <= (k > 0 ? k : 1), "sparse_project: terms must be in [1, k], got ", terms);
  STD_TORCH_CHECK(inner >= 0 && (inner == 0 || (terms == 1 && (k & (k - 1)) == 0)),
                  "sparse_project: inner needs one term and a power of two for k, got ", terms, " and ", k);
  Tensor out = result(g, g.size(0), k);
  const SparseProjection p{matrix(g, "g"),  g.size(0), g.size(1), k,
                           terms,           uint64_t(seed), offset,    inner,
                           out.mutable_data_ptr()};
  kernels().influence_sketch.sparse(p, pool_for(2.0 * double(p.batch) * double(p.dim) * double(terms)));
  return out;
}

// g (B, dim), any strides; rows (k,), int64 and contiguous -> (B, k).
Tensor hadamard_project(const Tensor& g, const Tensor& rows, int64_t seed, int64_t offset) {
  STD_TORCH_CHECK(rows.dim() == 1 && rows.scalar_type() == ScalarType::Long && rows.is_contiguous(),
                  "hadamard_project: rows must be a contiguous int64 vector");
  check("hadamard_project", g, g.size(1), rows.size(0), offset, kHadamardBlock);
  Tensor out = result(g, g.size(0), rows.size(0));
  const HadamardProjection p{matrix(g, "g"),
                             g.size(0),
                             g.size(1),
                             rows.size(0),
                             static_cast<const int64_t*>(rows.const_data_ptr()),
                             uint64_t(seed),
                             offset,
                             out.mutable_data_ptr()};
  kernels().influence_sketch.hadamard(p, pool_for(12.0 * double(p.batch) * double(p.dim)));
  return out;
}

// a (B, T, d), g (B, T, p), any strides -> (B, k).
Tensor tensor_sketch(const Tensor& a, const Tensor& g, bool bias, int64_t k, int64_t seed) {
  check_layer("tensor_sketch", a, g);
  STD_TORCH_CHECK(k > 0 && k <= kMostOutputs && (k & (k - 1)) == 0,
                  "tensor_sketch: k must be a power of two up to 2^31, got ", k);
  Tensor out = result(a, a.size(0), k);
  const TensorSketch p{tokens_of(a, "a"), tokens_of(g, "g"), bias, k, uint64_t(seed), out.mutable_data_ptr()};
  kernels().influence_sketch.tensor(p, pool_for(20.0 * double(p.a.count()) * double(k)));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("normal_project", TORCH_BOX(&normal_project));
  m.impl("dense_adjoint", TORCH_BOX(&dense_adjoint));
  m.impl("sparse_project", TORCH_BOX(&sparse_project));
  m.impl("hadamard_project", TORCH_BOX(&hadamard_project));
  m.impl("tensor_sketch", TORCH_BOX(&tensor_sketch));
}

}  // namespace uk
