// The kernels of each family, once per ISA variant, and the choice among them.
#pragma once
#include "tile/dense.h"
#include "tile/influence.h"
#include "tile/per_sample/conv.h"
#include "tile/per_sample/embedding.h"
#include "tile/per_sample/linear.h"
#include "tile/per_sample/linear_dots.h"
#include "tile/per_sample/linear_project.h"
#include "tile/per_sample/linear_sums.h"
#include "tile/per_sample/lm_head.h"
#include "tile/per_sample/norm.h"
#include "tile/surgery.h"
#include "tile/surgery_adamw.h"
#include "tile/surgery_compressed.h"
#include "tile/surgery_elements.h"
#include "tile/surgery_masks.h"
#include "tile/surgery_metric.h"
#include "tile/token_loss.h"
#include "tile/token_rows.h"

// Whether the AVX2 and AVX-512 variants are compiled.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define UK_X86_VARIANTS 1
#else
#define UK_X86_VARIANTS 0
#endif

namespace uk {

struct InfluenceSketchKernels;
struct InfluenceCurvatureKernels;
struct InfluenceScanKernels;
struct InfluenceRowsKernels;

// Every stem: the kernels of <stem>.h, and their name here. X(..., type, name).
#define UK_STEMS(X, ...)                                 \
  X(__VA_ARGS__, Dense, dense)                           \
  X(__VA_ARGS__, PerSampleLinear, per_sample_linear)     \
  X(__VA_ARGS__, LinearDots, linear_dots)                \
  X(__VA_ARGS__, LinearSums, linear_sums)                \
  X(__VA_ARGS__, LinearProject, linear_project)          \
  X(__VA_ARGS__, PerSampleEmbedding, per_sample_embedding) \
  X(__VA_ARGS__, PerSampleLmHead, per_sample_lm_head)    \
  X(__VA_ARGS__, PerSampleNorm, per_sample_norm)         \
  X(__VA_ARGS__, PerSampleConv, per_sample_conv)         \
  X(__VA_ARGS__, Surgery, surgery)                       \
  X(__VA_ARGS__, SurgeryAdamw, surgery_adamw)            \
  X(__VA_ARGS__, SurgeryCompressed, surgery_compressed)  \
  X(__VA_ARGS__, SurgeryMasks, surgery_masks)            \
  X(__VA_ARGS__, SurgeryMetric, surgery_metric)          \
  X(__VA_ARGS__, SurgeryElements, surgery_elements)      \
  X(__VA_ARGS__, Influence, influence)                   \
  X(__VA_ARGS__, InfluenceSketch, influence_sketch)      \
  X(__VA_ARGS__, InfluenceCurvature, influence_curvature) \
  X(__VA_ARGS__, InfluenceScan, influence_scan)          \
  X(__VA_ARGS__, InfluenceRows, influence_rows)          \
  X(__VA_ARGS__, TokenLoss, token_loss)                  \
  X(__VA_ARGS__, TokenRows, token_rows)

struct Kernels {
  const char* isa;
#define UK_FIELD(_, Type, name) const Type##Kernels& name;
  UK_STEMS(UK_FIELD, )
#undef UK_FIELD
};

// Whether this processor and operating system can run the variant.
bool can_run(const Kernels& kernels);

// The variant named "baseline", "avx2" or "avx512"; null when unknown or compiled out.
const Kernels* find_kernels(const char* isa);

// The widest variant that can run, or the one that UNLEARN_KERNELS_ISA names. Read once.
const Kernels& kernels();

}  // namespace uk
