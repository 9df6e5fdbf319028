// Panel sources: whatever can fill strips of kStrip lanes by depth steps. A source is any type with
//   template <class T, int kStrip> void pack(T* out, int64_t outer, int64_t outers, int64_t k, int64_t depth) const
// that writes round_up(outers, kStrip) / kStrip strips, [strip][depth][kStrip], zero where outer runs out.
namespace UK_ISA {

// Dense memory of any input type in either orientation, widened while it is packed.
struct Dense {
  uk::Operand m;

  template <class T, int kStrip>
  void pack(T* out, int64_t outer, int64_t outers, int64_t k, int64_t depth) const {
    const uk::Operand at = m.from(outer * m.outer_stride + k * m.depth_stride);
    switch (m.dtype) {
      case uk::Dtype::f32: return strips<T, kStrip, float>(at, out, outers, depth);
      case uk::Dtype::f64: return strips<T, kStrip, double>(at, out, outers, depth);
      case uk::Dtype::bf16: return strips<T, kStrip, bf16>(at, out, outers, depth);
      case uk::Dtype::f16: return strips<T, kStrip, f16>(at, out, outers, depth);
    }
  }

 private:
  template <class T, int kStrip, class S>
  static void strips(const uk::Operand& at, T* out, int64_t outers, int64_t depth) {
    const S* data = static_cast<const S*>(at.data);
    for (int64_t o = 0; o < outers; o += kStrip, out += kStrip * depth) {
      const int lanes = int(outers - o < kStrip ? outers - o : kStrip);
      const S* from = data + o * at.outer_stride;
      if (lanes < kStrip)
        gather<T, kStrip>(from, at, out, lanes, depth);
      else if (at.depth_stride == 1)
        transpose<T, kStrip>(from, at, out, depth);
      else if (at.outer_stride == 1)
        copy<T, kStrip>(from, at, out, depth);
      else
        gather<T, kStrip>(from, at, out, lanes, depth);
    }
  }

  template <class T, int kStrip, class S>
  static void gather(const S* from, const uk::Operand& at, T* out, int lanes, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, from += at.depth_stride, out += kStrip)
      for (int i = 0; i < kStrip; ++i) out[i] = i < lanes ? T(widen(from[i * at.outer_stride])) : T(0);
  }

  template <class T, int kStrip, class S>
  static void copy(const S* from, const uk::Operand& at, T* out, int64_t depth) {
    constexpr int W = kLanes<T>;
    for (int64_t k = 0; k < depth; ++k, from += at.depth_stride, out += kStrip) {
      int i = 0;
      if constexpr (std::is_same_v<Wide<S>, T>)
        for (; i + W <= kStrip; i += W) store(out + i, load_wide(from + i));
      for (; i < kStrip; ++i) out[i] = T(widen(from[i]));
    }
  }

  template <class T, int kStrip, class S>
  static void transpose(const S* from, const uk::Operand& at, T* out, int64_t depth) {
    int64_t k = 0;
    if constexpr (std::is_same_v<Wide<S>, float> && std::is_same_v<T, float>)
      for (; k + 4 <= depth; k += 4) transpose_quads<kStrip>(from + k, at.outer_stride, out + k * kStrip);
    for (; k < depth; ++k)
      for (int i = 0; i < kStrip; ++i) out[k * kStrip + i] = T(widen(from[i * at.outer_stride + k]));
  }

  // kStrip lanes by 4 steps; strips are even, so a last pair of lanes is stored by halves.
  template <int kStrip, class S>
  static inline void transpose_quads(const S* from, int64_t stride, float* out) {
    typedef int Index __attribute__((vector_size(16)));
    for (int i = 0; i < kStrip; i += 4) {
      const bool pair = i + 4 > kStrip;
      const Quad r0 = load_quad(from + i * stride), r1 = load_quad(from + (i + 1) * stride);
      const Quad r2 = pair ? r0 : load_quad(from + (i + 2) * stride);
      const Quad r3 = pair ? r1 : load_quad(from + (i + 3) * stride);
      const Quad lo01 = __builtin_shuffle(r0, r1, Index{0, 4, 1, 5});
      const Quad hi01 = __builtin_shuffle(r0, r1, Index{2, 6, 3, 7});
      const Quad lo23 = __builtin_shuffle(r2, r3, Index{0, 4, 1, 5});
      const Quad hi23 = __builtin_shuffle(r2, r3, Index{2, 6, 3, 7});
      const Quad columns[4] = {
          __builtin_shuffle(lo01, lo23, Index{0, 1, 4, 5}), __builtin_shuffle(lo01, lo23, Index{2, 3, 6, 7}),
          __builtin_shuffle(hi01, hi23, Index{0, 1, 4, 5}), __builtin_shuffle(hi01, hi23, Index{2, 3, 6, 7})};
      for (int k = 0; k < 4; ++k) std::memcpy(out + k * kStrip + i, &columns[k], pair ? 8 : 16);
    }
  }
};

}  // namespace UK_ISA
