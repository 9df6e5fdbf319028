#include "tile/influence_scan.h"

#include <tuple>
#include <vector>

#include "cpu/common.h"

namespace uk {
namespace {

constexpr int64_t kMostColumns = 256;  // that share a scale: 128 * 8191 * 256 is within 31 bits

Operand matrix(const Tensor& t, const char* name) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), dtype_of(t, name)};
}

using Found = std::tuple<Tensor, Tensor>;

// Values and indices of the ends, a bit each, of a shape of (ends, Q, k).
Found run(Scan& p, const Tensor& like, int64_t ends, const std::vector<int64_t>& shape) {
  p.largest = ends & 1;
  p.smallest = ends & 2;
  Tensor values = torch::stable::new_empty(like, shape, result_type(like));
  Tensor indices = torch::stable::new_empty(like, shape, ScalarType::Long);
  p.values = values.mutable_data_ptr();
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  kernels().influence_scan.scan(p, pool_for(2.0 * double(p.count) * double(p.size) * double(p.depth)));
  return {values, indices};
}

Found run(Scan& p, const Tensor& like, int64_t ends) {
  STD_TORCH_CHECK(1 <= ends && ends <= 3, "scan: ends must be 1, 2 or 3, got ", ends);
  STD_TORCH_CHECK(0 <= p.k && p.k <= p.size, "scan: k must be in [0, ", p.size, "], got ", p.k);
  return run(p, like, ends, {(ends & 1) + (ends >> 1), p.count, p.k});
}

Scan scan_of(const Tensor& queries, const Tensor& rows, int64_t k) {
  Scan p{};
  p.queries = matrix(queries, "queries");
  p.rows.kind = Rows::dense;
  p.rows.dense = matrix(rows, "rows");
  p.count = queries.size(0);
  p.size = rows.size(0);
  p.depth = queries.size(1);
  p.k = k;
  return p;
}

}  // namespace

// queries (Q, D), rows (N, D), any strides -> values (Q, k) and indices (Q, k) of the best inner products.
Found topk(const Tensor& queries, const Tensor& rows, int64_t k, bool largest) {
  STD_TORCH_CHECK(queries.dim() == 2 && rows.dim() == 2, "topk: queries and rows must have 2 dimensions, got ",
                  queries.dim(), " and ", rows.dim());
  STD_TORCH_CHECK(queries.size(1) == rows.size(1), "topk: queries and rows must have the same width, got ",
                  queries.size(1), " and ", rows.size(1));
  STD_TORCH_CHECK(result_type(queries) == result_type(rows), "topk: float64 cannot be mixed with other dtypes");
  STD_TORCH_CHECK(0 <= k && k <= rows.size(0), "topk: k must be in [0, ", rows.size(0), "], got ", k);
  Scan p = scan_of(queries, rows, k);
  return run(p, queries, largest ? 1 : 2, {p.count, k});
}

// queries (Q, D), rows (N, D), any strides, not float64.
Found scan_rows(const Tensor& queries, const Tensor& rows, int64_t k, int64_t ends) {
  STD_TORCH_CHECK(queries.dim() == 2 && rows.dim() == 2 && queries.size(1) == rows.size(1),
                  "scan_rows: queries (Q, D) and rows (N, D) expected");
  STD_TORCH_CHECK(result_type(queries) == ScalarType::Float && result_type(rows) == ScalarType::Float,
                  "scan_rows: float64 is not supported");
  Scan p = scan_of(queries, rows, k);
  return run(p, queries, ends);
}

// codes (Q, D) int16 of at most 8191, query_scales (Q,); rows (N, bytes) uint8, scales (N, ceil(D / block)).
Found scan_codes(const Tensor& any_codes, const Tensor& any_query_scales, const Tensor& any_rows,
                 const Tensor& any_scales, int64_t block, int64_t k, bool nibbles, int64_t ends) {
  const Tensor codes = torch::stable::contiguous(any_codes), query_scales = torch::stable::contiguous(any_query_scales);
  const Tensor rows = torch::stable::contiguous(any_rows), scales = torch::stable::contiguous(any_scales);
  STD_TORCH_CHECK(codes.dim() == 2 && codes.scalar_type() == ScalarType::Short,
                  "scan_codes: codes must be an int16 matrix");
  STD_TORCH_CHECK(rows.dim() == 2 && rows.scalar_type() == ScalarType::Byte,
                  "scan_codes: rows must be a uint8 matrix");
  STD_TORCH_CHECK(0 < block && block <= kMostColumns && block % 2 == 0,
                  "scan_codes: block must be even and at most ", kMostColumns, ", got ", block);
  const int64_t depth = codes.size(1), blocks = (depth + block - 1) / block;
  STD_TORCH_CHECK(rows.size(1) >= (nibbles ? (depth + 1) / 2 : depth), "scan_codes: rows have too few bytes");
  STD_TORCH_CHECK(query_scales.scalar_type() == ScalarType::Float && query_scales.numel() == codes.size(0) &&
                      scales.scalar_type() == ScalarType::Float && scales.numel() == rows.size(0) * blocks,
                  "scan_codes: query_scales and scales must be float32, one a query and ", blocks, " a row");
  Scan p{};
  p.codes = static_cast<const int16_t*>(codes.const_data_ptr());
  p.query_scales = static_cast<const float*>(query_scales.const_data_ptr());
  p.rows.kind = nibbles ? Rows::nibbles : Rows::bytes;
  p.rows.codes = static_cast<const uint8_t*>(rows.const_data_ptr());
  p.rows.row_bytes = rows.size(1);
  p.rows.scales = static_cast<const float*>(scales.const_data_ptr());
  p.rows.block = block;
  p.count = codes.size(0);
  p.size = rows.size(0);
  p.depth = depth;
  p.k = k;
  return run(p, query_scales, ends);
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("topk", TORCH_BOX(&topk));
  m.impl("scan_rows", TORCH_BOX(&scan_rows));
  m.impl("scan_codes", TORCH_BOX(&scan_codes));
}

}  // namespace uk
