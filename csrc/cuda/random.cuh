// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), as on the CPU.
#pragma once
#include "cuda/blocks.cuh"

namespace uk::cuda {

struct Words {
  uint32_t word[4];
};

UK_DEVICE Words philox(Words x, uint64_t key) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(x.word[0]) * 0xD2511F53u, p1 = uint64_t(x.word[2]) * 0xCD9E8D57u;
    x = {{uint32_t(p1 >> 32) ^ x.word[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ x.word[3] ^ k1, uint32_t(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return x;
}

}  // namespace uk::cuda
