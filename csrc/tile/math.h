// Vectorised exponential, about 1 unit in the last place. Below the smallest normal number it is 0.
namespace UK_ISA {

// Horner's rule, highest coefficient first.
template <class T, int N>
inline Vec<T> polynomial(const T (&coefficients)[N], Vec<T> x) {
  Vec<T> p = splat(coefficients[0]);
#pragma GCC unroll 8
  for (int i = 1; i < N; ++i) p = fma<T>(p, x, splat(coefficients[i]));
  return p;
}

template <class T>
struct ExpConstants;

// Coefficients: Cephes expf.
template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr float kLow = -87.33654f, kHigh = 88.9f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr int kMantissa = 23;

  static inline Vec<float> reduced(Vec<float> r) {
    constexpr float kP[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                            4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    return fma<float>(polynomial(kP, r), r * r, r) + 1.0f;
  }
};

// Coefficients: Cephes exp, 1 + 2 r P(r^2) / (Q(r^2) - r P(r^2)).
template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr double kLow = -708.39641853226408, kHigh = 710.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr int kMantissa = 52;

  static inline Vec<double> reduced(Vec<double> r) {
    constexpr double kP[] = {1.26177193074810590878e-4, 3.02994407707441961300e-2, 9.99999999999999999910e-1};
    constexpr double kQ[] = {3.00198505138664455042e-6, 2.52448340349684104192e-3, 2.27265548208155028766e-1,
                             2.00000000000000000005e0};
    const Vec<double> p = polynomial(kP, Vec<double>(r * r)) * r, q = polynomial(kQ, Vec<double>(r * r));
    return 1.0 + 2.0 * (p / (q - p));
  }
};

// exp of every lane; NaN stays NaN, -inf gives 0, what overflows gives inf.
template <class T>
inline Vec<T> exp(Vec<T> x) {
  using C = ExpConstants<T>;
  typedef typename VectorOf<typename C::Bits, kLanes<T>>::type Word;
  const Vec<T> low = splat(C::kLow), high = splat(C::kHigh);
  Vec<T> y = x < low ? low : x;
  y = y > high ? high : y;
  const Vec<T> shifted = fma<T>(y, splat(T(1.44269504088896340736)), splat(C::kRound));
  const Vec<T> n = shifted - C::kRound;
  Vec<T> r = fma<T>(n, splat(-C::kLn2High), y);
  r = fma<T>(n, splat(-C::kLn2Low), r);
  constexpr typename C::Bits kBias = (typename C::Bits(1) << (sizeof(T) * 8 - 2 - C::kMantissa)) - 1;
  const Word scale = ((Word)shifted + kBias) << C::kMantissa;
  const Vec<T> result = C::reduced(r) * (Vec<T>)scale;
  return x < low ? Vec<T>{} : result;
}

// tanh x = x + x^3 P(x^2) / Q(x^2) near 0 (coefficients: Cephes tanhf, tanh).
inline Vec<float> small_tanh(Vec<float> x) {
  constexpr float kP[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                          -3.33332819422e-1f};
  const Vec<float> square = x * x;
  return fma<float>(polynomial(kP, square), square * x, x);
}
inline Vec<double> small_tanh(Vec<double> x) {
  constexpr double kP[] = {-9.64399179425052238628e-1, -9.92877231001918586564e1, -1.61468768441708447952e3};
  constexpr double kQ[] = {1.0, 1.12811678491632931402e2, 2.23548839060100448583e3, 4.84406305325125486048e3};
  const Vec<double> square = x * x;
  return x + x * square * polynomial(kP, square) / polynomial(kQ, square);
}

template <class T>
inline Vec<T> tanh(Vec<T> x) {
  const Vec<T> size = x < 0 ? -x : x, far = T(1) - T(2) / (exp<T>(size + size) + T(1));
  return size < T(0.625) ? small_tanh(x) : x < 0 ? -far : far;
}

// log(1 + e^x) = max(x, 0) + 2 artanh(u / (2 + u)), u = e^-|x|.
template <class T>
inline Vec<T> softplus(Vec<T> x) {
  constexpr int kTerms = sizeof(T) == 8 ? 16 : 8;
  const Vec<T> u = exp<T>(x < 0 ? x : -x), ratio = u / (u + T(2)), square = ratio * ratio;
  Vec<T> series = splat(T(1) / (2 * kTerms - 1));
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k) series = fma<T>(series, square, splat(T(1) / (2 * k + 1)));
  return (x < 0 ? Vec<T>{} : x) + T(2) * ratio * series;
}

template <class T>
inline T max_lane(Vec<T> v) {
  T most = v[0];
  for (int i = 1; i < kLanes<T>; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

}  // namespace UK_ISA
