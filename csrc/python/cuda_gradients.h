// The CUDA backend for Python: a list of gradients on one GPU and what can be done to it.
//
// Nothing here waits for the device. Memory on the device comes from Python: results, scratch and,
// for a long list, the table.

#ifndef FUSEDCLIP_PYTHON_CUDA_GRADIENTS_H_
#define FUSEDCLIP_PYTHON_CUDA_GRADIENTS_H_

#include "python/gradients.h"

namespace fusedclip {

class CudaGradients : public GradientList {
 public:
  using GradientList::GradientList;

#ifdef FUSEDCLIP_CUDA
  // The current stream of the device, as a number.
  uintptr_t Stream() const;

  // (bytes of scratch, bytes of table) of the calls below; the segments stay set for them. A table
  // of 0 bytes travels in the kernel's parameters.
  pybind11::tuple Prepare(bool infinity, pybind11::handle segments, int64_t num_segments,
                          bool tensor_norms);

  // Of the last plan, as FUSEDCLIP_CUDA_LAYOUT has it: (threads, blocks, bytes of a chunk, bytes
  // that a block keeps in shared memory, launches).
  pybind11::tuple Layout() const;

  // The table as bytes, the same for the same gradients.
  pybind11::bytes Table() const;

  // Writes them to a uint8 tensor on the device, asynchronously.
  void WriteTable(const pybind11::bytes& table, pybind11::handle to) const;

  // Tensors on the device or None: scratch and table uint8, max_norms fp64
  // [num_segments] (else the number max_norm is for all), inv_scale fp32 []; results totals fp64
  // [num_segments], norms and tensor_norms fp32 (fp64 when has_float64) [num_segments] and [size],
  // found_inf fp32 []. Without `scale` it only measures.
  void Launch(pybind11::handle scratch, pybind11::handle table, double max_norm,
              pybind11::handle max_norms, int nonfinite, pybind11::handle inv_scale, bool scale,
              pybind11::handle totals, pybind11::handle norms, pybind11::handle tensor_norms,
              pybind11::handle found_inf) const;

  // Multiplies by coefficients, fp64 [num_segments] on the device.
  void Scale(pybind11::handle table, pybind11::handle coefficients, bool zero_fill) const;

 private:
  cuda::Place PlaceOf(pybind11::handle scratch, pybind11::handle table) const;
  void* Pointer(const char* name, pybind11::handle tensor, DLDataTypeCode code, int bits,
                int64_t numel) const;

  ClipRequest request_;
  cuda::Plan plan_;
#endif
};

}  // namespace fusedclip

#endif  // FUSEDCLIP_PYTHON_CUDA_GRADIENTS_H_
