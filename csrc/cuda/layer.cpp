// The torch side of one recurrent layer on a CUDA device.
//
// Outside of the recurrence, forward is one product (gx = x W_ih^T) and backward three (dx, dW_ih,
// dW_hh; one more for each of a cell's second matrices), which torch computes over all rows at
// once; the recurrence between them is a kernel of kernels.h or, step by step, products and
// launches. Nothing here waits for the device or reads its memory, so that a CUDA graph can capture
// all of it; everything is launched on the current stream of x's device.
//
// With SEQKERN_CUDA_ON_CPU the device is the CPU, and the kernels run emulated.
#include "layer.h"

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/stack.h>
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

// Per unit, what is summed over all rows for own parameters. Of normalised rows these are products
// here: for both gains, what the biases share, and an LSTM's gain and bias of c or a GRU's W_hn h.
int64_t summands(const CellShape& shape) {
  if (!shape.rows) return shape.sums;
  return 3 * shape.input_gates + (shape.states > 1 ? 2 : 1);
}

// One layer's call: its arguments as the kernels want them.
class Call : public LayerCall {
 public:
  explicit Call(const LayerArguments& a)
      : LayerCall(a, kDevice),
        options(x.options()),
        compute(dtype_of(x) == Dtype::f64 ? at::kDouble : at::kFloat),
        stream(current_stream(x.device())),
        N(rows_of_x()),
        planes(shape.slots + summands(shape)),
        device(x.is_cpu() ? 0 : int(x.get_device())) {
    use_device(device);
    x_rows = x.reshape({N, I});
    for (Tensor& state : states) state = ready(state);
    for (Direction& w : directions) {
      for (Tensor* tensor : {&w.w_hh, &w.b_ih, &w.b_hh})
        if (tensor->defined()) *tensor = ready(*tensor);
      for (Tensor& tensor : w.own)
        if (tensor.defined()) tensor = ready(tensor);
    }
    for (int64_t way = 0; way < ways(); way++) {
      b_ih[way] = of_way(way, &Direction::b_ih);
      b_hh[way] = of_way(way, &Direction::b_hh);
    }
    if (a.mask) mask = ready(*a.mask);
    if (a.scale) scale = ready(with_heads(*a.scale));
    regularisers = {regularised,
                    mask.defined() ? mask.const_data_ptr<uint8_t>() : nullptr,
                    scale.defined() ? scale.const_data_ptr() : nullptr,
                    a.keep_h,
                    a.keep_c,
                    a.candidate_scale,
                    cell_clip,
                    proj_clip};
    eps = a.eps;
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
    p.H = H, p.P = P, p.D = D, p.heads = heads;
    p.h0 = states[0].const_data_ptr();
    for (size_t k = 1; k < states.size(); k++) p.state0[k - 1] = states[k].const_data_ptr();
    for (int64_t way = 0; way < ways(); way++) {
      p.b_ih[way] = data_or_null(b_ih[way]);
      p.b_hh[way] = data_or_null(b_hh[way]);
      const Direction& w = directions[size_t(way * heads)];
      for (size_t i = 0; i < w.own.size(); i++) p.own[way][i] = data_or_null(w.own[i]);
      if (unitwise()) p.own[way][0] = w.w_hh.const_data_ptr();
    }
    p.regularisers = regularisers;
    p.eps = eps;
    p.reserve_row = reserve_width(shape, regularised, H);
    p.saved = saved_values(shape, regularised);
    p.planes = int(planes);
    p.saves_h = regularised && shape.saves_h;
    return p;
  }

  int64_t ways() const { return D / heads; }

  // Does W_hh multiply unit by unit?
  bool unitwise() const { return shape.hidden_gates == 0; }

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

  // ---- a cell's matrices within the recurrence: W_hh's first gates, then the second products' ---

