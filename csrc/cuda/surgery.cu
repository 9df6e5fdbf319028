#include "cuda/surgery_conflict.cuh"

#include "cuda/entries.h"

UK_CUDA_ENTRY(gramian)
UK_CUDA_ENTRY(combine)
UK_CUDA_ENTRY(conflict_weights)
