// Attention of few query rows, for which expanding keys and values would be all the work.
#pragma once
#include <vector>

#include "cpu_softmax.h"

namespace {

struct Block {  // keys of a span
  const Span* span;
  int n;
  i64 start, column, row;
};

struct Plan {
  std::vector<Block> blocks;
  i64 repeat, rows, tile, tiles, splits, units;
  bool few, many;
  float *partial_output, *partial_top, *partial_sum;  // [units][tile][Dv], [units][tile] twice, where keys are split
};

// With few rows a block is read once and unpacking is all the work. Codes stay integers, as bytes, and are multiplied as
// such: queries (and softmax weights times value steps) become 16-bit fixed point, split into a high and a low signed
// byte. It is exact but for that rounding, better than bf16 products.
//   score = Σ_g step_g · (Σ_c q c / 2^bits + Σ_c q) + zero_g · Σ_c q - correction
//   output_c = Σ_j (w_j step_j) c_j / 2^bits + Σ_j w_j (step_j + zero_j)
// Words of four codes, of four channels or of four tokens, are multiplied where they have just been unpacked, or, for
// more than DIRECT_ROWS rows, as the right operand of an s8 x s8 -> s32 product whose left one has two rows per query.
// Where the library has no such product, they are multiplied in place by DIRECT_ROWS rows at a time.

constexpr int DIRECT_ROWS = 4;

// sum + Σ_k code_k · weight_k in each lane, over its four bytes and those of `weights`, which are signed.
inline Ints add_dot(Ints sum, Words codes, i32 weights) {
#ifdef __AVX512VNNI__
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(weights));
#else
  for (int k = 0; k < 32; k += 8) sum += (Ints)(codes >> k & 255) * (i32)(i8)(weights >> k);
  return sum;
#endif
}

// Where there is no such instruction, but one that multiplies bytes of one operand, unsigned, with those of another, signed,
// and adds neighbours: sums of few words fit into the halves of theirs. Their multiples are added up from time to time.
#if !defined(__AVX512VNNI__) && (defined(__AVX2__) || defined(__AVX512BW__))
#define JKV_HALVES 1
typedef int16_t Halves __attribute__((vector_size(4 * LANES)));
inline Halves products_of_bytes(Words of_unsigned, Words of_signed) {
#ifdef __AVX512BW__
  return (Halves)_mm512_maddubs_epi16((__m512i)of_unsigned, (__m512i)of_signed);
#else
  return (Halves)_mm256_maddubs_epi16((__m256i)of_unsigned, (__m256i)of_signed);
#endif
}
inline Ints add_halves(Ints sum, Halves x, int factor) {
#ifdef __AVX512BW__
  return sum + (Ints)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(factor));
#else
  return sum + (Ints)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(factor));
#endif
}
// In a register: compilers would rather load it again for each product, which is then all that takes time.
inline Words loaded(const u32* from) {
  Words x = load_vector<Words>(from);
  asm("" : "+x"(x));
  return x;
}
// How many products of words of bytes, of which one kind is at most `a` and the other `b`, fit into halves of a sum.
constexpr i64 words_in_halves(i64 a, i64 b) { return 0x7fff / (2 * a * b); }
#endif

// Words of n tokens to codes of four channels in a word, [dim / 4][PITCH].
template <int BITS> void quads_of_channels(const u32* words, i64 dim, int n, u32* __restrict out) {
  Quads<BITS> quads(words, dim);
  for (int q = 0; q < dim / 4; q++, quads.next(), out += PITCH) {
    const Quads<BITS> x = quads;
    #pragma omp simd
    for (int j = 0; j < n; j++) out[j] = x(j) & ((1u << BITS) - 1) * 0x01010101u;
  }
}

