// Attention of any number of query rows in products of bytes, for processors that have those and no bf16 ones.
#pragma once
#include "cpu_few_rows.h"

namespace {

// As with few rows, codes stay integers, queries (and softmax weights times value steps) become fixed point, and their
// bytes are multiplied; but codes are put into bytes once per block, and low bytes need no sums of their own. Codes are
// small: an operand that holds codes shifted by SHIFT meets high bytes, one that holds them as they are meets the rest.
//   q = 2^SHIFT high + low
// At 2 bits the rest of two channels a and b of a query is even one byte, as that operand can hold c_a + 8 c_b: its low
// three bits complete b, the next three a. That is 11 bits for one product and a half, precise enough for queries, whose
// numbers are of one kind. Beside a large softmax weight many small ones may count, and have two products and 14 bits.
template <int BITS> struct Digits {
  static constexpr bool PAIRS = BITS == 2;  // of channels
  static constexpr int SHIFT = 8 - BITS;    // codes then fill a byte
#if JKV_HALVES
  static constexpr int SHIFTED = 0;         // codes are small, and sums of high bytes are shifted instead
#else
  static constexpr int SHIFTED = SHIFT;     // codes that meet high bytes
#endif
  static constexpr i32 PLACES = PAIRS ? 8 : 1 << SHIFT;  // of queries, above those of high bytes
  static constexpr i32 UNIT = (1 << SHIFT) / PLACES;     // what a query's last place is in sums
  static constexpr float QUERY = PAIRS ? 123 * 8 : 127 * PLACES + PLACES / 2 - 1, WEIGHT = 255 << SHIFT;  // the greatest, about
};
constexpr u32 EACH = 0x01010101u;  // byte of a word

// As add_dot, with signed codes and unsigned weights.
inline Ints add_dot_signed(Ints sum, Words codes, i32 weights) {
#ifdef __AVX512VNNI__
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(weights), (__m512i)codes);
#else
  for (int k = 0; k < 32; k += 8) sum += ((Ints)codes << (24 - k) >> 24) * (i32)(u8)(weights >> k);
  return sum;
#endif
}

// store(vector, sums of rows) of ROWS rows of words of bytes times [words] rows of VECTORS vectors of words. 16 sums hide the
// latency of a product, and 4 vectors to a row take no more loads than there is time for. All stays in registers as long
// as one address is enough for all rows: words of the left operand are ROW and WORD apart.
constexpr int TILE_ROWS = 4, TILE_VECTORS = LANES == 16 ? 4 : 2;
template <bool SIGNED_CODES, int BITS, int ROWS, int VECTORS, int ROW, int WORD, class Store>
inline __attribute__((always_inline)) void multiply(const i32* left, const u32* right, i64 right_pitch, i64 high_words, i64 low_words, Store store) {
  Ints sum[VECTORS][ROWS] = {};
#if JKV_HALVES
  auto add = [&](i64 words, i64 at_a_time, int factor) __attribute__((always_inline)) {
    for (i64 w = 0; w < words;) {
      Halves part[VECTORS][ROWS] = {};
      for (const i64 end = min(words, w + at_a_time); w < end; w++, right += right_pitch, left += WORD) {
        Words x[VECTORS];
        #pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) x[v] = loaded(right + v * LANES);
        #pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          const Words y = Words{} + (u32)left[r * ROW];
          #pragma GCC unroll 4
          for (int v = 0; v < VECTORS; v++) part[v][r] += SIGNED_CODES ? products_of_bytes(y, x[v]) : products_of_bytes(x[v], y);
        }
      }
      #pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++)
        #pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) sum[v][r] = add_halves(sum[v][r], part[v][r], factor);
    }
  };
  // Weights meet signed codes, queries unsigned ones or, in what is left of pairs of them, up to nine times as large ones.
  constexpr i64 CODE = SIGNED_CODES ? 1 << (BITS - 1) : (1 << BITS) - 1, MOST = SIGNED_CODES ? 255 : 127;
  constexpr i64 LOW_MOST = SIGNED_CODES ? 255 : Digits<BITS>::PAIRS ? 9 * 32 : Digits<BITS>::PLACES;
  const u32* first = right;
  add(high_words, words_in_halves(CODE, MOST), 1 << Digits<BITS>::SHIFT);
  if (SIGNED_CODES) right = first;  // one operand for both
  add(low_words, words_in_halves(CODE, LOW_MOST), 1);
