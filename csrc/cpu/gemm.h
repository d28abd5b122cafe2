// The matrix products of a recurrent layer: small tiles of out += a * w with w packed into panels.
//
// A *panel* is NV <= 4 vectors of kLanes outputs by K. In memory: for each k (for bf16 in
// AVX512-BF16: for each pair of k) the NV vectors one after the other, so that a product streams
// through it once:
//   panel[k / kPair][NV][kLanes][kPair]
// A *tile* is `rows` <= max_rows(NV) rows of one panel: rows * NV accumulators stay in registers
// over all of K, each k costs NV loads of weights and one broadcast per row.
#pragma once

#include <utility>

#include "vec.h"

namespace seqkern {
namespace SEQKERN_ISA {

// What rows stored as S are converted to before they are multiplied (A), and how many k one
// instruction takes.
template <class S>
struct Engine {
  using A = Compute<S>;
};
#if defined(__AVX512BF16__)
template <>
struct Engine<bf16> {
  using A = bf16;
};
#endif
template <class S>
using Operand = typename Engine<S>::A;
template <class A>
constexpr int kPair = sizeof(A) == 2 ? 2 : 1;

constexpr int kMaxNV = 4;
constexpr int max_rows(int nv) {
  return kVecRegisters == 32 ? (nv == 4 ? 6 : 8) : (nv == 4 ? 3 : nv == 3 ? 4 : nv == 2 ? 6 : 8);
}
constexpr int kMaxRows = 8;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Elements of a panel.
template <class A>
constexpr int64_t panel_size(int64_t K, int nv) {
  return round_up(K, kPair<A>) * nv * kLanes<Compute<A>>;
}

// The rows of a tile, one pointer each: a(r, k) = row[r][k].
template <class A>
struct PointerRows {
  const A* const* row;
  template <int R>
  struct Bound {
    const A* p[R];
    SEQKERN_INLINE const A* at(int r, int64_t k) const { return p[r] + k; }
  };
  template <int R>
  SEQKERN_INLINE Bound<R> bind() const {
    Bound<R> bound;
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) bound.p[r] = row[r];
    return bound;
  }
};

// The rows of a tile, packed as [K / kPair][R][kPair] (R is the tile's own number of rows).
template <class A>
struct PackedRows {
  const A* data;
  template <int R>
  struct Bound {
    const A* data;
    SEQKERN_INLINE const A* at(int r, int64_t k) const { return data + k * R + r * kPair<A>; }
  };
  template <int R>
  SEQKERN_INLINE Bound<R> bind() const {
    return {data};
  }
};

SEQKERN_INLINE VecF multiply_add(VecF acc, const float* a, VecF w) { return acc + *a * w; }
SEQKERN_INLINE VecD multiply_add(VecD acc, const double* a, VecD w) { return acc + *a * w; }
SEQKERN_INLINE VecF load_weights(const float* w) { return load(w); }
SEQKERN_INLINE VecD load_weights(const double* w) { return load(w); }
#if defined(__AVX512BF16__)
SEQKERN_INLINE __m512bh load_weights(const bf16* w) { return (__m512bh)_mm512_loadu_si512(w); }
SEQKERN_INLINE VecF multiply_add(VecF acc, const bf16* a, __m512bh w) {
  int32_t pair;
  memcpy(&pair, a, sizeof pair);
  return (VecF)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair), w);
}
#endif

// Longest sum that is kept in registers. Each round of so many k is rounded on its own and then
// added up in memory: the error grows with the root of the longest chain of additions.
constexpr int64_t kRoundK = 128;

