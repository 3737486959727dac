// What torch is doing around a call. fusedclip/ambient.py asks the same; here no line of Python
// runs in between, of which each costs a microsecond on cold caches.

#ifndef FUSEDCLIP_PYTHON_AMBIENT_H_
#define FUSEDCLIP_PYTHON_AMBIENT_H_

#include <Python.h>

namespace fusedclip {

// torch's functions, looked up at first use. Needs the GIL; throws pybind11::error_already_set.
class Ambient {
 public:
  static const Ambient& Get();

  // As `plain_allowed` there, and false in torch.inference_mode(), where norms are of its own kind.
  bool PlainAllowed() const;

  // torch.get_num_threads().
  int NumThreads() const;

 private:
  PyObject* dispatch_modes_ = nullptr;
  PyObject* function_mode_ = nullptr;
  PyObject* inference_mode_ = nullptr;
  PyObject* tracing_state_ = nullptr;
  PyObject* num_threads_ = nullptr;
  PyObject* forward_ad_ = nullptr;     // the dict of its module
  PyObject* plain_allowed_ = nullptr;  // the function there
};

}  // namespace fusedclip

#endif  // FUSEDCLIP_PYTHON_AMBIENT_H_
