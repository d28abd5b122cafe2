// torch.ops.seqkern.attention_decoder_forward and _backward on a CPU: all steps of a decoder with
// additive attention in one call. A step is a product with W_query and W_hh together (torch's), the
// attention of one query per sequence (its keys packed once), a product with the context, and the
// gates. Backward walks back; what is summed over steps (the weights' gradients, dkey, dv, dvalue)
// is computed once, after the walk. Schemas: seqkern/ops/attention_decoder.py.
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "additive_call.h"
#include "dispatch.h"
#include "launch.h"

namespace seqkern {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A tensor that the kernels read: contiguous.
Tensor checked(const char* name, const Tensor& x, const Tensor& like, at::IntArrayRef shape) {
  check(name, x, like.scalar_type(), shape);
  return x.contiguous();
}

// Both passes' arguments and sizes. Letters: T steps, B batch, H hidden, G gates, A size of the
// projected queries and keys, S keys, D size of a value.
struct DecoderCall {
  CellKind cell;
  int64_t T, B, H, G, A, S, D;
  Tensor gates, h0, c0, w, b_hh, w_context;  // w: [W_query; W_hh]
  Tensor key, v, value;
  OptionalTensor key_valid, lengths;

  DecoderCall(const Tensor& gates_, const Tensor& h0_, const OptionalTensor& c0_,
              const Tensor& w_hh, const OptionalTensor& b_hh_, const Tensor& w_context_,
              const Tensor& w_query, const Tensor& key_, const Tensor& v_, const Tensor& value_,
              const OptionalTensor& key_valid_, const OptionalTensor& lengths_)
      : key(key_), v(v_), value(value_), key_valid(key_valid_), lengths(lengths_) {
    TORCH_CHECK(gates_.scalar_type() == at::kFloat || gates_.scalar_type() == at::kDouble,
                "gates: expected float32 or float64, got ", gates_.scalar_type());
    TORCH_CHECK(gates_.dim() == 3 && h0_.dim() == 2 && key.dim() == 3 && value.dim() == 3 &&
                    gates_.size(0) > 0,
                "gates, h0, key, value: expected [T, B, G*H] with T > 0, [B, H], [B, S, A], "
                "[B, S, D], got ",
                gates_.sizes(), ", ", h0_.sizes(), ", ", key.sizes(), ", ", value.sizes());
    cell = c0_ ? CellKind::lstm : CellKind::gru;
    G = c0_ ? 4 : 3;
    T = gates_.size(0), B = gates_.size(1), H = h0_.size(1);
    A = key.size(2), S = key.size(1), D = value.size(2);
    gates = checked("gates", gates_, gates_, {T, B, G * H});
    h0 = checked("h0", h0_, gates, {B, H});
    if (c0_) c0 = checked("c0", *c0_, gates, {B, H});
    w = at::cat(
        {checked("w_query", w_query, gates, {A, H}), checked("w_hh", w_hh, gates, {G * H, H})});
    if (b_hh_)
      b_hh = at::cat({at::zeros({A}, gates.options()), checked("b_hh", *b_hh_, gates, {G * H})});
    w_context = checked("w_context", w_context_, gates, {G * H, D});
  }

  int saved() const { return cell == CellKind::lstm ? 5 : 4; }
  // The queries of all steps, in the form that attention takes: [B, T, A].
  Tensor queries(const Tensor& products) const { return products.narrow(2, 0, A).transpose(0, 1); }
  // Row (b, t) of a tensor [T, B, n] that begins at column `first`.
  BatchRows rows(const Tensor& x, int64_t first = 0) const {
    return {static_cast<char*>(const_cast<void*>(x.const_data_ptr())) + first * x.element_size(),
            x.size(2), B * x.size(2)};
  }
  int threads(double work) const {
    return at::in_parallel_region() || work < 500000 ? 1 : at::get_num_threads();
  }

  GatesParams gates_of(int64_t t, const Tensor& of_input, const Tensor& of_hidden, int64_t first,
                       const Tensor& h, const Tensor& cells, const Tensor& saved_) const {
    GatesParams p{};
    p.cell = cell;
    p.dtype = dtype_of(gates);
    p.B = B, p.H = H;
    p.threads = threads(double(B * H * G));
    p.of_input = rows(of_input);
    p.of_hidden = rows(of_hidden, first);
    p.h_prev = (t ? h[t - 1] : h0).const_data_ptr();
    p.h = h[t].mutable_data_ptr();
    if (cell == CellKind::lstm) {
      p.c_prev = (t ? cells[t - 1] : c0).const_data_ptr();
      p.c = cells[t].mutable_data_ptr();
    }
    p.saved = saved_[t].mutable_data_ptr();
    return p;
  }

