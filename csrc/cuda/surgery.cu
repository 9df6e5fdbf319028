#include "cuda/surgery.cuh"

#include "cuda/entries.h"

UK_CUDA_ENTRY(gramian)
UK_CUDA_ENTRY(combine)