#else
  for (i64 w = 0; w < high_words + low_words; w++, right += right_pitch, left += WORD) {
    Words x[VECTORS];
    #pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) x[v] = load_vector<Words>(right + v * LANES);
    #pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const i32 y = left[r * ROW];
      #pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sum[v][r] = SIGNED_CODES ? add_dot_signed(sum[v][r], x[v], y) : add_dot(sum[v][r], x[v], y);
    }
  }
#endif
  #pragma GCC unroll 4
  for (int v = 0; v < VECTORS; v++) store(v, sum[v]);
}

struct ManyScratch {
  Buffer<u8> nothing;
  Buffer<i32> query, weights;
  Buffer<u32> words, quads, keys, values;
  Buffer<float> of_query, value_scale, value_middle, value_sum, factor, peak;
};

struct ManyRows {
  const AttentionCall& a;
  const Plan& plan;
  ManyScratch& s;
  const i64 rows;  // of all queries, a multiple of TILE_ROWS
  const i64 dim = a.keys.dim, groups = a.keys.groups, dv = a.values.dim, value_groups = a.values.groups;
  const i64 value_pitch = dv + 16;
  const i64 query_words = a.keys.bits == 2 ? dim / groups * 3 / 8 : dim / groups / 2;  // of a group
  // Words of queries are [groups][rows / TILE_ROWS][query_words][TILE_ROWS], of weights [groups][BLOCK_ROWS][WEIGHT_WORDS].
  static constexpr int WEIGHT_WORDS = KEYS / 2 + 16;
  i32* query(i64 group, i64 row) const { return s.query.data + (group * rows + row) * query_words; }
  i32* weights(i64 group, i64 row) const { return s.weights.data + (group * BLOCK_ROWS + row) * WEIGHT_WORDS; }
  static constexpr int BLOCK_ROWS = 64;

  // Caches whose groups divide into whole operands.
  static bool takes(const AttentionCall& a) {
    auto fits = [](const Packed& c, i64 channels) { return c.bits < 8 && c.groups <= 8 && c.dim / c.groups % channels == 0; };
    return fits(a.keys, 8) && fits(a.values, LANES) && a.keys.dim >= 64;
  }

