// The gate equations and their derivatives, once, for every kernel (host and device, forward and
// backward).
//
// A cell works on one value of type V (a scalar or a vector of lanes) per gate; Math supplies V,
// sigmoid, tanh. What it is like from outside, the order of its slots among it, is in cells.h.
//   kSlots    pre-activations that forward is given (with a second product: as its comment says)
//   kSaved    values that backward wants back
//   kStates   states that are carried from step to step, h among them; state[] is those after h
//   kOwn      a unit's parameters of the cell's own
//   kNeedsH, kNeedsHPrev   whether backward reads the cell's own h; whether it, or forward, reads
//                          the h before
// Regular says what a regulariser does inside: it scales the candidate (the new content: g, n) and
// clips the cell state. Unregularised does nothing.
#pragma once

#ifdef __CUDACC__
#define SEQKERN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SEQKERN_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace seqkern {

// Is there a state beside h?
template <class Cell>
constexpr bool kHasC = Cell::kStates > 1;

struct Unregularised {
  template <class V>
  static SEQKERN_HOST_DEVICE V candidate(V g) {
    return g;
  }
  template <class V>
  static SEQKERN_HOST_DEVICE V clip(V c) {
    return c;
  }
  template <class V>
  static SEQKERN_HOST_DEVICE V clip_gradient(V /*c*/, V dc) {
    return dc;
  }
};

template <class V>
struct Regularised {
  V factor;  // of the candidate
  V bound;   // of the cell state
  SEQKERN_HOST_DEVICE V candidate(V g) const { return g * factor; }
  SEQKERN_HOST_DEVICE V clip(V c) const { return c > bound ? bound : c < -bound ? -bound : c; }
  // c: clipped
  SEQKERN_HOST_DEVICE V clip_gradient(V c, V dc) const {
    return c >= bound ? V{} : c <= -bound ? V{} : dc;
  }
};

template <class Math>
struct LstmCell {
  using V = typename Math::V;
  static constexpr int kGates = 4, kSlots = 4, kSaved = 5, kStates = 2, kOwn = 0;
  static constexpr bool kNeedsH = false, kNeedsHPrev = false;

  // i f g o = sigma(pre_i) sigma(pre_f) tanh(pre_g) sigma(pre_o)
  // c = f c_prev + i g;  h = o tanh(c)  (Hochreiter & Schmidhuber 1997; Gers et al. 2000)
  // state: the previous ones in, the new ones out.
  template <class Regular>
  static SEQKERN_HOST_DEVICE V forward(const V* pre, V /*h_prev*/, V* state, const V* /*own*/,
                                       const Regular& regular, V* saved) {
    const V i = Math::sigmoid(pre[0]);
    const V f = Math::sigmoid(pre[1]);
    const V g = Math::tanh(pre[2]);
    const V o = Math::sigmoid(pre[3]);
    const V c = regular.clip(f * state[0] + i * regular.candidate(g));
    state[0] = c;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o, saved[4] = c;
    return o * Math::tanh(c);
  }

  // dstate: gradients of the states in, of the previous ones out. dpre: overwritten; after the
  // slots' come the summands of the own parameters' gradients. Returns the gradient that reaches
  // h_prev past W_hh.
  template <class Regular>
  static SEQKERN_HOST_DEVICE V backward(V dh, V* dstate, const V* saved, V /*h*/, V /*h_prev*/,
                                        const V* prev, const V* /*own*/, const Regular& regular,
                                        V* dpre) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = Math::tanh(saved[4]);
    const V dc = regular.clip_gradient(saved[4], dstate[0] + dh * o * (1 - tanh_c * tanh_c));
    const V di = dc * regular.candidate(g), dg = regular.candidate(dc) * i;
    dpre[0] = di * i * (1 - i);
    dpre[1] = dc * prev[0] * f * (1 - f);
    dpre[2] = dg * (1 - g * g);
    dpre[3] = dh * tanh_c * o * (1 - o);
    dstate[0] = dc * f;
    return V{};
  }

  // What h is before a projection W_hr: o tanh(c).
  static SEQKERN_HOST_DEVICE V unprojected(const V* saved) {
    return saved[3] * Math::tanh(saved[4]);
  }
};

