// One instruction set's kernels of the conditional random field, for the table in kernels.cpp,
// whose rule holds here too: no inline functions of the standard library.
#include "crf.h"
#include "kernels.h"

namespace seqkern {
namespace SEQKERN_ISA {

extern const CrfKernels crf_kernels;

#if defined(__AMX_BF16__)  // multiplies bfloat16 only: the next older instruction set's

const CrfKernels crf_kernels = {
    [](const CrfForwardParams& p) { return avx512bf16::kernel_table().crf->forward_scratch(p); },
    [](const CrfForwardParams& p) { avx512bf16::kernel_table().crf->forward(p); },
    [](const CrfBackwardParams& p) { return avx512bf16::kernel_table().crf->backward_scratch(p); },
    [](const CrfBackwardParams& p) { avx512bf16::kernel_table().crf->backward(p); },
    [](const CrfDecodeParams& p) { return avx512bf16::kernel_table().crf->decode_scratch(p); },
    [](const CrfDecodeParams& p) { avx512bf16::kernel_table().crf->decode(p); },
};

#else

namespace {

template <template <class> class Pass, class Params>
size_t scratch(const Params& p) {
  return p.dtype == Dtype::f64 ? Pass<double>(p).scratch_bytes() : Pass<float>(p).scratch_bytes();
}

template <template <class> class Pass, class Params>
void run(const Params& p) {
  if (p.dtype == Dtype::f64)
    Pass<double>(p).run();
  else
    Pass<float>(p).run();
}

}  // namespace

const CrfKernels crf_kernels = {
    scratch<CrfForward, CrfForwardParams>,   run<CrfForward, CrfForwardParams>,
    scratch<CrfBackward, CrfBackwardParams>, run<CrfBackward, CrfBackwardParams>,
    scratch<CrfDecode, CrfDecodeParams>,     run<CrfDecode, CrfDecodeParams>,
};

#endif

}  // namespace SEQKERN_ISA
}  // namespace seqkern
