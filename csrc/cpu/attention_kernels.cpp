// One instruction set's attention kernels, for the table in kernels.cpp, whose rule holds here too:
// no inline functions of the standard library.
#include "attention.h"
#include "kernels.h"

namespace seqkern {
namespace SEQKERN_ISA {
namespace {

// f((Pass<S>*)nullptr) for the storage type known at run time.
template <template <class> class Pass, class F>
auto with_storage(const AttentionParams& p, const F& f) {
  switch (p.dtype) {
    case Dtype::bf16:
      return f((Pass<bf16>*)nullptr);
#if !defined(__AMX_BF16__)
    case Dtype::f32:
      return f((Pass<float>*)nullptr);
    case Dtype::f16:
      return f((Pass<f16>*)nullptr);
#endif
    default:
      break;
  }
  __builtin_unreachable();
}

template <class Pass, class Params>
Pass pass_of(Pass*, const Params& p) {
  return Pass(p);
}

// AMX multiplies bfloat16 only: all else is the next older instruction set's.
#if defined(__AMX_BF16__)
#define SEQKERN_DELEGATE(f, p) \
  if (p.dtype != Dtype::bf16) return avx512bf16::kernel_table().f(p)
#else
#define SEQKERN_DELEGATE(f, p) (void)0
#endif

}  // namespace

size_t attention_forward_scratch(const AttentionForwardParams& p) {
  SEQKERN_DELEGATE(attention_forward_scratch, p);
  return with_storage<AttentionForward>(
      p, [&](auto* pass) { return pass_of(pass, p).scratch_bytes(); });
}

void attention_forward(const AttentionForwardParams& p) {
  SEQKERN_DELEGATE(attention_forward, p);
  with_storage<AttentionForward>(p, [&](auto* pass) { pass_of(pass, p).run(); });
}

size_t attention_backward_scratch(const AttentionBackwardParams& p) {
  SEQKERN_DELEGATE(attention_backward_scratch, p);
  return with_storage<AttentionBackward>(
      p, [&](auto* pass) { return pass_of(pass, p).scratch_bytes(); });
}

void attention_backward(const AttentionBackwardParams& p) {
  SEQKERN_DELEGATE(attention_backward, p);
  with_storage<AttentionBackward>(p, [&](auto* pass) { pass_of(pass, p).run(); });
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
