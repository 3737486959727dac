// The common clip in one call: dense gradients of plain tensors, all on one device, each listed
// once. Anything else is left to the caller, before anything is touched.

#include <pybind11/pybind11.h>

#include <memory>
#include <utility>
#include <vector>

#include "aliasing.h"
#include "clip.h"
#include "python/cpu_gradients.h"
#include "python/cuda_gradients.h"
#include "python/tensors.h"

namespace fusedclip {
namespace py = pybind11;

namespace {

struct Options {
  double max_norm;
  NormKind norm_kind;
  Nonfinite policy;
  int num_threads;
};

// The gradients of a list, and their owners; `complete` is false where something is not plain.
struct PlainGradients {
  std::vector<GradSpan> spans;
  std::vector<py::object> owners;
  DLDevice device{kDLCPU, 0};
  bool complete = false;
};

PlainGradients GatherPlain(py::handle tensors, bool from_parameters) {
  PlainGradients found;
  if (!PyList_Check(tensors.ptr()) && !PyTuple_Check(tensors.ptr())) return found;
  const TorchTensors& torch = TorchTensors::Get();
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(tensors.ptr());
  found.spans.reserve(count);
  found.owners.reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    const py::handle tensor = PySequence_Fast_GET_ITEM(tensors.ptr(), i);
    if (!torch.IsPlain(tensor.ptr())) return found;
    py::object grad = GradientOf(torch, tensor, from_parameters);
    if (grad.is_none()) continue;
    DLTensor view;
    GradSpan span{nullptr, 0, DType::kFloat32, 0};
    if (!torch.Read(grad.ptr(), &view) || !ToSpan(view, &span)) return found;
    if (found.spans.empty()) {
      if (torch.IsInference(grad.ptr())) return found;  // as all of them: of one step's gradients
      found.device = view.device;
    }
    if (view.device.device_type != found.device.device_type ||
        view.device.device_id != found.device.device_id) {
      return found;
    }
    found.spans.push_back(span);
    found.owners.push_back(std::move(grad));
  }
  const SharedMemory shared = FindSharedMemory(found.spans);
  found.complete = !found.spans.empty() && shared.overlap_bytes == 0 && shared.duplicates.empty();
  return found;
}

py::list Listed(const std::vector<py::object>& owners) {
  py::list list(owners.size());
  for (size_t i = 0; i < owners.size(); ++i) list[i] = owners[i];
  return list;
}

bool AnyFloat64(const std::vector<GradSpan>& spans) {
  bool found = false;
  for (const GradSpan& span : spans) found |= span.dtype == DType::kFloat64;
  return found;
}

py::object ClipOnCpu(const PlainGradients& grads, const Options& options) {
  double norm = 0.0;
  ClipRequest request;
  request.spans = grads.spans.data();
  request.num_spans = static_cast<int64_t>(grads.spans.size());
  request.norm_kind = options.norm_kind;
  request.max_norm = options.max_norm;
  request.policy = options.policy;
  request.num_threads = options.num_threads;
  ClipOutcome outcome{&norm, false, false};
  {
    const py::gil_scoped_release release;
    cpu::Clip(request, &outcome);
  }
  py::object written = py::none();
  if (outcome.written) written = Listed(grads.owners);
  return py::make_tuple(norm, written, AnyFloat64(grads.spans));
}

#ifdef FUSEDCLIP_CUDA
// memory(device, stream, bytes of scratch, any float64) → (scratch, norm), tensors on the device.
py::object ClipOnGpu(PlainGradients grads, const Options& options, const py::object& memory) {
  CudaGradients list(grads.device.device_id);
  for (size_t i = 0; i < grads.spans.size(); ++i) {
    list.Add(grads.spans[i], grads.owners[i], static_cast<int64_t>(i));
  }
  const bool infinity = options.norm_kind == NormKind::kInf;
  const py::tuple bytes = list.Prepare(infinity, py::none(), 1, false);
  if (bytes[1].cast<int64_t>() > 0) return py::none();  // a list that needs a table
  const py::tuple room =
      memory(grads.device.device_id, list.Stream(), bytes[0], AnyFloat64(grads.spans));
  list.Launch(room[0], py::none(), options.max_norm, py::none(), static_cast<int>(options.policy),
              py::none(), true, py::none(), room[1], py::none(), py::none());
  return py::make_tuple(room[1], Listed(grads.owners), AnyFloat64(grads.spans));
}
#endif

// (norm, the gradients that were or may have been written, whether any is fp64), or None: nothing
// was done. The norm is a number for gradients on the CPU, else a tensor.
py::object PlainClip(py::handle tensors, bool from_parameters, bool take_cpu, uint64_t cuda_devices,
                     double max_norm, bool infinity, int nonfinite, int threads,
                     const py::object& memory) {
  const Options options{max_norm, infinity ? NormKind::kInf : NormKind::kL2, PolicyOf(nonfinite),
                        threads};
  PlainGradients grads = GatherPlain(tensors, from_parameters);
  if (!grads.complete) return py::none();
#ifdef FUSEDCLIP_CUDA
  if (IsServed(grads.device, cuda_devices)) return ClipOnGpu(std::move(grads), options, memory);
#endif
  if (!take_cpu || grads.device.device_type != kDLCPU) return py::none();
  return ClipOnCpu(grads, options);
}

}  // namespace

void BindPlainClip(py::module_& module) {
  module.def("plain_clip_", &PlainClip, py::arg("tensors"), py::arg("from_parameters"),
             py::arg("take_cpu"), py::arg("cuda_devices"), py::arg("max_norm"), py::arg("infinity"),
             py::arg("nonfinite"), py::arg("threads"), py::arg("memory"),
             "Gather and clip dense gradients of one device: (norm, written, any float64); None, "
             "and nothing done, for all others.");
}

}  // namespace fusedclip