  // The attention of the steps, with its keys packed in memory that is kept.
  struct Steps {
    AdditiveStepParams p{};
    AdditiveCall call;
    Tensor packed, within;

    Steps(const DecoderCall& d, const Tensor& products, const Tensor& weights)
        : call(p, d.queries(products), d.key, d.v, d.value, d.key_valid, d.lengths) {
      const int64_t padded = (d.A + kPackedMultiple - 1) / kPackedMultiple * kPackedMultiple;
      packed = new_empty({d.B, d.S, 2, padded}, d.gates.options());
      within = at::empty({d.B}, at::kByte);
      p.packed = packed.mutable_data_ptr();
      p.within = static_cast<uint8_t*>(within.mutable_data_ptr());
      p.weights = const_cast<void*>(weights.const_data_ptr());
      kernels().additive_step_pack(p);
      p.threads = d.threads(double(d.B * d.S) * double(d.A + d.D));
    }
    void run(int64_t t) {
      p.t = t;
      launch(p, kernels().additive_step_scratch, kernels().additive_step);
    }
  };
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& gates, const Tensor& h0, const OptionalTensor& c0, const Tensor& w_hh,
    const OptionalTensor& b_hh, const Tensor& w_context, const Tensor& w_query, const Tensor& key,
    const Tensor& v, const Tensor& value, const OptionalTensor& key_valid,
    const OptionalTensor& lengths) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const DecoderCall d(gates, h0, c0, w_hh, b_hh, w_context, w_query, key, v, value, key_valid,
                      lengths);
  const bool lstm = d.cell == CellKind::lstm;
  const auto options = d.gates.options();
  const Tensor y = new_empty({d.T, d.B, d.H}, options);
  Tensor cells = at::empty({0}, options);
  if (lstm) cells = new_empty({d.T, d.B, d.H}, options);
  const Tensor context = new_empty({d.T, d.B, d.D}, options);
  const Tensor weights = new_empty({d.B, d.T, d.S}, options);
  const Tensor products = new_empty({d.T, d.B, d.A + d.G * d.H}, options);
  const Tensor saved = new_empty({d.T, d.B, d.saved(), d.H}, options);
  const Tensor of_input = new_empty({1, d.B, d.G * d.H}, options);
  DecoderCall::Steps steps(d, products, weights);
  steps.p.context = d.rows(context);
  const Tensor w = d.w.t(), w_c = d.w_context.t();
  for (int64_t t = 0; t < d.T; t++) {
    Tensor products_t = products[t], of_input_t = of_input[0];
    const Tensor h_prev = t ? y[t - 1] : d.h0;
    if (d.b_hh.defined())
      at::addmm_out(products_t, d.b_hh, h_prev, w);
    else
      at::mm_out(products_t, h_prev, w);
    steps.run(t);
    at::addmm_out(of_input_t, d.gates[t], context[t], w_c);
    GatesParams p = d.gates_of(t, of_input, products_t.unsqueeze(0), d.A, y, cells, saved);
    kernels().gates_forward(p);
  }
  return {y, cells, context, weights, products, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const OptionalTensor& dy, const OptionalTensor& dc_n, const OptionalTensor& dcontext,
    const OptionalTensor& dweights, const Tensor& gates, const Tensor& h0, const OptionalTensor& c0,
    const Tensor& w_hh, const OptionalTensor& b_hh, const Tensor& w_context, const Tensor& w_query,
    const Tensor& key, const Tensor& v, const Tensor& value, const OptionalTensor& key_valid,
    const OptionalTensor& lengths, const Tensor& y, const Tensor& cells, const Tensor& context,
    const Tensor& weights, const Tensor& products, const Tensor& saved) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const DecoderCall d(gates, h0, c0, w_hh, b_hh, w_context, w_query, key, v, value, key_valid,
                      lengths);
  const bool lstm = d.cell == CellKind::lstm;
  const int64_t GH = d.G * d.H;
  const auto options = d.gates.options();
  const auto kept = [&](const char* name, const Tensor& x, at::IntArrayRef shape) {
    check(name, x, d.gates.scalar_type(), shape);
    TORCH_CHECK(x.is_contiguous(), name, ": expected it as forward returned it");
  };
  kept("y", y, {d.T, d.B, d.H});
  if (lstm) kept("cells", cells, {d.T, d.B, d.H});
  kept("context", context, {d.T, d.B, d.D});
  kept("weights", weights, {d.B, d.T, d.S});
  kept("products", products, {d.T, d.B, d.A + GH});
  kept("saved", saved, {d.T, d.B, d.saved(), d.H});
  Tensor dy_, dcontext_, dweights_;
  if (dy) dy_ = checked("dy", *dy, d.gates, {d.T, d.B, d.H});
  if (dcontext) dcontext_ = checked("dcontext", *dcontext, d.gates, {d.T, d.B, d.D});
  if (dweights) dweights_ = checked("dweights", *dweights, d.gates, {d.B, d.T, d.S});
  Tensor dc = at::zeros({lstm ? d.B : 0, d.H}, options);
  if (lstm && dc_n) dc.copy_(checked("dc_n", *dc_n, d.gates, {d.B, d.H}));

