// Values of every element type on the host, for the drivers: read, written, and how near a scaled
// one must be. IEEE formats of any width are taken apart by their bits, with no CUDA header.

#ifndef FUSEDCLIP_TESTS_VALUES_H_
#define FUSEDCLIP_TESTS_VALUES_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "clip.h"

namespace fusedclip {

struct Format {
  int exponent_bits;
  int mantissa_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int lowest_exponent() const { return 1 - bias(); }  // of a normal number
  uint64_t largest_field() const { return (uint64_t{1} << exponent_bits) - 1; }
};

inline Format FormatOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {8, 23};
    case DType::kFloat64:
      return {11, 52};
    case DType::kFloat16:
      return {5, 10};
    case DType::kBFloat16:
      return {8, 7};
  }
  return {0, 0};
}

inline double LoadValue(const void* at, DType dtype) {
  const Format format = FormatOf(dtype);
  uint64_t bits = 0;
  std::memcpy(&bits, at, ItemSize(dtype));
  const uint64_t one = uint64_t{1} << format.mantissa_bits;
  const uint64_t mantissa = bits & (one - 1);
  const uint64_t field = bits >> format.mantissa_bits & format.largest_field();
  double value;
  if (field == format.largest_field()) {
    value = mantissa == 0 ? std::numeric_limits<double>::infinity()
                          : std::numeric_limits<double>::quiet_NaN();
  } else {
    const int exponent = std::max(1, static_cast<int>(field)) - format.bias();
    value = std::ldexp(static_cast<double>(mantissa | (field == 0 ? 0 : one)),
                       exponent - format.mantissa_bits);
  }
  const bool negative = bits >> (format.exponent_bits + format.mantissa_bits) & 1;
  return negative ? -value : value;
}

// To the nearest, ties to even.
inline void StoreValue(double value, void* at, DType dtype) {
  const Format format = FormatOf(dtype);
  const uint64_t infinity = format.largest_field() << format.mantissa_bits;
  uint64_t bits = infinity;
  if (value != value) {
    bits |= uint64_t{1} << (format.mantissa_bits - 1);
  } else if (std::isfinite(value)) {
    int exponent;
    std::frexp(value, &exponent);  // the value is in [1/2, 1) times 2 to the power of it
    exponent =
        value == 0 ? format.lowest_exponent() : std::max(exponent - 1, format.lowest_exponent());
    // A mantissa that rounding makes too long by one bit carries into the exponent.
    const double mantissa =
        std::nearbyint(std::ldexp(std::fabs(value), format.mantissa_bits - exponent));
    const auto field = static_cast<uint64_t>(std::max(0, exponent + format.bias() - 1));
    if (field < format.largest_field()) {
      bits = std::min(infinity, (field << format.mantissa_bits) + static_cast<uint64_t>(mantissa));
    }
  }
  const uint64_t sign = std::signbit(value) ? 1 : 0;
  bits |= sign << (format.exponent_bits + format.mantissa_bits);
  std::memcpy(at, &bits, ItemSize(dtype));
}

struct Tolerance {
  double relative;  // one rounding of the factor, one of the product, one to the element type
  double absolute;  // the spacing of the type's smallest numbers
};

// For fp64 that of fp32: its factor has the error of a norm that is partly fp32.
inline Tolerance ToleranceOf(DType dtype) {
  const Format format = FormatOf(dtype);
  return {std::max(0x1p-21, std::ldexp(1.0, -format.mantissa_bits)),
          std::max(0x1p-149, std::ldexp(1.0, format.lowest_exponent() - format.mantissa_bits))};
}

}  // namespace fusedclip

#endif  // FUSEDCLIP_TESTS_VALUES_H_
