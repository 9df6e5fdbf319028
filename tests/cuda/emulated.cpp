// The CUDA kernels as C++ functions that go over blocks and threads one by one.
#include <type_traits>

#include "cuda/influence.cuh"
#include "cuda/surgery.cuh"
#include "cuda/surgery_adamw.cuh"
#include "cuda/surgery_masks.cuh"

extern "C" void run_backwards(int64_t yes) { uk::cuda::backwards = yes != 0; }

#define ENTRY(name) \
  extern "C" void name(const int64_t* arguments) { uk::cuda::name(uk::cuda::Arguments(arguments), nullptr); }

ENTRY(gramian)
ENTRY(combine)
ENTRY(adamw)
ENTRY(mask_digit)
ENTRY(mask_ties)
ENTRY(mask_take)
ENTRY(sign_sums)
