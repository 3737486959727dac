// The element types: how 16 bytes of global memory become values and values become 16 bytes; and
// the choice between them by DType.

#ifndef FUSEDCLIP_CUDA_ELEMENTS_CUH_
#define FUSEDCLIP_CUDA_ELEMENTS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "clip.h"

namespace fusedclip::cuda {

// Every access to gradients goes through these four. They go past L1: no gradient is read twice
// from the same multiprocessor within its reach.
__device__ inline uint4 LoadVector(const uint4* from) { return __ldcg(from); }
__device__ inline void StoreVector(uint4* to, uint4 value) { __stcg(to, value); }
template <typename Storage>
__device__ inline Storage LoadElement(const Storage* from) {
  return __ldcg(from);
}
template <typename Storage>
__device__ inline void StoreElement(Storage* to, Storage value) {
  __stcg(to, value);
}

__device__ inline uint32_t& Word(uint4& vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

struct Float32 {
  using Storage = float;
  using Value = float;  // the type of products
  static constexpr int kPerVector = 4;

  __device__ static void Unpack(uint4 vector, float (&values)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = __uint_as_float(Word(vector, i));
  }
  __device__ static uint4 Pack(const float (&values)[4]) {
    return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]),
                      __float_as_uint(values[2]), __float_as_uint(values[3]));
  }
  __device__ static float ToValue(float stored) { return stored; }
  __device__ static float FromValue(float value) { return value; }
};

struct Float64 {
  using Storage = double;
  using Value = double;
  static constexpr int kPerVector = 2;

  __device__ static void Unpack(uint4 vector, double (&values)[2]) {
    values[0] = __hiloint2double(static_cast<int>(vector.y), static_cast<int>(vector.x));
    values[1] = __hiloint2double(static_cast<int>(vector.w), static_cast<int>(vector.z));
  }
  __device__ static uint4 Pack(const double (&values)[2]) {
    return make_uint4(__double2loint(values[0]), __double2hiint(values[0]),
                      __double2loint(values[1]), __double2hiint(values[1]));
  }
  __device__ static double ToValue(double stored) { return stored; }
  __device__ static double FromValue(double value) { return value; }
};

// Two values a word; Type says what a word means.
template <typename Type>
struct HalfVectors {
  using Value = float;
  static constexpr int kPerVector = 8;

  __device__ static void Unpack(uint4 vector, float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = Type::FromWord(Word(vector, i));
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
  __device__ static uint4 Pack(const float (&values)[8]) {
    uint4 vector;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Word(vector, i) = Type::ToWord(values[2 * i], values[2 * i + 1]);
    }
    return vector;
  }
};

struct Float16 : HalfVectors<Float16> {
  using Storage = __half;

  __device__ static float2 FromWord(uint32_t word) {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  }
  __device__ static uint32_t ToWord(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  __device__ static float ToValue(__half stored) { return __half2float(stored); }
  __device__ static __half FromValue(float value) { return __float2half_rn(value); }
};

struct BFloat16 : HalfVectors<BFloat16> {
  using Storage = __nv_bfloat16;

  // A bf16 value is the upper half of the fp32 one: cheaper than a conversion.
  __device__ static float2 FromWord(uint32_t word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
  __device__ static uint32_t ToWord(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  __device__ static float ToValue(__nv_bfloat16 stored) { return __bfloat162float(stored); }
  __device__ static __nv_bfloat16 FromValue(float value) { return __float2bfloat16_rn(value); }
};

// The only dispatch on the element type.
template <typename Visit>
__device__ inline void WithElement(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(Float32{});
    case DType::kFloat64:
      return visit(Float64{});
    case DType::kFloat16:
      return visit(Float16{});
    case DType::kBFloat16:
      return visit(BFloat16{});
  }
}

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_ELEMENTS_CUH_
