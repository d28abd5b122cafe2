// The torch side of one recurrent layer on a CUDA device.
//
// Outside of the recurrence, forward is one product (gx = x W_ih^T) and backward three (dx, dW_ih,
// dW_hh), which torch computes over all rows at once; the recurrence between them is a kernel of
// kernels.h or, step by step, a product and a launch each. Nothing here waits for the device or
// reads its memory, so that a CUDA graph can capture all of it; everything is launched on the
// current stream of x's device.
//
// With SEQKERN_CUDA_ON_CPU the device is the CPU, and the kernels run emulated.
#include "layer.h"

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>

#include "../layer_checks.h"
#include "device.h"
#include "kernels.h"

namespace seqkern::cuda {
namespace {

using at::Tensor;

#ifdef SEQKERN_CUDA_ON_CPU
constexpr c10::DeviceType kDevice = c10::DeviceType::CPU;
void* current_stream(c10::Device) { return nullptr; }
#else
constexpr c10::DeviceType kDevice = c10::DeviceType::CUDA;
void* current_stream(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}
#endif

constexpr Tier kTiers[] = {Tier::step, Tier::block, Tier::cluster, Tier::grid};
constexpr int kFree = -1;
std::atomic<int> forced_tier{kFree};  // index into kTiers

// torch.backends.cudnn.rnn.fp32_precision, as cuDNN's layers read it.
bool tf32_allowed() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::RNN) ==
         at::Float32Precision::TF32;
}

// What holds for torch's calls in here: x's device is the current one; nothing is recorded for
// autograd, nothing cast by autocast; without TF32 products are float32's, else they follow
// torch.backends.cuda.matmul.
struct Scope {
  explicit Scope(const Tensor& x) : device(x.device()), tf32(tf32_allowed()) {
    if (!tf32) no_tf32.emplace();
  }
  c10::DeviceGuard device;
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  bool tf32;
  std::optional<at::NoTF32Guard> no_tf32;
};

// As kernels.h wants them: contiguous, 16-byte aligned. Itself where it is.
Tensor ready(const Tensor& tensor) {
  const Tensor dense = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : dense.clone();
}

const void* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

// One layer's call: its arguments as the kernels want them.
class Call : public LayerCall {
 public:
  explicit Call(const LayerArguments& a)
      : LayerCall(a, kDevice),
        has_bias(a.params[2].defined()),
        lstm(cell == CellKind::lstm),
        options(x.options()),
        compute(dtype_of(x) == Dtype::f64 ? at::kDouble : at::kFloat),
        stream(current_stream(x.device())),
        N(rows_of_x()),
        slots(shape.slots),
        device(x.is_cpu() ? 0 : int(x.get_device())) {
    use_device(device);
    x_rows = x.reshape({N, I});
    for (Tensor& state : states) state = ready(state);
    for (Direction& w : directions)
      if (has_bias) w.b_ih = ready(w.b_ih), w.b_hh = ready(w.b_hh);
    rows = {T, B, N, nullptr, nullptr};
    if (ragged) {
      places = a.lengths->contiguous();
      rows.lengths = places.const_data_ptr<int64_t>();
    } else if (packed && sizes.back() < B) {
      place_packed();
    }
  }

  // Is there no step of any hidden unit?
  bool nothing() const { return T == 0 || B == 0 || H == 0; }

  template <class Params>
  Params params() const {
    Params p{};
    p.cell = cell;
    p.dtype = dtype_of(x);
    p.rows = rows;
    p.H = H, p.P = P, p.D = D;
    p.h0 = states[0].const_data_ptr();
    p.c0 = lstm ? states[1].const_data_ptr() : nullptr;
    return p;
  }

  // A result of which kernels write the valid rows; the others are zero.
  Tensor new_rows(at::IntArrayRef shape) const {
    return ragged ? at::zeros(shape, options) : at::empty(shape, options);
  }

  // x [N, I] with zeros past the lengths. There it may hold anything, and 0 * NaN is no 0; not even
  // rows are safe from each other, for products that read beyond I, into the next row, times zero.
  Tensor clean_x() const {
    if (!ragged) return x_rows;
    const Tensor t = at::arange(T, options.dtype(at::kLong));
    return x_rows.masked_fill(t.unsqueeze(1).ge(places).reshape({N, 1}), 0);
  }

