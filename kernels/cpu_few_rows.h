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
  bool few;
  float *partial_output, *partial_top, *partial_sum;  // [units][tile][Dv], [units][tile] twice, where keys are split
};

// With few rows a block is read once and unpacking is all the work. Codes stay integers, as bytes, and are multiplied as
// such: queries (and softmax weights times value steps) become 16-bit fixed point, split into a high and a low byte that
// are two rows of one u8 x s8 -> s32 product. It is exact but for that rounding, better than bf16 products.
//   score = Σ_g step_g · (Σ_c q c / 2^bits + Σ_c q) + zero_g · Σ_c q - correction
//   output_c = Σ_j (w_j step_j) c_j / 2^bits + Σ_j w_j (step_j + zero_j)

// Codes of four tokens (j, j + quarter, …) and one channel in a word, [quarter][dim]. LOW: bytes of the first plane, or 0.
template <int BITS, int LOW>
void quads_of_tokens(const u8* x, i64 stride, i64 dim, int n, int quarter, const u8* nothing, u32* __restrict words, u32* __restrict out) {
  constexpr int P = BITS == 3 ? 2 : BITS;
  constexpr u32 M = ((1u << P) - 1) * 0x01010101u;
  const i64 bytes = dim * BITS / 8, low = LOW ? LOW : dim * P / 8, high = dim / 8;
  auto gather = [](const u8* y0, const u8* y1, const u8* y2, const u8* y3, i64 count, u8* __restrict to) {
    #pragma omp simd
    for (i64 b = 0; b < count; b++) to[4 * b] = y0[b], to[4 * b + 1] = y1[b], to[4 * b + 2] = y2[b], to[4 * b + 3] = y3[b];
  };
  if (stride == bytes && n == 4 * quarter) {  // one long run
    gather(x, x + quarter * bytes, x + 2 * quarter * bytes, x + 3 * quarter * bytes, quarter * bytes, (u8*)words);
  } else {
    for (int j = 0; j < quarter; j++) {
      auto row = [&](int k) { return k < n ? x + k * stride : nothing; };
      gather(row(j), row(j + quarter), row(j + 2 * quarter), row(j + 3 * quarter), bytes, (u8*)(words + j * bytes));
    }
  }
  for (int j = 0; j < quarter; j++, out += dim, words += bytes) {
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
  Buffer<u8> query, weights, nothing;
  Buffer<u32> words, quads;
  Buffer<i32> scores, output;
  Buffer<float> unit, total;
};

struct FewRows {
  const AttentionCall& a;
  const Plan& plan;
  FewScratch& s;
  const int rows;
  const i64 dim = a.keys.dim, groups = a.keys.groups, dv = a.values.dim, value_groups = a.values.groups;
  const i64 output_pitch = dv + 16, products = (2 * rows + 1) * groups;

  // Rows of the integer product per group: high and low byte of each query, and ones, each zero outside of its group.
  void set_queries(i64 batch, i64 head) {
    u8* out = s.query.get(products * dim);
    float *unit = s.unit.get(rows), *total = s.total.get(rows * groups);
    s.scores.get(products * PITCH), s.output.get(2 * rows * value_groups * dv), s.weights.get(2 * rows * value_groups * PITCH);
    s.words.get(max(dim, dv) / 4 * PITCH), s.quads.get(max(dim, dv) / 4 * PITCH), s.nothing.get(dv);
    memset(out, 0, products * dim);
    const i64 size = dim / groups;
    std::vector<float> x(dim);
    by_dtype(a.dtype, [&](auto dtype) {
      for (int r = 0; r < rows; r++) {
        const char* q = query_row(batch, head, r);
        float largest = 0;
        bool finite = true;
        for (i64 c = 0; c < dim; c++) {
          x[c] = get<dtype>(q, c);
          largest = max(largest, std::fabs(x[c]));
          finite &= std::isfinite(x[c]);
        }
        if (!finite) std::fill(x.begin(), x.end(), 0.f);
        unit[r] = finite ? largest / 32767 : NAN;
        const float inverse = finite && largest > 0 ? 32767 / largest : 0;
        for (i64 g = 0; g < groups; g++) {
          u8* row = out + (g * (2 * rows + 1) + 2 * r) * dim;
          float sum = 0;
          for (i64 c = g * size; c < (g + 1) * size; c++) {
            const i32 fixed = (i32)std::lrintf(x[c] * inverse) + 32768;
            row[c] = fixed >> 8, row[dim + c] = fixed & 255;
            sum += x[c];
          }
          total[r * groups + g] = sum;
        }
        unit[r] /= 1 << a.keys.bits;
      }
    });
    for (i64 g = 0; g < groups; g++) memset(out + (g * (2 * rows + 1) + 2 * rows) * dim + g * size, 1, size);
  }

  // Scores of a cached block, corrected, in units of log2: [rows][PITCH].
  void score(const u8* codes, int n, int padded, const float* step, const float* zero, const float* square, const float* norm, float* scores) {
    by_bits(a.keys.bits, [&](auto bits) {
      transpose_words(codes, a.keys.codes_s, dim * bits / 32, n, s.words.data);
      Quads<bits> quads(s.words.data, dim);
      for (int q = 0; q < dim / 4; q++, quads.next()) {
        const Quads<bits> x = quads;
        u32* out = s.quads.data + q * PITCH;
        #pragma omp simd
        for (int j = 0; j < n; j++) out[j] = x(j) & ((1u << bits) - 1) * 0x01010101u;
      }
    });
    blas::brgemm(products, padded, dim, dim, PITCH, PITCH, false, s.query.data, (const signed char*)s.quads.data, s.scores.data, true);
    for (int r = 0; r < rows; r++) {
      float* x = scores + r * PITCH;
      for (i64 g = 0; g < groups; g++) {
        const i32 *high = s.scores.data + (g * (2 * rows + 1) + 2 * r) * PITCH, *low = high + PITCH;
        const i32* ones = s.scores.data + (g * (2 * rows + 1) + 2 * rows) * PITCH;
        const float *st = step + g * PITCH, *ze = zero + g * PITCH, *sq = square + g * PITCH;
        const float unit = s.unit.data[r], total = s.total.data[r * groups + g], c = a.correction ? norm[r * groups + g] : 0;
        auto term = [&](int j) { return st[j] * (unit * ((high[j] << 8) + low[j] - (ones[j] << 15)) + total) + ze[j] * total - c * sq[j]; };
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
        for (int j = 0; j < block.n; j++) {
          float sum = 0;
          #pragma omp simd reduction(+ : sum)
          for (i64 c = 0; c < dim; c++) sum += get<dtype>(q, c) * get<dtype>(k, j * key.s + c);
          scores[r * PITCH + j] = sum;
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
    const int quarter = padded / 4;
    const i64 size = dv / value_groups;
    by_bits(a.values.bits, [&](auto bits) {
      auto unpack = bits == 2 && dv == 128 ? quads_of_tokens<bits, 32> : quads_of_tokens<bits, 0>;  // a loop of two vectors wants a constant length
      unpack(codes, a.values.codes_s, dv, n, quarter, s.nothing.data, s.words.data, s.quads.data);
    });
    std::vector<float> unit(value_groups);
    for (i64 g = 0; g < value_groups; g++) {
      float *st = step + g * PITCH, *ze = zero + g * PITCH, largest = 0;
      std::fill(st + n, st + padded, 0.f), std::fill(ze + n, ze + padded, 0.f);
      #pragma omp simd reduction(max : largest)
      for (int j = 0; j < padded; j++) largest = st[j] > largest ? st[j] : largest;
      unit[g] = largest / 65000;
      const float inverse = largest > 0 ? 65000 / largest : 0;
      for (int r = 0; r < rows; r++) {
        const float* w = weights + r * PITCH;
        float sum = 0;
        u8 *high = s.weights.data + (g * rows + r) * 2 * PITCH, *low = high + PITCH;
        #pragma omp simd reduction(+ : sum)
        for (int j = 0; j < quarter; j++) {
          const int k = j + quarter, l = k + quarter, m = l + quarter;
          sum += w[j] * (st[j] + ze[j]) + w[k] * (st[k] + ze[k]) + (w[l] * (st[l] + ze[l]) + w[m] * (st[m] + ze[m]));
          const u32 x0 = (i32)(w[j] * (st[j] * inverse) + .5f), x1 = (i32)(w[k] * (st[k] * inverse) + .5f);
          const u32 x2 = (i32)(w[l] * (st[l] * inverse) + .5f), x3 = (i32)(w[m] * (st[m] * inverse) + .5f);
          const u32 h = (x0 >> 8 & 0xff) | (x1 & 0xff00) | (x2 & 0xff00) << 8 | (x3 & 0xff00) << 16;
          const u32 lo = (x0 & 0xff) | (x1 & 0xff) << 8 | (x2 & 0xff) << 16 | x3 << 24;
          memcpy(high + 4 * j, &h, 4), memcpy(low + 4 * j, &lo, 4);
        }
        float* o = output + r * output_pitch + g * size;
        #pragma omp simd
        for (i64 c = 0; c < size; c++) o[c] += sum;
      }
    }
    blas::brgemm(2 * rows * value_groups, dv, padded, PITCH, dv, dv, false, s.weights.data, (const signed char*)s.quads.data, s.output.data, true);
    for (i64 g = 0; g < value_groups; g++)
      for (int r = 0; r < rows; r++) {
        const i32 *high = s.output.data + (g * rows + r) * 2 * dv + g * size, *low = high + dv;
        float* o = output + r * output_pitch + g * size;
        const float factor = unit[g] / (1 << a.values.bits);
        #pragma omp simd
        for (i64 c = 0; c < size; c++) o[c] += ((high[c] << 8) + low[c]) * factor;
      }
  }
};

}  // namespace
