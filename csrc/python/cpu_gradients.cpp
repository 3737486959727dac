#include "python/cpu_gradients.h"

#include <pybind11/stl.h>

#include <algorithm>
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

}  // namespace

py::tuple CpuGradients::Clip(double max_norm, bool infinity, int nonfinite, float inv_scale,
                             int threads, py::handle tensor_norms) {
  int64_t num_tensors = 0;
  double* by_position =
      tensor_norms.is_none() ? nullptr : DoublesOf("tensor_norms", tensor_norms, &num_tensors);
  if (by_position != nullptr && num_tensors <= indices_.back()) {
    throw py::value_error("tensor_norms: expected more than " + std::to_string(indices_.back()) +
                          " values, got " + std::to_string(num_tensors));
  }
  SetSegments(py::none(), 1);
  ClipRequest request = Request(infinity, 1);
  request.max_norm = max_norm;
  request.inv_scale = &inv_scale;
  request.policy = PolicyOf(nonfinite);
  request.num_threads = CheckedThreads(threads);
  double norm = 0.0;
  double coefficient = 1.0;
  std::vector<double> span_norms(by_position == nullptr ? 0 : spans_.size());
  ClipOutcome outcome{&norm, &coefficient, false, false,
                      by_position == nullptr ? nullptr : span_norms.data()};
  {
    const py::gil_scoped_release release;
    cpu::Clip(request, &outcome);
  }
  if (by_position != nullptr) {
    std::fill(by_position, by_position + num_tensors, 0.0);
    for (size_t i = 0; i < span_norms.size(); ++i) by_position[indices_[i]] = span_norms[i];
  }
  return py::make_tuple(norm, outcome.written, outcome.nonfinite);
}

py::tuple CpuGradients::ClipSegments(py::handle segments, py::handle max_norms, py::handle norms,
                                     bool infinity, int nonfinite, int threads) {
  int64_t num_segments = 0;
  int64_t num_norms = 0;
  const double* limits = DoublesOf("max_norms", max_norms, &num_segments);
  double* results = DoublesOf("norms", norms, &num_norms);
  if (num_norms != num_segments) {
    throw py::value_error("norms: expected " + std::to_string(num_segments) + " values, got " +
                          std::to_string(num_norms));
  }
  SetSegments(segments, num_segments);
  ClipRequest request = Request(infinity, num_segments);
  request.max_norms = limits;
  request.policy = PolicyOf(nonfinite);
  request.num_threads = CheckedThreads(threads);
  std::vector<double> coefficients(num_segments);
  ClipOutcome outcome{results, coefficients.data(), false, false};
  {
    const py::gil_scoped_release release;
    cpu::Clip(request, &outcome);
  }
  return py::make_tuple(outcome.written, outcome.nonfinite);
}

void CpuGradients::Measure(py::handle out, py::handle segments, bool infinity, float inv_scale,
                           int threads) {
  int64_t num_segments = 0;
  double* sums = DoublesOf("out", out, &num_segments);
  SetSegments(segments, num_segments);
  ClipRequest request = Request(infinity, num_segments);
  request.inv_scale = &inv_scale;
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
      .def("clip_", &CpuGradients::Clip, py::arg("max_norm"), py::arg("infinity"),
           py::arg("nonfinite"), py::arg("inv_scale"), py::arg("threads"), py::arg("tensor_norms"),
           "Measure, decide and scale; returns (norm, written, nonfinite).")
      .def("clip_segments_", &CpuGradients::ClipSegments, py::arg("segments"), py::arg("max_norms"),
           py::arg("norms"), py::arg("infinity"), py::arg("nonfinite"), py::arg("threads"),
           "The same for each segment by its own norm; returns (written, nonfinite).")
      .def("measure", &CpuGradients::Measure, py::arg("out"), py::arg("segments"),
           py::arg("infinity"), py::arg("inv_scale"), py::arg("threads"),
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
