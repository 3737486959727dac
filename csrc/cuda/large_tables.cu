// The kernels with more than 4 KiB of parameters. They are apart, so that a driver that cannot take
// them need not load them: see ParameterCapacity in clip_cuda.cu.

#include "cuda/launch.cuh"

namespace fusedclip::cuda {

#if CUDART_VERSION >= 12010
template void Launch(const Plan&, const Place&, const ParameterTable<kMoreEntries>&,
                     const Arguments&);
template void Launch(const Plan&, const Place&, const ParameterTable<kMostEntries>&,
                     const Arguments&);
template void LaunchWrite(const ParameterTable<kMostEntries>&, int, Entry*, int, void*);
#endif

}  // namespace fusedclip::cuda
