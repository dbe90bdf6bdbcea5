// CPU kernels of the quantizers that rotate: Hadamard rotation, and the best grid per group. Semantics: quantizers.py.
#include "cpu_kernels.h"

namespace {

constexpr i64 BLOCK = 16;

struct Token {
  float values[MOST_CHANNELS], wide[MOST_CHANNELS], narrow[MOST_CHANNELS];
};

// Sylvester's matrix of 16 rows.
struct Matrix {
  float rows[BLOCK][BLOCK];
  Matrix() {
    for (i64 r = 0; r < BLOCK; r++)
      for (i64 c = 0; c < BLOCK; c++) rows[r][c] = __builtin_parityll(r & c) ? -1 : 1;
  }
};
const Matrix matrix;

// Each run of `order` channels, a power of two, times the orthonormal Hadamard matrix.
void hadamard(float* __restrict x, i64 dim, i64 order) {
  i64 half = 1;
  if (order >= BLOCK) {  // the matrix of a power of two is a product of smaller ones: within blocks, and across them
    for (i64 first = 0; first < dim; first += BLOCK) {
      float sum[BLOCK] = {};
      for (i64 r = 0; r < BLOCK; r++) {
        const float value = x[first + r];
        #pragma omp simd
        for (i64 c = 0; c < BLOCK; c++) sum[c] += value * matrix.rows[r][c];
      }
      memcpy(x + first, sum, sizeof sum);
    }
    half = BLOCK;
  }
  for (; half < order; half *= 2)
    for (i64 first = 0; first < dim; first += 2 * half) {
      #pragma omp simd
      for (i64 c = first; c < first + half; c++) {
        const float a = x[c], b = x[c + half];
        x[c] = a + b, x[c + half] = a - b;
      }
    }
  const float factor = 1 / std::sqrt((float)order);
  #pragma omp simd
  for (i64 c = 0; c < dim; c++) x[c] *= factor;
}

struct Grid {
  float low, high;
};
struct Sums {
  float product, square;  // x · x̂ and ‖x̂‖²
};

// x̂: x rounded to levels from low to high.
Sums on_grid(const float* __restrict x, i64 size, Grid grid, float most, float* __restrict rounded) {
  const float step = (grid.high - grid.low) / most, width = step > 0 ? step : 1, magic = 12582912;  // adding it rounds
  float product = 0, square = 0;
  #pragma omp simd reduction(+ : product, square)
  for (i64 c = 0; c < size; c++) {
    float v = x[c] > grid.low ? x[c] : grid.low;
    v = v < grid.high ? v : grid.high;
    v = (v - grid.low) / width + magic - magic;
    v = v * width + grid.low;
    rounded[c] = v, product += x[c] * v, square += v * v;
  }
  return {product, square};
}

// As quantizers.round_rotated, of one group.
void round_group(const float* __restrict x, i64 size, i64 bits, float range, bool symmetric, float* wide, float* narrow, float* __restrict out) {
  float low = INF, high = -INF, energy = 0;
  #pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : energy)
  for (i64 c = 0; c < size; c++) low = min(low, x[c]), high = max(high, x[c]), energy += x[c] * x[c];
  if (!(energy < INF)) {
    std::fill(out, out + size, NAN);
    return;
  }
  if (symmetric) high = max(high, -low), low = -high;
  const float most = (1 << bits) - 1;
  auto factor_of = [&](Sums s) { return s.product > 0 ? energy / s.product : 1; };
  const Sums sums = on_grid(x, size, {low, high}, most, wide);
  float factor = factor_of(sums);
  const float* chosen = wide;
  if (range < INF) {
    const float limit = range * std::sqrt(energy / size);
    const Sums closer = on_grid(x, size, {max(low, -limit), min(high, limit)}, most, narrow);
    const float other = factor_of(closer);
    if (closer.square * other * other < sums.square * factor * factor) factor = other, chosen = narrow;
  }
  #pragma omp simd
  for (i64 c = 0; c < size; c++) out[c] = chosen[c] * factor;
}

}  // namespace

bool run(const RoundCall& a) {
  const i64 chunk = max<i64>(1, 4096 / a.dim), chunks = (a.tokens + chunk - 1) / chunk;
  return parallel(a.batch * a.heads * chunks, a.threads, [&](i64 task) {
    const i64 b = task / chunks / a.heads, h = task / chunks % a.heads, first = task % chunks * chunk;
    static thread_local Token token;
    by_dtype(a.dtype, [&](auto dtype) {
      for (i64 t = first; t < min(first + chunk, a.tokens); t++) {
        const i64 from = b * a.source.b + h * a.source.h + t * a.source.s, to = b * a.output.b + h * a.output.h + t * a.output.s;
        #pragma omp simd
        for (i64 c = 0; c < a.dim; c++) token.values[c] = get<dtype>(a.source.data, from + c);
        if (a.order) hadamard(token.values, a.dim, a.order);
        if (!a.group_size) {
          #pragma omp simd
          for (i64 c = 0; c < a.dim; c++) put((char*)a.output.data, to + c, token.values[c], dtype);
          continue;
        }
        float* out = (float*)a.output.data + to;
        for (i64 g = 0; g < a.dim; g += a.group_size)
          round_group(token.values + g, a.group_size, a.bits, a.range, a.symmetric, token.wide, token.narrow, out + g);
      }
    });
  }, [] {});
}
