// The kernels of each family, once per ISA variant, and the choice among them.
#pragma once
#include "tile/dense.h"
#include "tile/influence.h"
#include "tile/per_sample.h"
#include "tile/surgery.h"
#include "tile/token_loss.h"

namespace uk {

struct Kernels {
  const char* isa;
  DenseKernels dense;
  PerSampleKernels per_sample;
  SurgeryKernels surgery;
  InfluenceKernels influence;
  TokenLossKernels token_loss;
};

extern const Kernels kBaseline, kAvx2, kAvx512;

// Whether this processor and operating system can run the variant.
bool can_run(const Kernels& kernels);

// The variant named "baseline", "avx2" or "avx512"; null when unknown or compiled out.
const Kernels* find_kernels(const char* isa);

// The widest variant that can run, or the one that UNLEARN_KERNELS_ISA names. Read once.
const Kernels& kernels();

}  // namespace uk
