#include <tuple>

#include "cpu/head.h"

namespace uk {
namespace {

using MaybeTensor = std::optional<Tensor>;

// The arguments that the three operators share, with the rows that count.
struct RowArguments {
  const Tensor &h, &weight;
  const MaybeTensor &bias, &ref_h, &ref_weight, &ref_bias, &labels;
  int64_t ignore_index;
  double scale, softcap;
  int64_t kind;
  double beta, offset;
  Rows rows, ref_rows;
  std::vector<int64_t> shape;

  void check(const char* op) {
    check_head(op, h, weight, bias, labels);
    STD_TORCH_CHECK(kind >= 0 && kind <= 2, op, ": kind must be 0, 1 or 2, got ", kind);
    STD_TORCH_CHECK(bool(ref_h) == bool(ref_weight), op, ": ref_h and ref_weight come together");
    STD_TORCH_CHECK(kind == 0 ? !ref_h : kind == 2 || bool(ref_h), op, ": kind ", kind, " and its reference do not fit");
    rows = kept_rows(op, h, labels, ignore_index, weight.size(0));
    for (int64_t dim = 0; dim + 1 < h.dim(); ++dim) shape.push_back(h.size(dim));
    if (!ref_h) return;
    check_head(op, *ref_h, *ref_weight, ref_bias, labels);
    STD_TORCH_CHECK(ref_h->dim() == h.dim() && ref_weight->size(0) == weight.size(0) &&
                        result_type(*ref_h) == result_type(h),
                    op, ": the reference must have the rows, the vocabulary and the accumulation type of the policy");
    for (int64_t dim = 0; dim + 1 < h.dim(); ++dim)
      STD_TORCH_CHECK(ref_h->size(dim) == h.size(dim), op, ": the reference must have the rows of the policy");
    ref_rows = kept_rows(op, *ref_h, labels, ignore_index, weight.size(0));
  }
  int64_t count() const {
    int64_t product = 1;
    for (const int64_t size : shape) product *= size;
    return product;
  }
  RowTask task() const {
    RowTask t{RowKind(kind), head_of(h, weight, bias, rows, scale, softcap), {}, beta, offset, count()};
    if (ref_h) t.reference = head_of(*ref_h, *ref_weight, ref_bias, ref_rows, scale, softcap);
    return t;
  }
  std::vector<int64_t> fields() const {
    std::vector<int64_t> sizes{fields_of(RowKind(kind))};
    sizes.insert(sizes.end(), shape.begin(), shape.end());
    return sizes;
  }
  Tensor new_fields() const { return torch::stable::new_zeros(h, fields(), result_type(h)); }
  Tensor new_argmax() const {
    const std::vector<int64_t> none{0};
    return torch::stable::new_zeros(h, kind == 0 ? shape : none, ScalarType::Long);
  }
  // Multiply-adds: policy products, and those of the reference.
  Pool pool(const RowTask& t, double policy) const {
    return pool_for(2 * policy * logit_work(t.head) + (ref_h ? 2 * logit_work(t.reference) : 0));
  }
  void check_fields(const char* op, const char* name, const Tensor& t) const {
    bool fits = t.dim() == int64_t(shape.size()) + 1 && t.scalar_type() == result_type(h);
    for (int64_t dim = 0; fits && dim < t.dim(); ++dim) fits = t.size(dim) == fields()[dim];
    STD_TORCH_CHECK(fits, op, ": ", name, " must have the shape and dtype of the fields");
  }
};

std::tuple<Tensor, Tensor> linear_rows_forward(const Tensor& h, const Tensor& weight, const MaybeTensor& bias,
                                               const MaybeTensor& ref_h, const MaybeTensor& ref_weight,
                                               const MaybeTensor& ref_bias, const MaybeTensor& labels,
                                               int64_t ignore_index, double scale, double softcap, int64_t kind,
                                               double beta, double offset) {
  RowArguments a{h, weight, bias, ref_h, ref_weight, ref_bias, labels, ignore_index, scale, softcap, kind, beta, offset};
  a.check("linear_rows_forward");
  Tensor fields = a.new_fields(), argmax = a.new_argmax();
  const RowTask task = a.task();
  kernels().token_rows.forward(
      {task, fields.mutable_data_ptr(), kind == 0 ? static_cast<int64_t*>(argmax.mutable_data_ptr()) : nullptr},
      a.pool(task, 1));
  return {fields, argmax};
}

// Gradients of sum(upstream * fields) to h, weight and bias in their dtypes; an empty tensor for what is not needed.
std::tuple<Tensor, Tensor, Tensor> linear_rows_backward(
    const Tensor& upstream, const Tensor& fields, const Tensor& argmax, const Tensor& h, const Tensor& weight,
    const MaybeTensor& bias, const MaybeTensor& ref_h, const MaybeTensor& ref_weight, const MaybeTensor& ref_bias,
    const MaybeTensor& labels, int64_t ignore_index, double scale, double softcap, int64_t kind, double beta,
    double offset, bool need_h, bool need_weight) {
  RowArguments a{h, weight, bias, ref_h, ref_weight, ref_bias, labels, ignore_index, scale, softcap, kind, beta, offset};
  const char* op = "linear_rows_backward";
  a.check(op);
  a.check_fields(op, "upstream", upstream);
  a.check_fields(op, "fields", fields);
  STD_TORCH_CHECK(argmax.scalar_type() == ScalarType::Long && (kind != 0 || argmax.numel() == a.count()), op,
                  ": argmax must be what the forward gave");
  const Tensor up = torch::stable::contiguous(upstream), values = torch::stable::contiguous(fields);
  const Tensor words = torch::stable::contiguous(argmax);
  Tensor d_h = need_h ? torch::stable::new_zeros(h, h.sizes()) : torch::stable::new_empty(h, {0});
  Tensor d_weight = torch::stable::new_empty(weight, {need_weight ? weight.size(0) : 0, weight.size(1)});
  Tensor d_bias = torch::stable::new_empty(bias ? *bias : weight, {bias && need_weight ? weight.size(0) : 0});
  const RowTask task = a.task();
  RowBackward p{task, {}, up.const_data_ptr(), values.const_data_ptr(),
                kind == 0 ? static_cast<const int64_t*>(words.const_data_ptr()) : nullptr};
  if (need_h) p.gradients.d_h = d_h.mutable_data_ptr();
  if (need_weight) p.gradients.d_weight = d_weight.mutable_data_ptr();
  if (need_weight && bias) p.gradients.d_bias = d_bias.mutable_data_ptr();
  kernels().token_rows.backward(p, a.pool(task, 3));
  return {d_h, d_weight, d_bias};
}

// The fields, and gradients of sum(upstream * fields) with them, from one product for the logits.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_rows_sweep(
    const Tensor& upstream, const Tensor& h, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& ref_h,
    const MaybeTensor& ref_weight, const MaybeTensor& ref_bias, const MaybeTensor& labels, int64_t ignore_index,
    double scale, double softcap, int64_t kind, double beta, double offset, bool need_weight) {
  RowArguments a{h, weight, bias, ref_h, ref_weight, ref_bias, labels, ignore_index, scale, softcap, kind, beta, offset};
  const char* op = "linear_rows_sweep";
  a.check(op);
  a.check_fields(op, "upstream", upstream);
  STD_TORCH_CHECK(!need_weight || (weight.scalar_type() == result_type(h) &&
                                   (!bias || bias->scalar_type() == result_type(h))),
                  op, ": a head in half precision has no gradient here");
  const Tensor up = torch::stable::contiguous(upstream);
  Tensor fields = a.new_fields(), argmax = a.new_argmax();
  Tensor d_h = torch::stable::new_zeros(h, h.sizes());
  Tensor d_weight = torch::stable::new_empty(weight, {need_weight ? weight.size(0) : 0, weight.size(1)});
  Tensor d_bias = torch::stable::new_empty(bias ? *bias : weight, {bias && need_weight ? weight.size(0) : 0});
  const RowTask task = a.task();
  RowSweep p{{task, fields.mutable_data_ptr(),
              kind == 0 ? static_cast<int64_t*>(argmax.mutable_data_ptr()) : nullptr},
             {d_h.mutable_data_ptr()},
             up.const_data_ptr()};
  if (need_weight) p.gradients.d_weight = d_weight.mutable_data_ptr();
  if (need_weight && bias) p.gradients.d_bias = d_bias.mutable_data_ptr();
  kernels().token_rows.sweep(p, a.pool(task, 3));
  return {fields, argmax, d_h, d_weight, d_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("linear_rows_forward", TORCH_BOX(&linear_rows_forward));
  m.impl("linear_rows_backward", TORCH_BOX(&linear_rows_backward));
  m.impl("linear_rows_sweep", TORCH_BOX(&linear_rows_sweep));
}

}  // namespace uk
