#include "python/scalars.h"

#include <vector>

#include "python/tensors.h"

namespace fusedclip {
namespace py = pybind11;

namespace {

// The first that torch makes on cold caches takes 30 µs, those that it makes at once after that
// half a microsecond each. One call in so many makes them for the others.
constexpr int kMadeAtOnce = 32;

// The memory of a 0-dim tensor, which deletes it.
struct Memory {
  DLManagedTensorVersioned managed;
  union {
    double wide;
    float narrow;
  } value;
};

struct Ready {
  PyObject* tensor;  // owned; nobody else has seen it
  Memory* memory;
};

Ready Make(const TorchTensors& torch, bool float64) {
  auto* memory = new Memory{};
  memory->managed.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
  memory->managed.deleter = [](DLManagedTensorVersioned* self) {
    delete reinterpret_cast<Memory*>(self);  // its first member
  };
  memory->managed.dl_tensor.data = &memory->value;
  memory->managed.dl_tensor.device = {kDLCPU, 0};
  memory->managed.dl_tensor.dtype = {kDLFloat, static_cast<uint8_t>(float64 ? 64 : 32), 1};
  PyObject* tensor = torch.TakeOver(&memory->managed);
  if (tensor == nullptr) {
    delete memory;
    throw py::error_already_set();
  }
  return {tensor, memory};
}

}  // namespace

py::object Scalar(double value, bool float64) {
  // Guarded by the GIL; never destroyed, since Python is gone by then.
  static auto* const stocks = new std::vector<Ready>[2];
  std::vector<Ready>& stock = stocks[float64];
  if (stock.empty()) {
    const TorchTensors& torch = TorchTensors::Get();
    while (stock.size() < kMadeAtOnce) stock.push_back(Make(torch, float64));
  }
  const Ready taken = stock.back();
  stock.pop_back();
  if (float64) {
    taken.memory->value.wide = value;
  } else {
    taken.memory->value.narrow = static_cast<float>(value);
  }
  return py::reinterpret_steal<py::object>(taken.tensor);
}

}  // namespace fusedclip
