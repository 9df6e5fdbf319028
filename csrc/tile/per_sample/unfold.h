// Panel sources for the matrix that a convolution multiplies: a row per position of the output, a column per channel
// and position of the kernel. It is never in memory; panels are packed straight from the maps.
namespace UK_ISA {

template <class T>
inline constexpr uk::Dtype kDtypeOf = sizeof(T) == 8 ? uk::Dtype::f64 : uk::Dtype::f32;

// Elements `stride` apart, widened.
template <class T, class S>
inline void copy_line(const S* from, int64_t stride, int64_t n, T* out) {
  constexpr int W = kLanes<T>;
  if constexpr (std::is_same_v<Wide<S>, T>) {
    if (stride == 1 && n >= W) {
      for (int64_t i = 0; i + W <= n; i += W) store(out + i, load_wide(from + i));
      store(out + n - W, load_wide(from + n - W));
      return;
    }
  }
  for (int64_t i = 0; i < n; ++i) out[i] = T(widen(from[i * stride]));
}

// The unfolded channels of one sample and group; with a kernel of one position, the maps themselves.
struct Unfold {
  const void* data;
  uk::Dtype dtype;
  int64_t channels, channel_stride;
  int64_t sizes[3], strides[3], out[3];
  uk::Window window;
  bool channels_inner;
  void* stage;  // kStage elements of the panels' type

  template <class T>
  static constexpr int64_t kStage =
      int64_t(Block<T>::kCols > Block<T>::kRows ? Block<T>::kCols : Block<T>::kRows) * Block<T>::kDepth;

  template <class P>
  int64_t rows_in_place(int64_t outers, int64_t depth) const {
    return is_matrix() ? Dense{matrix()}.rows_in_place<P>(outers, depth) : 0;
  }
  template <class P>
  RowsInPlace<P> rows(int64_t outer, int64_t k, int64_t depth) const {
    return Dense{matrix()}.rows<P>(outer, k, depth);
  }

  // Columns as the outer dimension, positions as the reduction: what the gradient sums over.
  template <class P, int kStrip>
  [[gnu::noinline]] void pack(P* panel, int64_t outer, int64_t outers, int64_t k, int64_t depth) const {
    if (is_matrix()) return Dense{matrix()}.template pack<P, kStrip>(panel, outer, outers, k, depth);
    with_type(dtype, [&](auto* null) {
      using S = std::remove_cv_t<std::remove_pointer_t<decltype(null)>>;
      for (int64_t o = 0; o < outers; o += kStrip, panel += kStrip * depth) {
        const int64_t lanes = outers - o < kStrip ? outers - o : kStrip;
        if (channels_inner)
          channel_strip<P, kStrip, S>(panel, outer + o, lanes, k, depth);
        else
          strip<P, kStrip, S>(panel, outer + o, lanes, k, depth);
      }
    });
  }

  // n positions from k on of one column, into contiguous memory.
  template <class T>
  void column(int64_t j, int64_t k, int64_t n, T* line) const {
    with_type(dtype, [&](auto* null) {
      stage_column<T, std::remove_cv_t<std::remove_pointer_t<decltype(null)>>>(j, k, n, line);
    });
  }

  // Whether positions are evenly spaced in memory and the kernel reads each once.
  bool is_matrix() const {
    for (int d = 0; d < 3; ++d)
      if (window.kernel[d] != 1 || window.padding[d] != 0 || window.stride[d] != 1) return false;
    int64_t expected = -1;
    for (int d = 2; d >= 0; --d) {
      if (sizes[d] == 1) continue;
      if (expected >= 0 && strides[d] != expected) return false;
      expected = strides[d] * sizes[d];
    }
    return true;
  }
  uk::Operand matrix() const {
    for (int d = 2; d >= 0; --d)
      if (sizes[d] != 1) return {data, channel_stride, strides[d], dtype};
    return {data, channel_stride, 0, dtype};
  }

 private:
  // Where a position of the kernel reads: shifts from the start of the output, and which part of a row is inside.
  struct Column {
    int64_t offset, z, y, x, begin, end;
  };

  Column locate(int64_t channel, int64_t at) const {
    const auto shift = [&](int d, int64_t i) { return i * window.dilation[d] - window.padding[d]; };
    const int64_t wide = window.kernel[2], tall = window.kernel[1], step = window.stride[2];
    Column c{channel * channel_stride, shift(0, at / wide / tall), shift(1, at / wide % tall), shift(2, at % wide), 0, 0};
    c.begin = c.x < 0 ? (-c.x + step - 1) / step : 0;
    c.end = c.x < sizes[2] ? (sizes[2] - c.x + step - 1) / step : 0;
    return c;
  }
  Column locate(int64_t j) const {
    const int64_t kernel = window.size();
    return channels_inner ? locate(j % channels, j / channels) : locate(j / kernel, j % kernel);
  }

  // Calls f(row, x, n, step) for each piece of a row of the output among positions k ... k + n - 1; `row` is the
  // offset of the input's row, negative where that lies outside.
  template <class F>
  void each_piece(const Column& c, int64_t k, int64_t n, F&& f) const {
    int64_t x = k % out[2], y = k / out[2] % out[1], z = k / out[2] / out[1];
    for (int64_t step = 0; step < n;) {
      const int64_t size = out[2] - x < n - step ? out[2] - x : n - step;
      const int64_t iy = y * window.stride[1] + c.y, iz = z * window.stride[0] + c.z;
      const bool inside = uint64_t(iy) < uint64_t(sizes[1]) && uint64_t(iz) < uint64_t(sizes[0]);
      f(inside, iz * strides[0] + iy * strides[1], x, size, step);
      step += size;
      x = 0;
      if (++y == out[1]) y = 0, ++z;
    }
  }

