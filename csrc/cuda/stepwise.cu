// The recurrence step by step: one product with W_hh (torch's) and one launch of the gates per step
// and direction. For any size and dtype; the plain form of what recurrence.cuh does in one launch.
//
// Forward, step s of direction d, every valid row b and hidden unit u:
//   pre[b, :, u] = gx[d, row] + b_ih + gh[b] + b_hh;  h, c = cell(pre, h_prev, c_prev)   (cell.h)
// Backward, s falling:
//   dh = dh_past + dh_rec + dy;  dpre, dh_past, dc = cell's derivative
//
// One thread owns one (b, u), or one element of a copy; no thread reads what another one writes.
// Layouts: kernels.h.

#include <algorithm>
#include <type_traits>

#include "error.cuh"
#include "math.cuh"

namespace seqkern::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t thread_index() {
  return int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
}

template <class S>
__device__ __forceinline__ const S* in(const void* data) {
  return static_cast<const S*>(data);
}
template <class S>
__device__ __forceinline__ S* out(void* data) {
  return static_cast<S*>(data);
}

// Where saved value j of unit u lies in the reserve [N, D, kSaved, Hp].
template <class Cell, class Params>
__device__ __forceinline__ int64_t saved_at(const Params& p, int64_t row, int64_t d, int j,
                                            int64_t u) {
  const int64_t Hp = (p.H + 15) / 16 * 16;
  return ((row * p.D + d) * Cell::kSaved + j) * Hp + u;
}

// The gate of W_hh whose product slot k takes; kernels.h has them in PyTorch's order, as cell.h.
template <class Cell>
__device__ constexpr int hidden_gate(int k) {
  return k - (Cell::kSlots - Cell::kGates);
}

// ---- forward ------------------------------------------------------------------------------------

// Overwrites y, reserve, h (or m) and c of the rows valid at this step; of others m, with zeros.
template <class Cell, class S>
__global__ void step_forward_kernel(const ForwardParams p, const ForwardStep step) {
  using C = Compute<S>;
  const int64_t i = thread_index(), H = p.H, P = p.P, d = step.d;
  if (i >= p.rows.B * H) return;
  const int64_t b = i / H, u = i % H;
  const int64_t length = length_of(p.rows, b);
  if (step.s >= length) {
    if (step.m != nullptr) out<S>(step.m)[i] = narrow<S>(C(0));
    return;
  }
  const int64_t row = row_of(p.rows, time_of(d, step.s, length), b);

  C pre[Cell::kSlots] = {};
  for (int k = 0; k < Cell::kGates; k++) {
    const int64_t at = stored_slot<Cell>(k) * H + u;
    pre[k] += widen(in<S>(p.gx)[(d * p.rows.N + row) * Cell::kGates * H + at]);
    if (p.b_ih[d] != nullptr) pre[k] += widen(in<S>(p.b_ih[d])[at]);
  }
  for (int k = Cell::kSlots - Cell::kGates; k < Cell::kSlots; k++) {
    const int64_t at = hidden_gate<Cell>(k) * H + u;
    pre[k] += widen(in<S>(step.gh)[b * Cell::kGates * H + at]);
    if (p.b_hh[d] != nullptr) pre[k] += widen(in<S>(p.b_hh[d])[at]);
  }

  // Only an LSTM has a projection, and it does not ask for h_prev.
  const C h_prev = step.m == nullptr ? widen(out<S>(step.h)[i]) : C(0);
  C c = kHasC<Cell> ? out<C>(step.c)[i] : C(0);
  C saved[Cell::kSaved + 1];
  const C h = Cell::forward(pre, h_prev, &c, nullptr, Unregularised{}, saved);

  if (kHasC<Cell>) out<C>(step.c)[i] = c;
  if (step.m != nullptr) {
    out<S>(step.m)[i] = narrow<S>(h);
  } else {
    out<S>(step.h)[i] = narrow<S>(h);
    out<S>(p.y)[row * p.D * P + d * P + u] = narrow<S>(h);
  }
  if (p.reserve != nullptr)
    for (int j = 0; j < Cell::kSaved; j++)
      out<S>(p.reserve)[saved_at<Cell>(p, row, d, j, u)] = narrow<S>(saved[j]);
}

