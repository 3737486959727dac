// The common clip in one call: dense gradients of plain tensors, all on one device, each listed
// once. Anything else is left to the caller, before anything is touched.

#include <pybind11/pybind11.h>

#include <cstdlib>
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

// The settings of a clip, taken from Python once, and the clip.
class PlainClip {
 public:
  PlainClip(double max_norm, bool infinity, int nonfinite, bool from_parameters, bool take_cpu,
            bool obey_environment, py::object memory)
      : max_norm_(max_norm),
        norm_kind_(infinity ? NormKind::kInf : NormKind::kL2),
        policy_(PolicyOf(nonfinite)),
        from_parameters_(from_parameters),
        take_cpu_(take_cpu),
        obey_environment_(obey_environment),
        memory_(std::move(memory)) {}

  // The norm, 0-dim on the gradients' device, or (norm, the gradients that were or may have been
  // written), or None: nothing was done.
  py::object Clip(py::handle tensors, uint64_t cuda_devices, int threads) const {
    // Which backend the environment names is for Python to resolve.
    if (obey_environment_ && std::getenv("FUSEDCLIP_BACKEND") != nullptr) return py::none();
    const PlainGradients grads = GatherPlain(tensors, from_parameters_);
    if (!grads.complete) return py::none();
    if (IsServed(grads.device, cuda_devices)) return ClipOnGpu(grads);
    if (!take_cpu_ || grads.device.device_type != kDLCPU) return py::none();
    return ClipOnCpu(grads, threads);
  }

 private:
  py::object ClipOnCpu(const PlainGradients& grads, int threads) const {
    double norm = 0.0;
    ClipRequest request;
    request.spans = grads.spans.data();
    request.num_spans = static_cast<int64_t>(grads.spans.size());
    request.norm_kind = norm_kind_;
    request.max_norm = max_norm_;
    request.policy = policy_;
    request.num_threads = threads;
    ClipOutcome outcome{&norm, false, false};
    {
      const py::gil_scoped_release release;
      cpu::Clip(request, &outcome);
    }
    auto result = py::reinterpret_steal<py::object>(
        TorchTensors::Get().Scalar(norm, AnyFloat64(grads.spans)));
    if (!outcome.written) return result;
    return py::make_tuple(result, Listed(grads.owners));
  }

  // memory(device, stream, bytes of scratch, any float64) → (scratch, norm), tensors on the device.
  py::object ClipOnGpu(const PlainGradients& grads) const {
#ifdef FUSEDCLIP_CUDA
    CudaGradients list(grads.device.device_id);
    list.Reserve(static_cast<int64_t>(grads.spans.size()));
    for (size_t i = 0; i < grads.spans.size(); ++i) {
      list.Add(grads.spans[i], grads.owners[i], static_cast<int64_t>(i));
    }
    const bool infinity = norm_kind_ == NormKind::kInf;
    const py::tuple bytes = list.Prepare(infinity, py::none(), 1, false);
    if (bytes[1].cast<int64_t>() > 0) return py::none();  // a list that needs a table
    const py::tuple room =
        memory_(grads.device.device_id, list.Stream(), bytes[0], AnyFloat64(grads.spans));
    list.Launch(room[0], py::none(), max_norm_, py::none(), static_cast<int>(policy_), py::none(),
                true, py::none(), room[1], py::none(), py::none());
    return py::make_tuple(room[1], Listed(grads.owners));
#else
    return py::none();
#endif
  }

  double max_norm_;
  NormKind norm_kind_;
  Nonfinite policy_;
  bool from_parameters_;
  bool take_cpu_;
  bool obey_environment_;
  py::object memory_;
};

}  // namespace

void BindPlainClip(py::module_& module) {
  py::class_<PlainClip>(module, "PlainClip", "A clip of dense gradients of one device.")
      .def(py::init<double, bool, int, bool, bool, bool, py::object>(), py::arg("max_norm"),
           py::arg("infinity"), py::arg("nonfinite"), py::arg("from_parameters"),
           py::arg("take_cpu"), py::arg("obey_environment"), py::arg("memory"))
      .def("__call__", &PlainClip::Clip, py::arg("tensors"), py::arg("cuda_devices"),
           py::arg("threads"),
           "Gather and clip: the norm or (norm, written); None, and nothing done, for other "
           "gradients, and where FUSEDCLIP_BACKEND is to be obeyed.");
}

}  // namespace fusedclip
