#include "cuda/surgery_adamw.cuh"

#include "cuda/entries.h"

UK_CUDA_ENTRY(adamw)
