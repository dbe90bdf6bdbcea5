// Attention over the packed cache on the CPU. Layout: layout.py; semantics: ops.py, reference.py.
//
// Attention is flash attention over blocks of keys. A task is (batch, key/value head, tile of query rows, span of keys).
// Per block it expands codes into the operand layout of `brgemm` (bf16 pairs, or float), multiplies, and keeps one online
// softmax over packed and full-precision keys. Scores are in units of log2: softmax scale and log2(e) are folded into the
// dequantized keys, so that the correction is one multiply-add per score and channel group.
// Few rows multiply codes as integers (cpu_few_rows.h), and so does any number of rows where a processor has products of
// bytes and none in bf16 (cpu_many_rows.h); keys in full precision are then multiplied in float.
//
// Plain loops and one library function, `at::native::cpublas::brgemm`, which is exported but not public API: cpu_cpp.py
// checks the numbers when it loads this. NaN and infinity propagate: never compile with -ffinite-math-only or -ffast-math.
#include <memory>
#include <numeric>

#include "cpu_many_rows.h"

namespace {

constexpr int ROWS = 64;          // query rows per matrix product
constexpr float CLAMP = 1;        // reference.CLAMP
constexpr int TILE = 1024;        // query rows per task at most: queries and outputs stay in the second-level cache

struct Scratch {
  Buffer<u32> keys, values, words, both, table;
  Buffer<float> scores, output, top, sum, norm, length, key_step, key_zero, key_square, value_step, value_zero;
  Buffer<u16> query, weights;
  Buffer<u8> nothing;
};

// What queries, keys and values in full precision are in a product.
template <class Op, i64 DTYPE> inline typename Op::type element(const char* data, i64 i) {
  if constexpr (DTYPE == BFLOAT16 && Op::STACK == 2) return ((const u16*)data)[i];
  else return Op::from(get<DTYPE>(data, i));
}

template <class Op> void load_current(const AttentionCall& a, Scratch& s, i64 b, i64 h, const Block& block, int padded) {
  const i64 dim = a.keys.dim, dv = a.values.dim, width = width_of(a.dtype), pitch = dv + 16;
  const int half_n = padded / 2;
  typename Op::word *keys = (typename Op::word*)s.keys.data, *values = (typename Op::word*)s.values.data;
  const Plain &key = block.span->key, &value = block.span->value;
  const char* k = key.data + (b * key.b + h * key.h + block.start * key.s) * width;
  const char* v = value.data + (b * value.b + h * value.h + block.start * value.s) * width;
  constexpr int RUN = 8 * Op::STACK;  // channels that are transposed together: 8 words
  by_dtype(a.dtype, [&](auto dtype) {
    i64 first = 0;
    for (; first + RUN <= dim; first += RUN) {
      auto* run = (typename Op::type*)s.words.data;
      for (int j = 0; j < block.n; j++)
        #pragma omp simd
        for (int c = 0; c < RUN; c += 4)
          for (int i = 0; i < 4; i++) run[j * RUN + c + i] = element<Op, dtype>(k, j * key.s + first + c + Op::ORDER[i]);
      transpose<8>((const u8*)run, block.n, (u32*)(keys + first / Op::STACK * PITCH));
    }
    for (i64 c = first; c < dim; c += 4)
      for (int j = 0; j < block.n; j++) {
        const i64 i = j * key.s + c;
        Op::key4(keys + c / Op::STACK * PITCH, j, get<dtype>(k, i), get<dtype>(k, i + 1), get<dtype>(k, i + 2), get<dtype>(k, i + 3));
      }
    for (int j = 0; j < half_n; j++) {
      const bool in0 = j < block.n, in1 = j + half_n < block.n;
      const i64 i0 = in0 ? j * value.s : 0, i1 = in1 ? (j + half_n) * value.s : 0;
      #pragma omp simd
      for (i64 c = 0; c < dv; c++) {
        const auto x = element<Op, dtype>(v, i0 + c), y = element<Op, dtype>(v, i1 + c);
        Op::value2(values + j * pitch, half_n * pitch, c, in0 ? x : decltype(x)(0), in1 ? y : decltype(x)(0));
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
  const i64 key_group = k.dim / k.groups, value_group = v.dim / v.groups;
  transpose_words(kc, k.codes_s, k.dim * k.bits / 32, block.n, s.words.data);
  if (Op::STACK == 2 && k.bits == 2 && key_group % 4 == 0) {
    tabulate(k.groups, block.n, s.key_step.data, s.key_zero.data, 0, s.table.data);
    select_keys(s.words.data, k.dim, key_group, block.n, s.table.data, (u32*)keys);
  } else {
    by_bits(k.bits, [&](auto bits) { expand_keys<Op, bits>(s.words.data, k.dim, key_group, block.n, s.key_step.data, s.key_zero.data, keys); });
  }
  for (i64 g = 0; g < v.groups; g++)
    for (float* x : {s.value_step.data, s.value_zero.data}) std::fill(x + g * PITCH + block.n, x + g * PITCH + padded, 0.f);
  if (Op::STACK == 2 && v.bits == 2 && v.dim % (4 * LANES) == 0 && value_group % LANES == 0) {
    tabulate(v.groups, padded / 2, s.value_step.data, s.value_zero.data, padded / 2, s.table.data);
    select_values(vc, v.codes_s, v.dim, value_group, v.dim + 16, block.n, padded / 2, s.table.data, s.nothing.data, (u32*)values);
    return;
  }
  by_bits(v.bits, [&](auto bits) {
    const i64 segment = std::gcd(value_group, v.dim * (bits == 3 ? 1 : bits) / 8);
    constexpr int LONG = Op::STACK == 2 ? 32 : 8, MIDDLE = Op::STACK == 2 ? 16 : 8;
    auto expand = segment % LONG == 0     ? expand_values<Op, bits, LONG>
                  : segment % MIDDLE == 0 ? expand_values<Op, bits, MIDDLE>
                  : segment % 8 == 0      ? expand_values<Op, bits, 8>
                                          : expand_values<Op, bits, 1>;
    expand(vc, v.codes_s, v.dim, value_group, v.dim + 16, block.n, padded / 2, s.value_step.data, s.value_zero.data, s.nothing.data, s.both.data, values);
  });
}

template <class Op> void attend(const AttentionCall& a, const Plan& plan, i64 unit) {
  static thread_local Scratch s;
  const i64 task = unit / plan.splits, split = unit % plan.splits;
  const i64 row0 = task % plan.tiles * plan.tile, head = task / plan.tiles % a.kv_heads, batch = task / plan.tiles / a.kv_heads;
  const int rows = min(plan.tile, plan.rows - row0), padded_rows = (rows + 15) / 16 * 16;
  const i64 dim = a.keys.dim, dv = a.values.dim, groups = a.correction ? a.keys.groups : 0, value_pitch = dv + 16, group = dim / max<i64>(groups, 1);
  const i64 query_pitch = dim;

  auto* query = (typename Op::type*)s.query.get(padded_rows * query_pitch * 2);
  auto* weights = (typename Op::type*)s.weights.get(ROWS * WEIGHTS * 2);
  auto* keys = (typename Op::word*)s.keys.get(dim * PITCH);
  auto* values = (typename Op::word*)s.values.get(KEYS * value_pitch);
  s.words.get(dim / 4 * PITCH);
  s.key_step.get(a.keys.groups * PITCH), s.key_zero.get(a.keys.groups * PITCH), s.key_square.get(a.keys.groups * PITCH);
  s.value_step.get(a.values.groups * PITCH), s.value_zero.get(a.values.groups * PITCH);
  s.nothing.get(dv), s.both.get(8 * dv), s.table.get(4 * max(a.keys.groups, a.values.groups) * PITCH);
  float* scores = s.scores.get(ROWS * PITCH);
  float *output = s.output.get(padded_rows * value_pitch), *top = s.top.get(padded_rows), *sum = s.sum.get(padded_rows);
  float *norm = s.norm.get(padded_rows * max<i64>(groups, 1)), *length = s.length.get(padded_rows);

  const i64 levels = 1 << a.keys.bits;
  const float jensen = a.scale * a.scale * LOG2E / 24 / (levels * levels);
  i64 last_query = 0;  // of this tile
  by_dtype(a.dtype, [&](auto dtype) {
    for (int r = 0; r < rows; r++) {
      const i64 h = head * plan.repeat + (row0 + r) / a.length, i = (row0 + r) % a.length;
      const char* q = a.query.data + (batch * a.query.b + h * a.query.h + i * a.query.s) * width_of(dtype);
      float total = 0;
      for (i64 g = 0; g < max<i64>(groups, 1); g++) {
        float square = 0;
        #pragma omp simd reduction(+ : square)
        for (i64 c = g * group; c < (g + 1) * group; c++) square += get<dtype>(q, c) * get<dtype>(q, c);
        total += square;
        if (groups) norm[r * groups + g] = square * jensen;
      }
      length[r] = std::sqrt(total);
      auto* to = query + r * query_pitch;
      #pragma omp simd
      for (i64 c = 0; c < dim; c += 4)
        for (int k = 0; k < 4; k++) to[c + k] = element<Op, dtype>(q, c + Op::ORDER[k]);
      top[r] = -INF, sum[r] = 0;
      last_query = max(last_query, i);
    }
  });
  memset(query + rows * query_pitch, 0, (padded_rows - rows) * query_pitch * sizeof(*query));
  memset(output, 0, padded_rows * value_pitch * sizeof(float));

  static thread_local FewScratch few_scratch;
  FewRows few{a, plan, few_scratch, rows};
  if (plan.few) few.set_queries(batch, head);
  static thread_local ManyScratch many_scratch;
  ManyRows many{a, plan, many_scratch, padded_rows};
  if (plan.many) many.set_queries(batch, head, row0, rows, norm);
  float part[ROWS] = {};  // what a row's weights are to be multiplied by

  const i64 first = plan.blocks.size() * split / plan.splits, last = plan.blocks.size() * (split + 1) / plan.splits;
  for (i64 index = first; index < last; index++) {
    const Block& block = plan.blocks[index];
    const bool current = !block.span->packed;
    const i64 diagonal = a.current - a.length - block.row;  // key j of the block is visible to query i if j <= i + diagonal
    if (current && a.causal && last_query + diagonal < 0) continue;
    const int n = block.n;
    const bool few_integers = plan.few && !current, many_integers = plan.many && !current, integers = few_integers || many_integers;
    const bool plainly = current && plan.few && rows * n <= 256;  // a product of matrices is not worth its preparation
    const int padded = plainly ? (n + 15) / 16 * 16 : (n + 63) / 64 * 64, half_n = padded / 2;  // few distinct sizes: brgemm compiles for each
    auto codes = [&](const Packed& x) { return x.codes + batch * x.codes_b + head * x.codes_h + block.start * x.codes_s; };
    if (integers) load_block_scales(a, s, batch, head, block);
    else if (!current) load_cached<Op>(a, s, batch, head, block, padded);
    else if (!plainly) load_current<Op>(a, s, batch, head, block, padded);
    if (many_integers) many.load(codes(a.keys), codes(a.values), n, padded, s.value_step.data, s.value_zero.data);
    if (n < padded && !integers && !plainly)
      for (i64 w = 0; w < dim / Op::STACK; w++) memset(keys + w * PITCH + n, 0, (padded - n) * sizeof(*keys));
    if (n < padded)
      for (i64 g = 0; g < groups; g++) memset(s.key_square.data + g * PITCH + n, 0, (padded - n) * sizeof(float));

    float norm_of_keys = INFINITY, highest_square = 0;
    if (!current && !integers && !a.mask && n == padded) {
      norm_of_keys = highest_norm(a.keys.groups, dim / a.keys.groups, n, s.key_step.data, s.key_zero.data);
      for (i64 g = 0; g < groups; g++) highest_square = max(highest_square, highest_score<0>(s.key_square.data + g * PITCH, nullptr, nullptr, 1.f, n));
    }

    for (int m0 = 0; m0 < rows; m0 += ROWS) {
      const int m = min(ROWS, padded_rows - m0), used = min(m, rows - m0);
      if (many_integers)
        many.score(m0, m, padded, s.key_step.data, s.key_zero.data, s.key_square.data, scores);
      else if (few_integers)
        few.score(codes(a.keys), n, padded, s.key_step.data, s.key_zero.data, s.key_square.data, norm, scores);
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
        if (a.clamped && !current) correct_clamped(groups, x, c, square, CLAMP * LOG2E, padded), terms = 0;
        if (terms > 4 || (terms && a.mask)) correct(terms, x, c, square, padded), terms = 0;
        if (a.mask) {
          const i64 h = head * plan.repeat + (row0 + row) / a.length, i = (row0 + row) % a.length;
          apply_mask(a, a.mask + (batch * a.mask_b + h * a.mask_h + i * a.mask_l + block.column * a.mask_k) * width_of(a.mask_dtype), x, factor, n);
          factor = 1.f;
        }
        auto raise = [&](float to) {  // the exponents' origin, so that what was summed up shrinks
          const float shrink = exp2f(top[row] - to);
          top[row] = to, sum[row] *= shrink;
          float* o = output + row * value_pitch;
          #pragma omp simd
          for (i64 c = 0; c < dv; c++) o[c] *= shrink;
        };
        if (many_integers) {  // weights are of the block's own scale, which gives their integers the most places
          const float highest = many.origin(x, factor, padded);
          if (highest > top[row]) raise(highest);
          part[r] = highest == -INF ? 0 : exp2f(highest - top[row]);
          if (highest == -INF) {
            for (int j = 0; j < n; j++)
              if (x[j] != x[j]) sum[row] = NAN;
            many.weigh_nothing(r);
          } else {
            sum[row] += part[r] * many.weigh(r, x, highest, padded);
          }
          continue;
        }
        const bool in_place = few_integers || plainly;
        if (in_place || top[row] == -INF) {
          const float highest = highest_score(terms, x, c, square, factor, padded);
          if (highest > top[row]) raise(highest);
        }
        auto* p = weights + r * WEIGHTS;
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
        float range = length[row] * norm_of_keys + std::fabs(top[row]);  // no exponent is further from 0
        for (i64 g = 0; g < terms; g++) range += c[g] * highest_square;
        if (range < 120) {
          const Exponentials e = exponentiate<Op, true>(terms, x, c, square, factor, top[row], p, half_n);
          if (e.sum < 65536 * KEYS) {
            sum[row] += e.sum;
            continue;
          }
        }
        Exponentials e = exponentiate<Op, false>(terms, x, c, square, factor, top[row], p, half_n);
        if (e.highest > 16) {
          raise(top[row] + e.highest);
          e = exponentiate<Op, false>(terms, x, c, square, factor, top[row], p, half_n);
        }
        sum[row] += e.sum;
      }
      if (many_integers)
        many.add_values(m, padded, part, output + m0 * value_pitch);
      else if (few_integers)
        few.add_values(codes(a.values), n, padded, s.value_step.data, s.value_zero.data, scores, output);
      else if (plainly)
        few.add_values_plainly(batch, head, block, scores, output);
      else
        Op::product(m, dv, padded, WEIGHTS, value_pitch, value_pitch, true, weights, values, output + m0 * value_pitch);
    }
  }

  if (plan.splits > 1) {
    for (int r = 0; r < rows; r++) memcpy(plan.partial_output + (unit * plan.tile + r) * dv, output + r * value_pitch, dv * sizeof(float));
    memcpy(plan.partial_top + unit * plan.tile, top, rows * sizeof(float));
    memcpy(plan.partial_sum + unit * plan.tile, sum, rows * sizeof(float));
    return;
  }
  for (int r = 0; r < rows; r++) {
    const i64 h = head * plan.repeat + (row0 + r) / a.length, i = (row0 + r) % a.length;
    const i64 at = ((batch * a.length + i) * a.heads + h) * dv;
    const float inverse = sum[r] == 0 ? 0.f : 1.f / sum[r];  // a row that sees nothing is zero, as PyTorch's
    by_dtype(a.dtype, [&](auto dtype) {
      for (i64 c = 0; c < dv; c++) put(a.output, at + c, output[r * value_pitch + c] * inverse, dtype);
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
    for (i64 c = 0; c < dv; c++) put(a.output, at + c, sum == 0 ? 0.f : row[c] / sum, a.dtype);
    if (a.lse) a.lse[(batch * a.heads + h) * a.length + i] = (top + log2f(sum)) / LOG2E;
  }
}

}  // namespace

bool run(const AttentionCall& a) {
  Plan plan;
  plan.repeat = a.heads / a.kv_heads;
  plan.rows = plan.repeat * a.length;  // query heads that share keys are rows of one product
  plan.few = plan.rows <= a.few && a.keys.bits < 8 && a.values.bits < 8 && a.keys.groups <= 8 && a.values.groups <= 8 &&
             (!a.in_place || FewRows::multiplied_in_place(a));
  plan.many = !plan.few && a.bytes && ManyRows::takes(a);
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
