#include "python/cpu_gradients.h"

#include <pybind11/stl.h>

#include <cmath>
#include <string>

namespace fusedclip {
namespace py = pybind11;

namespace {

int CheckedThreads(int threads) {
  if (threads < 1) {
    throw py::value_error("threads: expected at least 1, got " + std::to_string(threads));
  }
  return threads;
}

int64_t SizeOf(const char* name, py::handle tensor) {
  int64_t size = 0;
  DoublesOf(name, tensor, &size);
  return size;
}

// Null for None; throws unless it has `size` values.
double* OptionalDoubles(const char* name, py::handle tensor, int64_t size) {
  if (tensor.is_none()) return nullptr;
  int64_t found = 0;
  double* values = DoublesOf(name, tensor, &found);
  if (found != size) {
    throw py::value_error(std::string(name) + ": expected " + std::to_string(size) +
                          " values, got " + std::to_string(found));
  }
  return values;
}

}  // namespace

py::tuple CpuGradients::Clip(py::handle segments, double max_norm, py::handle max_norms,
                             bool infinity, int nonfinite, float inv_scale, int threads,
                             py::handle norms, py::handle tensor_norms) {
  const int64_t num_segments = norms.is_none() ? 1 : SizeOf("norms", norms);
  SetSegments(segments, num_segments);
  ClipRequest request = Request(infinity, num_segments);
  request.max_norm = max_norm;
  request.max_norms = OptionalDoubles("max_norms", max_norms, num_segments);
  request.inv_scale = &inv_scale;
  request.policy = PolicyOf(nonfinite);
  request.num_threads = CheckedThreads(threads);
  double first = 0.0;
  double* given = OptionalDoubles("norms", norms, num_segments);
  ClipOutcome outcome{given == nullptr ? &first : given, false, false,
                      OptionalDoubles("tensor_norms", tensor_norms, size())};
  {
    const py::gil_scoped_release release;
    cpu::Clip(request, &outcome);
  }
  return py::make_tuple(num_segments > 0 ? outcome.norm[0] : 0.0, outcome.written,
                        outcome.nonfinite);
}

void CpuGradients::Measure(py::handle out, py::handle segments, bool infinity, int threads) {
  int64_t num_segments = 0;
  double* sums = DoublesOf("out", out, &num_segments);
  SetSegments(segments, num_segments);
  ClipRequest request = Request(infinity, num_segments);
  request.num_threads = CheckedThreads(threads);
  const py::gil_scoped_release release;
  cpu::Measure(request, sums);
}

bool CpuGradients::Scale(py::handle coefficient, py::handle segments, bool zero_fill, int threads) {
  int64_t num_segments = 0;
  const double* factors = DoublesOf("coefficient", coefficient, &num_segments);
  SetSegments(segments, num_segments);
  ClipRequest request = Request(false, num_segments);
  request.num_threads = CheckedThreads(threads);
  const py::gil_scoped_release release;
  return cpu::Scale(request, factors, zero_fill);
}

bool CpuGradients::Clamp(double limit, int threads) {
  if (!std::isfinite(limit)) {
    throw py::value_error("limit: expected a finite number, got " + std::to_string(limit));
  }
  ClipRequest request = Request(false, 1);
  request.num_threads = CheckedThreads(threads);
  const py::gil_scoped_release release;
  return cpu::Clamp(request, limit);
}

std::vector<int64_t> CpuGradients::NonfiniteIndices() {
  for (size_t i = 0; i < spans_.size(); ++i) spans_[i].segment = static_cast<int32_t>(i);
  std::vector<double> largest(spans_.size());
  {
    const ClipRequest request = Request(true, size());
    const py::gil_scoped_release release;
    cpu::Measure(request, largest.data());
  }
  std::vector<int64_t> bad;
  for (size_t i = 0; i < spans_.size(); ++i) {
    if (!std::isfinite(largest[i])) bad.push_back(indices_[i]);
  }
  return bad;
}

void BindCpu(py::module_& module) {
  py::class_<CpuGradients, GradientList>(module, "CpuGradients")
      .def("clip_", &CpuGradients::Clip, py::arg("segments"), py::arg("max_norm"),
           py::arg("max_norms"), py::arg("infinity"), py::arg("nonfinite"), py::arg("inv_scale"),
           py::arg("threads"), py::arg("norms"), py::arg("tensor_norms"),
           "Measure, decide and scale; returns (first norm, written, nonfinite).")
      .def("measure", &CpuGradients::Measure, py::arg("out"), py::arg("segments"),
           py::arg("infinity"), py::arg("threads"),
           "Write the sum of squares, or the maximum, of each segment to `out`.")
      .def("scale_", &CpuGradients::Scale, py::arg("coefficient"), py::arg("segments"),
           py::arg("zero_fill"), py::arg("threads"),
           "Multiply by each segment's coefficient; returns whether anything was written.")
      .def("clamp_", &CpuGradients::Clamp, py::arg("limit"), py::arg("threads"),
           "Limit each element to [-limit, limit]; returns whether any changed.")
      .def("nonfinite_indices", &CpuGradients::NonfiniteIndices,
           "Input positions of the gradients that hold NaN or infinity.");
}

}  // namespace fusedclip
