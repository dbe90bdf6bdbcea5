// Blocks of packed keys and values as operands of `brgemm`.
#pragma once
#include <ATen/native/CPUBlas.h>

#include "cpu_kernels.h"

namespace {

namespace blas = at::native::cpublas;

constexpr int KEYS = 512;         // keys per block
constexpr int PITCH = KEYS + 16;  // row pitch of block buffers: a power of two would put tile rows into the same cache sets
constexpr int WEIGHTS = KEYS + 32;  // the same in bf16, in whole cache lines
constexpr float LOG2E = 1.44269504f;

typedef u8 Bytes __attribute__((vector_size(64)));
typedef u64 Pair __attribute__((vector_size(16)));
typedef u8 Piece __attribute__((vector_size(LANES)));

// Two floats to a pair of bf16, rounding halves away from zero; NaN only in its canonical form.
inline u32 pair(float low, float high) { return (as_bits(low) + 0x8000) >> 16 | ((as_bits(high) + 0x8000) & 0xffff0000u); }

template <class T> struct Buffer {  // grows, is never cleared, lives as long as its thread
  T* data = nullptr;
  size_t size = 0;
  T* get(size_t n) {
    if (n > size) {
      free(data);
      size = (n + 63) / 64 * 64;
      data = (T*)aligned_alloc(64, size * sizeof(T));
      memset((void*)data, 0, size * sizeof(T));
    }
    return data;
  }
  ~Buffer() { free(data); }
};

// [n][WIDTH] to [WIDTH][PITCH]. All columns at once and a constant width let the compiler do it with shuffles.
template <int WIDTH> void transpose(const u8* x, int n, u32* __restrict out) {
  #pragma omp simd
  for (int j = 0; j < n; j++)
    for (int w = 0; w < WIDTH; w++) memcpy(out + w * PITCH + j, x + 4 * (WIDTH * j + w), 4);
}

// Words of n tokens, [bytes / 4][PITCH]: lanes are tokens.
void transpose_words(const u8* x, i64 stride, int width, int n, u32* __restrict words) {
  if (stride == 32 && width == 8) transpose<8>(x, n, words);
  else if (stride == 16 && width == 4) transpose<4>(x, n, words);
  else
    for (int j = 0; j < n; j++)
      for (int w = 0; w < width; w++) memcpy(words + w * PITCH + j, x + j * stride + 4 * w, 4);
}

// Steps through the quads of channels (4q … 4q + 3) in the words of tokens: 3 bits have a plane of two and a plane of one.
template <int BITS> struct Quads {
  static constexpr int P = BITS == 3 ? 2 : BITS;
  const u32* words;
  int n, n_high, low = 0, shift = 0, high = 0, high_shift = 0;  // n, n_high: words of a plane
  Quads(const u32* words, i64 dim) : words(words), n(dim * P / 32), n_high(dim / 32) {}
  void next() {
    if (++low == n) low = 0, shift += P;
    if (BITS == 3 && ++high == n_high) high = 0, high_shift++;
  }
  u32 operator()(int j) const {  // one code in the low bits of each byte, and for other than 3 bits something above it
    u32 u = words[low * PITCH + j] >> shift;
    if (BITS == 3) u = (u & 0x03030303u) | (words[(n + high) * PITCH + j] >> high_shift & 0x01010101u) << 2;
    return u;
  }
};

// A bound on the norms of dequantized tokens, whose steps and zeros are [G][PITCH]; NaN if one of them is.
float highest_norm(i64 groups, i64 size, int n, const float* step, const float* zero) {
  float squares[KEYS] = {};
  for (i64 g = 0; g < groups; g++, step += PITCH, zero += PITCH) {
    #pragma omp simd
    for (int j = 0; j < n; j++) {
      const float low = zero[j] + step[j], high = low + step[j];
      squares[j] += low * low + high * high;
    }
  }
  u32 highest = 0;  // bits of positive floats are in the order of their values, and NaN is above them
  #pragma omp simd reduction(max : highest)
  for (int j = 0; j < n; j++) highest = max(highest, as_bits(squares[j]) & 0x7fffffff);
  return std::sqrt(as_float(highest) * size);
}

// Pairs of float16 to two arrays of float.
void part_halves(const u16* pairs, int n, float* __restrict first, float* __restrict second) {
  int j = 0;
#ifdef __AVX512F__  // compilers do not find these, and the loop below takes twice as long
  for (; j + 16 <= n; j += 16) {
    const __m512i x = _mm512_loadu_si512(pairs + 2 * j);
    _mm512_storeu_ps(first + j, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)));
    _mm512_storeu_ps(second + j, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16))));
  }
