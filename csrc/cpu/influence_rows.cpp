#include "tile/influence_rows.h"

#include <tuple>

#include "cpu/common.h"

namespace uk {
namespace {

Coding coding_of(int64_t bits) {
  switch (bits) {
    case 0: return Coding::none;
    case 4: return Coding::nibbles;
    case 8: return Coding::bytes;
    case 16: return Coding::bf16;
    case 32: return Coding::f32;
    default: STD_TORCH_CHECK(false, "encode_rows: bits must be 0, 4, 8, 16 or 32, got ", bits);
  }
}

// The columns of the stored rows, and their type.
std::tuple<int64_t, ScalarType> columns_of(Coding coding, int64_t width) {
  switch (coding) {
    case Coding::none: return {0, ScalarType::Byte};
    case Coding::f32: return {width, ScalarType::Float};
    case Coding::bf16: return {width, ScalarType::BFloat16};
    case Coding::bytes: return {width, ScalarType::Byte};
    case Coding::nibbles: return {(width + 1) / 2, ScalarType::Byte};
  }
  return {};
}

}  // namespace

// x (n, D), any strides -> rows (n, columns), scales (n, blocks) float32, squared norms (n,) float64.
std::tuple<Tensor, Tensor, Tensor> encode_rows(const Tensor& x, int64_t bits, int64_t block, bool unbiased,
                                               int64_t seed, int64_t first) {
  STD_TORCH_CHECK(x.dim() == 2, "encode_rows: x must have 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(2 <= block && block <= kMostColumns && block % 2 == 0,
                  "encode_rows: block must be even and between 2 and ", kMostColumns, ", got ", block);
  EncodeRows p{};
  p.x = {x.const_data_ptr(), x.stride(0), x.stride(1), dtype_of(x, "x")};
  p.count = x.size(0);
  p.width = x.size(1);
  p.coding = coding_of(bits);
  p.block = block;
  p.unbiased = unbiased;
  p.seed = uint64_t(seed);
  p.first = first;
  const bool coded = p.coding == Coding::bytes || p.coding == Coding::nibbles;
  const auto [columns, type] = columns_of(p.coding, p.width);
  Tensor rows = torch::stable::new_empty(x, {p.count, columns}, type);
  Tensor scales = torch::stable::new_empty(x, {p.count, coded ? p.blocks() : 0}, ScalarType::Float);
  Tensor sqnorms = torch::stable::new_empty(x, {p.count}, ScalarType::Double);
  p.codes = rows.mutable_data_ptr();
  p.scales = static_cast<float*>(scales.mutable_data_ptr());
  p.sqnorms = static_cast<double*>(sqnorms.mutable_data_ptr());
  kernels().influence_rows.encode(p, pool_for(4.0 * double(p.count) * double(p.width)));
  return {rows, scales, sqnorms};
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) { m.impl("encode_rows", TORCH_BOX(&encode_rows)); }

}  // namespace uk