template <class Math>
struct PeepholeLstmCell {
  using V = typename Math::V;
  static constexpr int kGates = 4, kSlots = 4, kSaved = 5, kStates = 2, kOwn = 3;
  static constexpr bool kNeedsH = false, kNeedsHPrev = false;

  // An LSTM whose gates see the cell: i and f see p c_prev, o sees p c  (Gers & Schmidhuber 2000)
  template <class Regular>
  static SEQKERN_HOST_DEVICE V forward(const V* pre, V /*h_prev*/, V* state, const V* own,
                                       const Regular& regular, V* saved) {
    const V i = Math::sigmoid(pre[0] + own[0] * state[0]);
    const V f = Math::sigmoid(pre[1] + own[1] * state[0]);
    const V g = Math::tanh(pre[2]);
    const V c = regular.clip(f * state[0] + i * regular.candidate(g));
    const V o = Math::sigmoid(pre[3] + own[2] * c);
    state[0] = c;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o, saved[4] = c;
    return o * Math::tanh(c);
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE V backward(V dh, V* dstate, const V* saved, V /*h*/, V /*h_prev*/,
                                        const V* prev, const V* own, const Regular& regular,
                                        V* dpre) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3], c = saved[4];
    const V tanh_c = Math::tanh(c);
    dpre[3] = dh * tanh_c * o * (1 - o);
    const V dc =
        regular.clip_gradient(c, dstate[0] + dh * o * (1 - tanh_c * tanh_c) + dpre[3] * own[2]);
    const V di = dc * regular.candidate(g), dg = regular.candidate(dc) * i;
    dpre[0] = di * i * (1 - i);
    dpre[1] = dc * prev[0] * f * (1 - f);
    dpre[2] = dg * (1 - g * g);
    dpre[4] = dpre[0] * prev[0];
    dpre[5] = dpre[1] * prev[0];
    dpre[6] = dpre[3] * c;
    dstate[0] = dc * f + dpre[0] * own[0] + dpre[1] * own[1];
    return V{};
  }
};

template <class Math>
struct CifgLstmCell {
  using V = typename Math::V;
  static constexpr int kGates = 3, kSlots = 3, kSaved = 4, kStates = 2, kOwn = 0;
  static constexpr bool kNeedsH = false, kNeedsHPrev = false;

  // An LSTM that forgets as much as it takes in, f = 1 - i  (Greff et al. 2015); slots i g o
  template <class Regular>
  static SEQKERN_HOST_DEVICE V forward(const V* pre, V /*h_prev*/, V* state, const V* /*own*/,
                                       const Regular& regular, V* saved) {
    const V i = Math::sigmoid(pre[0]);
    const V g = Math::tanh(pre[1]);
    const V o = Math::sigmoid(pre[2]);
    const V c = regular.clip(state[0] + i * (regular.candidate(g) - state[0]));
    state[0] = c;
    saved[0] = i, saved[1] = g, saved[2] = o, saved[3] = c;
    return o * Math::tanh(c);
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE V backward(V dh, V* dstate, const V* saved, V /*h*/, V /*h_prev*/,
                                        const V* prev, const V* /*own*/, const Regular& regular,
                                        V* dpre) {
    const V i = saved[0], g = saved[1], o = saved[2];
    const V tanh_c = Math::tanh(saved[3]);
    const V dc = regular.clip_gradient(saved[3], dstate[0] + dh * o * (1 - tanh_c * tanh_c));
    dpre[0] = dc * (regular.candidate(g) - prev[0]) * i * (1 - i);
    dpre[1] = regular.candidate(dc) * i * (1 - g * g);
    dpre[2] = dh * tanh_c * o * (1 - o);
    dstate[0] = dc * (1 - i);
    return V{};
  }
};

template <class Math>
struct GruCell {
  using V = typename Math::V;
  static constexpr int kGates = 3, kSlots = 4, kSaved = 4, kStates = 1, kOwn = 0;
  static constexpr bool kNeedsH = false, kNeedsHPrev = true;

