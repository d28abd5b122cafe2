// Vectors of lanes in GCC's and Clang's vector extension: one source for SSE, AVX2, AVX-512 and
// NEON.
//
// Compiled once per instruction set, in a namespace of its name; only loads and stores of 16-bit
// floats need intrinsics. Arithmetic is in float or double; bf16 and f16 exist in memory only.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../params.h"

#define SEQKERN_INLINE inline __attribute__((always_inline))

namespace seqkern {
namespace SEQKERN_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
constexpr int kVecRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
constexpr int kVecRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVecBytes = 16;
constexpr int kVecRegisters = 32;
#else
constexpr int kVecBytes = 16;
constexpr int kVecRegisters = 16;
#endif

typedef float VecF __attribute__((vector_size(kVecBytes)));
typedef double VecD __attribute__((vector_size(kVecBytes)));
typedef int32_t VecI __attribute__((vector_size(kVecBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVecBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVecBytes / 2)));  // as many lanes as VecF

template <class C>
struct VecOf;
template <>
struct VecOf<float> {
  using type = VecF;
};
template <>
struct VecOf<double> {
  using type = VecD;
};
template <class C>
using Vec = typename VecOf<C>::type;
template <class C>
constexpr int kLanes = kVecBytes / int(sizeof(C));

// The type that values stored as S are computed in.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

// ---- loads and stores: kLanes values, unaligned -------------------------------------------------

SEQKERN_INLINE VecF load(const float* p) {
  VecF v;
  memcpy(&v, p, sizeof v);
  return v;
}
SEQKERN_INLINE VecD load(const double* p) {
  VecD v;
  memcpy(&v, p, sizeof v);
  return v;
}
SEQKERN_INLINE VecF load(const bf16* p) {
  VecU16 u;
  memcpy(&u, p, sizeof u);
  return (VecF)(__builtin_convertvector(u, VecU) << 16);
}
SEQKERN_INLINE void store(float* p, VecF v) { memcpy(p, &v, sizeof v); }
SEQKERN_INLINE void store(double* p, VecD v) { memcpy(p, &v, sizeof v); }
SEQKERN_INLINE void store(bf16* p, VecF v) {
  const VecU u = (VecU)v;
  const VecU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  const VecU nan = (u >> 16) | 0x40;
  const VecU16 bits = __builtin_convertvector(v == v ? rounded : nan, VecU16);
  memcpy(p, &bits, sizeof bits);
}

// IEEE half <-> float without hardware help, one value.
inline float float_of_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  uint32_t magnitude = half & 0x7fff, bits;
  if (magnitude >= 0x7c00) {
    bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x400) {
    bits = (magnitude << 13) + (112u << 23);
  } else {  // subnormal: magnitude * 2^-24
    const float f = float(magnitude) * 5.9604644775390625e-08f;
    memcpy(&bits, &f, 4);
  }
  bits |= sign;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}
inline uint16_t half_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00 | (bits >> 13 & 0x1ff);
  } else if (bits >= 0x477ff000) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (bits >= 0x38800000) {
    half = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  } else {  // subnormal: let the addition round at 2^-24
    float f;
    memcpy(&f, &bits, 4);
    f += 0.5f;
    memcpy(&half, &f, 4);
    half -= 0x3f000000;
  }
  return uint16_t(half | sign);
}

SEQKERN_INLINE VecF load(const f16* p) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__) && defined(__F16C__)
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (VecF)vcvt_f32_f16(vld1_f16((const __fp16*)p));
#else
  VecF v;
  for (int i = 0; i < kLanes<float>; i++) v[i] = float_of_half(p[i].bits);
  return v;
