// The kernels that every driver takes: their parameters are at most 4 KiB.

#include "cuda/launch.cuh"

namespace fusedclip::cuda {

template void Launch(const Plan&, const Place&, const ParameterTable<kFewEntries>&,
                     const Arguments&);
template void Launch(const Plan&, const Place&, const DeviceTable&, const Arguments&);
template void LaunchWrite(const ParameterTable<kFewEntries>&, int, Entry*, int, void*);

}  // namespace fusedclip::cuda
