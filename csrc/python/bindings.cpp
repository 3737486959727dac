// The Python module fusedclip._C.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "clip.h"
#include "overlap.h"
#include "python/tensors.h"

namespace fusedclip {
namespace py = pybind11;

namespace {

void CheckThreads(int threads) {
  if (threads < 1) {
    throw py::value_error("threads: expected at least 1, got " + std::to_string(threads));
  }
}

// A one-dimensional CPU tensor as an array.
template <typename T>
T* VectorOf(const char* name, py::handle tensor, DLDataTypeCode code, int64_t* size) {
  DLTensor view;
  if (!TorchTensors::Get().Read(tensor.ptr(), &view)) {
    throw py::type_error(std::string(name) + ": expected a torch.Tensor with memory, got " +
                         Py_TYPE(tensor.ptr())->tp_name);
  }
  const bool right = view.ndim == 1 && view.device.device_type == kDLCPU &&
                     view.dtype.code == code && view.dtype.bits == 8 * sizeof(T) && IsDense(view);
  if (!right) {
    throw py::value_error(std::string(name) + ": expected a contiguous CPU tensor of one " +
                          "dimension and " + std::to_string(8 * sizeof(T)) + "-bit " +
                          (code == kDLFloat ? "floats" : "integers") + ", got " +
                          std::string(py::repr(tensor.attr("dtype"))) + " of shape " +
                          std::string(py::str(tensor.attr("shape"))) + " on " +
                          std::string(py::str(tensor.attr("device"))));
  }
  *size = view.shape[0];
  return static_cast<T*>(DataOf(view));
}

// The gradients of one call, kept alive: those that the kernels take as spans, the others as
// objects.
class Gradients {
 public:
  Gradients(py::handle tensors, bool from_parameters, bool deduplicate) {
    Collect(tensors, from_parameters);
    if (deduplicate) Deduplicate();
  }

  int64_t num_gradients() const { return spans_.size() + odd_.size(); }
  int64_t num_native() const { return spans_.size(); }
  const std::vector<std::pair<int64_t, py::object>>& odd() const { return odd_; }
  const std::vector<int64_t>& indices() const { return indices_; }
  const std::vector<py::object>& tensors() const { return tensors_; }

  bool has_float64() const {
    bool found = false;
    for (const GradSpan& span : spans_) found |= span.dtype == DType::kFloat64;
    return found;
  }

  bool has_empty() const {
    bool found = false;
    for (const GradSpan& span : spans_) found |= span.numel == 0;
    return found;
  }

  py::tuple Clip(double max_norm, bool infinity, int nonfinite, float inv_scale, int threads) {
    if (nonfinite < 0 || nonfinite > 2) {
      throw py::value_error("nonfinite: expected 0 (propagate), 1 (zero) or 2 (error), got " +
                            std::to_string(nonfinite));
    }
    SetSegments(py::none(), 1);
    ClipRequest request = Request(infinity, &inv_scale, 1, threads);
    request.max_norm = &max_norm;
    request.policy = static_cast<Nonfinite>(nonfinite);
    double norm = 0.0;
    double coefficient = 1.0;
    ClipOutcome outcome{&norm, &coefficient, false, false};
    {
      const py::gil_scoped_release release;
      cpu::Clip(request, &outcome);
    }
    return py::make_tuple(norm, outcome.written, outcome.nonfinite);
  }

  void Measure(py::handle out, py::handle segments, bool infinity, float inv_scale, int threads) {
    int64_t num_segments = 0;
    double* sums = VectorOf<double>("out", out, kDLFloat, &num_segments);
    SetSegments(segments, num_segments);
    const ClipRequest request = Request(infinity, &inv_scale, num_segments, threads);
    const py::gil_scoped_release release;
    cpu::Measure(request, sums);
  }

  bool Scale(py::handle coefficient, py::handle segments, bool zero_fill, int threads) {
    int64_t num_segments = 0;
    const double* factors = VectorOf<double>("coefficient", coefficient, kDLFloat, &num_segments);
    SetSegments(segments, num_segments);
    const ClipRequest request = Request(false, nullptr, num_segments, threads);
    const py::gil_scoped_release release;
    return cpu::Scale(request, factors, zero_fill);
  }

  std::vector<int64_t> NonfiniteIndices() {
    for (size_t i = 0; i < spans_.size(); ++i) spans_[i].segment = static_cast<int32_t>(i);
    std::vector<double> largest(spans_.size());
    {
      const ClipRequest request = Request(true, nullptr, spans_.size(), 1);
      const py::gil_scoped_release release;
      cpu::Measure(request, largest.data());
    }
    std::vector<int64_t> bad;
    for (size_t i = 0; i < spans_.size(); ++i) {
      if (!std::isfinite(largest[i])) bad.push_back(indices_[i]);
    }
    return bad;
  }

 private:
  void Collect(py::handle tensors, bool from_parameters) {
    const TorchTensors& torch = TorchTensors::Get();
    const Py_ssize_t expected = PySequence_Fast_GET_SIZE(tensors.ptr());
    spans_.reserve(expected);
    tensors_.reserve(expected);
    indices_.reserve(expected);
    // The size is read anew each time: a look-up may run Python code that changes the list.
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(tensors.ptr()); ++i) {
      auto grad = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(tensors.ptr(), i));
      if (from_parameters) {
        grad = py::reinterpret_steal<py::object>(torch.Grad(grad.ptr()));
        if (!grad) throw py::error_already_set();
        if (grad.is_none()) continue;
      }
      DLTensor view;
      GradSpan span{nullptr, 0, DType::kFloat32, 0, true};
      if (torch.Read(grad.ptr(), &view) && ToSpan(view, &span)) {
        spans_.push_back(span);
        tensors_.push_back(std::move(grad));
        indices_.push_back(i);
      } else {
        odd_.emplace_back(i, std::move(grad));
      }
    }
  }

