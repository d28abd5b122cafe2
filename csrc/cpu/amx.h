// AMX: products of bfloat16 matrices by tiles of 16 rows of 64 bytes, eight of them in registers.
//
// A tile of weights is 16 pairs of k by 16 outputs, which is how a panel (gemm.h) lies in memory; a
// tile of rows is 16 rows by 32 k. Sums are float32; subnormal values count as zero.
#pragma once

#include "vec.h"

namespace seqkern {
namespace SEQKERN_ISA {

constexpr int kTileRows = 16;
constexpr int kTileK = 32;

#if defined(__AMX_BF16__)

// asm, because GCC 12's intrinsics do not tell the compiler that they read and write memory.
#define SEQKERN_TILE_LOAD(t, base, ld)                                                          \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t::"r"(base), "r"((ld) * int64_t(sizeof(*(base)))) \
               : "memory")
#define SEQKERN_TILE_STORE(t, base, ld)                         \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(base), \
               "r"((ld) * int64_t(sizeof(*(base))))             \
               : "memory")
#define SEQKERN_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t::)
#define SEQKERN_TILE_MULTIPLY_ADD(sum, a, b) \
  asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum::)
#define SEQKERN_TILE_START(t, init, ld) \
  do {                                  \
    if (init)                           \
      SEQKERN_TILE_LOAD(t, init, ld);   \
    else                                \
      SEQKERN_TILE_ZERO(t);             \
  } while (0)

// The shapes of this thread's tiles: rows1 of tiles 0, 1, 4; rows2 of tiles 2, 3, 5; 16 of 6, 7.
inline thread_local int configured = 0;

inline void configure_tiles(int rows1, int rows2) {
  const int wanted = rows1 << 8 | rows2;
  if (configured == wanted) return;
  alignas(64) uint8_t config[64] = {1};  // palette 1; bytes per row from 16 on, rows from 48 on
  for (int t = 0; t < 8; t++) {
    config[16 + 2 * t] = 64;
    config[48 + t] = uint8_t(t == 0 || t == 1 || t == 4 ? rows1
                             : t == 6 || t == 7         ? kTileRows
                                                        : rows2);
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
  configured = wanted;
}

// Gives the tiles back at the end of a thread's work: a thread without them is cheaper to switch.
struct TilesInUse {
  ~TilesInUse() {
    if (configured) asm volatile("tilerelease");
    configured = 0;
  }
};

// out[r][v] = init[r][v] + sum_k a[r][k] panel(k, v) for up to 16 rows, 4 vectors at a time.
inline void multiply_tiles_16(int rows, int nv, float* out, int64_t ld_out, const float* init,
                              int64_t ld_init, const bf16* a, int64_t ld_a, const bf16* panel,
                              int64_t K) {
  constexpr int64_t L = kTileRows;
  const int64_t ld_w = nv * L * 2;
  configure_tiles(rows, rows);
  SEQKERN_TILE_START(0, init, ld_init);
  if (nv > 1) SEQKERN_TILE_START(1, init ? init + L : init, ld_init);
  if (nv > 2) SEQKERN_TILE_START(2, init ? init + 2 * L : init, ld_init);
  if (nv > 3) SEQKERN_TILE_START(3, init ? init + 3 * L : init, ld_init);
  for (int64_t k = 0; k < K; k += kTileK) {
    const bf16* w = panel + k / 2 * ld_w;
    SEQKERN_TILE_LOAD(4, a + k, ld_a);
    SEQKERN_TILE_LOAD(6, w, ld_w);
    SEQKERN_TILE_MULTIPLY_ADD(0, 4, 6);
    if (nv == 1) continue;
    SEQKERN_TILE_LOAD(7, w + 2 * L, ld_w);
    SEQKERN_TILE_MULTIPLY_ADD(1, 4, 7);
    if (nv == 2) continue;
    SEQKERN_TILE_LOAD(6, w + 4 * L, ld_w);
    SEQKERN_TILE_MULTIPLY_ADD(2, 4, 6);
    if (nv == 3) continue;
    SEQKERN_TILE_LOAD(7, w + 6 * L, ld_w);
    SEQKERN_TILE_MULTIPLY_ADD(3, 4, 7);
  }
  SEQKERN_TILE_STORE(0, out, ld_out);
  if (nv > 1) SEQKERN_TILE_STORE(1, out + L, ld_out);
  if (nv > 2) SEQKERN_TILE_STORE(2, out + 2 * L, ld_out);
  if (nv > 3) SEQKERN_TILE_STORE(3, out + 3 * L, ld_out);
}

// The same for 17 to 32 rows, 2 vectors at a time: each tile of weights serves twice.
inline void multiply_tiles_32(int rows, int nv, float* out, int64_t ld_out, const float* init,
                              int64_t ld_init, const bf16* a, int64_t ld_a, const bf16* panel,
                              int64_t K) {
  constexpr int64_t L = kTileRows;
  const int64_t ld_w = nv * L * 2;
  configure_tiles(kTileRows, rows - kTileRows);
  const bf16* a2 = a + kTileRows * ld_a;
  for (int v = 0; v < nv; v += 2, out += 2 * L, panel += 4 * L) {
    const bool two = nv - v > 1;
    float* out2 = out + kTileRows * ld_out;
    const float* start = init ? init + v * L : nullptr;
    const float* start2 = init ? start + kTileRows * ld_init : nullptr;
    SEQKERN_TILE_START(0, start, ld_init);
    SEQKERN_TILE_START(2, start2, ld_init);
    if (two) {
      SEQKERN_TILE_START(1, start ? start + L : start, ld_init);
      SEQKERN_TILE_START(3, start2 ? start2 + L : start2, ld_init);
    }
    for (int64_t k = 0; k < K; k += kTileK) {
      const bf16* w = panel + k / 2 * ld_w;
      SEQKERN_TILE_LOAD(4, a + k, ld_a);
      SEQKERN_TILE_LOAD(6, w, ld_w);
      SEQKERN_TILE_LOAD(5, a2 + k, ld_a);
      SEQKERN_TILE_MULTIPLY_ADD(0, 4, 6);
      SEQKERN_TILE_MULTIPLY_ADD(2, 5, 6);
      if (!two) continue;
      SEQKERN_TILE_LOAD(7, w + 2 * L, ld_w);
      SEQKERN_TILE_MULTIPLY_ADD(1, 4, 7);
      SEQKERN_TILE_MULTIPLY_ADD(3, 5, 7);
    }
    SEQKERN_TILE_STORE(0, out, ld_out);
    SEQKERN_TILE_STORE(2, out2, ld_out);
    if (two) {
      SEQKERN_TILE_STORE(1, out + L, ld_out);
      SEQKERN_TILE_STORE(3, out2 + L, ld_out);
    }
  }
}

#undef SEQKERN_TILE_LOAD
#undef SEQKERN_TILE_STORE
#undef SEQKERN_TILE_ZERO
#undef SEQKERN_TILE_MULTIPLY_ADD
#undef SEQKERN_TILE_START

#else

struct TilesInUse {};

#endif

}  // namespace SEQKERN_ISA
}  // namespace seqkern
