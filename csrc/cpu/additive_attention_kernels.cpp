// One instruction set's kernels of additive attention, for the table in kernels.cpp, whose rule
// holds here too: no inline functions of the standard library.
#include "additive_attention.h"
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

#endif

}  // namespace SEQKERN_ISA
}  // namespace seqkern