  // Drops what is listed again, so that it counts and scales once.
  void Deduplicate() {
    const SharedMemory shared = FindSharedMemory(spans_);
    if (shared.overlap_bytes > 0) {
      throw py::value_error("grads[" + std::to_string(indices_[shared.overlap[0]]) +
                            "] and grads[" + std::to_string(indices_[shared.overlap[1]]) +
                            "]: expected gradients that do not overlap in memory, got two that "
                            "share " +
                            std::to_string(shared.overlap_bytes) + " bytes; clone one of them");
    }
    if (shared.duplicates.empty()) return;
    auto duplicate = shared.duplicates.begin();
    size_t kept = 0;
    for (size_t i = 0; i < spans_.size(); ++i) {
      if (duplicate != shared.duplicates.end() && *duplicate == static_cast<int64_t>(i)) {
        ++duplicate;
        continue;
      }
      spans_[kept] = spans_[i];
      indices_[kept] = indices_[i];
      if (kept != i) tensors_[kept] = std::move(tensors_[i]);
      ++kept;
    }
    spans_.resize(kept);
    indices_.resize(kept);
    tensors_.resize(kept);
  }

  void SetSegments(py::handle segments, int64_t num_segments) {
    if (segments.is_none()) {
      if (num_segments == 0 && !spans_.empty()) {
        throw py::value_error("segments: expected at least one segment, got none");
      }
      for (GradSpan& span : spans_) span.segment = 0;
      return;
    }
    int64_t size = 0;
    const int32_t* values = VectorOf<int32_t>("segments", segments, kDLInt, &size);
    if (size != num_native()) {
      throw py::value_error("segments: expected one entry for each of the " +
                            std::to_string(num_native()) + " native gradients, got " +
                            std::to_string(size));
    }
    for (int64_t i = 0; i < size; ++i) {
      if (values[i] < 0 || values[i] >= num_segments) {
        throw py::value_error("segments[" + std::to_string(i) + "]: expected a number from 0 to " +
                              std::to_string(num_segments - 1) + ", got " +
                              std::to_string(values[i]));
      }
      spans_[i].segment = values[i];
    }
  }

  ClipRequest Request(bool infinity, const float* inv_scale, int64_t num_segments,
                      int threads) const {
    CheckThreads(threads);
    ClipRequest request;
    request.spans = spans_.data();
    request.num_spans = num_native();
    request.num_segments = static_cast<int32_t>(num_segments);
    request.norm_kind = infinity ? NormKind::kInf : NormKind::kL2;
    request.inv_scale = inv_scale;
    request.num_threads = threads;
    return request;
  }

  std::vector<GradSpan> spans_;
  std::vector<py::object> tensors_;  // the owners of spans_
  std::vector<int64_t> indices_;     // their positions in the input
  std::vector<std::pair<int64_t, py::object>> odd_;
};

Gradients Gather(py::object tensors, bool from_parameters, bool deduplicate) {
  if (!PyList_Check(tensors.ptr()) && !PyTuple_Check(tensors.ptr())) {
    throw py::type_error(std::string("tensors: expected a list or tuple, got ") +
                         Py_TYPE(tensors.ptr())->tp_name);
  }
  return Gradients(tensors, from_parameters, deduplicate);
}

bool HasOpenMp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "fusedclip's native backends.";
  module.def("gather", &Gather, py::arg("tensors"), py::arg("from_parameters"),
             py::arg("deduplicate") = true,
             "Deal tensors (or their .grad) to the native kernels or to `odd`.");
  module.def("cpu_isa", &cpu::InstructionSet, "The instruction set of the CPU kernels.");
  module.def("has_openmp", &HasOpenMp, "Whether the CPU kernels can use more than one thread.");
  module.def(
      "cuda_architectures", [] { return std::vector<std::string>(); },
      "The GPU architectures that this build has kernels for.");

  py::class_<Gradients>(module, "Gradients", "The gradients of one call.")
      .def_property_readonly("num_gradients", &Gradients::num_gradients)
      .def_property_readonly("num_native", &Gradients::num_native)
      .def_property_readonly("odd", &Gradients::odd)
      .def_property_readonly("indices", &Gradients::indices)
      .def_property_readonly("tensors", &Gradients::tensors)
      .def_property_readonly("has_float64", &Gradients::has_float64)
      .def_property_readonly("has_empty", &Gradients::has_empty)
      .def("clip_", &Gradients::Clip, py::arg("max_norm"), py::arg("infinity"),
           py::arg("nonfinite"), py::arg("inv_scale"), py::arg("threads"),
           "Measure, decide and scale; returns (norm, written, nonfinite).")
      .def("measure", &Gradients::Measure, py::arg("out"), py::arg("segments"), py::arg("infinity"),
           py::arg("inv_scale"), py::arg("threads"),
           "Write the sum of squares, or the maximum, of each segment to `out`.")
      .def("scale_", &Gradients::Scale, py::arg("coefficient"), py::arg("segments"),
           py::arg("zero_fill"), py::arg("threads"),
           "Multiply by each segment's coefficient; returns whether anything was written.")
      .def("nonfinite_indices", &Gradients::NonfiniteIndices,
           "Input positions of the native gradients that hold NaN or infinity.");
}

}  // namespace fusedclip
