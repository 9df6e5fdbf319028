// Kernels as blocks of threads that go from barrier to barrier. nvcc makes CUDA kernels of them; a C++ compiler makes
// loops over threads, which is how their numbers are tested where no GPU is.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define UK_DEVICE __device__ __forceinline__
#else
#define UK_DEVICE inline
#endif

namespace uk::cuda {

constexpr int kThreads = 256;

#ifndef __CUDACC__
// Threads and blocks in the opposite order: results change where they depend on one another.
inline bool backwards = false;
inline int64_t in_order(int64_t i, int64_t count) { return backwards ? count - 1 - i : i; }
#endif

// Runs f(thread) in every thread of the block; all have ended before any goes on.
template <class F>
UK_DEVICE void each_thread(const F& f) {
#ifdef __CUDACC__
  f(int(threadIdx.x));
  __syncthreads();
#else
  for (int t = 0; t < kThreads; ++t) f(int(in_order(t, kThreads)));
#endif
}

// What a thread keeps over barriers, in its registers.
template <class T>
struct PerThread {
#ifdef __CUDACC__
  T mine;
  UK_DEVICE T& operator[](int) { return mine; }
#else
  T all[kThreads];
  T& operator[](int t) { return all[t]; }
#endif
};

// Whole numbers only: their sum does not depend on the order.
template <class T>
UK_DEVICE void count_up(T* at, T by) {
#ifdef __CUDACC__
  atomicAdd(at, by);
#else
  *at += by;
#endif
}

// The same; returns what was there before, which does depend on the order: for places in what is a set.
template <class T>
UK_DEVICE T take_up(T* at, T by) {
#ifdef __CUDACC__
  return atomicAdd(at, by);
#else
  const T before = *at;
  *at += by;
  return before;
#endif
}

// kSums sums over the threads, each by halves: sums[i][0] is the result.
template <int kSums>
UK_DEVICE void sum_up(double (*sums)[kThreads]) {
  for (int half = kThreads / 2; half > 0; half /= 2)
    each_thread([&](int t) {
      if (t >= half) return;
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i][t] += sums[i][t + half];
    });
}

#ifdef __CUDACC__
using Stream = cudaStream_t;

template <class Body>
__global__ void __launch_bounds__(kThreads) run_blocks(const __grid_constant__ Body body) {
  __shared__ typename Body::Shared shared;
  body(int64_t(blockIdx.x), shared);
}

template <class Body>
void launch(const Body& body, int64_t blocks, Stream stream) {
  if (blocks > 0) run_blocks<Body><<<unsigned(blocks), kThreads, 0, stream>>>(body);
}
#else
using Stream = void*;

template <class Body>
void launch(const Body& body, int64_t blocks, Stream) {
  for (int64_t block = 0; block < blocks; ++block) {
    typename Body::Shared shared;
    body(in_order(block, blocks), shared);
  }
}
#endif

// Addresses and numbers as Python passes them.
class Arguments {
 public:
  explicit Arguments(const int64_t* next) : next_(next) {}
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(*next_++);
  }
  int64_t number() { return *next_++; }

 private:
  const int64_t* next_;
};

}  // namespace uk::cuda
