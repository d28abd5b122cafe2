// One instruction set's kernels of additive attention, for the table in kernels.cpp, whose rule
// holds here too: no inline functions of the standard library.
#include "additive_attention.h"
#include "cell_step.h"
#include "kernels.h"

namespace seqkern {
namespace SEQKERN_ISA {

// No matrix products here that AMX would do: its table has the next older instruction set's
// kernels.
#if defined(__AMX_BF16__)

size_t additive_forward_scratch(const AdditiveForwardParams& p) {
  return avx512bf16::kernel_table().additive_forward_scratch(p);
}
void additive_forward(const AdditiveForwardParams& p) {
  avx512bf16::kernel_table().additive_forward(p);
}
size_t additive_backward_scratch(const AdditiveBackwardParams& p) {
  return avx512bf16::kernel_table().additive_backward_scratch(p);
}
void additive_backward(const AdditiveBackwardParams& p) {
  avx512bf16::kernel_table().additive_backward(p);
}
size_t additive_step_scratch(const AdditiveStepParams& p) {
  return avx512bf16::kernel_table().additive_step_scratch(p);
}
void additive_step_pack(const AdditiveStepParams& p) {
  avx512bf16::kernel_table().additive_step_pack(p);
}
void additive_step(const AdditiveStepParams& p) { avx512bf16::kernel_table().additive_step(p); }
void gates_forward(const GatesParams& p) { avx512bf16::kernel_table().gates_forward(p); }
void gates_backward(const GatesParams& p) { avx512bf16::kernel_table().gates_backward(p); }

#else

namespace {

// f(Pass<S>(p)) for the storage type known at run time.
template <template <class> class Pass, class Params, class F>
auto with_storage(const Params& p, const F& f) {
  switch (p.dtype) {
    case Dtype::f32:
      return f(Pass<float>(p));
    case Dtype::f64:
      return f(Pass<double>(p));
    case Dtype::bf16:
      return f(Pass<bf16>(p));
    case Dtype::f16:
      return f(Pass<f16>(p));
  }
  __builtin_unreachable();
}

// f(Gates<C, Cell>(p)) for the dtype and the cell known at run time.
template <class F>
void with_gates(const GatesParams& p, const F& f) {
  const bool lstm = p.cell == CellKind::lstm;
  if (p.dtype == Dtype::f64)
    return lstm ? f(Gates<double, LstmCell>{p}) : f(Gates<double, GruCell>{p});
  lstm ? f(Gates<float, LstmCell>{p}) : f(Gates<float, GruCell>{p});
}

}  // namespace

size_t additive_forward_scratch(const AdditiveForwardParams& p) {
  return with_storage<AdditiveForward>(p, [](const auto& pass) { return pass.scratch_bytes(); });
}
void additive_forward(const AdditiveForwardParams& p) {
  with_storage<AdditiveForward>(p, [](const auto& pass) { pass.run(); });
}
size_t additive_backward_scratch(const AdditiveBackwardParams& p) {
  return with_storage<AdditiveBackward>(p, [](const auto& pass) { return pass.scratch_bytes(); });
}
void additive_backward(const AdditiveBackwardParams& p) {
  with_storage<AdditiveBackward>(p, [](const auto& pass) { pass.run(); });
}
size_t additive_step_scratch(const AdditiveStepParams& p) {
  return with_storage<AdditiveStep>(p, [](const auto& pass) { return pass.scratch_bytes(); });
}
void additive_step_pack(const AdditiveStepParams& p) {
  with_storage<AdditiveStep>(p, [](const auto& pass) { pass.pack(); });
}
void additive_step(const AdditiveStepParams& p) {
  with_storage<AdditiveStep>(p, [](const auto& pass) { pass.run(); });
}
void gates_forward(const GatesParams& p) {
  with_gates(p, [](const auto& gates) { gates.forward(); });
}
void gates_backward(const GatesParams& p) {
  with_gates(p, [](const auto& gates) { gates.backward(); });
}

#endif

}  // namespace SEQKERN_ISA
}  // namespace seqkern
