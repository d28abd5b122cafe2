// What csrc/cuda's kernels are handed and how they are launched. No torch header, no CUDA header:
// layer.cpp, which torch's side of a layer is, includes it.
//
// Letters: T steps, B batch, N rows, I input, H hidden, P size of h (H, or proj_size), D
// directions, G gates, S the stored dtype, C the dtype computed in (double for double, else float).
//
// A sequence's *step* s counts from its own beginning: of a reverse direction step 0 is the last
// valid time, t = length - 1 - s. A row (t, b) that is past its length is never read or written.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "plan.h"

namespace seqkern::cuda {

// Where the rows of a padded, ragged or packed batch lie. Device memory.
struct Rows {
  int64_t T, B, N;
  const int64_t* lengths;  // [B], clamped to 0..T; null: T each
  const int64_t* first;    // [T] the row of (t, 0), those of (t, 1), ... follow; null: t * B
};

// One layer's forward. Everything is contiguous, of S where nothing else is said, and 16-byte
// aligned.
struct ForwardParams {
  CellKind cell;
  Dtype dtype;
  Rows rows;
  int64_t H, P, D;
  const void* gx;       // [D, N, G*H] W_ih x, without bias
  const void* b_ih[2];  // [D] of [G*H], or null
  const void* b_hh[2];
  const void* h0;  // [D, B, P]
  const void* c0;  // [D, B, H], LSTM only
  void* y;         // [N, D*P] overwritten at valid rows
  void* h_n;       // [D, B, P] overwritten
  void* c_n;       // [D, B, H] overwritten, LSTM only
  void* reserve;   // [N, D, kSaved, Hp] of saved values (cell.h), Hp = H rounded up to 16;
                   // overwritten at valid rows; null: not kept
};

// One layer's backward, but for the products over all rows (dx, dW), which follow.
struct BackwardParams {
  CellKind cell;
  Dtype dtype;
  Rows rows;
  int64_t H, P, D;
  const void* dy;       // [N, D*P] or null
  const void* dh_n;     // [D, B, P] or null
  const void* dc_n;     // [D, B, H] or null
  const void* h0;       // [D, B, P]
  const void* c0;       // [D, B, H], LSTM only
  const void* y;        // [N, D*P]
  const void* reserve;  // as forward left it
  void* dpre;           // [D, N, kSlots*H] gradients of the pre-activations, overwritten at valid
                        // rows; in PyTorch's gate order, so W_ih's gates are the first G; a GRU has
                        // r z n n', n' being W_hn h's, so W_hh's are r z and n'
  void* dh_rows;  // [D, N, P] with a projection: the gradients of h, overwritten at valid rows
  void* dh0;      // [D, B, P] overwritten
  void* dc0;      // [D, B, H] overwritten, LSTM only
};

// ---- persistent (recurrence.cuh): one launch runs every step; not float64 -----------------------

struct Persistent {
  Plan plan;
  bool tf32;                 // float32: one TF32 product, else three, which is as good as float32
  const void* matrix[2][2];  // [D][leg], see matrix_shape
  void* exchange;            // exchange_bytes of zeros; Tier::grid only
  uint32_t* flags;           // flag_count of zeros; Tier::grid only
  int shared_limit;          // Facts::shared_bytes
};

// A leg's matrix (cut.h) is [m, rows, k], padded with zeros to whole tiles and to 64 bytes of k:
//   forward    0  W_hh [G, H, P]                1, with a projection  W_hr [1, P, H]
//   backward   0  W_hh transposed [1, P, G*H],  1                     W_hr transposed [1, H, P]
//                 gate g of unit u at k = (u / 16 * G + g) * 16 + u % 16
struct MatrixShape {
  int64_t rows, k;  // padded
};
MatrixShape matrix_shape(const PlanRequest& request, int leg);

size_t exchange_bytes(const PlanRequest& request, const Plan& plan);
size_t flag_count(const Plan& plan);

// On `stream` (a cudaStream_t) of the current device. False: the device does not let so many blocks
// run at a time (a share of it is reserved, say), and nothing was launched. Throw
// std::runtime_error when CUDA refuses for another reason.
bool persistent_forward(const ForwardParams& params, const Persistent& persistent, void* stream);
bool persistent_backward(const BackwardParams& params, const Persistent& persistent, void* stream);
// By cell, as these two choose:
bool lstm_forward(const ForwardParams& params, const Persistent& persistent, void* stream);
bool lstm_backward(const BackwardParams& params, const Persistent& persistent, void* stream);
bool gru_forward(const ForwardParams& params, const Persistent& persistent, void* stream);
bool gru_backward(const BackwardParams& params, const Persistent& persistent, void* stream);
bool rnn_forward(const ForwardParams& params, const Persistent& persistent, void* stream);
bool rnn_backward(const BackwardParams& params, const Persistent& persistent, void* stream);

// ---- step by step (stepwise.cu): one launch per step, W_hh's product between them; any dtype ---

// Step s of direction d, forward. Rows that are past their length keep h and c.
struct ForwardStep {
  int64_t d, s;
  const void* gh;  // [B, G*H] W_hh h, without bias
  void* h;         // [B, P] in: h before; out: after. With a projection read only
  void* c;         // [B, H] of C, in and out; LSTM only
  void* m;         // [B, H] h before the projection, overwritten, zero where the row is not valid;
                   // null without one
};
void step_forward(const ForwardParams& params, const ForwardStep& step, void* stream);

// With a projection, after step_forward and h_new = W_hr m: writes h_new to y and to h where the
// row is valid.
void step_store(const ForwardParams& params, int64_t d, int64_t s, const void* h_new, void* h,
                void* stream);

// Step s of direction d, backward, s falling.
struct BackwardStep {
  int64_t d, s;
  const void* dh_rec;  // [B, P] W_hh^T dpre of step s + 1; null at the last step
  const void* dm;      // [B, H] with a projection: W_hr^T dh; null without
  void* dh;            // [B, P] of C, in and out: what reaches h past W_hh. To begin with, dh_n
  void* dc;            // [B, H] of C, in and out; LSTM only
  void* dpre_h;        // [B, G*H] W_hh's part of dpre in W_hh's order, overwritten, zero where the
                       // row is not valid
};
void step_backward(const BackwardParams& params, const BackwardStep& step, void* stream);

// With a projection, before step_backward: dh_all = dh + dh_rec + dy at valid rows, else 0, to
// dh_all [B, P] and, where valid, to dh_rows; dh becomes 0 where valid.
void step_gather(const BackwardParams& params, const BackwardStep& step, void* dh_all,
                 void* stream);

// ---- for the products over all rows -------------------------------------------------------------

// h_prev [N, P] of direction d: h before each valid row's step, from y or h0; zero at other rows.
void gather_previous(const BackwardParams& params, int64_t d, void* h_prev, void* stream);

// m [N, H] of direction d, h before the projection, from the reserve; zero at rows not valid.
void gather_unprojected(const BackwardParams& params, int64_t d, void* m, void* stream);

// Writes numbers of the host's to the device's `to`. They travel as kernel arguments: no copy that
// waits, no host memory that must outlive the call or a graph that captures it.
void write_numbers(const int64_t* numbers, int64_t count, int64_t* to, void* stream);

}  // namespace seqkern::cuda