// out[r][v] = init[r][v] + sum_k a(r, k) * panel(k, v); init null: 0. out may be init.
// ld_*: elements from one row to the next.
template <class A, int R, int NV, class Rows>
__attribute__((noinline)) void tile_kernel(Compute<A>* out, int64_t ld_out, const Compute<A>* init,
                                           int64_t ld_init, Rows rows, const A* panel, int64_t K) {
  using C = Compute<A>;
  using V = Vec<C>;
  constexpr int L = kLanes<C>;
  // A few rows alone would wait for their own sums: they keep several, over interleaved k.
  constexpr int kSums = R * NV >= 8 ? 1 : R * NV >= 4 ? 2 : 4;
  constexpr int64_t kStep = NV * L * kPair<A>;  // elements of the panel per k (per pair)
  const auto a = rows.template bind<R>();
  const int64_t whole = K / kPair<A>;
  int64_t k = 0;
  do {
    V acc[kSums][R][NV];
#pragma GCC unroll 4
    for (int s = 0; s < kSums; s++)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) acc[s][r][v] = V{};

    const int64_t end = whole - k < kRoundK ? whole : k + kRoundK;
    for (; k + kSums <= end; k += kSums)
#pragma GCC unroll 4
      for (int s = 0; s < kSums; s++) {
        decltype(load_weights(panel)) w[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++)
          w[v] = load_weights(panel + (k + s) * kStep + v * L * kPair<A>);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
          for (int v = 0; v < NV; v++)
            acc[s][r][v] = multiply_add(acc[s][r][v], a.at(r, (k + s) * kPair<A>), w[v]);
      }
    for (; k < end; k++)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++)
          acc[0][r][v] = multiply_add(acc[0][r][v], a.at(r, k * kPair<A>),
                                      load_weights(panel + k * kStep + v * L * kPair<A>));
    if constexpr (kPair<A> == 2) {
      if (k == whole &&
          K & 1) {  // the last pair is half a pair: what follows in a's memory is not ours
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const A last[2] = {*a.at(r, K - 1), A{}};
#pragma GCC unroll 4
          for (int v = 0; v < NV; v++)
            acc[0][r][v] = multiply_add(acc[0][r][v], last,
                                        load_weights(panel + whole * kStep + v * L * kPair<A>));
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        V sum = acc[0][r][v];
#pragma GCC unroll 4
        for (int s = 1; s < kSums; s++) sum += acc[s][r][v];
        if (init) sum += load(init + r * ld_init + v * L);
        store(out + r * ld_out + v * L, sum);
      }
    init = out, ld_init = ld_out;
  } while (k < whole);
}

template <class A, int NV, class Rows>
void tile_of_rows(int rows, Compute<A>* out, int64_t ld_out, const Compute<A>* init,
                  int64_t ld_init, Rows a, const A* panel, int64_t K) {
#define SEQKERN_CASE(R)                                               \
  case R:                                                             \
    if constexpr (R <= max_rows(NV))                                  \
      tile_kernel<A, R, NV>(out, ld_out, init, ld_init, a, panel, K); \
    return;
  switch (rows) {
    SEQKERN_CASE(1)
    SEQKERN_CASE(2)
    SEQKERN_CASE(3)
    SEQKERN_CASE(4)
    SEQKERN_CASE(5)
    SEQKERN_CASE(6)
    SEQKERN_CASE(7)
    SEQKERN_CASE(8)
  }
#undef SEQKERN_CASE
}

// tile_kernel with the number of rows and vectors known at run time.
template <class A, class Rows>
void tile(int rows, int nv, Compute<A>* out, int64_t ld_out, const Compute<A>* init,
          int64_t ld_init, Rows a, const A* panel, int64_t K) {
  switch (nv) {
    case 1:
      return tile_of_rows<A, 1>(rows, out, ld_out, init, ld_init, a, panel, K);
    case 2:
      return tile_of_rows<A, 2>(rows, out, ld_out, init, ld_init, a, panel, K);
    case 3:
      return tile_of_rows<A, 3>(rows, out, ld_out, init, ld_init, a, panel, K);
    case 4:
      return tile_of_rows<A, 4>(rows, out, ld_out, init, ld_init, a, panel, K);
  }
}

// n things in tiles of at most `most`, as even as possible: tile i of ceil_div(n, most) starts
// here.
SEQKERN_INLINE int64_t tile_start(int64_t n, int most, int64_t i) {
  return n * i / ceil_div(n, most);
}

// ---- packing
// ---------------------------------------------------------------------------------------------

constexpr int interleave_source(int lanes, int o, bool high) {
  return (high ? lanes / 2 : 0) + o / 2 + o % 2 * lanes;
}

// The low (or high) halves of two vectors, lane by lane in turn.
template <bool high, class V, int... lane>
SEQKERN_INLINE V interleave(V a, V b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, interleave_source(sizeof...(lane), lane, high)...);
}

