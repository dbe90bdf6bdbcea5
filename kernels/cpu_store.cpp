// CPU kernels that write and read the packed cache: append, dequantize, move, fill. Layout: layout.py; semantics: ops.py.
#include <limits>
#include <numeric>

#include "cpu_kernels.h"

namespace {

constexpr int BATCH = 4096;  // values quantized at a time

struct Quantizer {
  float values[BATCH], low[BATCH], high[BATCH], delta[BATCH], origin[BATCH], inverse[BATCH];  // of values; the rest of groups
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

// Vectors, as compilers do not see through all of what comes between.
inline Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffffu); }
inline Floats at_most(Floats x, float most) { return x < most ? x : Floats{} + most; }   // of NaN, `most`
inline Floats at_least(Floats x, float least) { return x > least ? x : Floats{} + least; }
// Round to nearest even, for magnitudes up to 65504.
inline Words small_half(Floats x) {
  const Words u = (Words)x, size = u & 0x7fffffffu;
  const Words normal = (size - 0x38000000u + 0xfffu + (size >> 13 & 1)) >> 13;
  const Words subnormal = (Words)((Floats)size + .5f) - 0x3f000000u;  // its last place is that of the sum
  return (size < 0x38800000u ? subnormal : normal) | (u >> 16 & 0x8000u);
}
inline Floats of_small_half(Words h) { return (Floats)((Words)((Floats)((h & 0x7fffu) << 13) * 0x1p112f) | (h & 0x8000u) << 16); }

// The order of floats as integers: -NaN < -inf < … < inf < NaN. Its own inverse. It is that of 16-bit formats, too.
inline i32 in_order(i32 bits) { return bits ^ (bits >> 31 & 0x7fffffff); }
inline int16_t in_order(int16_t bits) { return bits ^ (bits >> 15 & 0x7fff); }

template <i64 DTYPE> void find_range(const typename Element<DTYPE>::type* x, i64 size, float& lowest, float& highest) {
  typedef std::conditional_t<DTYPE == FLOAT32, i32, int16_t> Ordered;
  Ordered low = std::numeric_limits<Ordered>::max(), high = std::numeric_limits<Ordered>::min();
  #pragma omp simd reduction(min : low) reduction(max : high)
  for (i64 c = 0; c < size; c++) {
    Ordered bits;
    memcpy(&bits, x + c, sizeof bits);
    const Ordered ordered = in_order(bits);
    low = min(low, ordered), high = max(high, ordered);
  }
  auto value = [](Ordered ordered) {
    const Ordered bits = in_order(ordered);
    return get<DTYPE>((const char*)&bits, 0);
  };
  lowest = value(low), highest = value(high);
}

// Codes of the values of some groups, in the low bits of words: (x - origin) / delta, rounded to nearest even. A quotient
// is on the same side of a tie as x - origin is of that multiple of delta, which 24 bits hold.
template <int BITS> void choose_codes(const Quantizer& q, i64 first, i64 last, i64 size, u32* __restrict codes) {
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

// LANES values.
template <i64 DTYPE> inline Floats widened(const char* x, i64 at) {
  if constexpr (DTYPE == FLOAT32) return load_vector<Floats>(x + 4 * at);
  typedef u16 Narrow __attribute__((vector_size(2 * LANES)));
  const Narrow bits = load_vector<Narrow>(x + 2 * at);
  if constexpr (DTYPE == BFLOAT16) return (Floats)(__builtin_convertvector(bits, Words) << 16);
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__) && defined(__F16C__)
  return (Floats)_mm256_cvtph_ps((__m128i)bits);
#else
  float values[LANES];
  for (int i = 0; i < LANES; i++) values[i] = half(bits[i]);
  return load_vector<Floats>(values);
#endif
}
// The lowest bytes of words.
inline void store_bytes(u8* to, Words x) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(__AVX2__)
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(halves, halves));
#else
  for (int i = 0; i < LANES; i++) to[i] = x[i];
#endif
}