  // r z = sigma(pre_r) sigma(pre_z);  n = tanh(pre_n + r pre_n');  h = (1 - z) n + z h_prev
  // (Cho et al. 2014, with the reset gate after the product, as cuDNN and PyTorch have it).
  template <class Regular>
  static SEQKERN_HOST_DEVICE V forward(const V* pre, V h_prev, V* /*state*/, const V* /*own*/,
                                       const Regular& regular, V* saved) {
    const V r = Math::sigmoid(pre[1]);
    const V z = Math::sigmoid(pre[2]);
    const V n = Math::tanh(pre[0] + r * pre[3]);
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = pre[3];
    const V scaled = regular.candidate(n);
    return scaled + z * (h_prev - scaled);
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE V backward(V dh, V* /*dstate*/, const V* saved, V /*h*/, V h_prev,
                                        const V* /*prev*/, const V* /*own*/, const Regular& regular,
                                        V* dpre) {
    const V r = saved[0], z = saved[1], n = saved[2];
    const V dn = regular.candidate(dh * (1 - z)) * (1 - n * n);
    dpre[0] = dn;
    dpre[1] = dn * saved[3] * r * (1 - r);
    dpre[2] = dh * (h_prev - regular.candidate(n)) * z * (1 - z);
    dpre[3] = dn * r;
    return dh * z;
  }
};

template <class Math>
struct RnnTanhCell {
  using V = typename Math::V;
  static constexpr int kGates = 1, kSlots = 1, kSaved = 0, kStates = 1, kOwn = 0;
  static constexpr bool kNeedsH = true, kNeedsHPrev = false;

  // h = tanh(pre)  (Elman 1990)
  template <class Regular>
  static SEQKERN_HOST_DEVICE V forward(const V* pre, V /*h_prev*/, V* /*state*/, const V* /*own*/,
                                       const Regular& /*regular*/, V* /*saved*/) {
    return Math::tanh(pre[0]);
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE V backward(V dh, V* /*dstate*/, const V* /*saved*/, V h, V /*h_prev*/,
                                        const V* /*prev*/, const V* /*own*/,
                                        const Regular& /*regular*/, V* dpre) {
    dpre[0] = dh * (1 - h * h);
    return V{};
  }
};

template <class Math>
struct RnnReluCell {
  using V = typename Math::V;
  static constexpr int kGates = 1, kSlots = 1, kSaved = 0, kStates = 1, kOwn = 0;
  static constexpr bool kNeedsH = true, kNeedsHPrev = false;

  // h = max(pre, 0); NaN stays NaN
  template <class Regular>
  static SEQKERN_HOST_DEVICE V forward(const V* pre, V /*h_prev*/, V* /*state*/, const V* /*own*/,
                                       const Regular& /*regular*/, V* /*saved*/) {
    return pre[0] < 0 ? V{} : pre[0];
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE V backward(V dh, V* /*dstate*/, const V* /*saved*/, V h, V /*h_prev*/,
                                        const V* /*prev*/, const V* /*own*/,
                                        const Regular& /*regular*/, V* dpre) {
    dpre[0] = h > 0 ? dh : V{};
    return V{};
  }
};

// An RNN whose recurrent weight is one number u per unit, over either activation: h = act(pre + u
// h_prev)  (Li et al. 2018)
template <class Math, class Rnn>
struct IndRnnCell {
  using V = typename Math::V;
  static constexpr int kGates = 1, kSlots = 1, kSaved = 0, kStates = 1, kOwn = 1;
  static constexpr bool kNeedsH = true, kNeedsHPrev = true;

  template <class Regular>
  static SEQKERN_HOST_DEVICE V forward(const V* pre, V h_prev, V* state, const V* own,
                                       const Regular& regular, V* saved) {
    const V sum = pre[0] + own[0] * h_prev;
    return Rnn::forward(&sum, h_prev, state, own, regular, saved);
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE V backward(V dh, V* dstate, const V* saved, V h, V h_prev,
                                        const V* prev, const V* own, const Regular& regular,
                                        V* dpre) {
    Rnn::backward(dh, dstate, saved, h, h_prev, prev, own, regular, dpre);
    dpre[1] = dpre[0] * h_prev;
    return dpre[0] * own[0];
  }
};
template <class Math>
using IndRnnTanhCell = IndRnnCell<Math, RnnTanhCell<Math>>;
template <class Math>
using IndRnnReluCell = IndRnnCell<Math, RnnReluCell<Math>>;

template <class Math>
struct SlstmCell {
  using V = typename Math::V;
  static constexpr int kGates = 4, kSlots = 4, kSaved = 8, kStates = 4, kOwn = 0;
  static constexpr bool kNeedsH = false, kNeedsHPrev = false;

