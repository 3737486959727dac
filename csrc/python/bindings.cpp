// The Python module fusedclip._C.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "clip.h"
#include "python/gradients.h"
#include "python/tensors.h"
#include "semantics.h"

namespace fusedclip {
namespace py = pybind11;

namespace {

// FUSEDCLIP_CUDA is the list of architectures, separated by commas.
std::vector<std::string> CudaArchitectures() {
  std::vector<std::string> names;
#ifdef FUSEDCLIP_CUDA
  std::string name;
  for (const char c : std::string(FUSEDCLIP_CUDA) + ",") {
    if (c != ',') {
      name += c;
    } else if (!name.empty()) {
      names.push_back(name);
      name.clear();
    }
  }
#endif
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "fusedclip's native backends.";
  py::class_<GradientList>(module, "GradientList", "The gradients of one call on one device.")
      .def("__len__", &GradientList::size)
      .def_property_readonly("device_index", &GradientList::device)
      .def_property_readonly("indices", &GradientList::indices)
      .def_property_readonly("tensors", &GradientList::tensors)
      .def_property_readonly("has_float64",
                             [](const GradientList& self) { return self.has(DType::kFloat64); })
      .def_property_readonly("has_float16",
                             [](const GradientList& self) { return self.has(DType::kFloat16); })
      .def_property_readonly("has_empty", &GradientList::has_empty);
  BindCpu(module);
#ifdef FUSEDCLIP_CUDA
  BindCuda(module);
#endif
  py::class_<TritonGradients, GradientList>(module, "TritonGradients")
      .def_property_readonly("spans", &TritonGradients::Spans)
      .def_property_readonly("total_bytes", &TritonGradients::total_bytes)
      .def_property_readonly("device", &TritonGradients::torch_device);
  module.def("gather", &Gather, py::arg("tensors"), py::arg("from_parameters"),
             py::arg("deduplicate"), py::arg("take_cpu"), py::arg("cuda_devices"),
             py::arg("triton_devices"), py::arg("dtensor_type"),
             "Deal tensors (or their .grad) to the kernels of each device or to a list of odd "
             "ones: ([CpuGradients, CudaGradients, …], [(index, tensor)], kinds of DTensors or "
             "None).");
  BindPlainClip(module);
  module.def("cpu_isa", &cpu::InstructionSet, "The instruction set of the CPU kernels.");
  module.def("cuda_architectures", &CudaArchitectures,
             "The GPU architectures that this build has kernels for: sm_NN, and compute_NN for "
             "code that the driver compiles.");
  module.attr("NONFINITE") =
      std::vector<std::string>(std::begin(kNonfiniteNames), std::end(kNonfiniteNames));
  module.attr("GPU_DEVICE_TYPE") = kGpuDeviceType == kDLCUDA ? "cuda" : "cpu";
}

}  // namespace fusedclip