// Words of the same byte of four tokens.
inline void interleave(const u8* x0, const u8* x1, const u8* x2, const u8* x3, i64 bytes, u32* __restrict words) {
  i64 b = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
  for (; b + 16 <= bytes; b += 16) {
    auto at = [&](const u8* x) { return _mm_loadu_si128((const __m128i*)(x + b)); };
    auto store = [&](int i, __m128i low, __m128i high) {
      _mm_storeu_si128((__m128i*)(words + b + i), _mm_unpacklo_epi16(low, high));
      _mm_storeu_si128((__m128i*)(words + b + i + 4), _mm_unpackhi_epi16(low, high));
    };
    store(0, _mm_unpacklo_epi8(at(x0), at(x1)), _mm_unpacklo_epi8(at(x2), at(x3)));
    store(8, _mm_unpackhi_epi8(at(x0), at(x1)), _mm_unpackhi_epi8(at(x2), at(x3)));
  }
#endif
  for (; b + 16 <= bytes; b += 16) {
    const auto rows01 = __builtin_shufflevector(load_vector<Pair>(x0 + b), load_vector<Pair>(x1 + b), 0, 1, 2, 3);
    const auto rows23 = __builtin_shufflevector(load_vector<Pair>(x2 + b), load_vector<Pair>(x3 + b), 0, 1, 2, 3);
    const Bytes x = (Bytes)__builtin_shufflevector(rows01, rows23, 0, 1, 2, 3, 4, 5, 6, 7);
    store_vector(words + b, __builtin_shufflevector(
        x, x, 0, 16, 32, 48, 1, 17, 33, 49, 2, 18, 34, 50, 3, 19, 35, 51, 4, 20, 36, 52, 5, 21, 37, 53, 6, 22, 38, 54, 7, 23, 39, 55,
        8, 24, 40, 56, 9, 25, 41, 57, 10, 26, 42, 58, 11, 27, 43, 59, 12, 28, 44, 60, 13, 29, 45, 61, 14, 30, 46, 62, 15, 31, 47, 63));
  }
  for (; b < bytes; b++) words[b] = x0[b] | x1[b] << 8 | x2[b] << 16 | (u32)x3[b] << 24;
}
// The same of a block, [quads][bytes]; tokens beyond n are `nothing`.
void words_of_bytes(const u8* x, i64 stride, i64 bytes, int n, int quads, const u8* nothing, u32* __restrict words) {
  for (int q = 0; q < n / 4; q++, words += bytes, x += 4 * stride) interleave(x, x + stride, x + 2 * stride, x + 3 * stride, bytes, words);
  for (int j = n / 4 * 4; j < 4 * quads; j += 4, words += bytes, x += 4 * stride) {
    auto row = [&](int k) { return j + k < n ? x + k * stride : nothing; };
    interleave(row(0), row(1), row(2), row(3), bytes, words);
  }
}

// The same to codes of four tokens in a word, [quads][dim].
template <int BITS> void quads_of_tokens(const u32* words, i64 dim, int quads, u32* __restrict out) {
  constexpr int P = BITS == 3 ? 2 : BITS;
  constexpr u32 M = ((1u << P) - 1) * 0x01010101u;
  const i64 bytes = dim * BITS / 8, low = dim * P / 8, high = dim / 8;
  for (int q = 0; q < quads; q++, out += dim, words += bytes) {
    for (int i = 0; i < 8 / P; i++) {
      #pragma omp simd
      for (i64 b = 0; b < low; b++) out[i * low + b] = words[b] >> (i * P) & M;
    }
    if (BITS == 3)
      for (int i = 0; i < 8; i++) {
        #pragma omp simd
        for (i64 b = 0; b < high; b++) out[i * high + b] |= (words[low + b] >> i & 0x01010101u) << 2;
      }
  }
}

struct FewScratch {
  Buffer<u8> nothing;
  Buffer<i8> query, weights;
  Buffer<u32> words, quads;
  Buffer<i32> scores, output;
  Buffer<float> unit, total, row;
};

struct FewRows {
  const AttentionCall& a;
  const Plan& plan;
  FewScratch& s;
  const int rows;
  const i64 dim = a.keys.dim, groups = a.keys.groups, dv = a.values.dim, value_groups = a.values.groups;
  const i64 output_pitch = dv + 16;
  const bool direct = (rows <= DIRECT_ROWS || a.in_place) && multiplied_in_place(a);

