// Stored and computed numbers, and the Math that cell.h's gates are computed with.
#pragma once

#include <type_traits>

#include "../cell.h"
#include "../params.h"
#include "kernels.h"
#include "ptx.cuh"

namespace seqkern::cuda {

// What S is computed in.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return from_bf16_bits(x.bits); }
__device__ __forceinline__ float widen(f16 x) { return from_f16_bits(x.bits); }

template <class S>
__device__ __forceinline__ S narrow(Compute<S> x) {
  if constexpr (sizeof(S) > 2)
    return x;
  else if constexpr (std::is_same_v<S, bf16>)
    return bf16{bf16_bits(x)};
  else
    return f16{f16_bits(x)};
}

// Activations for results stored as S: to a few ulp of float32 for 16-bit S, else as exact as
// CUDA's own.
template <class S>
struct Math {
  using V = Compute<S>;
  static constexpr bool kFast = sizeof(S) == 2;

  static __device__ __forceinline__ V sigmoid(V x) {
    if constexpr (kFast)
      return fast_divide(1.0f, 1.0f + fast_exp(-x));
    else
      return V(1) / (V(1) + exp(-x));
  }
  static __device__ __forceinline__ V tanh(V x) {
    if constexpr (kFast)
      return 2.0f * sigmoid(2.0f * x) - 1.0f;
    else
      return ::tanh(x);
  }
  // x <= 0
  static __device__ __forceinline__ V exp_of_negative(V x) {
    if constexpr (kFast)
      return fast_exp(x);
    else
      return exp(x);
  }
  static __device__ __forceinline__ V log_sigmoid(V x) {
    return (x < 0 ? x : V(0)) - log1p(exp_of_negative(x < 0 ? x : -x));
  }
};

// The gates have one slot each but for a GRU's n and n'. cell.h's slots are n r z n'; in memory
// they lie in PyTorch's order, r z n n'. What follows them is an inner cell's, in the same order.
template <class Cell>
__host__ __device__ constexpr int stored_slot(int slot) {
  const int first = slot / Cell::kSlots * Cell::kSlots, at = slot - first;
  return Cell::kSlots == Cell::kGates ? slot
         : at == Cell::kSlots - 1     ? slot
                                      : first + (at + Cell::kGates - 1) % Cell::kGates;
}

// A cell's first product, and, where it has one, its second, of `kMid` numbers per unit forward.
//   kFirst, kFirstSlot   the first one's gates, of slots from there on
//   kSecond              rows of tiles of the second's matrix
//   kMidPlane, kNumbers  of the gradients that backward gives to it
//   kPlanes              of all gradients that backward makes
template <class Cell, class = void>
struct ProductsOf {
  static constexpr int kFirst = Cell::kGates, kFirstSlot = Cell::kSlots - Cell::kGates;
  static constexpr int kMid = 0, kSecond = 1, kMidPlane = 0, kNumbers = 1;
  static constexpr int kPlanes = Cell::kSlots + Cell::kOwn;
};
template <class Cell>
struct ProductsOf<Cell, std::void_t<decltype(Cell::kMid)>> {
  static constexpr int kFirst = Cell::kFirst, kFirstSlot = Cell::kFirstSlot;
  static constexpr int kMid = Cell::kMid, kSecond = Cell::kSecond;
  static constexpr int kMidPlane = kMid == 1 ? kFirst : Cell::kSlots, kNumbers = kSecond;
  static constexpr int kPlanes = Cell::kPlanes;
};

// Steps of batch row b.
__device__ __forceinline__ int64_t length_of(const Rows& rows, int64_t b) {
  if (rows.lengths == nullptr) return rows.T;
  const int64_t length = rows.lengths[b];
  return length < 0 ? 0 : length > rows.T ? rows.T : length;
}

// The time of step s of direction d of a sequence of this length, s < length.
template <class Integer>
__device__ __forceinline__ Integer time_of(int64_t d, Integer s, Integer length) {
  return d == 0 ? s : length - 1 - s;
}

// The row of (t, b).
__device__ __forceinline__ int64_t row_of(const Rows& rows, int64_t t, int64_t b) {
  return (rows.first != nullptr ? rows.first[t] : t * rows.B) + b;
}

}  // namespace seqkern::cuda
