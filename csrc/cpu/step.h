// Dot products with weights as they lie in memory, row by row: for a single step, where packing
// them would cost more than the step itself. Every weight is read once; the rows of a small batch
// take their turns while it is in L1.
#pragma once

#include <utility>

#include "vec.h"

namespace seqkern {
namespace SEQKERN_ISA {

constexpr int kStepWeights = 4;                         // weight rows at a time, at most
constexpr int kStepRows = kVecRegisters == 32 ? 4 : 2;  // batch rows at a time, at most
constexpr int64_t kStepBatch = 32;                      // larger batches are worth packing for

// ---- sums of lanes: N vectors -> one whose lane i is the sum of vector i's lanes ----------------

// Where lane o of a fold comes from: vectors a, b hold partial sums in blocks of `width` lanes; the
// first halves of all of a's blocks, then of b's.
constexpr int fold_source(int lanes, int width, int o) {
  const int half = lanes / 2, i = o % half;
  return (o < half ? 0 : lanes) + i / (width / 2) * width + i % (width / 2);
}

template <int kWidth, class V, int... lane>
SEQKERN_INLINE V fold(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
  return __builtin_shufflevector(a, b, fold_source(lanes, kWidth, lane)...) +
         __builtin_shufflevector(a, b, (fold_source(lanes, kWidth, lane) + kWidth / 2)...);
}

template <int kWidth, class V, int N>
SEQKERN_INLINE V sums_of_lanes(const V (&v)[N]) {
  static_assert((N & (N - 1)) == 0 && N <= kWidth, "a power of two, no more than lanes");
  if constexpr (kWidth == 1) {
    return v[0];
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, int(sizeof(V) / sizeof(v[0][0]))>();
    V folded[N > 1 ? N / 2 : 1];
#pragma GCC unroll 8
    for (int i = 0; i < (N > 1 ? N / 2 : 1); i++)
      folded[i] = fold<kWidth>(v[N > 1 ? 2 * i : 0], v[N > 1 ? 2 * i + 1 : 0], lanes);
    return sums_of_lanes<kWidth / 2>(folded);
  }
}

// ---- dot products -------------------------------------------------------------------------------

// NW weight rows and R rows that they are multiplied with, over K.
template <class S>
struct Dots {
  const S* w[kStepWeights];
  const S* a[kStepRows];
  int64_t K;
};

// acc[i][r] += w[i] * a[r], lane by lane
template <int NW, int R, class S, class V, int N>
SEQKERN_INLINE void accumulate(V (&acc)[N], int first, const Dots<S>& dots) {
  constexpr int L = kLanes<Compute<S>>;
  const S *w[NW], *a[R];
#pragma GCC unroll 4
  for (int i = 0; i < NW; i++) w[i] = dots.w[i];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) a[r] = dots.a[r];
  int64_t k = 0;
  for (; k + L <= dots.K; k += L) {
    V row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) row[r] = load(a[r] + k);
#pragma GCC unroll 4
    for (int i = 0; i < NW; i++) {
      const V weight = load(w[i] + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) acc[(first + i) * R + r] += weight * row[r];
    }
  }
  if (k == dots.K) return;
#pragma GCC unroll 4
  for (int i = 0; i < NW; i++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
      acc[(first + i) * R + r] +=
          load_first(w[i] + k, dots.K - k) * load_first(a[r] + k, dots.K - k);
}

// out[i * ld_i + r * ld_r] += x.w[i] . x.a[r] for i < NW, and += h.w[i - (Slots - NW)] . h.a[r] for
// the last NW of Slots.
template <int Slots, int NW, int R, class S>
__attribute__((noinline)) void step_tile(Compute<S>* out, int64_t ld_i, int64_t ld_r,
                                         const Dots<S>& x, const Dots<S>& h) {
  using C = Compute<S>;
  using V = Vec<C>;
  constexpr int L = kLanes<C>;
  constexpr int N = Slots * R <= 4 ? 4 : Slots * R <= 8 ? 8 : 16;
  V acc[N] = {};
  accumulate<NW, R>(acc, 0, x);
  accumulate<NW, R>(acc, Slots - NW, h);
  C sums[N];
  constexpr int kAtOnce = N < L ? N : L;
#pragma GCC unroll 8
  for (int begin = 0; begin < N; begin += kAtOnce) {
    V group[kAtOnce];
#pragma GCC unroll 16
    for (int i = 0; i < kAtOnce; i++) group[i] = acc[begin + i];
    C lane[L];
    store(lane, sums_of_lanes<L>(group));
    for (int i = 0; i < kAtOnce; i++) sums[begin + i] = lane[i];
  }
  for (int i = 0; i < Slots; i++)
    for (int r = 0; r < R; r++) out[i * ld_i + r * ld_r] += sums[i * R + r];
}

// step_tile with the number of rows known at run time.
template <int Slots, int NW, class S>
void step_rows(int rows, Compute<S>* out, int64_t ld_i, int64_t ld_r, const Dots<S>& x,
               const Dots<S>& h) {
  static_assert(NW <= kStepWeights && (kStepRows == 4 || kStepRows == 2));
  if (rows == 1) return step_tile<Slots, NW, 1>(out, ld_i, ld_r, x, h);
  if (rows == 2) return step_tile<Slots, NW, 2>(out, ld_i, ld_r, x, h);
  if constexpr (kStepRows == 4) {
    if (rows == 3) return step_tile<Slots, NW, 3>(out, ld_i, ld_r, x, h);
    return step_tile<Slots, NW, 4>(out, ld_i, ld_r, x, h);
  }
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
