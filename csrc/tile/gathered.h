// Panel sources for a matrix whose rows lie anywhere in memory, and for panels packed ahead.
namespace UK_ISA {

// Calls f with a null pointer of the element type.
template <class F>
inline void with_type(uk::Dtype dtype, F&& f) {
  switch (dtype) {
    case uk::Dtype::f32: return f(static_cast<const float*>(nullptr));
    case uk::Dtype::f64: return f(static_cast<const double*>(nullptr));
    case uk::Dtype::bf16: return f(static_cast<const bf16*>(nullptr));
    case uk::Dtype::f16: return f(static_cast<const f16*>(nullptr));
  }
}

// A dense matrix given by where its rows begin: `outer` runs over rows, the reduction over columns.
struct GatheredRows {
  const void* data;
  const int64_t* offsets;  // elements from `data`, one a row
  int64_t stride;          // of columns
  uk::Dtype dtype;

  template <class T, int kStrip>
  void pack(T* out, int64_t outer, int64_t outers, int64_t k, int64_t depth) const {
    with_type(dtype, [&](auto* null) {
      const auto* from = static_cast<decltype(null)>(data);
      for (int64_t o = 0; o < outers; o += kStrip, out += kStrip * depth)
        for (int64_t i = 0; i < kStrip; ++i) {
          const auto* row = o + i < outers ? from + offsets[outer + o + i] + k * stride : nullptr;
          for (int64_t s = 0; s < depth; ++s) out[s * kStrip + i] = row ? T(widen(row[s * stride])) : T(0);
        }
    });
  }
};

// Its transpose: `outer` runs over columns, the reduction over rows.
struct GatheredColumns {
  GatheredRows m;

  template <class T, int kStrip>
  void pack(T* out, int64_t outer, int64_t outers, int64_t k, int64_t depth) const {
    with_type(m.dtype, [&](auto* null) {
      using S = std::remove_cv_t<std::remove_pointer_t<decltype(null)>>;
      const S* from = static_cast<const S*>(m.data) + outer * m.stride;
      for (int64_t o = 0; o < outers; o += kStrip, from += kStrip * m.stride)
        for (int64_t s = 0; s < depth; ++s, out += kStrip)
          step<T, kStrip>(from + m.offsets[k + s], outers - o, out);
    });
  }

 private:
  template <class T, int kStrip, class S>
  void step(const S* from, int64_t left, T* out) const {
    if (left >= kStrip && m.stride == 1) {
      int i = 0;
      if constexpr (std::is_same_v<Wide<S>, T>)
        for (; i + kLanes<T> <= kStrip; i += kLanes<T>) store(out + i, load_wide(from + i));
      for (; i < kStrip; ++i) out[i] = T(widen(from[i]));
    } else {
      for (int i = 0; i < kStrip; ++i) out[i] = i < left ? T(widen(from[i * m.stride])) : T(0);
    }
  }
};

// One side of a product, packed once for all of its tiles: [block of the reduction][strip][step][lane].
template <class P, int kStrip>
class Prepacked {
 public:
  template <class Source>
  Prepacked(const Source& source, int64_t outers, int64_t depth, const uk::Pool& pool)
      : lanes_(round_up(outers, kStrip)), memory_(lanes_ * steps(depth)) {
    pack(source, outers, depth, pool);
  }
  // Room alone, for sources of so many lanes and no greater depth.
  Prepacked(int64_t outers, int64_t depth) : lanes_(round_up(outers, kStrip)), memory_(lanes_ * steps(depth)) {}

  template <class Source>
  void pack(const Source& source, int64_t outers, int64_t depth, const uk::Pool& pool) const {
    constexpr int64_t kShare = 16 * kStrip, kBlock = Block<P>::kDepth * kSteps;
    pool.each((outers + kShare - 1) / kShare, [&](int64_t share, int) {
      const int64_t outer = share * kShare, height = outers - outer < kShare ? outers - outer : kShare;
      for (int64_t k = 0; k < depth; k += kBlock) {
        const int64_t size = depth - k < kBlock ? depth - k : kBlock;
        source.template pack<P, kStrip>(at(outer, k, size), outer, height, k, size);
      }
    });
  }

  // Strips from a multiple of kStrip on; k begins a block of the reduction that is `depth` long.
  template <class>
  const P* strips(int64_t outer, int64_t k, int64_t depth) const {
    return at(outer, k, depth);
  }

 private:
  static constexpr int64_t kSteps = PanelTraits<P>::kSteps;
  static int64_t steps(int64_t depth) { return (depth + kSteps - 1) / kSteps; }
  P* at(int64_t outer, int64_t k, int64_t depth) const {
    return memory_.get() + lanes_ * steps(k) + outer * steps(depth);
  }
  int64_t lanes_;
  uk::Scratch<P> memory_;
};

}  // namespace UK_ISA