  // The columns of dpre [.., slots*H] that W_hh's gates have (kernels.h), in W_hh's order.
  std::vector<Tensor> hidden_columns(const Tensor& dpre) const {
    if (slots == G) return {dpre};
    return {dpre.narrow(-1, 0, 2 * H), dpre.narrow(-1, 3 * H, H)};
  }

  bool has_bias, lstm;
  at::TensorOptions options;
  at::ScalarType compute;  // what states are kept in between steps
  void* stream;
  int64_t N, slots;
  int device;
  Tensor x_rows;  // [N, I]
  Rows rows;

 private:
  // A packed batch's first rows and lengths: both follow from the sizes of the steps.
  void place_packed() {
    std::vector<int64_t> numbers;  // first [T], lengths [B]
    int64_t row = 0;
    for (int64_t size : sizes) {
      numbers.push_back(row);
      row += size;
    }
    int64_t length = T;
    for (int64_t b = 0; b < B; b++) {
      while (length > 0 && sizes[size_t(length - 1)] <= b) length--;
      numbers.push_back(length);
    }
    places = at::empty({T + B}, options.dtype(at::kLong));
    int64_t* const to = places.mutable_data_ptr<int64_t>();
    write_numbers(numbers.data(), T + B, to, stream);
    rows.first = to;
    rows.lengths = to + T;
  }

  Tensor places;  // what rows points into
};

// ---- which kernel -------------------------------------------------------------------------------

struct Planned {
  PlanRequest request;
  Plan plan;
  int shared_limit;
  bool forced;
};

Planned plan(const Call& call, Pass pass, bool tf32) {
  const PlanRequest request{call.cell, dtype_of(call.x), pass,   tf32,   call.T,
                            call.B,    call.H,           call.P, call.D, call.projected};
  const int forced = forced_tier.load(std::memory_order_relaxed);
  const Facts facts = device_facts(call.device);
  return {request, choose(request, facts, forced == kFree ? nullptr : &kTiers[forced]),
          facts.shared_bytes, forced != kFree};
}

// The matrix of direction d and a leg, laid out as kernels.h says.
Tensor matrix_of(const Call& call, const PlanRequest& request, int64_t d, int leg) {
  const LayerCall::Direction& w = call.directions[size_t(d)];
  const auto [rows, k] = matrix_shape(request, leg);
  const auto padded = [&, rows = rows, k = k](const Tensor& matrix) {  // [.., rows, k]
    const int64_t more_rows = rows - matrix.size(-2), more_k = k - matrix.size(-1);
    return ready(more_rows == 0 && more_k == 0
                     ? matrix
                     : at::constant_pad_nd(matrix, {0, more_k, 0, more_rows}));
  };
  if (request.pass == Pass::forward)
    return padded(leg == 0 ? w.w_hh.view({call.G, call.H, call.P}) : w.w_hr);
  if (leg == 1) return padded(w.w_hr.t());
  // Tiles of 16 units, each with its gates together.
  const int64_t tiles = (call.H + 15) / 16, more = tiles * 16 - call.H;
  Tensor gates = w.w_hh.view({call.G, call.H, call.P});
  if (more != 0) gates = at::constant_pad_nd(gates, {0, 0, 0, more});
  return padded(gates.view({call.G, tiles, 16, call.P})
                    .permute({3, 1, 0, 2})
                    .reshape({call.P, tiles * call.G * 16}));
}

// A persistent launch, and the memory it needs.
struct Prepared {
  Prepared(const Call& call, const Planned& planned) {
    persistent.plan = planned.plan;
    persistent.tf32 = planned.request.tf32;
    persistent.shared_limit = planned.shared_limit;
    for (int64_t d = 0; d < call.D; d++) {
      for (int leg = 0; leg < (call.projected ? 2 : 1); leg++) {
        matrix[d][leg] = matrix_of(call, planned.request, d, leg);
        persistent.matrix[d][leg] = matrix[d][leg].const_data_ptr();
      }
    }
    if (planned.plan.tier != Tier::grid) return;
    const auto bytes = int64_t(exchange_bytes(planned.request, planned.plan));
    exchange = at::zeros({bytes}, call.options.dtype(at::kByte));
    flags = at::zeros({int64_t(flag_count(planned.plan))}, call.options.dtype(at::kInt));
    persistent.exchange = exchange.mutable_data_ptr();
    persistent.flags = static_cast<uint32_t*>(flags.mutable_data_ptr());
  }

