#include <tuple>
#include <vector>

#include "cpu/common.h"

namespace uk {
namespace {

// The rows whose label is not ignored: where each begins in h, which row of the outputs it is, its label.
struct Rows {
  std::vector<int64_t> offsets, positions, labels;
};

Rows kept_rows(const Tensor& h, const Tensor& labels, int64_t ignore_index, int64_t vocabulary) {
  const int64_t dims = labels.dim(), count = labels.numel();
  const int64_t* data = static_cast<const int64_t*>(labels.const_data_ptr());
  Rows rows;
  std::vector<int64_t> index(dims, 0);
  int64_t h_at = 0, label_at = 0;
  for (int64_t position = 0; position < count; ++position) {
    const int64_t label = data[label_at];
    if (label != ignore_index) {
      STD_TORCH_CHECK(label >= 0 && label < vocabulary, "linear_nll: labels must be in [0, ", vocabulary,
                      ") or ignore_index = ", ignore_index, ", got ", label);
      rows.offsets.push_back(h_at);
      rows.positions.push_back(position);
      rows.labels.push_back(label);
    }
    for (int64_t dim = dims - 1; dim >= 0; --dim) {  // the next index, like an odometer
      h_at += h.stride(dim);
      label_at += labels.stride(dim);
      if (++index[dim] < labels.size(dim)) break;
      h_at -= labels.size(dim) * h.stride(dim);
      label_at -= labels.size(dim) * labels.stride(dim);
      index[dim] = 0;
    }
  }
  return rows;
}

void check(const Tensor& h, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels) {
  STD_TORCH_CHECK(weight.dim() == 2 && h.dim() == labels.dim() + 1 && h.size(-1) == weight.size(1),
                  "linear_nll: h (*, d), weight (V, d) and labels (*) expected");
  for (int64_t dim = 0; dim < labels.dim(); ++dim)
    STD_TORCH_CHECK(h.size(dim) == labels.size(dim), "linear_nll: h has ", h.size(dim), " rows in dimension ", dim,
                    ", labels ", labels.size(dim));
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "linear_nll: labels must be int64");
  STD_TORCH_CHECK(result_type(h) == result_type(weight), "linear_nll: float64 cannot be mixed with other dtypes");
  if (!bias) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "linear_nll: bias must have shape (V,)");
  STD_TORCH_CHECK(result_type(h) == result_type(*bias), "linear_nll: float64 cannot be mixed with other dtypes");
}

LinearHead head_of(const Tensor& h, const Tensor& weight, const std::optional<Tensor>& bias, const Rows& rows) {
  LinearHead x{};
  x.h = h.const_data_ptr();
  x.h_stride = h.stride(-1);
  x.h_dtype = dtype_of(h, "h");
  x.weight = {weight.const_data_ptr(), weight.stride(0), weight.stride(1), dtype_of(weight, "weight")};
  if (bias) x.bias = {bias->const_data_ptr(), bias->stride(0), 1, dtype_of(*bias, "bias")};
  x.offsets = rows.offsets.data();
  x.positions = rows.positions.data();
  x.labels = rows.labels.data();
  x.rows = int64_t(rows.labels.size());
  x.features = weight.size(1);
  x.vocabulary = weight.size(0);
  return x;
}

double work(const LinearHead& x) { return double(x.rows) * double(x.features) * double(x.vocabulary); }

// h (*, d), weight (V, d), bias (V,), labels (*), any strides -> (nll, lse), both (*), 0 where ignored.
std::tuple<Tensor, Tensor> linear_nll_forward(const Tensor& h, const Tensor& weight, const std::optional<Tensor>& bias,
                                              const Tensor& labels, int64_t ignore_index) {
  check(h, weight, bias, labels);
  const Rows rows = kept_rows(h, labels, ignore_index, weight.size(0));
  Tensor nll = torch::stable::new_zeros(h, labels.sizes(), result_type(h));
  Tensor lse = torch::stable::new_zeros(h, labels.sizes(), result_type(h));
  const LinearHead x = head_of(h, weight, bias, rows);
  kernels().token_loss.nll_forward({x, nll.mutable_data_ptr(), lse.mutable_data_ptr()}, pool_for(2 * work(x)));
  return {nll, lse};
}

// Gradients of sum(grad * nll) to h, weight and bias in their dtypes; an empty tensor for what is not needed.
std::tuple<Tensor, Tensor, Tensor> linear_nll_backward(const Tensor& grad, const Tensor& h, const Tensor& weight,
                                                       const std::optional<Tensor>& bias, const Tensor& labels,
                                                       const Tensor& lse, int64_t ignore_index, bool need_h,
                                                       bool need_weight) {
  check(h, weight, bias, labels);
  STD_TORCH_CHECK(grad.numel() == labels.numel() && lse.numel() == labels.numel() &&
                      grad.scalar_type() == result_type(h) && lse.scalar_type() == result_type(h),
                  "linear_nll_backward: grad and lse must have the shape of labels and the dtype of the forward");
  const Rows rows = kept_rows(h, labels, ignore_index, weight.size(0));
  const Tensor grads = torch::stable::contiguous(grad), lses = torch::stable::contiguous(lse);
  Tensor d_h = need_h ? torch::stable::new_zeros(h, h.sizes()) : torch::stable::new_empty(h, {0});
  Tensor d_weight = torch::stable::new_empty(weight, {need_weight ? weight.size(0) : 0, weight.size(1)});
  Tensor d_bias = torch::stable::new_empty(bias ? *bias : weight, {bias ? weight.size(0) : 0});
  const LinearHead x = head_of(h, weight, bias, rows);
  NllBackward p{x, grads.const_data_ptr(), lses.const_data_ptr()};
  if (need_h) p.d_h = d_h.mutable_data_ptr();
  if (need_weight) p.d_weight = d_weight.mutable_data_ptr();
  if (bias) p.d_bias = d_bias.mutable_data_ptr();
  kernels().token_loss.nll_backward(p, pool_for(6 * work(x)));
  return {d_h, d_weight, d_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("linear_nll_forward", TORCH_BOX(&linear_nll_forward));
  m.impl("linear_nll_backward", TORCH_BOX(&linear_nll_backward));
}

}  // namespace uk