  void set_queries(i64 batch, i64 head, i64 row0, i64 used, const float* norm) {
    s.query.get(groups * rows * query_words);
    float* of_query = s.of_query.get(groups * rows * 4);
    s.weights.get(value_groups * BLOCK_ROWS * WEIGHT_WORDS), s.value_sum.get(BLOCK_ROWS * value_groups), s.factor.get(BLOCK_ROWS * value_groups);
    s.words.get(max(dim, dv) / 4 * PITCH), s.quads.get(max(dim, dv) / 4 * PITCH), s.nothing.get(dv);
    s.keys.get(dim / 2 * PITCH), s.values.get(KEYS / 2 * value_pitch);
    s.peak.get(PITCH), s.value_scale.get(value_groups * PITCH), s.value_middle.get(value_groups * PITCH);
    memset(s.query.data, 0, groups * rows * query_words * sizeof(i32));
    by_bits(a.keys.bits, [&](auto bits) {
      typedef Digits<bits> D;
      const i64 size = dim / groups;
      float x[MOST_CHANNELS];
      i32 words[MOST_CHANNELS / 2];
      for (i64 r = 0; r < used; r++) {
        const i64 h = head * plan.repeat + (row0 + r) / a.length, i = (row0 + r) % a.length;
        const char* q = a.query.data + (batch * a.query.b + h * a.query.h + i * a.query.s) * width_of(a.dtype);
        by_dtype(a.dtype, [&](auto dtype) {
          #pragma omp simd
          for (i64 c = 0; c < dim; c++) x[c] = get<dtype>(q, c);
        });
        for (i64 g = 0; g < groups; g++) {
          const float* from = x + g * size;
          float largest = 0, total = 0;
          u32 highest = 0;
          #pragma omp simd reduction(max : highest) reduction(+ : total)
          for (i64 c = 0; c < size; c++) highest = max(highest, as_bits(from[c]) & 0x7fffffff), total += from[c];
          largest = as_float(highest);
          const bool finite = highest < 0x7f800000;
          const i64 sum = round_queries<D>(from, size, finite && largest > 0 ? D::QUERY / largest : 0, (i8*)words);
          for (i64 w = 0; w < query_words; w++) query(g, r / TILE_ROWS * TILE_ROWS)[w * TILE_ROWS + r % TILE_ROWS] = words[w];
          float* of = of_query + (g * rows + r) * 4;
          // What rounding left over meets, on average, the middle code.
          const float unit = finite ? largest / D::QUERY : NAN, middle = ((1 << bits) - 1) / 2.f / (1 << bits);
          of[0] = unit / (D::UNIT << bits), of[1] = total + (total - unit / D::UNIT * sum) * middle, of[2] = total;
          of[3] = a.correction && !a.clamped ? norm[r * groups + g] : 0;
        }
      }
    });
  }
  static constexpr float MAGIC = 12582912;  // adding it leaves an integer in the low bits of a float
  static i32 rounded(float x) { return as_bits(x + MAGIC) - as_bits(MAGIC); }

  // Writes bytes of fixed point numbers, signed, high ones before low ones, and returns the numbers' sum, in units of sums
  // of products.
  template <class D> static i64 round_queries(const float* x, i64 size, float inverse, i8* __restrict out) {
    i32 sum = 0;
    if constexpr (D::PAIRS) {
      const i64 half = size / 2;
      #pragma omp simd reduction(+ : sum)
      for (i64 c = 0; c < half; c++) {
        const i32 b = rounded(x[c + half] * inverse), low = b & 7;
        const i32 rest = (rounded(x[c] * inverse * 8) - low + 4) >> 3;  // of a, in its last places
        const i32 next = ((rest + 4) & 7) - 4;
        out[c] = (rest - next) >> 3, out[c + half] = ((b - low) >> 3) - next, out[c + size] = low + 8 * next;
        sum += 8 * rest + low + 8 * b;
      }
    } else {
      #pragma omp simd reduction(+ : sum)
      for (i64 c = 0; c < size; c++) {
        const i32 a = rounded(x[c] * inverse), high = (a + D::PLACES / 2) >> D::SHIFT;
        out[c] = high, out[c + size] = a - high * D::PLACES;
        sum += a;
      }
    }
    return sum;
  }

