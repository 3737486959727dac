// The loops, once for all element types and instruction sets: sum of squares, maximum, scaling,
// clamping.

#ifndef FUSEDCLIP_CPU_KERNELS_H_
#define FUSEDCLIP_CPU_KERNELS_H_

#include <cstdint>

#include "cpu/kernel_table.h"
#include "cpu/lanes.h"
#include "cpu/tuning.h"

namespace fusedclip::cpu {
namespace {

template <typename T>
constexpr int kRow = kRowBytes / static_cast<int>(sizeof(typename T::Scalar));  // elements a row

// fp32 lanes are emptied into fp64 every so many rows: 16 additions a lane keep the norm within
// 3e-7 even where rounding always errs to one side, as it does for constant gradients.
constexpr int kRowsPerBlock = 16;

// At most kRowsPerBlock whole rows: those that begin at elements [begin, end), and the same again
// at each further place, `stride` elements apart.
struct Block {
  int64_t begin;
  int64_t end;
  int64_t places;
  int64_t stride;
};

// Calls visit(block) for the whole rows of n elements. Returns where the incomplete row begins.
template <typename T, typename Visit>
inline int64_t EachBlock(int64_t n, Visit visit) {
  constexpr int64_t kStep = kRowsPerBlock / kStreams * kRow<T>;
  const int64_t rows = n / kRow<T>;
  const int64_t whole = rows * kRow<T>;
  const int64_t each = rows / kStreams;
  const int64_t stream = each < kRowsPerBlock ? 0 : ((each - 1) | 1) * kRow<T>;
  for (int64_t i = 0; i < stream; i += kStep) {
    visit(Block{i, i + kStep < stream ? i + kStep : stream, kStreams, stream});
  }
  constexpr int64_t kBlock = kRowsPerBlock * kRow<T>;
  for (int64_t i = kStreams * stream; i < whole; i += kBlock) {
    visit(Block{i, i + kBlock < whole ? i + kBlock : whole, 1, whole});
  }
  return whole;
}

// Calls visit(i) for the first element of each row.
template <typename T, typename Visit>
inline void EachRow(const Block& block, Visit visit) {
  for (int64_t i = block.begin; i < block.end; i += kRow<T>) {
    for (int64_t place = 0; place < block.places; ++place) visit(i + place * block.stride);
  }
}
template <typename T, typename Visit>
inline int64_t EachRow(int64_t n, Visit visit) {
  return EachBlock<T>(n, [&](const Block& block) { EachRow<T>(block, visit); });
}

// Adds the upper half of the lanes to the lower until `kLeft` registers are left: the same pairs of
// lanes meet in registers of any width.
template <int kLeft, int kCount, typename Vector>
inline void Fold(Vector (&lanes)[kCount]) {
  FUSEDCLIP_UNROLL
  for (int half = kCount / 2; half >= kLeft; half /= 2) {
    FUSEDCLIP_UNROLL
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
}

template <int kCount, typename Vector>
inline void SetZero(Vector (&lanes)[kCount]) {
  FUSEDCLIP_UNROLL
  for (int k = 0; k < kCount; ++k) lanes[k] = Vector{};
}

inline void Widen(FloatV narrow, DoubleV* wide) {  // [2]
  HalfFloatV halves[2];
  LoadVector(&narrow, &halves);
  wide[0] = __builtin_convertvector(halves[0], DoubleV);
  wide[1] = __builtin_convertvector(halves[1], DoubleV);
}

// 16 running totals in fp64.
class Totals {
 public:
  Totals() { SetZero(sum_); }

  void Add(FloatV (&lanes)[kParts]) {
    Fold<kVectors / 2>(lanes);
    FUSEDCLIP_UNROLL
    for (int k = 0; k < kVectors / 2; ++k) {
      DoubleV wide[2];
      Widen(lanes[k], wide);
      sum_[2 * k] += wide[0];
      sum_[2 * k + 1] += wide[1];
    }
  }
  template <int kCount>
  void Add(DoubleV (&lanes)[kCount]) {
    Fold<kVectors>(lanes);
    FUSEDCLIP_UNROLL
    for (int k = 0; k < kVectors; ++k) sum_[k] += lanes[k];
  }
  double Sum() {
    Fold<1>(sum_);
    constexpr int kLanes = kVectorBytes / 8;
    double lane[kLanes];
    StoreVector(sum_[0], lane);
    FUSEDCLIP_UNROLL
    for (int half = kLanes / 2; half > 0; half /= 2) {
      FUSEDCLIP_UNROLL
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    }
    return lane[0];
  }

 private:
  static constexpr int kVectors = 16 * 8 / kVectorBytes;
  DoubleV sum_[kVectors];
};

// The last, incomplete row of a chunk, padded with zeros.
template <typename T>
struct Tail {
  alignas(kVectorBytes) typename T::Storage values[kRow<T>];

  Tail(const typename T::Storage* from, int64_t n) {
    constexpr int kBytes = sizeof(values);
    FUSEDCLIP_UNROLL
    for (int i = 0; i < kBytes; i += kVectorBytes) {
      StoreVector(FloatV{}, reinterpret_cast<char*>(values) + i);
    }
    CopyBytes(values, from, n * sizeof(typename T::Storage));
  }
};

template <typename T, bool kUnscale>
inline void LoadRow(const typename T::Storage* from, typename T::Scalar inv_scale,
                    typename T::Vector (&row)[kParts]) {
  T::LoadRow(from, row);
  if (kUnscale) {
    FUSEDCLIP_UNROLL
    for (int k = 0; k < kParts; ++k) row[k] *= inv_scale;
  }
}

template <typename T, bool kUnscale>
inline void AddSquares(const typename T::Storage* from, typename T::Scalar inv_scale,
                       typename T::Vector (&lanes)[kParts]) {
  typename T::Vector row[kParts];
  LoadRow<T, kUnscale>(from, inv_scale, row);
  FUSEDCLIP_UNROLL
  for (int k = 0; k < kParts; ++k) lanes[k] += row[k] * row[k];
}

template <typename T, bool kUnscale>
double SumSquares(const typename T::Storage* data, int64_t n, typename T::Scalar inv_scale) {
  Totals totals;
  const int64_t whole = EachBlock<T>(n, [&](const Block& block) {
    typename T::Vector lanes[kParts];
    SetZero(lanes);
    EachRow<T>(block, [&](int64_t i) { AddSquares<T, kUnscale>(data + i, inv_scale, lanes); });
    totals.Add(lanes);
  });
  if (whole < n) {
    typename T::Vector lanes[kParts];
    SetZero(lanes);
    AddSquares<T, kUnscale>(Tail<T>(data + whole, n - whole).values, inv_scale, lanes);
    totals.Add(lanes);
  }
  return totals.Sum();
}

// For the narrow types: products, and all sums, in fp64.
template <typename T>
double SumSquaresWide(const typename T::Storage* data, int64_t n, double inv_scale) {
  Totals totals;
  for (; n > 0; n -= kRow<T>, data += kRow<T>) {
    FloatV row[kParts];
    T::LoadRow(n >= kRow<T> ? data : Tail<T>(data, n).values, row);
    DoubleV wide[2 * kParts];
    FUSEDCLIP_UNROLL
    for (int k = 0; k < kParts; ++k) {
      Widen(row[k], &wide[2 * k]);
      wide[2 * k] *= inv_scale;
      wide[2 * k] *= wide[2 * k];
      wide[2 * k + 1] *= inv_scale;
      wide[2 * k + 1] *= wide[2 * k + 1];
    }
    totals.Add(wide);
  }
  return totals.Sum();
}

// They are wide already.
template <>
double SumSquaresWide<Float64>(const double* data, int64_t n, double inv_scale) {
  return SumSquares<Float64, true>(data, n, inv_scale);
}

// Compares bit patterns, as integers: they order as the magnitudes do, with NaN above infinity.
template <typename T, bool kUnscale>
double MaxAbs(const typename T::Storage* data, int64_t n, typename T::Scalar inv_scale) {
  using Bits = typename T::BitsScalar;
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0} ^ (Bits{1} << (8 * sizeof(Bits) - 1)));
  typename T::BitsVector most[kParts];
  SetZero(most);
  const auto visit = [&](const typename T::Storage* from) {
    typename T::Vector row[kParts];
    LoadRow<T, kUnscale>(from, inv_scale, row);
    FUSEDCLIP_UNROLL
    for (int k = 0; k < kParts; ++k) {
      const typename T::BitsVector bits = (typename T::BitsVector)row[k] & kMagnitude;
      most[k] = bits > most[k] ? bits : most[k];
    }
  };
  const int64_t whole = EachRow<T>(n, [&](int64_t i) { visit(data + i); });
  if (whole < n) visit(Tail<T>(data + whole, n - whole).values);
  Bits lane[kRow<T>];
  StoreVector(most, lane);
  Bits result = 0;
  for (int i = 0; i < kRow<T>; ++i) result = lane[i] > result ? lane[i] : result;
  typename T::Scalar magnitude;
  StoreVector(result, &magnitude);
  return magnitude;
}

template <typename T>
inline void ScaleRow(typename T::Storage* data, typename T::Scalar factor) {
  typename T::Vector row[kParts];
  T::LoadRow(data, row);
  FUSEDCLIP_UNROLL
  for (int k = 0; k < kParts; ++k) row[k] *= factor;
  T::StoreRow(row, data);
}

template <typename T>
void Scale(typename T::Storage* data, int64_t n, typename T::Scalar factor) {
  if (factor != factor)
    factor = __builtin_nan("");  // whatever payload it had: BFloat16 relies on it
  const int64_t whole = EachRow<T>(n, [&](int64_t i) { ScaleRow<T>(data + i, factor); });
  if (whole < n) {
    Tail<T> tail(data + whole, n - whole);
    ScaleRow<T>(tail.values, factor);
    CopyBytes(data + whole, tail.values, (n - whole) * sizeof(typename T::Storage));
  }
}

template <typename Vector>
inline bool AnyBit(const Vector& vector) {
  int64_t words[sizeof(Vector) / 8];
  StoreVector(vector, words);
  int64_t any = 0;
  FUSEDCLIP_UNROLL
  for (unsigned i = 0; i < sizeof(Vector) / 8; ++i) any |= words[i];
  return any != 0;
}

// Writes nothing, and so moves half the bytes, where nothing changes. Comparisons with NaN are
// false: it stays. Half types are compared and stored exactly as fp32.
template <typename T>
inline bool ClampRow(typename T::Storage* data, typename T::Vector low, typename T::Vector high) {
  typename T::Vector row[kParts];
  T::LoadRow(data, row);
  typename T::BitsVector changed = {};
  FUSEDCLIP_UNROLL
  for (int k = 0; k < kParts; ++k) {
    const typename T::Vector before = row[k];
    row[k] = row[k] < low ? low : row[k];
    row[k] = row[k] > high ? high : row[k];
    changed |= (typename T::BitsVector)row[k] ^ (typename T::BitsVector)before;
  }
  if (!AnyBit(changed)) return false;
  T::StoreRow(row, data);
  return true;
}

template <typename T>
bool Clamp(typename T::Storage* data, int64_t n, typename T::Scalar limit) {
  typename T::Vector rounded[kParts];
  FUSEDCLIP_UNROLL
  for (int k = 0; k < kParts; ++k) rounded[k] = limit - typename T::Vector{};  // keeps -0
  typename T::Storage stored[kRow<T>];
  T::StoreRow(rounded, stored);
  T::LoadRow(stored, rounded);
  const typename T::Vector high = rounded[0];
  bool changed = false;
  const int64_t whole =
      EachRow<T>(n, [&](int64_t i) { changed |= ClampRow<T>(data + i, -high, high); });
  if (whole < n) {
    Tail<T> tail(data + whole, n - whole);
    if (ClampRow<T>(tail.values, -high, high)) {
      CopyBytes(data + whole, tail.values, (n - whole) * sizeof(typename T::Storage));
      changed = true;
    }
  }
  return changed;
}

template <typename T>
constexpr DTypeKernels KernelsFor() {
  using Storage = typename T::Storage;
  using Scalar = typename T::Scalar;
  return {
      [](const void* data, int64_t n, float inv_scale) {
        auto* run = inv_scale == 1.0f ? &SumSquares<T, false> : &SumSquares<T, true>;
        return run(static_cast<const Storage*>(data), n, inv_scale);
      },
      [](const void* data, int64_t n, float inv_scale) {
        return SumSquaresWide<T>(static_cast<const Storage*>(data), n, inv_scale);
      },
      [](const void* data, int64_t n, float inv_scale) {
        auto* run = inv_scale == 1.0f ? &MaxAbs<T, false> : &MaxAbs<T, true>;
        return run(static_cast<const Storage*>(data), n, inv_scale);
      },
      [](void* data, int64_t n, double factor) {
        Scale<T>(static_cast<Storage*>(data), n, static_cast<Scalar>(factor));
      },
      [](void* data, int64_t n, double limit) {
        return Clamp<T>(static_cast<Storage*>(data), n, static_cast<Scalar>(limit));
      },
  };
}

template <typename... Types>
constexpr KernelTable TableOf(TypeList<Types...>) {
  static_assert(sizeof...(Types) == kNumDTypes, "lanes.h must have a struct for each DType");
  return {{KernelsFor<Types>()...}};
}

constexpr KernelTable kKernels = TableOf(ElementTypes{});

}  // namespace
}  // namespace fusedclip::cpu

#endif  // FUSEDCLIP_CPU_KERNELS_H_