  Persistent persistent{};
  Tensor matrix[2][2], exchange, flags;
};

// Was the recurrence left to a persistent kernel? Else it has to go step by step: the plan says so,
// or the device does not let the kernel's blocks run at a time.
template <class Launch>
bool launched(const Call& call, const Planned& planned, const Launch& launch) {
  if (planned.plan.tier == Tier::step) return false;
  const Prepared prepared(call, planned);
  if (launch(prepared.persistent)) return true;
  TORCH_CHECK(!planned.forced, "cuda tier '", name_of(planned.plan.tier),
              "' was asked for: the device does not let ",
              planned.plan.blocks * planned.plan.groups, " blocks run at a time");
  return false;
}

// ---- forward ------------------------------------------------------------------------------------

// h [D, B, P] and c [D, B, H] of compute: the initial states in, the final ones out.
void forward_steps(const Call& call, const ForwardParams& p, const Tensor& h, const Tensor& c) {
  const int64_t B = call.B, H = call.H;
  Tensor gh = at::empty({B, call.G * H}, call.options), m, h_new;
  if (call.projected) {
    m = at::empty({B, H}, call.options);
    h_new = at::empty({B, call.P}, call.options);
  }
  for (int64_t d = 0; d < call.D; d++) {
    const LayerCall::Direction& w = call.directions[size_t(d)];
    const Tensor h_d = h.select(0, d), w_hh_t = w.w_hh.t();
    ForwardStep step{};
    step.d = d;
    step.gh = gh.const_data_ptr();
    step.h = h_d.mutable_data_ptr();
    step.c = c.defined() ? c.select(0, d).mutable_data_ptr() : nullptr;
    step.m = call.projected ? m.mutable_data_ptr() : nullptr;
    for (step.s = 0; step.s < call.T; step.s++) {
      at::mm_out(gh, h_d, w_hh_t);
      step_forward(p, step, call.stream);
      if (call.projected) {
        at::mm_out(h_new, m, w.w_hr.t());
        step_store(p, d, step.s, h_new.const_data_ptr(), step.h, call.stream);
      }
    }
  }
}

ForwardResult layer_forward(const LayerArguments& a, bool save) {
  const Scope scope(a.x);
  const Call call(a);
  ForwardResult result;
  result.y = call.new_rows(call.rows_shape(call.D * call.P));
  const bool reserves = save && call.reserves();
  result.reserve =
      at::empty(reserves ? call.reserve_shape() : std::vector<int64_t>{0}, call.options);
  if (call.nothing()) {
    for (const Tensor& state : call.states) result.states.push_back(state.clone());
    return result;
  }

  const Tensor x_clean = call.clean_x();
  const Tensor gx = at::empty({call.D, call.N, call.G * call.H}, call.options);
  ForwardParams p = call.params<ForwardParams>();
  p.gx = gx.const_data_ptr();
  for (int64_t d = 0; d < call.D; d++) {
    const LayerCall::Direction& w = call.directions[size_t(d)];
    Tensor gx_d = gx.select(0, d);
    at::mm_out(gx_d, x_clean, w.w_ih.t());
    p.b_ih[d] = data_or_null(w.b_ih);
    p.b_hh[d] = data_or_null(w.b_hh);
  }
  p.y = result.y.mutable_data_ptr();
  p.reserve = reserves ? result.reserve.mutable_data_ptr() : nullptr;

  for (const Tensor& state : call.states)
    result.states.push_back(at::empty(state.sizes(), call.options));
  const Tensor& h_n = result.states[0];
  p.h_n = h_n.mutable_data_ptr();
  if (call.lstm) p.c_n = result.states[1].mutable_data_ptr();
  const auto launch = [&](const Persistent& persistent) {
    return persistent_forward(p, persistent, call.stream);
  };
  if (!launched(call, plan(call, Pass::forward, scope.tf32), launch)) {
    h_n.copy_(call.states[0]);
    Tensor c;
    if (call.lstm) c = call.states[1].to(call.compute, /*non_blocking=*/false, /*copy=*/true);
    forward_steps(call, p, h_n, c);
    if (call.lstm) result.states[1].copy_(c);
  }
  return result;
}

