// Panel sources: whatever can fill strips of kStrip lanes by depth steps. A source is any type with
//   template <class P, int kStrip> void pack(P* out, int64_t outer, int64_t outers, int64_t k, int64_t depth) const
// that writes round_up(outers, kStrip) / kStrip strips, [strip][step][kStrip], zero where outer (or, for pairs,
// the depth) runs out. One whose rows need no packing, or not all of them, also has
//   template <class P> int64_t rows_in_place(int64_t outers, int64_t depth) const, how many; whole register tiles
//   template <class P> auto rows(int64_t outer, int64_t k, int64_t depth) const, what the micro-kernel takes
// and may have
//   template <class P> void prefetch(int64_t outer, int64_t k, int64_t depth) const, for a register tile of rows.
namespace UK_ISA {

// A step of `lanes` lanes of a strip of pairs, two rows zipped; zeros in the place of a second that is null.
template <int kStrip>
inline void zip_rows(const bf16* first, const bf16* second, int64_t stride, int64_t lanes, Bf16Pair* out) {
  if (lanes >= kStrip && stride == 1 && second != nullptr) {
    for (int i = 0; i < kStrip; ++i) out[i] = {first[i], second[i]};
    return;
  }
  for (int i = 0; i < kStrip; ++i)
    out[i] = {i < lanes ? first[i * stride] : bf16{}, i < lanes && second ? second[i * stride] : bf16{}};
}

// Dense memory of any input type in either orientation, widened while it is packed.
struct Dense {
  uk::Operand m;

  template <class P>
  int64_t rows_in_place(int64_t outers, int64_t depth) const {
    const bool as_it_is = std::is_same_v<P, Bf16Pair>
                              ? depth % 2 == 0 && m.outer_stride % 2 == 0 && reinterpret_cast<uintptr_t>(m.data) % 4 == 0
                              : m.dtype == (sizeof(P) == 8 ? uk::Dtype::f64 : uk::Dtype::f32);
    // Rows whole pages apart fall into one set of the nearest cache, of 8 lines on many processors.
    const bool collide = Block<P>::kRows > 8 && m.outer_stride * uk::size_of(m.dtype) % 4096 == 0;
    return as_it_is && m.depth_stride == 1 && !collide ? outers / Block<P>::kRows * Block<P>::kRows : 0;
  }
  template <class P>
  RowsInPlace<P> rows(int64_t outer, int64_t k, int64_t) const {
    const uk::Operand at = m.from(outer * m.outer_stride + k);
    return {static_cast<const P*>(at.data), m.outer_stride / PanelTraits<P>::kSteps};
  }
  template <class P>
  void prefetch(int64_t outer, int64_t k, int64_t depth) const {
    for (int64_t i = 0; i < Block<P>::kRows; ++i) {
      const uk::Operand row = m.from((outer + i) * m.outer_stride + k);
      for (int64_t byte = 0; byte < depth * uk::size_of(m.dtype); byte += 64)
        __builtin_prefetch(static_cast<const char*>(row.data) + byte, 0, 2);
    }
  }

  template <class P, int kStrip>
  void pack(P* out, int64_t outer, int64_t outers, int64_t k, int64_t depth) const;

 private:
  template <class T, int kStrip, class S>
  static void strips(const uk::Operand& at, T* out, int64_t outers, int64_t depth) {
    const S* data = static_cast<const S*>(at.data);
    for (int64_t o = 0; o < outers; o += kStrip, out += kStrip * depth) {
      const int lanes = int(outers - o < kStrip ? outers - o : kStrip);
      const S* from = data + o * at.outer_stride;
      if (lanes < kStrip) {
        gather<T, kStrip>(from, at, out, lanes, depth);
      } else if (at.depth_stride == 1) {
        transpose<T, kStrip>(from, at, out, depth);
      } else if (at.outer_stride == 1) {
        const int64_t whole = (outers - o) / kStrip, count = whole < kTogether ? whole : kTogether;
        copy<T, kStrip>(from, at, out, count, depth);
        o += (count - 1) * kStrip;
        out += (count - 1) * kStrip * depth;
      } else {
        gather<T, kStrip>(from, at, out, lanes, depth);
      }
    }
  }

