// What the kernels of additive attention are handed. No torch header.
//
// Letters: B batch, L queries, S keys, H size of the projected queries and keys, D of the values.
#pragma once

#include "params.h"

namespace seqkern {

// Element (b, r, i) is at data[b * of_batch + r * of_row + i].
struct BatchRows {
  void* data;  // may be null: absent, or not wanted
  int64_t of_batch, of_row;
};

struct AdditiveParams {
  Dtype dtype;
  int64_t B, L, S, H, D;
  int threads;
  BatchRows q, k, value;  // rows of H, H, D
  const void* v;          // [H]
  const int64_t* key;  // [B, S]: row b's first keys[b] are its valid keys, ascending; null: all are
  const int64_t* keys;  // [B], or null
  void* weights;        // [B, L, S], float (double for f64)
  void* scratch;        // as many bytes as the *_scratch function asked for, 64-byte aligned
};

// Overwrites context and weights.
struct AdditiveForwardParams : AdditiveParams {
  void* context;  // [B, L, D]
};

// Overwrites dq and dv, and dk and dvalue at valid keys. Null: not wanted.
struct AdditiveBackwardParams : AdditiveParams {
  const void* ds;        // [B, L, S] gradient of the scores, of valid keys; null: not known yet
  BatchRows dcontext;    // rows of D; absent: zero
  const void* dweights;  // as weights; null: zero
  void* dq;              // [B, L, H]
  void* dk;              // [B, S, H]
  void* dv;              // [H]
  void* dvalue;          // [B, S, D]
};

// One query of each sequence, the t-th of L, with keys packed once for all of them. A kernel
// computes forward where context is given, backward where dq is.
struct AdditiveStepParams : AdditiveParams {
  void* packed;     // [B, S, 2, H rounded up to kPackedMultiple], float (double for f64)
  uint8_t* within;  // [B] how each sequence is packed
  int64_t t;
  BatchRows context;     // rows of D
  BatchRows dcontext;    // rows of D
  const void* dweights;  // as weights; null: zero
  void* ds;              // as weights, of valid keys
  BatchRows dq;          // rows of H
};

constexpr int64_t kPackedMultiple = 16;

// One step of an LSTM or a GRU whose products are made. Rows of a gates tensor: PyTorch's order.
struct GatesParams {
  CellKind cell;
  Dtype dtype;  // f32 or f64
  int64_t B, H;
  int threads;
  BatchRows of_input, of_hidden;  // [B, 1, G*H] W_ih x + b_ih, W_hh h + b_hh; or their gradients
  const void *h_prev, *c_prev;    // [B, H]; c: LSTM only
  void *h, *c;                    // [B, H]: overwritten; backward: h is read, c is not looked at
  void* saved;                    // [B, kSaved, H]
  const void* dh;                 // [B, H]: backward
  void *dc, *dh_prev;  // [B, H]: dc of c in, of c_prev out; dh_prev: past W_hh, overwritten
};

}  // namespace seqkern
