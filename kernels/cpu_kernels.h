// What the CPU kernels' source files share: argument structures, number formats, threads.
// Plain loops that the compiler vectorises. NaN and infinity propagate: never compile with -ffinite-math-only or -ffast-math.
#pragma once
#include <c10/util/Half.h>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

typedef int64_t i64;
typedef int32_t i32;
typedef uint64_t u64;
typedef uint32_t u32;
typedef uint16_t u16;
typedef uint8_t u8;
typedef int8_t i8;

enum Dtype : i64 { FLOAT32, FLOAT16, BFLOAT16, BOOL };

// A packed cache (layout.py); strides in elements; scales for each dim / groups channels and `block` tokens: a step and a
// zero point, or, where it is symmetric, a step alone.
struct Packed {
  u8* codes;
  i64 codes_b, codes_h, codes_s;
  u16* scales;
  i64 scales_b, scales_h, scales_g, scales_s, bits, groups, dim, block;
  bool symmetric;
  i64 per_scale() const { return symmetric ? 1 : 2; }  // numbers that a group and token stores
  float implied_zero() const { return -float(3 * (1 << bits) - 1) / float(2 << bits); }  // of a symmetric cache, in steps
};
struct Plain {  // [B, H, L, D] in full precision, D contiguous
  const char* data;
  i64 b, h, s;
};
// Keys and values to attend: tokens of the packed cache or, where `packed` is false, rows of `key` and `value`.
struct Span {
  bool packed;
  i64 start, stop;
  i64 column;       // of the mask, of its first key
  Plain key, value;
  i64 row;          // its first key among all full-precision ones, for the causal mask
};
struct AttentionCall {
  Plain query;
  i64 dtype, batch, heads, length;
  Packed keys, values;
  i64 kv_heads;
  std::vector<Span> spans;
  i64 current;  // full-precision keys
  const char* mask;
  i64 mask_dtype, mask_b, mask_h, mask_l, mask_k;
  bool causal, correction, clamped;  // the correction is at most CLAMP
  float scale;
  char* output;  // [B, L, H, Dv]
  float* lse;    // [B, H, L] log-sum-exp of the scores, or null
  i64 threads;
  bool exact;  // float32 products
  i64 few;     // up to how many query rows per key/value head take integer products
  bool bytes;  // integer products in loops of ours, for any number of rows, where the library has none in bf16
  bool in_place;  // those of few rows are all in loops of ours, where the library has none of bytes, or wrong ones
};
struct AppendCall {
  Packed cache;  // block == 1
  Plain source;
  i64 dtype, batch, heads, tokens, start, threads;
};
struct DequantizeCall {
  Packed cache;
  char* output;  // [B, H, tokens, D]
  i64 dtype, batch, heads, tokens, start, threads;
};
struct MoveCall {
  Packed cache;
  i64 batch, heads, source, destination, tokens, threads;
};
struct FillCall {
  Packed cache;  // block == 1
  i64 batch, heads, start, stop;
  u16 zero;  // 0 where it is symmetric
};
struct RoundCall {
  Plain source, output;  // both [B, H, tokens, D]
  i64 dtype, batch, heads, tokens, dim;
  i64 order;       // of the Hadamard matrix that runs of channels are rotated by; 0: they are rotated already
  i64 group_size;  // of the grids that values are rounded to, in float32; 0: none, and the output has the source's dtype
  i64 bits;
  float range;  // of a grid, in root mean squares
  bool symmetric;
  i64 threads;
};
constexpr i64 MOST_CHANNELS = 1024;

// False where a library function that they rely on failed.
bool run(const AttentionCall&);
bool run(const AppendCall&);
bool run(const DequantizeCall&);
bool run(const MoveCall&);
bool run(const FillCall&);
bool run(const RoundCall&);