  // bf16 memory as pairs of steps: 32-bit elements where the depth is contiguous, two rows zipped otherwise.
  template <int kStrip>
  static void pair_strips(const uk::Operand& at, Bf16Pair* out, int64_t outers, int64_t depth) {
    const bf16* data = static_cast<const bf16*>(at.data);
    const int64_t pairs = depth / 2, steps = (depth + 1) / 2;
    for (int64_t o = 0; o < outers; o += kStrip, out += kStrip * steps) {
      const int lanes = int(outers - o < kStrip ? outers - o : kStrip);
      const bf16* from = data + o * at.outer_stride;
      if (lanes == kStrip && at.depth_stride == 1 && depth % 2 == 0 && at.outer_stride % 2 == 0) {
        const uk::Operand words{nullptr, at.outer_stride / 2, 1, uk::Dtype::f32};
        transpose<float, kStrip>(reinterpret_cast<const Bf16Pair*>(from), words, reinterpret_cast<float*>(out), pairs);
        continue;
      }
      for (int64_t k = 0; k < steps; ++k) {
        const bf16* x = from + 2 * k * at.depth_stride;
        zip_rows<kStrip>(x, k < pairs ? x + at.depth_stride : nullptr, at.outer_stride, lanes, out + k * kStrip);
      }
    }
  }

  template <class T, int kStrip, class S>
  static void gather(const S* from, const uk::Operand& at, T* out, int lanes, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, from += at.depth_stride, out += kStrip)
      for (int i = 0; i < kStrip; ++i) out[i] = i < lanes ? T(widen(from[i * at.outer_stride])) : T(0);
  }

  // Some strips side by side: rows of the memory are read by whole cache lines, whatever their distance.
  static constexpr int64_t kTogether = 8;
  template <class T, int kStrip, class S>
  static void copy(const S* from, const uk::Operand& at, T* out, int64_t strips, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, from += at.depth_stride, out += kStrip)
      for (int64_t n = 0; n < strips; ++n) copy_lanes<kStrip>(from + n * kStrip, out + n * kStrip * depth);
  }

  template <int kStrip, class T, class S>
  static void copy_lanes(const S* from, T* out) {
    constexpr int W = kLanes<T>;
    if constexpr (std::is_same_v<S, T>) {
      std::memcpy(out, from, kStrip * sizeof(T));
    } else {
      int i = 0;
      if constexpr (std::is_same_v<Wide<S>, T>)
        for (; i + W <= kStrip; i += W) store(out + i, load_wide(from + i));
      for (; i < kStrip; ++i) out[i] = T(widen(from[i]));
    }
  }

  // Four rows at a time along the whole depth: many rows at once would share cache sets when the row
  // stride is a power of two. Strips are even, so the last group may be two rows.
  template <class T, int kStrip, class S>
  static void transpose(const S* from, const uk::Operand& at, T* out, int64_t depth) {
    if constexpr (std::is_same_v<Wide<S>, float> && std::is_same_v<T, float>) {
      constexpr int kQuads = kStrip / 4 * 4;
      for (int i = 0; i < kQuads; i += 4) transpose_rows<4, kStrip>(from + i * at.outer_stride, at, out + i, depth);
      if constexpr (kQuads < kStrip)
        transpose_rows<2, kStrip>(from + kQuads * at.outer_stride, at, out + kQuads, depth);
    } else {
      for (int i = 0; i < kStrip; ++i)
        for (int64_t k = 0; k < depth; ++k) out[k * kStrip + i] = T(widen(from[i * at.outer_stride + k]));
    }
  }

  template <int kRows, int kStrip, class S>
  static void transpose_rows(const S* from, const uk::Operand& at, float* out, int64_t depth) {
    typedef int Index __attribute__((vector_size(16)));
    const S* row[kRows];
    for (int i = 0; i < kRows; ++i) row[i] = from + i * at.outer_stride;
    const int64_t whole = depth / 4 * 4;
    for (int64_t k = 0; k < whole; k += 4, out += 4 * kStrip) {
      if (k % 16 == 0)
        for (int i = 0; i < kRows; ++i) __builtin_prefetch(row[i] + kRows * at.outer_stride + k);
      const Quad r0 = load_quad(row[0] + k), r1 = load_quad(row[1] + k);
      const Quad r2 = kRows == 4 ? load_quad(row[kRows - 2] + k) : r0;
      const Quad r3 = kRows == 4 ? load_quad(row[kRows - 1] + k) : r1;
      const Quad lo01 = __builtin_shuffle(r0, r1, Index{0, 4, 1, 5});
      const Quad hi01 = __builtin_shuffle(r0, r1, Index{2, 6, 3, 7});
      const Quad lo23 = __builtin_shuffle(r2, r3, Index{0, 4, 1, 5});
      const Quad hi23 = __builtin_shuffle(r2, r3, Index{2, 6, 3, 7});
      const Quad columns[4] = {
          __builtin_shuffle(lo01, lo23, Index{0, 1, 4, 5}), __builtin_shuffle(lo01, lo23, Index{2, 3, 6, 7}),
          __builtin_shuffle(hi01, hi23, Index{0, 1, 4, 5}), __builtin_shuffle(hi01, hi23, Index{2, 3, 6, 7})};
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) std::memcpy(out + c * kStrip, &columns[c], kRows * sizeof(float));
    }
    for (int64_t k = whole; k < depth; ++k, out += kStrip)
      for (int i = 0; i < kRows; ++i) out[i] = widen(row[i][k]);
  }
};