  // z o = tanh(pre_z) sigma(pre_o);  i = exp(pre_i), f = sigma(pre_f), both over exp(m) where m =
  // max(log f + m_prev, pre_i) keeps them finite;  c = f c_prev + i z;  n = f n_prev + i;
  // h = o c / n  (Beck et al. 2024). n_prev = 0: there is no past, so m = pre_i. state: c n m
  template <class Regular>
  static SEQKERN_HOST_DEVICE V forward(const V* pre, V /*h_prev*/, V* state, const V* /*own*/,
                                       const Regular& regular, V* saved) {
    const V z = Math::tanh(pre[2]);
    const V o = Math::sigmoid(pre[3]);
    const V past = Math::log_sigmoid(pre[1]) + state[2];
    const V m = state[1] == 0 ? pre[0] : past > pre[0] ? past : pre[0];
    const V i = Math::exp_of_negative(pre[0] - m);
    const V f = state[1] == 0 ? V{} : Math::exp_of_negative(past - m);
    const V c = f * state[0] + i * regular.candidate(z);
    const V n = f * state[1] + i;
    state[0] = c, state[1] = n, state[2] = m;
    saved[0] =
        m == pre[0] ? i : -i;  // the sign keeps which of the two m is, also rounded to 16 bits
    saved[1] = f, saved[2] = z, saved[3] = o, saved[4] = Math::sigmoid(pre[1]);
    saved[5] = c, saved[6] = n, saved[7] = m;
    return o * c / n;
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE V backward(V dh, V* dstate, const V* saved, V /*h*/, V /*h_prev*/,
                                        const V* prev, const V* /*own*/, const Regular& regular,
                                        V* dpre) {
    const V i = saved[0] > 0 ? saved[0] : -saved[0], f = saved[1], z = saved[2], o = saved[3];
    const V ratio = saved[5] / saved[6];
    const V dc = dstate[0] + dh * o / saved[6];
    const V dn = dstate[1] - dh * o * ratio / saved[6];
    const V di = (dc * regular.candidate(z) + dn) * i;  // of the exponent of i
    const V df = (dc * prev[0] + dn * prev[1]) * f;     // of f's
    const V dm = dstate[2] - di - df;
    const V of_i = saved[0] > 0 ? dm : V{}, of_past = saved[0] > 0 ? V{} : dm;
    dpre[0] = di + of_i;
    dpre[1] = (df + of_past) * (1 - saved[4]);
    dpre[2] = regular.candidate(dc) * i * (1 - z * z);
    dpre[3] = dh * ratio * o * (1 - o);
    dstate[0] = dc * f, dstate[1] = dn * f, dstate[2] = df + of_past;
    return V{};
  }
};

// ---- cells with a second product ----------------------------------------------------------------
//
// begin   from the pre-activations of the first product to `mid`, which the second multiplies
// end     from those of the second to h
// end_backward, begin_backward   the other way round. The one makes dpre[kEndPlane..kPlanes), the
//         other those before. carry[0..kCarry) goes from the one to the other; past and dstate, set
//         by the one and added to by the other, are the gradients that reach h_prev past the
//         products, and the states before.
// pre: kSlots of them in begin; `end` finds W_ih's part in those that the first product has none
// in. h_in is the h that enters products: scale * h_prev, where a dropout mask leaves only a part
// of it.

template <class Math>
struct GruResetBeforeCell {
  using V = typename Math::V;
  static constexpr int kGates = 3, kSlots = 3, kFirst = 2, kFirstSlot = 0, kSecond = 1, kMid = 1;
  static constexpr int kSaved = 3, kStates = 1, kCarry = 0, kPlanes = 3, kEndPlane = 1;
  static constexpr int kOwn = 0;
  static constexpr bool kNeedsH = false, kNeedsHPrev = true;