#endif
}
SEQKERN_INLINE void store(f16* p, VecF v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p,
                      _mm512_maskz_cvtps_ph(__mmask16(-1), (__m512)v,
                                            _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128((__m128i*)p,
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  vst1_f16((__fp16*)p, vcvt_f16_f32((float32x4_t)v));
#else
  for (int i = 0; i < kLanes<float>; i++) p[i].bits = half_of_float(v[i]);
#endif
}

// The first n lanes (n <= 0: none, n >= kLanes: all); the others are zero, or left alone in memory.
template <class S>
SEQKERN_INLINE Vec<Compute<S>> load_first(const S* p, int64_t n) {
  constexpr int64_t lanes = kLanes<Compute<S>>;
  if (__builtin_expect(n >= lanes, 1)) return load(p);
  S buffer[lanes] = {};
  for (int64_t i = 0; i < n; i++) buffer[i] = p[i];
  return load(buffer);
}
template <class S>
SEQKERN_INLINE void store_first(S* p, Vec<Compute<S>> v, int64_t n) {
  constexpr int64_t lanes = kLanes<Compute<S>>;
  if (__builtin_expect(n >= lanes, 1)) return store(p, v);
  S buffer[lanes];
  store(buffer, v);
  for (int64_t i = 0; i < n; i++) p[i] = buffer[i];
}

// out[0..n) = in[0..n), converted
template <class To, class From>
inline void convert(To* out, const From* in, int64_t n) {
  constexpr int64_t lanes = kLanes<Compute<From>>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store(out + i, load(in + i));
  if (i < n) store_first(out + i, load_first(in + i, n - i), n - i);
}

// ---- activations --------------------------------------------------------------------------------

// exp(-|x|), at most 1 ulp off; subnormal results are right; NaN stays NaN.
// Cody & Waite's reduction; the polynomial is Cephes' expf (S. Moshier, 1989).
SEQKERN_INLINE VecF exp_minus_abs(VecF x) {
  VecF a = (VecF)((VecU)x | 0x80000000u);
  a = a < -104.0f ? VecF{} - 104.0f : a;
  const VecF magic = VecF{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const VecF shifted = a * 1.44269504088896341f + magic;
  const VecF n = shifted - magic;
  const VecI exponent = (VecI)shifted - (VecI)magic;
  VecF r = a - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  VecF p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecI half = exponent >> 1;  // 2^exponent in two factors: the result may be subnormal
  const VecF scale1 = (VecF)((half + 127) << 23);
  const VecF scale2 = (VecF)((exponent - half + 127) << 23);
  return p * scale1 * scale2;
}

// log(1 + e) for 0 <= e <= 1, at most 2 ulp off. The polynomial is Cephes' logf (S. Moshier, 1992);
// what is lost in rounding 1 + e is added back.
SEQKERN_INLINE VecF log_1p(VecF e) {
  const VecF u = 1.0f + e;
  const VecF lost = (e - (u - 1.0f)) / u;
  const VecF x = u > 1.41421356f ? 0.5f * u - 1.0f : u - 1.0f;
  VecF p = x * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  const VecF z = x * x;
  const VecF log = p * x * z - 0.5f * z + x;
  return (u > 1.41421356f ? log + 0.693147181f : log) + lost;
}

template <class C>
struct Math;

template <>
struct Math<float> {
  using V = VecF;
  static SEQKERN_INLINE V sigmoid(V x) {
    const V e = exp_minus_abs(x);
    return (x < 0 ? e : V{} + 1.0f) / (1.0f + e);
  }
  static SEQKERN_INLINE V tanh(V x) {
    const V z = x * x;  // near zero: Cephes' tanhf
    V p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const V near_zero = p * z * x + x;
    const V e = exp_minus_abs(x + x);
    const V magnitude = 1.0f - 2.0f * e / (1.0f + e);
    const V absolute = (V)((VecU)x & 0x7fffffffu);
    const V result = absolute < 0.625f ? near_zero : magnitude;
    return (V)((VecU)result | ((VecU)x & 0x80000000u));  // near_zero has x's sign but for -0
  }
  static SEQKERN_INLINE V exp_of_negative(V x) { return exp_minus_abs(x); }
  static SEQKERN_INLINE V log_sigmoid(V x) { return (x < 0 ? x : V{}) - log_1p(exp_minus_abs(x)); }
};

template <>
struct Math<double> {  // the C library's, lane by lane
  using V = VecD;
  static SEQKERN_INLINE V sigmoid(V x) {
    V result;
    for (int i = 0; i < kLanes<double>; i++) {
      const double e = std::exp(-std::fabs(x[i]));
      result[i] = (x[i] < 0 ? e : 1.0) / (1.0 + e);
    }
    return result;
  }
  static SEQKERN_INLINE V tanh(V x) {
    V result{};
    for (int i = 0; i < kLanes<double>; i++) result[i] = std::tanh(x[i]);
    return result;
  }
  static SEQKERN_INLINE V exp_of_negative(V x) {
    V result;
    for (int i = 0; i < kLanes<double>; i++) result[i] = std::exp(x[i]);
    return result;
  }
  static SEQKERN_INLINE V log_sigmoid(V x) {
    V result;
    for (int i = 0; i < kLanes<double>; i++)
      result[i] = (x[i] < 0 ? x[i] : 0.0) - std::log1p(std::exp(-std::fabs(x[i])));
    return result;
  }
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
