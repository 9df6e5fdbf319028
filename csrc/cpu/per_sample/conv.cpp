#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common.h"

namespace uk {

static Maps maps_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 5, name, " must have 5 dimensions, got ", t.dim());
  Maps m{t.const_data_ptr(), dtype_of(t, name)};
  for (int i = 0; i < 5; ++i) {
    m.sizes[i] = t.size(i);
    m.strides[i] = t.stride(i);
  }
  return m;
}

static ConvBatch batch_of(const Tensor& a, const Tensor& g) {
  STD_TORCH_CHECK(result_type(a) == result_type(g), "conv: float64 cannot be mixed with other dtypes");
  const ConvBatch b{maps_of(a, "a"), maps_of(g, "g")};
  STD_TORCH_CHECK(b.a.batch() == b.g.batch(), "conv: a and g must agree in batch, got ", b.a.batch(), " and ",
                  b.g.batch());
  return b;
}

// Reads outside the input count as zeros, so the window itself cannot reach foreign memory.
static ConvLayer layer_of(const ConvBatch& b, const std::vector<int64_t>& window, int64_t groups, bool bias) {
  STD_TORCH_CHECK(window.size() == 12, "conv: window must have 12 numbers, got ", window.size());
  ConvLayer layer{{}, groups, b.a.channels(), b.g.channels(), bias, false};
  for (int d = 0; d < 3; ++d) {
    layer.window.kernel[d] = window[d];
    layer.window.stride[d] = window[3 + d];
    layer.window.padding[d] = window[6 + d];
    layer.window.dilation[d] = window[9 + d];
    STD_TORCH_CHECK(window[d] > 0 && window[3 + d] > 0 && window[6 + d] >= 0 && window[9 + d] > 0,
                    "conv: window must be positive (padding at least 0)");
  }
  STD_TORCH_CHECK(groups > 0 && layer.in_channels % groups == 0 && layer.out_channels % groups == 0,
                  "conv: groups ", groups, " must divide ", layer.in_channels, " and ", layer.out_channels, " channels");
  layer.channels_inner = b.a.strides[1] == 1 && layer.in_channels > groups && b.a.sizes[4] > 1;
  return layer;
}

static double flops(const ConvLayer& layer, const ConvBatch& b) {
  return double(b.g.batch()) * double(b.g.positions()) * double(layer.out_channels) * double(layer.inputs());
}

// (B,) squared norms of the gradients of weight and, if wanted, bias.
Tensor conv_sqnorms(const Tensor& a, const Tensor& g, std::vector<int64_t> window, int64_t groups, bool bias,
                    int64_t method) {
  const ConvBatch batch = batch_of(a, g);
  const ConvLayer layer = layer_of(batch, window, groups, bias);
  STD_TORCH_CHECK(method >= 0 && method <= 3 && (method != 2 || batch.g.positions() == 1), "conv_sqnorms: method ",
                  method, " does not fit ", batch.g.positions(), " positions");
  Tensor out = torch::stable::new_empty(a, {batch.a.batch()}, result_type(a));
  const ConvNorms p{layer, batch, ConvMethod(method), out.mutable_data_ptr()};
  kernels().per_sample_conv.conv_sqnorms(p, pool_for(flops(layer, batch)));
  return out;
}

// (B1, B2) inner products of gradients, or (B1,) with the sum of the second batch's.
Tensor conv_dots(const Tensor& a1, const Tensor& g1, const Tensor& a2, const Tensor& g2, std::vector<int64_t> window,
                 int64_t groups, bool bias, bool summed) {
  const ConvBatch first = batch_of(a1, g1), second = batch_of(a2, g2);
  STD_TORCH_CHECK(result_type(a1) == result_type(a2), "conv_dots: float64 cannot be mixed with other dtypes");
  STD_TORCH_CHECK(first.a.channels() == second.a.channels() && first.g.channels() == second.g.channels(),
                  "conv_dots: both sides must have the same channels, got (", first.a.channels(), ", ",
                  first.g.channels(), ") and (", second.a.channels(), ", ", second.g.channels(), ")");
  ConvLayer layer = layer_of(first, window, groups, bias);
  layer.channels_inner = layer.channels_inner && layer_of(second, window, groups, bias).channels_inner;
  const int64_t n = first.a.batch(), m = second.a.batch();
  Tensor out = summed ? torch::stable::new_empty(a1, {n}, result_type(a1))
                      : torch::stable::new_empty(a1, {n, m}, result_type(a1));
  const ConvDots p{layer, first, second, summed, out.mutable_data_ptr()};
  kernels().per_sample_conv.conv_dots(p, pool_for(flops(layer, first) + flops(layer, second)));
  return out;
}

// Gradients of weight (B, out, in / groups, kernel) and bias (B, out), or with w their weighted sums, without the B.
// The second is empty where no bias is wanted.
std::tuple<Tensor, Tensor> conv_grads(const Tensor& a, const Tensor& g, std::optional<Tensor> w,
                                      std::vector<int64_t> window, int64_t groups, bool bias) {
  const ConvBatch batch = batch_of(a, g);
  const ConvLayer layer = layer_of(batch, window, groups, bias);
  const int64_t B = batch.a.batch(), O = layer.out_channels, C = layer.in_channels / groups;
  const int64_t *k = layer.window.kernel, bias_size = bias ? O : 0;
  if (w)
    STD_TORCH_CHECK(w->dim() == 1 && w->size(0) == B && w->scalar_type() == result_type(a) &&
                        (B <= 1 || w->stride(0) == 1),
                    "conv_grads: w must be (", B, ",), contiguous, in the type of the result");
  Tensor weight = w ? torch::stable::new_empty(a, {O, C, k[0], k[1], k[2]}, result_type(a))
                    : torch::stable::new_empty(a, {B, O, C, k[0], k[1], k[2]}, result_type(a));
  Tensor offset = w ? torch::stable::new_empty(a, {bias_size}, result_type(a))
                    : torch::stable::new_empty(a, {B, bias_size}, result_type(a));
  const ConvGrads p{layer, batch, w.has_value(), w ? w->const_data_ptr() : nullptr, weight.mutable_data_ptr(),
                    offset.mutable_data_ptr()};
  kernels().per_sample_conv.conv_grads(p, pool_for(flops(layer, batch)));
  return {weight, offset};
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("conv_sqnorms", TORCH_BOX(&conv_sqnorms));
  m.impl("conv_dots", TORCH_BOX(&conv_dots));
  m.impl("conv_grads", TORCH_BOX(&conv_grads));
}

}  // namespace uk
