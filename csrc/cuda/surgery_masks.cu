#include "cuda/surgery_masks.cuh"

#include "cuda/entries.h"

UK_CUDA_ENTRY(mask_digit)
UK_CUDA_ENTRY(mask_ties)
UK_CUDA_ENTRY(mask_take)
