// The host module: what this CPU can do and how the extension was compiled. It sees no torch header.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <string>

#include "tile/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace py = pybind11;

namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);  // leaves zeros where there is no such leaf
  return r;
}

// The register state that the operating system saves on a context switch (XCR0).
uint64_t saved_state() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// One entry per instruction set that a kernel may use: the processor has it and the system keeps its registers.
std::map<std::string, bool> cpu_features() {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const auto bit = [](uint32_t word, int index) { return (word >> index & 1U) != 0; };
  constexpr uint64_t ymm_state = 0x06, zmm_state = 0xe6;
  const uint64_t saved = bit(one.c, 27) ? saved_state() : 0;
  const bool ymm = (saved & ymm_state) == ymm_state;
  const bool zmm = (saved & zmm_state) == zmm_state;
  return {
      {"avx", ymm && bit(one.c, 28)},          {"f16c", ymm && bit(one.c, 29)},
      {"fma", ymm && bit(one.c, 12)},          {"avx2", ymm && bit(seven.b, 5)},
      {"bmi2", bit(seven.b, 8)},               {"avx512f", zmm && bit(seven.b, 16)},
      {"avx512dq", zmm && bit(seven.b, 17)},   {"avx512bw", zmm && bit(seven.b, 30)},
      {"avx512vl", zmm && bit(seven.b, 31)},   {"avx512_bf16", zmm && bit(seven_one.a, 5)},
  };
}

#else

std::map<std::string, bool> cpu_features() {
  return {};
}

#endif

// Every ISA variant of the tile engine that was compiled, and whether this machine can run it.
std::map<std::string, bool> isa_variants() {
  std::map<std::string, bool> variants;
  for (const char* isa : {"baseline", "avx2", "avx512"})
    if (const uk::Kernels* kernels = uk::find_kernels(isa)) variants[isa] = uk::can_run(*kernels);
  return variants;
}

py::dict build_record() {
  py::dict record;
  record["compiler"] = __VERSION__;
  record["cplusplus"] = static_cast<long>(__cplusplus);
  record["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
  record["isa"] = isa_variants();
  return record;
}

}  // namespace

void add_doors(py::module_& module);

PYBIND11_MODULE(_host, module) {
  module.doc() = "Host-side facts of unlearn_kernels: CPU features and the build.";
  module.def("cpu_features", &cpu_features, "Instruction sets that both the CPU and the system support.");
  module.def("isa_variants", &isa_variants, "The compiled ISA variants, and whether this machine runs each.");
  add_doors(module);
  module.def("build_record", &build_record, "What compiled this module.");
}
