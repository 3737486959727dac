// The CPU backend for Python: a list of gradients and what can be done to it.

#ifndef FUSEDCLIP_PYTHON_CPU_GRADIENTS_H_
#define FUSEDCLIP_PYTHON_CPU_GRADIENTS_H_

#include <vector>

#include "python/gradients.h"

namespace fusedclip {

class CpuGradients : public GradientList {
 public:
  // (norm, whether anything was written, whether the norm is not finite). `tensor_norms`, unless
  // None, is fp64 with an entry for each position of the input: the norm of its gradient, else 0.
  pybind11::tuple Clip(double max_norm, bool infinity, int nonfinite, float inv_scale, int threads,
                       pybind11::handle tensor_norms);

  // Each segment by a norm and a threshold of its own: max_norms and, written, norms fp64
  // [num_segments]. (Whether anything was written, whether some norm is not finite.)
  pybind11::tuple ClipSegments(pybind11::handle segments, pybind11::handle max_norms,
                               pybind11::handle norms, bool infinity, int nonfinite, int threads);

  // Σ|g|² or max|g| by segment, to `out` [num_segments].
  void Measure(pybind11::handle out, pybind11::handle segments, bool infinity, float inv_scale,
               int threads);

  // Whether anything was written.
  bool Scale(pybind11::handle coefficient, pybind11::handle segments, bool zero_fill, int threads);

  // Limits each element to [-limit, limit]; whether any changed.
  bool Clamp(double limit, int threads);

  std::vector<int64_t> NonfiniteIndices();
};

}  // namespace fusedclip

#endif  // FUSEDCLIP_PYTHON_CPU_GRADIENTS_H_
