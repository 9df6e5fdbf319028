// The CUDA kernels as C++ functions that go over blocks and threads one by one.
#include <type_traits>

#include "cuda/entries.h"
#include "cuda/influence.cuh"
#include "cuda/influence_topk.cuh"
#include "cuda/surgery.cuh"
#include "cuda/surgery_adamw.cuh"
#include "cuda/surgery_conflict.cuh"
#include "cuda/surgery_elements.cuh"
#include "cuda/surgery_masks.cuh"

extern "C" void run_backwards(int64_t yes) { uk::cuda::backwards = yes != 0; }

#define ENTRY(name) \
  extern "C" void name(const int64_t* arguments) { uk::cuda::name(uk::cuda::Arguments(arguments), nullptr); }

UK_CUDA_ENTRIES(ENTRY)