// Overwrites y and h of the rows valid at this step.
template <class S>
__global__ void step_store_kernel(const ForwardParams p, const int64_t d, const int64_t s,
                                  const S* h_new, S* h) {  // [B, P] both
  const int64_t i = thread_index(), P = p.P;
  if (i >= p.rows.B * P) return;
  const int64_t b = i / P, k = i % P;
  const int64_t length = length_of(p.rows, b);
  if (s >= length) return;
  const int64_t row = row_of(p.rows, time_of(d, s, length), b);
  h[i] = h_new[i];
  out<S>(p.y)[row * p.D * P + d * P + k] = h_new[i];
}

// ---- backward -----------------------------------------------------------------------------------

// Overwrites dpre, dh (without a projection) and dc of the rows valid at this step, and dpre_h.
template <class Cell, class S>
__global__ void step_backward_kernel(const BackwardParams p, const BackwardStep step) {
  using C = Compute<S>;
  const int64_t i = thread_index(), H = p.H, P = p.P, d = step.d;
  if (i >= p.rows.B * H) return;
  const int64_t b = i / H, u = i % H;
  const int64_t length = length_of(p.rows, b);
  S* const dpre_h = out<S>(step.dpre_h) + b * Cell::kGates * H + u;
  if (step.s >= length) {
    for (int g = 0; g < Cell::kGates; g++) dpre_h[g * H] = narrow<S>(C(0));
    return;
  }
  const int64_t row = row_of(p.rows, time_of(d, step.s, length), b);
  const int64_t row_prev = step.s == 0 ? -1 : row_of(p.rows, time_of(d, step.s - 1, length), b);

  // The state that the cell computed and the one it came from. Only an LSTM has a projection, and
  // it does not ask for h.
  const bool projected = step.dm != nullptr;
  const int64_t state = (d * p.rows.B + b) * H + u;  // in [D, B, H]
  C saved[Cell::kSaved + 1], h = C(0), h_prev = C(0), c_prev = C(0);
  for (int j = 0; j < Cell::kSaved; j++)
    saved[j] = widen(in<S>(p.reserve)[saved_at<Cell>(p, row, d, j, u)]);
  if (!projected) {
    const S* const y = in<S>(p.y) + d * P + u;
    h = widen(y[row * p.D * P]);
    h_prev = step.s == 0 ? widen(in<S>(p.h0)[state]) : widen(y[row_prev * p.D * P]);
  }
  if constexpr (kHasC<Cell>)
    c_prev = step.s == 0 ? widen(in<S>(p.c0)[state])
                         : widen(in<S>(p.reserve)[saved_at<Cell>(p, row_prev, d, 4, u)]);

  C dh;
  if (projected) {
    dh = widen(in<S>(step.dm)[i]);
  } else {
    dh = out<C>(step.dh)[i];
    if (step.dh_rec != nullptr) dh += widen(in<S>(step.dh_rec)[i]);
    if (p.dy != nullptr) dh += widen(in<S>(p.dy)[row * p.D * P + d * P + u]);
  }
  C dc = kHasC<Cell> ? out<C>(step.dc)[i] : C(0);
  C dpre[Cell::kSlots];
  const C dh_past =
      Cell::backward(dh, &dc, saved, h, h_prev, &c_prev, nullptr, Unregularised{}, dpre);

  if (!projected) out<C>(step.dh)[i] = dh_past;
  if (kHasC<Cell>) out<C>(step.dc)[i] = dc;
  S* const dpre_row = out<S>(p.dpre) + (d * p.rows.N + row) * Cell::kSlots * H + u;
  for (int k = 0; k < Cell::kSlots; k++) {
    const S dpre_k = narrow<S>(dpre[k]);
    dpre_row[stored_slot<Cell>(k) * H] = dpre_k;
    if (hidden_gate<Cell>(k) >= 0) dpre_h[hidden_gate<Cell>(k) * H] = dpre_k;
  }
}