#elif defined(__AVX2__) && defined(__F16C__)
  for (; j + 8 <= n; j += 8) {
    const __m256i x = _mm256_loadu_si256((const __m256i*)(pairs + 2 * j));
    const __m256i parted = _mm256_packus_epi32(_mm256_and_si256(x, _mm256_set1_epi32(0xffff)), _mm256_srli_epi32(x, 16));
    const __m256i ordered = _mm256_permute4x64_epi64(parted, 0xd8);
    _mm256_storeu_ps(first + j, _mm256_cvtph_ps(_mm256_castsi256_si128(ordered)));
    _mm256_storeu_ps(second + j, _mm256_cvtph_ps(_mm256_extracti128_si256(ordered, 1)));
  }
#endif
  #pragma omp simd
  for (int i = j; i < n; i++) first[i] = half(pairs[2 * i]), second[i] = half(pairs[2 * i + 1]);
}

// step' and zero' of n tokens from `start`, times `factor`, as [G][PITCH]; with `square`, also step'².
void load_scales(const Packed& c, const u16* scales, i64 start, int n, float factor, float* step, float* zero, float* square) {
  for (i64 g = 0; g < c.groups; g++, step += PITCH, zero += PITCH) {
    const u16* s = scales + g * c.scales_g;
    const bool contiguous = c.block == 1 && c.scales_s == c.per_scale();
    if (contiguous && c.symmetric) {
      s += start;
      #pragma omp simd
      for (int j = 0; j < n; j++) step[j] = half(s[j]);
    } else if (contiguous) {
      part_halves(s + 2 * start, n, step, zero);
    } else {
      for (int j = 0; j < n; j++) {
        const u16* p = s + (start + j) / c.block * c.scales_s;
        step[j] = half(p[0]);
        if (!c.symmetric) zero[j] = half(p[1]);
      }
    }
    if (c.symmetric) {
      const float implied = c.implied_zero();
      #pragma omp simd
      for (int j = 0; j < n; j++) zero[j] = step[j] * implied;
    }
    if (square) {
      float* q = square + g * PITCH;
      #pragma omp simd
      for (int j = 0; j < n; j++) q[j] = step[j] * step[j];
    }
    if (factor != 1.f) {
      #pragma omp simd
      for (int j = 0; j < n; j++) step[j] *= factor, zero[j] *= factor;
    }
  }
}

// Keys are [D][PITCH] and values [keys][DV], but bf16 operands hold two rows of that in one row of 32-bit pairs (VNNI).
// Values and weights pair key j with key j + half, not with its neighbour: both are then packed without shuffles.

struct Bfloat16 {
  typedef u16 type;
  typedef u32 word;
  static constexpr int STACK = 2;
  static u16 from(float f) { return to_bfloat16(f); }
  static constexpr int ORDER[] = {0, 2, 1, 3};  // of the channels of a quad, in a row of queries
  static void key4(u32* k, int j, float a, float b, float c, float d) { k[j] = pair(a, c), k[PITCH + j] = pair(b, d); }
  static void value2(u32* v, i64, i64 c, float a, float b) { v[c] = pair(a, b); }
  static void value2(u32* v, i64, i64 c, u16 a, u16 b) { v[c] = a | (u32)b << 16; }
  static void weight2(u16* p, int, int j, float a, float b) { u32 u = pair(a, b); memcpy(p + 2 * j, &u, 4); }
  // 2^(t - ZERO), 0 at LOWEST. As a number of 14 binary places above 512, t holds the exponent
  // and, as a first approximation, the mantissa; that is corrected by a factor. Error 7e-4, NaN is lost.
  static constexpr float ZERO = 639, LOWEST = 512;
  static float power(float t) {
    const u32 i = as_bits(t) << 9;
    const float m = as_float((i & 0x7fffff) | 0x3f800000);
    return as_float(i) * (((-0.106445698f * m + 0.707475824f) * m - 1.37730758f) * m + 1.77561472f);
  }
  static void product(i64 m, i64 n, i64 k, i64 lda, i64 ldb, i64 ldc, bool add, const u16* a, const u32* b, float* c) {
    blas::brgemm(m, n, k, lda, ldb, ldc, add, (const at::BFloat16*)a, (const at::BFloat16*)b, c, true);
  }
};

