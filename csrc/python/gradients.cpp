#include "python/gradients.h"

#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "aliasing.h"
#include "python/cpu_gradients.h"
#include "python/cuda_gradients.h"
#include "python/tensors.h"
#include "semantics.h"

namespace fusedclip {
namespace py = pybind11;

namespace {

// A one-dimensional CPU tensor as an array.
template <typename T>
T* VectorOf(const char* name, py::handle tensor, DLDataTypeCode code, int64_t* size) {
  DLTensor view;
  if (!TorchTensors::Get().Read(tensor.ptr(), &view)) {
    throw py::type_error(std::string(name) + ": expected a torch.Tensor with memory, got " +
                         Py_TYPE(tensor.ptr())->tp_name);
  }
  const bool right = view.ndim == 1 && view.device.device_type == kDLCPU &&
                     view.dtype.code == code && view.dtype.bits == 8 * sizeof(T) && IsDense(view);
  if (!right) {
    throw py::value_error(std::string(name) + ": expected a contiguous CPU tensor of one " +
                          "dimension and " + std::to_string(8 * sizeof(T)) + "-bit " +
                          (code == kDLFloat ? "floats" : "integers") + ", got " +
                          std::string(py::repr(tensor.attr("dtype"))) + " of shape " +
                          std::string(py::str(tensor.attr("shape"))) + " on " +
                          std::string(py::str(tensor.attr("device"))));
  }
  *size = view.shape[0];
  return static_cast<T*>(DataOf(view));
}

// object.name; the name is made once, which is most of the cost of a look-up by a C string.
template <typename Name>
py::object Attribute(py::handle object, Name name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name());
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

#define FUSEDCLIP_NAME(text)                                        \
  [] {                                                              \
    static PyObject* const name = PyUnicode_InternFromString(text); \
    return name;                                                    \
  }

// The kinds of DTensors in a list: which mesh and which placements. What they mean Python says.
class DTensorKinds {
 public:
  DTensorKinds(py::handle type, int64_t size) : type_(type), size_(size) {}

  bool Covers(py::handle tensor) const {
    return !type_.is_none() &&
           PyType_IsSubtype(Py_TYPE(tensor.ptr()), reinterpret_cast<PyTypeObject*>(type_.ptr()));
  }

  void Add(py::handle tensor, int64_t index) {
    if (kind_of_.empty()) kind_of_.resize(size_, kPlain);
    const py::object spec = Attribute(tensor, FUSEDCLIP_NAME("_spec"));
    const py::object mesh = Attribute(spec, FUSEDCLIP_NAME("mesh"));
    const py::object placements = Attribute(spec, FUSEDCLIP_NAME("placements"));
    size_t kind = 0;
    while (kind < kinds_.size() &&
           !(kinds_[kind].first.is(mesh) && kinds_[kind].second.equal(placements))) {
      ++kind;
    }
    if (kind == kinds_.size()) {
      kinds_.emplace_back(mesh, placements);
      examples_.append(py::make_tuple(index, tensor));
    }
    kind_of_.at(index) = static_cast<int64_t>(kind);
  }

  void AddMissing(int64_t index) { missing_.append(index); }

  py::object Result() const {
    if (kinds_.empty()) return py::none();
    return py::make_tuple(py::cast(kind_of_), examples_, missing_);
  }

