// The CPU backend for Python: a list of gradients and what can be done to it.

#ifndef FUSEDCLIP_PYTHON_CPU_GRADIENTS_H_
#define FUSEDCLIP_PYTHON_CPU_GRADIENTS_H_

#include <vector>

#include "python/gradients.h"

namespace fusedclip {

class CpuGradients : public GradientList {
 public:
  // Tensors are on the CPU or None: segments int32 [size]; max_norms (else the number max_norm is
  // for all) and, written, norms fp64 [num_segments]; tensor_norms, written, fp64 [size]. (The norm
  // of segment 0, whether anything was written, whether some norm is not finite.)
  pybind11::tuple Clip(pybind11::handle segments, double max_norm, pybind11::handle max_norms,
                       bool infinity, int nonfinite, float inv_scale, int threads,
                       pybind11::handle norms, pybind11::handle tensor_norms);

  // Σ|g|² or max|g| by segment, to `out` [num_segments].
  void Measure(pybind11::handle out, pybind11::handle segments, bool infinity, int threads);

  // Whether anything was written.
  bool Scale(pybind11::handle coefficient, pybind11::handle segments, bool zero_fill, int threads);

  // Limits each element to [-limit, limit]; whether any changed.
  bool Clamp(double limit, int threads);

  std::vector<int64_t> NonfiniteIndices();
};

}  // namespace fusedclip

#endif  // FUSEDCLIP_PYTHON_CPU_GRADIENTS_H_
