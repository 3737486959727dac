// IEEE half precision: the compiler's own type, which rounds to nearest even.

#ifndef FUSEDCLIP_EMULATOR_CUDA_FP16_H_
#define FUSEDCLIP_EMULATOR_CUDA_FP16_H_

#include "cuda_runtime.h"

using __half = _Float16;
struct __half2 {
  __half x, y;
};

inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}

#endif  // FUSEDCLIP_EMULATOR_CUDA_FP16_H_
