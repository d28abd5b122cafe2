// torch.ops.seqkern.attention_pieces_forward and _backward: checks memory, calls the kernels. What
// is computed is checked in Python; here only what could read or write out of bounds.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../dtype.h"
#include "dispatch.h"
#include "launch.h"

namespace seqkern {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kPieceFields = int64_t(sizeof(AttentionPiece) / sizeof(int64_t));

// A tensor [B, heads, rows, E] whose rows are contiguous.
HeadTensor heads_of(const char* name, const Tensor& x, at::ScalarType dtype,
                    at::IntArrayRef shape) {
  TORCH_CHECK(x.device().is_cpu(), name, ": expected a CPU tensor, got ", x.device());
  TORCH_CHECK(x.scalar_type() == dtype, name, ": expected ", dtype, ", got ", x.scalar_type());
  TORCH_CHECK(x.sizes() == shape, name, ": expected shape ", shape, ", got ", x.sizes());
  TORCH_CHECK(x.size(3) <= 1 || x.stride(3) == 1, name, ": expected contiguous rows, got strides ",
              x.strides());
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

HeadTensor heads_of(const char* name, const OptionalTensor& x, at::ScalarType dtype,
                    at::IntArrayRef shape) {
  return x ? heads_of(name, *x, dtype, shape) : HeadTensor{};
}

const uint8_t* valid_of(const char* name, const OptionalTensor& x, int64_t B, int64_t size) {
  if (!x) return nullptr;
  TORCH_CHECK(x->device().is_cpu() && x->scalar_type() == at::kBool && x->is_contiguous() &&
                  x->sizes() == at::IntArrayRef({B, size}),
              name, ": expected a contiguous bool tensor ", at::IntArrayRef({B, size}));
  return static_cast<const uint8_t*>(x->const_data_ptr());
}

void fill(AttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v,
          const Tensor& pieces, const OptionalTensor& mask, const OptionalTensor& key_valid,
          const OptionalTensor& query_valid, const OptionalTensor& seed, double scale, int64_t left,
          int64_t right, double dropout_p) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k, v: expected 4-D");
  const int64_t B = q.size(0), rows = q.size(2), keys = k.size(2);
  p.dtype = dtype_of(q);
  TORCH_CHECK(p.dtype != Dtype::f64, "q: expected float32, bfloat16 or float16, got float64");
  p.N = q.size(1);
  p.Nk = k.size(1);
  p.E = q.size(3);
  p.Ev = v.size(3);
  TORCH_CHECK(p.Nk > 0 && p.N % p.Nk == 0 && p.E > 0 && p.Ev > 0, "heads: ", p.N, " and ", p.Nk,
              " of ", p.E, " and ", p.Ev);
  p.q = heads_of("q", q, q.scalar_type(), q.sizes());
  p.k = heads_of("k", k, q.scalar_type(), {B, p.Nk, keys, p.E});
  p.v = heads_of("v", v, q.scalar_type(), {B, p.Nk, keys, p.Ev});
  if (mask) {
    TORCH_CHECK(mask->device().is_cpu() && mask->sizes() == at::IntArrayRef({B, p.N, rows, keys}),
                "mask: expected [B, N, L, S] on the CPU, got ", mask->sizes());
    TORCH_CHECK(mask->scalar_type() == at::kBool || mask->scalar_type() == at::kFloat,
                "mask: expected bool or float32, got ", mask->scalar_type());
    if (mask->scalar_type() == at::kBool)
      p.allowed = static_cast<const uint8_t*>(mask->const_data_ptr());
    else
      p.bias = mask->const_data_ptr<float>();
    p.mask_of_batch = mask->stride(0);
    p.mask_of_head = mask->stride(1);
    p.mask_of_query = mask->stride(2);
    p.mask_of_key = mask->stride(3);
  }
  p.key_valid = valid_of("key_valid", key_valid, B, keys);
  p.key_valid_of_batch = keys;
  p.query_valid = valid_of("query_valid", query_valid, B, rows);
  p.query_valid_of_batch = rows;
  p.scale = float(scale);
  p.left = left;
  p.right = right;
  TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p: expected 0 … 1, got ", dropout_p);
  p.dropout_p = float(dropout_p);
  if (dropout_p > 0) {
    TORCH_CHECK(
        seed && seed->device().is_cpu() && seed->scalar_type() == at::kLong && seed->numel() == 1,
        "seed: expected one int64 on the CPU");
    p.seed = *seed->const_data_ptr<int64_t>();
  }
  TORCH_CHECK(pieces.device().is_cpu() && pieces.scalar_type() == at::kLong && pieces.dim() == 2 &&
                  pieces.size(1) == kPieceFields && pieces.is_contiguous(),
              "pieces: expected [n, ", kPieceFields, "] int64, got ", pieces.sizes());
  p.pieces = pieces.size(0);
  p.piece = static_cast<const AttentionPiece*>(pieces.const_data_ptr());
  double work = 0;
  for (int64_t i = 0; i < p.pieces; i++) {
    const AttentionPiece& piece = p.piece[i];
    TORCH_CHECK(piece.batch >= 0 && piece.batch < B && piece.L > 0 && piece.S > 0 &&
                    piece.query_row >= 0 && piece.query_row + piece.L <= rows &&
                    piece.key_row >= 0 && piece.key_row + piece.S <= keys && piece.sequence >= 0 &&
                    piece.l0 >= 0 && piece.s0 >= 0,
                "pieces: piece ", i, " is outside of its tensors");
    work += double(piece.L) * double(piece.S);
  }
  work *= double(p.N * (p.E + p.Ev));
  p.threads = at::in_parallel_region() || work < 200000 ? 1 : at::get_num_threads();
}

void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pieces,
             const OptionalTensor& mask, const OptionalTensor& key_valid,
             const OptionalTensor& query_valid, const OptionalTensor& seed, double scale,
             int64_t left, int64_t right, double dropout_p, Tensor out, std::optional<Tensor> lse,
             std::optional<Tensor> weights) {
  AttentionForwardParams p{};
  fill(p, q, k, v, pieces, mask, key_valid, query_valid, seed, scale, left, right, dropout_p);
  const int64_t B = q.size(0), rows = q.size(2);
  p.out = heads_of("out", out, q.scalar_type(), {B, p.N, rows, p.Ev});
  p.lse = heads_of("lse", lse, at::kFloat, {B, p.N, rows, 1});
  if (weights) {
    TORCH_CHECK(weights->dim() == 4 && (weights->size(1) == 1 || weights->size(1) == p.N),
                "weights: expected [B, 1 or N, L, S], got ", weights->sizes());
    p.weights = heads_of("weights", *weights, at::kFloat, weights->sizes());
    p.average = weights->size(1) == 1;
    for (int64_t i = 0; i < p.pieces; i++) {
      const AttentionPiece& piece = p.piece[i];
      TORCH_CHECK(piece.sequence < weights->size(0) && piece.l0 + piece.L <= weights->size(2) &&
                      piece.s0 + piece.S <= weights->size(3),
                  "weights: piece ", i, " is outside of ", weights->sizes());
    }
  }
  prefer_large_pages(out);
  if (p.pieces > 0) launch(p, kernels().attention_forward_scratch, kernels().attention_forward);
}