  // r z = sigma(pre_r) sigma(pre_z);  n = tanh(pre_n + U (r h_prev));  h = (1 - z) n + z h_prev
  // (Cho et al. 2014)
  template <class Regular>
  static SEQKERN_HOST_DEVICE void begin(const V* pre, V /*h_prev*/, V h_in, const V* /*state*/,
                                        const Regular& /*regular*/, V* saved, V* mid) {
    saved[0] = Math::sigmoid(pre[0]);
    saved[1] = Math::sigmoid(pre[1]);
    mid[0] = saved[0] * h_in;
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE V end(const V* pre, const V* second, V h_prev, V* /*state*/,
                                   const Regular& regular, V* saved) {
    saved[2] = Math::tanh(pre[2] + second[0]);
    const V n = regular.candidate(saved[2]), z = saved[1];
    return n + z * (h_prev - n);
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE void end_backward(V dh, V* /*dstate*/, const V* saved, V h_prev,
                                               const V* /*prev*/, const Regular& regular, V* dpre,
                                               V* /*carry*/, V& past) {
    const V z = saved[1], n = saved[2];
    dpre[1] = dh * (h_prev - regular.candidate(n)) * z * (1 - z);
    dpre[2] = regular.candidate(dh * (1 - z)) * (1 - n * n);
    past = dh * z;
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE void begin_backward(const V* dmid, V* /*dstate*/, const V* saved,
                                                 V /*h_prev*/, V h_in, V scale, const V* /*prev*/,
                                                 const Regular& /*regular*/, const V* /*carry*/,
                                                 V* dpre, V& past, V* mid) {
    const V r = saved[0];
    dpre[0] = dmid[0] * h_in * r * (1 - r);
    past += dmid[0] * r * scale;
    mid[0] = r * h_in;
  }
};

template <class Math>
struct MguCell {
  using V = typename Math::V;
  static constexpr int kGates = 2, kSlots = 2, kFirst = 1, kFirstSlot = 0, kSecond = 1, kMid = 1;
  static constexpr int kSaved = 2, kStates = 1, kCarry = 1, kPlanes = 2, kEndPlane = 1;
  static constexpr int kOwn = 0;
  static constexpr bool kNeedsH = false, kNeedsHPrev = true;

  // f = sigma(pre_f);  n = tanh(pre_n + U (f h_prev));  h = (1 - f) h_prev + f n
  // (Zhou et al. 2016)
  template <class Regular>
  static SEQKERN_HOST_DEVICE void begin(const V* pre, V /*h_prev*/, V h_in, const V* /*state*/,
                                        const Regular& /*regular*/, V* saved, V* mid) {
    saved[0] = Math::sigmoid(pre[0]);
    mid[0] = saved[0] * h_in;
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE V end(const V* pre, const V* second, V h_prev, V* /*state*/,
                                   const Regular& regular, V* saved) {
    saved[1] = Math::tanh(pre[1] + second[0]);
    return h_prev + saved[0] * (regular.candidate(saved[1]) - h_prev);
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE void end_backward(V dh, V* /*dstate*/, const V* saved, V h_prev,
                                               const V* /*prev*/, const Regular& regular, V* dpre,
                                               V* carry, V& past) {
    const V f = saved[0], n = saved[1];
    dpre[1] = regular.candidate(dh * f) * (1 - n * n);
    carry[0] = dh * (regular.candidate(n) - h_prev);  // of f
    past = dh * (1 - f);
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE void begin_backward(const V* dmid, V* /*dstate*/, const V* saved,
                                                 V /*h_prev*/, V h_in, V scale, const V* /*prev*/,
                                                 const Regular& /*regular*/, const V* carry,
                                                 V* dpre, V& past, V* mid) {
    const V f = saved[0];
    dpre[0] = (carry[0] + dmid[0] * h_in) * f * (1 - f);
    past += dmid[0] * f * scale;
    mid[0] = f * h_in;
  }
};

template <class Math>
struct NestedLstmCell {
  using V = typename Math::V;
  static constexpr int kGates = 4, kSlots = 4, kFirst = 4, kFirstSlot = 0, kSecond = 4, kMid = 2;
  static constexpr int kSaved = 10, kStates = 3, kCarry = 0, kPlanes = 8, kEndPlane = 3;
  static constexpr int kOwn = 0;
  static constexpr bool kNeedsH = false, kNeedsHPrev = false;

  // An LSTM whose cell state is the output of another LSTM, of input i g, hidden state f c_prev and
  // cell state d:  d = f' d_prev + i' g';  c = o' tanh(d);  h = o tanh(c)  (Moniz & Krueger 2017).
  // state: c d
  template <class Regular>
  static SEQKERN_HOST_DEVICE void begin(const V* pre, V /*h_prev*/, V /*h_in*/, const V* state,
                                        const Regular& regular, V* saved, V* mid) {
    saved[0] = Math::sigmoid(pre[0]);
    saved[1] = Math::sigmoid(pre[1]);
    saved[2] = Math::tanh(pre[2]);
    saved[3] = Math::sigmoid(pre[3]);
    mid[0] = saved[0] * regular.candidate(saved[2]);
    mid[1] = saved[1] * state[0];
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE V end(const V* /*pre*/, const V* second, V /*h_prev*/, V* state,
                                   const Regular& regular, V* saved) {
    const V i = Math::sigmoid(second[0]);
    const V f = Math::sigmoid(second[1]);
    const V g = Math::tanh(second[2]);
    const V o = Math::sigmoid(second[3]);
    const V d = regular.clip(f * state[1] + i * g);
    const V c = regular.clip(o * Math::tanh(d));
    state[0] = c, state[1] = d;
    saved[4] = i, saved[5] = f, saved[6] = g, saved[7] = o, saved[8] = c, saved[9] = d;
    return saved[3] * Math::tanh(c);
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE void end_backward(V dh, V* dstate, const V* saved, V /*h_prev*/,
                                               const V* prev, const Regular& regular, V* dpre,
                                               V* /*carry*/, V& past) {
    const V i = saved[4], f = saved[5], g = saved[6], o = saved[7], c = saved[8], d = saved[9];
    const V tanh_c = Math::tanh(c), tanh_d = Math::tanh(d);
    const V o_ = saved[3];  // the outer one
    const V dc = regular.clip_gradient(c, dstate[0] + dh * o_ * (1 - tanh_c * tanh_c));
    const V dd = regular.clip_gradient(d, dstate[1] + dc * o * (1 - tanh_d * tanh_d));
    dpre[3] = dh * tanh_c * o_ * (1 - o_);
    dpre[4] = dd * g * i * (1 - i);
    dpre[5] = dd * prev[1] * f * (1 - f);
    dpre[6] = dd * i * (1 - g * g);
    dpre[7] = dc * tanh_d * o * (1 - o);
    dstate[0] = V{}, dstate[1] = dd * f;
    past = V{};
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE void begin_backward(const V* dmid, V* dstate, const V* saved,
                                                 V /*h_prev*/, V /*h_in*/, V /*scale*/,
                                                 const V* prev, const Regular& regular,
                                                 const V* /*carry*/, V* dpre, V& /*past*/, V* mid) {
    const V i = saved[0], f = saved[1], g = saved[2];
    dpre[0] = dmid[0] * regular.candidate(g) * i * (1 - i);
    dpre[1] = dmid[1] * prev[0] * f * (1 - f);
    dpre[2] = regular.candidate(dmid[0]) * i * (1 - g * g);
    dstate[0] += dmid[1] * f;
    mid[0] = i * regular.candidate(g);
    mid[1] = f * prev[0];
  }
};

template <class Math>
struct NestedGruCell {
  using V = typename Math::V;
  static constexpr int kGates = 3, kSlots = 4, kFirst = 3, kFirstSlot = 1, kSecond = 4, kMid = 2;
  static constexpr int kSaved = 8, kStates = 1, kCarry = 1, kPlanes = 8, kEndPlane = 4;
  static constexpr int kOwn = 0;
  static constexpr bool kNeedsH = false, kNeedsHPrev = true;

  // A GRU that blends by another GRU, of input (1 - z) n and hidden state z h_prev, where the
  // usual one adds the two. Slots of both: n r z n'
  template <class Regular>
  static SEQKERN_HOST_DEVICE void begin(const V* pre, V h_prev, V /*h_in*/, const V* /*state*/,
                                        const Regular& regular, V* saved, V* mid) {
    saved[0] = Math::sigmoid(pre[1]);
    saved[1] = Math::sigmoid(pre[2]);
    saved[2] = Math::tanh(pre[0] + saved[0] * pre[3]);
    saved[3] = pre[3];
    mid[0] = (1 - saved[1]) * regular.candidate(saved[2]);
    mid[1] = saved[1] * h_prev;
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE V end(const V* /*pre*/, const V* second, V h_prev, V* /*state*/,
                                   const Regular& /*regular*/, V* saved) {
    return GruCell<Math>::forward(second, saved[1] * h_prev, nullptr, nullptr, Unregularised{},
                                  saved + 4);
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE void end_backward(V dh, V* /*dstate*/, const V* saved, V h_prev,
                                               const V* /*prev*/, const Regular& /*regular*/,
                                               V* dpre, V* carry, V& past) {
    carry[0] = GruCell<Math>::backward(dh, nullptr, saved + 4, V{}, saved[1] * h_prev, nullptr,
                                       nullptr, Unregularised{}, dpre + 4);  // of z h_prev
    past = V{};
  }

  template <class Regular>
  static SEQKERN_HOST_DEVICE void begin_backward(const V* dmid, V* /*dstate*/, const V* saved,
                                                 V h_prev, V /*h_in*/, V /*scale*/,
                                                 const V* /*prev*/, const Regular& regular,
                                                 const V* carry, V* dpre, V& past, V* mid) {
    const V r = saved[0], z = saved[1], n = saved[2], scaled = regular.candidate(n);
    const V dkept = carry[0] + dmid[1];
    const V dn = regular.candidate(dmid[0] * (1 - z)) * (1 - n * n);
    dpre[0] = dn;
    dpre[1] = dn * saved[3] * r * (1 - r);
    dpre[2] = (dkept * h_prev - dmid[0] * scaled) * z * (1 - z);
    dpre[3] = dn * r;
    past += dkept * z;
    mid[0] = (1 - z) * scaled;
    mid[1] = z * h_prev;
  }
};

// ---- cells whose products are normalised over rows ----------------------------------------------
//
// pre is what normalisation, gain and bias have left of W_ih x + W_hh h; a row of the LSTM's c is
// normalised, too, before it is h = o tanh(normalised c).

template <class Math>
struct LayerNormLstmCell {
  using V = typename Math::V;
  static constexpr int kSaved = 6, kStates = 2;

  // i f g o = sigma(pre_i) sigma(pre_f) tanh(pre_g) sigma(pre_o);  c = f c_prev + i g
  // (Ba et al. 2016). saved: i f g o, the normalised c, c
  template <class Regular>
  static SEQKERN_HOST_DEVICE void make_c(const V* pre, V* state, const Regular& regular, V* saved) {
    LstmCell<Math>::forward(pre, V{}, state, nullptr, regular, saved);
    saved[5] = saved[4];
  }
  // h, from what gain and bias make of the normalised c
  static SEQKERN_HOST_DEVICE V make_h(V o, V c) { return o * Math::tanh(c); }
  // The gradients of that c (returned) and of pre_o.
  static SEQKERN_HOST_DEVICE V h_backward(V dh, const V* saved, V c, V* dpre) {
    const V tanh_c = Math::tanh(c), o = saved[3];
    dpre[3] = dh * tanh_c * o * (1 - o);
    return dh * o * (1 - tanh_c * tanh_c);
  }
  // dc: of the c that was made. The other pre-activations' gradients; dstate: c_prev's.
  template <class Regular>
  static SEQKERN_HOST_DEVICE void c_backward(V dc, V* dstate, const V* saved, const V* prev,
                                             const Regular& regular, V* dpre) {
    const V i = saved[0], f = saved[1], g = saved[2];
    dc = regular.clip_gradient(saved[5], dc);
    dpre[0] = dc * regular.candidate(g) * i * (1 - i);
    dpre[1] = dc * prev[0] * f * (1 - f);
    dpre[2] = regular.candidate(dc) * i * (1 - g * g);
    dstate[0] = dc * f;
  }
};

}  // namespace seqkern
