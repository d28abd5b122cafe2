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
  BatchRows dcontext;    // rows of D; absent: zero
  const void* dweights;  // as weights; null: zero
  void* dq;              // [B, L, H]
  void* dk;              // [B, S, H]
  void* dv;              // [H]
  void* dvalue;          // [B, S, D]
};

}  // namespace seqkern
