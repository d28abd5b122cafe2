// torch.ops.seqkern.crf_*, the torch side on the CPU: checks memory and what it is indexed by,
// allocates, calls the kernels. The schemas are in seqkern/ops/crf.py, where what is computed is
// checked.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

#include "../crf_params.h"
#include "../dtype.h"
#include "dispatch.h"
#include "launch.h"

namespace seqkern {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// One call's tensors, checked and kept alive, and which steps count.
class Call {
 public:
  int64_t T, B, K;
  Tensor emissions;

  Call(const Tensor& emissions_, const Tensor& start_, const Tensor& end_,
       const Tensor& transitions_, const OptionalTensor& tags_, const OptionalTensor& mask,
       const OptionalTensor& lengths)
      : emissions(emissions_) {
    TORCH_CHECK(emissions.device().is_cpu(), "emissions: expected a CPU tensor, got ",
                emissions.device());
    TORCH_CHECK(emissions.dim() == 3 && emissions.size(0) > 0 && emissions.size(2) > 0,
                "emissions: expected [T, B, K] with T > 0 and K > 0, got ", emissions.sizes());
    TORCH_CHECK(emissions.scalar_type() == at::kFloat || emissions.scalar_type() == at::kDouble,
                "emissions: expected float32 or float64, got ", emissions.scalar_type());
    T = emissions.size(0);
    B = emissions.size(1);
    K = emissions.size(2);
    if (emissions.stride(2) != 1 && K > 1) emissions = emissions.contiguous();
    start = check("start", start_, emissions.scalar_type(), {K}).contiguous();
    end = check("end", end_, emissions.scalar_type(), {K}).contiguous();
    transitions = check("transitions", transitions_, emissions.scalar_type(), {K, K}).contiguous();
    TORCH_CHECK(!mask || !lengths, "lengths: not with a mask");
    if (mask)
      read_mask(check("mask", *mask, at::kBool, {T, B}));
    else if (lengths)
      read_lengths(check("lengths", *lengths, at::kLong, {B}).contiguous());
    else
      count.assign(size_t(B), T);
    order.resize(size_t(B));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [this](int64_t a, int64_t b) { return count[size_t(a)] > count[size_t(b)]; });
    if (tags_) {
      tags = check("tags", *tags_, at::kLong, {T, B});
      check_tags();
    }
  }

