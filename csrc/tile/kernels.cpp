#include "tile/kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace uk {

bool can_run(const Kernels& k) {
  if (k.isa == nullptr) return false;
  if (&k == &kBaseline) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  if (&k == &kAvx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

const Kernels* find_kernels(const char* isa) {
  for (const Kernels* k : {&kBaseline, &kAvx2, &kAvx512})
    if (k->isa != nullptr && std::strcmp(k->isa, isa) == 0) return k;
  return nullptr;
}

static const Kernels& choose() {
  const char* asked = std::getenv("UNLEARN_KERNELS_ISA");
  if (asked == nullptr || *asked == '\0' || std::strcmp(asked, "auto") == 0)
    return can_run(kAvx512) ? kAvx512 : can_run(kAvx2) ? kAvx2 : kBaseline;
  const Kernels* found = find_kernels(asked);
  if (found == nullptr || !can_run(*found))
    throw std::runtime_error("UNLEARN_KERNELS_ISA=" + std::string(asked) +
                             (found ? ": this processor cannot run it" : ": no such variant in this build") +
                             "; use auto, baseline, avx2 or avx512");
  return *found;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace uk
