// What the kernels that go step by step have in common: where an element lies, what regularisers do
// to it, and which cell and dtype a kernel is for.
#pragma once

#include "error.cuh"
#include "math.cuh"

namespace seqkern::cuda {

constexpr int kStepThreads = 256;  // of a block

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

// ---- where --------------------------------------------------------------------------------------

// Unit u of row (d, b), and where that row's step s lies among all rows.
struct Element {
  int64_t d, b, u, i;  // i: of [D, B, n]
  int way;             // 1: backwards through time
  int64_t row;         // -1: past the row's length
  int64_t previous;    // the row of the step before, -1: there is none
};

__device__ __forceinline__ void place_at(Element& e, const LayerParams& p, int64_t length,
                                         int64_t s) {
  e.row = s < length ? row_of(p.rows, time_of(e.way, s, length), e.b) : -1;
  e.previous = s > 0 && s < length ? row_of(p.rows, time_of(e.way, s - 1, length), e.b) : -1;
}

// The i-th of [D, B, n]. d = D: there is none.
__device__ __forceinline__ Element element_of(const LayerParams& p, int64_t i, int64_t n,
                                              int64_t s) {
  Element e{};
  e.i = i, e.u = i % n, e.b = i / n % p.rows.B, e.d = i / n / p.rows.B;
  e.way = e.d >= p.heads, e.row = -1;
  if (e.d < p.D) place_at(e, p, length_of(p.rows, e.b), s);
  return e;
}

template <class Params>
__device__ __forceinline__ int64_t at_h(const Params& p, const Element& e, int64_t row) {
  return row * p.D * p.P + e.d * p.P + e.u;
}

// Where a row's part of the reserve begins: value j of unit u is at j * Hp + u.
__device__ __forceinline__ int64_t at_reserve(const LayerParams& p, const Element& e, int64_t row) {
  return (row * p.D + e.d) * p.reserve_row;
}
__device__ __forceinline__ int64_t padded(int64_t H) { return (H + 15) / 16 * 16; }

// Number u of gate g of a bias or of a cell's own vector; absent: 0.
template <class S>
__device__ __forceinline__ Compute<S> number(const void* numbers, int64_t at) {
  return numbers == nullptr ? Compute<S>(0) : widen(in<S>(numbers)[at]);
}
template <class S>
__device__ __forceinline__ Compute<S> bias_of(const LayerParams& p, const void* const (&bias)[2],
                                              const Element& e, int gates, int gate) {
  return number<S>(bias[e.way], ((e.d - e.way * p.heads) * gates + gate) * p.H + e.u);
}

// Where h is scaled before it enters a product, by how much.
template <class S>
__device__ __forceinline__ Compute<S> scale_of(const LayerParams& p, int64_t i) {
  return p.regularisers.scale == nullptr ? Compute<S>(1) : widen(in<S>(p.regularisers.scale)[i]);
}

// h before the step, of an element of [D, B, P].
template <class S>
__device__ __forceinline__ Compute<S> h_before(const BackwardParams& p, const Element& e) {
  return widen(e.previous < 0 ? in<S>(p.h0)[e.i] : in<S>(p.y)[at_h(p, e, e.previous)]);
}

// ---- regularisers -------------------------------------------------------------------------------

template <class S>
struct Kept {
  using C = Compute<S>;
  C h, c;  // how much of the states before is kept
  Regularised<C> within;
};

template <class S>
__device__ __forceinline__ Kept<S> kept_of(const LayerParams& p, const Element& e) {
  using C = Compute<S>;
  const Regularisers& r = p.regularisers;
  Kept<S> kept{C(r.keep_h), C(r.keep_c), {C(1), C(r.cell_clip)}};
  if (r.mask != nullptr) {
    const int bits = r.mask[(e.row * p.D + e.d) * p.H + e.u];
    kept.h = C(bits & 1);
    kept.c = C(bits >> 1 & 1);
    kept.within.factor = bits & 4 ? C(0) : C(r.candidate_scale);
  }
  return kept;
}

// What a step has made of one element: blended with the states before (h, unless it is projected),
// stored, h as output and what backward wants back as the reserve's values from `first` on.
template <class Cell, class S>
__device__ __forceinline__ void give(const ForwardParams& p, const ForwardStep& step,
                                     const Element& e, const Kept<S>& kept, Compute<S> h,
                                     Compute<S> h_prev, const Compute<S>* state,
                                     const Compute<S>* before, const Compute<S>* saved, int first) {
  using C = Compute<S>;
  constexpr int kStates = Cell::kStates - 1;
  const bool on = p.regularisers.on;
  S* to = p.reserve == nullptr ? nullptr : out<S>(p.reserve) + at_reserve(p, e, e.row) + e.u;
  const int64_t Hp = padded(p.H);
  if (to != nullptr) {
    to += first * Hp;
    for (int j = 0; j < Cell::kSaved; j++, to += Hp) *to = narrow<S>(saved[j]);
    if (p.saves_h) *to = narrow<S>(h), to += Hp;
  }
  for (int k = 0; k < kStates; k++) {
    const C carried = on ? kept.c * before[k] + (1 - kept.c) * state[k] : state[k];
    out<C>(step.state[k])[e.i] = carried;
    if (on && to != nullptr) *to = narrow<S>(carried), to += Hp;
  }
  if (step.m != nullptr) {
    out<S>(step.m)[e.i] = narrow<S>(h);
    return;
  }
  if (on) h = kept.h * h_prev + (1 - kept.h) * h;
  out<S>(step.h)[e.i] = out<S>(p.y)[at_h(p, e, e.row)] = narrow<S>(h);
  if (step.h_in != nullptr) out<S>(step.h_in)[e.i] = narrow<S>(h * scale_of<S>(p, e.i));
}

// Backward, of one element: what forward saved, and the gradients that reach its states.
template <class Cell, class S>
struct Saved {
  using C = Compute<S>;
  static constexpr int kStates = Cell::kStates - 1;
  C value[Cell::kSaved + 1], prev[kStates + 1];
  C dstate[kStates + 1], kept_state[kStates + 1], kept_h = 0;
  Kept<S> kept;

