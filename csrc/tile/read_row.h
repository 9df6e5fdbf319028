// One row of any type and stride.
namespace UK_ISA {

// n elements along the depth, widened.
template <class T, class S>
inline void read_row(const uk::Operand& at, int64_t n, T* out) {
  const S* x = static_cast<const S*>(at.data);
  if (at.depth_stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = T(widen(x[i]));
    return;
  }
  for (int64_t i = 0; i < n; ++i) out[i] = T(widen(x[i * at.depth_stride]));
}
template <class T>
inline void read_row(const uk::Operand& at, int64_t n, T* out) {
  switch (at.dtype) {
    case uk::Dtype::f32: return read_row<T, float>(at, n, out);
    case uk::Dtype::f64: return read_row<T, double>(at, n, out);
    case uk::Dtype::bf16: return read_row<T, bf16>(at, n, out);
    case uk::Dtype::f16: return read_row<T, f16>(at, n, out);
  }
}

}  // namespace UK_ISA
