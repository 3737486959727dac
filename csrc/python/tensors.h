// From Python tensors to GradSpan: through the C function that torch.Tensor offers for DLPack, so
// that neither a torch header nor a Python call per tensor is needed.

#ifndef FUSEDCLIP_PYTHON_TENSORS_H_
#define FUSEDCLIP_PYTHON_TENSORS_H_

#include <Python.h>

#if __has_include(<dlpack/dlpack.h>)
#include <dlpack/dlpack.h>
#else
#include <ATen/dlpack.h>  // torch's own copy of the header
#endif

#include "clip.h"
#ifdef FUSEDCLIP_CUDA
#include "cuda/clip_cuda.h"
#endif

namespace fusedclip {

// Where the CUDA backend's tensors are. Tests run its kernels on the CPU.
#ifdef FUSEDCLIP_EMULATED
inline constexpr DLDeviceType kGpuDeviceType = kDLCPU;
#else
inline constexpr DLDeviceType kGpuDeviceType = kDLCUDA;
#endif

// What torch offers; looked up at first use. Needs the GIL.
class TorchTensors {
 public:
  // Throws pybind11::error_already_set when torch cannot be imported; a torch older than 2.10,
  // which has no exchange function, only makes every tensor unreadable.
  static const TorchTensors& Get();

  // Fills `view` from a torch.Tensor or nn.Parameter (not a subclass). False, with no Python error
  // set, for anything else and for tensors without memory of their own. The view borrows from the
  // tensor.
  bool Read(PyObject* object, DLTensor* view) const;

  // A new reference to `object.grad`, or null with a Python error set. A torch.Tensor or
  // nn.Parameter is asked through the descriptor: the look-up by name is a sixth of the time.
  PyObject* Grad(PyObject* object) const;

  // A new tensor that owns `managed` and calls its deleter; null with a Python error set.
  PyObject* TakeOver(DLManagedTensorVersioned* managed) const;

  // torch's current stream on a GPU. Throws std::runtime_error when torch will not tell.
  void* CurrentStream(int device) const;

  // Whether it is a torch.Tensor or nn.Parameter, and not a subclass.
  bool IsPlain(PyObject* object) const {
    return Py_TYPE(object) == tensor_type_ || Py_TYPE(object) == parameter_type_;
  }

  // Whether autograd keeps no version of it: torch lets it be written in inference mode alone.
  bool IsInference(PyObject* object) const;

 private:
  PyTypeObject* tensor_type_ = nullptr;
  PyTypeObject* parameter_type_ = nullptr;
  const DLPackExchangeAPI* exchange_ = nullptr;
  PyObject* grad_descriptor_ = nullptr;
  PyObject* is_neg_ = nullptr;
  PyObject* is_inference_ = nullptr;
};

// Whether it is a GPU of those that the CUDA backend serves: bit i of `cuda_devices` for cuda:i.
inline bool IsServed(DLDevice device, uint64_t cuda_devices) {
  return device.device_type == kGpuDeviceType && device.device_id < 64 &&
         (cuda_devices >> device.device_id & 1) != 0;
}

// The number of elements.
int64_t NumElements(const DLTensor& view);

// The address of the first element.
void* DataOf(const DLTensor& view);

// Whether the elements lie side by side in memory, in whatever order of dimensions.
bool IsDense(const DLTensor& view);

// Whether the address is a multiple of an element's size, as device code needs it.
inline bool IsAligned(const GradSpan& span) {
  return reinterpret_cast<uintptr_t>(span.data) % ItemSize(span.dtype) == 0;
}

// Fills data, numel and dtype of `span` when kernels can take the tensor: dense, of a type in DType
// and, on a GPU, aligned to it.
bool ToSpan(const DLTensor& view, GradSpan* span);

}  // namespace fusedclip

#endif  // FUSEDCLIP_PYTHON_TENSORS_H_
