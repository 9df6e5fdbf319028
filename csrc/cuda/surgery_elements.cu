#include "cuda/surgery_elements.cuh"

#include "cuda/entries.h"

UK_CUDA_ENTRY(elements)