  // A cached block's operands. Beyond n tokens value steps are zero, and scores are without meaning.
  void load(const u8* key_codes, const u8* value_codes, int n, int padded, float* step, float* zero) {
    transpose_words(key_codes, a.keys.codes_s, dim * a.keys.bits / 32, n, s.words.data);
    by_bits(a.keys.bits, [&](auto bits) {
      constexpr int FEW = 64;  // keys at a time, so that what is between stays in the first-level cache
      for (int j = 0; j < padded; j += FEW) {
        quads_of_channels<bits>(s.words.data + j, dim, FEW, s.quads.data);
        for (i64 g = 0; g < groups; g++)
          load_keys<Digits<bits>>(s.quads.data + g * dim / groups / 4 * PITCH, FEW, s.keys.data + g * query_words * PITCH + j);
      }
    });
    by_bits(a.values.bits, [&](auto bits) {
      load_values<bits>(value_codes, n, padded / 4);
      const float middle = 1 + ((1 << bits) - 1) / 2.f / (1 << bits);  // of the codes, half a code below the signed ones' zero
      std::fill(s.peak.data, s.peak.data + padded, 1 / 16.f);
      for (i64 g = 0; g < value_groups; g++) {
        float *st = step + g * PITCH, *ze = zero + g * PITCH, *scale = s.value_scale.data + g * PITCH, *mid = s.value_middle.data + g * PITCH;
        std::fill(st + n, st + padded, 0.f), std::fill(ze + n, ze + padded, 0.f);
        float largest = 0;
        #pragma omp simd reduction(max : largest)
        for (int j = 0; j < padded; j++) largest = st[j] > largest ? st[j] : largest;
        typedef Digits<bits> D;
        const float inverse = largest > 0 ? D::WEIGHT / largest : 0;
        s.factor.data[g] = largest / D::WEIGHT / (1 << bits);
        float* peak = s.peak.data;
        #pragma omp simd
        for (int j = 0; j < padded; j++) {
          scale[j] = st[j] * inverse, mid[j] = st[j] * middle + ze[j];
          const float share = scale[j] * (1 / D::WEIGHT);
          peak[j] = share > peak[j] ? share : peak[j];
        }
      }
      float* peak = s.peak.data;
      #pragma omp simd
      for (int j = 0; j < padded; j++) {  // to its logarithm, or up to 0.016 above
        const u32 u = as_bits(peak[j]);
        const float m = as_float((u & 0x7fffff) | 0x3f800000) - 1;
        peak[j] = (i32)(u >> 23) - 127 + m * (1.34f - 0.34f * m) + 0.009f;
      }
    });
  }
  template <class D> void load_keys(const u32* codes, int n, u32* __restrict out) const {
    const i64 quads = dim / groups / 4;
    for (i64 q = 0; q < quads; q++) {
      #pragma omp simd
      for (int j = 0; j < n; j++) out[q * PITCH + j] = codes[q * PITCH + j] << D::SHIFTED;
    }
    out += quads * PITCH;
    for (i64 q = 0; q < (D::PAIRS ? quads / 2 : quads); q++) {
      const u32 *a = codes + q * PITCH, *b = codes + (q + quads / 2) * PITCH;
      #pragma omp simd
      for (int j = 0; j < n; j++) out[q * PITCH + j] = D::PAIRS ? a[j] | b[j] << 3 : a[j];
    }
  }
  // Words of tokens i + k quarters of the block, for each i. Signed codes, c - 2^(bits - 1), whose sums stay small: first
  // the operands of high bytes, then those of low ones.
  template <int BITS> void load_values(const u8* x, int n, int quarter) {
    constexpr u32 SIGN = 0x80 * EACH, ZERO = (1 << (BITS - 1)) * EACH;
    const i64 stride = a.values.codes_s;
    const u32* codes = s.quads.data;
    u32 *__restrict high = s.values.data, *__restrict low = high + quarter * value_pitch;
    for (int i = 0; i < quarter; i++, high += value_pitch, low += value_pitch) {
      auto row = [&](int k) { return i + k * quarter < n ? x + (i + k * quarter) * stride : s.nothing.data; };
      interleave(row(0), row(1), row(2), row(3), dv * BITS / 8, s.words.data);
      quads_of_tokens<BITS>(s.words.data, dv, 1, s.quads.data);
      #pragma omp simd
      for (i64 c = 0; c < dv; c++) {
        if (Digits<BITS>::SHIFTED) high[c] = codes[c] << Digits<BITS>::SHIFT ^ SIGN;
        (Digits<BITS>::SHIFTED ? low : high)[c] = (codes[c] + (SIGN - ZERO)) ^ SIGN;
      }
    }
  }