  // first: of the cell's own values among the reserve's.
  __device__ __forceinline__ Saved(const BackwardParams& p, const Element& e, int first)
      : kept(kept_of<S>(p, e)) {
    const int64_t Hp = padded(p.H);
    for (int j = 0; j < Cell::kSaved; j++)
      value[j] = widen(in<S>(p.reserve)[at_reserve(p, e, e.row) + (first + j) * Hp + e.u]);
    const int last = p.saved - kStates;
    for (int k = 0; k < kStates; k++)
      prev[k] = widen(e.previous < 0
                          ? in<S>(p.state0[k])[e.i]
                          : in<S>(p.reserve)[at_reserve(p, e, e.previous) + (last + k) * Hp + e.u]);
  }

  // The h that the cell made.
  __device__ __forceinline__ C h(const BackwardParams& p, const Element& e) const {
    if (!p.saves_h) return widen(in<S>(p.y)[at_h(p, e, e.row)]);
    return widen(in<S>(p.reserve)[at_reserve(p, e, e.row) + Cell::kSaved * padded(p.H) + e.u]);
  }

  // All that reaches h, less what goes to the h before because it was kept.
  __device__ __forceinline__ C take_h(const BackwardParams& p, const BackwardStep& step,
                                      const Element& e) {
    if (step.dm != nullptr) return widen(in<S>(step.dm)[e.i]);
    C dh = in<C>(step.dh)[e.i];
    if (step.dh_rec != nullptr) dh += widen(in<S>(step.dh_rec)[e.i]) * scale_of<S>(p, e.i);
    if (p.dy != nullptr) dh += widen(in<S>(p.dy)[at_h(p, e, e.row)]);
    if (!p.regularisers.on) return dh;
    kept_h = kept.h * dh;
    return (1 - kept.h) * dh;
  }
  __device__ __forceinline__ void take_states(const BackwardParams& p, const BackwardStep& step,
                                              const Element& e) {
    for (int k = 0; k < kStates; k++) {
      const C carried = in<C>(step.dstate[k])[e.i];
      kept_state[k] = p.regularisers.on ? kept.c * carried : C(0);
      dstate[k] = p.regularisers.on ? (1 - kept.c) * carried : carried;
    }
  }
  // past: what reaches the h before, past W_hh.
  __device__ __forceinline__ void give_h(const BackwardStep& step, const Element& e, C past) const {
    if (step.dm == nullptr) out<C>(step.dh)[e.i] = past + kept_h;
  }
  __device__ __forceinline__ void give_states(const BackwardStep& step, const Element& e) const {
    for (int k = 0; k < kStates; k++) out<C>(step.dstate[k])[e.i] = dstate[k] + kept_state[k];
  }
};

template <class S>
__device__ __forceinline__ S* dpre_of(const BackwardParams& p, const Element& e) {
  return out<S>(p.dpre) + (e.d * p.rows.N + e.row) * p.planes * p.H + e.u;
}

// ---- launches -----------------------------------------------------------------------------------

template <class... Parameters, class... Arguments>
void launch_blocks(const char* name, void* stream, int64_t blocks, size_t shared,
                   void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kStepThreads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}
template <class... Parameters, class... Arguments>
void launch(const char* name, void* stream, int64_t threads, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  launch_blocks(name, stream, (threads + kStepThreads - 1) / kStepThreads, 0, kernel, arguments...);
}

template <class T>
struct Type {
  using type = T;
};
template <class Tag>
using TypeOf = typename Tag::type;

// Calls body(Type<S>) for the dtype.
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

// ---- normalised rows (normalised.cu): as step_forward and step_backward -------------------------

void normalised_forward(const ForwardParams& params, const ForwardStep& step, void* stream);
void normalised_backward(const BackwardParams& params, const BackwardStep& step, void* stream);

}  // namespace seqkern::cuda
