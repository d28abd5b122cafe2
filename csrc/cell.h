// The gate equations and their derivatives, once, for every kernel (host and device, forward and
// backward).
//
// A cell works on one value of type V (a scalar or a vector of lanes) per gate; Math supplies V,
// sigmoid, tanh.
//   kGates   gates, in PyTorch's order, as W_ih and W_hh have them
//   kSlots   pre-activations: W_ih's products lie in the first kGates slots, W_hh's in the last
//            kGates, and where the two ranges overlap the products are added. A GRU needs W_in x
//            and W_hn h apart, hence its order n r z n' (x to n r z, h to r z n').
//   kSaved   values that backward wants back
//   kHasC    whether there is a cell state
#pragma once

#ifdef __CUDACC__
#define SEQKERN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SEQKERN_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace seqkern {

template <class Math>
struct LstmCell {
  using V = typename Math::V;
  static constexpr int kGates = 4, kSlots = 4, kSaved = 5;
  static constexpr bool kHasC = true;

  // i f g o = sigma(pre_i) sigma(pre_f) tanh(pre_g) sigma(pre_o)
  // c = f c_prev + i g;  h = o tanh(c)  (Hochreiter & Schmidhuber 1997; Gers et al. 2000)
  // c: previous state in, new state out.
  static SEQKERN_HOST_DEVICE V forward(const V* pre, V /*h_prev*/, V& c, V* saved) {
    const V i = Math::sigmoid(pre[0]);
    const V f = Math::sigmoid(pre[1]);
    const V g = Math::tanh(pre[2]);
    const V o = Math::sigmoid(pre[3]);
    c = f * c + i * g;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o, saved[4] = c;
    return o * Math::tanh(c);
  }

  // dc: gradient of c in, of c_prev out. dpre: overwritten. Returns the gradient that reaches
  // h_prev past W_hh.
  static SEQKERN_HOST_DEVICE V backward(V dh, V& dc, const V* saved, V /*h*/, V /*h_prev*/,
                                        V c_prev, V* dpre) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = Math::tanh(saved[4]);
    const V dc_all = dc + dh * o * (1 - tanh_c * tanh_c);
    dpre[0] = dc_all * g * i * (1 - i);
    dpre[1] = dc_all * c_prev * f * (1 - f);
    dpre[2] = dc_all * i * (1 - g * g);
    dpre[3] = dh * tanh_c * o * (1 - o);
    dc = dc_all * f;
    return V{};
  }

  // What h is before a projection W_hr: o tanh(c).
  static SEQKERN_HOST_DEVICE V unprojected(const V* saved) {
    return saved[3] * Math::tanh(saved[4]);
  }
};

template <class Math>
struct GruCell {
  using V = typename Math::V;
  static constexpr int kGates = 3, kSlots = 4, kSaved = 4;
  static constexpr bool kHasC = false;

  // r z = sigma(pre_r) sigma(pre_z);  n = tanh(pre_n + r pre_n');  h = (1 - z) n + z h_prev
  // (Cho et al. 2014, with the reset gate after the product, as cuDNN and PyTorch have it).
  static SEQKERN_HOST_DEVICE V forward(const V* pre, V h_prev, V& /*c*/, V* saved) {
    const V r = Math::sigmoid(pre[1]);
    const V z = Math::sigmoid(pre[2]);
    const V n = Math::tanh(pre[0] + r * pre[3]);
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = pre[3];
    return n + z * (h_prev - n);
  }

  static SEQKERN_HOST_DEVICE V backward(V dh, V& /*dc*/, const V* saved, V /*h*/, V h_prev,
                                        V /*c_prev*/, V* dpre) {
    const V r = saved[0], z = saved[1], n = saved[2];
    const V dn = dh * (1 - z) * (1 - n * n);
    dpre[0] = dn;
    dpre[1] = dn * saved[3] * r * (1 - r);
    dpre[2] = dh * (h_prev - n) * z * (1 - z);
    dpre[3] = dn * r;
    return dh * z;
  }
};

template <class Math>
struct RnnTanhCell {
  using V = typename Math::V;
  static constexpr int kGates = 1, kSlots = 1, kSaved = 0;
  static constexpr bool kHasC = false;

  // h = tanh(pre)  (Elman 1990)
  static SEQKERN_HOST_DEVICE V forward(const V* pre, V /*h_prev*/, V& /*c*/, V* /*saved*/) {
    return Math::tanh(pre[0]);
  }

  static SEQKERN_HOST_DEVICE V backward(V dh, V& /*dc*/, const V* /*saved*/, V h, V /*h_prev*/,
                                        V /*c_prev*/, V* dpre) {
    dpre[0] = dh * (1 - h * h);
    return V{};
  }
};

template <class Math>
struct RnnReluCell {
  using V = typename Math::V;
  static constexpr int kGates = 1, kSlots = 1, kSaved = 0;
  static constexpr bool kHasC = false;

  // h = max(pre, 0); NaN stays NaN
  static SEQKERN_HOST_DEVICE V forward(const V* pre, V /*h_prev*/, V& /*c*/, V* /*saved*/) {
    return pre[0] < 0 ? V{} : pre[0];
  }

  static SEQKERN_HOST_DEVICE V backward(V dh, V& /*dc*/, const V* /*saved*/, V h, V /*h_prev*/,
                                        V /*c_prev*/, V* dpre) {
    dpre[0] = h > 0 ? dh : V{};
    return V{};
  }
};

}  // namespace seqkern
