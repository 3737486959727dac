// The binding, compiled as one: pybind11's own functions take most of the time that each of its
// files takes by itself. A name of a nameless namespace is therefore one name for all of them.

#include "python/ambient.cpp"
#include "python/bindings.cpp"
#include "python/cpu_gradients.cpp"
#include "python/cuda_gradients.cpp"
#include "python/gradients.cpp"
#include "python/plain_clip.cpp"
#include "python/scalars.cpp"
#include "python/tensors.cpp"
