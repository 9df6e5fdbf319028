// Glue that the operators of a language-model head share.
#pragma once
#include <vector>

#include "cpu/common.h"

namespace uk {

// The rows whose label is not ignored: where each begins in h, which row of the outputs it is, its label.
struct Rows {
  std::vector<int64_t> offsets, positions, labels;
};

inline Rows kept_rows(const char* op, const Tensor& h, const std::optional<Tensor>& labels, int64_t ignore_index,
                      int64_t vocabulary) {
  const int64_t dims = h.dim() - 1;
  int64_t count = 1;
  for (int64_t dim = 0; dim < dims; ++dim) count *= h.size(dim);
  const int64_t* data = labels ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr;
  Rows rows;
  std::vector<int64_t> index(dims, 0);
  int64_t h_at = 0, label_at = 0;
  for (int64_t position = 0; position < count; ++position) {
    const int64_t label = labels ? data[label_at] : -1;
    if (!labels || label != ignore_index) {
      STD_TORCH_CHECK(!labels || (label >= 0 && label < vocabulary), op, ": labels must be in [0, ", vocabulary,
                      ") or ignore_index = ", ignore_index, ", got ", label);
      rows.offsets.push_back(h_at);
      rows.positions.push_back(position);
      rows.labels.push_back(label);
    }
    for (int64_t dim = dims - 1; dim >= 0; --dim) {  // the next index, like an odometer
      h_at += h.stride(dim);
      label_at += labels ? labels->stride(dim) : 0;
      if (++index[dim] < h.size(dim)) break;
      h_at -= h.size(dim) * h.stride(dim);
      label_at -= labels ? h.size(dim) * labels->stride(dim) : 0;
      index[dim] = 0;
    }
  }
  return rows;
}

inline void check_head(const char* op, const Tensor& h, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& labels) {
  STD_TORCH_CHECK(weight.dim() == 2 && h.dim() >= 1 && h.size(-1) == weight.size(1), op,
                  ": h (*, d) and weight (V, d) expected");
  STD_TORCH_CHECK(result_type(h) == result_type(weight), op, ": float64 cannot be mixed with other dtypes");
  if (labels) {
    STD_TORCH_CHECK(h.dim() == labels->dim() + 1, op, ": labels must have the dimensions of h but the last");
    for (int64_t dim = 0; dim < labels->dim(); ++dim)
      STD_TORCH_CHECK(h.size(dim) == labels->size(dim), op, ": h has ", h.size(dim), " rows in dimension ", dim,
                      ", labels ", labels->size(dim));
    STD_TORCH_CHECK(labels->scalar_type() == ScalarType::Long, op, ": labels must be int64");
  }
  if (!bias) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), op, ": bias must have shape (V,)");
  STD_TORCH_CHECK(result_type(h) == result_type(*bias), op, ": float64 cannot be mixed with other dtypes");
}

inline LinearHead head_of(const Tensor& h, const Tensor& weight, const std::optional<Tensor>& bias, const Rows& rows,
                          double scale = 1, double softcap = 0) {
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
  x.scale = scale;
  x.softcap = softcap;
  return x;
}

// Multiply-adds of all the logits.
inline double logit_work(const LinearHead& x) { return double(x.rows) * double(x.features) * double(x.vocabulary); }

}  // namespace uk
