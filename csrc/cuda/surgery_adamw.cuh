// AdamW on a weighted sum of gradients that is never in memory: two launches.
#pragma once
#include "cuda/elements.cuh"
#include "cuda/random.cuh"

namespace uk::cuda {

constexpr int64_t kFirstGradient = 3;  // lists before: parameter, exp_avg, exp_avg_sq

UK_DEVICE bool all_finite(const double* weights, int64_t count) {
  bool finite = true;
  for (int64_t k = 0; k < count; ++k) finite = finite && weights[k] - weights[k] == 0;
  return finite;
}

// Adds one to every step, float32 or (wide) float64, unless a weight is not finite.
struct CountSteps {
  struct Shared {};
  const int64_t* steps;
  const int32_t* wide;
  int64_t count;
  const double* weights;
  int64_t sets;

  UK_DEVICE void operator()(int64_t block, Shared&) const {
    each_thread([&](int t) {
      const int64_t i = block * kThreads + t;
      if (i >= count || !all_finite(weights, sets)) return;
      if (wide[i])
        *reinterpret_cast<double*>(steps[i]) += 1;
      else
        *reinterpret_cast<float*>(steps[i]) += 1;
    });
  }
};

// Rounded to a bfloat16 above or below, the nearer the likelier; infinity and NaN as they are.
UK_DEVICE void round_at_random(float* x, int64_t at, uint64_t seed, uint32_t place, uint32_t step) {
  const uint64_t call = uint64_t(at) / kGroup;
  const Words random = philox({{uint32_t(call), uint32_t(call >> 32), place, step}}, seed);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t bits = bits_of(x[i]), half = random.word[i / 2] >> i % 2 * 16 & 0xffffu;
    if ((bits & 0x7f800000u) != 0x7f800000u) x[i] = float_of((bits + half) & 0xffff0000u);
  }
}

// T: of the step; S: of the sum of gradients.
template <int kCode, class T, class S>
struct AdamwChunk {
  struct Shared {
    T size, root, kept, beta1, rest1, beta2, rest2, eps;
    double sign;
    uint32_t step;
  };
  Lists lists;
  int64_t sets;
  const double *weights, *groups;  // groups: lr, beta1, beta2, eps, weight decay, sign
  const int32_t* group_of;
  const int64_t* steps;
  const int32_t* wide;
  int64_t seed, stochastic;

  UK_DEVICE void prepare(int64_t position, Shared& s) const {
    const double* group = groups + group_of[position] * int64_t(6);
    const double lr = group[0], beta1 = group[1], beta2 = group[2];
    const double step = wide[position] ? *reinterpret_cast<const double*>(steps[position])
                                       : double(*reinterpret_cast<const float*>(steps[position]));
    s.size = T(lr / (1 - pow(beta1, step)));
    s.root = T(1 / sqrt(1 - pow(beta2, step)));
    s.kept = T(1 - lr * group[4]);
    s.beta1 = T(beta1);
    s.rest1 = T(1 - beta1);
    s.beta2 = T(beta2);
    s.rest2 = T(1 - beta2);
    s.eps = T(group[3]);
    s.sign = group[5];
    s.step = uint32_t(step);
  }

  UK_DEVICE void operator()(int64_t task, Shared& shared) const {
    if (!all_finite(weights, sets)) return;
    const int64_t position = lists.positions[task];
    each_thread([&](int t) {
      if (t == 0) prepare(position, shared);
    });
    each_thread([&](int t) {
      const Shared s = shared;
      const Row p_row(lists, 0, position), m_row(lists, 1, position), v_row(lists, 2, position);
      each_group(lists, task, t, [&](int64_t at, int n) {
        T p[kGroup], m[kGroup], v[kGroup];
        p_row.template load<kCode>(at, n, p);
        m_row.template load<kCode>(at, n, m);
        v_row.template load<kCode>(at, n, v);
        S g[kGroup] = {};
#pragma unroll 2
        for (int64_t k = 0; k < sets; ++k) {
          if (weights[k] == 0) continue;
          const S w = S(s.sign * weights[k]);
          S x[kGroup];
          Row(lists, kFirstGradient + k, position).template load<kCode>(at, n, x);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) g[i] += w * x[i];
        }
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const T gradient = T(g[i]);
          m[i] = s.beta1 * m[i] + s.rest1 * gradient;
          v[i] = s.beta2 * v[i] + s.rest2 * gradient * gradient;
          p[i] = s.kept * p[i] - s.size * m[i] / (sqrt(v[i]) * s.root + s.eps);
        }
        if (stochastic && p_row.code == kBf16) {
          float rounded[kGroup];
#pragma unroll
          for (int i = 0; i < kGroup; ++i) rounded[i] = float(p[i]);
          round_at_random(rounded, at, uint64_t(seed), uint32_t(position), s.step);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) p[i] = T(rounded[i]);
        }
        p_row.template store<kCode>(at, n, p);
        m_row.template store<kCode>(at, n, m);
        v_row.template store<kCode>(at, n, v);
      });
    });
  }
};

// Lists, then sets, code, single, weights (sets,), groups (G, 6), group_of, steps, wide, seed, stochastic.
inline void adamw(Arguments a, Stream stream) {
  const Lists lists(a);
  const int64_t sets = a.number(), code = a.number();
  const bool single = a.number() != 0;
  const double *weights = a.pointer<double>(), *groups = a.pointer<double>();
  const int32_t* group_of = a.pointer<int32_t>();
  const int64_t* steps = a.pointer<int64_t>();
  const int32_t* wide = a.pointer<int32_t>();
  const int64_t seed = a.number(), stochastic = a.number();
  launch(CountSteps{steps, wide, lists.count, weights, sets}, (lists.count + kThreads - 1) / kThreads, stream);
  const auto step = [&](auto chunk) {
    chunk(lists, sets, weights, groups, group_of, steps, wide, seed, stochastic);
  };
  const auto run = [&](auto body) { launch(body, lists.tasks, stream); };
  step([&](auto... x) {
    if (code == kF32)
      run(AdamwChunk<kF32, float, double>{x...});
    else if (code == kBf16)
      run(AdamwChunk<kBf16, float, float>{x...});
    else if (single)
      run(AdamwChunk<kAny, float, double>{x...});
    else
      run(AdamwChunk<kAny, double, double>{x...});
  });
}

}  // namespace uk::cuda