void backward(const Tensor& dout, const Tensor& out, const Tensor& lse, const Tensor& q,
              const Tensor& k, const Tensor& v, const Tensor& pieces, const OptionalTensor& mask,
              const OptionalTensor& key_valid, const OptionalTensor& query_valid,
              const OptionalTensor& seed, double scale, int64_t left, int64_t right,
              double dropout_p, std::optional<Tensor> dq, std::optional<Tensor> dk,
              std::optional<Tensor> dv) {
  AttentionBackwardParams p{};
  fill(p, q, k, v, pieces, mask, key_valid, query_valid, seed, scale, left, right, dropout_p);
  const int64_t B = q.size(0), rows = q.size(2);
  p.dout = heads_of("dout", dout, q.scalar_type(), {B, p.N, rows, p.Ev});
  p.out = heads_of("out", out, q.scalar_type(), {B, p.N, rows, p.Ev});
  p.lse = heads_of("lse", lse, at::kFloat, {B, p.N, rows, 1});
  p.dq = heads_of("dq", dq, q.scalar_type(), q.sizes());
  p.dk = heads_of("dk", dk, q.scalar_type(), k.sizes());
  p.dv = heads_of("dv", dv, q.scalar_type(), v.sizes());
  for (const std::optional<Tensor>& grad : {dq, dk, dv})
    if (grad) prefer_large_pages(*grad);
  if (p.pieces > 0) launch(p, kernels().attention_backward_scratch, kernels().attention_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(seqkern, CPU, library) {
  library.impl("attention_pieces_forward", &forward);
  library.impl("attention_pieces_backward", &backward);
}

}  // namespace seqkern