template <class P, int kStrip>
void Dense::pack(P* out, int64_t outer, int64_t outers, int64_t k, int64_t depth) const {
  const uk::Operand at = m.from(outer * m.outer_stride + k * m.depth_stride);
  if constexpr (std::is_same_v<P, Bf16Pair>) {
    pair_strips<kStrip>(at, out, outers, depth);
  } else {
    switch (m.dtype) {
      case uk::Dtype::f32: return strips<P, kStrip, float>(at, out, outers, depth);
      case uk::Dtype::f64: return strips<P, kStrip, double>(at, out, outers, depth);
      case uk::Dtype::bf16: return strips<P, kStrip, bf16>(at, out, outers, depth);
      case uk::Dtype::f16: return strips<P, kStrip, f16>(at, out, outers, depth);
    }
  }
}

// Every operator packs dense panels of these shapes: they are compiled once, with the dense stem.
#define UK_DENSE_PANELS(P, Linkage)                                                                       \
  Linkage template void Dense::pack<P, Block<P>::kRows>(P*, int64_t, int64_t, int64_t, int64_t) const; \
  Linkage template void Dense::pack<P, Block<P>::kCols>(P*, int64_t, int64_t, int64_t, int64_t) const;
UK_DENSE_PANELS(float, extern)
UK_DENSE_PANELS(double, extern)
UK_DENSE_PANELS(Bf16Pair, extern)

// Random signs (see philox.h), made while they are packed: outer is the row, depth the coordinate.
struct PhiloxSigns {
  uint64_t seed;
  const int64_t* blocks = nullptr;  // where a block of the depth lies; null: where it is

  int64_t block(int64_t n) const { return blocks == nullptr ? n : blocks[n]; }

  template <class T, int kStrip>
  void pack(T* out, int64_t outer, int64_t outers, int64_t k, int64_t depth) const {
    uint64_t words[2][round_up(kStrip, kLongs)];
    for (int64_t o = 0; o < outers; o += kStrip, out += kStrip * depth)
      for (int64_t step = 0; step < depth;) {
        const int64_t block = (k + step) / kSignBlock;
        sign_words(seed, outer + o, kStrip, this->block(block), words[0], words[1]);
        for (int64_t bit = k + step - block * kSignBlock; bit < kSignBlock && step < depth; ++bit, ++step)
          for (int i = 0; i < kStrip; ++i) {
            const T sign = words[bit / 64][i] >> (bit % 64) & 1 ? T(1) : T(-1);
            out[step * kStrip + i] = o + i < outers ? sign : T(0);
          }
      }
  }
};

}  // namespace UK_ISA