  // Per group two rows of the integer product for each query, high and low bytes, zero outside of the group.
  void set_queries(i64 batch, i64 head) {
    const i64 products = 2 * rows * groups;
    i8* out = s.query.get(products * dim);
    float *unit = s.unit.get(rows), *total = s.total.get(rows * groups);
    s.scores.get(products * PITCH), s.output.get(2 * rows * value_groups * dv), s.weights.get(2 * rows * value_groups * PITCH);
    s.words.get(max(dim, dv) / 4 * PITCH), s.quads.get(max(dim, dv) / 4 * PITCH), s.nothing.get(dv);
    memset(out, 0, products * dim);
    const i64 size = dim / groups;
    float* x = s.row.get(dim);
    by_dtype(a.dtype, [&](auto dtype) {
      for (int r = 0; r < rows; r++) {
        const char* q = query_row(batch, head, r);
        float largest = 0, nothing = 0;  // NaN, where a channel is not finite
        #pragma omp simd reduction(max : largest) reduction(+ : nothing)
        for (i64 c = 0; c < dim; c++) {
          const float y = get<dtype>(q, c), size = std::fabs(y);
          x[c] = y, nothing += y * 0, largest = size > largest ? size : largest;
        }
        const bool finite = nothing == 0;
        if (!finite) std::fill(x, x + dim, 0.f);
        unit[r] = finite ? largest / MOST : NAN;
        const float inverse = finite && largest > 0 ? MOST / largest : 0;
        for (i64 g = 0; g < groups; g++) {
          i8* row = out + (g * rows + r) * 2 * dim;
          float sum = 0;
          #pragma omp simd reduction(+ : sum)
          for (i64 c = g * size; c < (g + 1) * size; c++) {
            split(nearest(x[c] * inverse), row[c], row[dim + c]);
            sum += x[c];
          }
          total[r * groups + g] = sum;
        }
        unit[r] /= 1 << a.keys.bits;
      }
    });
  }

  static bool multiplied_in_place(const AttentionCall& a) { return whole_vectors(a.keys, 4) && whole_vectors(a.values, LANES); }
  // Whether codes lie in planes of one kind, and channels of a plane, and of a group, are a multiple of `count`.
  static bool whole_vectors(const Packed& cache, i64 count) {
    return cache.bits != 3 && cache.dim * cache.bits / 8 % count == 0 && cache.dim / cache.groups % count == 0;
  }

  // x = 256 high + low, for |x| up to MOST.
  static constexpr float MOST = 127 * 256 + 127;
  static void split(i32 x, i8& high, i8& low) { high = (x + 128) >> 8, low = x; }
  // The nearest integer, of a number below 2^22: `lrintf` in a form that compilers have vectors for.
  static i32 nearest(float x) {
    constexpr float places = 3 << 22;  // adding this leaves a float no places but those of integers
    return __builtin_bit_cast(i32, x + places) - __builtin_bit_cast(i32, places);
  }