// ---- backward -----------------------------------------------------------------------------------

// What is known of a state's gradient at the end, [D, B, n] of dtype.
Tensor final_gradient(const OptionalTensor& given, at::IntArrayRef shape,
                      const at::TensorOptions& options) {
  return given ? given->to(options.dtype().toScalarType(), false, /*copy=*/true).contiguous()
               : at::zeros(shape, options);
}

// dh [D, B, P] and dc [D, B, H] of compute: the final states' gradients in, the initial states'
// out.
void backward_steps(const Call& call, const BackwardParams& p, const Tensor& dh, const Tensor& dc) {
  const int64_t B = call.B, H = call.H, P = call.P;
  Tensor dpre_h = at::empty({B, call.G * H}, call.options);
  Tensor dh_rec = at::empty({B, P}, call.options), dh_all, dm;
  if (call.projected) {
    dh_all = at::empty({B, P}, call.options);
    dm = at::empty({B, H}, call.options);
  }
  for (int64_t d = 0; d < call.D; d++) {
    const LayerCall::Direction& w = call.directions[size_t(d)];
    const Tensor dh_d = dh.select(0, d);
    BackwardStep step{};
    step.d = d;
    step.dm = call.projected ? dm.const_data_ptr() : nullptr;
    step.dh = dh_d.mutable_data_ptr();
    step.dc = dc.defined() ? dc.select(0, d).mutable_data_ptr() : nullptr;
    step.dpre_h = dpre_h.mutable_data_ptr();
    for (step.s = call.T - 1; step.s >= 0; step.s--) {
      if (call.projected) {
        step_gather(p, step, dh_all.mutable_data_ptr(), call.stream);
        at::mm_out(dm, dh_all, w.w_hr);
      }
      step_backward(p, step, call.stream);
      at::mm_out(dh_rec, dpre_h, w.w_hh);
      step.dh_rec = dh_rec.const_data_ptr();
    }
    dh_d.add_(dh_rec);
  }
}

// The parameters' gradients, as LayerArguments has the parameters.
std::vector<Tensor> parameter_gradients(const Call& call, const BackwardParams& p,
                                        const Tensor& dpre, const Tensor& dh_rows) {
  std::vector<Tensor> dparams;
  const Tensor x_clean = call.clean_x();
  const int64_t H = call.H, G = call.G;
  const Tensor h_prev = at::empty({call.N, call.P}, call.options);
  for (int64_t d = 0; d < call.D; d++) {
    const Tensor dpre_d = dpre.select(0, d);
    dparams.push_back(at::mm(dpre_d.narrow(1, 0, G * H).t(), x_clean));

    gather_previous(p, d, h_prev.mutable_data_ptr(), call.stream);
    const Tensor dw_hh = at::empty({G * H, call.P}, call.options);
    int64_t done = 0;
    for (const Tensor& columns : call.hidden_columns(dpre_d)) {
      Tensor part = dw_hh.narrow(0, done, columns.size(1));
      at::mm_out(part, columns.t(), h_prev);
      done += columns.size(1);
    }
    dparams.push_back(dw_hh);

    if (call.has_bias) {
      const Tensor db = at::sum(dpre_d, {0}, false, call.compute).to(dpre.scalar_type());
      dparams.push_back(db.narrow(0, 0, G * H).clone());
      dparams.push_back(at::cat(call.hidden_columns(db)));
    } else {
      dparams.resize(dparams.size() + 2);
    }
    if (call.projected) {
      const Tensor m = at::empty({call.N, H}, call.options);
      gather_unprojected(p, d, m.mutable_data_ptr(), call.stream);
      dparams.push_back(at::mm(dh_rows.select(0, d).t(), m));
    } else {
      dparams.emplace_back();
    }
  }
  return dparams;
}

