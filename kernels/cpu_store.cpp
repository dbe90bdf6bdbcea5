// CPU kernels that write and read the packed cache: append, dequantize, move, fill. Layout: layout.py; semantics: ops.py.
#include "cpu_kernels.h"

namespace {

constexpr int BATCH = 4096;  // values quantized at a time

struct Quantizer {
  float values[BATCH], delta[BATCH], origin[BATCH], inverse[BATCH];
  i32 low[BATCH], high[BATCH];
  u32 scales[BATCH];  // step, and zero point above it
  u8 codes[BATCH];
};

// Codes are in the low bits of words.
template <int BITS> void pack_row(const u32* __restrict codes, i64 dim, u8* __restrict out) {
  constexpr int P = BITS == 3 ? 2 : BITS;
  constexpr u32 M = (1u << P) - 1;
  const i64 n = dim * P / 8;
  #pragma omp simd
  for (i64 b = 0; b < n; b++) {
    u32 byte = codes[b] & M;
    for (int i = 1; i < 8 / P; i++) byte |= (codes[i * n + b] & M) << (i * P);
    out[b] = byte;
  }
  if (BITS == 3)
    for (i64 b = 0; b < dim / 8; b++) {
      u32 byte = 0;
      for (int i = 0; i < 8; i++) byte |= (codes[i * (dim / 8) + b] >> 2 & 1) << i;
      out[n + b] = byte;
    }
}

// Round to nearest even, for magnitudes up to 65504.
inline u32 small_half(float f) {
  const u32 u = as_bits(f), magnitude = u & 0x7fffffff;
  const u32 normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const u32 subnormal = as_bits(as_float(magnitude) + .5f) - 0x3f000000;  // its last place is that of the sum
  return (magnitude < 0x38800000 ? subnormal : normal) | (u >> 16 & 0x8000);
}

// The order of floats as integers: -NaN < -inf < … < inf < NaN. Its own inverse.
inline i32 in_order(i32 bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// Codes of the values of some groups, in the low bits of words: (x - origin) / delta, rounded to nearest even. A quotient
// is on the same side of a tie as x - origin is of that multiple of delta, which 24 bits hold.
template <int BITS> void choose_codes(const Quantizer& q, i64 first, i64 last, i64 size, u32* __restrict codes) {
  if (BITS == 2) {
    for (i64 g = first; g < last; g++, codes += size) {
      const float *x = q.values + g * size, origin = q.origin[g], t1 = q.delta[g] * .5f, t2 = q.delta[g] * 1.5f, t3 = q.delta[g] * 2.5f;
      #pragma omp simd
      for (i64 c = 0; c < size; c++) {
        const float d = x[c] - origin;
        u32 code = d > t1 ? 1 : 0;
        code = d >= t2 ? 2 : code;
        codes[c] = d > t3 ? 3 : code;
      }
    }
    return;
  }
  const float most = (1 << BITS) - 1, magic = 12582912;  // adding it rounds to an integer, in the low bits
  float closest = 0;  // to a tie: there, and only there, a product with the inverse may round otherwise than the quotient
  for (i64 g = first; g < last; g++) {
    const float *x = q.values + g * size, origin = q.origin[g], inverse = q.inverse[g];
    u32* out = codes + (g - first) * size;
    #pragma omp simd reduction(max : closest)
    for (i64 c = 0; c < size; c++) {
      float v = (x[c] - origin) * inverse;
      v = v > 0.f ? v : 0.f, v = v < most ? v : most;
      const float sum = v + magic, distance = std::fabs(v - (sum - magic));
      closest = distance > closest ? distance : closest;
      out[c] = as_bits(sum);
    }
  }
  if (closest <= .5f - 1e-6f * (1 << BITS)) return;
  for (i64 g = first; g < last; g++, codes += size) {
    const float *x = q.values + g * size, origin = q.origin[g], delta = q.delta[g];
    #pragma omp simd
    for (i64 c = 0; c < size; c++) {
      float v = (x[c] - origin) / delta;
      v = v > 0.f ? v : 0.f, v = v < most ? v : most;
      codes[c] = as_bits(v + magic);
    }
  }
}

// Quantizes tokens as reference.quantize does, bit for bit: true division, ties to even, steps rounded before codes.
// One step after the other for a batch of groups: each step is short, and would wait for the one before it.
template <i64 DTYPE>
void quantize_tokens(const char* source, i64 source_s, i64 tokens, const Packed& cache, u8* out, u16* scales, Quantizer& q) {
  const int levels = 1 << cache.bits;
  const i64 dim = cache.dim, groups = cache.groups, size = dim / groups;
  for (i64 t = 0; t < tokens; t++) {
    float* values = q.values + t * dim;
    #pragma omp simd
    for (i64 c = 0; c < dim; c++) values[c] = get<DTYPE>(source, t * source_s + c);
  }
  for (i64 g = 0; g < tokens * groups; g++) {
    const float* x = q.values + g * size;
    i32 low = INT32_MAX, high = INT32_MIN;
    #pragma omp simd reduction(min : low) reduction(max : high)
    for (i64 c = 0; c < size; c++) {
      const i32 ordered = in_order(as_bits(x[c]));
      low = min(low, ordered), high = max(high, ordered);
    }
    q.low[g] = low, q.high[g] = high;
  }
  const bool symmetric = cache.symmetric;
  const float ratio = (float)((symmetric ? 2 * levels : levels) / (levels - 1.)), implied = cache.implied_zero();
  #pragma omp simd
  for (i64 g = 0; g < tokens * groups; g++) {
    const float low = as_float(in_order(q.low[g])), high = as_float(in_order(q.high[g]));
    const float peak = std::fabs(high) < INF ? max(std::fabs(low), std::fabs(high)) : INF, range = symmetric ? peak : high - low;
    const bool finite = std::fabs(range) < INF;
    const float product = range * ratio, step = half(small_half(product < 65504.f ? product : 65504.f));
    const float difference = low - step, above = difference < 65504.f ? difference : 65504.f;
    const u32 zero_bits = small_half(above > -65504.f ? above : -65504.f), step_bits = small_half(step);
    q.scales[g] = finite ? step_bits | zero_bits << 16 : 0x7e007e00;
    const bool some = finite && step > 0;
    q.delta[g] = some ? step / levels : NAN;  // of which nothing is a multiple: codes are 0
    q.origin[g] = some ? (symmetric ? implied * step : half(zero_bits)) + step : 0;
    q.inverse[g] = some ? 1 / (step / levels) : 0;
  }
  for (i64 g = 0; g < tokens * groups; g++) {
    u16* p = scales + g % groups * cache.scales_g + g / groups * cache.scales_s;
    p[0] = q.scales[g];
    if (!symmetric) p[1] = q.scales[g] >> 16;
  }
  by_bits(cache.bits, [&](auto bits) {
    for (i64 t = 0; t < tokens; t++) {
      u32 codes[1024];
      choose_codes<bits>(q, t * groups, (t + 1) * groups, size, codes);
      pack_row<bits>(codes, dim, out + t * cache.codes_s);
    }
  });
}

// Codes of one token, unpacked to a byte per channel.
template <int BITS> void unpack_row(const u8* __restrict x, i64 dim, u8* __restrict out) {
  constexpr int P = BITS == 3 ? 2 : BITS, M = (1 << P) - 1;
  const i64 n = dim * P / 8;
  for (int i = 0; i < 8 / P; i++) {
    #pragma omp simd
    for (i64 b = 0; b < n; b++) out[i * n + b] = x[b] >> (i * P) & M;
  }
  if (BITS == 3)
    for (int i = 0; i < 8; i++) {
      #pragma omp simd
      for (i64 b = 0; b < dim / 8; b++) out[i * (dim / 8) + b] |= (x[n + b] >> i & 1) << 2;
    }
}

template <int BITS> void dequantize_token(const Packed& c, const u8* codes, const u16* scales, i64 token, u8* row, float* values) {
  unpack_row<BITS>(codes, c.dim, row);
  const i64 size = c.dim / c.groups;
  for (i64 g = 0; g < c.groups; g++) {
    const u16* p = scales + g * c.scales_g + token / c.block * c.scales_s;
    const float step = half(p[0]), zero = c.symmetric ? c.implied_zero() * step : half(p[1]);
    #pragma omp simd
    for (i64 i = g * size; i < (g + 1) * size; i++) values[i] = zero + one_plus<BITS>(row[i], 0) * step;
  }
}

// Tokens of all heads are handed out in chunks of about 64 KiB.
i64 chunk_of(i64 dim) { return max<i64>(1, 32768 / dim); }

}  // namespace

bool run(const AppendCall& a) {
  const Packed& cache = a.cache;
  const i64 chunk = chunk_of(cache.dim), chunks = (a.tokens + chunk - 1) / chunk;
  return parallel(a.batch * a.heads * chunks, a.threads, [&](i64 task) {
    const i64 b = task / chunks / a.heads, h = task / chunks % a.heads, first = task % chunks * chunk;
    static thread_local Quantizer quantizer;
    by_dtype(a.dtype, [&](auto dtype) {
      const i64 batch = BATCH / cache.dim, stop = min(first + chunk, a.tokens);
      for (i64 t = first; t < stop; t += batch)
        quantize_tokens<dtype>(a.source.data + (b * a.source.b + h * a.source.h + t * a.source.s) * width_of(dtype), a.source.s, min(batch, stop - t),
                               cache, cache.codes + b * cache.codes_b + h * cache.codes_h + (a.start + t) * cache.codes_s,
                               cache.scales + b * cache.scales_b + h * cache.scales_h + (a.start + t) * cache.scales_s, quantizer);
    });
  }, [] {});
}

bool run(const DequantizeCall& a) {
  const Packed& cache = a.cache;
  const i64 chunk = chunk_of(cache.dim), chunks = (a.tokens + chunk - 1) / chunk;
  return parallel(a.batch * a.heads * chunks, a.threads, [&](i64 task) {
    const i64 b = task / chunks / a.heads, h = task / chunks % a.heads, first = task % chunks * chunk;
    const u8* codes = cache.codes + b * cache.codes_b + h * cache.codes_h;
    const u16* scales = cache.scales + b * cache.scales_b + h * cache.scales_h;
    static thread_local Quantizer row;
    for (i64 t = first; t < min(first + chunk, a.tokens); t++) {
      by_bits(cache.bits, [&](auto bits) {
        dequantize_token<bits>(cache, codes + (a.start + t) * cache.codes_s, scales, a.start + t, row.codes, row.values);
      });
      const i64 at = ((b * a.heads + h) * a.tokens + t) * cache.dim;
      by_dtype(a.dtype, [&](auto dtype) {
        #pragma omp simd
        for (i64 c = 0; c < cache.dim; c++) put(a.output, at + c, row.values[c], dtype);
      });
    }
  }, [] {});
}

// Bit for bit, also where the ranges overlap.
bool run(const MoveCall& a) {
  const Packed& c = a.cache;
  return parallel(a.batch * a.heads, a.threads, [&](i64 task) {
    const i64 b = task / a.heads, h = task % a.heads, width = c.dim * c.bits / 8;
    u8* codes = c.codes + b * c.codes_b + h * c.codes_h;
    if (c.codes_s == width) {
      memmove(codes + a.destination * width, codes + a.source * width, a.tokens * width);
    } else {
      for (i64 t = 0; t < a.tokens; t++) {
        const i64 i = a.destination < a.source ? t : a.tokens - 1 - t;
        memmove(codes + (a.destination + i) * c.codes_s, codes + (a.source + i) * c.codes_s, width);
      }
    }
    for (i64 g = 0; g < c.groups; g++) {
      u16* scales = c.scales + b * c.scales_b + h * c.scales_h + g * c.scales_g;
      const i64 n = c.per_scale();
      if (c.scales_s == n) {
        memmove(scales + n * a.destination, scales + n * a.source, a.tokens * n * sizeof(u16));
      } else {
        for (i64 t = 0; t < a.tokens; t++) {
          const i64 i = a.destination < a.source ? t : a.tokens - 1 - t;
          memmove(scales + (a.destination + i) * c.scales_s, scales + (a.source + i) * c.scales_s, n * sizeof(u16));
        }
      }
    }
  }, [] {});
}

bool run(const FillCall& a) {
  const Packed& c = a.cache;
  const i64 width = c.dim * c.bits / 8;
  for (i64 b = 0; b < a.batch; b++)
    for (i64 h = 0; h < a.heads; h++) {
      for (i64 t = a.start; t < a.stop; t++) memset(c.codes + b * c.codes_b + h * c.codes_h + t * c.codes_s, 0, width);
      for (i64 g = 0; g < c.groups; g++) {
        u16* p = c.scales + b * c.scales_b + h * c.scales_h + g * c.scales_g;
        for (i64 t = a.start; t < a.stop; t++) {
          p[t * c.scales_s] = 0;
          if (!c.symmetric) p[t * c.scales_s + 1] = a.zero;
        }
      }
    }
  return true;
}