  const Tensor dgates = new_empty({d.T, d.B, GH}, options);
  const Tensor dproducts = new_empty({d.T, d.B, d.A + GH}, options);
  const Tensor dcontext_all = new_empty({d.T, d.B, d.D}, options);
  const Tensor ds = new_empty({d.B, d.T, d.S}, options);
  Tensor dh = at::zeros({d.B, d.H}, options);  // of a step's h; then of the one before
  Tensor dh_total = at::empty({d.B, d.H}, options);
  DecoderCall::Steps steps(d, products, weights);
  steps.p.dcontext = d.rows(dcontext_all);
  if (dweights_.defined()) steps.p.dweights = dweights_.const_data_ptr();
  steps.p.ds = ds.mutable_data_ptr();
  steps.p.dq = d.rows(dproducts);
  for (int64_t t = d.T - 1; t >= 0; t--) {
    if (dy_.defined())
      at::add_out(dh_total, dh, dy_[t]);
    else
      dh_total.copy_(dh);
    Tensor dgates_t = dgates[t], dproducts_t = dproducts[t], dcontext_t = dcontext_all[t];
    GatesParams p =
        d.gates_of(t, dgates_t.unsqueeze(0), dproducts_t.unsqueeze(0), d.A, y, cells, saved);
    p.dh = dh_total.const_data_ptr();
    p.dc = dc.mutable_data_ptr();
    p.dh_prev = dh.mutable_data_ptr();
    kernels().gates_backward(p);
    if (dcontext_.defined())
      at::addmm_out(dcontext_t, dcontext_[t], dgates_t, d.w_context);
    else
      at::mm_out(dcontext_t, dgates_t, d.w_context);
    steps.run(t);
    dh.addmm_(dproducts_t, d.w);
  }

  // What is summed over steps.
  Tensor dw = at::mm(dproducts[0].t(), d.h0);
  if (d.T > 1)
    dw.addmm_(dproducts.narrow(0, 1, d.T - 1).flatten(0, 1).t(),
              y.narrow(0, 0, d.T - 1).flatten(0, 1));
  const Tensor db_hh =
      b_hh ? dproducts.narrow(2, d.A, GH).sum(at::IntArrayRef({0, 1})) : at::empty({0}, options);
  const Tensor dw_context = at::mm(dgates.flatten(0, 1).t(), context.flatten(0, 1));
  AdditiveBackwardParams p{};
  const AdditiveCall call(p, d.queries(products), d.key, d.v, d.value, key_valid, lengths);
  const Tensor dkey = at::zeros({d.B, d.S, d.A}, options), dv = at::zeros({d.A}, options);
  const Tensor dvalue = at::zeros({d.B, d.S, d.D}, options);
  p.weights = const_cast<void*>(weights.const_data_ptr());
  p.ds = ds.const_data_ptr();
  p.dcontext = {dcontext_all.mutable_data_ptr(), d.D, d.B * d.D};
  p.dk = dkey.mutable_data_ptr();
  p.dv = dv.mutable_data_ptr();
  p.dvalue = dvalue.mutable_data_ptr();
  launch(p, kernels().additive_backward_scratch, kernels().additive_backward);
  return {dgates,
          dh,
          dc,
          dw.narrow(0, d.A, GH).clone(),
          db_hh,
          dw_context,
          dw.narrow(0, 0, d.A).clone(),
          dkey,
          dv,
          dvalue};
}

}  // namespace

TORCH_LIBRARY_IMPL(seqkern, CPU, library) {
  library.impl("attention_decoder_forward", &forward);
  library.impl("attention_decoder_backward", &backward);
}

}  // namespace seqkern
