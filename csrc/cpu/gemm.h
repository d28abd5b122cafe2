// The matrix products of a recurrent layer: small tiles of out += a * w with w packed into panels.
//
// A *panel* is NV <= 4 vectors of kLanes outputs by K. In memory: for each k (for bf16 in
// AVX512-BF16: for each pair of k) the NV vectors one after the other, so that a product streams
// through it once:
//   panel[k / kPair][NV][kLanes][kPair]
// A *tile* is `rows` <= max_rows(NV) rows of one panel: rows * NV accumulators stay in registers
// over all of K, each k costs NV loads of weights and one broadcast per row. AMX (amx.h) has larger
// tiles of its own and wants rows evenly spaced and K a multiple of 32.
#pragma once

#include <utility>

#include "amx.h"

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
#if defined(__AMX_BF16__)
template <class A>
constexpr bool kMatrix = sizeof(A) == 2;  // multiplied by AMX
#else
template <class A>
constexpr bool kMatrix = false;
#endif
template <class A>
constexpr int kDeep =
    kMatrix<A> ? kTileK : kPair<A>;  // panels are padded to a multiple of so many k

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
  return round_up(K, kDeep<A>) * nv * kLanes<Compute<A>>;
}

// Hands out aligned pieces of the scratch memory; with no memory it only counts.
struct Scratch {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* piece = (T*)(base + used);
    used += size_t(round_up(n * int64_t(sizeof(T)), 64) + 64);  // a line apart: no false sharing
    return piece;
  }
};

// ---- the rows of a product: a(r, k) -------------------------------------------------------------

// One pointer each: a(r, k) = row[r][k0 + k].
template <class A>
struct PointerRows {
  const A* const* row;
  int64_t k0;
  PointerRows from(int64_t r) const { return {row + r, k0}; }
  template <int R>
  struct Bound {
    const A* p[R];
    SEQKERN_INLINE const A* at(int r, int64_t k) const { return p[r] + k; }
  };
  template <int R>
  SEQKERN_INLINE Bound<R> bind() const {
    Bound<R> bound;
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) bound.p[r] = row[r] + k0;
    return bound;
  }
};

// The columns of a matrix that lies in a near cache: a(r, k) = data[k * ld + r].
template <class A>
struct ColumnRows {
  const A* data;
  int64_t ld;
  ColumnRows from(int64_t r) const { return {data + r, ld}; }
  template <int R>
  struct Bound {
    const A* data;
    int64_t ld;
    SEQKERN_INLINE const A* at(int r, int64_t k) const { return data + k * ld + r; }
  };
  template <int R>
  SEQKERN_INLINE Bound<R> bind() const {
    return {data, ld};
  }
};

// Of one tile, packed as [K / kPair][R][kPair] (R is the tile's own number of rows).
template <class A>
struct PackedRows {
  const A* data;
  PackedRows from(int64_t) const { return *this; }
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

// Evenly spaced, for AMX: a(r, k) = data[r * ld + k], zero from K to a multiple of kDeep.
template <class A>
struct SpacedRows {
  const A* data;
  int64_t ld;
};

// Elements from one row to the next: an odd number of cache lines, so that rows differ in their
// sets.
template <class A>
constexpr int64_t odd_lines(int64_t K) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(A));
  return (ceil_div(K, kLine) | 1) * kLine;
}

// Rows of at most K values stored as S: pointers to where they lie, or copies of them where they
// have to be converted or spaced evenly, or where kNear says that they are read again and again but
// may lie a power of two apart, so that few of them fit in L1 at a time.
template <class S, bool kNear = false>
struct Rows {
  using A = Operand<S>;
  static constexpr bool kCopies = kNear || !__is_same(S, A) || kMatrix<A>;
  const A** row;  // [n]
  A* copy;        // [n][ld]
  int64_t ld;

  static Rows carve(Scratch& scratch, int64_t n, int64_t K) {
    Rows rows{};
    rows.ld = odd_lines<A>(K);
    rows.row = scratch.take<const A*>(n);
    if (kCopies) rows.copy = scratch.take<A>(n * rows.ld);
    return rows;
  }

  SEQKERN_INLINE void set(int64_t i, const S* values, int64_t K) const {
    if constexpr (kCopies) {
      A* to = copy + i * ld;
      if constexpr (__is_same(S, A))
        memcpy(to, values, size_t(K) * sizeof(A));
      else
        convert(to, values, K);
      if constexpr (kMatrix<A>) memset(to + K, 0, size_t(round_up(K, kDeep<A>) - K) * sizeof(A));
      row[i] = to;
    } else {
      row[i] = values;
    }
  }