  // Scores of a cached block, corrected, in units of log2: [rows][PITCH].
  void score(const u8* codes, int n, int padded, const float* step, const float* zero, const float* square, const float* norm, float* scores) {
    transpose_words(codes, a.keys.codes_s, dim * a.keys.bits / 32, n, s.words.data);
    if (direct) {
      by_rows([&](auto count, int first) { dot_keys<count>(first, padded); });
    } else {
      by_bits(a.keys.bits, [&](auto bits) { quads_of_channels<bits>(s.words.data, dim, n, s.quads.data); });
      blas::brgemm(2 * rows * groups, padded, dim, dim, PITCH, PITCH, false, s.query.data, (const signed char*)s.quads.data, s.scores.data, true);
    }
    for (int r = 0; r < rows; r++) {
      float* x = scores + r * PITCH;
      for (i64 g = 0; g < groups; g++) {
        const i32 *high = s.scores.data + (g * rows + r) * 2 * PITCH, *low = high + PITCH;
        const float *st = step + g * PITCH, *ze = zero + g * PITCH, *sq = square + g * PITCH;
        const float unit = s.unit.data[r], total = s.total.data[r * groups + g], c = a.correction && !a.clamped ? norm[r * groups + g] : 0;
        auto term = [&](int j) { return st[j] * (unit * ((high[j] << 8) + low[j]) + total) + ze[j] * total - c * sq[j]; };
        if (g == 0) {
          #pragma omp simd
          for (int j = 0; j < padded; j++) x[j] = term(j);
        } else {
          #pragma omp simd
          for (int j = 0; j < padded; j++) x[j] += term(j);
        }
      }
    }
  }
  // The products of ROWS queries from `row` on with a block of keys. Codes of plane p are multiplied where they are, as 2^(bits p) times
  // as much: from the last plane of a group to the first, sums are shifted instead.
  template <int ROWS> void dot_keys(int row, int padded) {
    constexpr int COUNT = VECTORS<ROWS>;  // of keys at a time
    const int bits = a.keys.bits;
    const i64 size = dim / groups / 4, plane = dim * bits / 32;  // in words
    for (i64 g = 0; g < groups; g++) {
      const i8* query = s.query.data + (g * rows + row) * 2 * dim;
      const i64 start = g * size, stop = start + size, first = start / plane, last = (stop - 1) / plane;
      for (int j = 0; j < padded; j += COUNT * LANES) {
        Ints sum[COUNT][2 * ROWS] = {};
#if JKV_HALVES
        const i64 most = words_in_halves((1 << bits) - 1, 128);
        Halves part[COUNT][2 * ROWS] = {};
        auto flush = [&] {
          #pragma GCC unroll 4
          for (int v = 0; v < COUNT; v++)
            #pragma GCC unroll 8
            for (int r = 0; r < 2 * ROWS; r++) sum[v][r] = add_halves(sum[v][r], part[v][r], 1), part[v][r] = Halves{};
        };
        for (i64 q = start, held = 0; q < stop;) {
          const i64 p = q / plane, end = min(min(stop, (p + 1) * plane), q + most);
          if (held + end - q > most) flush(), held = 0;
          held += end - q;
          const u32 mask = ((1u << bits) - 1) * 0x01010101u;
          const u32* words = s.words.data + j - p * plane * PITCH;
          for (; q < end; q++)
            #pragma GCC unroll 4
            for (int v = 0; v < COUNT; v++) {
              const Words x = load_vector<Words>(words + q * PITCH + v * LANES) >> (int)(bits * p) & mask;
              #pragma GCC unroll 8
              for (int r = 0; r < 2 * ROWS; r++) part[v][r] += products_of_bytes(x, Words{} + load_vector<u32>(query + r * dim + 4 * q));
            }
        }
        flush();
#else
        for (i64 p = last; p >= first; p--) {
          const u32 mask = ((1u << bits) - 1) * 0x01010101u << bits * p;
          const u32* words = s.words.data + j - p * plane * PITCH;
          for (i64 q = max(start, p * plane); q < min(stop, (p + 1) * plane); q++)
            #pragma GCC unroll 4
            for (int v = 0; v < COUNT; v++) {
              const Words x = load_vector<Words>(words + q * PITCH + v * LANES) & mask;
              #pragma GCC unroll 8
              for (int r = 0; r < 2 * ROWS; r++) sum[v][r] = add_dot(sum[v][r], x, load_vector<i32>(query + r * dim + 4 * q));
            }
          #pragma GCC unroll 4
          for (int v = 0; v < COUNT; v++)
            #pragma GCC unroll 8
            for (int r = 0; r < 2 * ROWS; r++) sum[v][r] >>= p > first ? bits : bits * first;
        }
#endif
        #pragma GCC unroll 4
        for (int v = 0; v < COUNT; v++)
          #pragma GCC unroll 8
          for (int r = 0; r < 2 * ROWS; r++) store_vector(s.scores.data + ((g * rows + row) * 2 + r) * PITCH + j + v * LANES, sum[v][r]);
      }
    }
  }
  // Vectors that ROWS rows are multiplied with at a time: as many sums as hide the latency, and as there are registers for.
  template <int ROWS> static constexpr int VECTORS = LANES == 16 ? (ROWS > 2 ? 2 : 4) : ROWS > 2 ? 1 : 4 / ROWS;
  template <class F> void by_rows(F f) const {
    for (int row = 0; row < rows; row += DIRECT_ROWS) {
      switch (rows - row) {
        case 1: f(std::integral_constant<int, 1>(), row); break;
        case 2: f(std::integral_constant<int, 2>(), row); break;
        case 3: f(std::integral_constant<int, 3>(), row); break;
        default: f(std::integral_constant<int, DIRECT_ROWS>(), row);
      }
    }
  }