  template <class T, class S>
  void stage_column(int64_t j, int64_t k, int64_t n, T* line) const {
    const Column c = locate(j);
    const S* from = static_cast<const S*>(data) + c.offset + c.x * strides[2];
    const int64_t step = window.stride[2] * strides[2];
    each_piece(c, k, n, [&](bool inside, int64_t row, int64_t x, int64_t size, int64_t at) {
      int64_t begin = c.begin - x, end = inside ? c.end - x : 0;
      begin = begin < 0 ? 0 : begin < size ? begin : size;
      end = end < begin ? begin : end < size ? end : size;
      for (int64_t i = 0; i < begin; ++i) line[at + i] = T(0);
      copy_line<T>(from + row + (x + begin) * step, step, end - begin, line + at + begin);
      for (int64_t i = end; i < size; ++i) line[at + i] = T(0);
    });
  }

  template <class P, int kStrip, class S>
  void strip(P* panel, int64_t outer, int64_t lanes, int64_t k, int64_t depth) const {
    P* lines = static_cast<P*>(stage);
    for (int64_t l = 0; l < lanes; ++l) stage_column<P, S>(outer + l, k, depth, lines + l * depth);
    for (int64_t i = lanes * depth; i < kStrip * depth; ++i) lines[i] = P(0);
    Dense{{lines, depth, 1, kDtypeOf<P>}}.template pack<P, kStrip>(panel, 0, kStrip, 0, depth);
  }

  // Channels lie side by side, and so do the lanes that differ only in the channel.
  template <class P, int kStrip, class S>
  void channel_strip(P* panel, int64_t outer, int64_t lanes, int64_t k, int64_t depth) const {
    for (int64_t l = 0; l < lanes;) {
      const int64_t channel = (outer + l) % channels, rest = channels - channel;
      const int64_t n = rest < lanes - l ? rest : lanes - l;
      const Column c = locate(channel, (outer + l) / channels);
      if (n == kStrip)
        channel_lanes<P, kStrip, S>(panel, c, kStrip, k, depth);
      else
        channel_lanes<P, kStrip, S>(panel + l, c, n, k, depth);
      l += n;
    }
    for (int64_t l = lanes; l < kStrip; ++l)
      for (int64_t i = 0; i < depth; ++i) panel[i * kStrip + l] = P(0);
  }

  template <class P, int kStrip, class S>
  [[gnu::always_inline]] void channel_lanes(P* panel, const Column& c, int64_t n, int64_t k, int64_t depth) const {
    const S* from = static_cast<const S*>(data) + c.offset + c.x * strides[2];
    const int64_t step = window.stride[2] * strides[2];
    each_piece(c, k, depth, [&](bool inside, int64_t row, int64_t x, int64_t size, int64_t at) {
      for (int64_t i = x; i < x + size; ++i) {
        P* to = panel + (at + i - x) * kStrip;
        if (inside && i >= c.begin && i < c.end)
          copy_line<P>(from + row + i * step, channel_stride, n, to);
        else
          for (int64_t l = 0; l < n; ++l) to[l] = P(0);
      }
    });
  }
};

// The same matrix with positions as the outer dimension and columns as the reduction: what a Gram matrix sums over.
struct Patches {
  const Unfold& unfold;

  template <class P, int kStrip>
  [[gnu::noinline]] void pack(P* panel, int64_t outer, int64_t outers, int64_t k, int64_t depth) const {
    if (unfold.is_matrix())
      return Dense{unfold.matrix().transposed()}.template pack<P, kStrip>(panel, outer, outers, k, depth);
    P* line = static_cast<P*>(unfold.stage);
    const int64_t whole = round_up(outers, kStrip);
    for (int64_t i = outers; i < whole; ++i) line[i] = P(0);
    for (int64_t step = 0; step < depth; ++step) {
      unfold.column(k + step, outer, outers, line);
      for (int64_t o = 0; o < whole; o += kStrip)
        std::memcpy(panel + o * depth + step * kStrip, line + o, kStrip * sizeof(P));
    }
  }
};

// A source whose every element is multiplied by a number.
template <class Source>
struct Scaled {
  const Source& source;
  double scale;

  template <class P>
  int64_t rows_in_place(int64_t outers, int64_t depth) const {
    return scale == 1 ? source.template rows_in_place<P>(outers, depth) : 0;
  }
  template <class P>
  auto rows(int64_t outer, int64_t k, int64_t depth) const {
    return source.template rows<P>(outer, k, depth);
  }

  template <class P, int kStrip>
  [[gnu::noinline]] void pack(P* panel, int64_t outer, int64_t outers, int64_t k, int64_t depth) const {
    source.template pack<P, kStrip>(panel, outer, outers, k, depth);
    if (scale == 1) return;
    const P factor = P(scale);
    for (int64_t i = 0; i < round_up(outers, kStrip) * depth; ++i) panel[i] *= factor;
  }
};

}  // namespace UK_ISA