  // All of them, from k0 on.
  auto from(int64_t k0) const {
    if constexpr (kMatrix<A>)
      return SpacedRows<A>{copy + k0, ld};
    else
      return PointerRows<A>{row, k0};
  }
};

// ---- products -----------------------------------------------------------------------------------

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
constexpr int64_t kRoundK = 64;

// Memory that is wanted soon: the next panel, of which each tile of this one fetches its share into
// L2. Where the weights do not stay in L2, their way from L3 is hidden behind the products.
struct Ahead {
  const char* data;
  int64_t step;  // bytes per k (per pair)
};
constexpr int64_t kAheadInPanel = 1024;  // bytes from what is read of a panel to what is fetched

// out[r][v] = init[r][v] + sum_k a(r, k) * panel(k, v); init null: 0. out may be init.
// ld_*: elements from one row to the next.
template <class A, int R, int NV, class Rows>
__attribute__((noinline)) void tile_kernel(Compute<A>* out, int64_t ld_out, const Compute<A>* init,
                                           int64_t ld_init, Rows rows, const A* panel, int64_t K,
                                           Ahead ahead) {
  using C = Compute<A>;
  using V = Vec<C>;
  constexpr int L = kLanes<C>;
  // A few rows alone would wait for their own sums: they keep several, over interleaved k, in
  // registers that are free; shorter sums are rounded less, too.
  constexpr int kFree = kVecRegisters * 3 / 4 / (R * NV);
  constexpr int kSums = kFree >= 4 ? 4 : kFree >= 2 ? 2 : 1;
  constexpr int64_t kStep = NV * L * kPair<A>;  // elements of the panel per k (per pair)
  const auto a = rows.template bind<R>();
  const int64_t whole = K / kPair<A>;
  int64_t k = 0;
  // What the sums are added to, or stored over, is fetched meanwhile: it may be far away.
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++)
      __builtin_prefetch((init ? init + r * ld_init : out + r * ld_out) + v * L);
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
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++)
          __builtin_prefetch(
              (const char*)(panel + (k + s) * kStep + v * L * kPair<A>)+kAheadInPanel);
        __builtin_prefetch(ahead.data, 0, 2);
        __builtin_prefetch(ahead.data + ahead.step / 2, 0, 2);
        ahead.data += ahead.step;
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

// n things in tiles of at most `most`, as even as possible: tile i of ceil_div(n, most) starts
// here.
SEQKERN_INLINE int64_t tile_start(int64_t n, int most, int64_t i) {
  return n * i / ceil_div(n, most);
}

// The same with the number of rows known at run time.
template <class A, int NV, class Rows>
void tile(int rows, Compute<A>* out, int64_t ld_out, const Compute<A>* init, int64_t ld_init,
          Rows a, const A* panel, int64_t K, Ahead ahead) {
#define SEQKERN_CASE(R)                                                      \
  case R:                                                                    \
    if constexpr (R <= max_rows(NV))                                         \
      tile_kernel<A, R, NV>(out, ld_out, init, ld_init, a, panel, K, ahead); \
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

template <class A, int NV, class Rows, class Then>
void multiply_panel(int64_t n, Compute<A>* out, int64_t ld_out, const Compute<A>* init,
                    int64_t ld_init, Rows a, const A* panel, const A* next, int64_t K,
                    const Then& then) {
  constexpr int most = max_rows(NV);
  const int64_t tiles = ceil_div(n, most);
  const int64_t bytes = panel_size<A>(K, NV) * int64_t(sizeof(A));
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t r0 = tile_start(n, most, i), r1 = tile_start(n, most, i + 1);
    Ahead ahead{(const char*)panel, 0};
    if (next != panel)
      ahead = {(const char*)next + bytes * i / tiles,
               NV * kLanes<Compute<A>> * kPair<A> * int64_t(sizeof(A)) / tiles};
    tile<A, NV>(int(r1 - r0), out + r0 * ld_out, ld_out, init ? init + r0 * ld_init : init, ld_init,
                a.from(r0), panel, K, ahead);
    then(r0, r1);
  }
}