// The same for one token at 2 bits, packed: a code says how many of three multiples a value is above.
template <i64 DTYPE> void pack_two_bits(const char* x, const float* origin, const float* delta, const i64* group, i64 run, i64 n, u8* __restrict out) {
  for (i64 first = 0; first < n; first += run) {
    float from[4], t1[4], t2[4], t3[4];
    for (int i = 0; i < 4; i++) {
      const i64 g = *group++;
      from[i] = origin[g], t1[i] = delta[g] * .5f, t2[i] = delta[g] * 1.5f, t3[i] = delta[g] * 2.5f;
    }
    i64 b = first;
    for (; b + LANES <= first + run; b += LANES) {
      Ints byte = {};
      #pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const Floats d = widened<DTYPE>(x, i * n + b) - from[i];
        byte -= ((Ints)(d > t1[i]) + (Ints)(d >= t2[i]) + (Ints)(d > t3[i])) << 2 * i;  // what is true is -1
      }
      store_bytes(out + b, (Words)byte);
    }
    for (; b < first + run; b++) {
      u32 byte = 0;
      for (int i = 0; i < 4; i++) {
        const float d = get<DTYPE>(x, i * n + b) - from[i];
        byte |= u32((d > t1[i]) + (d >= t2[i]) + (d > t3[i])) << 2 * i;
      }
      out[b] = byte;
    }
  }
}

// Quantizes tokens as reference.quantize does, bit for bit: true division, ties to even, steps rounded before codes.
// One step after the other for a batch of groups: each step is short, and would wait for the one before it.
template <i64 DTYPE>
void quantize_tokens(const char* source, i64 source_s, i64 tokens, const Packed& cache, u8* out, u16* scales, Quantizer& q) {
  const float levels = 1 << cache.bits;
  const i64 dim = cache.dim, groups = cache.groups, size = dim / groups;
  typedef typename Element<DTYPE>::type Value;
  for (i64 t = 0; t < tokens; t++)
    for (i64 g = 0; g < groups; g++) find_range<DTYPE>((const Value*)source + t * source_s + g * size, size, q.low[t * groups + g], q.high[t * groups + g]);
  const bool symmetric = cache.symmetric;
  const float ratio = (float)((symmetric ? 2 * levels : levels) / (levels - 1.)), implied = cache.implied_zero();
  for (i64 g = 0; g < tokens * groups; g += LANES) {
    const Floats low = load_vector<Floats>(q.low + g), high = load_vector<Floats>(q.high + g), a = magnitude(low), b = magnitude(high);
    const Floats range = symmetric ? (b < INF ? (a < b ? b : a) : Floats{} + INF) : high - low;
    const Words step_bits = small_half(at_most(range * ratio, 65504.f));
    const Floats step = of_small_half(step_bits);
    const Words zero_bits = small_half(at_least(at_most(low - step, 65504.f), -65504.f));
    const Ints finite = magnitude(range) < INF, some = finite & (Ints)(step > 0);
    store_vector(q.scales + g, finite ? step_bits | zero_bits << 16 : Words{} + 0x7e007e00u);
    const Floats delta = some ? step / levels : Floats{} + NAN;  // of which nothing is a multiple: codes are 0
    const Floats origin = (symmetric ? implied * step : of_small_half(zero_bits)) + step;
    store_vector(q.delta + g, delta), store_vector(q.inverse + g, some ? 1 / delta : Floats{}), store_vector(q.origin + g, some ? origin : Floats{});
  }
  for (i64 g = 0; g < groups; g++)
    for (i64 t = 0; t < tokens; t++) {
      u16* p = scales + g * cache.scales_g + t * cache.scales_s;
      const u32 pair = q.scales[t * groups + g];
      p[0] = pair;
      if (!symmetric) p[1] = pair >> 16;
    }
  if (cache.bits == 2) {
    const i64 n = dim / 4, run = std::gcd(n, size);  // channels of a plane; so many of them are of one group
    i64 group[MOST_CHANNELS], *next = group;         // of the four planes' runs: divisions would cost more than all the rest
    for (i64 first = 0; first < n; first += run)
      for (int i = 0; i < 4; i++) *next++ = (i * n + first) / size;
    for (i64 t = 0; t < tokens; t++)
      pack_two_bits<DTYPE>((const char*)((const Value*)source + t * source_s), q.origin + t * groups, q.delta + t * groups, group, run, n, out + t * cache.codes_s);
    return;
  }
  by_bits(cache.bits, [&](auto bits) {
    for (i64 t = 0; t < tokens; t++) {
      float* values = q.values + t * dim;
      #pragma omp simd
      for (i64 c = 0; c < dim; c++) values[c] = get<DTYPE>(source, t * source_s + c);
      u32 codes[MOST_CHANNELS];
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