  static const Tensor& check(const char* name, const Tensor& tensor, at::ScalarType dtype,
                             at::IntArrayRef shape) {
    TORCH_CHECK(tensor.device().is_cpu(), name, ": expected a CPU tensor, got ", tensor.device());
    TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected ", dtype, ", got ",
                tensor.scalar_type());
    TORCH_CHECK(tensor.sizes() == shape, name, ": expected shape ", shape, ", got ",
                tensor.sizes());
    return tensor;
  }

  void fill(CrfParams& p) const {
    p.dtype = dtype_of(emissions);
    p.T = T, p.B = B, p.K = K;
    // A few thousand multiplications are done before a second thread has woken up.
    const double work = double(T) * double(B) * double(K) * double(K + 32);
    p.threads = at::in_parallel_region() || work < 100000 ? 1 : at::get_num_threads();
    p.emissions = emissions.const_data_ptr();
    p.emissions_of_step = emissions.stride(0);
    p.emissions_of_row = emissions.stride(1);
    p.start = start.const_data_ptr();
    p.end = end.const_data_ptr();
    p.transitions = transitions.const_data_ptr();
    if (tags.defined()) {
      p.tags = tags.const_data_ptr<int64_t>();
      p.tags_of_step = tags.stride(0);
      p.tags_of_row = tags.stride(1);
    }
    p.count = count.data();
    p.order = order.data();
    p.step = step.empty() ? nullptr : step.data();
  }

  std::vector<int64_t> alphas_shape() const {
    return {B, T, (K + kCrfPad - 1) / kCrfPad * kCrfPad};
  }

 private:
  Tensor start, end, transitions, tags;
  std::vector<int64_t> count, order;
  std::vector<int32_t> step;

  void read_mask(const Tensor& mask) {
    const auto* on = static_cast<const uint8_t*>(mask.const_data_ptr());
    const int64_t of_step = mask.stride(0), of_row = mask.stride(1);
    bool holes = false;
    for (int64_t b = 0; b < B; b++) {
      TORCH_CHECK_VALUE(on[b * of_row], "mask: mask of the first timestep must all be on, got off ",
                        "for sequence ", b);
      int64_t steps = 1, last = 0;
      for (int64_t t = 1; t < T; t++)
        if (on[t * of_step + b * of_row]) steps++, last = t;
      count.push_back(steps);
      holes = holes || last != steps - 1;
    }
    if (!holes) return;
    TORCH_CHECK(T <= INT32_MAX, "emissions: too many steps, ", T);
    step.resize(size_t(B * T));
    for (int64_t b = 0; b < B; b++) {
      int32_t* next = step.data() + b * T;
      for (int64_t t = 0; t < T; t++)
        if (on[t * of_step + b * of_row]) *next++ = int32_t(t);
    }
  }

  void read_lengths(const Tensor& lengths) {
    const int64_t* length = lengths.const_data_ptr<int64_t>();
    for (int64_t b = 0; b < B; b++)
      TORCH_CHECK_VALUE(length[b] >= 1 && length[b] <= T, "lengths: expected values in 1..T = 1..",
                        T, ", got lengths[", b, "] = ", length[b]);
    count.assign(length, length + B);
  }

  // Every tag that the score reads.
  void check_tags() const {
    const int64_t* tag = tags.const_data_ptr<int64_t>();
    const auto check_at = [&](int64_t t, int64_t b) {
      const int64_t value = tag[t * tags.stride(0) + b * tags.stride(1)];
      TORCH_CHECK_INDEX(value >= 0 && value < K, "tags: expected values in 0..K-1 = 0..", K - 1,
                        ", got ", value, " at step ", t, " of sequence ", b);
    };
    for (int64_t b = 0; b < B; b++) {
      check_at(count[size_t(b)] - 1, b);
      for (int64_t i = 0; i < count[size_t(b)]; i++) {
        const int64_t t = step.empty() ? i : step[size_t(b * T + i)];
        check_at(t, b);
        if (!step.empty() && t > 0) check_at(t - 1, b);
      }
    }
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& emissions, const Tensor& start, const Tensor& end,
                                   const Tensor& transitions, const OptionalTensor& tags,
                                   const OptionalTensor& mask, const OptionalTensor& lengths,
                                   bool save) {
  const Call call(emissions, start, end, transitions, tags, mask, lengths);
  const Tensor value = at::empty({call.B}, emissions.options());
  const Tensor alphas =
      save ? new_empty(call.alphas_shape(), emissions.options()) : value.new_empty({0});
  CrfForwardParams p{};
  call.fill(p);
  p.value = value.mutable_data_ptr();
  p.alphas = save ? alphas.mutable_data_ptr() : nullptr;
  if (call.B > 0) launch(p, kernels().crf->forward_scratch, kernels().crf->forward);
  return {value, alphas};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dvalue, const Tensor& emissions, const Tensor& start, const Tensor& end,
    const Tensor& transitions, const OptionalTensor& tags, const OptionalTensor& mask,
    const OptionalTensor& lengths, const Tensor& alphas, bool need_dparams) {
  const Call call(emissions, start, end, transitions, tags, mask, lengths);
  const at::ScalarType dtype = emissions.scalar_type();
  const Tensor dvalue_ = Call::check("dvalue", dvalue, dtype, {call.B}).contiguous();
  Call::check("alphas", alphas, dtype, call.alphas_shape());
  TORCH_CHECK(alphas.is_contiguous(), "alphas: expected it as forward returned it");
  // In memory as emissions are, time first or batch first.
  const bool batch_first = emissions.stride(0) < emissions.stride(1);
  const Tensor made = new_empty(
      {batch_first ? call.B : call.T, batch_first ? call.T : call.B, call.K}, emissions.options());
  const Tensor demissions = batch_first ? made.transpose(0, 1) : made;
  const auto of_param = [&](at::IntArrayRef shape) {
    return need_dparams ? at::zeros(shape, emissions.options()) : dvalue_.new_empty({0});
  };
  const Tensor dstart = of_param({call.K}), dend = of_param({call.K});
  const Tensor dtransitions = of_param({call.K, call.K});
  CrfBackwardParams p{};
  call.fill(p);
  p.dvalue = dvalue_.const_data_ptr();
  p.alphas = alphas.const_data_ptr();
  p.demissions = demissions.mutable_data_ptr();
  p.demissions_of_step = demissions.stride(0);
  p.demissions_of_row = demissions.stride(1);
  if (need_dparams) {
    p.dstart = dstart.mutable_data_ptr();
    p.dend = dend.mutable_data_ptr();
    p.dtransitions = dtransitions.mutable_data_ptr();
  }
  if (call.B > 0) launch(p, kernels().crf->backward_scratch, kernels().crf->backward);
  return {demissions, dstart, dend, dtransitions};
}

std::tuple<Tensor, Tensor> decode(const Tensor& emissions, const Tensor& start, const Tensor& end,
                                  const Tensor& transitions, const OptionalTensor& mask,
                                  const OptionalTensor& lengths, int64_t n) {
  const Call call(emissions, start, end, transitions, std::nullopt, mask, lengths);
  TORCH_CHECK(n >= 1 && n <= INT32_MAX / call.K, "n: expected 1..", INT32_MAX / call.K, ", got ",
              n);
  const Tensor best = new_empty({n, call.B, call.T}, emissions.options().dtype(at::kLong));
  const Tensor scores = at::empty({n, call.B}, emissions.options());
  CrfDecodeParams p{};
  call.fill(p);
  p.n = n;
  p.best = best.mutable_data_ptr<int64_t>();
  p.scores = scores.mutable_data_ptr();
  if (call.B > 0) launch(p, kernels().crf->decode_scratch, kernels().crf->decode);
  return {best, scores};
}

}  // namespace

TORCH_LIBRARY_IMPL(seqkern, CPU, library) {
  library.impl("crf_forward", &forward);
  library.impl("crf_backward", &backward);
  library.impl("crf_decode", &decode);
}

}  // namespace seqkern
