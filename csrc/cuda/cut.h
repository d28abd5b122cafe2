// How a persistent kernel cuts its work and its shared memory: what plan.cpp (host) and
// exchange.cuh, matrix.cuh and recurrence.cuh (device) must agree on.
//
// Units (of h, or before a projection) come in *tiles* of 16, the sum over k in *chunks* of 64
// bytes of k (32 numbers of 16 bits, 16 of 32 bits), the batch in *columns* of 8 rows.
//
// A step is one *leg*: a matrix in place times a vector that the blocks of a group exchange, then
// what happens to its results unit by unit. With a projection it is two legs; the results of each
// are the vector of the other. So it is with a cell's second product, of U (kernels.h's
// matrix_shape).
//   forward    W_hh h -> gates -> h                projected: W_hh h -> gates -> m;  W_hr m -> h
//                                                  second:    W_hh h -> gates -> mid;
//                                                             U mid -> gates -> h
//   backward   W_hh^T dpre -> dh -> gates -> dpre  projected: W_hh^T dpre -> dh;
//                                                             W_hr^T dh -> gates -> dpre
//                                                  second:    W_hh^T dpre -> dh -> gates -> dpre';
//                                                             U^T dpre' -> gates -> dpre
#pragma once

#include <cstdint>

#include "plan.h"

#ifdef __CUDACC__
#define SEQKERN_BOTH __host__ __device__
#else
#define SEQKERN_BOTH
#endif

