// Walsh-Hadamard transforms, unscaled, in place: z[i] becomes sum_j (-1)^popcount(i & j) z[j].
namespace UK_ISA {

template <class T>
struct Walsh {
  static constexpr int W = kLanes<T>;
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  typedef typename VectorOf<Bits, W>::type Mask;

  // n is a power of two.
  static void transform(T* z, int64_t n) {
    if (n < W) {
      for (int64_t h = 1; h < n; h *= 2)
        for (int64_t i = 0; i < n; ++i)
          if (!(i & h)) butterfly(z[i], z[i + h]);
      return;
    }
    for (int64_t i = 0; i < n; i += W) store(z + i, within<1>(load(z + i)));
    int64_t h = W;
    for (; 8 * h <= n; h *= 8)
      for (int64_t i = 0; i < n; i += 8 * h)
        for (int64_t j = i; j < i + h; j += W) butterflies<8>(z + j, h);
    for (; 4 * h <= n; h *= 4)
      for (int64_t i = 0; i < n; i += 4 * h)
        for (int64_t j = i; j < i + h; j += W) butterflies<4>(z + j, h);
    for (; h < n; h *= 2)
      for (int64_t i = 0; i < n; i += 2 * h)
        for (int64_t j = i; j < i + h; j += W) butterflies<2>(z + j, h);
  }

  // W transforms side by side, one a lane: element i of them is z[i * W ... i * W + W - 1]. Pairs that are far apart
  // come first, so that what is left fits in the nearest cache.
  static void lanes(T* z, int64_t n) {
    if (n > kNear) {
      far_lanes(z, n);
      for (int64_t part = 0; part < 4; ++part) lanes(z + part * (n / 4) * W, n / 4);
      return;
    }
    int64_t h = n;
    for (; h >= 8; h /= 8) level<8>(z, n, h / 8);
    if (h == 4) level<4>(z, n, 1);
    if (h == 2) level<2>(z, n, 1);
  }

  // The first step of `lanes` for n > kNear: the four parts of z are left to be transformed.
  static void far_lanes(T* z, int64_t n) { level<4>(z, n, n / 4); }
  static constexpr int64_t kNear = 256;  // elements of all lanes that take a small part of the nearest cache

 private:
  template <int R>
  static void level(T* z, int64_t n, int64_t h) {
    for (int64_t i = 0; i < n; i += R * h)
      for (int64_t j = i; j < i + h; ++j) butterflies<R>(z + j * W, h * W);
  }

  template <class V>
  static void butterfly(V& a, V& b) {
    const V sum = a + b;
    b = a - b;
    a = sum;
  }

  template <int R>
  static void butterflies(T* z, int64_t h) {
    Vec<T> x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = load(z + r * h);
#pragma GCC unroll 3
    for (int s = 1; s < R; s *= 2)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        if (!(r & s)) butterfly(x[r], x[r + s]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(z + r * h, x[r]);
  }

  // The levels inside a vector: every lane adds its partner, those of the upper half negated.
  struct Level {
    Bits partner[W], sign[W];
    constexpr explicit Level(int h) : partner(), sign() {
      for (int i = 0; i < W; ++i) {
        partner[i] = Bits(i ^ h);
        sign[i] = i & h ? Bits(1) << (8 * sizeof(T) - 1) : Bits(0);
      }
    }
  };
  template <int kHalf>
  static Vec<T> within(Vec<T> v) {
    if constexpr (kHalf < W) {
      static constexpr Level level(kHalf);
      Mask partner, sign;
      std::memcpy(&partner, level.partner, sizeof partner);
      std::memcpy(&sign, level.sign, sizeof sign);
      return within<2 * kHalf>(__builtin_shuffle(v, partner) + (Vec<T>)((Mask)v ^ sign));
    }
    return v;
  }
};

}  // namespace UK_ISA
