// CPU kernels of the packed cache: attention, append, dequantize, move. Layout: layout.py; semantics: ops.py, reference.py.
//
// Attention is flash attention over blocks of keys. A task is (batch, key/value head, tile of query rows, span of keys).
// Per block it expands codes into the operand layout of `brgemm` (bf16 pairs, or float), multiplies, and keeps one online
// softmax over packed and full-precision keys. Scores are in units of log2: softmax scale and log2(e) are folded into the
// dequantized keys, so that the correction is one multiply-add per score and channel group.
//
// Plain loops and one library function, `at::native::cpublas::brgemm`, which is exported but not public API: cpu_cpp.py
// checks the numbers when it loads this file. NaN and infinity propagate: never compile with -ffinite-math-only or -ffast-math.
#include <ATen/native/CPUBlas.h>

#include <memory>
#include <numeric>

#include "cpu_kernels.h"

namespace {

namespace blas = at::native::cpublas;

constexpr int KEYS = 512;         // keys per block
constexpr int PITCH = KEYS + 16;  // row pitch of block buffers: a power of two would put tile rows into the same cache sets
constexpr int ROWS = 64;          // query rows per matrix product
constexpr int TILE = 1024;        // query rows per task at most: queries and outputs stay in the second-level cache
constexpr float LOG2E = 1.44269504f;

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

// ---- codes ----------------------------------------------------------------------------------------------------------

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

// step' and zero' of n tokens from `start`, times `factor`, as [G][PITCH]; with `square`, also step'².
void load_scales(const Packed& c, const u16* scales, i64 start, int n, float factor, float* step, float* zero, float* square) {
  for (i64 g = 0; g < c.groups; g++, step += PITCH, zero += PITCH) {
    const u16* s = scales + g * c.scales_g;
    if (c.block == 1 && c.scales_s == 2) {
      s += 2 * start;
      #pragma omp simd
      for (int j = 0; j < n; j++) step[j] = half(s[2 * j]), zero[j] = half(s[2 * j + 1]);
    } else {
      for (int j = 0; j < n; j++) {
        const u16* p = s + (start + j) / c.block * c.scales_s;
        step[j] = half(p[0]), zero[j] = half(p[1]);
      }
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

// ---- operands of the matrix products --------------------------------------------------------------------------------
// Keys are [D][PITCH] and values [keys][DV], but bf16 operands hold two rows of that in one row of 32-bit pairs (VNNI).
// Values and weights pair key j with key j + half, not with its neighbour: both are then packed without shuffles.

struct Bfloat16 {
  typedef u16 type;
  typedef u32 word;
  static constexpr int STACK = 2;
  static u16 from(float f) { return to_bfloat16(f); }
  static void key4(u32* k, int j, float a, float b, float c, float d) { k[j] = pair(a, b), k[PITCH + j] = pair(c, d); }
  static void value2(u32* v, i64, i64 c, float a, float b) { v[c] = pair(a, b); }
  static void weight2(u16* p, int, int j, float a, float b) { u32 u = pair(a, b); memcpy(p + 2 * j, &u, 4); }
  static float exp2_fraction(float f) { return ((0.05517166f * f + 0.24261114f) * f + 0.69326099f) * f + 0.99992807f; }  // 7e-5
  static void product(i64 m, i64 n, i64 k, i64 lda, i64 ldb, i64 ldc, bool add, const u16* a, const u32* b, float* c) {
    blas::brgemm(m, n, k, lda, ldb, ldc, add, (const at::BFloat16*)a, (const at::BFloat16*)b, c, true);
  }
};

struct Float32 {
  typedef float type;
  typedef float word;
  static constexpr int STACK = 1;
  static float from(float f) { return f; }
  static void key4(float* k, int j, float a, float b, float c, float d) { k[j] = a, k[PITCH + j] = b, k[2 * PITCH + j] = c, k[3 * PITCH + j] = d; }
  static void value2(float* v, i64 half_rows, i64 c, float a, float b) { v[c] = a, v[half_rows + c] = b; }
  static void weight2(float* p, int half, int j, float a, float b) { p[j] = a, p[half + j] = b; }
  static float exp2_fraction(float f) {  // 8e-8
    return ((((0.00132765f * f + 0.00967554f) * f + 0.05550713f) * f + 0.2402212f) * f + 0.69314697f) * f + 1.00000007f;
  }
  static void product(i64 m, i64 n, i64 k, i64 lda, i64 ldb, i64 ldc, bool add, const float* a, const float* b, float* c) {
    blas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
  }
};

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

// ---- softmax --------------------------------------------------------------------------------------------------------

// s_j -= Σ_g c_g x_gj
void correct(int groups, float* __restrict s, const float* c, const float* __restrict x, int n) {
  for (int g = 0; g < groups; g++, x += PITCH) {
    #pragma omp simd
    for (int j = 0; j < n; j++) s[j] -= c[g] * x[j];
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

// 2^x for x < 128, and 2^lowest below `lowest`; NaN stays NaN.
template <class Op> inline float exp2_fast(float x, float lowest) {
  x = x < lowest ? lowest : x;
  float t = x + 12582912.f, f = x - (t - 12582912.f);  // t holds round(x) in its low bits
  return as_float(as_bits(Op::exp2_fraction(f)) + (as_bits(t) << 23));
}

struct Exponentials {
  float sum, highest;  // of the weights, of their exponents
};

// p_j = 2^(factor s_j - top - Σ_g c_g x_gj)
template <class Op, int G>
Exponentials exponentiate(const float* __restrict s, const float* c, const float* __restrict x, float factor, float top, typename Op::type* __restrict p, int half_n) {
  volatile float opaque = -120;  // a constant would be propagated into a branch, which costs more than the maximum
  const float lowest = opaque;
  float sum = 0, highest = -INF;
  #pragma omp simd reduction(+ : sum) reduction(max : highest)
  for (int j = 0; j < half_n; j++) {
    float a = s[j] * factor - top, b = s[half_n + j] * factor - top;
    for (int g = 0; g < G; g++) a -= c[g] * x[g * PITCH + j], b -= c[g] * x[g * PITCH + half_n + j];
    const float higher = a > b ? a : b;
    highest = higher > highest ? higher : highest;
    a = exp2_fast<Op>(a, lowest), b = exp2_fast<Op>(b, lowest);
    sum += a + b;
    Op::weight2(p, half_n, j, a, b);
  }
  return {sum, highest};
}
template <class Op>
Exponentials exponentiate(int groups, const float* s, const float* c, const float* x, float factor, float top, typename Op::type* p, int half_n) {
  switch (groups) {
    case 0: return exponentiate<Op, 0>(s, c, x, factor, top, p, half_n);
    case 1: return exponentiate<Op, 1>(s, c, x, factor, top, p, half_n);
    case 2: return exponentiate<Op, 2>(s, c, x, factor, top, p, half_n);
    case 3: return exponentiate<Op, 3>(s, c, x, factor, top, p, half_n);
    default: return exponentiate<Op, 4>(s, c, x, factor, top, p, half_n);
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

// ---- attention ------------------------------------------------------------------------------------------------------

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

struct Scratch {
  Buffer<u32> keys, values, words, both;
  Buffer<float> scores, output, top, sum, norm, key_step, key_zero, key_square, value_step, value_zero;
  Buffer<u16> query, weights;
  Buffer<u8> nothing;
};

template <class Op> void load_current(const AttentionCall& a, Scratch& s, i64 b, i64 h, const Block& block, int padded) {
  const i64 dim = a.keys.dim, dv = a.values.dim, width = width_of(a.dtype), pitch = dv + 16;
  const int half_n = padded / 2;
  typename Op::word *keys = (typename Op::word*)s.keys.data, *values = (typename Op::word*)s.values.data;
  const Plain &key = block.span->key, &value = block.span->value;
  const char* k = key.data + (b * key.b + h * key.h + block.start * key.s) * width;
  const char* v = value.data + (b * value.b + h * value.h + block.start * value.s) * width;
  by_dtype(a.dtype, [&](auto dtype) {
    for (int j0 = 0; j0 < block.n; j0 += 16)  // 16 keys at a time: whole cache lines of the destination
      for (i64 w = 0; w < dim / 4; w++)
        for (int j = j0; j < min(j0 + 16, block.n); j++) {
          const i64 i = j * key.s + 4 * w;
          Op::key4(keys + 4 / Op::STACK * w * PITCH, j, get<dtype>(k, i), get<dtype>(k, i + 1), get<dtype>(k, i + 2), get<dtype>(k, i + 3));
        }
    for (int j = 0; j < half_n; j++) {
      const bool in0 = j < block.n, in1 = j + half_n < block.n;
      const i64 i0 = in0 ? j * value.s : 0, i1 = in1 ? (j + half_n) * value.s : 0;
      #pragma omp simd
      for (i64 c = 0; c < dv; c++) {
        const float x = get<dtype>(v, i0 + c), y = get<dtype>(v, i1 + c);
        Op::value2(values + j * pitch, half_n * pitch, c, in0 ? x : 0.f, in1 ? y : 0.f);
      }
    }
  });
}

void load_block_scales(const AttentionCall& a, Scratch& s, i64 b, i64 h, const Block& block) {
  const Packed &k = a.keys, &v = a.values;
  load_scales(k, k.scales + b * k.scales_b + h * k.scales_h, block.start, block.n, a.scale * LOG2E, s.key_step.data, s.key_zero.data,
              s.key_square.data);
  load_scales(v, v.scales + b * v.scales_b + h * v.scales_h, block.start, block.n, 1.f, s.value_step.data, s.value_zero.data, nullptr);
}

template <class Op> void load_cached(const AttentionCall& a, Scratch& s, i64 b, i64 h, const Block& block, int padded) {
  const Packed &k = a.keys, &v = a.values;
  typename Op::word *keys = (typename Op::word*)s.keys.data, *values = (typename Op::word*)s.values.data;
  const u8* kc = k.codes + b * k.codes_b + h * k.codes_h + block.start * k.codes_s;
  const u8* vc = v.codes + b * v.codes_b + h * v.codes_h + block.start * v.codes_s;
  load_block_scales(a, s, b, h, block);
  by_bits(k.bits, [&](auto bits) {
    transpose_words(kc, k.codes_s, k.dim * bits / 32, block.n, s.words.data);
    expand_keys<Op, bits>(s.words.data, k.dim, k.dim / k.groups, block.n, s.key_step.data, s.key_zero.data, keys);
  });
  for (i64 g = 0; g < v.groups; g++)
    for (float* x : {s.value_step.data, s.value_zero.data}) std::fill(x + g * PITCH + block.n, x + g * PITCH + padded, 0.f);
  by_bits(v.bits, [&](auto bits) {
    const i64 group = v.dim / v.groups, segment = std::gcd(group, v.dim * (bits == 3 ? 1 : bits) / 8);
    constexpr int LONG = Op::STACK == 2 ? 32 : 8, MIDDLE = Op::STACK == 2 ? 16 : 8;
    auto expand = segment % LONG == 0     ? expand_values<Op, bits, LONG>
                  : segment % MIDDLE == 0 ? expand_values<Op, bits, MIDDLE>
                  : segment % 8 == 0      ? expand_values<Op, bits, 8>
                                          : expand_values<Op, bits, 1>;
    expand(vc, v.codes_s, v.dim, group, v.dim + 16, block.n, padded / 2, s.value_step.data, s.value_zero.data, s.nothing.data, s.both.data, values);
  });
}

// ---- few query rows -------------------------------------------------------------------------------------------------
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
  const i64 products = (2 * rows + 1) * groups;

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
    volatile float opaque = -120;
    const float lowest = opaque;
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; j++) {
      x[j] = exp2_fast<Float32>(x[j] * factor - top, lowest);
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
          for (i64 c = 0; c < dv; c++) output[r * dv + c] += w * get<dtype>(v, j * value.s + c);
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
        float* o = output + r * dv + g * size;
        #pragma omp simd
        for (i64 c = 0; c < size; c++) o[c] += sum;
      }
    }
    blas::brgemm(2 * rows * value_groups, dv, padded, PITCH, dv, dv, false, s.weights.data, (const signed char*)s.quads.data, s.output.data, true);
    for (i64 g = 0; g < value_groups; g++)
      for (int r = 0; r < rows; r++) {
        const i32 *high = s.output.data + (g * rows + r) * 2 * dv + g * size, *low = high + dv;
        float* o = output + r * dv + g * size;
        const float factor = unit[g] / (1 << a.values.bits);
        #pragma omp simd
        for (i64 c = 0; c < size; c++) o[c] += ((high[c] << 8) + low[c]) * factor;
      }
  }
};

template <class Op> void attend(const AttentionCall& a, const Plan& plan, i64 unit) {
  static thread_local Scratch s;
  const i64 task = unit / plan.splits, split = unit % plan.splits;
  const i64 row0 = task % plan.tiles * plan.tile, head = task / plan.tiles % a.kv_heads, batch = task / plan.tiles / a.kv_heads;
  const int rows = min(plan.tile, plan.rows - row0), padded_rows = (rows + 15) / 16 * 16;
  const i64 dim = a.keys.dim, dv = a.values.dim, groups = a.correction ? a.keys.groups : 0, value_pitch = dv + 16;
  const i64 query_pitch = dim;

  auto* query = (typename Op::type*)s.query.get(padded_rows * query_pitch * 2);
  auto* weights = (typename Op::type*)s.weights.get(ROWS * PITCH * 2);
  auto* keys = (typename Op::word*)s.keys.get(dim * PITCH);
  auto* values = (typename Op::word*)s.values.get(KEYS * value_pitch);
  s.words.get(dim / 4 * PITCH);
  s.key_step.get(a.keys.groups * PITCH), s.key_zero.get(a.keys.groups * PITCH), s.key_square.get(a.keys.groups * PITCH);
  s.value_step.get(a.values.groups * PITCH), s.value_zero.get(a.values.groups * PITCH);
  s.nothing.get(dv), s.both.get(8 * dv);
  float* scores = s.scores.get(ROWS * PITCH);
  float *output = s.output.get(padded_rows * dv), *top = s.top.get(padded_rows), *sum = s.sum.get(padded_rows);
  float* norm = s.norm.get(padded_rows * max<i64>(groups, 1));

  const i64 levels = 1 << a.keys.bits;
  const float jensen = a.scale * a.scale * LOG2E / 24 / (levels * levels);
  i64 last_query = 0;  // of this tile
  by_dtype(a.dtype, [&](auto dtype) {
    for (int r = 0; r < rows; r++) {
      const i64 h = head * plan.repeat + (row0 + r) / a.length, i = (row0 + r) % a.length;
      const char* q = a.query.data + (batch * a.query.b + h * a.query.h + i * a.query.s) * width_of(dtype);
      for (i64 g = 0; g < groups; g++) {
        float square = 0;
        #pragma omp simd reduction(+ : square)
        for (i64 c = g * dim / groups; c < (g + 1) * dim / groups; c++) square += get<dtype>(q, c) * get<dtype>(q, c);
        norm[r * groups + g] = square * jensen;
      }
      for (i64 c = 0; c < dim; c++) query[r * query_pitch + c] = Op::from(get<dtype>(q, c));
      top[r] = -INF, sum[r] = 0;
      last_query = max(last_query, i);
    }
  });
  memset(query + rows * query_pitch, 0, (padded_rows - rows) * query_pitch * sizeof(*query));
  memset(output, 0, padded_rows * dv * sizeof(float));

  static thread_local FewScratch few_scratch;
  FewRows few{a, plan, few_scratch, rows};
  if (Op::STACK == 2 && plan.few) few.set_queries(batch, head);

  const i64 first = plan.blocks.size() * split / plan.splits, last = plan.blocks.size() * (split + 1) / plan.splits;
  for (i64 index = first; index < last; index++) {
    const Block& block = plan.blocks[index];
    const bool current = !block.span->packed;
    const i64 diagonal = a.current - a.length - block.row;  // key j of the block is visible to query i if j <= i + diagonal
    if (current && a.causal && last_query + diagonal < 0) continue;
    const int n = block.n, padded = (n + 63) / 64 * 64, half_n = padded / 2;  // few distinct sizes: brgemm compiles for each
    const bool integers = Op::STACK == 2 && plan.few && !current;
    const bool plainly = current && plan.few && rows * n <= 256;  // a product of matrices is not worth its preparation
    if (n < padded && !integers && !plainly)
      for (i64 w = 0; w < dim / Op::STACK; w++) memset(keys + w * PITCH + n, 0, (padded - n) * sizeof(*keys));
    if (integers) load_block_scales(a, s, batch, head, block);
    else if (!current) load_cached<Op>(a, s, batch, head, block, padded);
    else if (!plainly) load_current<Op>(a, s, batch, head, block, padded);
    if (n < padded)
      for (i64 g = 0; g < groups; g++) memset(s.key_square.data + g * PITCH + n, 0, (padded - n) * sizeof(float));

    for (int m0 = 0; m0 < rows; m0 += ROWS) {
      const int m = min(ROWS, padded_rows - m0), used = min(m, rows - m0);
      if (integers)
        few.score(a.keys.codes + batch * a.keys.codes_b + head * a.keys.codes_h + block.start * a.keys.codes_s, n, padded, s.key_step.data,
                  s.key_zero.data, s.key_square.data, norm, scores);
      else if (plainly)
        few.score_plainly(batch, head, block, scores);
      else
        Op::product(m, padded, dim, query_pitch, PITCH, PITCH, false, query + m0 * query_pitch, keys, scores);
      for (int r = 0; r < used; r++) {
        const int row = m0 + r;
        float* x = scores + r * PITCH;
        float factor = current ? a.scale * LOG2E : 1.f;
        std::fill(x + n, x + padded, -INF);
        if (current && a.causal) {
          const i64 visible = min<i64>(max<i64>((row0 + row) % a.length + diagonal + 1, 0), n);
          std::fill(x + visible, x + n, -INF);
        }
        const float *c = norm + row * groups, *square = s.key_square.data;
        int terms = current || integers ? 0 : groups;  // of the correction, still to be subtracted
        if (terms > 4 || (terms && a.mask)) correct(terms, x, c, square, padded), terms = 0;
        if (a.mask) {
          const i64 h = head * plan.repeat + (row0 + row) / a.length, i = (row0 + row) % a.length;
          apply_mask(a, a.mask + (batch * a.mask_b + h * a.mask_h + i * a.mask_l + block.column * a.mask_k) * width_of(a.mask_dtype), x, factor, n);
          factor = 1.f;
        }
        auto raise = [&](float to) {  // the exponents' origin, so that what was summed up shrinks
          const float shrink = exp2f(top[row] - to);
          top[row] = to, sum[row] *= shrink;
          float* o = output + row * dv;
          #pragma omp simd
          for (i64 c = 0; c < dv; c++) o[c] *= shrink;
        };
        const bool in_place = integers || plainly;
        if (in_place || top[row] == -INF) {
          const float highest = highest_score(terms, x, c, square, factor, padded);
          if (highest > top[row]) raise(highest);
        }
        auto* p = weights + r * PITCH;
        if (top[row] == -INF) {  // nothing seen yet
          bool nan = false;
          for (int j = 0; j < n; j++) nan |= x[j] != x[j];
          if (nan) sum[row] = NAN;
          memset(p, 0, padded * sizeof(*p));
          std::fill(x, x + padded, 0.f);
          continue;
        }
        if (in_place) {
          sum[row] += FewRows::exponentiate(x, factor, top[row], padded);
          continue;
        }
        // Higher scores than any before only mean weights above 1, unless they are much higher.
        Exponentials e = exponentiate<Op>(terms, x, c, square, factor, top[row], p, half_n);
        if (e.highest > 16) {
          raise(top[row] + e.highest);
          e = exponentiate<Op>(terms, x, c, square, factor, top[row], p, half_n);
        }
        sum[row] += e.sum;
      }
      if (integers)
        few.add_values(a.values.codes + batch * a.values.codes_b + head * a.values.codes_h + block.start * a.values.codes_s, n, padded,
                       s.value_step.data, s.value_zero.data, scores, output);
      else if (plainly)
        few.add_values_plainly(batch, head, block, scores, output);
      else
        Op::product(m, dv, padded, PITCH, value_pitch, dv, true, weights, values, output + m0 * dv);
    }
  }

  if (plan.splits > 1) {
    memcpy(plan.partial_output + unit * plan.tile * dv, output, rows * dv * sizeof(float));
    memcpy(plan.partial_top + unit * plan.tile, top, rows * sizeof(float));
    memcpy(plan.partial_sum + unit * plan.tile, sum, rows * sizeof(float));
    return;
  }
  for (int r = 0; r < rows; r++) {
    const i64 h = head * plan.repeat + (row0 + r) / a.length, i = (row0 + r) % a.length;
    const i64 at = ((batch * a.length + i) * a.heads + h) * dv;
    const float inverse = 1.f / sum[r];
    by_dtype(a.dtype, [&](auto dtype) {
      for (i64 c = 0; c < dv; c++) put(a.output, at + c, output[r * dv + c] * inverse, dtype);
    });
    if (a.lse) a.lse[(batch * a.heads + h) * a.length + i] = (top[r] + log2f(sum[r])) / LOG2E;
  }
}

// Joins the results of a task whose keys were split.
void merge(const AttentionCall& a, const Plan& plan, i64 task) {
  const i64 dv = a.values.dim, row0 = task % plan.tiles * plan.tile;
  const i64 head = task / plan.tiles % a.kv_heads, batch = task / plan.tiles / a.kv_heads;
  std::vector<float> row(dv);
  for (i64 r = 0; r < min(plan.tile, plan.rows - row0); r++) {
    float top = -INF, sum = 0;
    for (i64 p = 0; p < plan.splits; p++) top = max(top, plan.partial_top[(task * plan.splits + p) * plan.tile + r]);
    std::fill(row.begin(), row.end(), 0.f);
    for (i64 p = 0; p < plan.splits; p++) {
      const i64 at = (task * plan.splits + p) * plan.tile + r;
      const float part = plan.partial_top[at] == -INF ? plan.partial_sum[at] : exp2f(plan.partial_top[at] - top);  // 0 or NaN where nothing was seen
      sum += plan.partial_sum[at] * part;
      for (i64 c = 0; c < dv; c++) row[c] += plan.partial_output[at * dv + c] * part;
    }
    const i64 h = head * plan.repeat + (row0 + r) / a.length, i = (row0 + r) % a.length;
    const i64 at = ((batch * a.length + i) * a.heads + h) * dv;
    for (i64 c = 0; c < dv; c++) put(a.output, at + c, row[c] / sum, a.dtype);
    if (a.lse) a.lse[(batch * a.heads + h) * a.length + i] = (top + log2f(sum)) / LOG2E;
  }
}

}  // namespace

bool run(const AttentionCall& a) {
  Plan plan;
  plan.repeat = a.heads / a.kv_heads;
  plan.rows = plan.repeat * a.length;  // query heads that share keys are rows of one product
  plan.few = plan.rows <= a.few && a.keys.bits < 8 && a.values.bits < 8 && !a.exact && a.keys.groups <= 8 && a.values.groups <= 8;
  for (const Span& span : a.spans)
    for (i64 j = span.start; j < span.stop; j += KEYS)
      plan.blocks.push_back({&span, (int)min<i64>(KEYS, span.stop - j), j, span.column + j - span.start, span.row + j - span.start});
  plan.tiles = (plan.rows + TILE - 1) / TILE;
  plan.tile = ((plan.rows + plan.tiles - 1) / plan.tiles + ROWS - 1) / ROWS * ROWS;
  plan.tiles = (plan.rows + plan.tile - 1) / plan.tile;
  const i64 tasks = a.batch * a.kv_heads * plan.tiles, n_blocks = plan.blocks.size();
  plan.splits = 1;  // the fewest that leave threads idle for at most a tenth of the time
  auto time = [&](i64 splits) { return double((tasks * splits + a.threads - 1) / a.threads) / splits; };
  while (time(plan.splits) > 1.1 * tasks / a.threads && plan.splits < min(n_blocks, 2 * a.threads)) plan.splits++;
  plan.units = tasks * plan.splits;
  std::unique_ptr<float[]> partial;
  if (plan.splits > 1) {
    partial.reset(new float[plan.units * plan.tile * (a.values.dim + 2)]);
    plan.partial_output = partial.get();
    plan.partial_top = plan.partial_output + plan.units * plan.tile * a.values.dim;
    plan.partial_sum = plan.partial_top + plan.units * plan.tile;
  }
  auto release = [] { blas::brgemm_release(true); };
  bool ok = parallel(plan.units, a.threads, [&](i64 unit) { a.exact ? attend<Float32>(a, plan, unit) : attend<Bfloat16>(a, plan, unit); }, release);
  if (ok && plan.splits > 1) ok = parallel(tasks, a.threads, [&](i64 task) { merge(a, plan, task); }, [] {});
  return ok;
}
