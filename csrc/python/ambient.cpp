#include "python/ambient.h"

#include <pybind11/pybind11.h>

namespace fusedclip {
namespace py = pybind11;

namespace {

PyObject* Import(const char* module, const char* name) {
  return py::object(py::module_::import(module).attr(name)).release().ptr();
}

py::object Ask(PyObject* function) {
  auto answer = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(function));
  if (!answer) throw py::error_already_set();
  return answer;
}

}  // namespace

const Ambient& Ambient::Get() {
  static const Ambient* ambient = nullptr;  // guarded by the GIL; the functions live for ever
  if (ambient == nullptr) {
    Ambient found;
    found.dispatch_modes_ = Import("torch._C", "_len_torch_dispatch_stack");
    found.function_mode_ = Import("torch._C", "_is_torch_function_mode_enabled");
    found.inference_mode_ = Import("torch", "is_inference_mode_enabled");
    found.tracing_state_ = Import("torch._C", "_get_tracing_state");
    found.num_threads_ = Import("torch", "get_num_threads");
    found.forward_ad_ = Import("torch.autograd.forward_ad", "__dict__");
    found.plain_allowed_ = Import("fusedclip.ambient", "plain_allowed");
    ambient = new Ambient(found);
  }
  return *ambient;
}

bool Ambient::PlainAllowed() const {
  static PyObject* const kLevel = PyUnicode_InternFromString("_current_level");
  const py::handle level = PyDict_GetItemWithError(forward_ad_, kLevel);  // -1 outside of all
  if (!level || level.cast<int>() >= 0) return false;
  if (Ask(dispatch_modes_).cast<int>() != 0) return false;
  if (Ask(inference_mode_).ptr() == Py_True) return false;
  if (!Ask(tracing_state_).is_none()) return false;
  if (Ask(function_mode_).ptr() != Py_True) return true;
  return Ask(plain_allowed_).cast<bool>();  // some function modes are harmless
}

int Ambient::NumThreads() const { return Ask(num_threads_).cast<int>(); }

}  // namespace fusedclip