BackwardResult layer_backward(const LayerArguments& a, const BackwardArguments& back) {
  const Scope scope(a.x);
  const Call call(a);
  call.check_backward(back);
  const bool lstm = call.lstm;
  const OptionalTensor &dh_n = back.dstates[0], none, &dc_n = lstm ? back.dstates[1] : none;
  const std::vector<int64_t> h_shape{call.D, call.B, call.P}, c_shape{call.D, call.B, call.H};
  BackwardResult result;
  result.dx = at::empty({0}, call.options);
  if (call.nothing()) {
    if (back.need_dx) result.dx = at::zeros(a.x.sizes(), call.options);
    result.dstates.push_back(final_gradient(dh_n, h_shape, call.options));
    if (lstm) result.dstates.push_back(final_gradient(dc_n, c_shape, call.options));
    if (back.need_dparams)
      for (const Tensor& param : a.params)
        result.dparams.push_back(param.defined() ? at::zeros(param.sizes(), call.options)
                                                 : Tensor());
    return result;
  }

  BackwardParams p = call.params<BackwardParams>();
  const Tensor y_ready = ready(back.y), reserve_ready = ready(back.reserve);
  p.y = y_ready.const_data_ptr();
  p.reserve = reserve_ready.const_data_ptr();
  Tensor dy_ready;
  if (back.dy) dy_ready = ready(*back.dy);
  p.dy = data_or_null(dy_ready);
  const Tensor dpre = call.new_rows({call.D, call.N, call.slots * call.H});
  p.dpre = dpre.mutable_data_ptr();
  Tensor dh_rows;
  if (call.projected) {
    dh_rows = call.new_rows({call.D, call.N, call.P});
    p.dh_rows = dh_rows.mutable_data_ptr();
  }

  Tensor dh_ready, dc_ready;
  if (dh_n) dh_ready = ready(*dh_n);
  if (dc_n) dc_ready = ready(*dc_n);
  p.dh_n = data_or_null(dh_ready);
  p.dc_n = data_or_null(dc_ready);
  for (const Tensor& state : call.states)
    result.dstates.push_back(at::empty(state.sizes(), call.options));
  p.dh0 = result.dstates[0].mutable_data_ptr();
  if (lstm) p.dc0 = result.dstates[1].mutable_data_ptr();
  const auto launch = [&](const Persistent& persistent) {
    return persistent_backward(p, persistent, call.stream);
  };
  if (!launched(call, plan(call, Pass::backward, scope.tf32), launch)) {
    const at::TensorOptions states = call.options.dtype(call.compute);
    const Tensor dh = final_gradient(dh_n, h_shape, states);
    Tensor dc;
    if (lstm) dc = final_gradient(dc_n, c_shape, states);
    backward_steps(call, p, dh, dc);
    result.dstates[0].copy_(dh);
    if (lstm) result.dstates[1].copy_(dc);
  }

  if (back.need_dx) {
    const auto dpre_x = [&](int64_t d) { return dpre.select(0, d).narrow(1, 0, call.G * call.H); };
    result.dx = at::mm(dpre_x(0), call.directions[0].w_ih);
    if (call.D == 2) result.dx.addmm_(dpre_x(1), call.directions[1].w_ih);
    result.dx = result.dx.view(a.x.sizes());
  }
  if (back.need_dparams) result.dparams = parameter_gradients(call, p, dpre, dh_rows);
  return result;
}

}  // namespace

void implement_layers(torch::Library& library) {
  LayerOperators<layer_forward, layer_backward>::implement(library);
}

void force_tier(const char* name) {
  const std::string wish = name;
  int index = wish.empty() ? kFree : 0;
  while (index >= 0 && index < 4 && wish != name_of(kTiers[index])) index++;
  if (index == 4)
    throw std::invalid_argument("tier: expected step, block, cluster, grid or \"\", got " + wish);
  forced_tier.store(index, std::memory_order_relaxed);
}

}  // namespace seqkern::cuda