struct Float32 {
  typedef float type;
  typedef float word;
  static constexpr int STACK = 1;
  static float from(float f) { return f; }
  static constexpr int ORDER[] = {0, 1, 2, 3};
  static void key4(float* k, int j, float a, float b, float c, float d) { k[j] = a, k[PITCH + j] = b, k[2 * PITCH + j] = c, k[3 * PITCH + j] = d; }
  static void value2(float* v, i64 half_rows, i64 c, float a, float b) { v[c] = a, v[half_rows + c] = b; }
  static void weight2(float* p, int half, int j, float a, float b) { p[j] = a, p[half + j] = b; }
  // 2^x for x from LOWEST up. Error 8e-8.
  static constexpr float ZERO = 0, LOWEST = -126;
  static float power(float x) {
    const float t = x + 12582912.f, f = x - (t - 12582912.f);  // t holds round(x) in its low bits
    const float y = ((((0.00132765f * f + 0.00967554f) * f + 0.05550713f) * f + 0.2402212f) * f + 0.69314697f) * f + 1.00000007f;
    return as_float(as_bits(y) + (as_bits(t) << 23));
  }
  static void product(i64 m, i64 n, i64 k, i64 lda, i64 ldb, i64 ldc, bool add, const float* a, const float* b, float* c) {
    blas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
  }
};

// The four values that codes of 2 bits stand for, per group and token, as pairs: [G][4][PITCH]. Values are made from the
// codes by selecting among them, two in a word: it takes half as long as to compute and round each anew.
void tabulate(i64 groups, int n, const float* step, const float* zero, int distance, u32* __restrict table) {
  for (i64 g = 0; g < groups; g++, step += PITCH, zero += PITCH)
    for (int code = 0; code < 4; code++, table += PITCH) {
      const float factor = 1 + code / 4.f;
      #pragma omp simd
      for (int j = 0; j < n; j++) table[j] = pair(zero[j] + factor * step[j], zero[j + distance] + factor * step[j + distance]);
    }
}

// Bytes to words. Compilers take elements one by one here, and two instructions for one below.
inline Words widen(const u8* x) {
#ifdef __AVX512F__
  return (Words)_mm512_cvtepu8_epi32(load_vector<__m128i>(x));
#else
  return __builtin_convertvector(load_vector<Piece>(x), Words);
#endif
}

// In each half of a word: `yes` where x has the bit, else `no`.
inline Words where(Words x, u32 bit, Words yes, Words no) {
  bit |= bit << 16;
#ifdef __AVX512BW__
  return (Words)_mm512_mask_blend_epi16(_mm512_test_epi16_mask((__m512i)x, _mm512_set1_epi32(bit)), (__m512i)no, (__m512i)yes);
#else
  return (Words)((HalfWords)(x & bit) != 0 ? (HalfWords)yes : (HalfWords)no);
#endif
}

// Of four pairs the one that the bits at `at` and `at + 1` of each half of x choose.
inline Words select(Words x, int at, Words c0, Words c1, Words c2, Words c3) {
  return where(x, 2 << at, where(x, 1 << at, c3, c2), where(x, 1 << at, c1, c0));
}

// Words of n tokens (or of up to 15 more) to keys. Groups are multiples of 4 channels.
void select_keys(const u32* words, i64 dim, i64 group, int n, const u32* table, u32* __restrict out) {
  for (int q = 0, in_group = 0, word = 0, at = 0; q < dim / 4; q++, out += 2 * PITCH) {
    const u32* x = words + word * PITCH;
    for (int j = 0; j < n; j += LANES) {
      auto from = [&](int code) { return load_vector<Words>(table + code * PITCH + j); };
      const Words c0 = from(0), c1 = from(1), c2 = from(2), c3 = from(3), codes = load_vector<Words>(x + j);
      store_vector(out + j, select(codes, at, c0, c1, c2, c3));
      store_vector(out + PITCH + j, select(codes, at + 8, c0, c1, c2, c3));
    }
    if (++word == dim / 16) word = 0, at += 2;
    if (++in_group == group / 4) in_group = 0, table += 4 * PITCH;
  }
}

// Tokens j and j + half_n to words of values, [half_n][pitch]. Planes and groups are multiples of 16 channels.
void select_values(const u8* x, i64 stride, i64 dim, i64 group, i64 pitch, int n, int half_n, const u32* table, const u8* nothing, u32* __restrict out) {
  const i64 plane = dim / 4;
  i64 tables[MOST_CHANNELS / LANES];  // divisions would cost more than all the rest
  for (i64 c = 0; c < dim; c += LANES) tables[c / LANES] = c / group * 4 * PITCH;
  for (int j = 0; j < half_n; j++, out += pitch, table++) {
    const u8 *first = j < n ? x + j * stride : nothing, *second = j + half_n < n ? x + (j + half_n) * stride : nothing;
    for (i64 b = 0; b < plane; b += LANES) {
      const Words codes = widen(first + b) | widen(second + b) << 16;
      #pragma GCC unroll 4
      for (int p = 0; p < 4; p++) {
        const i64 channel = p * plane + b;
        const u32* t = table + tables[channel / LANES];
        store_vector(out + channel, select(codes, 2 * p, Words{} + t[0], Words{} + t[PITCH], Words{} + t[2 * PITCH], Words{} + t[3 * PITCH]));
      }
    }
  }
}

