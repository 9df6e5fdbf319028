// Every operator's signature, in one place. Functional except where a name ends in an underscore.
#include <Python.h>

#include "cpu/common.h"

STABLE_TORCH_LIBRARY(unlearn_kernels, m) {
  m.def("isa() -> str");

  // method: 0 direct, 1 gram, 2 rank1, 3 gram that falls back to direct where it cancels
  m.def("linear_sqnorms(Tensor a, Tensor g, bool bias, int method) -> Tensor");
  // method: 0 tokens, 1 direct
  m.def("linear_dots(Tensor a1, Tensor g1, Tensor a2, Tensor g2, bool summed, bool bias, int method) -> Tensor");
  m.def("linear_weighted_sum(Tensor a, Tensor g, Tensor w, bool bias) -> (Tensor, Tensor)");
  m.def("linear_grads(Tensor a, Tensor g, bool bias) -> (Tensor, Tensor)");
  m.def("linear_two_sided(Tensor a, Tensor g, Tensor left, Tensor right, bool bias) -> Tensor");
  m.def("linear_sketch(Tensor a, Tensor g, bool bias, int k, int seed) -> Tensor");

  // Tokens of padding_idx have no gradient; an id outside [0, num_embeddings) that is not padding_idx is an error.
  m.def("embedding_sqnorms(Tensor ids, Tensor g, int num_embeddings, int padding_idx) -> Tensor");
  m.def(
      "embedding_dots(Tensor ids1, Tensor g1, Tensor ids2, Tensor g2, int num_embeddings, int padding_idx, "
      "bool summed) -> Tensor");
  // wide: float32 (float64) sums instead of the type of g
  m.def(
      "embedding_weighted_sum(Tensor ids, Tensor g, Tensor w, int num_embeddings, int padding_idx, bool wide) -> Tensor");

  // kind: 0 layer, 1 rms, 2 group. norm_grads: (B, 1 + bias, scales), the scale's gradient and then the bias's
  m.def("norm_sqnorms(Tensor x, Tensor g, int kind, int groups, float eps, bool bias) -> Tensor");
  m.def("norm_grads(Tensor x, Tensor g, int kind, int groups, float eps, bool bias) -> Tensor");

  // Maps (B, C, D, H, W); window: kernel, stride, padding and dilation, 3 numbers each; method as of linear_sqnorms
  m.def("conv_sqnorms(Tensor a, Tensor g, int[] window, int groups, bool bias, int method) -> Tensor");
  m.def(
      "conv_dots(Tensor a1, Tensor g1, Tensor a2, Tensor g2, int[] window, int groups, bool bias, bool summed) "
      "-> Tensor");
  // With w (B,) the weighted sum of the gradients. Returns those of weight and bias.
  m.def("conv_grads(Tensor a, Tensor g, Tensor? w, int[] window, int groups, bool bias) -> (Tensor, Tensor)");
  // method: 0 direct, 1 gram (tokens), 3 the cheaper. No upstream for ones; no lse to have it computed.
  m.def(
      "lm_head_sqnorms(Tensor h, Tensor labels, Tensor? upstream, Tensor? lse, Tensor weight, Tensor? bias, "
      "int ignore_index, int method) -> Tensor");
  m.def(
      "lm_head_dots(Tensor h1, Tensor labels1, Tensor? upstream1, Tensor? lse1, Tensor h2, Tensor labels2, "
      "Tensor? upstream2, Tensor? lse2, Tensor weight, Tensor? bias, int ignore_index, bool summed, int method) "
      "-> Tensor");
  m.def(
      "lm_head_tied_dots(Tensor ids, Tensor g, Tensor h, Tensor labels, Tensor? upstream, Tensor? lse, Tensor weight, "
      "Tensor? bias, int padding_idx, int ignore_index) -> Tensor");

  // Tensors of set 0 first, then those of set 1, and so on. scope: 0 global, 1 group, 2 tensor, 3 row; the results
  // of all but the first have one more dimension. groups: for scope 1, the group of each tensor of a set.
  m.def("gramian(Tensor[] tensors, int sets, int scope=0, int[] groups=[]) -> Tensor");
  m.def("combine_(Tensor(a!)[] out, Tensor[] tensors, Tensor weights, int scope=0, int[] groups=[]) -> ()");
  // rule: agem, pcgrad, gru, blur, gdr_gma, doco, sago, graddrop. scope: as above, or 4 element. options: gamma, alpha,
  // eps, lam, cosine_clip, max_norm, max_result_norm, leak of forget, leak of retain. flags: 1 compat, 2 upper, 4 the
  // retain gradient is kept where signs agree, 8 skip a non-finite step. Returns Gramians and weights of (forget,
  // retain), or for the scope of elements the share of conflicts of each tensor.
  m.def(
      "project_conflict_(Tensor(a!)[] forget, Tensor[] retain, int rule, int scope, int[] groups, float[] options, "
      "int flags, int seed) -> (Tensor, Tensor, Tensor)");
  // counts: elements of each mask, or (by_tensor) of each tensor mask by mask. bits: 8 elements a byte, lowest first.
  m.def("topk_mask(Tensor[] tensors, int[] counts, bool by_tensor, bool bits) -> Tensor[]");
  m.def("apply_mask_(Tensor(a!)[] tensors, Tensor[] masks) -> ()");
  // gradients: set by set. groups (G, 6): lr, beta1, beta2, eps, weight decay, and the sign of the gradient; group_of:
  // of each parameter. Nothing is written where a weight is not finite. stochastic: rounding of bfloat16 parameters.
  m.def(
      "surgical_adamw_(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
      "Tensor[] gradients, Tensor weights, Tensor groups, int[] group_of, bool stochastic, int seed) -> ()");
  // Inner products of sets in the metric 1 / (sqrt(scale v) + eps); scales (N,) float64
  m.def("weighted_gramian(Tensor[] tensors, int sets, Tensor[] seconds, Tensor scales, float eps) -> Tensor");
  // int8 codes of each tensor and float32 scales of blocks of 256 elements, in the order of the indices
  m.def("compress(Tensor[] tensors) -> (Tensor[], Tensor[])");
  m.def("decompress_(Tensor(a!)[] out, Tensor[] codes, Tensor[] scales) -> ()");
  // project_conflict_ with a compressed retain gradient
  m.def(
      "project_conflict_compressed_(Tensor(a!)[] forget, Tensor[] codes, Tensor[] scales) -> "
      "(Tensor, Tensor)");
  // Where writing to `out` would reach memory held by another tensor: indices into `out` and `tensors`, or -1.
  m.def("find_clash(Tensor[] out, Tensor[] tensors) -> (int, int)");

  // blocks: which 128 coordinates each 128 columns of g are
  m.def("rademacher_project(Tensor g, int k, int seed, Tensor? blocks=None) -> Tensor");
  // The first column of g, or of the result, is coordinate `offset` of the whole gradient.
  m.def("normal_project(Tensor g, int k, int seed, int offset) -> Tensor");
  m.def("dense_adjoint(Tensor y, int dim, int seed, int offset, bool normal) -> Tensor");
  // inner: columns of a matrix gradient whose two sides are hashed apart, or 0
  m.def("sparse_project(Tensor g, int k, int terms, int seed, int offset, int inner) -> Tensor");
  m.def("hadamard_project(Tensor g, Tensor rows, int seed, int offset) -> Tensor");
  m.def("tensor_sketch(Tensor a, Tensor g, bool bias, int k, int seed) -> Tensor");
  m.def("squared_gradients(Tensor a, Tensor g) -> Tensor");
  m.def("squared_rows(Tensor x) -> Tensor");
  m.def("covariance(Tensor x) -> Tensor");
  m.def("datainf_scores(Tensor[] rows, Tensor[] queries, Tensor norms, Tensor damping) -> Tensor");
  // Returns the upper factor, and the number of its pivots that are positive.
  m.def("cholesky_update(Tensor factor, Tensor x, bool downdate) -> (Tensor, int)");
  // ends: 1 the largest, 2 the smallest, 3 both. Values and indices (ends, Q, k).
  m.def("scan_rows(Tensor queries, Tensor rows, int k, int ends) -> (Tensor, Tensor)");
  m.def(
      "scan_codes(Tensor codes, Tensor query_scales, Tensor rows, Tensor scales, int block, int k, bool nibbles, "
      "int ends) -> (Tensor, Tensor)");
  // Rows as a store keeps them: bits 32 or 16 (floats), 8 or 4 (integers, with a scale for every `block` columns), 0
  // none; float64 squared norms. unbiased: rounded at random by the numbers of rows `first`, first + 1, ...
  m.def(
      "encode_rows(Tensor x, int bits, int block, bool unbiased, int seed, int first) -> (Tensor, Tensor, Tensor)");
  m.def("topk(Tensor queries, Tensor rows, int k, bool largest) -> (Tensor, Tensor)");

  // Logits: scale (h weight^T + bias), then softcap tanh(. / softcap) unless softcap is 0. room: for how many logits
  // there is, to be kept for the backward.
  m.def(
      "linear_nll_forward(Tensor h, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, float scale, "
      "float softcap, int room) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_nll_backward(Tensor grad, Tensor h, Tensor weight, Tensor? bias, Tensor labels, Tensor lse, Tensor kept, "
      "int ignore_index, float scale, float softcap, bool need_h, bool need_weight) -> (Tensor, Tensor, Tensor)");
  // Gradients of sum(weights * nll) along with nll: what needs the logits once. need_weight asks for the bias's too.
  // With bounds, one for each of the first dimension, those of (2 / beta) mean_s softplus(-beta (n_s - bounds_s)),
  // n_s = sum_t weights nll.
  m.def(
      "linear_nll_sweep(Tensor weights, Tensor h, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, "
      "float scale, float softcap, bool need_weight, Tensor? bounds=None, float beta=1.0) -> "
      "(Tensor, Tensor, Tensor, Tensor)");

  // kind: 0 statistics of rows, 1 distances to a reference, 2 sums of softplus(beta (z - r)). Returns fields (F, *) and
  // the most likely words. No labels: every row counts. ref: (h, weight, bias) of the reference; offset: without one.
  m.def(
      "linear_rows_forward(Tensor h, Tensor weight, Tensor? bias, Tensor? ref_h, Tensor? ref_weight, Tensor? ref_bias, "
      "Tensor? labels, int ignore_index, float scale, float softcap, int kind, float beta, float offset) "
      "-> (Tensor, Tensor)");
  m.def(
      "linear_rows_backward(Tensor upstream, Tensor fields, Tensor argmax, Tensor h, Tensor weight, Tensor? bias, "
      "Tensor? ref_h, Tensor? ref_weight, Tensor? ref_bias, Tensor? labels, int ignore_index, float scale, "
      "float softcap, int kind, float beta, float offset, bool need_h, bool need_weight) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_rows_sweep(Tensor upstream, Tensor h, Tensor weight, Tensor? bias, Tensor? ref_h, Tensor? ref_weight, "
      "Tensor? ref_bias, Tensor? labels, int ignore_index, float scale, float softcap, int kind, float beta, "
      "float offset, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

// The module itself is empty: importing it runs the registrations above.
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&definition); }
