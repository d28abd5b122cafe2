// One instruction set's kernels (attention's are in attention_kernels.cpp), behind one table:
// compiled once per instruction set, in a namespace of its name. Nothing here may call inline
// functions of the standard library: the linker keeps one copy of those, and it could be the one
// compiled for the newest instruction set.
#include "kernels.h"

#include <time.h>

#include "gate_gradients.h"
#include "philox.h"

namespace seqkern {
namespace SEQKERN_ISA {

// attention_kernels.cpp
size_t attention_forward_scratch(const AttentionForwardParams& p);
void attention_forward(const AttentionForwardParams& p);
size_t attention_backward_scratch(const AttentionBackwardParams& p);
void attention_backward(const AttentionBackwardParams& p);

// additive_attention_kernels.cpp
size_t additive_forward_scratch(const AdditiveForwardParams& p);
void additive_forward(const AdditiveForwardParams& p);
size_t additive_backward_scratch(const AdditiveBackwardParams& p);
void additive_backward(const AdditiveBackwardParams& p);
size_t additive_step_scratch(const AdditiveStepParams& p);
void additive_step_pack(const AdditiveStepParams& p);
void additive_step(const AdditiveStepParams& p);
void gates_forward(const GatesParams& p);
void gates_backward(const GatesParams& p);

namespace {

// f((Pass<S>*)nullptr) for the storage type known at run time.
template <template <class> class Pass, class F>
auto with_storage(const LayerParams& p, const F& f) {
  switch (p.dtype) {
    case Dtype::bf16:
      return f((Pass<bf16>*)nullptr);
#if !defined(__AMX_BF16__)
    case Dtype::f32:
      return f((Pass<float>*)nullptr);
    case Dtype::f64:
      return f((Pass<double>*)nullptr);
    case Dtype::f16:
      return f((Pass<f16>*)nullptr);
#else
    default:  // see SEQKERN_DELEGATE
      break;
#endif
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

size_t forward_scratch(const ForwardParams& p) {
  SEQKERN_DELEGATE(forward_scratch, p);
  return with_storage<Forward>(p, [&](auto* pass) { return pass_of(pass, p).scratch_bytes(); });
}

void forward(const ForwardParams& p) {
  SEQKERN_DELEGATE(forward, p);
  with_storage<Forward>(p, [&](auto* pass) { pass_of(pass, p).run(); });
}

size_t backward_scratch(const BackwardParams& p) {
  SEQKERN_DELEGATE(backward_scratch, p);
  return with_storage<Backward>(p, [&](auto* pass) { return pass_of(pass, p).scratch_bytes(); });
}

void backward(const BackwardParams& p) {
  SEQKERN_DELEGATE(backward, p);
  with_storage<Backward>(p, [&](auto* pass) { pass_of(pass, p).run(); });
}

void activation(const char* f, const float* x, float* y, int64_t n) {
  constexpr int64_t lanes = kLanes<float>;
  for (int64_t i = 0; i < n; i += lanes) {
    const VecF v = load_first(x + i, n - i);
    store_first(y + i, strcmp(f, "tanh") == 0 ? Math<float>::tanh(v) : Math<float>::sigmoid(v),
                n - i);
  }
}

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

// A vector register for asm, so that the compiler must make the value and may not leave the loop
// out.
#if defined(__AVX512F__)
#define SEQKERN_REGISTER(v) "+v"(v)
#elif defined(__x86_64__)
#define SEQKERN_REGISTER(v) "+x"(v)
#else
#define SEQKERN_REGISTER(v) "+w"(v)
#endif

// The rate of independent fused multiply-adds in registers.
double fma_peak(int threads, double seconds) {
  constexpr int kSums = 12, kRounds = 20000;
  double rate = 0;
  parallel(threads, [&](int, int) {
    VecF sums[kSums];
#pragma GCC unroll 12
    for (int i = 0; i < kSums; i++) sums[i] = VecF{} + float(i);
    VecF a = VecF{} + 0.999f, b = VecF{} + 0.001f;
    int64_t rounds = 0;
    const double start = now();
    double elapsed;
    do {
      for (int r = 0; r < kRounds; r++) {
#pragma GCC unroll 12
        for (int i = 0; i < kSums; i++) {
          sums[i] = sums[i] * a + b;
          asm volatile("" : SEQKERN_REGISTER(sums[i]));
        }
      }
      rounds += kRounds;
      elapsed = now() - start;
    } while (elapsed < seconds);
    const double mine = double(rounds) * kSums * kLanes<float> * 2 / elapsed * 1e-9;
#pragma omp atomic
    rate += mine;
  });
  return rate;
}

// The rate at which each thread reads its own share of `bytes`, again and again.
double read_bandwidth(int threads, int64_t bytes, double seconds) {
  double rate = 0;  // vectors: of one thread, in rounds of 8
  const int64_t vectors = bytes / threads / kVecBytes / 8 * 8;
  char* memory = (char*)__builtin_malloc(size_t(vectors) * size_t(threads) * kVecBytes + 64);
  if (!memory || vectors == 0) return 0;
  parallel(threads, [&](int thread, int) {
    float* data = (float*)(((uintptr_t)memory + 63) / 64 * 64) + thread * vectors * kLanes<float>;
    memset(data, 0, size_t(vectors) * kVecBytes);
    int64_t passes = 0;
    const double start = now();
    double elapsed;
    do {
      VecF sums[8] = {};
      for (int64_t v = 0; v < vectors; v += 8) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) sums[i] += load(data + (v + i) * kLanes<float>);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) asm volatile("" : SEQKERN_REGISTER(sums[i]));
      passes++;
      elapsed = now() - start;
    } while (elapsed < seconds);
    const double mine = double(passes) * double(vectors) * kVecBytes / elapsed * 1e-9;
#pragma omp atomic
    rate += mine;
  });
  __builtin_free(memory);
  return rate;
}

#define SEQKERN_STRING_(x) #x
#define SEQKERN_STRING(x) SEQKERN_STRING_(x)

}  // namespace

const KernelTable& kernel_table() {
  static constexpr KernelTable table = {SEQKERN_STRING(SEQKERN_ISA),
                                        forward_scratch,
                                        forward,
                                        backward_scratch,
                                        backward,
                                        recurrent_mask,
                                        attention_forward_scratch,
                                        attention_forward,
                                        attention_backward_scratch,
                                        attention_backward,
                                        additive_forward_scratch,
                                        additive_forward,
                                        additive_backward_scratch,
                                        additive_backward,
                                        additive_step_scratch,
                                        additive_step_pack,
                                        additive_step,
                                        gates_forward,
                                        gates_backward,
                                        activation,
                                        fma_peak,
                                        read_bandwidth};
  return table;
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
