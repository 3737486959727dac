#include "python/tensors.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fusedclip {
namespace py = pybind11;

namespace {

PyTypeObject* ImportType(const char* module, const char* name) {
  py::object type = py::module_::import(module).attr(name);
  return reinterpret_cast<PyTypeObject*>(type.release().ptr());
}

const DLPackExchangeAPI* FindExchange(PyTypeObject* tensor_type) {
  const py::object capsule = py::reinterpret_steal<py::object>(PyObject_GetAttrString(
      reinterpret_cast<PyObject*>(tensor_type), "__dlpack_c_exchange_api__"));
  const DLPackExchangeAPI* exchange = nullptr;
  if (capsule) {
    exchange = static_cast<const DLPackExchangeAPI*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  }
  PyErr_Clear();  // torch < 2.10 has no such attribute
  if (exchange != nullptr && (exchange->header.version.major != DLPACK_MAJOR_VERSION ||
                              exchange->dltensor_from_py_object_no_sync == nullptr ||
                              exchange->managed_tensor_to_py_object_no_sync == nullptr)) {
    exchange = nullptr;
  }
  return exchange;
}

static_assert(DLPackCode(DType::kFloat32) == kDLFloat);
static_assert(DLPackCode(DType::kBFloat16) == kDLBfloat);

bool ToDType(DLDataType type, DType* dtype) {
  if (type.lanes != 1) return false;
  for (int i = 0; i < kNumDTypes; ++i) {
    *dtype = static_cast<DType>(i);
    if (type.code == DLPackCode(*dtype) && type.bits == 8 * ItemSize(*dtype)) return true;
  }
  return false;
}

bool IsContiguous(const DLTensor& view) {
  if (view.strides == nullptr) return true;
  int64_t expected = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (view.shape[i] != 1 && view.strides[i] != expected) return false;
    expected *= view.shape[i];
  }
  return true;
}

// What a method of Tensor without arguments answers, which is yes or no.
bool Says(PyObject* method, PyObject* tensor) {
  PyObject* answer = PyObject_CallOneArg(method, tensor);
  if (answer == nullptr) throw py::error_already_set();
  Py_DECREF(answer);
  return answer == Py_True;
}

}  // namespace

const TorchTensors& TorchTensors::Get() {
  static const TorchTensors* torch = nullptr;  // guarded by the GIL; the types live for ever
  if (torch == nullptr) {
    TorchTensors found;
    found.tensor_type_ = ImportType("torch", "Tensor");
    found.parameter_type_ = ImportType("torch.nn", "Parameter");
    found.exchange_ = FindExchange(found.tensor_type_);
    const auto tensor =
        py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(found.tensor_type_));
    found.grad_descriptor_ = py::object(tensor.attr("grad")).release().ptr();
    found.is_neg_ = py::object(tensor.attr("is_neg")).release().ptr();
    found.is_inference_ = py::object(tensor.attr("is_inference")).release().ptr();
    torch = new TorchTensors(found);
  }
  return *torch;
}

bool TorchTensors::Read(PyObject* object, DLTensor* view) const {
  if (!IsPlain(object) || exchange_ == nullptr) return false;
  if (exchange_->dltensor_from_py_object_no_sync(object, view) == 0) {
    // The imaginary part of a conjugate is a view that negates, which a DLTensor does not say. Its
    // stride tells it from dense memory, except where there is but one element.
    return NumElements(*view) != 1 || !Says(is_neg_, object);
  }
  PyErr_Clear();  // sparse, functorch's wrappers: gradients.py says what is wrong
  return false;
}

bool TorchTensors::IsInference(PyObject* object) const { return Says(is_inference_, object); }

PyObject* TorchTensors::Grad(PyObject* object) const {
  static PyObject* const kName = PyUnicode_InternFromString("grad");
  if (!IsPlain(object)) return PyObject_GetAttr(object, kName);
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return Py_TYPE(grad_descriptor_)->tp_descr_get(grad_descriptor_, object, type);
}

PyObject* TorchTensors::TakeOver(DLManagedTensorVersioned* managed) const {
  void* tensor = nullptr;
  if (exchange_->managed_tensor_to_py_object_no_sync(managed, &tensor) != 0) return nullptr;
  return static_cast<PyObject*>(tensor);
}

void* TorchTensors::CurrentStream(int device) const {
  void* stream = nullptr;
  if (kGpuDeviceType == kDLCPU) return stream;
  if (exchange_ == nullptr || exchange_->current_work_stream == nullptr ||
      exchange_->current_work_stream(kGpuDeviceType, device, &stream) != 0) {
    PyErr_Clear();
    throw std::runtime_error("torch does not tell its current stream on cuda:" +
                             std::to_string(device));
  }
  return stream;
}

int64_t NumElements(const DLTensor& view) {
  int64_t numel = 1;
  for (int i = 0; i < view.ndim; ++i) numel *= view.shape[i];
  return numel;
}

void* DataOf(const DLTensor& view) { return static_cast<char*>(view.data) + view.byte_offset; }

bool IsDense(const DLTensor& view) {
  if (NumElements(view) == 0 || IsContiguous(view)) return true;
  constexpr int kMaxDims = 64;  // torch's limit
  if (view.ndim > kMaxDims) return false;
  int order[kMaxDims];
  int num_dims = 0;
  for (int i = 0; i < view.ndim; ++i) {
    if (view.shape[i] != 1) order[num_dims++] = i;
  }
  std::sort(order, order + num_dims,
            [&](int a, int b) { return view.strides[a] < view.strides[b]; });
  int64_t expected = 1;
  for (int k = 0; k < num_dims; ++k) {
    if (view.strides[order[k]] != expected) return false;
    expected *= view.shape[order[k]];
  }
  return true;
}

bool ToSpan(const DLTensor& view, GradSpan* span) {
  if (!ToDType(view.dtype, &span->dtype)) return false;
  span->data = DataOf(view);
  span->numel = NumElements(view);
  if (view.device.device_type == kGpuDeviceType && !IsAligned(*span)) return false;
  // No memory behind elements: torch._efficientzerotensor.
  if (span->numel > 0 && view.data == nullptr) return false;
  return IsDense(view);
}

}  // namespace fusedclip