  int products() const { return unitwise() ? 0 : 1 + shape.mid; }
  int64_t gates_of(int i) const {
    if (i == 0) return shape.first_gates;
    return shape.mid == 1 ? shape.hidden_gates - shape.first_gates : G;
  }
  // Of all directions, [D, gates*H, K].
  Tensor matrix(int i) const {
    std::vector<Tensor> of_directions;
    for (const Direction& w : directions)
      of_directions.push_back(
          i > 0 && shape.mid == 2
              ? w.own[size_t(i - 1)]
              : w.w_hh.narrow(0, i == 0 ? 0 : shape.first_gates * H, gates_of(i) * H));
    return D == 1 ? of_directions[0].unsqueeze(0) : at::stack(of_directions);
  }

  // Some columns of dpre [.., planes*H], in order.
  struct Planes {
    int64_t first, count;
  };
  std::vector<Tensor> columns(const Tensor& dpre, const std::vector<Planes>& which) const {
    std::vector<Tensor> found;
    for (const Planes& some : which)
      found.push_back(dpre.narrow(-1, some.first * H, some.count * H));
    return found;
  }
  // A GRU has r z n n', n' being W_hn h's; an inner cell's planes lie behind (kernels.h).
  std::vector<Planes> planes_of(int i) const {
    const int64_t inner = shape.slots - shape.mid_slots;
    if (i > 0 && shape.mid == 1) return {{shape.first_gates, gates_of(i)}};
    if (i == 1) return {{inner, G}};
    if (shape.rotation > 0) return {{i * inner / 2, 2}, {i * inner / 2 + 3, 1}};
    if (i == 2) return {{inner, G}};
    return {{shape.rows ? G : 0, gates_of(0)}};
  }
  // What b_hh is added to.
  std::vector<Planes> planes_of_hidden_bias() const {
    if (shape.rotation > 0) return planes_of(0);
    return {{0, shape.hidden_gates > 0 ? shape.hidden_gates : 1}};
  }

  at::TensorOptions options;
  at::ScalarType compute;  // what states are kept in between steps
  void* stream;
  int64_t N, planes;
  int device;
  Tensor x_rows;  // [N, I]
  Tensor scale;   // [D, B, P]
  Rows rows;

 private:
  // A bias of all heads that go this way.
  Tensor of_way(int64_t way, Tensor Direction::* member) const {
    const auto first = directions.begin() + std::ptrdiff_t(way * heads);
    if (heads == 1 || !((*first).*member).defined()) return (*first).*member;
    std::vector<Tensor> parts;
    for (int64_t n = 0; n < heads; n++) parts.push_back(first[n].*member);
    return at::stack(parts);
  }

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
  Tensor b_ih[2], b_hh[2], mask;
  Regularisers regularisers;
  double eps;
};

// ---- which kernel -------------------------------------------------------------------------------

struct Planned {
  PlanRequest request;
  Plan plan;
  int shared_limit;
  bool forced;
};

Planned plan(const Call& call, Pass pass, bool tf32) {
  const PlanRequest request{call.cell,
                            dtype_of(call.x),
                            pass,
                            tf32,
                            call.T,
                            call.B,
                            call.H,
                            call.P,
                            call.D,
                            call.projected,
                            call.regularised || call.scale.defined()};
  const int forced = forced_tier.load(std::memory_order_relaxed);
  const Facts facts = device_facts(call.device);
  return {request, choose(request, facts, forced == kFree ? nullptr : &kTiers[forced]),
          facts.shared_bytes, forced != kFree};
}

// [m, numbers, rows, k] -> [m, rows, k'], k in tiles of 16, each with its numbers together.
Tensor tiled(const Tensor& matrix) {
  const int64_t m = matrix.size(0), numbers = matrix.size(1), rows = matrix.size(2);
  if (numbers == 1) return matrix.select(1, 0);
  const int64_t tiles = (matrix.size(3) + 15) / 16, more = tiles * 16 - matrix.size(3);
  const Tensor whole = more == 0 ? matrix : at::constant_pad_nd(matrix, {0, more});
  return whole.reshape({m, numbers, rows, tiles, 16})
      .permute({0, 2, 3, 1, 4})
      .reshape({m, rows, tiles * numbers * 16});
}

