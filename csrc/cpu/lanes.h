// Rows of values in vector registers, and how each element type is loaded and stored.
//
// A row is 256 bytes of accumulators: 64 fp32 or 32 fp64 lanes, held in as many registers as the
// instruction set needs. Which lane an element falls into depends on its position alone, so every
// instruction set gives the same bits. Vector extensions of GCC and Clang, no intrinsics, except
// for the one conversion that compilers do not find.
//
// Everything is in an anonymous namespace and uses no inline function of the standard library: the
// including files are compiled for different instruction sets, and a function they shared could be
// linked from the wrong one.

#ifndef FUSEDCLIP_CPU_LANES_H_
#define FUSEDCLIP_CPU_LANES_H_

#include <cstdint>
#ifdef __F16C__
#include <immintrin.h>
#endif

// Before loops over the registers of a row. Only when these are unrolled early does GCC keep the
// row in registers; otherwise each step goes through memory, at a third of the speed.
#if defined(__clang__)
#define FUSEDCLIP_UNROLL _Pragma("unroll")
#else
#define FUSEDCLIP_UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "fusedclip: pairs of bf16 values are read as little-endian words"
#endif

namespace fusedclip::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kRowBytes = 256;
constexpr int kParts = kRowBytes / kVectorBytes;  // registers a row
constexpr int kWidth = kVectorBytes / 4;          // fp32 lanes a register

typedef float FloatV __attribute__((vector_size(kVectorBytes)));
typedef double DoubleV __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32V __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UInt32V __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64V __attribute__((vector_size(kVectorBytes)));
typedef float HalfFloatV __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t HalfUInt16V __attribute__((vector_size(kVectorBytes / 2)));

// memcpy: gradients may lie at any address.
template <typename Vector>
inline void LoadVector(const void* from, Vector* to) {
  __builtin_memcpy(to, from, sizeof(Vector));
}
template <typename Vector>
inline void StoreVector(const Vector& from, void* to) {
  __builtin_memcpy(to, &from, sizeof(Vector));
}

struct Float32 {
  using Storage = float;
  using Scalar = float;  // the type of products
  using Vector = FloatV;
  using BitsVector = Int32V;
  using BitsScalar = int32_t;

  static void LoadRow(const float* from, FloatV (&row)[kParts]) {
    FUSEDCLIP_UNROLL
    for (int k = 0; k < kParts; ++k) LoadVector(from + k * kWidth, &row[k]);
  }
  static void StoreRow(const FloatV (&row)[kParts], float* to) {
    FUSEDCLIP_UNROLL
    for (int k = 0; k < kParts; ++k) StoreVector(row[k], to + k * kWidth);
  }
};

struct Float64 {
  using Storage = double;
  using Scalar = double;
  using Vector = DoubleV;
  using BitsVector = Int64V;
  using BitsScalar = int64_t;

  static void LoadRow(const double* from, DoubleV (&row)[kParts]) {
    FUSEDCLIP_UNROLL
    for (int k = 0; k < kParts; ++k) LoadVector(from + k * kWidth / 2, &row[k]);
  }
  static void StoreRow(const DoubleV (&row)[kParts], double* to) {
    FUSEDCLIP_UNROLL
    for (int k = 0; k < kParts; ++k) StoreVector(row[k], to + k * kWidth / 2);
  }
};

// Words of two values: the even elements go to the first half of the row, the odd ones to the
// second, so that neither load nor store has to move anything across lanes.
struct BFloat16 {
  using Storage = uint16_t;
  using Scalar = float;
  using Vector = FloatV;
  using BitsVector = Int32V;
  using BitsScalar = int32_t;