  // Scores of queries m0 … m0 + m, corrected, in units of log2: [m][PITCH].
  void score(int m0, int m, int padded, const float* step, const float* zero, const float* square, float* scores) const {
    by_bits(a.keys.bits, [&](auto bits) { score<bits>(m0, m, padded, step, zero, square, scores); });
  }
  template <int BITS> void score(int m0, int m, int padded, const float* step, const float* zero, const float* square, float* scores) const {
    const i64 high_words = dim / groups / 4;
    for (int j = 0; j < padded; j += TILE_VECTORS * LANES)
      for (int r0 = 0; r0 < m; r0 += TILE_ROWS)
        for (i64 g = 0; g < groups; g++) {
          const float *of = s.of_query.data + (g * rows + m0 + r0) * 4, *st = step + g * PITCH + j, *ze = zero + g * PITCH + j, *sq = square + g * PITCH + j;
          float* to = scores + r0 * PITCH + j;
          const u32* keys = s.keys.data + g * query_words * PITCH + j;
          multiply<false, BITS, TILE_ROWS, TILE_VECTORS, 1, TILE_ROWS>(query(g, m0 + r0), keys, PITCH, high_words, query_words - high_words, [&](int v, const Ints* sums) {
            auto at = [&](const float* x) { return load_vector<Floats>(x + v * LANES); };
            const Floats steps = at(st), zeros = at(ze), squares = at(sq);
            #pragma GCC unroll 4
            for (int r = 0; r < TILE_ROWS; r++) {
              const float* q = of + 4 * r;
              const Floats x = steps * (__builtin_convertvector(sums[r], Floats) * q[0] + q[1]) + zeros * q[2] - squares * q[3];
              store_vector(to + r * PITCH + v * LANES, g ? at(to + r * PITCH) + x : x);
            }
          });
        }
  }

  // The origin of a row's exponents that has the greatest product with a value step, in any group, fill its integer; -inf
  // where no key is seen.
  float origin(const float* x, float factor, int padded) const {
    const float minus = -1;
    return highest_score<1>(x, &minus, s.peak.data, factor, padded);
  }

  // Row r of a block of scores to weights 2^(x - top), and to bytes of those times value steps. Returns the weights' sum.
  float weigh(int r, const float* x, float top, int padded) const {
    float sum = 0;
    by_bits(a.values.bits, [&](auto bits) { sum = weigh<bits>(r, x, top, padded / 4); });
    return sum;
  }
  template <int BITS> float weigh(int r, const float* x, float top, int quarter) const {
    Floats sum = {}, sums[8] = {};
    for (int i = 0; i < quarter; i += LANES) {
      Floats p[4];
      #pragma GCC unroll 4
      for (int k = 0; k < 4; k++) sum += p[k] = power(load_vector<Floats>(x + i + k * quarter) - top);
      for (i64 g = 0; g < value_groups; g++)
        round_weights<BITS>(p, s.value_scale.data + g * PITCH + i, s.value_middle.data + g * PITCH + i, quarter, sums[g], weights(g, r) + i);
    }
    for (i64 g = 0; g < value_groups; g++) s.value_sum.data[r * value_groups + g] = total(sums[g]) + .5f * s.factor.data[g] * sum_of_bytes<BITS>(weights(g, r), quarter);
    return total(sum);
  }
  void weigh_nothing(int r) const {
    for (i64 g = 0; g < value_groups; g++) {
      memset(weights(g, r), 0, WEIGHT_WORDS * sizeof(i32));
      s.value_sum.data[r * value_groups + g] = 0;
    }
  }
  // 2^x, for x from -120 up. Error 8e-5, NaN stays.
  static Floats power(Floats x) {
#ifdef __AVX512F__
    x = (Floats)_mm512_max_ps(_mm512_set1_ps(-120), (__m512)x);
#elif defined(__AVX2__)
  x = (Floats)_mm256_max_ps(_mm256_set1_ps(-120), (__m256)x);
#else
    x = x < -120 ? Floats{} - 120 : x;
#endif
    const Floats t = x + MAGIC, f = x - (t - MAGIC);  // as Float32::power
    return (Floats)((Words)(((0.05517166f * f + 0.24261114f) * f + 0.69326099f) * f + 0.99992807f) + ((Words)t << 23));
  }
  static float total(Floats x) {
    float each[LANES], sum = 0;
    store_vector(each, x);
    #pragma omp simd reduction(+ : sum)
    for (int i = 0; i < LANES; i++) sum += each[i];
    return sum;
  }

