#include <tuple>

#include "cpu/head.h"

namespace uk {
namespace {

// h (*, d), weight (V, d), bias (V,), labels (*), any strides -> (nll, lse), both (*), 0 where ignored, and room for
// so many logits that the backward will not make again.
std::tuple<Tensor, Tensor, Tensor> linear_nll_forward(const Tensor& h, const Tensor& weight,
                                                      const std::optional<Tensor>& bias, const Tensor& labels,
                                                      int64_t ignore_index, double scale, double softcap,
                                                      int64_t room) {
  check_head("linear_nll", h, weight, bias, labels);
  const Rows rows = kept_rows("linear_nll", h, labels, ignore_index, weight.size(0));
  Tensor nll = torch::stable::new_zeros(h, labels.sizes(), result_type(h));
  Tensor lse = torch::stable::new_zeros(h, labels.sizes(), result_type(h));
  Tensor kept = torch::stable::new_zeros(h, {room}, result_type(h));
  const LinearHead x = head_of(h, weight, bias, rows, scale, softcap);
  kernels().token_loss.nll_forward(
      {x, nll.mutable_data_ptr(), lse.mutable_data_ptr(), kept.mutable_data_ptr(), room}, pool_for(2 * logit_work(x)));
  return {nll, lse, kept};
}

// Gradients of sum(grad * nll) to h, weight and bias in their dtypes; an empty tensor for what is not needed.
std::tuple<Tensor, Tensor, Tensor> linear_nll_backward(const Tensor& grad, const Tensor& h, const Tensor& weight,
                                                       const std::optional<Tensor>& bias, const Tensor& labels,
                                                       const Tensor& lse, const Tensor& kept, int64_t ignore_index,
                                                       double scale, double softcap, bool need_h, bool need_weight) {
  check_head("linear_nll", h, weight, bias, labels);
  STD_TORCH_CHECK(grad.numel() == labels.numel() && lse.numel() == labels.numel() &&
                      grad.scalar_type() == result_type(h) && lse.scalar_type() == result_type(h),
                  "linear_nll_backward: grad and lse must have the shape of labels and the dtype of the forward");
  STD_TORCH_CHECK(kept.scalar_type() == result_type(h) && kept.dim() == 1 && kept.is_contiguous(),
                  "linear_nll_backward: kept must be what the forward gave");
  const Rows rows = kept_rows("linear_nll", h, labels, ignore_index, weight.size(0));
  const Tensor grads = torch::stable::contiguous(grad), lses = torch::stable::contiguous(lse);
  Tensor d_h = need_h ? torch::stable::new_zeros(h, h.sizes()) : torch::stable::new_empty(h, {0});
  Tensor d_weight = torch::stable::new_empty(weight, {need_weight ? weight.size(0) : 0, weight.size(1)});
  Tensor d_bias = torch::stable::new_empty(bias ? *bias : weight, {bias ? weight.size(0) : 0});
  const LinearHead x = head_of(h, weight, bias, rows, scale, softcap);
  NllBackward p{x, {}, grads.const_data_ptr(), lses.const_data_ptr(), kept.const_data_ptr(), kept.numel()};
  if (need_h) p.gradients.d_h = d_h.mutable_data_ptr();
  if (need_weight) p.gradients.d_weight = d_weight.mutable_data_ptr();
  if (bias) p.gradients.d_bias = d_bias.mutable_data_ptr();
  kernels().token_loss.nll_backward(p, pool_for(6 * logit_work(x)));
  return {d_h, d_weight, d_bias};
}

// The negative log-likelihoods, and gradients of sum(weights * nll) with them, from one product for the logits.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_nll_sweep(const Tensor& weights, const Tensor& h, const Tensor& weight,
                                                            const std::optional<Tensor>& bias, const Tensor& labels,
                                                            int64_t ignore_index, double scale, double softcap,
                                                            bool need_weight, const std::optional<Tensor>& bounds,
                                                            double beta) {
  check_head("linear_nll", h, weight, bias, labels);
  STD_TORCH_CHECK(weights.numel() == labels.numel() && weights.scalar_type() == result_type(h),
                  "linear_nll_sweep: weights must have the shape of labels and the accumulation type");
  STD_TORCH_CHECK(!need_weight || (weight.scalar_type() == result_type(h) &&
                                   (!bias || bias->scalar_type() == result_type(h))),
                  "linear_nll_sweep: a head in half precision has no gradient here");
  STD_TORCH_CHECK(!bounds || (labels.dim() > 0 && bounds->dim() == 1 && bounds->size(0) == labels.size(0) &&
                              bounds->scalar_type() == result_type(h) && beta > 0),
                  "linear_nll_sweep: bounds must have one value a sequence, in the accumulation type, and beta be positive");
  const Rows rows = kept_rows("linear_nll", h, labels, ignore_index, weight.size(0));
  const Tensor grads = torch::stable::contiguous(weights);
  Tensor nll = torch::stable::new_zeros(h, labels.sizes(), result_type(h));
  Tensor d_h = torch::stable::new_zeros(h, h.sizes());
  Tensor d_weight = torch::stable::new_empty(weight, {need_weight ? weight.size(0) : 0, weight.size(1)});
  Tensor d_bias = torch::stable::new_empty(bias ? *bias : weight, {bias && need_weight ? weight.size(0) : 0});
  const LinearHead x = head_of(h, weight, bias, rows, scale, softcap);
  NllSweep p{x, {d_h.mutable_data_ptr()}, grads.const_data_ptr(), nll.mutable_data_ptr()};
  const Tensor each_bound = bounds ? torch::stable::contiguous(*bounds) : grads;
  if (bounds && labels.numel() > 0) {
    p.bounds = each_bound.const_data_ptr();
    p.sequences = labels.size(0);
    p.sequence = labels.numel() / labels.size(0);
    p.beta = beta;
  }
  if (need_weight) p.gradients.d_weight = d_weight.mutable_data_ptr();
  if (need_weight && bias) p.gradients.d_bias = d_bias.mutable_data_ptr();
  kernels().token_loss.nll_sweep(p, pool_for(6 * logit_work(x)));
  return {nll, d_h, d_weight, d_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("linear_nll_forward", TORCH_BOX(&linear_nll_forward));
  m.impl("linear_nll_backward", TORCH_BOX(&linear_nll_backward));
  m.impl("linear_nll_sweep", TORCH_BOX(&linear_nll_sweep));
}

}  // namespace uk
