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

#pragma GCC visibility push(default)  // exported: the torch side calls it
namespace seqkern::cuda {

// Where the rows of a padded, ragged or packed batch lie. Device memory.
struct Rows {
  int64_t T, B, N;
  const int64_t* lengths;  // [B], clamped to 0..T; null: T each
  const int64_t* first;    // [T] the row of (t, 0), those of (t, 1), ... follow; null: t * B
};

// params.h's, of the device.
struct Regularisers {
  bool on;              // anything but `scale`
  const uint8_t* mask;  // [N, D*H] or null
  const void* scale;    // [D, B, P] or null
  double keep_h, keep_c, candidate_scale, cell_clip, proj_clip;
};

// One layer. Everything is contiguous, of S where nothing else is said, and 16-byte aligned.
//
// `heads` directions go onwards through time, those from there on backwards; each *way* has one set
// of parameters, of which a head has its part.
struct LayerParams {
  CellKind cell;
  Dtype dtype;
  Rows rows;
  int64_t H, P, D, heads;
  const void* h0;                       // [D, B, P]
  const void* state0[kMostStates - 1];  // [D, B, H]: c, ...
  const void* own[2][kMostOwn];         // [way]: the cell's own (cells.h); an IndRNN's W_hh first
  const void* b_ih[2];                  // [way] of [heads, G*H], or null
  const void* b_hh[2];
  Regularisers regularisers;
  double eps;           // of normalised rows
  int64_t reserve_row;  // reserve_width
  int saved, planes;    // values that the reserve has of a unit; planes that dpre has
  bool saves_h;         // is h among the former, after the cell's own?
};

inline bool regularises(const LayerParams& p) {
  return p.regularisers.on || p.regularisers.scale != nullptr;
}

struct ForwardParams : LayerParams {
  const void* gx;                  // [D, N, G*H] W_ih x, without bias; see normalise_input
  void* y;                         // [N, D*P] overwritten at valid rows
  void* h_n;                       // [D, B, P] overwritten
  void* state_n[kMostStates - 1];  // [D, B, H] overwritten
  // [N, D, reserve_width]: per row and direction [saved_values, Hp], Hp = H rounded up to 16: the
  // cell's (cell.h), those of regularisers (cells.h), then a normalised row's statistics, of C.
  // Overwritten at valid rows; null: not kept.
  void* reserve;
};

// One layer's backward, but for the products over all rows (dx, dW), which follow.
struct BackwardParams : LayerParams {
  const void* dy;                         // [N, D*P] or null
  const void* dh_n;                       // [D, B, P] or null
  const void* dstate_n[kMostStates - 1];  // [D, B, H] or null
  const void* y;                          // [N, D*P]
  const void* reserve;                    // as forward left it
  // [D, N, planes*H] gradients of the pre-activations, overwritten at valid rows; in PyTorch's gate
  // order, so W_ih's gates are the first G; a GRU has r z n n', n' being W_hn h's, so W_hh's are r
  // z and n'. An inner cell's follow, and what is summed over all rows for a cell's own parameters.
  void* dpre;
  void* dh_rows;      // [D, N, P] with a projection: the gradients of h, overwritten at valid rows
  void* mid_rows[2];  // [D, N, H] with second products: what they multiply, likewise
  void* dh0;          // [D, B, P] overwritten
  void* dstate0[kMostStates - 1];  // [D, B, H] overwritten
};

// ---- persistent (recurrence.cuh): one launch runs every step; not float64 -----------------------

struct Persistent {
  Plan plan;
  bool tf32;                 // float32: one TF32 product, else three, which is as good as float32
  const void* matrix[2][2];  // [way][leg] of [heads] each, see matrix_shape
  void* exchange;            // exchange_bytes of zeros; Tier::grid only
  uint32_t* flags;           // flag_count of zeros; Tier::grid only
  int shared_limit;          // Facts::shared_bytes
};

// A leg's matrix (cut.h) is [m, rows, k], padded with zeros to whole tiles and to 64 bytes of k:
//   forward    0  W_hh [G, H, P]                1, with a projection  W_hr [1, P, H]
//   backward   0  W_hh transposed [1, P, G*H],  1                     W_hr transposed [1, H, P]
//                 gate g of unit u at k = (u / 16 * G + g) * 16 + u % 16
// Leg 0 has W_hh's first gates only where a cell has a second product; then leg 1 is, of V [slots,
// mid, H, H], which is the rest of W_hh or an inner cell's two matrices, zero where a slot has no
// part:
//   forward    V with (mid, unit) as k: [slots, H, mid*H]   backward   [mid, H, slots*H] likewise
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
// These three cells regularised; other cells of one product, regularised or not:
bool regularised_forward(const ForwardParams& params, const Persistent& persistent, void* stream);
bool regularised_backward(const BackwardParams& params, const Persistent& persistent, void* stream);
bool variant_forward(const ForwardParams& params, const Persistent& persistent, void* stream);
bool variant_backward(const BackwardParams& params, const Persistent& persistent, void* stream);
// And those of two products:
bool two_products_forward(const ForwardParams& params, const Persistent& persistent, void* stream);
bool two_products_backward(const BackwardParams& params, const Persistent& persistent,
                           void* stream);
// And those whose rows are normalised:
bool layer_norm_forward(const ForwardParams& params, const Persistent& persistent, void* stream);
bool layer_norm_backward(const BackwardParams& params, const Persistent& persistent, void* stream);

// ---- step by step (stepwise.cu): launches per step, products between them; any cell and dtype ---
//
// Every launch is for all directions. Rows that are past their length keep their states; in what is
// multiplied they are zero.

// Step s, forward.
struct ForwardStep {
  int64_t s;
  // [D, B, gates*H]: W_hh h_in (its first gates), without bias; then the second products, of mid
  const void* products[3];
  void* h;                       // [D, B, P] in: h before; out: after. With a projection read only
  void* h_in;                    // [D, B, P] out: scale * h; null without a scale
  void* state[kMostStates - 1];  // [D, B, H] of C, in and out
  void* mid[2];                  // [D, B, H] what step_begin makes
  void* held;                    // [D, B, values, H] of C: between the passes over a normalised row
  void* m;                       // [D, B, H] h before the projection, overwritten; null without one
};
// With second products, after the first one: overwrites mid.
void step_begin(const ForwardParams& params, const ForwardStep& step, void* stream);
// After the last product.
void step_forward(const ForwardParams& params, const ForwardStep& step, void* stream);
// With a projection, after step_forward and h_new [D, B, P] = W_hr m: writes h_new to y, h and h_in
// where the row is valid.
void step_store(const ForwardParams& params, const ForwardStep& step, const void* h_new,
                void* stream);

// Step s, backward, s falling.
struct BackwardStep {
  int64_t s;
  const void* dh_rec;  // [D, B, P] W_hh^T dpre of step s + 1; null at the last step
  const void* dm;      // [D, B, H] with a projection: W_hr^T dh; null without
  void* dh;            // [D, B, P] of C, in and out: what reaches h past W_hh. To begin with, dh_n
  void* dstate[kMostStates - 1];  // [D, B, H] of C, in and out
  void* dpre_h;         // [D, B, gates*H] the first product's part of dpre, in W_hh's order
  void* dpre_mid[2];    // likewise the second ones'
  const void* dmid[2];  // [D, B, H] what these products' transposes make of that
  void* carry;          // [D, B, H] of C: from step_backward to step_begin_backward
  void* held;           // as forward's
};
// Overwrites dpre_h; with second products dpre_mid.
void step_backward(const BackwardParams& params, const BackwardStep& step, void* stream);
// With second products, after them: overwrites dpre_h and mid_rows.
void step_begin_backward(const BackwardParams& params, const BackwardStep& step, void* stream);
// With a projection, before step_backward: dh_all = dh + dh_rec + dy at valid rows, else 0, to
// dh_all [D, B, P] and, where valid, to dh_rows; dh becomes 0 where valid.
void step_gather(const BackwardParams& params, const BackwardStep& step, void* dh_all,
                 void* stream);

// ---- cells whose rows are normalised (normalised.cu): what need not wait for the recurrence -----

// Before any step, of either kind. Overwrites gx [D, N, G*H] at valid rows with gain_i norm(W_ih x)
// and all that is added to it, and that part of the reserve.
void normalise_input(const ForwardParams& params, void* gx, void* stream);
// After them all: overwrites dpre's planes of W_ih x and of its gain from those of the
// pre-activations.
void normalise_input_backward(const BackwardParams& params, void* stream);

// ---- units that know only themselves (an IndRNN's): one launch runs every step ------------------

void unitwise_forward(const ForwardParams& params, void* stream);
void unitwise_backward(const BackwardParams& params, void* stream);

// Values per unit and row in `held`.
constexpr int held_values(const CellShape& shape) {
  return !shape.rows ? 0 : shape.states > 1 ? 6 : shape.input_gates + 1;
}

// ---- for the products over all rows -------------------------------------------------------------

// h_prev [N, P] of direction d: h before each valid row's step, from y or h0, as it enters the
// product; zero at other rows.
void gather_previous(const BackwardParams& params, int64_t d, void* h_prev, void* stream);

// m [N, H] of direction d, h before the projection, from the reserve; zero at rows not valid.
void gather_unprojected(const BackwardParams& params, int64_t d, void* m, void* stream);

// Writes numbers of the host's to the device's `to`. They travel as kernel arguments: no copy that
// waits, no host memory that must outlive the call or a graph that captures it.
void write_numbers(const int64_t* numbers, int64_t count, int64_t* to, void* stream);

}  // namespace seqkern::cuda
#pragma GCC visibility pop