  // Weights of four vectors of tokens, a quarter of the block apart, times `scale` to words of bytes in the order of the
  // values' words; adds weights times `middle`. Integers are halves of words, two bytes in the end.
  template <int BITS> static void round_weights(const Floats* p, const float* scale, const float* middle, int quarter, Floats& sum, i32* out) {
    constexpr u16 SHIFT = Digits<BITS>::SHIFT, LOW = (1 << SHIFT) - 1;
    auto number = [&](int k) {
      sum += p[k] * load_vector<Floats>(middle + k * quarter);
      return (Words)(p[k] * load_vector<Floats>(scale + k * quarter) + MAGIC);
    };
    auto both = [&](int k) { return (HalfWords)((number(k) & 0xffff) | number(k + 2) << 16); };
    const HalfWords even = both(0), odd = both(1);
    store_vector(out, (even >> SHIFT) + (odd >> SHIFT << 8));
    store_vector(out + quarter, (even & LOW) | (odd & LOW) << 8);
  }
  // Of numbers in bytes: of what was rounded, so that its error meets codes as far as they are from the middle one.
  template <int BITS> static float sum_of_bytes(const i32* x, int quarter) {
    Ints sum = {};
#if JKV_HALVES
    auto add = [&](int i, int factor) { sum = add_halves(sum, products_of_bytes(load_vector<Words>(x + i), Words{} + EACH), factor); };
    for (int i = 0; i < quarter; i += LANES) add(i, 1 << Digits<BITS>::SHIFT), add(quarter + i, 1);
#else
    for (int i = 0; i < quarter; i += LANES) sum = add_dot(sum, load_vector<Words>(x + i), (1 << Digits<BITS>::SHIFT) * (i32)EACH);
    for (int i = quarter; i < 2 * quarter; i += LANES) sum = add_dot(sum, load_vector<Words>(x + i), (i32)EACH);
#endif
    return total(__builtin_convertvector(sum, Floats));
  }

  // output += weights · values; `part` is what a row's weights are to be multiplied by.
  void add_values(int m, int padded, const float* part, float* output) const {
    by_bits(a.values.bits, [&](auto bits) { add_values<bits>(m, padded, part, output); });
  }
  template <int BITS> void add_values(int m, int padded, const float* part, float* output) const {
    const i64 size = dv / value_groups, words = padded / 4;
    for (i64 g = 0; g < value_groups; g++) {
      i64 c = g * size;
      auto tile = [&](auto count, auto vectors) {
        for (int r0 = 0; r0 < m; r0 += count)
          multiply<true, BITS, count, vectors, WEIGHT_WORDS, 1>(weights(g, r0), s.values.data + c, value_pitch, words, words, [&](int v, const Ints* sums) {
            #pragma GCC unroll 8
            for (int r = 0; r < count; r++) {
              float* to = output + (r0 + r) * value_pitch + c + v * LANES;
              const float p = part[r0 + r], factor = p * s.factor.data[g], rest = p * s.value_sum.data[(r0 + r) * value_groups + g];
              store_vector(to, load_vector<Floats>(to) + (__builtin_convertvector(sums[r], Floats) * factor + rest));
            }
          });
        c += vectors * LANES;
      };
      while (c + TILE_VECTORS * LANES <= (g + 1) * size) tile(std::integral_constant<int, TILE_ROWS>(), std::integral_constant<int, TILE_VECTORS>());
      while (TILE_VECTORS > 2 && c + 2 * LANES <= (g + 1) * size) tile(std::integral_constant<int, 8>(), std::integral_constant<int, 2>());
      while (c < (g + 1) * size) tile(std::integral_constant<int, 8>(), std::integral_constant<int, 1>());
    }
  }
};

}  // namespace
