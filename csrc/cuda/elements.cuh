// Eight adjacent elements of any type at a time: one or more accesses of 16 bytes where the address allows.
#pragma once
#include "cuda/blocks.cuh"
#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace uk::cuda {

constexpr int kGroup = 8;
// Element types as tables number them; kAny: to be looked up.
enum Code : int { kF32 = 0, kF64 = 1, kBf16 = 2, kF16 = 3, kAny = -1 };

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
struct alignas(16) Quad {
  uint32_t words[4];
};

UK_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
UK_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

UK_DEVICE float widened(float x) { return x; }
UK_DEVICE double widened(double x) { return x; }
UK_DEVICE float widened(Bf16 x) { return float_of(uint32_t(x.bits) << 16); }
UK_DEVICE float widened(F16 x) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  const float size = float_of(rest << 13) * float_of(0x77800000);  // 2^112 moves the exponent
  return float_of(bits_of(size) | sign);
#endif
}

UK_DEVICE void narrow(float x, float& out) { out = x; }
UK_DEVICE void narrow(double x, float& out) { out = float(x); }
UK_DEVICE void narrow(float x, double& out) { out = x; }
UK_DEVICE void narrow(double x, double& out) { out = x; }
template <class T>
UK_DEVICE void narrow(T wide, Bf16& out) {
  const uint32_t bits = bits_of(float(wide));
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out.bits = nan ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <class T>
UK_DEVICE void narrow(T wide, F16& out) {
#ifdef __CUDACC__
  out.bits = __half_as_ushort(__float2half_rn(float(wide)));
#else
  const uint32_t bits = bits_of(float(wide)), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size >= 0x7f800000)
    out.bits = uint16_t(sign | (size > 0x7f800000 ? 0x7fff : 0x7c00));
  else if (size >= 0x477ff000)  // 65520 and more
    out.bits = uint16_t(sign | 0x7c00);
  else if (size < 0x38800000)  // below 2^-14: the sum with 1/2 rounds to multiples of 2^-24
    out.bits = uint16_t(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000));
  else
    out.bits = uint16_t(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
#endif
}

template <class E, class T>
UK_DEVICE void load_as(const E* from, int n, bool aligned, T* x) {
  if (aligned && n == kGroup) {
    constexpr int kQuads = kGroup * sizeof(E) / sizeof(Quad);
    Quad quads[kQuads];
#pragma unroll
    for (int i = 0; i < kQuads; ++i) quads[i] = reinterpret_cast<const Quad*>(from)[i];
    E elements[kGroup];
    memcpy(elements, quads, sizeof quads);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = T(widened(elements[i]));
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = i < n ? T(widened(from[i])) : T(0);
  }
}

template <class E, class T>
UK_DEVICE void store_as(E* to, int n, bool aligned, const T* x) {
  E elements[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) narrow(x[i], elements[i]);
  if (aligned && n == kGroup) {
    constexpr int kQuads = kGroup * sizeof(E) / sizeof(Quad);
    Quad quads[kQuads];
    memcpy(quads, elements, sizeof quads);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) reinterpret_cast<Quad*>(to)[i] = quads[i];
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (i < n) to[i] = elements[i];
  }
}

// Calls f with a pointer of the type that the code stands for; kCode other than kAny is known when it is compiled.
template <int kCode, class F>
UK_DEVICE void with_type(int64_t address, int code, const F& f) {
  if (kCode == kF32 || (kCode == kAny && code == kF32)) f(reinterpret_cast<float*>(address));
  if (kCode == kF64 || (kCode == kAny && code == kF64)) f(reinterpret_cast<double*>(address));
  if (kCode == kBf16 || (kCode == kAny && code == kBf16)) f(reinterpret_cast<Bf16*>(address));
  if (kCode == kF16 || (kCode == kAny && code == kF16)) f(reinterpret_cast<F16*>(address));
}

// Lists of tensors as unlearn_kernels/triton_kernels/surgery/tables.py lays them out.
struct Lists {
  const int64_t* addresses;  // (lists, count)
  const int32_t* codes;
  const int32_t* positions;  // (tasks,)
  const int64_t *starts, *stops;
  const int32_t* segments;
  int64_t count, tasks, aligned;

  explicit Lists(Arguments& from)
      : addresses(from.pointer<int64_t>()), codes(from.pointer<int32_t>()), positions(from.pointer<int32_t>()),
        starts(from.pointer<int64_t>()), stops(from.pointer<int64_t>()), segments(from.pointer<int32_t>()),
        count(from.number()), tasks(from.number()), aligned(from.number()) {}
};

// The tensor of one list that a chunk lies in.
struct Row {
  int64_t address;
  int code;
  bool aligned;

  UK_DEVICE Row(const Lists& lists, int64_t list, int64_t position)
      : address(lists.addresses[list * lists.count + position]),
        code(lists.codes[list * lists.count + position]), aligned(lists.aligned != 0) {}

  template <int kCode, class T>
  UK_DEVICE void load(int64_t at, int n, T* x) const {
    with_type<kCode>(address, code, [&](auto* base) { load_as(base + at, n, aligned, x); });
  }
  template <int kCode, class T>
  UK_DEVICE void store(int64_t at, int n, const T* x) const {
    with_type<kCode>(address, code, [&](auto* base) { store_as(base + at, n, aligned, x); });
  }
};

// Calls f(at, n) for each group of a chunk that thread t has.
template <class F>
UK_DEVICE void each_group(const Lists& lists, int64_t task, int t, const F& f) {
  const int64_t stop = lists.stops[task];
  for (int64_t at = lists.starts[task] + int64_t(t) * kGroup; at < stop; at += kThreads * kGroup)
    f(at, stop - at < kGroup ? int(stop - at) : kGroup);
}

}  // namespace uk::cuda
