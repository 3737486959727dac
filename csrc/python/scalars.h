// 0-dim CPU tensors for norms.

#ifndef FUSEDCLIP_PYTHON_SCALARS_H_
#define FUSEDCLIP_PYTHON_SCALARS_H_

#include <pybind11/pybind11.h>

namespace fusedclip {

// A new 0-dim CPU tensor, fp64 or fp32, for callers outside of torch.inference_mode(). Needs the
// GIL; throws pybind11::error_already_set when torch cannot make it.
pybind11::object Scalar(double value, bool float64);

}  // namespace fusedclip

#endif  // FUSEDCLIP_PYTHON_SCALARS_H_
