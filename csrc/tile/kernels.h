// The kernels of each family, once per ISA variant, and the choice among them.
#pragma once
#include "tile/dense.h"
#include "tile/influence.h"
#include "tile/per_sample/linear.h"
#include "tile/per_sample/linear_dots.h"
#include "tile/per_sample/linear_project.h"
#include "tile/per_sample/linear_sums.h"
#include "tile/per_sample/lm_head.h"
#include "tile/surgery.h"
#include "tile/token_loss.h"

// Whether the AVX2 and AVX-512 variants are compiled.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define UK_X86_VARIANTS 1
#else
#define UK_X86_VARIANTS 0
#endif

namespace uk {

struct Kernels {
  const char* isa;
  const DenseKernels& dense;
  const PerSampleLinearKernels& per_sample_linear;
  const LinearDotsKernels& linear_dots;
  const LinearSumsKernels& linear_sums;
  const LinearProjectKernels& linear_project;
  const PerSampleLmHeadKernels& per_sample_lm_head;
  const SurgeryKernels& surgery;
  const InfluenceKernels& influence;
  const TokenLossKernels& token_loss;
};

// Whether this processor and operating system can run the variant.
bool can_run(const Kernels& kernels);

// The variant named "baseline", "avx2" or "avx512"; null when unknown or compiled out.
const Kernels* find_kernels(const char* isa);

// The widest variant that can run, or the one that UNLEARN_KERNELS_ISA names. Read once.
const Kernels& kernels();

}  // namespace uk
