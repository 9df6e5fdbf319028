#include "tile/kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

// What <isa>/<stem>.cpp define.
#define UK_EXTERN(_, Type, name) extern const uk::Type##Kernels k##Type;
#define UK_ENTRY(ISA, Type, name) , ISA::k##Type
#define UK_KERNELS_OF(name, ISA) {name UK_STEMS(UK_ENTRY, ISA)}

namespace uk_baseline {
UK_STEMS(UK_EXTERN, )
}
namespace uk_avx2 {
UK_STEMS(UK_EXTERN, )
}
namespace uk_avx512 {
UK_STEMS(UK_EXTERN, )
}

namespace uk {

// From the narrowest to the widest.
static const Kernels kVariants[] = {
    UK_KERNELS_OF("baseline", uk_baseline),
#if UK_X86_VARIANTS
    UK_KERNELS_OF("avx2", uk_avx2),
    UK_KERNELS_OF("avx512", uk_avx512),
#endif
};

bool can_run(const Kernels& k) {
  if (&k == kVariants) return true;
#if UK_X86_VARIANTS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  if (std::strcmp(k.isa, "avx2") == 0) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

const Kernels* find_kernels(const char* isa) {
  for (const Kernels& k : kVariants)
    if (std::strcmp(k.isa, isa) == 0) return &k;
  return nullptr;
}

static const Kernels& widest() {
  const Kernels* found = kVariants;
  for (const Kernels& k : kVariants)
    if (can_run(k)) found = &k;
  return *found;
}

static const Kernels& choose() {
  const char* asked = std::getenv("UNLEARN_KERNELS_ISA");
  if (asked == nullptr || *asked == '\0' || std::strcmp(asked, "auto") == 0)
    return widest();
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
