// Scores to softmax weights, in units of log2.
#pragma once
#include "cpu_operands.h"

namespace {

// s_j -= Σ_g c_g x_gj
void correct(int groups, float* __restrict s, const float* c, const float* __restrict x, int n) {
  for (int g = 0; g < groups; g++, x += PITCH) {
    #pragma omp simd
    for (int j = 0; j < n; j++) s[j] -= c[g] * x[j];
  }
}

// The same, but what is subtracted is at most `most`.
void correct_clamped(int groups, float* __restrict s, const float* c, const float* __restrict x, float most, int n) {
  #pragma omp simd
  for (int j = 0; j < n; j++) {
    float bias = 0;
    for (int g = 0; g < groups; g++) bias += c[g] * x[g * PITCH + j];
    s[j] -= bias > most ? most : bias;  // NaN stays
  }
}

// max_j of factor s_j - Σ_g c_g x_gj. NaN never wins a maximum here: it reaches the result through its weight.
template <int G> float highest_score(const float* s, const float* c, const float* x, float factor, int n) {
  float highest = -INF;
  #pragma omp simd reduction(max : highest)
  for (int j = 0; j < n; j++) {
    float v = s[j] * factor;
    for (int g = 0; g < G; g++) v -= c[g] * x[g * PITCH + j];
    highest = v > highest ? v : highest;
  }
  return highest;
}
float highest_score(int groups, const float* s, const float* c, const float* x, float factor, int n) {
  switch (groups) {
    case 0: return highest_score<0>(s, c, x, factor, n);
    case 1: return highest_score<1>(s, c, x, factor, n);
    case 2: return highest_score<2>(s, c, x, factor, n);
    case 3: return highest_score<3>(s, c, x, factor, n);
    default: return highest_score<4>(s, c, x, factor, n);
  }
}

struct Exponentials {
  float sum, highest;  // of the weights, of their exponents; the sum is NaN if one of them is
};

// p_j = 2^(factor s_j - top - Σ_g c_g x_gj). BOUNDED: all exponents are known to be between -120 and 120.
template <class Op, int G, bool BOUNDED>
Exponentials exponentiate(const float* __restrict s, const float* c, const float* __restrict x, float factor, float top, typename Op::type* __restrict p, int half_n) {
  volatile float opaque = Op::LOWEST;  // a constant would be propagated into a branch, which costs more than the maximum
  const float lowest = opaque, base = BOUNDED ? Op::ZERO - top : -top;  // top may be huge
  float sum = 0;
  u32 highest = 0;  // bits of positive floats are in the order of their values, and NaN is above them
  #pragma omp simd reduction(+ : sum) reduction(max : highest)
  for (int j = 0; j < half_n; j++) {
    float a = s[j] * factor + base, b = s[half_n + j] * factor + base;
    for (int g = 0; g < G; g++) a -= c[g] * x[g * PITCH + j], b -= c[g] * x[g * PITCH + half_n + j];
    if (!BOUNDED) {
      a += Op::ZERO, b += Op::ZERO;
      a = a < lowest ? lowest : a, b = b < lowest ? lowest : b;
      const u32 i = as_bits(a + (639 - Op::ZERO)), k = as_bits(b + (639 - Op::ZERO)), higher = i > k ? i : k;
      highest = higher > highest ? higher : highest;
    }
    a = Op::power(a), b = Op::power(b);
    sum += a + b;
    Op::weight2(p, half_n, j, a, b);
  }
  return {highest > 0x7f800000 ? NAN : sum, as_float(highest) - 639};
}
template <class Op, bool BOUNDED>
Exponentials exponentiate(int groups, const float* s, const float* c, const float* x, float factor, float top, typename Op::type* p, int half_n) {
  switch (groups) {
    case 0: return exponentiate<Op, 0, BOUNDED>(s, c, x, factor, top, p, half_n);
    case 1: return exponentiate<Op, 1, BOUNDED>(s, c, x, factor, top, p, half_n);
    case 2: return exponentiate<Op, 2, BOUNDED>(s, c, x, factor, top, p, half_n);
    case 3: return exponentiate<Op, 3, BOUNDED>(s, c, x, factor, top, p, half_n);
    default: return exponentiate<Op, 4, BOUNDED>(s, c, x, factor, top, p, half_n);
  }
}

void apply_mask(const AttentionCall& a, const char* mask, float* s, float factor, int n) {
  if (a.mask_dtype == BOOL) {
    if (a.mask_k == 1) {
      #pragma omp simd
      for (int j = 0; j < n; j++) s[j] = mask[j] ? s[j] * factor : -INF;
    } else {
      for (int j = 0; j < n; j++) s[j] = mask[j * a.mask_k] ? s[j] * factor : -INF;
    }
    return;
  }
  by_dtype(a.mask_dtype, [&](auto dtype) {
    for (int j = 0; j < n; j++) {
      const float m = get<dtype>(mask, j * a.mask_k);
      // the lowest finite float, a customary stand-in for -inf, must not become -inf by the change of base
      s[j] = s[j] * factor + (m < -2e38f && m > -INF ? -3e38f : m * LOG2E);
    }
  });
}

}  // namespace
