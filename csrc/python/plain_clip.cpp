// The common clip in one call: dense gradients of plain tensors, all on one device, each listed
// once. Anything else is left to the caller, before anything is touched.

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "aliasing.h"
#include "clip.h"
#include "python/ambient.h"
#include "python/cuda_gradients.h"
#include "python/scalars.h"
#include "python/tensors.h"
#include "semantics.h"

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

// Asks for the memory behind a tensor some tensors ahead: on cold caches a gradient is found
// through a chain of misses, and those of several tensors can overlap. What the words of the Python
// object point to is a guess at torch's layout; a wrong one costs nothing, for a prefetch never
// faults.
void PrefetchTensor(const TorchTensors& torch, PyObject* tensor) {
  if (!torch.IsPlain(tensor)) return;        // it may be shorter
  constexpr int kFirstWord = 2, kWords = 2;  // behind the head of every object
  void* const* words = reinterpret_cast<void* const*>(tensor);
  for (int i = kFirstWord; i < kFirstWord + kWords; ++i) {
    const char* target = static_cast<const char*>(words[i]);
    for (int line = 0; line < 4; ++line) __builtin_prefetch(target + 64 * line);
  }
}

PlainGradients GatherPlain(py::handle tensors, bool from_parameters) {
  PlainGradients found;
  if (!PyList_Check(tensors.ptr()) && !PyTuple_Check(tensors.ptr())) return found;
  const TorchTensors& torch = TorchTensors::Get();
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(tensors.ptr());
  PyObject** const items = PySequence_Fast_ITEMS(tensors.ptr());
  constexpr Py_ssize_t kAhead = 8;
  found.spans.reserve(count);
  found.owners.reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (i + 2 * kAhead < count) __builtin_prefetch(items[i + 2 * kAhead]);
    if (i + kAhead < count) PrefetchTensor(torch, items[i + kAhead]);
    if (!torch.IsPlain(items[i])) return found;
    py::object grad = GradientOf(torch, items[i], from_parameters);
    if (!grad.is_none()) found.owners.push_back(std::move(grad));
  }
  const Py_ssize_t num_grads = found.owners.size();
  for (Py_ssize_t i = 0; i < num_grads; ++i) {
    if (i + kAhead < num_grads) PrefetchTensor(torch, found.owners[i + kAhead].ptr());
    PyObject* const grad = found.owners[i].ptr();
    DLTensor view;
    GradSpan span{nullptr, 0, DType::kFloat32, 0};
    if (!torch.Read(grad, &view) || !ToSpan(view, &span)) return found;
    if (i == 0) {
      if (torch.IsInference(grad)) return found;  // as all of them: of one step's gradients
      found.device = view.device;
    }
    if (view.device.device_type != found.device.device_type ||
        view.device.device_id != found.device.device_id) {
      return found;
    }
    if (view.device.device_type == kDLCPU) __builtin_prefetch(span.data);
    found.spans.push_back(span);
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
            py::object problem, py::object cuda_devices, py::object memory,
            py::object triton_devices, py::object clip_by_triton)
      : max_norm_(max_norm),
        norm_kind_(infinity ? NormKind::kInf : NormKind::kL2),
        policy_(PolicyOf(nonfinite)),
        from_parameters_(from_parameters),
        take_cpu_(take_cpu),
        problem_(std::move(problem)),
        cuda_devices_(std::move(cuda_devices)),
        memory_(std::move(memory)),
        triton_devices_(std::move(triton_devices)),
        clip_by_triton_(std::move(clip_by_triton)) {}

  // The norm, 0-dim on the gradients' device, or (norm, the gradients that were or may have been
  // written), or None: nothing was done, or the norm is not finite and that is an error.
  py::object Clip(py::handle tensors) const {
    if (!Ambient::Get().PlainAllowed() || !BackendCan()) return py::none();
    const PlainGradients grads = GatherPlain(tensors, from_parameters_);
    if (!grads.complete) return py::none();
    const DLDevice device = grads.device;
    if (device.device_type == kGpuDeviceType &&
        IsServed(device, cuda_devices_().cast<uint64_t>())) {
      return ClipByCuda(grads);
    }
    if (device.device_type == kDLCPU && take_cpu_) return ClipOnCpu(grads);
    if (device.device_type < 64 &&
        (triton_devices_().cast<uint64_t>() >> device.device_type & 1) != 0) {
      return ClipByTriton(grads);
    }
    return py::none();
  }

 private:
  // Of a backend that was asked for by name: whether it still runs. Of "auto": whether the
  // environment names another, which is for Python to resolve.
  bool BackendCan() const {
    if (problem_.is_none()) return std::getenv("FUSEDCLIP_BACKEND") == nullptr;
    return py::len(problem_()) == 0;
  }

  py::object ClipOnCpu(const PlainGradients& grads) const {
    double norm = 0.0;
    ClipRequest request;
    request.spans = grads.spans.data();
    request.num_spans = static_cast<int64_t>(grads.spans.size());
    request.norm_kind = norm_kind_;
    request.max_norm = max_norm_;
    request.policy = policy_;
    ClipOutcome outcome{&norm, false, false};
    if (cpu::PaysThreads(request)) {
      request.num_threads = Ambient::Get().NumThreads();
      const py::gil_scoped_release release;
      cpu::Clip(request, &outcome);
    } else {
      cpu::Clip(request, &outcome);  // shorter than the wait for the GIL, were it given away
    }
    if (outcome.nonfinite && policy_ == Nonfinite::kError) return py::none();
    py::object result = Scalar(norm, AnyFloat64(grads.spans));
    if (!outcome.written) return result;
    return py::make_tuple(result, Listed(grads.owners));
  }

  // memory(device, stream, bytes of scratch, any float64) → (scratch, norm), tensors on the device.
  py::object ClipByCuda([[maybe_unused]] const PlainGradients& grads) const {
#ifdef FUSEDCLIP_CUDA
    CudaGradients list(grads.device.device_id);
    Fill(grads, &list);
    const bool infinity = norm_kind_ == NormKind::kInf;
    const py::tuple bytes = list.Prepare(infinity, py::none(), 1, false);
    if (bytes[1].cast<int64_t>() > 0) return py::none();  // a list that needs a table
    const py::tuple room =
        memory_(grads.device.device_id, list.Stream(), bytes[0], AnyFloat64(grads.spans));
    list.Launch(room[0], py::none(), max_norm_, py::none(), static_cast<int>(policy_), py::none(),
                true, py::none(), room[1], py::none(), py::none());
    const py::object norm = room[1];
    if (Refuses(norm)) return py::none();
    if (std::isinf(max_norm_) && policy_ != Nonfinite::kZero) return norm;  // nothing is written
    return py::make_tuple(norm, Listed(grads.owners));  // the host does not know whether any was
#else
    return py::none();
#endif
  }

  // Versions are its own to count.
  py::object ClipByTriton(const PlainGradients& grads) const {
    for (const GradSpan& span : grads.spans) {
      if (!IsAligned(span)) return py::none();
    }
    auto list = std::make_unique<TritonGradients>(grads.device.device_id);
    Fill(grads, list.get());
    py::object norm = clip_by_triton_(std::move(list));
    return Refuses(norm) ? py::none() : norm;
  }

  static void Fill(const PlainGradients& grads, GradientList* list) {
    list->Reserve(static_cast<int64_t>(grads.spans.size()));
    for (size_t i = 0; i < grads.spans.size(); ++i) {
      list->Add(grads.spans[i], grads.owners[i], static_cast<int64_t>(i));
    }
  }

  // Waits for the device where an error may have to be raised.
  bool Refuses(const py::object& norm) const {
    return policy_ == Nonfinite::kError && !norm.attr("isfinite")().cast<bool>();
  }

  double max_norm_;
  NormKind norm_kind_;
  Nonfinite policy_;
  bool from_parameters_;
  bool take_cpu_;
  py::object problem_;
  py::object cuda_devices_;    // () → the GPUs that are served, a bit each
  py::object memory_;          // see ClipByCuda
  py::object triton_devices_;  // () → DLPack's device types that are served, a bit each
  py::object clip_by_triton_;  // (TritonGradients) → norm
};

