// A door to each ISA variant for tests and benchmarks: no dispatcher, no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "tile/kernels.h"

namespace py = pybind11;

namespace {

const uk::Kernels& variant(const std::string& isa) {
  const uk::Kernels* found = isa.empty() ? &uk::kernels() : uk::find_kernels(isa.c_str());
  if (found == nullptr || !uk::can_run(*found)) throw std::invalid_argument("isa: cannot run '" + isa + "' here");
  return *found;
}

uk::Pool threads(int count) {
  return {count, [](const uk::Pool& self, int64_t tasks, void* context, void (*body)(void*, int64_t, int)) {
            std::atomic<int64_t> next{0};
            auto work = [&](int worker) {
              for (int64_t task = next++; task < tasks; task = next++) body(context, task, worker);
            };
            std::vector<std::thread> others;
            for (int worker = 1; worker < self.workers; ++worker) others.emplace_back(work, worker);
            work(0);
            for (auto& t : others) t.join();
          }};
}

uk::Operand operand(const py::array& m, uk::Dtype dtype) {
  const int64_t size = m.itemsize();
  if (m.strides(0) % size != 0 || m.strides(1) % size != 0) throw std::invalid_argument("matmul: unaligned strides");
  return {m.data(), m.strides(0) / size, m.strides(1) / size, dtype};
}

// numpy has no bfloat16: its bits come as uint16.
uk::Dtype dtype_of(const py::array& m) {
  if (py::isinstance<py::array_t<float>>(m)) return uk::Dtype::f32;
  if (py::isinstance<py::array_t<double>>(m)) return uk::Dtype::f64;
  if (py::isinstance<py::array_t<uint16_t>>(m)) return uk::Dtype::bf16;
  throw std::invalid_argument("matmul: float32, float64 or uint16 (bits of bfloat16) expected");
}

py::array matmul(const py::array& a, const py::array& b, const std::string& isa, int workers) {
  if (a.ndim() != 2 || b.ndim() != 2 || a.shape(1) != b.shape(1))
    throw std::invalid_argument("matmul: a (m, k) and b (n, k) expected");
  const uk::Dtype dtype = dtype_of(a);
  if (dtype_of(b) != dtype) throw std::invalid_argument("matmul: a and b must have one dtype");
  py::array out(dtype == uk::Dtype::f64 ? py::dtype::of<double>() : py::dtype::of<float>(),
                std::vector<py::ssize_t>{a.shape(0), b.shape(0)});
  const uk::Matmul p{operand(a, dtype), operand(b, dtype), a.shape(0), b.shape(0), a.shape(1), out.mutable_data()};
  const uk::Kernels& k = variant(isa);
  py::gil_scoped_release release;
  k.dense.matmul(p, threads(workers < 1 ? 1 : workers));
  return out;
}

// FLOP/s of independent multiply-adds on `workers` threads at once: the ceiling that no kernel passes.
double fma_peak(const std::string& isa, double seconds, int workers) {
  const uk::Kernels& k = variant(isa);
  std::vector<double> rates(workers);
  auto measure = [&](int64_t worker, int) {
    using Clock = std::chrono::steady_clock;
    for (const auto begin = Clock::now(); Clock::now() - begin < std::chrono::duration<double>(seconds);) {
      const auto start = Clock::now();
      const double flops = k.dense.fma_loop(200000);
      const double rate = flops / std::chrono::duration<double>(Clock::now() - start).count();
      if (rate > rates[worker]) rates[worker] = rate;
    }
  };
  py::gil_scoped_release release;
  threads(workers).each(workers, measure);
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

}  // namespace

void add_doors(py::module_& m) {
  m.def("matmul", &matmul, py::arg("a"), py::arg("b"), py::arg("isa") = "", py::arg("threads") = 1,
        "a b^T of matrices a (m, k) and b (n, k) in float32, float64 or bfloat16 bits (uint16), on one ISA variant.");
  m.def("fma_peak", &fma_peak, py::arg("isa") = "", py::arg("seconds") = 0.2, py::arg("threads") = 1,
        "FLOP/s of a loop of independent fused multiply-adds on that many threads at once.");
  m.def("can_run", [](const std::string& isa) {
    const uk::Kernels* found = uk::find_kernels(isa.c_str());
    return found != nullptr && uk::can_run(*found);
  }, py::arg("isa"), "Whether this build has the ISA variant and this processor runs it.");
}
