// torch.ops.seqkern.additive_attention_forward and _backward on a CPU: checks memory, calls the
// kernels. Their schemas are in seqkern/ops/additive_attention.py; what is computed is checked
// there.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "additive_call.h"
#include "dispatch.h"
#include "launch.h"

namespace seqkern {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& value, const OptionalTensor& key_valid,
                                   const OptionalTensor& lengths) {
  AdditiveForwardParams p{};
  const AdditiveCall call(p, q, k, v, value, key_valid, lengths);
  const Tensor context = new_empty({p.B, p.L, p.D}, q.options());
  const Tensor weights = new_empty({p.B, p.L, p.S}, q.options().dtype(wide(q)));
  p.context = context.mutable_data_ptr();
  p.weights = weights.mutable_data_ptr();
  if (p.B * p.L > 0) launch(p, kernels().additive_forward_scratch, kernels().additive_forward);
  return {context, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const OptionalTensor& dcontext, const OptionalTensor& dweights, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& value, const OptionalTensor& key_valid,
    const OptionalTensor& lengths, const Tensor& weights, bool need_dq, bool need_dk, bool need_dv,
    bool need_dvalue) {
  AdditiveBackwardParams p{};
  const AdditiveCall call(p, q, k, v, value, key_valid, lengths);
  check("weights", weights, wide(q), {p.B, p.L, p.S});
  TORCH_CHECK(weights.is_contiguous(), "weights: expected them as forward returned them");
  p.weights = const_cast<void*>(weights.const_data_ptr());
  Tensor dcontext_rows, dweights_rows;
  if (dcontext) {
    dcontext_rows = *dcontext;
    p.dcontext = rows_of("dcontext", dcontext_rows, q, {p.B, p.L, p.D});
  }
  if (dweights) {
    check("dweights", *dweights, wide(q), {p.B, p.L, p.S});
    dweights_rows = dweights->contiguous();
    p.dweights = dweights_rows.const_data_ptr();
  }
  const auto grad = [&](bool need, at::IntArrayRef shape, bool whole) {
    if (!need) return at::empty({0}, q.options());
    return whole ? new_empty(shape, q.options()) : at::zeros(shape, q.options());
  };
  const bool all = !p.key && p.B * p.L * p.S > 0;
  const bool any = p.B * p.L * p.S > 0;
  const Tensor dq = grad(need_dq, {p.B, p.L, p.H}, any);
  const Tensor dk = grad(need_dk, {p.B, p.S, p.H}, all);
  const Tensor dv = grad(need_dv, {p.H}, any);
  const Tensor dvalue = grad(need_dvalue, {p.B, p.S, p.D}, all && dcontext);
  p.dq = need_dq ? dq.mutable_data_ptr() : nullptr;
  p.dk = need_dk ? dk.mutable_data_ptr() : nullptr;
  p.dv = need_dv ? dv.mutable_data_ptr() : nullptr;
  p.dvalue = need_dvalue && dcontext ? dvalue.mutable_data_ptr() : nullptr;
  if (any) launch(p, kernels().additive_backward_scratch, kernels().additive_backward);
  return {dq, dk, dv, dvalue};
}

}  // namespace

TORCH_LIBRARY_IMPL(seqkern, CPU, library) {
  library.impl("additive_attention_forward", &forward);
  library.impl("additive_attention_backward", &backward);
}

}  // namespace seqkern
