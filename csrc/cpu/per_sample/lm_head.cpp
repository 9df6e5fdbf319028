#include "cpu/head.h"

namespace uk {
namespace {

// One side's arguments as the engine takes them, and the memory that they point to.
struct Side {
  Rows rows;
  std::vector<int64_t> begins;
  Tensor upstream, lse;
  HeadSamples samples;
};

// The first of the `items` listed positions that lies in each of `samples` runs of `length`, and their number.
std::vector<int64_t> begins_of(const std::vector<int64_t>& positions, int64_t samples, int64_t length) {
  std::vector<int64_t> begins(samples + 1, int64_t(positions.size()));
  int64_t next = 0;
  for (int64_t n = 0; n < int64_t(positions.size()); ++n)
    while (next <= positions[n] / length) begins[next++] = n;
  return begins;
}

Tensor per_row(const char* op, const char* name, const Tensor& x, const Tensor& labels, const Tensor& h) {
  bool fits = x.dim() == labels.dim() && x.scalar_type() == result_type(h);
  for (int64_t dim = 0; fits && dim < x.dim(); ++dim) fits = x.size(dim) == labels.size(dim);
  STD_TORCH_CHECK(fits, op, ": ", name, " must have the shape of labels and the type of the result");
  return torch::stable::contiguous(x);
}

// h (B, T, d), labels (B, T). Where `summed`, all samples count as one.
Side side_of(const char* op, const Tensor& h, const Tensor& labels, const std::optional<Tensor>& upstream,
             const std::optional<Tensor>& lse, const Tensor& weight, const std::optional<Tensor>& bias,
             int64_t ignore_index, bool summed) {
  STD_TORCH_CHECK(h.dim() == 3 && labels.dim() == 2, op, ": h must have 3 dimensions and labels 2, got ", h.dim(),
                  " and ", labels.dim());
  check_head(op, h, weight, bias, labels);
  Side side{kept_rows(op, h, labels, ignore_index, weight.size(0))};
  side.begins = summed ? std::vector<int64_t>{0, int64_t(side.rows.labels.size())}
                       : begins_of(side.rows.positions, labels.size(0), labels.size(1));
  const LinearHead head = head_of(h, weight, bias, side.rows);
  if (lse) {
    side.lse = per_row(op, "lse", *lse, labels, h);
  } else {
    side.lse = torch::stable::new_empty(h, labels.sizes(), result_type(h));
    const Tensor nll = torch::stable::new_empty(h, labels.sizes(), result_type(h));
    kernels().token_loss.nll_forward({head, nll.mutable_data_ptr(), side.lse.mutable_data_ptr(), nullptr, 0},
                                     pool_for(2 * logit_work(head)));
  }
  side.samples = {head, side.lse.const_data_ptr()};
  if (upstream) {
    side.upstream = per_row(op, "upstream", *upstream, labels, h);
    side.samples.upstream = side.upstream.const_data_ptr();
  }
  side.samples.begins = side.begins.data();
  side.samples.samples = int64_t(side.begins.size()) - 1;
  return side;
}

HeadMethod method_of(const char* op, int64_t method) {
  STD_TORCH_CHECK(method == 0 || method == 1 || method == 3, op, ": method must be 0, 1 or 3, got ", method);
  return HeadMethod(method);
}

// -> (B,) squared norms of the gradients of sum_t upstream_t nll_t to the weight (and the bias).
Tensor lm_head_sqnorms(const Tensor& h, const Tensor& labels, const std::optional<Tensor>& upstream,
                       const std::optional<Tensor>& lse, const Tensor& weight, const std::optional<Tensor>& bias,
                       int64_t ignore_index, int64_t method) {
  const HeadMethod how = method_of("lm_head_sqnorms", method);
  const Side side = side_of("lm_head_sqnorms", h, labels, upstream, lse, weight, bias, ignore_index, false);
  Tensor out = torch::stable::new_empty(h, {labels.size(0)}, result_type(h));
  kernels().per_sample_lm_head.sqnorms({side.samples, how, out.mutable_data_ptr()},
                                       pool_for(2 * logit_work(side.samples.head)));
  return out;
}

// -> (B1, B2) inner products of gradients, or (B1,) with the sum of side 2.
Tensor lm_head_dots(const Tensor& h1, const Tensor& labels1, const std::optional<Tensor>& upstream1,
                    const std::optional<Tensor>& lse1, const Tensor& h2, const Tensor& labels2,
                    const std::optional<Tensor>& upstream2, const std::optional<Tensor>& lse2, const Tensor& weight,
                    const std::optional<Tensor>& bias, int64_t ignore_index, bool summed, int64_t method) {
  const HeadMethod how = method_of("lm_head_dots", method);
  const Side left = side_of("lm_head_dots", h1, labels1, upstream1, lse1, weight, bias, ignore_index, false);
  const Side right = side_of("lm_head_dots", h2, labels2, upstream2, lse2, weight, bias, ignore_index, summed);
  const int64_t samples = labels1.size(0);
  Tensor out = summed ? torch::stable::new_empty(h1, {samples}, result_type(h1))
                      : torch::stable::new_empty(h1, {samples, labels2.size(0)}, result_type(h1));
  kernels().per_sample_lm_head.dots({left.samples, right.samples, how, out.mutable_data_ptr()},
                                    pool_for(2 * (logit_work(left.samples.head) + logit_work(right.samples.head))));
  return out;
}

// ids (B, S), g (B, S, d) -> (B,) inner products of the embedding's gradients with the head's.
Tensor lm_head_tied_dots(const Tensor& ids, const Tensor& g, const Tensor& h, const Tensor& labels,
                         const std::optional<Tensor>& upstream, const std::optional<Tensor>& lse, const Tensor& weight,
                         const std::optional<Tensor>& bias, int64_t padding_idx, int64_t ignore_index) {
  const char* op = "lm_head_tied_dots";
  STD_TORCH_CHECK(ids.dim() == 2 && g.dim() == 3 && ids.size(0) == g.size(0) && ids.size(1) == g.size(1) &&
                      g.size(2) == weight.size(1) && ids.size(0) == labels.size(0) &&
                      ids.scalar_type() == ScalarType::Long,
                  op, ": ids (B, S) of int64 and g (B, S, d) expected, with the B of labels and the d of weight");
  STD_TORCH_CHECK(result_type(g) == result_type(h), op, ": float64 cannot be mixed with other dtypes");
  const Side side = side_of(op, h, labels, upstream, lse, weight, bias, ignore_index, false);
  std::vector<int64_t> g_offsets, w_offsets, tokens, positions;
  const int64_t* data = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t i = 0; i < ids.size(0); ++i)
    for (int64_t t = 0; t < ids.size(1); ++t) {
      const int64_t id = data[i * ids.stride(0) + t * ids.stride(1)];
      STD_TORCH_CHECK(id >= 0 && id < weight.size(0), op, ": ids must be in [0, ", weight.size(0), "), got ", id);
      if (id == padding_idx) continue;
      g_offsets.push_back(i * g.stride(0) + t * g.stride(1));
      w_offsets.push_back(id * weight.stride(0));
      tokens.push_back(id);
      positions.push_back(i * ids.size(1) + t);
    }
  const std::vector<int64_t> begins = begins_of(positions, ids.size(0), ids.size(1));
  Tensor out = torch::stable::new_empty(h, {ids.size(0)}, result_type(h));
  const double work = 4 * double(side.samples.head.rows) * double(ids.size(1)) * double(weight.size(1));
  kernels().per_sample_lm_head.tied_dots({side.samples, g.const_data_ptr(), g.stride(2), dtype_of(g, "g"),
                                          g_offsets.data(), w_offsets.data(), tokens.data(), begins.data(),
                                          out.mutable_data_ptr()},
                                         pool_for(work));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("lm_head_sqnorms", TORCH_BOX(&lm_head_sqnorms));
  m.impl("lm_head_dots", TORCH_BOX(&lm_head_dots));
  m.impl("lm_head_tied_dots", TORCH_BOX(&lm_head_tied_dots));
}

}  // namespace uk