template <class Op, int BITS>
void expand_keys(const u32* __restrict words, i64 dim, i64 group, int n, const float* step, const float* zero, typename Op::word* out) {
  Quads<BITS> quads(words, dim);
  for (int q = 0; q < dim / 4; q++, quads.next()) {
    const Quads<BITS> x = quads;
    const float *s0 = step + 4 * q / group * PITCH, *z0 = zero + 4 * q / group * PITCH;
    typename Op::word* o = out + 4 / Op::STACK * q * PITCH;
    if (group % 4 == 0) {
      #pragma omp simd
      for (int j = 0; j < n; j++) {
        const u32 u = x(j);
        Op::key4(o, j, z0[j] + one_plus<BITS>(u, 0) * s0[j], z0[j] + one_plus<BITS>(u, 8) * s0[j],
                 z0[j] + one_plus<BITS>(u, 16) * s0[j], z0[j] + one_plus<BITS>(u, 24) * s0[j]);
      }
    } else {
      const i64 g1 = (4 * q + 1) / group * PITCH, g2 = (4 * q + 2) / group * PITCH, g3 = (4 * q + 3) / group * PITCH;
      #pragma omp simd
      for (int j = 0; j < n; j++) {
        const u32 u = x(j);
        Op::key4(o, j, z0[j] + one_plus<BITS>(u, 0) * s0[j], zero[g1 + j] + one_plus<BITS>(u, 8) * step[g1 + j],
                 zero[g2 + j] + one_plus<BITS>(u, 16) * step[g2 + j], zero[g3 + j] + one_plus<BITS>(u, 24) * step[g3 + j]);
      }
    }
  }
}

// Channels are taken in runs of SEGMENT that lie in one plane of each kind and in one group. Scales beyond n are zero.
template <class Op, int BITS, int SEGMENT>
void expand_values(const u8* x, i64 stride, i64 dim, i64 group, i64 pitch, int n, int half_n, const float* step, const float* zero,
                   const u8* nothing, u32* __restrict both, typename Op::word* __restrict out) {
  constexpr int P = BITS == 3 ? 2 : BITS;
  const i64 low = dim * P / 8, high = dim / 8, bytes = dim * BITS / 8;
  std::vector<i64> groups;  // divisions cost more than what is done with them
  for (i64 c = 0; c < dim; c += SEGMENT) groups.push_back(c / group * PITCH);
  constexpr int AHEAD = 8;  // rows: what has just been stored in other pieces than it is loaded in takes long to load
  for (int j = 0; j < half_n; j++) {
    if (j % AHEAD == 0)
      for (int r = 0; r < AHEAD; r++) {
        const u8 *x0 = j + r < n ? x + (j + r) * stride : nothing, *x1 = j + r + half_n < n ? x + (j + r + half_n) * stride : nothing;
        for (i64 b = 0; b < bytes; b += SEGMENT) {  // a constant length, here too: what is left over from vectors would cost more
          #pragma omp simd
          for (i64 i = 0; i < SEGMENT; i++) both[r * dim + b + i] = x0[b + i] | (u32)x1[b + i] << 16;
        }
      }
    const int k = j + half_n;
    const u32* row = both + j % AHEAD * dim;
    const i64* g = groups.data();
    typename Op::word* o = out + j * pitch;
    #pragma GCC unroll 4
    for (int plane = 0; plane < 8 / P; plane++)
      for (i64 c = 0; c < low; c += SEGMENT, g++, o += SEGMENT) {
        const float *sp = step + *g, *zp = zero + *g;
        const float s0 = sp[j], z0 = zp[j], s1 = sp[k], z1 = zp[k];
        const i64 channel = plane * low + c;
        const u32 *y = row + c, *y3 = row + low + channel % high;
        const int shift3 = channel / high;
        #pragma omp simd
        for (int i = 0; i < SEGMENT; i++) {
          if (BITS == 3) {
            const u32 u = (y[i] >> plane * P & 0x30003) | (y3[i] >> shift3 & 0x10001) << 2;
            Op::value2(o, half_n * pitch, i, z0 + one_plus<BITS>(u, 0) * s0, z1 + one_plus<BITS>(u, 16) * s1);
          } else {
            Op::value2(o, half_n * pitch, i, z0 + one_plus<BITS>(y[i], plane * P) * s0, z1 + one_plus<BITS>(y[i], plane * P + 16) * s1);
          }
        }
      }
  }
}

}  // namespace
