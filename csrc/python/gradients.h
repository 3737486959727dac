// gather, the native part: a Python list of tensors → the gradients that kernels take, by device.

#ifndef FUSEDCLIP_PYTHON_GRADIENTS_H_
#define FUSEDCLIP_PYTHON_GRADIENTS_H_

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "clip.h"
#include "python/tensors.h"

namespace fusedclip {

// The gradients of one call on one device: as spans for the kernels, and their owners.
class GradientList {
 public:
  GradientList() = default;
  explicit GradientList(int device) : device_(device) {}

  void Add(const GradSpan& span, pybind11::object tensor, int64_t index) {
    spans_.push_back(span);
    tensors_.push_back(std::move(tensor));
    indices_.push_back(index);
  }
  void Reserve(int64_t size);

  // Drops what is listed again, so that it counts and scales once; throws pybind11::value_error
  // when gradients overlap in part.
  void Deduplicate();

  int device() const { return device_; }
  int64_t size() const { return spans_.size(); }
  const std::vector<pybind11::object>& tensors() const { return tensors_; }
  const std::vector<int64_t>& indices() const { return indices_; }  // positions in the input
  bool has(DType dtype) const;
  bool has_empty() const;

 protected:
  // The segment of each gradient, or -1 for what is not counted, from a one-dimensional int32
  // tensor; None: all are of segment 0.
  void SetSegments(pybind11::handle segments, int64_t num_segments);
  ClipRequest Request(bool infinity, int64_t num_segments) const;

  std::vector<GradSpan> spans_;
  std::vector<pybind11::object> tensors_;
  std::vector<int64_t> indices_;
  int device_ = 0;  // the number of the GPU; 0 on the CPU
};

// Gradients for kernels that Python launches.
class TritonGradients : public GradientList {
 public:
  using GradientList::GradientList;

  // Where they are: int64 [size, 3], address, number of elements and DType.
  pybind11::bytes Spans() const;
  int64_t total_bytes() const;
  pybind11::object torch_device() const { return tensors_.front().attr("device"); }
};

// A one-dimensional tensor on the CPU as an array; throws when it is anything else.
double* DoublesOf(const char* name, pybind11::handle tensor, int64_t* size);

// Throws unless it is the number of one.
Nonfinite PolicyOf(int nonfinite);

// tensor.grad, or the tensor itself.
pybind11::object GradientOf(const TorchTensors& torch, pybind11::handle tensor,
                            bool from_parameters);

// tensors: a list or tuple. The result is ([CpuGradients, CudaGradients, TritonGradients],
// [(index, odd tensor)], kinds): what no kernel takes is odd. Bit i of `cuda_devices`: take those
// on cuda:i. Bit t of `triton_devices`: of what is left take those on devices of DLPack's type t.
// Of a `dtensor_type` (or None) it is the local tensor that is taken; `kinds` is None where there
// are none, else ([kind of each, -1 for others], [(index, first of each kind)], [indices of
// parameters without gradient]).
pybind11::tuple Gather(pybind11::object tensors, bool from_parameters, bool deduplicate,
                       bool take_cpu, uint64_t cuda_devices, uint64_t triton_devices,
                       pybind11::object dtensor_type);

void BindCpu(pybind11::module_& module);
void BindCuda(pybind11::module_& module);  // where it was built
void BindPlainClip(pybind11::module_& module);

}  // namespace fusedclip

#endif  // FUSEDCLIP_PYTHON_GRADIENTS_H_
