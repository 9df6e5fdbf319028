// What the tile engine and its callers agree on: no torch, no ISA.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

namespace uk {

enum class Dtype : int { f32, f64, bf16, f16 };

inline int64_t size_of(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }

// A matrix as a panel source sees it: `outer` runs over rows (or columns) of the product, `depth`
// over the reduction. Strides count elements; either may be 1, 0 (expanded) or anything else.
struct Operand {
  const void* data;
  int64_t outer_stride;
  int64_t depth_stride;
  Dtype dtype;

  Operand from(int64_t elements) const {
    return {static_cast<const char*>(data) + elements * size_of(dtype), outer_stride, depth_stride, dtype};
  }
  Operand transposed() const { return {data, depth_stride, outer_stride, dtype}; }
};

// Runs body(context, task, worker) for every task, each exactly once, on at most `workers` threads.
// Results must depend on the task alone, never on the worker: the same bits at every thread count.
struct Pool {
  int workers;
  void (*run)(const Pool& pool, int64_t tasks, void* context, void (*body)(void*, int64_t, int));

  template <class F>
  void each(int64_t tasks, F&& f) const {
    using Body = std::remove_reference_t<F>;
    run(*this, tasks, &f, [](void* context, int64_t task, int worker) {
      (*static_cast<Body*>(context))(task, worker);
    });
  }
};

// Cache-line aligned scratch, taken by the calling thread before workers start.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(allocate(count)) {}
  ~Scratch() { std::free(data_); }
  Scratch(Scratch&& other) : data_(other.data_) { other.data_ = nullptr; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static T* allocate(int64_t count) {
    const size_t bytes = (size_t(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
    void* p = std::aligned_alloc(64, bytes);
    if (p == nullptr) throw std::bad_alloc();
    return static_cast<T*>(p);
  }
  T* data_;
};

}  // namespace uk