 private:
  static constexpr int64_t kPlain = -1;
  py::handle type_;
  int64_t size_;
  std::vector<std::pair<py::object, py::object>> kinds_;  // (mesh, placements)
  std::vector<int64_t> kind_of_;                          // by position
  py::list examples_;                                     // [(index, the first of each kind)]
  py::list missing_;                                      // positions without gradient
};

}  // namespace

void GradientList::Reserve(int64_t size) {
  spans_.reserve(size);
  tensors_.reserve(size);
  indices_.reserve(size);
}

bool GradientList::has(DType dtype) const {
  bool found = false;
  for (const GradSpan& span : spans_) found |= span.dtype == dtype;
  return found;
}

bool GradientList::has_empty() const {
  bool found = false;
  for (const GradSpan& span : spans_) found |= span.numel == 0;
  return found;
}

void GradientList::Deduplicate() {
  const fusedclip::SharedMemory shared = FindSharedMemory(spans_);
  if (shared.overlap_bytes > 0) {
    throw py::value_error("grads[" + std::to_string(indices_[shared.overlap[0]]) + "] and grads[" +
                          std::to_string(indices_[shared.overlap[1]]) +
                          "]: expected gradients that do not overlap in memory, got two that "
                          "share " +
                          std::to_string(shared.overlap_bytes) + " bytes; clone one of them");
  }
  if (shared.duplicates.empty()) return;
  auto duplicate = shared.duplicates.begin();
  size_t kept = 0;
  for (size_t i = 0; i < spans_.size(); ++i) {
    if (duplicate != shared.duplicates.end() && *duplicate == static_cast<int64_t>(i)) {
      ++duplicate;
      continue;
    }
    spans_[kept] = spans_[i];
    indices_[kept] = indices_[i];
    if (kept != i) tensors_[kept] = std::move(tensors_[i]);
    ++kept;
  }
  spans_.resize(kept);
  indices_.resize(kept);
  tensors_.resize(kept);
}

void GradientList::SetSegments(py::handle segments, int64_t num_segments) {
  if (segments.is_none()) {
    if (num_segments == 0 && !spans_.empty()) {
      throw py::value_error("segments: expected at least one segment, got none");
    }
    for (GradSpan& span : spans_) span.segment = 0;
    return;
  }
  int64_t count = 0;
  const int32_t* values = VectorOf<int32_t>("segments", segments, kDLInt, &count);
  if (count != size()) {
    throw py::value_error("segments: expected one entry for each of the " + std::to_string(size()) +
                          " native gradients, got " + std::to_string(count));
  }
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < kNotCounted || values[i] >= num_segments) {
      throw py::value_error("segments[" + std::to_string(i) + "]: expected a number from -1 to " +
                            std::to_string(num_segments - 1) + ", got " +
                            std::to_string(values[i]));
    }
    spans_[i].segment = values[i];
  }
}

py::bytes TritonGradients::Spans() const {
  std::vector<int64_t> words;
  words.reserve(3 * spans_.size());
  for (const GradSpan& span : spans_) {
    words.push_back(reinterpret_cast<intptr_t>(span.data));
    words.push_back(span.numel);
    words.push_back(static_cast<int64_t>(span.dtype));
  }
  const std::string_view fresh(reinterpret_cast<const char*>(words.data()),
                               words.size() * sizeof(int64_t));
  // Gradients mostly lie where they lay at the step before. The same object keeps its hash, by
  // which the table is found, and which takes longer than to compare them.
  static PyObject* last = nullptr;  // guarded by the GIL
  if (last == nullptr || std::string_view(py::handle(last).cast<std::string_view>()) != fresh) {
    Py_XDECREF(last);
    last = py::bytes(fresh.data(), fresh.size()).release().ptr();
  }
  return py::reinterpret_borrow<py::bytes>(last);
}

int64_t TritonGradients::total_bytes() const {
  int64_t total = 0;
  for (const GradSpan& span : spans_) total += span.numel * ItemSize(span.dtype);
  return total;
}

ClipRequest GradientList::Request(bool infinity, int64_t num_segments) const {
  ClipRequest request;
  request.spans = spans_.data();
  request.num_spans = size();
  request.num_segments = static_cast<int32_t>(num_segments);
  request.norm_kind = infinity ? NormKind::kInf : NormKind::kL2;
  return request;
}

double* DoublesOf(const char* name, py::handle tensor, int64_t* size) {
  return VectorOf<double>(name, tensor, kDLFloat, size);
}

