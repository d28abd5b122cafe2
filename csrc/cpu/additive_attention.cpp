// torch.ops.seqkern.additive_attention_forward and _backward on a CPU: checks memory, calls the
// kernels. Their schemas are in seqkern/ops/additive_attention.py; what is computed is checked
// there.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../additive_params.h"
#include "../dtype.h"
#include "dispatch.h"
#include "launch.h"

namespace seqkern {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

at::ScalarType wide(const Tensor& q) {
  return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check(const char* name, const Tensor& x, at::ScalarType dtype, at::IntArrayRef shape) {
  TORCH_CHECK(x.device().is_cpu(), name, ": expected a CPU tensor, got ", x.device());
  TORCH_CHECK(x.scalar_type() == dtype, name, ": expected ", dtype, ", got ", x.scalar_type());
  TORCH_CHECK(x.sizes() == shape, name, ": expected shape ", shape, ", got ", x.sizes());
}

// A tensor [B, rows, columns] with contiguous rows: x, or a copy of it that is kept.
BatchRows rows_of(const char* name, Tensor& x, const Tensor& q, at::IntArrayRef shape) {
  check(name, x, q.scalar_type(), shape);
  if (x.size(2) > 1 && x.stride(2) != 1) x = x.contiguous();
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

// One call's arguments, and the memory that they need besides.
struct Call {
  Tensor q, k, v, value;
  std::vector<int64_t> key, keys;

  Call(AdditiveParams& p, const Tensor& q_, const Tensor& k_, const Tensor& v_,
       const Tensor& value_, const OptionalTensor& key_valid, const OptionalTensor& lengths)
      : q(q_), k(k_), v(v_), value(value_) {
    TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && value.dim() == 3,
                "query, key, value: expected [B, L, H], [B, S, H], [B, S, D], got ", q.sizes(),
                ", ", k.sizes(), ", ", value.sizes());
    p.dtype = dtype_of(q);
    p.B = q.size(0);
    p.L = q.size(1);
    p.H = q.size(2);
    p.S = k.size(1);
    p.D = value.size(2);
    p.q = rows_of("query", q, q_, q.sizes());
    p.k = rows_of("key", k, q_, {p.B, p.S, p.H});
    p.value = rows_of("value", value, q_, {p.B, p.S, p.D});
    check("v", v, q.scalar_type(), {p.H});
    v = v.contiguous();
    p.v = v.const_data_ptr();
    find_keys(p, key_valid, lengths);
    double pairs = 0;
    for (int64_t b = 0; b < p.B; b++) pairs += double(p.L) * double(p.keys ? p.keys[b] : p.S);
    p.threads =
        at::in_parallel_region() || pairs * double(p.H + p.D) < 100000 ? 1 : at::get_num_threads();
  }

 private:
  void find_keys(AdditiveParams& p, const OptionalTensor& key_valid,
                 const OptionalTensor& lengths) {
    if (!key_valid && !lengths) return;
    TORCH_CHECK(!(key_valid && lengths), "lengths: not with key_valid");
    key.resize(size_t(p.B * p.S));
    keys.resize(size_t(p.B));
    const uint8_t* valid = nullptr;
    Tensor mask, counts;
    if (key_valid) {
      check("key_valid", *key_valid, at::kBool, {p.B, p.S});
      mask = key_valid->contiguous();
      valid = static_cast<const uint8_t*>(mask.const_data_ptr());
    } else {
      check("lengths", *lengths, at::kLong, {p.B});
      counts = lengths->contiguous();
    }
    for (int64_t b = 0; b < p.B; b++) {
      int64_t n = 0;
      if (valid) {
        for (int64_t s = 0; s < p.S; s++)
          if (valid[b * p.S + s]) key[size_t(b * p.S + n++)] = s;
      } else {
        const int64_t length = counts.const_data_ptr<int64_t>()[b];
        TORCH_CHECK_VALUE(length >= 0 && length <= p.S, "lengths: expected 0 to S = ", p.S,
                          ", got ", length, " at ", b);
        for (; n < length; n++) key[size_t(b * p.S + n)] = n;
      }
      keys[size_t(b)] = n;
    }
    p.key = key.data();
    p.keys = keys.data();
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& value, const OptionalTensor& key_valid,
                                   const OptionalTensor& lengths) {
  AdditiveForwardParams p{};
  const Call call(p, q, k, v, value, key_valid, lengths);
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
  const Call call(p, q, k, v, value, key_valid, lengths);
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