// The function that Python calls, without pybind11's dispatcher: on cold caches it takes as long as
// a list of ten gradients.
extern "C" PyObject* CallPlainClip(PyObject* self, PyObject* tensors) {
  try {
    const auto* clip = static_cast<const PlainClip*>(PyCapsule_GetPointer(self, nullptr));
    return clip->Clip(tensors).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::invalid_argument& error) {  // as pybind11 translates it
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef kMethod = {"plain_clip", CallPlainClip, METH_O,
                       "Gather and clip a list of tensors: the norm or (norm, written); None, and "
                       "nothing written, where another way has to be taken."};

py::object MakePlainClip(double max_norm, bool infinity, int nonfinite, bool from_parameters,
                         bool take_cpu, py::object problem, py::object cuda_devices,
                         py::object memory, py::object triton_devices, py::object clip_by_triton) {
  const py::capsule self(
      new PlainClip(max_norm, infinity, nonfinite, from_parameters, take_cpu, std::move(problem),
                    std::move(cuda_devices), std::move(memory), std::move(triton_devices),
                    std::move(clip_by_triton)),
      [](void* clip) { delete static_cast<PlainClip*>(clip); });
  return py::reinterpret_steal<py::object>(PyCFunction_New(&kMethod, self.ptr()));
}

}  // namespace

void BindPlainClip(py::module_& module) {
  module.def("plain_clip", &MakePlainClip, py::arg("max_norm"), py::arg("infinity"),
             py::arg("nonfinite"), py::arg("from_parameters"), py::arg("take_cpu"),
             py::arg("problem"), py::arg("cuda_devices"), py::arg("memory"),
             py::arg("triton_devices"), py::arg("clip_by_triton"),
             "A function that clips dense gradients of one device by these settings.");
}

}  // namespace fusedclip