// out[r][v] = init[r][v] + sum_k a(r, k) * panel(k, v) for n rows and nv vectors; init null: 0. out
// may be init. next: the panel that will be multiplied after this one, or this one. Calls
// then(r0, r1) when the rows from r0 to r1 are done.
template <class A, class Rows, class Then>
void multiply_panel(int64_t n, int nv, Compute<A>* out, int64_t ld_out, const Compute<A>* init,
                    int64_t ld_init, Rows a, const A* panel, const A* next, int64_t K,
                    const Then& then) {
#if defined(__AMX_BF16__)
  if constexpr (kMatrix<A>) {
    for (int64_t r0 = 0; r0 < n; r0 += 2 * kTileRows) {
      const int rows = int(n - r0 < 2 * kTileRows ? n - r0 : 2 * kTileRows);
      (rows <= kTileRows ? multiply_tiles_16 : multiply_tiles_32)(
          rows, nv, out + r0 * ld_out, ld_out, init ? init + r0 * ld_init : init, ld_init,
          a.data + r0 * a.ld, a.ld, panel, K);
      then(r0, r0 + rows);
    }
    return;
  }
#endif
  if constexpr (!kMatrix<A>) {
    switch (nv) {
      case 1:
        return multiply_panel<A, 1>(n, out, ld_out, init, ld_init, a, panel, next, K, then);
      case 2:
        return multiply_panel<A, 2>(n, out, ld_out, init, ld_init, a, panel, next, K, then);
      case 3:
        return multiply_panel<A, 3>(n, out, ld_out, init, ld_init, a, panel, next, K, then);
      case 4:
        return multiply_panel<A, 4>(n, out, ld_out, init, ld_init, a, panel, next, K, then);
    }
  }
}

template <class A, class Rows>
void multiply_panel(int64_t n, int nv, Compute<A>* out, int64_t ld_out, const Compute<A>* init,
                    int64_t ld_init, Rows a, const A* panel, const A* next, int64_t K) {
  multiply_panel(n, nv, out, ld_out, init, ld_init, a, panel, next, K, [](int64_t, int64_t) {});
}

// ---- packing ------------------------------------------------------------------------------------

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
  const int64_t padded = round_up(K, kDeep<A>);
  for (int v = 0; v < nv; v++)
    for (int64_t k0 = 0; k0 < padded; k0 += L) {  // blocks of L rows by L columns
      V block[L];
      const int64_t columns = K - k0;
#pragma GCC unroll 16
      for (int lane = 0; lane < L; lane++)
        block[lane] = lane < valid[v] ? load_first(w + (base[v] + lane) * ld + k0, columns) : V{};
      transpose(block);
#pragma GCC unroll 16
      for (int k = 0; k < L; k += P) {
        if (k0 + k >= padded) break;
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

// panel(k, n) = row[k][first + n] for n < columns, else 0: outputs are columns, one pointer per k.
template <class A, class S>
void pack_panel_of_columns(A* panel, const S* const* row, int64_t K, int nv, int64_t columns,
                           int64_t first = 0) {
  using C = Compute<A>;
  constexpr int L = kLanes<C>, P = kPair<A>;
  for (int64_t k = 0; k < round_up(K, kDeep<A>); k += P)
    for (int v = 0; v < nv; v++) {
      A* out = panel + (k / P * nv + v) * L * P;
      if constexpr (P == 1) {
        store(out, load_first(row[k] + first + v * L, columns - v * L));
      } else {
        static_assert(sizeof(S) == sizeof(A));  // pairs are bf16 on both sides: no conversion
        const int64_t n = first + v * L;
        const VecU even = k < K ? load_bits(row[k] + n, columns - v * L) : VecU{};
        const VecU odd = k + 1 < K ? load_bits(row[k + 1] + n, columns - v * L) : VecU{};
        const VecU pairs = even | odd << 16;
        memcpy(out, &pairs, sizeof pairs);
      }
    }
}

// Columns as the rows of a product, a(r, k) = a[k * ld + r]: at most so many at a time, packed into
// packed_tile_size(K) elements.
template <class A>
constexpr int kColumnTile = kMatrix<A> ? 2 * kTileRows : max_rows(kMaxNV);
template <class A>
constexpr int64_t packed_tile_size(int64_t K) {
  return kColumnTile<A> * (kMatrix<A> ? odd_lines<A>(K) : round_up(K, kPair<A>));
}

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
  if constexpr (kMatrix<A>) {  // squares of 16 pairs of k by 16 columns, turned
    const int64_t ld_out = odd_lines<A>(K);
    for (int64_t k = 0; k < K; k += 2 * kLanes<float>)
      for (int r = 0; r < rows; r += kLanes<float>) {
        VecU square[kLanes<float>];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<float>; i++) {
          const A* even = a + (k + 2 * i) * ld + r;
          square[i] = k + 2 * i < K ? load_bits(even, rows - r) : VecU{};
          if (k + 2 * i + 1 < K) square[i] |= load_bits(even + ld, rows - r) << 16;
        }
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<float>; i++)
          memcpy(out + (r + i) * ld_out + k, &square[i], sizeof square[i]);
      }
  } else {
    static_assert(kColumnTile<A> <= 6);
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
}

template <class A>
auto packed_tile(const A* packed, int64_t K) {
  if constexpr (kMatrix<A>)
    return SpacedRows<A>{packed, odd_lines<A>(K)};
  else
    return PackedRows<A>{packed};
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