// v[i][j] <-> v[j][i]: each round turns the bits of the index (i, j) by one place.
template <class V, int L>
SEQKERN_INLINE void transpose(V (&v)[L]) {
  constexpr auto lanes = std::make_integer_sequence<int, L>();
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    V turned[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; i++) {
      turned[2 * i] = interleave<false>(v[i], v[i + L / 2], lanes);
      turned[2 * i + 1] = interleave<true>(v[i], v[i + L / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) v[i] = turned[i];
  }
}

// panel(k, v * kLanes + lane) = w[(base[v] + lane) * ld + k] for lane < valid[v], else 0: outputs
// are rows of w.
template <class A, class S>
void pack_panel_of_rows(A* panel, const S* w, int64_t ld, int64_t K, int nv, const int64_t* base,
                        const int64_t* valid) {
  using V = Vec<Compute<A>>;
  constexpr int L = kLanes<Compute<A>>, P = kPair<A>;
  for (int v = 0; v < nv; v++)
    for (int64_t k0 = 0; k0 < K; k0 += L) {  // blocks of L rows by L columns
      V block[L];
      const int64_t columns = K - k0;
#pragma GCC unroll 16
      for (int lane = 0; lane < L; lane++)
        block[lane] = lane < valid[v] ? load_first(w + (base[v] + lane) * ld + k0, columns) : V{};
      transpose(block);
#pragma GCC unroll 16
      for (int k = 0; k < L; k += P) {
        if (k >= columns) break;
        A* out = panel + ((k0 + k) / P * nv + v) * L * P;
        if constexpr (P == 1) {
          store(out, block[k]);
        } else {  // the upper halves of two floats are two bf16
          const VecU pairs = (VecU)block[k] >> 16 | ((VecU)block[k + 1] & 0xffff0000u);
          memcpy(out, &pairs, sizeof pairs);
        }
      }
    }
}

// The bits of the first n of kLanes 16-bit values, one to a lane of 32.
SEQKERN_INLINE VecU load_bits(const bf16* p, int64_t n) {
  VecU16 bits{};
  memcpy(&bits, p, size_t(n >= kLanes<float> ? kLanes<float> : n < 0 ? 0 : n) * sizeof(bf16));
  return __builtin_convertvector(bits, VecU);
}

// panel(k, n) = row[k][n] for n < columns, else 0: outputs are columns, one pointer per k.
template <class A, class S>
void pack_panel_of_columns(A* panel, const S* const* row, int64_t K, int nv, int64_t columns) {
  using C = Compute<A>;
  constexpr int L = kLanes<C>, P = kPair<A>;
  for (int64_t k = 0; k < round_up(K, P); k += P)
    for (int v = 0; v < nv; v++) {
      A* out = panel + (k / P * nv + v) * L * P;
      if constexpr (P == 1) {
        store(out, load_first(row[k] + v * L, columns - v * L));
      } else {
        static_assert(sizeof(S) == sizeof(A));  // pairs are bf16 on both sides: no conversion
        const VecU even = load_bits(row[k] + v * L, columns - v * L);
        const VecU odd = k + 1 < K ? load_bits(row[k + 1] + v * L, columns - v * L) : VecU{};
        const VecU pairs = even | odd << 16;
        memcpy(out, &pairs, sizeof pairs);
      }
    }
}

// Packed rows of a tile: out[k / kPair][r][kPair] = a[k * ld + r] for r < R.
template <int R, class A>
void pack_tile_of_columns(A* out, const A* a, int64_t ld, int64_t K) {
  constexpr int P = kPair<A>;
  for (int64_t k = 0; k + P <= K; k += P, out += R * P)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int p = 0; p < P; p++) out[r * P + p] = a[(k + p) * ld + r];
  if (K % P)
    for (int r = 0; r < R; r++) out[r * P] = a[(K - 1) * ld + r], out[r * P + 1] = A{};
}

template <class A>
void pack_tile_of_columns(int rows, A* out, const A* a, int64_t ld, int64_t K) {
  switch (rows) {
    case 1:
      return pack_tile_of_columns<1>(out, a, ld, K);
    case 2:
      return pack_tile_of_columns<2>(out, a, ld, K);
    case 3:
      return pack_tile_of_columns<3>(out, a, ld, K);
    case 4:
      return pack_tile_of_columns<4>(out, a, ld, K);
    case 5:
      return pack_tile_of_columns<5>(out, a, ld, K);
    case 6:
      return pack_tile_of_columns<6>(out, a, ld, K);
  }
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
