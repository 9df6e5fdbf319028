// Products of curvature: squares of per-sample gradients, covariances, DataInf, Cholesky factors. ISA-free declarations.
#pragma once
#include "tile/per_sample/tokens.h"
#include "tile/types.h"

namespace uk {

// out (p, d; contiguous, float, or double for f64) = sum_n (sum_t g_nt a_nt^T)^2, elementwise.
struct SquaredGradients {
  Tokens a, g;
  void* out;
};

// out (d) = sum_b x_b^2, elementwise, x (batch, d).
struct SquaredRows {
  Operand x;
  int64_t batch, dim;
  void* out;
};

// out (d, d; contiguous) = x^T x, x (rows, d). Both triangles are written.
struct Covariance {
  Operand x;
  int64_t rows, dim;
  void* out;
};

// One layer of DataInf: g (n, dim) stored gradients and v (queries, dim), rows contiguous, float.
// scores (queries, n; double) = the sum over layers of (v . g_k - sum_i c_i g_i . g_k / n) / damping, c_i = v . g_i / (damping + norms_i).
struct DataInfLayer {
  const float *g, *v;
  int64_t n, queries, dim, g_stride, v_stride;
  const double* norms;
  double damping;
};
struct DataInf {
  const DataInfLayer* layers;
  int64_t count, n, queries;
  double* scores;
};

// factor (n, n; double, rows contiguous, upper: A = factor^T factor) becomes that of A + sum_r x_r x_r^T, or minus with
// `downdate`; x (rows, n) is overwritten. Returns the first pivot that is not positive, or n.
struct CholeskyUpdate {
  double* factor;
  double* x;
  int64_t n, rows, stride;
  bool downdate;
};

struct InfluenceCurvatureKernels {
  void (*squared_gradients)(const SquaredGradients&, const Pool&);
  void (*squared_rows)(const SquaredRows&, const Pool&);
  void (*covariance)(const Covariance&, const Pool&);
  void (*datainf)(const DataInf&, const Pool&);
  int64_t (*cholesky_update)(const CholeskyUpdate&);
};

}  // namespace uk