// What a cell's second product multiplies by, [slots, mid, H, H].
Tensor second_matrix(const Call& call, const LayerCall::Direction& w) {
  const int64_t H = call.H, first = call.shape.first_gates;
  if (call.shape.mid == 1) return w.w_hh.narrow(0, first * H, H).view({1, 1, H, H});
  const int64_t slots = call.shape.mid_slots, apart = slots - call.shape.hidden_gates;
  const Tensor both = at::zeros({slots, 2, H, H}, call.options);
  const Tensor of_x = w.own[0].view({call.G, H, H}), of_h = w.own[1].view({call.G, H, H});
  for (int64_t slot = 0; slot < call.G; slot++) {
    both.select(0, slot).select(0, 0).copy_(of_x.select(0, (slot + call.shape.rotation) % call.G));
    both.select(0, slot + apart).select(0, 1).copy_(of_h.select(0, slot));
  }
  return both;
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
  const bool forward = request.pass == Pass::forward;
  if (leg == 0) {
    const int64_t gates = call.gates_of(0);
    const Tensor matrix = w.w_hh.narrow(0, 0, gates * call.H).view({gates, call.H, call.P});
    return padded(forward ? matrix : tiled(matrix.transpose(1, 2).unsqueeze(0)));
  }
  if (call.projected) return padded(forward ? w.w_hr : w.w_hr.t());
  const Tensor matrix = second_matrix(call, w);
  return padded(tiled(forward ? matrix : matrix.permute({1, 0, 3, 2})));
}

