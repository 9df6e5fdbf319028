#include "cuda/influence_topk.cuh"

#include "cuda/entries.h"

UK_CUDA_ENTRY(topk)
