#ifdef FUSEDCLIP_CUDA

#include "python/cuda_gradients.h"

#include <cstdint>
#include <string>
#include <string_view>

namespace fusedclip {
namespace py = pybind11;

uintptr_t CudaGradients::Stream() const {
  return reinterpret_cast<uintptr_t>(TorchTensors::Get().CurrentStream(device()));
}

py::tuple CudaGradients::Prepare(bool infinity, py::handle segments, int64_t num_segments,
                                 bool tensor_norms) {
  if (tensor_norms && !segments.is_none()) {
    throw py::value_error("tensor_norms: not together with segments");
  }
  SetSegments(segments, num_segments);
  request_ = Request(infinity, num_segments);
  plan_ = cuda::MakePlan(request_, device(), tensor_norms);
  return py::make_tuple(plan_.scratch_bytes, plan_.table_bytes);
}

py::tuple CudaGradients::Layout() const {
  const int64_t resident_bytes = int64_t{16} * plan_.resident_vectors * (plan_.threads / 32);
  return py::make_tuple(plan_.threads, plan_.num_blocks, plan_.chunk_bytes, resident_bytes,
                        plan_.cooperative ? 1 : 2);
}

py::bytes CudaGradients::Table() const {
  std::string table(plan_.table_bytes, '\0');
  cuda::FillTable(plan_, request_, table.data());
  return table;
}

void CudaGradients::WriteTable(const py::bytes& table, py::handle to) const {
  const std::string_view bytes = table;
  if (static_cast<int64_t>(bytes.size()) != plan_.table_bytes) {
    throw py::value_error("table: expected " + std::to_string(plan_.table_bytes) + " bytes, got " +
                          std::to_string(bytes.size()));
  }
  void* memory = Pointer("to", to, kDLUInt, 8, plan_.table_bytes);
  void* stream = TorchTensors::Get().CurrentStream(device());
  cuda::WriteTable(plan_, bytes.data(), device(), stream, memory);
}

// The tensors come from fusedclip/backends/cuda.py, so an error here is a mistake there.
void* CudaGradients::Pointer(const char* name, py::handle tensor, DLDataTypeCode code, int bits,
                             int64_t numel) const {
  if (tensor.is_none()) return nullptr;
  DLTensor view;
  const bool right = TorchTensors::Get().Read(tensor.ptr(), &view) &&
                     view.device.device_type == kGpuDeviceType &&
                     view.device.device_id == device() && view.dtype.code == code &&
                     view.dtype.bits == bits && NumElements(view) >= numel && IsDense(view);
  if (!right) {
    throw py::value_error(std::string(name) + ": expected " + std::to_string(numel) + " " +
                          std::to_string(bits) + "-bit values on the gradients' device, got " +
                          std::string(py::repr(tensor.attr("dtype"))) + " of shape " +
                          std::string(py::str(tensor.attr("shape"))) + " on " +
                          std::string(py::str(tensor.attr("device"))));
  }
  return DataOf(view);
}

cuda::Place CudaGradients::PlaceOf(py::handle scratch, py::handle table) const {
  return {device(), TorchTensors::Get().CurrentStream(device()),
          Pointer("scratch", scratch, kDLUInt, 8, plan_.scratch_bytes),
          Pointer("table", table, kDLUInt, 8, plan_.table_bytes)};
}

void CudaGradients::Launch(py::handle scratch, py::handle table, double max_norm,
                           py::handle max_norms, int nonfinite, py::handle inv_scale, bool scale,
                           py::handle totals, py::handle norms, py::handle tensor_norms,
                           py::handle found_inf) const {
  const int norm_bits = plan_.any_float64 ? 64 : 32;
  const int64_t segments = plan_.num_segments;
  ClipRequest request = request_;
  request.max_norm = max_norm;
  request.max_norms = static_cast<double*>(Pointer("max_norms", max_norms, kDLFloat, 64, segments));
  request.policy = PolicyOf(nonfinite);
  request.inv_scale = static_cast<float*>(Pointer("inv_scale", inv_scale, kDLFloat, 32, 1));
  cuda::DeviceOutcome outcome;
  outcome.totals = static_cast<double*>(Pointer("totals", totals, kDLFloat, 64, segments));
  outcome.norms = Pointer("norms", norms, kDLFloat, norm_bits, segments);
  outcome.entry_norms = Pointer("tensor_norms", tensor_norms, kDLFloat, norm_bits, size());
  outcome.found_inf = static_cast<float*>(Pointer("found_inf", found_inf, kDLFloat, 32, 1));
  const cuda::Place place = PlaceOf(scratch, table);
  const py::gil_scoped_release release;
  cuda::Clip(plan_, request, place, outcome, scale);
}

void CudaGradients::Scale(py::handle table, py::handle coefficients, bool zero_fill) const {
  const auto* factors =
      static_cast<double*>(Pointer("coefficients", coefficients, kDLFloat, 64, plan_.num_segments));
  const cuda::Place place = PlaceOf(py::none(), table);
  const py::gil_scoped_release release;
  cuda::Scale(plan_, request_, place, factors, zero_fill);
}

void BindCuda(py::module_& module) {
  py::class_<CudaGradients, GradientList>(module, "CudaGradients")
      .def_property_readonly("stream", &CudaGradients::Stream)
      .def("prepare", &CudaGradients::Prepare, py::arg("infinity"), py::arg("segments"),
           py::arg("num_segments"), py::arg("tensor_norms"),
           "Plan the next calls; returns (bytes of scratch, bytes of table).")
      .def("layout", &CudaGradients::Layout,
           "Of the last plan, as FUSEDCLIP_CUDA_LAYOUT has it: (threads, blocks, bytes of a chunk, "
           "bytes that a block keeps in shared memory, launches).")
      .def("table", &CudaGradients::Table, "The table as bytes, the same for the same gradients.")
      .def("write_table", &CudaGradients::WriteTable, py::arg("table"), py::arg("to"),
           "Write the table to a uint8 tensor on the device, asynchronously.")
      .def("launch", &CudaGradients::Launch, py::arg("scratch"), py::arg("table"),
           py::arg("max_norm"), py::arg("max_norms"), py::arg("nonfinite"), py::arg("inv_scale"),
           py::arg("scale"), py::arg("totals"), py::arg("norms"), py::arg("tensor_norms"),
           py::arg("found_inf"), "Measure and, with `scale`, decide and scale.")
      .def("scale_", &CudaGradients::Scale, py::arg("table"), py::arg("coefficients"),
           py::arg("zero_fill"), "Multiply by each segment's coefficient: one launch.");
}

}  // namespace fusedclip

#endif  // FUSEDCLIP_CUDA