namespace {

using std::max;
using std::min;
constexpr float INF = __builtin_inff();

inline float as_float(u32 u) { float f; memcpy(&f, &u, 4); return f; }
inline u32 as_bits(float f) { u32 u; memcpy(&u, &f, 4); return u; }

inline float load(u16 h, std::integral_constant<i64, FLOAT16>) {
  u32 u = as_bits(as_float((h & 0x7fffu) << 13) * 0x1p112f);
  u = (h & 0x7c00) == 0x7c00 ? u | 0x7f800000u : u;
  return as_float(u | (u32)(h & 0x8000) << 16);
}
inline float load(u16 h, std::integral_constant<i64, BFLOAT16>) { return as_float((u32)h << 16); }
inline float load(float f, std::integral_constant<i64, FLOAT32>) { return f; }
inline float half(u16 h) { return load(h, std::integral_constant<i64, FLOAT16>()); }

// Round to nearest even, NaN kept.
inline u16 to_bfloat16(float f) {
  u32 u = as_bits(f);
  return f != f ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline u16 to_half(float f) { return c10::Half(f).x; }

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int LANES = 8;  // of 32 bits: compilers keep larger vectors than the processor's in memory
#else
constexpr int LANES = 16;
#endif
typedef u16 HalfWords __attribute__((vector_size(4 * LANES)));
typedef u32 Words __attribute__((vector_size(4 * LANES)));
typedef i32 Ints __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));

template <class V> V load_vector(const void* from) { V v; memcpy(&v, from, sizeof v); return v; }
template <class V> void store_vector(void* to, V v) { memcpy(to, &v, sizeof v); }

template <i64 DTYPE> struct Element { typedef u16 type; };
template <> struct Element<FLOAT32> { typedef float type; };
template <i64 DTYPE> inline float get(const char* data, i64 i) {
  return load(((const typename Element<DTYPE>::type*)data)[i], std::integral_constant<i64, DTYPE>());
}
inline void put(char* data, i64 i, float f, i64 dtype) {
  if (dtype == FLOAT32) ((float*)data)[i] = f;
  else ((u16*)data)[i] = dtype == FLOAT16 ? to_half(f) : to_bfloat16(f);
}
template <class F> inline void by_dtype(i64 dtype, F f) {
  if (dtype == FLOAT32) f(std::integral_constant<i64, FLOAT32>());
  else if (dtype == FLOAT16) f(std::integral_constant<i64, FLOAT16>());
  else f(std::integral_constant<i64, BFLOAT16>());
}
template <class F> inline void by_bits(i64 bits, F f) {
  if (bits == 2) f(std::integral_constant<int, 2>());
  else if (bits == 3) f(std::integral_constant<int, 3>());
  else if (bits == 4) f(std::integral_constant<int, 4>());
  else f(std::integral_constant<int, 8>());
}
inline i64 width_of(i64 dtype) { return dtype == FLOAT32 ? 4 : dtype == BOOL ? 1 : 2; }

// The code in bits `at` … of x as the leading mantissa bits of a float in [1, 2): 1 + c / 2^bits.
template <int BITS> inline float one_plus(u32 x, int at) {
  constexpr int TO = 23 - BITS;
  return as_float(((at < TO ? x << (TO - at) : x >> (at - TO)) & (((1u << BITS) - 1) << TO)) | 0x3f800000u);
}

// Runs f(0) … f(n - 1) on some threads, and finish() on each of them; false if one of them threw.
template <class F, class Finish> inline bool parallel(i64 n, i64 threads, F f, Finish finish) {
  std::atomic<bool> ok{true};
  auto guarded = [&](auto g) {
    try {
      g();
    } catch (...) {
      ok = false;
    }
  };
  if (threads <= 1 || n <= 1) {  // even a region of one thread costs half a microsecond
    guarded([&] { for (i64 i = 0; i < n; i++) f(i); });
    guarded(finish);
    return ok;
  }
  #pragma omp parallel num_threads(int(min(n, threads)))
  {
    #pragma omp for schedule(dynamic, 1)
    for (i64 i = 0; i < n; i++) guarded([&] { f(i); });
    guarded(finish);
  }
  return ok;
}

}  // namespace