Nonfinite PolicyOf(int nonfinite) {
  if (nonfinite < 0 || nonfinite >= kNumNonfinite) {
    throw py::value_error("nonfinite: expected a number from 0 to " +
                          std::to_string(kNumNonfinite - 1) + ", got " + std::to_string(nonfinite));
  }
  return static_cast<Nonfinite>(nonfinite);
}

py::object GradientOf(const TorchTensors& torch, py::handle tensor, bool from_parameters) {
  if (!from_parameters) return py::reinterpret_borrow<py::object>(tensor);
  auto grad = py::reinterpret_steal<py::object>(torch.Grad(tensor.ptr()));
  if (!grad) throw py::error_already_set();
  return grad;
}

py::tuple Gather(py::object tensors, bool from_parameters, bool deduplicate, bool take_cpu,
                 uint64_t cuda_devices, uint64_t triton_devices, py::object dtensor_type) {
  if (!PyList_Check(tensors.ptr()) && !PyTuple_Check(tensors.ptr())) {
    throw py::type_error(std::string("tensors: expected a list or tuple, got ") +
                         Py_TYPE(tensors.ptr())->tp_name);
  }
  const TorchTensors& torch = TorchTensors::Get();
  const Py_ssize_t expected = PySequence_Fast_GET_SIZE(tensors.ptr());
  std::unique_ptr<CpuGradients> cpu;
  // One for each device, by first appearance.
  std::vector<std::unique_ptr<CudaGradients>> cuda;
  std::vector<std::unique_ptr<TritonGradients>> triton;
  py::list odd;
  DTensorKinds kinds(dtensor_type, expected);

  const auto list_of = [&](auto& lists, int device) -> GradientList* {
    for (const auto& list : lists) {
      if (list->device() == device) return list.get();
    }
    using List = typename std::decay_t<decltype(lists)>::value_type::element_type;
    lists.push_back(std::make_unique<List>(device));
    lists.back()->Reserve(expected);
    return lists.back().get();
  };
  const auto list_for = [&](DLDevice device, const GradSpan& span) -> GradientList* {
    if (IsServed(device, cuda_devices)) return list_of(cuda, device.device_id);
    if (take_cpu && device.device_type == kDLCPU) {
      if (cpu == nullptr) {
        cpu = std::make_unique<CpuGradients>();
        cpu->Reserve(expected);
      }
      return cpu.get();
    }
    const bool takes = device.device_type < 64 && (triton_devices >> device.device_type & 1) != 0;
    return takes && IsAligned(span) ? list_of(triton, device.device_id) : nullptr;
  };

  // The size is read anew each time: a look-up may run Python code that changes the list.
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(tensors.ptr()); ++i) {
    const auto tensor =
        py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(tensors.ptr(), i));
    py::object grad = GradientOf(torch, tensor, from_parameters);
    if (grad.is_none()) {
      if (kinds.Covers(tensor)) {
        kinds.Add(tensor, i);
        kinds.AddMissing(i);
      }
      continue;
    }
    DLTensor view;
    GradSpan span{nullptr, 0, DType::kFloat32, 0};
    GradientList* list = nullptr;
    bool readable = torch.Read(grad.ptr(), &view);
    if (!readable && kinds.Covers(grad)) {
      kinds.Add(grad, i);
      // What to_local() gives, without its autograd.
      grad = Attribute(grad, FUSEDCLIP_NAME("_local_tensor"));
      readable = torch.Read(grad.ptr(), &view);
    }
    if (readable && ToSpan(view, &span)) list = list_for(view.device, span);
    if (list != nullptr) {
      list->Add(span, std::move(grad), i);
    } else {
      odd.append(py::make_tuple(i, grad));
    }
  }
  py::list lists;
  const auto append = [&](auto list) {
    if (deduplicate) list->Deduplicate();
    lists.append(std::move(list));
  };
  if (cpu != nullptr) append(std::move(cpu));
  for (auto& list : cuda) append(std::move(list));
  for (auto& list : triton) append(std::move(list));
  return py::make_tuple(lists, odd, kinds.Result());
}

}  // namespace fusedclip
