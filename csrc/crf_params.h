// What the kernels of the conditional random field are handed: csrc/cpu/crf.h. No torch header.
//
// Letters: T steps, B batch, K tags.
#pragma once

#include "params.h"

namespace seqkern {

struct CrfParams {
  Dtype dtype;  // f32 or f64: of all values
  int64_t T, B, K;
  int threads;
  const void* emissions;  // (t, b, k) at [t * emissions_of_step + b * emissions_of_row + k]
  int64_t emissions_of_step, emissions_of_row;
  const void* start;        // [K]
  const void* end;          // [K]
  const void* transitions;  // [K, K], from row to column
  const int64_t* tags;      // (t, b) at [t * tags_of_step + b * tags_of_row]; null: none
  int64_t tags_of_step, tags_of_row;
  const int64_t* count;  // [B] steps of row b that count: at least 1
  const int64_t* order;  // [B] the rows, those of most steps first
  const int32_t* step;   // [B, T] the i-th step of row b that counts; null: step i
  void* scratch;         // as many bytes as the *_scratch function asked for, 64-byte aligned
};

constexpr int64_t kCrfPad = 16;  // rows of alphas are padded to a multiple of it

// Overwrites value, and alphas at each row's first `count` steps.
struct CrfForwardParams : CrfParams {
  void* value;   // [B] the tags' log-likelihood, or without tags log Z
  void* alphas;  // [B, T, padded K]: what backward needs; null: not kept
};

// Overwrites all of demissions and of the parameters' gradients.
struct CrfBackwardParams : CrfParams {
  const void* dvalue;  // [B]
  const void* alphas;  // forward's
  void* demissions;    // as emissions
  int64_t demissions_of_step, demissions_of_row;
  void* dstart;        // [K]; null: none of the three is wanted
  void* dend;          // [K]
  void* dtransitions;  // [K, K]
};

// Overwrites best and scores.
struct CrfDecodeParams : CrfParams {
  int64_t n;      // sequences per row, at least 1
  int64_t* best;  // [n, B, T], -1 behind the last step that counts
  void* scores;   // [n, B]
};

// One instruction set's kernels.
struct CrfKernels {
  size_t (*forward_scratch)(const CrfForwardParams&);  // bytes
  void (*forward)(const CrfForwardParams&);
  size_t (*backward_scratch)(const CrfBackwardParams&);
  void (*backward)(const CrfBackwardParams&);
  size_t (*decode_scratch)(const CrfDecodeParams&);
  void (*decode)(const CrfDecodeParams&);
};

}  // namespace seqkern
