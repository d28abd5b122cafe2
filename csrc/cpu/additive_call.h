// What the torch sides of additive attention share: a call's arguments, checked. What is computed
// is checked in Python; here only what could read or write out of bounds.
#pragma once

#include <ATen/Parallel.h>

#include <optional>
#include <vector>

#include "../additive_params.h"
#include "../dtype.h"

namespace seqkern {

inline at::ScalarType wide(const at::Tensor& q) {
  return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check(const char* name, const at::Tensor& x, at::ScalarType dtype,
                  at::IntArrayRef shape) {
  TORCH_CHECK(x.device().is_cpu(), name, ": expected a CPU tensor, got ", x.device());
  TORCH_CHECK(x.scalar_type() == dtype, name, ": expected ", dtype, ", got ", x.scalar_type());
  TORCH_CHECK(x.sizes() == shape, name, ": expected shape ", shape, ", got ", x.sizes());
}

// A tensor [B, rows, columns] with contiguous rows: x, or a copy of it that is kept.
inline BatchRows rows_of(const char* name, at::Tensor& x, const at::Tensor& q,
                         at::IntArrayRef shape) {
  check(name, x, q.scalar_type(), shape);
  if (x.size(2) > 1 && x.stride(2) != 1) x = x.contiguous();
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

// One call's arguments, and the memory that they need besides.
struct AdditiveCall {
  at::Tensor q, k, v, value;
  std::vector<int64_t> key, keys;

  AdditiveCall(AdditiveParams& p, const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
               const at::Tensor& value_, const std::optional<at::Tensor>& key_valid,
               const std::optional<at::Tensor>& lengths)
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
        at::in_parallel_region() || pairs * double(p.H + p.D) < 500000 ? 1 : at::get_num_threads();
  }

 private:
  void find_keys(AdditiveParams& p, const std::optional<at::Tensor>& key_valid,
                 const std::optional<at::Tensor>& lengths) {
    if (!key_valid && !lengths) return;
    TORCH_CHECK(!(key_valid && lengths), "lengths: not with key_valid");
    key.resize(size_t(p.B * p.S));
    keys.resize(size_t(p.B));
    const uint8_t* valid = nullptr;
    at::Tensor mask, counts;
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

}  // namespace seqkern
