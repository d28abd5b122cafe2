// What the kernels are handed: plain structs, every pointer with its shape. No torch header.
//
// Letters: T steps, B batch, I input, H hidden, P size of h (H, or proj_size), D directions, G
// gates. Rows are counted in packed order: the rows that are alive at step 0, then those alive at
// step 1, ... Within a step they are sorted by length, longest first, so the rows alive at a step
// are a prefix.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cells.h"

namespace seqkern {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class Dtype { f32, f64, bf16, f16 };

constexpr int kMostDirections = 64;  // heads of both directions

// Where the rows of a (padded, ragged or packed) batch of sequences lie.
struct Sequence {
  int64_t T, B, rows;     // rows = sum of active
  const int64_t* active;  // [T] rows alive at step t, non-increasing
  const int64_t* first;   // [T] packed index of step t's first row
  const int64_t* row;     // [B] the batch row that sorted row j is
};

// A tensor of one row of values per (t, j): element (t, j, k) is at data[step[t] + row[j] * stride
// + k].
struct RowTensor {
  void* data;           // may be null: absent
  const int64_t* step;  // [T] element offset of step t
  int64_t stride;       // elements from one batch row to the next
};

struct Weights {              // of one direction, in PyTorch's layout; contiguous
  const void* w_ih;           // [G*H, I]
  const void* w_hh;           // [G*H, P], or [H]
  const void* b_ih;           // [G*H] or null
  const void* b_hh;           // [G*H] or null
  const void* w_hr;           // [P, H] or null
  const void* own[kMostOwn];  // the cell's own (cells.h); null where there is none
};

struct WeightGradients {  // overwritten; null where the weight is
  void* w_ih;
  void* w_hh;
  void* b_ih;
  void* b_hh;
  void* w_hr;
  void* own[kMostOwn];
};

// What regularisers do within the recurrence.
struct Regularisers {
  bool on;            // anything but `scale`
  RowTensor mask;     // bytes, rows of D*H: bit 0 keeps h, bit 1 the other states, bit 2 drops the
                      // candidate. May be absent
  const void* scale;  // [D, B, P]: multiplies h where it enters a product; may be null
  double keep_h, keep_c;        // without a mask: how much of the state before is kept
  double candidate_scale;       // of a candidate that a mask does not drop
  double cell_clip, proj_clip;  // bounds of the cell state, of the projected h; infinity: none
};

struct LayerParams {
  CellKind cell;
  Dtype dtype;
  int64_t I, H, P, D;
  int64_t reverse;  // directions from this one on run from the last step to the first
  int threads;
  Sequence seq;
  Weights weights[kMostDirections];     // [D]
  RowTensor x;                          // rows of I
  RowTensor y;                          // rows of D*P
  const void* h0;                       // [D, B, P]
  const void* state0[kMostStates - 1];  // [D, B, H]: c, ...
  void* reserve;  // [rows, D, reserve_width]: what backward needs; null: not kept
  void* scratch;  // as many bytes as the *_scratch function asked for, 64-byte aligned
  Regularisers regularisers;
  double eps;  // of normalised rows
};

// Elements of the reserve per row and direction.
inline int64_t reserve_width(const CellShape& shape, bool regularised, int64_t H) {
  return saved_values(shape, regularised) * ((H + 15) / 16 * 16) +
         (shape.rows ? kStatisticsElements : 0);
}

// Forward overwrites y at every row alive, h_n, state_n and reserve.
struct ForwardParams : LayerParams {
  void* h_n;                       // [D, B, P]
  void* state_n[kMostStates - 1];  // [D, B, H]
};

// Backward overwrites everything below; rows of dx that are not alive are left alone.
struct BackwardParams : LayerParams {
  RowTensor dy;                           // rows of D*P; absent: zero
  const void* dh_n;                       // [D, B, P]; null: zero
  const void* dstate_n[kMostStates - 1];  // [D, B, H]; null: zero
  RowTensor dx;                           // rows of I; absent: not wanted
  void* dh0;                              // [D, B, P]
  void* dstate0[kMostStates - 1];         // [D, B, H]
  bool need_dweights;
  WeightGradients dweights[kMostDirections];  // [D]
};

// The random bits of a layer's Regularisers (seqkern/reference/masks.py): overwrites mask [rows, D,
// H].
struct MaskParams {
  int64_t rows, D, H;
  int threads;
  int64_t seed;
  const int64_t *t, *b;               // [rows]: a row's step, and its place in the batch
  uint32_t threshold[3];              // of each bit, out of 65536; 0: never
  int64_t first_stream, stream_step;  // of direction 0 and bit 0; from one direction to the next
  uint8_t* mask;
};

// ---- attention ----------------------------------------------------------------------------------
//
// Letters: N query heads, Nk heads of keys and values, L queries, S keys, E head dim of q and k, Ev
// of v.

// One sequence. Its rows lie at batch, from query_row and key_row on; it is told by its own counts:
// its query i is the l0 + i-th, its key j the s0 + j-th, and dropout counts by these and
// `sequence`.
struct AttentionPiece {
  int64_t batch, sequence;
  int64_t l0, L, query_row;
  int64_t s0, S, key_row;
  int64_t offset;  // the diagonal: (s0 + j) - (l0 + i) - offset = 0
};

// Element (batch, head, row, e) is at data[batch * of_batch + head * of_head + row * of_row + e].
struct HeadTensor {
  void* data;  // may be null: absent, or not wanted
  int64_t of_batch, of_head, of_row;
};

struct AttentionParams {
  Dtype dtype;  // f32, bf16 or f16
  int64_t N, Nk, E, Ev;
  int threads;
  int64_t pieces;
  const AttentionPiece* piece;  // [pieces]
  HeadTensor q, k, v;           // rows of E, E, Ev; the heads of k and v are Nk
  // Added to the scores, or, of bytes, blocking where it is 0. Null: none. Strides may be 0.
  const float* bias;
  const uint8_t* allowed;
  int64_t mask_of_batch, mask_of_head, mask_of_query, mask_of_key;
  const uint8_t* key_valid;  // [B, S] or null; where it is 0, k and v are zero
  int64_t key_valid_of_batch;
  const uint8_t* query_valid;  // [B, L] or null
  int64_t query_valid_of_batch;
  float scale;
  int64_t left, right;  // keys with -left <= s - l - offset <= right are allowed; -1: no limit
  float dropout_p;      // below 1
  int64_t seed;
  void* scratch;  // as many bytes as the *_scratch function asked for, 64-byte aligned
};

// Overwrites out, lse and weights where a piece has queries (and keys).
struct AttentionForwardParams : AttentionParams {
  HeadTensor out;      // rows of Ev
  HeadTensor lse;      // float, rows of 1; may be absent
  HeadTensor weights;  // float, rows of S; the batch dim counts sequences; may be absent
  bool average;        // weights: the heads' mean, of_head is 0
};

// Overwrites dq where a piece has queries, dk and dv where it has keys.
struct AttentionBackwardParams : AttentionParams {
  HeadTensor dout, out, lse;  // as forward's
  HeadTensor dq, dk, dv;      // as q, k, v
};

struct AdditiveForwardParams;  // additive_params.h
struct AdditiveBackwardParams;
struct AdditiveStepParams;
struct GatesParams;

// One instruction set's kernels.
struct KernelTable {
  const char* name;
  size_t (*forward_scratch)(const ForwardParams&);  // bytes
  void (*forward)(const ForwardParams&);
  size_t (*backward_scratch)(const BackwardParams&);  // bytes
  void (*backward)(const BackwardParams&);
  void (*recurrent_mask)(const MaskParams&);
  size_t (*attention_forward_scratch)(const AttentionForwardParams&);
  void (*attention_forward)(const AttentionForwardParams&);
  size_t (*attention_backward_scratch)(const AttentionBackwardParams&);
  void (*attention_backward)(const AttentionBackwardParams&);
  size_t (*additive_forward_scratch)(const AdditiveForwardParams&);
  void (*additive_forward)(const AdditiveForwardParams&);
  size_t (*additive_backward_scratch)(const AdditiveBackwardParams&);
  void (*additive_backward)(const AdditiveBackwardParams&);
  size_t (*additive_step_scratch)(const AdditiveStepParams&);
  void (*additive_step_pack)(const AdditiveStepParams&);  // wants no scratch
  void (*additive_step)(const AdditiveStepParams&);
  void (*gates_forward)(const GatesParams&);
  void (*gates_backward)(const GatesParams&);
  // For the tests: y[i] = f(x[i]), f one of "sigmoid", "tanh".
  void (*activation)(const char* f, const float* x, float* y, int64_t n);
  // For the benchmarks: billions of floating-point operations (bytes read) per second, all threads
  // together.
  double (*fma_peak)(int threads, double seconds);
  double (*read_bandwidth)(int threads, int64_t bytes, double seconds);
};

}  // namespace seqkern