// Overwrites dh_all, and dh and dh_rows of the rows valid at this step.
template <class S>
__global__ void step_gather_kernel(const BackwardParams p, const BackwardStep step, S* dh_all) {
  using C = Compute<S>;
  const int64_t i = thread_index(), P = p.P, d = step.d;
  if (i >= p.rows.B * P) return;
  const int64_t b = i / P, k = i % P;
  const int64_t length = length_of(p.rows, b);
  if (step.s >= length) {
    dh_all[i] = narrow<S>(C(0));
    return;
  }
  const int64_t row = row_of(p.rows, time_of(d, step.s, length), b);
  C dh = out<C>(step.dh)[i];
  if (step.dh_rec != nullptr) dh += widen(in<S>(step.dh_rec)[i]);
  if (p.dy != nullptr) dh += widen(in<S>(p.dy)[row * p.D * P + d * P + k]);
  out<C>(step.dh)[i] = C(0);
  dh_all[i] = narrow<S>(dh);
  out<S>(p.dh_rows)[(d * p.rows.N + row) * P + k] = narrow<S>(dh);
}

// ---- for the products over all rows -------------------------------------------------------------

// Thread (t, b, k) of [T, B, n]: the row of (t, b), and whether it is valid. A packed batch has no
// row for a (t, b) that is not: there row is -1.
struct Place {
  int64_t t, b, k, length, row;
  bool valid;
};
__device__ __forceinline__ Place place_of(const Rows& rows, int64_t i, int64_t n) {
  Place at;
  at.k = i % n;
  at.b = i / n % rows.B;
  at.t = i / n / rows.B;
  at.length = length_of(rows, at.b);
  at.valid = at.t < at.length;
  at.row = at.valid || rows.first == nullptr ? row_of(rows, at.t, at.b) : -1;
  return at;
}

// Overwrites h_prev [N, P].
template <class S>
__global__ void gather_previous_kernel(const BackwardParams p, const int64_t d, S* h_prev) {
  const int64_t i = thread_index(), P = p.P;
  if (i >= p.rows.T * p.rows.B * P) return;
  const Place at = place_of(p.rows, i, P);
  if (at.row < 0) return;
  S value = narrow<S>(Compute<S>(0));
  if (at.valid && at.t == time_of(d, int64_t(0), at.length)) {
    value = in<S>(p.h0)[(d * p.rows.B + at.b) * P + at.k];
  } else if (at.valid) {
    const int64_t row_prev = row_of(p.rows, d == 0 ? at.t - 1 : at.t + 1, at.b);
    value = in<S>(p.y)[row_prev * p.D * P + d * P + at.k];
  }
  h_prev[at.row * P + at.k] = value;
}

// Overwrites m [N, H].
template <class S>
__global__ void gather_unprojected_kernel(const BackwardParams p, const int64_t d, S* m) {
  using Cell = LstmCell<Math<S>>;
  using C = Compute<S>;
  const int64_t i = thread_index(), H = p.H;
  if (i >= p.rows.T * p.rows.B * H) return;
  const Place at = place_of(p.rows, i, H);
  if (at.row < 0) return;
  C value = C(0);
  if (at.valid) {
    C saved[Cell::kSaved];
    for (int j = 0; j < Cell::kSaved; j++)
      saved[j] = widen(in<S>(p.reserve)[saved_at<Cell>(p, at.row, d, j, at.k)]);
    value = Cell::unprojected(saved);
  }
  m[at.row * H + at.k] = narrow<S>(value);
}

// ---- numbers of the host ------------------------------------------------------------------------

constexpr int kNumbers = 448;  // 8 bytes each: a kernel's arguments have room for 4 KiB
struct Numbers {
  int64_t value[kNumbers];
};

__global__ void write_numbers_kernel(const Numbers numbers, const int count, int64_t* to) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = numbers.value[i];
}

// ---- launches -----------------------------------------------------------------------------------