  static void LoadRow(const uint16_t* from, FloatV (&row)[kParts]) {
    FUSEDCLIP_UNROLL
    for (int k = 0; k < kParts / 2; ++k) {
      UInt32V words;
      LoadVector(from + k * 2 * kWidth, &words);
      row[k] = (FloatV)(words << 16);
      row[k + kParts / 2] = (FloatV)(words & 0xffff0000u);
    }
  }
  static void StoreRow(const FloatV (&row)[kParts], uint16_t* to) {
    FUSEDCLIP_UNROLL
    for (int k = 0; k < kParts / 2; ++k) {
      const UInt32V words = (Round(row[k]) >> 16) | (Round(row[k + kParts / 2]) & 0xffff0000u);
      StoreVector(words, to + k * 2 * kWidth);
    }
  }

 private:
  // To the nearest bf16, ties to even, in the upper half of each word. A NaN needs no care: the
  // lower half of its payload is 0, since it comes from a bf16 value or from a default NaN factor.
  static UInt32V Round(FloatV value) {
    const UInt32V bits = (UInt32V)value;
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }
};

struct Float16 {
  using Storage = uint16_t;
  using Scalar = float;
  using Vector = FloatV;
  using BitsVector = Int32V;
  using BitsScalar = int32_t;

  static void LoadRow(const uint16_t* from, FloatV (&row)[kParts]) {
    FUSEDCLIP_UNROLL
    for (int k = 0; k < kParts; ++k) row[k] = Load(from + k * kWidth);
  }
  static void StoreRow(const FloatV (&row)[kParts], uint16_t* to) {
    FUSEDCLIP_UNROLL
    for (int k = 0; k < kParts; ++k) Store(row[k], to + k * kWidth);
  }

 private:
#if defined(__AVX512F__)
  // The masked forms: GCC 12 warns about its own header behind the plain ones.
  static constexpr __mmask16 kAll = 0xffff;
  static FloatV Load(const uint16_t* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return (FloatV)_mm512_maskz_cvtph_ps(kAll, halves);
  }
  static void Store(FloatV value, uint16_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_maskz_cvtps_ph(kAll, (__m512)value, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__AVX2__) && defined(__F16C__)
  static FloatV Load(const uint16_t* from) {
    return (FloatV)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static void Store(FloatV value, uint16_t* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  // The exponent is rebiased by a product with 2^112, which normalises subnormals on the way.
  static FloatV Load(const uint16_t* from) {
    HalfUInt16V halves;
    LoadVector(from, &halves);
    const UInt32V bits = __builtin_convertvector(halves, UInt32V);
    const UInt32V shifted = (bits & 0x7fffu) << 13;
    const UInt32V scaled = (UInt32V)((FloatV)shifted * 0x1p112f);
    const UInt32V magnitude = shifted >= (0x7c00u << 13) ? (shifted | 0x7f800000u) : scaled;
    return (FloatV)(magnitude | ((bits & 0x8000u) << 16));
  }
  static void Store(FloatV value, uint16_t* to) {
    const UInt32V sign = ((UInt32V)value >> 16) & 0x8000u;
    const UInt32V bits = (UInt32V)value & 0x7fffffffu;
    // Adding 0.5 leaves a subnormal's digits, rounded to nearest even, in the lowest bits.
    const UInt32V subnormal = (UInt32V)((FloatV)bits + 0.5f) - 0x3f000000u;
    const UInt32V normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    const UInt32V finite = bits < 0x38800000u ? subnormal : normal;  // 2^-14
    const UInt32V nan = ((bits >> 13) & 0x3ffu) | 0x7e00u;
    const UInt32V rest = bits > 0x7f800000u ? nan : (nan & 0u) + 0x7c00u;
    const UInt32V half = (bits < 0x477ff000u ? finite : rest) | sign;  // 65520 rounds to infinity
    StoreVector(__builtin_convertvector(half, HalfUInt16V), to);
  }
#endif
};

// All of them, in the order of DType.
template <typename... Types>
struct TypeList {};
using ElementTypes = TypeList<Float32, Float64, Float16, BFloat16>;

}  // namespace
}  // namespace fusedclip::cpu

#endif  // FUSEDCLIP_CPU_LANES_H_