  // Replaces scores by weights 2^(factor x - top) in place and returns their sum.
  static float exponentiate(float* x, float factor, float top, int n) {
    volatile float opaque = -120;  // see cpu_softmax.h
    const float lowest = opaque;
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; j++) {
      const float y = x[j] * factor - top;
      x[j] = Float32::power(y < lowest ? lowest : y);
      sum += x[j];
    }
    return sum;
  }

  // The same for a handful of full-precision keys and values.
  void score_plainly(i64 batch, i64 head, const Block& block, float* scores) {
    const Plain& key = block.span->key;
    by_dtype(a.dtype, [&](auto dtype) {
      const char* k = key.data + (batch * key.b + head * key.h + block.start * key.s) * width_of(dtype);
      for (int r = 0; r < rows; r++) {
        const char* q = query_row(batch, head, r);
        for (int j = 0; j < block.n; j += 4) {  // whose sums do not wait for one another
          const i64 last = block.n - 1, i0 = j * key.s, i1 = min<i64>(j + 1, last) * key.s, i2 = min<i64>(j + 2, last) * key.s, i3 = min<i64>(j + 3, last) * key.s;
          float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
          #pragma omp simd reduction(+ : s0, s1, s2, s3)
          for (i64 c = 0; c < dim; c++) {
            const float x = get<dtype>(q, c);
            s0 += x * get<dtype>(k, i0 + c), s1 += x * get<dtype>(k, i1 + c), s2 += x * get<dtype>(k, i2 + c), s3 += x * get<dtype>(k, i3 + c);
          }
          float* to = scores + r * PITCH + j;  // rows have room for more
          to[0] = s0, to[1] = s1, to[2] = s2, to[3] = s3;
        }
      }
    });
  }
  void add_values_plainly(i64 batch, i64 head, const Block& block, const float* weights, float* output) {
    const Plain& value = block.span->value;
    by_dtype(a.dtype, [&](auto dtype) {
      const char* v = value.data + (batch * value.b + head * value.h + block.start * value.s) * width_of(dtype);
      for (int r = 0; r < rows; r++)
        for (int j = 0; j < block.n; j++) {
          const float w = weights[r * PITCH + j];
          #pragma omp simd
          for (i64 c = 0; c < dv; c++) output[r * output_pitch + c] += w * get<dtype>(v, j * value.s + c);
        }
    });
  }
  const char* query_row(i64 batch, i64 head, int r) const {
    return a.query.data + (batch * a.query.b + (head * plan.repeat + r / a.length) * a.query.h + r % a.length * a.query.s) * width_of(a.dtype);
  }

  // output += weights · values of a cached block.
  void add_values(const u8* codes, int n, int padded, float* step, float* zero, const float* weights, float* output) {
    const i64 size = dv / value_groups;
    std::vector<float> unit(value_groups);
    for (i64 g = 0; g < value_groups; g++) {
      float *st = step + g * PITCH, *ze = zero + g * PITCH, largest = 0;
      std::fill(st + n, st + padded, 0.f), std::fill(ze + n, ze + padded, 0.f);
      #pragma omp simd reduction(max : largest)
      for (int j = 0; j < padded; j++) largest = st[j] > largest ? st[j] : largest;
      unit[g] = largest / MOST;
      const float inverse = largest > 0 ? MOST / largest : 0;
      for (int r = 0; r < rows; r++) {
        const float* w = weights + r * PITCH;
        float sum = 0;
        i8 *high = s.weights.data + (g * rows + r) * 2 * PITCH, *low = high + PITCH;
        #pragma omp simd reduction(+ : sum)
        for (int j = 0; j < padded; j++) {
          sum += w[j] * (st[j] + ze[j]);
          split((i32)(w[j] * (st[j] * inverse) + .5f), high[j], low[j]);
        }
        float* o = output + r * output_pitch + g * size;
        #pragma omp simd
        for (i64 c = 0; c < size; c++) o[c] += sum;
      }
    }
    words_of_bytes(codes, a.values.codes_s, dv * a.values.bits / 8, n, padded / 4, s.nothing.data, s.words.data);
    if (direct) {
      by_rows([&](auto count, int first) { dot_values<count>(first, padded / 4); });
    } else {
      by_bits(a.values.bits, [&](auto bits) { quads_of_tokens<bits>(s.words.data, dv, padded / 4, s.quads.data); });
      blas::brgemm(2 * rows * value_groups, dv, padded, PITCH, dv, dv, false, s.weights.data, (const signed char*)s.quads.data, s.output.data, true);
    }
    for (i64 g = 0; g < value_groups; g++)
      for (int r = 0; r < rows; r++) {
        const i32 *high = s.output.data + (g * rows + r) * 2 * dv + g * size, *low = high + dv;
        float* o = output + r * output_pitch + g * size;
        const float factor = unit[g] / (1 << a.values.bits);
        #pragma omp simd
        for (i64 c = 0; c < size; c++) o[c] += ((high[c] << 8) + low[c]) * factor;
      }
  }
  // The products of ROWS rows of weights from `row` on with a block of values, whose codes are multiplied where they are in bytes.
  template <int ROWS> void dot_values(int row, int quads) {
    constexpr int COUNT = VECTORS<ROWS>;  // of channels at a time
    const i64 size = dv / value_groups;
    for (i64 g = 0; g < value_groups; g++) {
      i64 c = g * size;
      for (; c + COUNT * LANES <= (g + 1) * size; c += COUNT * LANES) dot_channels<ROWS, COUNT>(row, g, c, quads);
      for (; c < (g + 1) * size; c += LANES) dot_channels<ROWS, 1>(row, g, c, quads);
    }
  }
  template <int ROWS, int COUNT> void dot_channels(int row, i64 g, i64 c, int quads) {
    const int bits = a.values.bits;
    const i64 plane = dv * bits / 8;
    const i8* weights = s.weights.data + (g * rows + row) * 2 * PITCH;
    const u32* words[COUNT];
    Ints sum[COUNT][2 * ROWS] = {};
#if JKV_HALVES
    const i64 most = words_in_halves((1 << bits) - 1, 128);
    const u32 mask = ((1u << bits) - 1) * 0x01010101u;
    int shift[COUNT];
    #pragma GCC unroll 4
    for (int v = 0; v < COUNT; v++) {
      const i64 channel = c + v * LANES;
      words[v] = s.words.data + channel % plane, shift[v] = bits * (channel / plane);
    }
    for (i64 q = 0; q < quads;) {
      Halves part[COUNT][2 * ROWS] = {};
      for (const i64 end = min<i64>(quads, q + most); q < end; q++)
        #pragma GCC unroll 4
        for (int v = 0; v < COUNT; v++) {
          const Words x = load_vector<Words>(words[v] + q * plane) >> shift[v] & mask;
          #pragma GCC unroll 8
          for (int r = 0; r < 2 * ROWS; r++) part[v][r] += products_of_bytes(x, Words{} + load_vector<u32>(weights + r * PITCH + 4 * q));
        }
      #pragma GCC unroll 4
      for (int v = 0; v < COUNT; v++)
        #pragma GCC unroll 8
        for (int r = 0; r < 2 * ROWS; r++) sum[v][r] = add_halves(sum[v][r], part[v][r], 1);
    }
    #pragma GCC unroll 4
    for (int v = 0; v < COUNT; v++)
      #pragma GCC unroll 8
      for (int r = 0; r < 2 * ROWS; r++) store_vector(s.output.data + ((g * rows + row) * 2 + r) * dv + c + v * LANES, sum[v][r]);
#else
    u32 mask[COUNT];
    #pragma GCC unroll 4
    for (int v = 0; v < COUNT; v++) {
      const i64 channel = c + v * LANES;
      words[v] = s.words.data + channel % plane, mask[v] = ((1u << bits) - 1) * 0x01010101u << bits * (channel / plane);
    }
    for (i64 q = 0; q < quads; q++)
      #pragma GCC unroll 4
      for (int v = 0; v < COUNT; v++) {
        const Words x = load_vector<Words>(words[v] + q * plane) & mask[v];
        #pragma GCC unroll 8
        for (int r = 0; r < 2 * ROWS; r++) sum[v][r] = add_dot(sum[v][r], x, load_vector<i32>(weights + r * PITCH + 4 * q));
      }
    #pragma GCC unroll 4
    for (int v = 0; v < COUNT; v++)
      #pragma GCC unroll 8
      for (int r = 0; r < 2 * ROWS; r++)
        store_vector(s.output.data + ((g * rows + row) * 2 + r) * dv + c + v * LANES, sum[v][r] >> bits * int((c + v * LANES) / plane));
#endif
  }
};

}  // namespace
