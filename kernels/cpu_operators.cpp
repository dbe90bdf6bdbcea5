// The `jkv::` operators for CPU tensors, without Python: what a compiled graph or an eager call reaches.
//
// They take the calls that the kernels are made for. All others (a form of the correction, a layout, an error to be
// reported) they pass to the Python implementation in ops.py, which was there before them. `jkv_cpp::` holds the same
// operators without that way out, for tests and for the check that comes before they are installed.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu_kernels.h"

namespace {

using at::Tensor;
using c10::IValue;
typedef torch::jit::Stack Stack;

std::atomic<i64> few_rows{0};
std::atomic<bool> half_precision{true}, byte_products{false}, few_in_place{false};

// Waking a thread takes as long as a few thousand elements.
i64 threads_for(i64 elements) { return elements < 32768 ? 1 : at::get_num_threads(); }

i64 dtype_of(const Tensor& x) {  // -1: none of ours
  switch (x.scalar_type()) {
    case at::kFloat: return FLOAT32;
    case at::kHalf: return FLOAT16;
    case at::kBFloat16: return BFLOAT16;
    case at::kBool: return BOOL;
    default: return -1;
  }
}
bool is_float(const Tensor& x) { return dtype_of(x) >= 0 && dtype_of(x) != BOOL; }

// Planes must be whole 32-bit words, and the bytes of a token lie together.
bool pack(const Tensor& codes, const Tensor& scales, i64 bits, Packed& out) {
  if (codes.dim() != 4 || scales.dim() != 5 || codes.scalar_type() != at::kByte || scales.scalar_type() != at::kHalf) return false;
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) return false;
  const auto size = codes.sizes(), scales_size = scales.sizes(), stride = codes.strides(), scales_stride = scales.strides();
  const i64 dim = size[3] * 8 / bits, groups = scales_size[2], blocks = scales_size[3];
  const bool words = dim % (bits == 3 ? 32 : 32 / bits) == 0 && dim <= 1024 && size[3] * 8 == dim * bits;
  const bool scaled = scales_size[0] == size[0] && scales_size[1] == size[1] && (scales_size[4] == 1 || scales_size[4] == 2) && groups && dim % groups == 0 && blocks && size[2] % blocks == 0;
  if (!words || !scaled || stride[3] != 1 || (scales_size[4] == 2 && scales_stride[4] != 1)) return false;
  out = {(u8*)codes.data_ptr(), stride[0], stride[1], stride[2], (u16*)scales.data_ptr(), scales_stride[0], scales_stride[1],
         scales_stride[2], scales_stride[3], bits, groups, dim, size[2] / blocks, scales_size[4] == 1};
  return true;
}
Plain plain(const Tensor& x) { return {(const char*)x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

bool within(i64 start, i64 stop, const Tensor& codes) { return 0 <= start && start <= stop && stop <= codes.size(2); }

// Each takes the arguments of the operator, does it and returns true, with what it returns in `results`; or returns false.

bool append(const Tensor& codes, const Tensor& scales, const Tensor& source, i64 start, i64 bits, bool do_it) {
  AppendCall call;
  if (!pack(codes, scales, bits, call.cache) || call.cache.block != 1 || !is_float(source) || source.dim() != 4) return false;
  const i64 batch = codes.size(0), heads = codes.size(1), tokens = source.size(2);
  if (source.size(0) != batch || source.size(1) != heads || source.size(3) != call.cache.dim || !within(start, start + tokens, codes)) return false;
  if (!do_it) return true;
  const Tensor rows = source.stride(3) == 1 ? source : source.contiguous();
  call.source = plain(rows), call.dtype = dtype_of(rows), call.batch = batch, call.heads = heads, call.tokens = tokens, call.start = start;
  call.threads = threads_for(source.numel());
  return run(call);
}

bool append(const IValue* a, Stack&) { return append(a[0].toTensor(), a[1].toTensor(), a[2].toTensor(), a[3].toInt(), a[4].toInt(), true); }

bool append_kv(const IValue* a, Stack&) {
  const Tensor &key = a[4].toTensor(), &value = a[5].toTensor();
  if (key.dim() != 4 || value.dim() != 4 || key.size(2) != value.size(2)) return false;
  for (bool do_it : {false, true})
    for (int i : {0, 1})
      if (!append(a[2 * i].toTensor(), a[2 * i + 1].toTensor(), i ? value : key, a[6].toInt(), a[7 + i].toInt(), do_it)) return false;
  return true;
}

bool move(const IValue* a, Stack&) {
  const Tensor& codes = a[0].toTensor();
  const i64 source = a[2].toInt(), destination = a[3].toInt(), length = a[4].toInt();
  MoveCall call;
  if (!pack(codes, a[1].toTensor(), 8, call.cache) || call.cache.block != 1) return false;
  if (length < 0 || !within(source, source + length, codes) || !within(destination, destination + length, codes)) return false;
  call.batch = codes.size(0), call.heads = codes.size(1), call.source = source, call.destination = destination, call.tokens = length;
  call.threads = threads_for(call.batch * call.heads * length * call.cache.dim);
  return run(call);
}

bool fill(const IValue* a, Stack&) {
  const Tensor& codes = a[0].toTensor();
  FillCall call;
  if (!pack(codes, a[1].toTensor(), 8, call.cache) || call.cache.block != 1 || !within(a[2].toInt(), a[3].toInt(), codes)) return false;
  call.batch = codes.size(0), call.heads = codes.size(1), call.start = a[2].toInt(), call.stop = a[3].toInt();
  call.zero = to_half((float)a[4].toDouble());
  return !(call.cache.symmetric && a[4].toDouble() != 0) && run(call);
}

bool dequantize(const IValue* a, Stack& results) {
  const Tensor& codes = a[0].toTensor();
  DequantizeCall call;
  if (!pack(codes, a[1].toTensor(), a[4].toInt(), call.cache) || !within(a[2].toInt(), a[3].toInt(), codes)) return false;
  const i64 batch = codes.size(0), heads = codes.size(1), tokens = a[3].toInt() - a[2].toInt(), dim = call.cache.dim;
  const i64 sizes[] = {batch, heads, tokens, dim}, rows = max<i64>(tokens, 1);
  const i64 strides[] = {max<i64>(heads, 1) * rows * dim, rows * dim, dim, 1};
  const Tensor output = at::detail::empty_strided_cpu(sizes, strides, a[5].toScalarType());
  if (!is_float(output)) return false;
  call.output = (char*)output.data_ptr(), call.dtype = dtype_of(output), call.batch = batch, call.heads = heads, call.tokens = tokens;
  call.start = a[2].toInt(), call.threads = threads_for(output.numel());
  if (!run(call)) return false;
  results.emplace_back(output);
  return true;
}

// What rotates (group_size 0) or rounds `[B, H, L, D]`.
bool rounded(const Tensor& x, bool rotated, i64 group_size, i64 bits, float range, bool symmetric, Stack& results) {
  if (x.dim() != 4 || !is_float(x)) return false;
  const i64 dim = x.size(3);
  if (dim < 1 || dim > MOST_CHANNELS || (group_size && dim % group_size)) return false;
  if (!group_size && (x.stride(3) != 1 || !x.is_non_overlapping_and_dense())) return false;  // laid out as torch.empty_like
  const Tensor rows = x.stride(3) == 1 ? x : x.contiguous();
  const auto size = rows.sizes();
  const i64 in_order[] = {size[1] * size[2] * dim, size[2] * dim, dim, 1};
  const Tensor output = at::detail::empty_strided_cpu(size, group_size ? at::IntArrayRef(in_order) : rows.strides(), group_size ? at::kFloat : rows.scalar_type());
  RoundCall call{plain(rows), plain(output), dtype_of(rows), size[0], size[1], size[2], dim, rotated ? 0 : dim & -dim, group_size, bits, range, symmetric};
  call.threads = threads_for(rows.numel());
  if (!run(call)) return false;
  results.emplace_back(output);
  return true;
}

bool rotate(const IValue* a, Stack& results) { return rounded(a[0].toTensor(), false, 0, 0, 0, false, results); }

template <bool ROTATED> bool round(const IValue* a, Stack& results) {
  const i64 bits = a[1].toInt();
  const float range = bits == 2 ? 1.494f : bits == 3 ? 2.051f : bits == 4 ? 2.514f : INF;  // quantizers.NORMAL_RANGE
  if ((bits != 2 && bits != 3 && bits != 4 && bits != 8) || a[2].toInt() < 1) return false;
  return rounded(a[0].toTensor(), ROTATED, a[2].toInt(), bits, range, a[3].toBool(), results);
}

// The arguments from the keys on: key, value, mask, causal, scale, key_bits, value_bits, correction.
bool attention(const IValue* cache, const IValue* rest, AttentionCall& call, bool with_lse, Stack& results) {
  const Tensor &query = cache[0].toTensor(), &key = rest[0].toTensor(), &value = rest[1].toTensor();
  const auto correction = rest[7].toStringView();
  call.scale = (float)rest[4].toDouble(), call.causal = rest[3].toBool(), call.clamped = correction == "clamped";
  call.correction = call.clamped || correction == "taylor";
  if ((!call.correction && correction != "none") || !(call.scale > 0)) return false;
  if (!pack(cache[1].toTensor(), cache[2].toTensor(), rest[5].toInt(), call.keys)) return false;
  if (!pack(cache[3].toTensor(), cache[4].toTensor(), rest[6].toInt(), call.values)) return false;
  if (!is_float(query) || key.scalar_type() != query.scalar_type() || value.scalar_type() != query.scalar_type()) return false;
  if (query.dim() != 4 || key.dim() != 4 || value.dim() != 4 || query.numel() == 0) return false;
  const i64 batch = query.size(0), heads = query.size(1), length = query.size(2), kv_heads = key.size(1), dv = call.values.dim;
  const i64 shared[] = {batch, kv_heads, key.size(2)};
  const bool fits = kv_heads && heads % kv_heads == 0 && query.size(3) == call.keys.dim && key.size(3) == call.keys.dim && value.size(3) == dv &&
                    key.sizes().slice(0, 3) == at::IntArrayRef(shared) && value.sizes().slice(0, 3) == at::IntArrayRef(shared) &&
                    cache[1].toTensor().sizes().slice(0, 2) == at::IntArrayRef(shared, 2) && cache[3].toTensor().sizes().slice(0, 2) == at::IntArrayRef(shared, 2);
  if (!fits) return false;
  call.dtype = dtype_of(query), call.batch = batch, call.heads = heads, call.length = length, call.kv_heads = kv_heads;

  const Tensor rows = query.stride(3) == 1 ? query : query.contiguous();
  const Tensor keys = key.stride(3) == 1 ? key : key.contiguous(), values = value.stride(3) == 1 ? value : value.contiguous();
  call.query = plain(rows);
  i64 columns = 0, row = 0;
  for (const Span& span : call.spans) columns += span.stop - span.start, row += span.packed ? 0 : span.stop - span.start;
  if (key.size(2)) call.spans.push_back({false, 0, key.size(2), columns, plain(keys), plain(values), row});
  columns += key.size(2), call.current = row + key.size(2);
  if (columns == 0) return false;

  Tensor mask;
  call.mask = nullptr;
  if (!rest[2].isNone()) {
    const i64 sizes[] = {batch, heads, length, columns};
    if (dtype_of(rest[2].toTensor()) < 0) return false;
    mask = rest[2].toTensor().expand(sizes);
    call.mask = (const char*)mask.data_ptr(), call.mask_dtype = dtype_of(mask);
    call.mask_b = mask.stride(0), call.mask_h = mask.stride(1), call.mask_l = mask.stride(2), call.mask_k = mask.stride(3);
  }
  const i64 sizes[] = {batch, heads, length, dv}, strides[] = {length * heads * dv, dv, heads * dv, 1};
  const Tensor output = at::detail::empty_strided_cpu(sizes, strides, query.scalar_type());
  call.output = (char*)output.data_ptr();
  Tensor lse;
  call.lse = nullptr;
  if (with_lse) {
    lse = at::detail::empty_strided_cpu(at::IntArrayRef(sizes, 3), {heads * length, length, 1}, at::kFloat);
    call.lse = lse.data_ptr<float>();
  }
  call.threads = threads_for(query.numel() * columns / 64);
  call.exact = call.dtype == FLOAT32 || !half_precision;
  call.few = call.dtype == FLOAT32 ? 0 : few_rows.load(), call.bytes = call.dtype != FLOAT32 && byte_products;
  call.in_place = few_in_place;
  TORCH_CHECK(run(call), "jkv: torch's brgemm failed in the CPU attention kernel; set JKV_CPU_KERNEL=torch");
  results.emplace_back(output);
  if (with_lse) results.emplace_back(lse);
  return true;
}

void add_packed(AttentionCall& call, i64 start, i64 stop, i64 column) {
  if (start < stop) call.spans.push_back({true, start, stop, column, {}, {}, 0});
}

template <bool LSE> bool attention(const IValue* a, Stack& results) {
  if (!a[5].isIntList()) return false;
  const auto ranges = a[5].toIntList();
  AttentionCall call;
  i64 column = 0;
  for (size_t i = 0; i + 1 < ranges.size(); i += 2) {
    const i64 start = ranges[i], stop = ranges[i + 1];
    if (!within(start, stop, a[1].toTensor()) || !within(start, stop, a[3].toTensor())) return false;
    add_packed(call, start, stop, column);
    column += stop - start;
  }
  return attention(a, a + 6, call, LSE, results);
}

// What is active is attended where it lies: neither it nor the mask is copied.
template <bool LSE> bool attention_active(const IValue* a, Stack& results) {
  const Tensor &query = a[0].toTensor(), &key = a[5].toTensor(), &value = a[7].toTensor();
  for (int i : {6, 8})
    if (a[i].toTensor().scalar_type() != at::kLong || a[i].toTensor().numel() != 2 || !a[i].toTensor().is_contiguous()) return false;
  const i64 *written = a[6].toTensor().data_ptr<i64>(), *values_written = a[8].toTensor().data_ptr<i64>();
  const i64 start = a[9].toInt(), stop = a[10].toInt();
  if (!within(start, stop, a[1].toTensor()) || !within(start, stop, a[3].toTensor())) return false;
  const i64 first = min(max(written[0], start), stop), last = min(max(written[1], start), stop);
  AttentionCall call;
  if (written[0] != values_written[0] || written[1] != values_written[1] || first >= last) {
    add_packed(call, start, stop, 0);
  } else {
    const i64 shared[] = {query.size(0), a[11].toTensor().size(1)};
    for (const Tensor* x : {&key, &value})
      if (x->dim() != 4 || x->stride(3) != 1 || x->scalar_type() != query.scalar_type() || x->sizes().slice(0, 2) != at::IntArrayRef(shared) || x->size(2) < last - written[0] ||
          x->size(3) != a[x == &key ? 11 : 12].toTensor().size(3))
        return false;
    add_packed(call, start, first, 0);
    call.spans.push_back({false, first - written[0], last - written[0], first - start, plain(key), plain(value), 0});
    add_packed(call, last, stop, last - start);
  }
  return attention(a, a + 11, call, LSE, results);
}

// Tokens start … stop - 1, in rows `row` … of one of the tensors that hold tokens in full precision (held.py).
struct Run {
  i64 start, stop, row;
  size_t tensor;
};

bool runs_of(const c10::List<Tensor>& told, std::vector<Run>& runs) {
  for (size_t i = 0; i < told.size(); i++) {
    const Tensor ranges = told[i];
    if (ranges.scalar_type() != at::kLong || !ranges.is_cpu()) return false;
    const i64* data = ranges.data_ptr<i64>();
    if (ranges.dim() == 1 && ranges.size(0) == 2) {
      if (data[0] < data[ranges.stride(0)]) runs.push_back({data[0], data[ranges.stride(0)], 0, i});
      continue;
    }
    if (ranges.dim() != 3 || ranges.size(0) < 1 || ranges.size(2) != 4 || ranges.stride(2) != 1) return false;
    for (i64 region = 0; region < ranges.size(1); region++) {
      const i64* first = data + region * ranges.stride(1);
      for (i64 b = 1; b < ranges.size(0); b++)
        if (!std::equal(first, first + 4, first + b * ranges.stride(0))) return false;  // entries differ: in Python
      if (first[0] < first[1]) runs.push_back({first[0], first[1], first[2], i});
    }
  }
  return true;
}

const Run* run_with(const std::vector<Run>& runs, i64 token) {
  for (const Run& run : runs)
    if (run.start <= token && token < run.stop) return &run;
  return nullptr;
}

// What is held in full precision is attended where it lies: neither it nor the mask is copied.
template <bool LSE> bool attention_held(const IValue* a, Stack& results) {
  if (!a[9].isIntList()) return false;
  const Tensor& query = a[0].toTensor();
  const c10::List<Tensor> keys = a[5].toTensorList(), values = a[7].toTensorList();
  const i64 shared[] = {query.size(0), a[10].toTensor().size(1)};
  for (bool of_keys : {true, false})
    for (const Tensor x : of_keys ? keys : values)
      if (x.dim() != 4 || x.stride(3) != 1 || x.scalar_type() != query.scalar_type() || x.sizes().slice(0, 2) != at::IntArrayRef(shared) ||
          x.size(3) != a[of_keys ? 10 : 11].toTensor().size(3))
        return false;
  std::vector<Run> key_runs, value_runs;
  if (!runs_of(a[6].toTensorList(), key_runs) || !runs_of(a[8].toTensorList(), value_runs)) return false;
  std::vector<i64> bounds;
  for (const auto* runs : {&key_runs, &value_runs})
    for (const Run& run : *runs) {
      const auto& tensors = runs == &key_runs ? keys : values;
      if (run.row < 0 || run.row + run.stop - run.start > tensors.get(run.tensor).size(2)) return false;
      bounds.push_back(run.start), bounds.push_back(run.stop);
    }
  std::sort(bounds.begin(), bounds.end());

  const auto ranges = a[9].toIntList();
  AttentionCall call;
  i64 column = 0, row = 0;
  for (size_t i = 0; i + 1 < ranges.size(); i += 2) {
    const i64 start = ranges[i], stop = ranges[i + 1];
    if (!within(start, stop, a[1].toTensor()) || !within(start, stop, a[3].toTensor())) return false;
    i64 packed = start;  // from here to `at`, nothing is held
    for (i64 at = start, end; at < stop; at = end) {
      const auto next = std::upper_bound(bounds.begin(), bounds.end(), at);
      end = next == bounds.end() ? stop : min(*next, stop);
      const Run *key = run_with(key_runs, at), *value = run_with(value_runs, at);
      if (!key || !value) continue;
      add_packed(call, packed, at, column + packed - start);
      Plain k = plain(keys.get(key->tensor)), v = plain(values.get(value->tensor));
      const i64 width = query.element_size();
      k.data += (key->row + at - key->start) * k.s * width, v.data += (value->row + at - value->start) * v.s * width;
      call.spans.push_back({false, 0, end - at, column + at - start, k, v, row});
      row += end - at, packed = end;
    }
    add_packed(call, packed, stop, column + packed - start);
    column += stop - start;
  }
  return attention(a, a + 10, call, LSE, results);
}

template <int N, bool (*F)(const IValue*, Stack&)> struct Operator {
  static bool attempt(Stack* stack) {
    Stack results;
    if (!F(stack->data() + stack->size() - N, results)) return false;
    torch::jit::drop(*stack, N);
    for (IValue& result : results) stack->push_back(std::move(result));
    return true;
  }
  static inline std::optional<c10::SafeKernelFunction> python;
  static void or_python(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    if (!attempt(stack)) python->callBoxed(op, keys, stack);
  }
  static void or_error(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    if (!attempt(stack)) C10_THROW_ERROR(NotImplementedError, toString(op.operator_name()) + ": no C++ kernel takes these arguments");
  }
};

// f(name, operator) for each of ours.
template <class F> void for_each(F f) {
  f("append", Operator<5, append>());
  f("append_kv", Operator<9, append_kv>());
  f("move", Operator<5, move>());
  f("fill", Operator<5, fill>());
  f("dequantize", Operator<6, dequantize>());
  f("rotate", Operator<1, rotate>());
  f("round_unbiased", Operator<4, round<false>>());
  f("round_rotated", Operator<4, round<true>>());
  f("attention", Operator<14, attention<false>>());
  f("attention_lse", Operator<14, attention<true>>());
  f("attention_active", Operator<19, attention_active<false>>());
  f("attention_active_lse", Operator<19, attention_active<true>>());
  f("attention_held", Operator<18, attention_held<false>>());
  f("attention_held_lse", Operator<18, attention_held<true>>());
}

c10::OperatorHandle find(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow((std::string("jkv::") + name).c_str(), ""); }

template <class F> std::string message_of(F f) {
  try {
    f();
    return "";
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace

extern "C" {  // the libraries are never destroyed: that would race with the end of the process

void jkv_configure(i64 rows, bool half, bool bytes, bool in_place) {
  few_rows = rows, half_precision = half, byte_products = bytes, few_in_place = in_place;
}

// Whether the compiler had instructions for products of bytes.
bool jkv_multiplies_bytes() {
#if defined(__AVX512VNNI__) || defined(__AVX2__)
  return true;
#else
  return false;
#endif
}

// Defines `jkv_cpp::`, once. Returns null, or what went wrong.
const char* jkv_define() {
  static const std::string error = message_of([] {
    auto& definitions = *new torch::Library(torch::Library::FRAGMENT, "jkv_cpp", std::nullopt, __FILE__, __LINE__);
    auto& kernels = *new torch::Library(torch::Library::IMPL, "jkv_cpp", c10::DispatchKey::CPU, __FILE__, __LINE__);
    auto add = [&](const char* name, auto op) {
      definitions.def(find(name).schema().cloneWithName(std::string("jkv_cpp::") + name, ""));
      kernels.impl(name, torch::CppFunction::makeFromBoxedFunction<decltype(op)::or_error>());
    };
    for_each(add);
  });
  return error.empty() ? nullptr : error.c_str();
}

// From now on `jkv::` operators on CPU tensors run here. Returns null, or what went wrong.
const char* jkv_install() {
  static const std::string error = message_of([] {
    auto& kernels = *new torch::Library(torch::Library::IMPL, "jkv", c10::DispatchKey::CPU, __FILE__, __LINE__);
    auto add = [&](const char* name, auto op) {
      typedef decltype(op) Op;
      Op::python.emplace(find(name).getComputedKernelForDispatchKey(c10::DispatchKey::CPU));
      kernels.impl(name, torch::CppFunction::makeFromBoxedFunction<Op::or_python>());
    };
    for_each(add);
  });
  return error.empty() ? nullptr : error.c_str();
}

}  // extern "C"