// A persistent launch, and the memory it needs.
struct Prepared {
  Prepared(const Call& call, const Planned& planned) {
    persistent.plan = planned.plan;
    persistent.tf32 = one_tf32(planned.request);
    persistent.shared_limit = planned.shared_limit;
    for (int64_t way = 0; way < call.ways(); way++) {
      for (int leg = 0; leg < (call.projected || call.shape.mid > 0 ? 2 : 1); leg++) {
        std::vector<Tensor> of_heads;
        for (int64_t n = 0; n < call.heads; n++)
          of_heads.push_back(matrix_of(call, planned.request, way * call.heads + n, leg));
        matrix[way][leg] = call.heads == 1 ? of_heads[0] : at::stack(of_heads);
        persistent.matrix[way][leg] = matrix[way][leg].const_data_ptr();
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

// ---- products between launches ------------------------------------------------------------------

// out [D, B, n] = a [D, B, k] times a matrix [D, k, n], again and again.
class Product {
 public:
  Product() = default;
  Product(const Tensor& out, const Tensor& a, const Tensor& matrix)
      : one(out.size(0) == 1),
        out(one ? out.select(0, 0) : out),
        a(one ? a.select(0, 0) : a),
        matrix(one ? matrix.select(0, 0) : matrix) {}

  void operator()() {
    if (one)
      at::mm_out(out, a, matrix);
    else
      at::bmm_out(out, a, matrix);
  }

 private:
  bool one = true;
  Tensor out, a, matrix;
};

// W_hr of all directions, [D, P, H].
Tensor projections(const Call& call) {
  std::vector<Tensor> of_directions;
  for (const LayerCall::Direction& w : call.directions) of_directions.push_back(w.w_hr);
  return at::stack(of_directions);
}

// ---- forward ------------------------------------------------------------------------------------

// h [D, B, P], and the other states [D, B, H] of compute: the initial ones in, the final ones out.
void forward_steps(const Call& call, const ForwardParams& p, const Tensor& h,
                   const std::vector<Tensor>& states) {
  const int64_t D = call.D, B = call.B, H = call.H;
  const auto room = [&](int64_t n) { return at::empty({D, B, n}, call.options); };
  ForwardStep step{};
  step.h = h.mutable_data_ptr();
  Tensor h_in = h;
  if (call.scale.defined()) {
    h_in = at::mul(h, call.scale);
    step.h_in = h_in.mutable_data_ptr();
  }
  for (size_t k = 0; k < states.size(); k++) step.state[k] = states[k].mutable_data_ptr();
  Tensor results[3], mid[2], held, m, h_new;
  Product products[3], project;
  for (int i = 0; i < call.products(); i++) {
    results[i] = room(call.gates_of(i) * H);
    step.products[i] = results[i].const_data_ptr();
    if (i > 0) {
      mid[i - 1] = room(H);
      step.mid[i - 1] = mid[i - 1].mutable_data_ptr();
    }
    products[i] = Product(results[i], i == 0 ? h_in : mid[i - 1], call.matrix(i).transpose(1, 2));
  }
  if (const int values = held_values(call.shape); values > 0) {
    held = at::empty({D, B, values, H}, call.options.dtype(call.compute));
    step.held = held.mutable_data_ptr();
  }
  if (call.projected) {
    m = room(H), h_new = room(call.P);
    step.m = m.mutable_data_ptr();
    project = Product(h_new, m, projections(call).transpose(1, 2));
  }
  for (step.s = 0; step.s < call.T; step.s++) {
    products[0]();
    if (call.shape.mid > 0) step_begin(p, step, call.stream);
    for (int i = 1; i < call.products(); i++) products[i]();
    step_forward(p, step, call.stream);
    if (call.projected) {
      project();
      step_store(p, step, h_new.const_data_ptr(), call.stream);
    }
  }
}

// x W_ih^T, [D, N, G*H].
Tensor project_input(const Call& call) {
  const Tensor x = call.clean_x();
  Tensor gx = at::empty({call.D, call.N, call.G * call.H}, call.options);
  if (call.heads > 1) {  // as many small products
    std::vector<Tensor> w_ih;
    for (const LayerCall::Direction& w : call.directions) w_ih.push_back(w.w_ih);
    at::bmm_out(gx, x.unsqueeze(0).expand({call.D, call.N, call.I}),
                at::stack(w_ih).transpose(1, 2));
    return gx;
  }
  for (int64_t d = 0; d < call.D; d++) {
    Tensor gx_d = gx.select(0, d);
    at::mm_out(gx_d, x, call.directions[size_t(d)].w_ih.t());
  }
  return gx;
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
    for (const Tensor& state : call.states)
      result.states.push_back(call.without_heads(state).clone());
    return result;
  }

  const Tensor gx = project_input(call);
  ForwardParams p = call.params<ForwardParams>();
  p.gx = gx.const_data_ptr();
  p.y = result.y.mutable_data_ptr();
  p.reserve = reserves ? result.reserve.mutable_data_ptr() : nullptr;

  for (const Tensor& state : call.states)
    result.states.push_back(at::empty(state.sizes(), call.options));
  const Tensor& h_n = result.states[0];
  p.h_n = h_n.mutable_data_ptr();
  for (size_t k = 1; k < result.states.size(); k++)
    p.state_n[k - 1] = result.states[k].mutable_data_ptr();
  if (call.shape.rows) normalise_input(p, gx.mutable_data_ptr(), call.stream);
  const auto launch = [&](const Persistent& persistent) {
    return persistent_forward(p, persistent, call.stream);
  };
  if (call.unitwise()) {
    unitwise_forward(p, call.stream);
  } else if (!launched(call, plan(call, Pass::forward, scope.tf32), launch)) {
    h_n.copy_(call.states[0]);
    std::vector<Tensor> states;
    for (size_t k = 1; k < call.states.size(); k++)
      states.push_back(call.states[k].to(call.compute, /*non_blocking=*/false, /*copy=*/true));
    forward_steps(call, p, h_n, states);
    for (size_t k = 1; k < call.states.size(); k++) result.states[k].copy_(states[k - 1]);
  }
  for (Tensor& state : result.states) state = call.without_heads(state);
  return result;
}

// ---- backward -----------------------------------------------------------------------------------

// What is known of a state's gradient at the end, [D, B, n] of dtype.
Tensor final_gradient(const Tensor& given, at::IntArrayRef shape,
                      const at::TensorOptions& options) {
  return given.defined()
             ? given.to(options.dtype().toScalarType(), false, /*copy=*/true).contiguous()
             : at::zeros(shape, options);
}

// dstates: dh [D, B, P] and [D, B, H] each, of compute: the final states' gradients in, the initial
// states' out.
void backward_steps(const Call& call, const BackwardParams& p, const std::vector<Tensor>& dstates) {
  const int64_t D = call.D, B = call.B, H = call.H, P = call.P;
  const auto room = [&](int64_t n) { return at::empty({D, B, n}, call.options); };
  const at::TensorOptions computed = call.options.dtype(call.compute);
  BackwardStep step{};
  step.dh = dstates[0].mutable_data_ptr();
  for (size_t k = 1; k < dstates.size(); k++) step.dstate[k - 1] = dstates[k].mutable_data_ptr();
  Tensor dpre[3], results[3], carry, held, dh_all, dm;
  Product products[3], unproject;
  for (int i = 0; i < call.products(); i++) {
    dpre[i] = room(call.gates_of(i) * H);
    results[i] = room(i == 0 ? P : H);
    (i == 0 ? step.dpre_h : step.dpre_mid[i - 1]) = dpre[i].mutable_data_ptr();
    if (i > 0) step.dmid[i - 1] = results[i].const_data_ptr();
    products[i] = Product(results[i], dpre[i], call.matrix(i));
  }
  if (call.shape.mid > 0) {
    carry = at::empty({D, B, H}, computed);
    step.carry = carry.mutable_data_ptr();
  }
  if (const int values = held_values(call.shape); values > 0) {
    held = at::empty({D, B, values, H}, computed);
    step.held = held.mutable_data_ptr();
  }
  if (call.projected) {
    dh_all = room(P), dm = room(H);
    step.dm = dm.const_data_ptr();
    unproject = Product(dm, dh_all, projections(call));
  }
  for (step.s = call.T - 1; step.s >= 0; step.s--) {
    if (call.projected) {
      step_gather(p, step, dh_all.mutable_data_ptr(), call.stream);
      unproject();
    }
    step_backward(p, step, call.stream);
    for (int i = 1; i < call.products(); i++) products[i]();
    if (call.shape.mid > 0) step_begin_backward(p, step, call.stream);
    products[0]();
    step.dh_rec = results[0].const_data_ptr();
  }
  dstates[0].add_(call.scale.defined()
                      ? at::mul(results[0].to(call.compute), call.scale.to(call.compute))
                      : results[0]);
}

// The parameters' gradients, per direction as LayerArguments has the parameters.
std::vector<std::vector<Tensor>> parameter_gradients(const Call& call, const BackwardParams& p,
                                                     const Tensor& dpre, const Tensor& dh_rows,
                                                     const Tensor (&mid_rows)[2]) {
  std::vector<std::vector<Tensor>> found;
  const Tensor x_clean = call.clean_x();
  const CellShape& shape = call.shape;
  const int64_t H = call.H, G = call.G;
  const Tensor h_prev = at::empty({call.unitwise() ? 0 : call.N, call.P}, call.options);
  for (int64_t d = 0; d < call.D; d++) {
    const LayerCall::Direction& w = call.directions[size_t(d)];
    const Tensor dpre_d = dpre.select(0, d);
    std::vector<Tensor> dparams(call.each);
    dparams[0] = at::mm(dpre_d.narrow(1, 0, G * H).t(), x_clean);

    // W_hh's first gates, its others or an inner cell's matrices.
    if (!call.unitwise()) {
      gather_previous(p, d, h_prev.mutable_data_ptr(), call.stream);
      dparams[1] = at::empty(w.w_hh.sizes(), call.options);
    }
    for (int i = 0; i < call.products(); i++) {
      const bool inner = i > 0 && shape.mid == 2;
      Tensor& whole = inner ? dparams[kCommonParams + size_t(i - 1)] : dparams[1];
      if (inner) whole = at::empty({G * H, H}, call.options);
      int64_t done = i > 0 && !inner ? shape.first_gates * H : 0;
      const Tensor multiplied = i == 0 ? h_prev : mid_rows[i - 1].select(0, d);
      for (const Tensor& columns : call.columns(dpre_d, call.planes_of(i))) {
        Tensor part = whole.narrow(0, done, columns.size(1));
        at::mm_out(part, columns.t(), multiplied);
        done += columns.size(1);
      }
    }

    const auto sums_of = [&](const Tensor& sums, const std::vector<Call::Planes>& planes) {
      return at::cat(call.columns(sums, planes));
    };
    if (shape.sums > 0 || w.b_ih.defined() || w.b_hh.defined() || shape.mid == 2) {
      const Tensor sums = at::sum(dpre_d, {0}, false, call.compute).to(dpre.scalar_type());
      const auto give = [&](Tensor& dparam, const Tensor& param,
                            const std::vector<Call::Planes>& planes) {
        if (param.defined()) dparam = sums_of(sums, planes);
      };
      const int64_t own = shape.slots;
      const auto give_own = [&](size_t i, const std::vector<Call::Planes>& planes) {
        give(dparams[kCommonParams + i], w.own[i], planes);
      };
      if (shape.rows) {  // gains, what both biases share, an LSTM's state's
        const bool gru = call.cell == CellKind::layer_norm_gru;
        const std::vector<Call::Planes> shared{{own + 2 * G, G}};
        give(dparams[2], w.b_ih, shared);
        give_own(0, {{own, G}});
        give_own(1, shared);
        give_own(2, {{own + G, G}});
        if (gru) {
          give_own(3, {{own + 2 * G, 2}, {own + 3 * G, 1}});
        } else {
          give_own(3, shared);
          give_own(4, {{own + 3 * G, 1}});
          give_own(5, {{own + 3 * G + 1, 1}});
        }
      } else {
        give(dparams[2], w.b_ih, {{0, G}});
        give(dparams[3], w.b_hh, call.planes_of_hidden_bias());
        if (call.unitwise()) {
          give(dparams[1], w.w_hh, {{own, 1}});
        } else if (shape.mid == 2) {
          give_own(2, call.planes_of(1));
          give_own(3, call.planes_of(2));
        } else if (shape.own > 0) {
          give_own(0, {{own, shape.sums}});
        }
      }
    }
    if (call.projected) {
      const Tensor m = at::empty({call.N, H}, call.options);
      gather_unprojected(p, d, m.mutable_data_ptr(), call.stream);
      dparams[4] = at::mm(dh_rows.select(0, d).t(), m);
    }
    found.push_back(dparams);
  }
  return found;
}

// [N, I]
Tensor input_gradient(const Call& call, const Tensor& dpre) {
  const Tensor of_x = dpre.narrow(2, 0, call.G * call.H);  // [D, N, G*H]
  Tensor dx;
  for (int64_t way = 0; way < call.ways(); way++) {
    Tensor gates = of_x.select(0, way), w_ih = call.directions[size_t(way)].w_ih;
    if (call.heads > 1) {  // one product of all heads' gates, whose sum is rounded once
      const int64_t first = way * call.heads;
      std::vector<Tensor> of_heads;
      for (int64_t n = 0; n < call.heads; n++)
        of_heads.push_back(call.directions[size_t(first + n)].w_ih);
      w_ih = at::cat(of_heads);
      gates = of_x.narrow(0, first, call.heads).transpose(0, 1).reshape({call.N, w_ih.size(0)});
    }
    if (way == 0)
      dx = at::mm(gates, w_ih);
    else
      dx.addmm_(gates, w_ih);
  }
  return dx;
}

BackwardResult layer_backward(const LayerArguments& a, const BackwardArguments& back) {
  const Scope scope(a.x);
  const Call call(a);
  call.check_backward(back);
  BackwardResult result;
  result.dx = at::empty({0}, call.options);
  std::vector<Tensor> dfinals;  // undefined: zero
  for (const OptionalTensor& given : back.dstates)
    dfinals.push_back(given ? ready(call.with_heads(*given)) : Tensor());
  const auto final_gradients = [&](const at::TensorOptions& options) {
    std::vector<Tensor> gradients;
    for (size_t k = 0; k < dfinals.size(); k++)
      gradients.push_back(final_gradient(dfinals[k], call.states[k].sizes(), options));
    return gradients;
  };
  if (call.nothing()) {
    if (back.need_dx) result.dx = at::zeros(a.x.sizes(), call.options);
    for (const Tensor& gradient : final_gradients(call.options))
      result.dstates.push_back(call.without_heads(gradient));
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
  const Tensor dpre = call.new_rows({call.D, call.N, call.planes * call.H});
  p.dpre = dpre.mutable_data_ptr();
  Tensor dh_rows, mid_rows[2];
  if (call.projected) {
    dh_rows = call.new_rows({call.D, call.N, call.P});
    p.dh_rows = dh_rows.mutable_data_ptr();
  }
  for (int i = 0; i < call.shape.mid; i++) {
    mid_rows[i] = call.new_rows({call.D, call.N, call.H});
    p.mid_rows[i] = mid_rows[i].mutable_data_ptr();
  }

  for (const Tensor& state : call.states)
    result.dstates.push_back(at::empty(state.sizes(), call.options));
  p.dh_n = data_or_null(dfinals[0]);
  p.dh0 = result.dstates[0].mutable_data_ptr();
  for (size_t k = 1; k < dfinals.size(); k++) {
    p.dstate_n[k - 1] = data_or_null(dfinals[k]);
    p.dstate0[k - 1] = result.dstates[k].mutable_data_ptr();
  }
  const auto launch = [&](const Persistent& persistent) {
    return persistent_backward(p, persistent, call.stream);
  };
  if (call.unitwise()) {
    unitwise_backward(p, call.stream);
  } else if (!launched(call, plan(call, Pass::backward, scope.tf32), launch)) {
    const std::vector<Tensor> dstates = final_gradients(call.options.dtype(call.compute));
    backward_steps(call, p, dstates);
    for (size_t k = 0; k < dstates.size(); k++) result.dstates[k].copy_(dstates[k]);
  }
  for (Tensor& dstate : result.dstates) dstate = call.without_heads(dstate);
  if (call.shape.rows) normalise_input_backward(p, call.stream);

  if (back.need_dx) result.dx = input_gradient(call, dpre).view(a.x.sizes());
  if (back.need_dparams) {
    const auto of_directions = parameter_gradients(call, p, dpre, dh_rows, mid_rows);
    if (call.cell == CellKind::slstm) {
      result.dparams = a.params;
      call.join_heads(result.dparams, of_directions);
    } else {
      for (const std::vector<Tensor>& dparams : of_directions)
        result.dparams.insert(result.dparams.end(), dparams.begin(), dparams.end());
    }
  }
  return result;
}

}  // namespace

void implement_layers(torch::Library& library) {
  using Operators = LayerOperators<layer_forward, layer_backward>;
  Operators::implement(library);
  Operators::implement_recurrent(library);
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