template <class... Parameters, class... Arguments>
void launch(const char* name, void* stream, int64_t threads, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  if (threads == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned((threads + kThreads - 1) / kThreads));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

template <class T>
struct Type {
  using type = T;
};
template <class Tag>
using TypeOf = typename Tag::type;

// Calls body(Type<S>) for the dtype, or body(Type<Cell>, Type<S>) for the cell and the dtype.
template <class Body>
void with_dtype(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::f32:
      return body(Type<float>());
    case Dtype::f64:
      return body(Type<double>());
    case Dtype::bf16:
      return body(Type<bf16>());
    case Dtype::f16:
      return body(Type<f16>());
  }
}
template <class S, class Body>
void with_cell_of(CellKind cell, Body body) {
  switch (cell) {
    case CellKind::lstm:
      return body(Type<LstmCell<Math<S>>>(), Type<S>());
    case CellKind::gru:
      return body(Type<GruCell<Math<S>>>(), Type<S>());
    case CellKind::rnn_tanh:
      return body(Type<RnnTanhCell<Math<S>>>(), Type<S>());
    case CellKind::rnn_relu:
      return body(Type<RnnReluCell<Math<S>>>(), Type<S>());
    default:  // no operator of this device lets it come so far
      return;
  }
}
template <class Body>
void with_cell(CellKind cell, Dtype dtype, Body body) {
  with_dtype(dtype, [&](auto s) { with_cell_of<TypeOf<decltype(s)>>(cell, body); });
}

}  // namespace

void step_forward(const ForwardParams& params, const ForwardStep& step, void* stream) {
  with_cell(params.cell, params.dtype, [&](auto cell, auto s) {
    launch("step_forward_kernel", stream, params.rows.B * params.H,
           step_forward_kernel<TypeOf<decltype(cell)>, TypeOf<decltype(s)>>, params, step);
  });
}

void step_store(const ForwardParams& params, int64_t d, int64_t s, const void* h_new, void* h,
                void* stream) {
  with_dtype(params.dtype, [&](auto type) {
    using S = TypeOf<decltype(type)>;
    launch("step_store_kernel", stream, params.rows.B * params.P, step_store_kernel<S>, params, d,
           s, static_cast<const S*>(h_new), static_cast<S*>(h));
  });
}

void step_backward(const BackwardParams& params, const BackwardStep& step, void* stream) {
  with_cell(params.cell, params.dtype, [&](auto cell, auto s) {
    launch("step_backward_kernel", stream, params.rows.B * params.H,
           step_backward_kernel<TypeOf<decltype(cell)>, TypeOf<decltype(s)>>, params, step);
  });
}

void step_gather(const BackwardParams& params, const BackwardStep& step, void* dh_all,
                 void* stream) {
  with_dtype(params.dtype, [&](auto type) {
    using S = TypeOf<decltype(type)>;
    launch("step_gather_kernel", stream, params.rows.B * params.P, step_gather_kernel<S>, params,
           step, static_cast<S*>(dh_all));
  });
}

void gather_previous(const BackwardParams& params, int64_t d, void* h_prev, void* stream) {
  with_dtype(params.dtype, [&](auto type) {
    using S = TypeOf<decltype(type)>;
    launch("gather_previous_kernel", stream, params.rows.T * params.rows.B * params.P,
           gather_previous_kernel<S>, params, d, static_cast<S*>(h_prev));
  });
}

void gather_unprojected(const BackwardParams& params, int64_t d, void* m, void* stream) {
  with_dtype(params.dtype, [&](auto type) {
    using S = TypeOf<decltype(type)>;
    launch("gather_unprojected_kernel", stream, params.rows.T * params.rows.B * params.H,
           gather_unprojected_kernel<S>, params, d, static_cast<S*>(m));
  });
}

void write_numbers(const int64_t* numbers, int64_t count, int64_t* to, void* stream) {
  for (int64_t done = 0; done < count; done += kNumbers) {
    const int n = int(std::min<int64_t>(kNumbers, count - done));
    Numbers part{};
    std::copy(numbers + done, numbers + done + n, part.value);
    launch("write_numbers_kernel", stream, kThreads, write_numbers_kernel, part, n, to + done);
  }
}

}  // namespace seqkern::cuda
