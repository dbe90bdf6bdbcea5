// CPU kernels that write and read the packed cache: append, dequantize, move, fill. Layout: layout.py; semantics: ops.py.
#include "cpu_kernels.h"

namespace {

constexpr int BATCH = 4096;  // values quantized at a time

struct Quantizer {
  float values[BATCH], low[BATCH], high[BATCH], delta[BATCH], origin[BATCH], inverse[BATCH];
  u32 magnitude[BATCH];
  i32 wide_codes[BATCH];
  u8 codes[BATCH];
};

template <int BITS> void pack_row(const u8* __restrict codes, i64 dim, u8* __restrict out) {
  constexpr int P = BITS == 3 ? 2 : BITS;
  const i64 n = dim * P / 8;
  if (BITS == 8) {
    memcpy(out, codes, n);
    return;
  }
  #pragma omp simd
  for (i64 b = 0; b < n; b++) {
    u32 byte = codes[b] & ((1 << P) - 1);
    for (int i = 1; i < 8 / P; i++) byte |= (codes[i * n + b] & ((1 << P) - 1)) << (i * P);
    out[b] = byte;
  }
  if (BITS == 3)
    for (i64 b = 0; b < dim / 8; b++) {
      u32 byte = 0;
      for (int i = 0; i < 8; i++) byte |= (u32)(codes[i * (dim / 8) + b] >> 2) << i;
      out[n + b] = byte;
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
    float low = INF, high = -INF;
    u32 largest = 0;  // magnitude, as bits: NaN and infinity are the largest
    #pragma omp simd reduction(min : low) reduction(max : high, largest)
    for (i64 c = 0; c < size; c++) {
      const u32 magnitude = as_bits(x[c]) & 0x7fffffff;
      low = x[c] < low ? x[c] : low;
      high = x[c] > high ? x[c] : high;
      largest = magnitude > largest ? magnitude : largest;
    }
    q.low[g] = low, q.high[g] = high, q.magnitude[g] = largest;
  }
  for (i64 g = 0; g < tokens * groups; g++) {
    const float low = q.low[g], range = q.high[g] - low;
    const bool finite = q.magnitude[g] < 0x7f800000 && std::isfinite(range);
    const u16 step = finite ? to_half(min(range * (float)(levels / (levels - 1.)), 65504.f)) : 0x7e00;
    const u16 zero = finite ? to_half(max(min(low - half(step), 65504.f), -65504.f)) : 0x7e00;
    u16* p = scales + g % groups * cache.scales_g + g / groups * cache.scales_s;
    p[0] = step, p[1] = zero;
    q.delta[g] = half(step) / levels, q.origin[g] = half(zero) + half(step), q.inverse[g] = 1 / q.delta[g];
  }
  for (i64 g = 0; g < tokens * groups; g++) {
    const float *x = q.values + g * size, delta = q.delta[g], origin = q.origin[g], inverse = q.inverse[g];
    i32* codes = q.wide_codes + g * size;
    if (!(delta > 0)) {
      std::fill(codes, codes + size, 0);
      continue;
    }
    const float most = levels - 1;
    float closest = 0;  // to a tie: there, and only there, a product with the inverse may round otherwise than the quotient
    #pragma omp simd reduction(max : closest)
    for (i64 c = 0; c < size; c++) {
      const float v = (x[c] - origin) * inverse, r = std::nearbyintf(v), distance = std::fabs(v - r);
      closest = distance > closest ? distance : closest;
      const float at_least = r < 0.f ? 0.f : r;
      codes[c] = (i32)(at_least > most ? most : at_least);
    }
    if (closest > .5f - 1e-6f * levels) {
      #pragma omp simd
      for (i64 c = 0; c < size; c++) {
        const float r = std::nearbyintf((x[c] - origin) / delta), at_least = r < 0.f ? 0.f : r;
        codes[c] = (i32)(at_least > most ? most : at_least);
      }
    }
  }
  #pragma omp simd
  for (i64 i = 0; i < tokens * dim; i++) q.codes[i] = q.wide_codes[i];
  by_bits(cache.bits, [&](auto bits) {
    for (i64 t = 0; t < tokens; t++) pack_row<bits>(q.codes + t * dim, dim, out + t * cache.codes_s);
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
    const float step = half(p[0]), zero = half(p[1]);
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
      if (c.scales_s == 2) {
        memmove(scales + 2 * a.destination, scales + 2 * a.source, a.tokens * 4);
      } else {
        for (i64 t = 0; t < a.tokens; t++) {
          const i64 i = a.destination < a.source ? t : a.tokens - 1 - t;
          memmove(scales + (a.destination + i) * c.scales_s, scales + (a.source + i) * c.scales_s, 4);
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
        for (i64 t = a.start; t < a.stop; t++) p[t * c.scales_s] = a.step, p[t * c.scales_s + 1] = a.zero;
      }
    }
  return true;
}