namespace seqkern::cuda {

constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kWarps * 32;
constexpr int kTile = 16;        // units
constexpr int kColumn = 8;       // rows of the batch
constexpr int kChunkBytes = 64;  // of k, one row
constexpr int kMostItems = 2;    // (row, unit) pairs whose state a thread keeps: 1 or 2; so
constexpr int kMostTileRows = kMostItems * kThreads / kTile;  // tiles * batch of a block

// Chunks of the first leg's matrix that a warp keeps in registers, 8 of each per lane and row of
// tiles. The others lie in shared memory, and so do the second leg's. `three`: of 3 x TF32, whose
// parts and separate sums want registers too.
SEQKERN_BOTH constexpr int register_chunks(int legs, int leg, int m, bool three) {
  if (leg == 1) return 0;
  if (legs == 2) return m == 1 ? (three ? 8 : 12) : three ? 2 : 3;
  return m == 1 ? (three ? 9 : 12) : m == 3 ? (three ? 4 : 5) : three ? 3 : 4;
}

// Partial sums of a tile of units and a column, [8][16 units] with what follows a row so that banks
// do not conflict: of m = 1 a float each, else a float4, of which gate m is the m-th.
constexpr int kSumStride = 20;   // floats from one row to the next, m = 1
constexpr int kSumStride4 = 17;  // float4s
SEQKERN_BOTH constexpr int sum_bytes(int m) {
  return kColumn * (m == 1 ? kSumStride * 4 : kSumStride4 * 16);
}

SEQKERN_BOTH constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Chunks that warp `split` of `splits` starts at.
SEQKERN_BOTH constexpr int first_chunk(int chunks, int split, int splits) {
  return int(int64_t(chunks) * split / splits);
}

struct LegShape {
  int tiles;            // of units that the matrix gives
  int m;                // rows of tiles of the matrix per tile of units
  int tile_bytes;       // of k per tile of the vector: what such a tile gives one row of the batch
  int chunks;           // of k
  int register_chunks;  // of them, per warp
};

// What a cell, a pass and a projection make of the sizes.
struct Shape {
  int numbers;   // of each unit that lie in shared memory: biases, or the gains and biases of rows
  int row_sums;  // exchanges of sums over a row, per step (normalised.cuh)
  int legs;
  LegShape leg[2];
};

SEQKERN_BOTH constexpr LegShape leg_shape(int64_t units, int m, int64_t vector_units, int numbers,
                                          int element_bytes) {
  LegShape leg{};
  leg.tiles = int(divide_up(units, kTile));
  leg.m = m;
  leg.tile_bytes = kTile * element_bytes * numbers;
  leg.chunks = int(divide_up(divide_up(vector_units, kTile) * leg.tile_bytes, kChunkBytes));
  return leg;
}

constexpr Shape shape_of(CellKind cell, int element_bytes, Pass pass, int64_t H, int64_t P,
                         bool projected, bool three) {
  Shape shape{};
  const CellShape& of = cell_shape(cell);
  shape.numbers = of.slots;
  if (of.rows) {
    const int states = of.states - 1;  // an LSTM's c is normalised, too
    shape.numbers = 2 * (of.hidden_gates + states);
    shape.row_sums = 1 + states;
  }
  shape.legs = projected || of.mid > 0 ? 2 : 1;
  if (pass == Pass::forward) {
    shape.leg[0] = leg_shape(H, of.first_gates, P, 1, element_bytes);
    if (of.mid > 0)
      shape.leg[1] = leg_shape(H, of.mid_slots, H, of.mid, element_bytes);
    else if (projected)
      shape.leg[1] = leg_shape(P, 1, H, 1, element_bytes);
  } else {
    shape.leg[0] = leg_shape(P, 1, H, of.first_gates, element_bytes);
    if (of.mid > 0)
      shape.leg[1] = leg_shape(H, of.mid, H, of.mid_slots, element_bytes);
    else if (projected)
      shape.leg[1] = leg_shape(H, 1, P, 1, element_bytes);
  }
  for (int i = 0; i < shape.legs; i++)
    shape.leg[i].register_chunks = register_chunks(shape.legs, i, shape.leg[i].m, three);
  return shape;
}

// The leg whose results are leg i's vector.
SEQKERN_BOTH constexpr int source_of(int legs, int i) { return legs - 1 - i; }

// Byte offsets in shared memory.
struct SharedLayout {
  int64_t exchange[2];  // [leg] of [2][columns][chunks][8][64]; not with Tier::grid
  int64_t weights[2];   // [leg] of [warps][chunks beyond the registers'][m][2][32] of 16 bytes
  int64_t sums;         // [tiles][columns][splits] of sum_bytes(m), the legs in turn
  int64_t stage;        // [kWarps][stage_bytes]
  int64_t numbers;      // [tiles * 16][Shape::numbers] float
  int64_t row_sums;     // [2][row_sum_bytes]; not with Tier::grid
  int64_t barriers;     // [leg][2] of 8 bytes, then those of the sums over rows
  int64_t bytes;        // of it all
  int stage_bytes;      // a granule's of either leg
};

// What the tiles of a group give to the sums over the rows of a slice: 16 bytes for two rows.
SEQKERN_BOTH constexpr int row_sum_bytes(int batch, int tiles) { return batch / 2 * tiles * 16; }

SEQKERN_BOTH constexpr SharedLayout shared_layout(const Shape& shape, const Plan& plan) {
  const int64_t columns = plan.batch / kColumn;
  SharedLayout at{};
  int64_t next = 0, sums = 0;
  for (int i = 0; i < shape.legs; i++) {
    const LegShape& leg = shape.leg[i];
    at.exchange[i] = next;
    if (plan.tier != Tier::grid) next += 2 * columns * leg.chunks * kColumn * kChunkBytes;
    const int64_t warps = plan.tiles[i] * plan.splits[i];
    const int64_t beyond = divide_up(leg.chunks, plan.splits[i]) - leg.register_chunks;
    at.weights[i] = next;
    if (beyond > 0) next += warps * beyond * leg.m * 1024;
    const int64_t bytes = warps * columns * sum_bytes(leg.m);
    if (bytes > sums) sums = bytes;
    if (2 * leg.tile_bytes > at.stage_bytes) at.stage_bytes = 2 * leg.tile_bytes;
  }
  at.sums = next;
  at.stage = at.sums + sums;
  at.numbers = at.stage + kWarps * at.stage_bytes;
  at.row_sums = at.numbers + shape.numbers * plan.tiles[0] * kTile * 4;
  at.barriers = at.row_sums;
  if (shape.row_sums > 0 && plan.tier != Tier::grid)
    at.barriers += 2 * row_sum_bytes(plan.batch, shape.leg[0].tiles);
  at.bytes = at.barriers + 48;
  return at;
}

}  // namespace seqkern::cuda
