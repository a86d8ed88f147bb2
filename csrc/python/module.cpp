// The Python module encdec_fast._C: facts about the build and the processor, and the generation
// engine. It knows no torch; the ops come from libencdec_ops.so.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <thread>

#include "build_config.h"
#include "core/cpu_features.h"
#include "core/probe.h"
#include "python/generation.h"
#include "rnn/rnn_gpu.h"
#include "rnn/rnn_plan.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = ENCDEC_VERSION;
  info["compiler"] = ENCDEC_COMPILER;
  info["flags"] = ENCDEC_COMPILE_FLAGS;
  info["cuda"] = bool(ENCDEC_CUDA_FOUND);
  info["cuda_version"] = ENCDEC_CUDA_VERSION;
  return info;
}

py::dict cpu_info() {
  const encdec::CacheSizes caches = encdec::cache_sizes();
  py::list isas;
  for (const encdec::Isa isa : encdec::kAllIsas) {
    if (encdec::isa_supported(isa)) isas.append(encdec::isa_name(isa));
  }
  py::dict info;
  info["model"] = encdec::cpu_model();
  info["features"] = encdec::cpu_flags_of_interest();
  info["isas"] = isas;
  info["cores"] = std::thread::hardware_concurrency();
  info["l1d_bytes"] = caches.l1d;
  info["l2_bytes"] = caches.l2;
  info["l3_bytes"] = caches.l3;
  return info;
}

encdec::Format format_named(const std::string& name) {
  for (const encdec::Format f : {encdec::Format::kFloat32, encdec::Format::kBfloat16,
                                 encdec::Format::kFloat16, encdec::Format::kInt8}) {
    if (name == encdec::format_name(f)) return f;
  }
  throw py::value_error("format must be float32, bfloat16, float16 or int8, got " + name);
}

double measure_peak(const std::string& format, int threads) {
  const encdec::Format f = format_named(format);
  const py::gil_scoped_release unlocked;
  return encdec::measure_peak(f, threads);
}

double measure_read_bandwidth(int64_t bytes_per_thread, int threads) {
  const py::gil_scoped_release unlocked;
  return encdec::measure_read_bandwidth(bytes_per_thread, threads);
}

double measure_barrier(int threads) {
  const py::gil_scoped_release unlocked;
  return encdec::measure_barrier(threads);
}

std::string rnn_plan(int cell, int64_t steps, int64_t rows, int64_t batch, int64_t input_size,
                     int64_t hidden_size, int64_t output_size, int directions,
                     const std::string& format, int threads) {
  using namespace encdec::rnn;
  const Shape s{static_cast<Cell>(cell),   steps, batch, input_size, hidden_size, output_size,
                output_size != hidden_size};
  return describe(make_plan(s, rows, directions, format_named(format), threads), s, directions);
}

// (the plan as rnn_forward of libencdec_ops_cuda.so takes it, empty if there is none; bytes that a
// launch exchanges; microseconds of a step, predicted; the plan in words, or why there is none; why
// something else should be faster)
std::tuple<std::vector<int64_t>, int64_t, double, std::string, std::string> rnn_gpu_plan(
    int cell, const std::string& format, bool backward, int batch, int hidden_size, int directions,
    int layers, int capability, int processors, int shared_bytes,
    const std::vector<int>& clusters) {
  using namespace encdec::rnn;
  const gpu::Shape shape{static_cast<Cell>(cell),
                         format_named(format),
                         backward,
                         batch,
                         hidden_size,
                         directions,
                         layers};
  gpu::Limits limits{capability, processors, shared_bytes, {}};
  if (clusters.size() > gpu::kMaxCluster) throw py::value_error("there are clusters of 1 to 16");
  std::copy(clusters.begin(), clusters.end(), limits.clusters + 1);
  gpu::Plan p;
  std::string why_not;
  if (!gpu::make_plan(shape, limits, p, why_not)) {
    return {{}, 0, 0, why_not, {}};
  }
  return {{p.cluster, p.tile, p.blocks, p.row_groups, p.k_groups, p.chunk, p.slice, p.launch},
          gpu::exchange_bytes(shape, p),
          p.microseconds,
          gpu::describe(shape, p),
          gpu::slower(shape, p)};
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Facts about the build of encdec_fast and about this processor; the generation engine.";
  m.def(
      "build_info", &build_info,
      "version, compiler, flags (str), cuda (bool) and cuda_version (str, of the toolkit) of this\n"
      "build.");
  m.def("cpu_info", &cpu_info,
        "model (str), features and isas (list of str), cores (int) and cache sizes in bytes "
        "(l1d_bytes, l2_bytes, l3_bytes) of this processor.");
  m.def(
      "chosen_isa", [] { return encdec::isa_name(encdec::chosen_isa()); },
      "The instruction set that the kernels use: the newest that the processor has, or what\n"
      "ENCDEC_FAST_ISA says. Raises RuntimeError when that one is unknown or not supported.");
  m.def("measure_peak", &measure_peak, py::arg("format"), py::arg("threads"),
        "Multiply-adds a second in Gop/s (two per product) in 'float32', 'bfloat16' or 'int8'.");
  m.def("measure_read_bandwidth", &measure_read_bandwidth, py::arg("bytes_per_thread"),
        py::arg("threads"), "GB/s of threads that each read bytes of their own again and again.");
  m.def("measure_barrier", &measure_barrier, py::arg("threads"),
        "Nanoseconds that a meeting of the threads takes.");
  m.def("rnn_plan", &rnn_plan, py::arg("cell"), py::arg("steps"), py::arg("rows"), py::arg("batch"),
        py::arg("input_size"), py::arg("hidden_size"), py::arg("output_size"),
        py::arg("directions"), py::arg("format"), py::arg("threads"),
        "How the cpu backend would cut a recurrent call, in words. `rows` counts real steps.");
  m.def("rnn_gpu_plan", &rnn_gpu_plan, py::arg("cell"), py::arg("format"), py::arg("backward"),
        py::arg("batch"), py::arg("hidden_size"), py::arg("directions"), py::arg("layers"),
        py::arg("capability"), py::arg("processors"), py::arg("shared_bytes"), py::arg("clusters"),
        "How the cuda backend would cut a recurrence: (plan, bytes to exchange, microseconds of\n"
        "a step, words, why something else should be faster). The plan is empty where there is\n"
        "none, and the words then say why. clusters: how many of 1, 2, ... blocks run at once.");
  encdec::generation::bind(m);
}
