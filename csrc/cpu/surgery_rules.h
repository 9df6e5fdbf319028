// The weights that each rule gives forget and retain, from their three inner products, in double precision.
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define UK_RULE __host__ __device__ inline
#else
#define UK_RULE inline
#endif

namespace uk {

enum class Rule : int { agem, pcgrad, gru, blur, gdr_gma, doco, sago, graddrop };

// Inner products of f and r.
struct Products {
  double ff, fr, rr;

  UK_RULE bool finite() const { return std::isfinite(ff) && std::isfinite(fr) && std::isfinite(rr); }
};

struct PairWeights {
  double f, r;
};

struct RuleOptions {
  Rule rule;
  double gamma, alpha, eps, lam, cosine_clip;
  bool compat, upper;
};

// x / y, or 0 for a zero gradient. NaN passes.
UK_RULE double ratio(double x, double y) { return y == 0 ? 0 : x / y; }

// What clipping to a norm multiplies by, as torch.nn.utils.clip_grad_norm_ does it.
UK_RULE double clip_factor(double square, double max_norm) {
  if (std::isinf(max_norm)) return 1;
  const double c = max_norm / (std::sqrt(square) + 1e-6);
  return c > 1 ? 1 : c;
}

// f - <f, r> / (|r|^2 + eps) r, scaled by gamma, and alpha r.
UK_RULE PairWeights agem(const RuleOptions& o, const Products& p) {
  return {o.gamma, o.alpha - (p.rr == 0 ? 0 : o.gamma * p.fr / (p.rr + o.eps))};
}

// Both projections, each against the other's gradient as it was.
UK_RULE PairWeights pcgrad(const RuleOptions& o, const Products& p) {
  return {o.gamma - o.alpha * ratio(p.fr, p.ff), o.alpha - o.gamma * ratio(p.fr, p.rr)};
}

// As agem, but a cosine below -cosine_clip counts as that.
UK_RULE PairWeights gru(const RuleOptions& o, const Products& p) {
  const double norms = std::sqrt(p.ff) * std::sqrt(p.rr), cosine = ratio(p.fr, norms);
  if (!(cosine < -o.cosine_clip)) return {1, -ratio(p.fr, p.rr)};
  return {1, o.cosine_clip * std::sqrt(p.ff) / std::sqrt(p.rr)};
}

// No test of the sign. The lower level keeps r and takes its part along f from f; the upper one the other way round.
UK_RULE PairWeights blur(const RuleOptions& o, const Products& p) {
  if (o.upper) return {o.alpha, p.rr == 0 ? 0 : o.gamma - o.alpha * p.fr / (p.rr + o.eps)};
  return {p.ff == 0 ? 0 : o.gamma - o.alpha * p.fr / (p.ff + o.eps), o.alpha};
}

// lam f' + (1 - lam) r', both rectified. The published code projects f along the r that it has just rectified.
UK_RULE PairWeights gdr_gma(const RuleOptions& o, const Products& p, bool conflict) {
  const double a = conflict ? ratio(p.fr, p.ff) : 0, b = conflict ? ratio(p.fr, p.rr) : 0;
  return {o.lam * (o.compat ? 1 + a * b : 1) - (1 - o.lam) * a, 1 - o.lam - o.lam * b};
}

// f - lam cos |f| r / |r|. The published code leaves |f| out.
UK_RULE PairWeights doco(const RuleOptions& o, const Products& p) {
  if (!o.compat) return {1, -o.lam * ratio(p.fr, p.rr)};
  const double f = std::sqrt(p.ff) + o.eps, r = std::sqrt(p.rr) + o.eps;
  return {1, -o.lam * (p.fr / (f * r)) / r};
}

// The one place that knows every rule on inner products. A NaN counts as a conflict: it is passed on, not hidden.
UK_RULE PairWeights weights_of(const RuleOptions& o, const Products& p) {
  const bool conflict = !(p.fr >= 0);
  switch (o.rule) {
    case Rule::pcgrad: return conflict ? pcgrad(o, p) : PairWeights{o.gamma, o.alpha};
    case Rule::gru: return conflict ? gru(o, p) : PairWeights{1, 0};
    case Rule::blur: return blur(o, p);
    case Rule::gdr_gma: return gdr_gma(o, p, conflict);
    case Rule::doco: return conflict ? doco(o, p) : PairWeights{1, 0};
    default: return conflict ? agem(o, p) : PairWeights{o.gamma, o.alpha};
  }
}

// The same after both gradients have been clipped by the factors f and r.
UK_RULE PairWeights clipped_weights(const RuleOptions& o, const Products& p, double f, double r) {
  const PairWeights w = weights_of(o, {p.ff * f * f, p.fr * f * r, p.rr * r * r});
  return {w.f * f, w.r * r};
}

// The squared norm of what the weights give; rounding may leave it below 0.
UK_RULE double square_of(const PairWeights& w, const Products& p) {
  return w.f * w.f * p.ff + 2 * w.f * w.r * p.fr + w.r * w.r * p.rr;
}

}  // namespace uk
