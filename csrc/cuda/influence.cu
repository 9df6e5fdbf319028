#include "cuda/influence.cuh"

#include "cuda/entries.h"

UK_CUDA_ENTRY(sign_sums)
