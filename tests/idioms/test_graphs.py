"""The graph of every way of holding a cache, before and after: lines that go, and lines that come."""

from __future__ import annotations

import difflib
import re
from collections import Counter

import expecttest

from .test_two_bits import run


def changes(name: str, **settings: int) -> str:
    """All graphs over packed caches, one after the other; without their inputs."""
    graphs = []
    for before, after in run(name, **settings).graphs:
        lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
        left_out = ("---", "+++", "@@", "-inputs", "+inputs")
        graphs.append("".join(f"{line[0]} {line[1:]}\n" for line in lines if not line.startswith(left_out)))
    return renumbered("---\n".join(graphs))


def renumbered(text: str) -> str:
    """Names of nodes numbered in the order in which they are met: releases of torch number them differently."""
    known: dict[str, str] = {}
    met: Counter[str] = Counter()

    def name_of(match: re.Match[str]) -> str:
        name, stem = match[0], match[1]
        if name not in known:
            known[name] = f"{stem}_{met[stem]}" if met[stem] else stem
            met[stem] += 1
        return known[name]

    return re.sub(r"(?<![\w.'])(?<!::)([A-Za-z_]+?)(?:_(\d+))?(?![\w(=])", name_of, text)


class TestGraphs(expecttest.TestCase):
    def test_eviction_by_rolling_with_a_sink(self) -> None:
        self.assertExpectedInline(
            changes("eviction by rolling, with a sink"),
            """\
- l_cache_k_[:, sub:sub_1] = l_k_
- l_cache_v_[:, sub:sub_1] = l_v_
- getitem = l_cache_k_[:, :sub_1]
- getitem_1 = l_cache_v_[:, :sub_1]
+ permute = l_k_.permute([0, 2, 1, 3])
+ permute_1 = l_v_.permute([0, 2, 1, 3])
+ jkv::append_kv(l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, permute, permute_1, sub, 2, 2)
- transpose = getitem.transpose(1, 2)
- transpose_1 = getitem_1.transpose(1, 2)
- o = scaled_dot_product_attention(transpose_2, transpose, transpose_1, attn_mask=None)
- transpose_3 = o.transpose(1, 2)
+ permute_2 = l_k_.permute([0, 2, 1, 3])
+ permute_3 = l_v_.permute([0, 2, 1, 3])
+ attention_default = jkv::attention(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, sub], permute_2, permute_3, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_default.transpose(1, 2)
---
- getitem = l_cache_k_[:, add:l_stack1_]
- old = getitem.clone()
- l_cache_k_[:, 4:add_1] = old
- getitem_1 = l_cache_v_[:, add:l_stack1_]
- old_1 = getitem_1.clone()
+ jkv::move(l_cache_k__codes, l_cache_k__scales, add, 4, 20)
- l_cache_v_[:, 4:add_2] = old_1
+ jkv::move(l_cache_v__codes, l_cache_v__scales, add, 4, 20)
- l_cache_k_[:, sub_2:sub_3] = l_k_
- l_cache_v_[:, sub_2:sub_3] = l_v_
- getitem_2 = l_cache_k_[:, :sub_3]
- getitem_3 = l_cache_v_[:, :sub_3]
+ permute = l_k_.permute([0, 2, 1, 3])
+ permute_1 = l_v_.permute([0, 2, 1, 3])
+ jkv::append_kv(l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, permute, permute_1, sub_2, 2, 2)
- transpose = getitem_2.transpose(1, 2)
- transpose_1 = getitem_3.transpose(1, 2)
- o = scaled_dot_product_attention(transpose_2, transpose, transpose_1, attn_mask=None)
- transpose_3 = o.transpose(1, 2)
+ permute_2 = l_k_.permute([0, 2, 1, 3])
+ permute_3 = l_v_.permute([0, 2, 1, 3])
+ attention_default = jkv::attention(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, 4, 4, 24], permute_2, permute_3, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_default.transpose(1, 2)
""",
        )

    def test_a_fixed_past_concatenated(self) -> None:
        self.assertExpectedInline(
            changes("a fixed past, concatenated"),
            """\
- past_k = l_past_0_.to(torch.float32)
- past_v = l_past_1_.to(torch.float32)
- k = cat([past_k, transpose], dim=2)
- v = cat([past_v, transpose_1], dim=2)
- o = scaled_dot_product_attention(q, k, v)
- transpose_2 = o.transpose(1, 2)
+ attention_active_default = jkv::attention_active(q, l_past_0__codes, l_past_0__scales, l_past_1__codes, l_past_1__scales, l_past_0__active, l_past_0__active_range, l_past_1__active, l_past_1__active_range, 0, 8, transpose, transpose_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_2 = attention_active_default.transpose(1, 2)
""",
        )

    def test_a_fixed_past_turned_after_the_read(self) -> None:
        self.assertExpectedInline(
            changes("a fixed past, turned after the read"),
            """\
- past_k = l_past_0_.to(torch.float32)
- past_v = l_past_1_.to(torch.float32)
- k = cat([past_k, transpose], dim=2)
+ select = l_past_0__scales.select(-1, 0)
+ narrow = narrow(select, 3, 0, 8)
+ float = narrow.float()
+ transpose_1 = float.transpose(2, 3)
+ mul = mul(transpose_1, 0.25)
+ repeat_interleave = mul.repeat_interleave(32, -1)
+ _outside = _outside(repeat_interleave, l_past_0__active_range, 0)
+ to = _outside.to(torch.float32)
+ zeros_like = zeros_like(transpose)
+ k_1 = cat([to, zeros_like], dim=2)
+ dequantize_active_default = jkv::dequantize_active(l_past_0__codes, l_past_0__scales, l_past_0__active, l_past_0__active_range, 0, 8, 2, torch.float32)
+ k = cat([dequantize_active_default, transpose], dim=2)
- v = cat([past_v, transpose_2], dim=2)
+ dequantize_active_default_1 = jkv::dequantize_active(l_past_1__codes, l_past_1__scales, l_past_1__active, l_past_1__active_range, 0, 8, 2, torch.float32)
+ v = cat([dequantize_active_default_1, transpose_2], dim=2)
+ transpose_3 = k_1.transpose(1, 2)
+ a = transpose_3[Ellipsis, 0::2]
+ b = transpose_3[Ellipsis, 1::2]
+ mul_1 = mul(a, cos)
+ mul_2 = mul(b, sin)
+ sub = sub(mul_1, mul_2)
+ mul_3 = mul(a, sin)
+ mul_4 = mul(b, cos)
+ add = add(mul_3, mul_4)
+ stack = stack((sub, add), -1)
+ flatten = stack.flatten(-2)
+ k_2 = flatten.transpose(1, 2)
- o = scaled_dot_product_attention(q, k_3, v)
- transpose_4 = o.transpose(1, 2)
+ float_1 = k_2.float()
+ square = float_1.square()
+ unflatten = square.unflatten(-1, (1, -1))
+ mean = unflatten.mean(-1)
+ attention_dense_default = jkv::attention_dense(q, k_3, v, mean, None, False, 0.17677669529663687, 0, 'taylor')
+ transpose_4 = attention_dense_default.transpose(1, 2)
""",
        )

    def test_a_fixed_past_turned_in_halves_after_the_read(self) -> None:
        self.assertExpectedInline(
            changes("a fixed past, turned in halves after the read"),
            """\
- past_k = l_past_0_.to(torch.float32)
- past_v = l_past_1_.to(torch.float32)
- k = cat([past_k, transpose], dim=2)
+ select = l_past_0__scales.select(-1, 0)
+ narrow = narrow(select, 3, 0, 8)
+ float = narrow.float()
+ transpose_1 = float.transpose(2, 3)
+ mul = mul(transpose_1, 0.25)
+ repeat_interleave = mul.repeat_interleave(32, -1)
+ unpaired = unpaired(repeat_interleave, 64, 32)
+ _outside = _outside(unpaired, l_past_0__active_range, 0)
+ to = _outside.to(torch.float32)
+ zeros_like = zeros_like(transpose)
+ k_1 = cat([to, zeros_like], dim=2)
+ to_grid_default = jkv::to_grid(l_past_0__active, 'rtn/pairs64', 32)
+ dequantize_active_default = jkv::dequantize_active(l_past_0__codes, l_past_0__scales, to_grid_default, l_past_0__active_range, 0, 8, 2, torch.float32)
+ from_grid_default = jkv::from_grid(dequantize_active_default, 'rtn/pairs64', 32)
+ k = cat([from_grid_default, transpose], dim=2)
- v = cat([past_v, transpose_2], dim=2)
+ dequantize_active_default_1 = jkv::dequantize_active(l_past_1__codes, l_past_1__scales, l_past_1__active, l_past_1__active_range, 0, 8, 2, torch.float32)
+ v = cat([dequantize_active_default_1, transpose_2], dim=2)
+ transpose_3 = k_1.transpose(1, 2)
+ chunk = transpose_3.chunk(2, -1)
+ a = chunk[0]
+ b = chunk[1]
+ mul_1 = mul(a, cos)
+ mul_2 = mul(b, sin)
+ sub = sub(mul_1, mul_2)
+ mul_3 = mul(a, sin)
+ mul_4 = mul(b, cos)
+ add = add(mul_3, mul_4)
+ cat = cat((sub, add), -1)
+ k_2 = cat.transpose(1, 2)
- o = scaled_dot_product_attention(q, k_3, v)
- transpose_4 = o.transpose(1, 2)
+ float_1 = k_2.float()
+ square = float_1.square()
+ grouped = grouped(square, 2, 64)
+ mean = grouped.mean(-1)
+ attention_dense_default = jkv::attention_dense(q, k_3, v, mean, None, False, 0.125, 64, 'taylor')
+ transpose_4 = attention_dense_default.transpose(1, 2)
""",
        )

    def test_a_fixed_past_its_batch_doubled(self) -> None:
        self.assertExpectedInline(
            changes("a fixed past, its batch doubled"),
            """\
- past_k = l_past_0_.to(torch.float32)
- past_v = l_past_1_.to(torch.float32)
- past_k_1 = past_k.repeat(2, 1, 1, 1)
- past_v_1 = past_v.repeat(2, 1, 1, 1)
+ select = l_past_0__scales.select(-1, 0)
+ narrow = narrow(select, 3, 0, 8)
+ float = narrow.float()
+ transpose = float.transpose(2, 3)
+ mul = mul(transpose, 0.25)
+ repeat_interleave = mul.repeat_interleave(32, -1)
+ _outside = _outside(repeat_interleave, l_past_0__active_range, 0)
+ to = _outside.to(torch.float32)
+ past_k_2 = to.repeat(2, 1, 1, 1)
+ dequantize_active_default = jkv::dequantize_active(l_past_0__codes, l_past_0__scales, l_past_0__active, l_past_0__active_range, 0, 8, 2, torch.float32)
+ past_k_1 = dequantize_active_default.repeat(2, 1, 1, 1)
+ dequantize_active_default_1 = jkv::dequantize_active(l_past_1__codes, l_past_1__scales, l_past_1__active, l_past_1__active_range, 0, 8, 2, torch.float32)
+ past_v_1 = dequantize_active_default_1.repeat(2, 1, 1, 1)
+ zeros_like = zeros_like(transpose_1)
+ k = cat([past_k_2, zeros_like], dim=2)
- o = scaled_dot_product_attention(q, k_1, v)
- transpose_2 = o.transpose(1, 2)
+ float_1 = k.float()
+ square = float_1.square()
+ unflatten = square.unflatten(-1, (1, -1))
+ mean = unflatten.mean(-1)
+ attention_dense_default = jkv::attention_dense(q, k_1, v, mean, None, False, 0.17677669529663687, 0, 'taylor')
+ transpose_2 = attention_dense_default.transpose(1, 2)
""",
        )

    def test_a_concatenation_that_grows_and_is_returned(self) -> None:
        self.assertExpectedInline(
            changes("a concatenation that grows and is returned"),
            """\
- k = cat([l_past_0_, k_1], 2)
- v = cat([l_past_1_, v_1], 2)
- o = scaled_dot_product_attention(transpose, k, v)
- transpose_1 = o.transpose(1, 2)
+ attention_active_default = jkv::attention_active(transpose, l_past_0__codes, l_past_0__scales, l_past_1__codes, l_past_1__scales, l_past_0__active, l_past_0__active_range, l_past_1__active, l_past_1__active_range, 0, s69, k_1, v_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_1 = attention_active_default.transpose(1, 2)
- return (linear, k, v)
+ add = add(8, s69)
+ mul = mul(64, s69)
+ add_1 = add(512, mul)
+ mul_1 = mul(32, s69)
+ add_2 = add(256, mul_1)
+ extend_default = jkv::extend(l_past_0__codes, l_past_0__scales, [], k_1, 2)
+ getitem = extend_default[0]
+ getitem_1 = extend_default[1]
+ mul_2 = mul(64, s69)
+ add_3 = add(512, mul_2)
+ mul_3 = mul(32, s69)
+ add_4 = add(256, mul_3)
+ add_5 = add(8, s89)
+ mul_4 = mul(64, s89)
+ add_6 = add(512, mul_4)
+ mul_5 = mul(32, s89)
+ add_7 = add(256, mul_5)
+ extend_default_1 = jkv::extend(l_past_1__codes, l_past_1__scales, [], v_1, 2)
+ getitem_2 = extend_default_1[0]
+ getitem_3 = extend_default_1[1]
+ mul_6 = mul(64, s89)
+ add_8 = add(512, mul_6)
+ mul_7 = mul(32, s89)
+ add_9 = add(256, mul_7)
+ return (linear, 1, 2, add, 32, add_1, add_2, 32, 1, 0, getitem, getitem_1, add_3, add_4, 32, 1, 1, 2, add_5, 32, add_6, add_7, 32, 1, 0, getitem_2, getitem_3, add_8, add_9, 32, 1)
""",
        )

    def test_a_concatenation_that_grows_and_is_returned_without_its_last_tokens(self) -> None:
        """What is made anew holds the tokens that are returned, and no others."""
        self.assertExpectedInline(
            changes("a concatenation that grows and is returned without its last tokens"),
            """\
- k = cat([l_past_0_, k_1], 2)
- v = cat([l_past_1_, v_1], 2)
- o = scaled_dot_product_attention(transpose, k, v)
- transpose_1 = o.transpose(1, 2)
+ attention_active_default = jkv::attention_active(transpose, l_past_0__codes, l_past_0__scales, l_past_1__codes, l_past_1__scales, l_past_0__active, l_past_0__active_range, l_past_1__active, l_past_1__active_range, 0, s69, k_1, v_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_1 = attention_active_default.transpose(1, 2)
- getitem = k[:, :, :-4]
- getitem_1 = v[:, :, :-4]
- return (linear, getitem, getitem_1)
+ add = add(4, s69)
+ mul = mul(64, s69)
+ add_1 = add(256, mul)
+ mul_1 = mul(32, s69)
+ add_2 = add(128, mul_1)
+ narrow = narrow(k_1, 2, 0, 4)
+ extend_default = jkv::extend(l_past_0__codes, l_past_0__scales, [], narrow, 2)
+ getitem_2 = extend_default[0]
+ getitem_3 = extend_default[1]
+ mul_2 = mul(64, s69)
+ add_3 = add(256, mul_2)
+ mul_3 = mul(32, s69)
+ add_4 = add(128, mul_3)
+ add_5 = add(4, s89)
+ mul_4 = mul(64, s89)
+ add_6 = add(256, mul_4)
+ mul_5 = mul(32, s89)
+ add_7 = add(128, mul_5)
+ narrow_1 = narrow(v_1, 2, 0, 4)
+ extend_default_1 = jkv::extend(l_past_1__codes, l_past_1__scales, [], narrow_1, 2)
+ getitem_4 = extend_default_1[0]
+ getitem_5 = extend_default_1[1]
+ mul_6 = mul(64, s89)
+ add_8 = add(256, mul_6)
+ mul_7 = mul(32, s89)
+ add_9 = add(128, mul_7)
+ return (linear, 1, 2, add, 32, add_1, add_2, 32, 1, 0, getitem_2, getitem_3, add_3, add_4, 32, 1, 1, 2, add_5, 32, add_6, add_7, 32, 1, 0, getitem_4, getitem_5, add_8, add_9, 32, 1)
""",
        )

    def test_keys_beside_values_in_one_tensor(self) -> None:
        self.assertExpectedInline(
            changes("keys beside values in one tensor"),
            """\
- getitem = l_keys_[None]
- getitem_1 = l_values_[None]
- transpose = getitem.transpose(1, 2)
- transpose_1 = getitem_1.transpose(1, 2)
- o = scaled_dot_product_attention(transpose_2, transpose, transpose_1, attn_mask=None)
- transpose_3 = o.transpose(1, 2)
+ select = l_keys__scales.select(-1, 0)
+ narrow = narrow(select, 3, 0, s23)
+ float = narrow.float()
+ transpose_4 = float.transpose(2, 3)
+ mul = mul(transpose_4, 0.25)
+ repeat_interleave = mul.repeat_interleave(32, -1)
+ _outside = _outside(repeat_interleave, l_keys__active_range, 0)
+ to = _outside.to(torch.float32)
+ mul_1 = mul(128, l_keys__first_token)
+ add = add(-256, mul_1)
+ narrow_1 = narrow(to, 3, add, 32)
+ float_1 = narrow_1.float()
+ square = float_1.square()
+ unflatten = square.unflatten(-1, (1, -1))
+ mean = unflatten.mean(-1)
+ dequantize_active_default = jkv::dequantize_active(l_keys__codes, l_keys__scales, l_keys__active, l_keys__active_range, 0, s23, 2, torch.float32)
+ mul_2 = mul(128, l_keys__first_token)
+ add_1 = add(-256, mul_2)
+ narrow_2 = narrow(dequantize_active_default, 3, add_1, 32)
+ dequantize_active_default_1 = jkv::dequantize_active(l_values__codes, l_values__scales, l_values__active, l_values__active_range, 0, s59, 2, torch.float32)
+ mul_3 = mul(128, l_values__first_token)
+ add_2 = add(-224, mul_3)
+ narrow_3 = narrow(dequantize_active_default_1, 3, add_2, 32)
+ attention_dense_default = jkv::attention_dense(transpose_2, narrow_2, narrow_3, mean, None, False, 0.17677669529663687, 0, 'taylor')
+ transpose_3 = attention_dense_default.transpose(1, 2)
---
- past = l_cache_[:l_start_]
- l_cache_[l_start_:add] = kv
- kv_1 = cat([past, kv], 0)
- chunk = kv_1.chunk(2, -1)
- keys = chunk[0]
- values = chunk[1]
- return (q, keys, values)
+ unsqueeze = kv.unsqueeze(-1)
+ permute = unsqueeze.permute([3, 1, 0, 2])
+ jkv::append(l_cache__codes, l_cache__scales, permute, l_start_, 2)
+ unsqueeze_1 = kv.unsqueeze(-1)
+ permute_1 = unsqueeze_1.permute([3, 1, 0, 2])
+ extend_default = jkv::extend(l_cache__codes, l_cache__scales, [0, l_start_], permute_1, 2)
+ getitem = extend_default[0]
+ getitem_2 = extend_default[1]
+ clone = permute_1.clone(memory_format=torch.contiguous_format)
+ unsqueeze_2 = kv.unsqueeze(-1)
+ permute_2 = unsqueeze_2.permute([3, 1, 0, 2])
+ clone_1 = permute_2.clone(memory_format=torch.contiguous_format)
+ return (q, add, 2, 32, 128, 64, 1, 0, getitem, getitem_2, 1, 64, 128, 1, clone, l_start_, add, add, 2, 32, 128, 64, 1, 32, clone_1, l_start_, add)
""",
        )

    def test_keys_and_values_stacked_written_by_another_graph(self) -> None:
        self.assertExpectedInline(
            changes("keys and values stacked, written by another graph"),
            """\
- l_cache_[0, :, :, l_start_:add] = transpose
+ narrow = narrow(l_cache__codes, 0, 0, 1)
+ narrow_1 = narrow(l_cache__scales, 0, 0, 1)
+ jkv::append(narrow, narrow_1, transpose, l_start_, 2)
- l_cache_[1, :, :, l_start_:add] = transpose_1
- return ()
+ narrow_2 = narrow(l_cache__codes, 0, 1, 1)
+ narrow_3 = narrow(l_cache__scales, 0, 1, 1)
+ jkv::append(narrow_2, narrow_3, transpose_1, l_start_, 2)
+ cat = cat([transpose, transpose_1], 0)
+ clone = cat.clone(memory_format=torch.contiguous_format)
+ return (clone, l_start_, add)
---
- getitem = l_cache_[0, :, :, :l_length_]
- keys = cat([getitem, transpose], 2)
- getitem_1 = l_cache_[1, :, :, :l_length_]
- values = cat([getitem_1, transpose_1], 2)
- o = scaled_dot_product_attention(transpose_2, keys, values)
- transpose_3 = o.transpose(1, 2)
+ narrow = narrow(l_cache__codes, 0, 0, 1)
+ narrow_1 = narrow(l_cache__scales, 0, 0, 1)
+ narrow_2 = narrow(l_cache__codes, 0, 1, 1)
+ narrow_3 = narrow(l_cache__scales, 0, 1, 1)
+ narrow_4 = narrow(l_cache__active, 0, 0, 1)
+ narrow_5 = narrow(l_cache__active, 0, 1, 1)
+ attention_active_default = jkv::attention_active(transpose_2, narrow, narrow_1, narrow_2, narrow_3, narrow_4, l_cache__active_range, narrow_5, l_cache__active_range, 0, l_length_, transpose, transpose_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_active_default.transpose(1, 2)
""",
        )

    def test_keys_and_values_stacked_batch_of_two(self) -> None:
        self.assertExpectedInline(
            changes("keys and values stacked, batch of two"),
            """\
- l_cache_[0, :, :, l_start_:add] = transpose
+ narrow = narrow(l_cache__codes, 0, 0, 2)
+ narrow_1 = narrow(l_cache__scales, 0, 0, 2)
+ jkv::append(narrow, narrow_1, transpose, l_start_, 2)
- l_cache_[1, :, :, l_start_:add] = transpose_1
- return ()
+ narrow_2 = narrow(l_cache__codes, 0, 2, 2)
+ narrow_3 = narrow(l_cache__scales, 0, 2, 2)
+ jkv::append(narrow_2, narrow_3, transpose_1, l_start_, 2)
+ cat = cat([transpose, transpose_1], 0)
+ clone = cat.clone(memory_format=torch.contiguous_format)
+ return (clone, l_start_, add)
---
- getitem = l_cache_[0, :, :, :l_length_]
- keys = cat([getitem, transpose], 2)
- getitem_1 = l_cache_[1, :, :, :l_length_]
- values = cat([getitem_1, transpose_1], 2)
- o = scaled_dot_product_attention(transpose_2, keys, values)
- transpose_3 = o.transpose(1, 2)
+ narrow = narrow(l_cache__codes, 0, 0, 2)
+ narrow_1 = narrow(l_cache__scales, 0, 0, 2)
+ narrow_2 = narrow(l_cache__codes, 0, 2, 2)
+ narrow_3 = narrow(l_cache__scales, 0, 2, 2)
+ narrow_4 = narrow(l_cache__active, 0, 0, 2)
+ narrow_5 = narrow(l_cache__active, 0, 2, 2)
+ attention_active_default = jkv::attention_active(transpose_2, narrow, narrow_1, narrow_2, narrow_3, narrow_4, l_cache__active_range, narrow_5, l_cache__active_range, 0, l_length_, transpose, transpose_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_active_default.transpose(1, 2)
""",
        )

    def test_a_fixed_past_of_two_parts(self) -> None:
        self.assertExpectedInline(
            changes("a fixed past of two parts"),
            """\
- to = l_past_0_.to(torch.float32)
- chunk = to.chunk(2, -1)
- first_k = chunk[0]
- second_k = chunk[1]
- to_1 = l_past_1_.to(torch.float32)
- chunk_1 = to_1.chunk(2, -1)
- first_v = chunk_1[0]
- second_v = chunk_1[1]
- cat = cat([first_k, k], 1)
+ select = l_past_0__scales.select(-1, 0)
+ narrow = narrow(select, 3, 0, 8)
+ float = narrow.float()
+ transpose = float.transpose(2, 3)
+ mul = mul(transpose, 0.25)
+ repeat_interleave = mul.repeat_interleave(32, -1)
+ _outside = _outside(repeat_interleave, l_past_0__active_range, 0)
+ to_2 = _outside.to(torch.float32)
+ narrow_1 = narrow(to_2, 3, 0, 32)
+ permute = narrow_1.permute([0, 2, 1, 3])
+ zeros_like = zeros_like(k)
+ cat_1 = cat([permute, zeros_like], 1)
+ dequantize_active_default = jkv::dequantize_active(l_past_0__codes, l_past_0__scales, l_past_0__active, l_past_0__active_range, 0, 8, 2, torch.float32)
+ narrow_2 = narrow(dequantize_active_default, 3, 0, 32)
+ permute_1 = narrow_2.permute([0, 2, 1, 3])
+ cat = cat([permute_1, k], 1)
+ a = cat_1[Ellipsis, 0::2]
+ b = cat_1[Ellipsis, 1::2]
+ mul_1 = mul(a, cos)
+ mul_2 = mul(b, sin)
+ sub = sub(mul_1, mul_2)
+ mul_3 = mul(a, sin)
+ mul_4 = mul(b, cos)
+ add = add(mul_3, mul_4)
+ stack = stack((sub, add), -1)
+ flatten = stack.flatten(-2)
- cat_2 = cat([first_v, v], 1)
+ dequantize_active_default_1 = jkv::dequantize_active(l_past_1__codes, l_past_1__scales, l_past_1__active, l_past_1__active_range, 0, 8, 2, torch.float32)
+ narrow_3 = narrow(dequantize_active_default_1, 3, 0, 32)
+ permute_2 = narrow_3.permute([0, 2, 1, 3])
+ cat_2 = cat([permute_2, v], 1)
+ transpose_1 = flatten.transpose(1, 2)
- o = scaled_dot_product_attention(transpose_2, transpose_3, transpose_4, attn_mask=None)
- transpose_5 = o.transpose(1, 2)
+ float_1 = transpose_1.float()
+ square = float_1.square()
+ unflatten = square.unflatten(-1, (1, -1))
+ mean = unflatten.mean(-1)
+ attention_dense_default = jkv::attention_dense(transpose_2, transpose_3, transpose_4, mean, None, False, 0.17677669529663687, 0, 'taylor')
+ transpose_5 = attention_dense_default.transpose(1, 2)
- cat_3 = cat([second_k, k], 1)
- cat_4 = cat([second_v, v], 1)
+ select_1 = l_past_0__scales.select(-1, 0)
+ narrow_4 = narrow(select_1, 3, 0, 8)
+ float_2 = narrow_4.float()
+ transpose_6 = float_2.transpose(2, 3)
+ mul_5 = mul(transpose_6, 0.25)
+ repeat_interleave_1 = mul_5.repeat_interleave(32, -1)
+ _outside_1 = _outside(repeat_interleave_1, l_past_0__active_range, 0)
+ to_3 = _outside_1.to(torch.float32)
+ narrow_5 = narrow(to_3, 3, 32, 32)
+ permute_3 = narrow_5.permute([0, 2, 1, 3])
+ zeros_like_1 = zeros_like(k)
+ cat_5 = cat([permute_3, zeros_like_1], 1)
+ dequantize_active_default_2 = jkv::dequantize_active(l_past_0__codes, l_past_0__scales, l_past_0__active, l_past_0__active_range, 0, 8, 2, torch.float32)
+ narrow_6 = narrow(dequantize_active_default_2, 3, 32, 32)
+ permute_4 = narrow_6.permute([0, 2, 1, 3])
+ cat_3 = cat([permute_4, k], 1)
+ dequantize_active_default_3 = jkv::dequantize_active(l_past_1__codes, l_past_1__scales, l_past_1__active, l_past_1__active_range, 0, 8, 2, torch.float32)
+ narrow_7 = narrow(dequantize_active_default_3, 3, 32, 32)
+ permute_5 = narrow_7.permute([0, 2, 1, 3])
+ cat_4 = cat([permute_5, v], 1)
+ transpose_7 = cat_5.transpose(1, 2)
- o_1 = scaled_dot_product_attention(transpose_8, transpose_9, transpose_10, attn_mask=None)
- transpose_11 = o_1.transpose(1, 2)
+ float_3 = transpose_7.float()
+ square_1 = float_3.square()
+ unflatten_1 = square_1.unflatten(-1, (1, -1))
+ mean_1 = unflatten_1.mean(-1)
+ attention_dense_default_1 = jkv::attention_dense(transpose_8, transpose_9, transpose_10, mean_1, None, False, 0.17677669529663687, 0, 'taylor')
+ transpose_11 = attention_dense_default_1.transpose(1, 2)
""",
        )

    def test_two_caches_concatenated(self) -> None:
        self.assertExpectedInline(
            changes("two caches, concatenated"),
            """\
- getitem = l_old_k_[:, :l_n_old_]
- getitem_1 = l_new_k_[:, :l_n_new_]
- keys = cat([getitem, getitem_1, k], 1)
- getitem_2 = l_old_v_[:, :l_n_old_]
- getitem_3 = l_new_v_[:, :l_n_new_]
- values = cat([getitem_2, getitem_3, v], 1)
+ select = l_old_k__scales.select(-1, 0)
+ narrow = narrow(select, 3, 0, l_n_old_)
+ float = narrow.float()
+ transpose = float.transpose(2, 3)
+ mul = mul(transpose, 0.25)
+ repeat_interleave = mul.repeat_interleave(32, -1)
+ to = repeat_interleave.to(torch.float32)
+ permute = to.permute([0, 2, 1, 3])
+ select_1 = l_new_k__scales.select(-1, 0)
+ narrow_1 = narrow(select_1, 3, 0, l_n_new_)
+ float_1 = narrow_1.float()
+ transpose_1 = float_1.transpose(2, 3)
+ mul_1 = mul(transpose_1, 0.25)
+ repeat_interleave_1 = mul_1.repeat_interleave(32, -1)
+ to_1 = repeat_interleave_1.to(torch.float32)
+ permute_1 = to_1.permute([0, 2, 1, 3])
+ zeros_like = zeros_like(k)
+ keys_1 = cat([permute, permute_1, zeros_like], 1)
+ dequantize_default = jkv::dequantize(l_old_k__codes, l_old_k__scales, 0, l_n_old_, 2, torch.float32)
+ permute_2 = dequantize_default.permute([0, 2, 1, 3])
+ dequantize_default_1 = jkv::dequantize(l_new_k__codes, l_new_k__scales, 0, l_n_new_, 2, torch.float32)
+ permute_3 = dequantize_default_1.permute([0, 2, 1, 3])
+ keys = cat([permute_2, permute_3, k], 1)
+ dequantize_default_2 = jkv::dequantize(l_old_v__codes, l_old_v__scales, 0, l_n_old_, 2, torch.float32)
+ permute_4 = dequantize_default_2.permute([0, 2, 1, 3])
+ dequantize_default_3 = jkv::dequantize(l_new_v__codes, l_new_v__scales, 0, l_n_new_, 2, torch.float32)
+ permute_5 = dequantize_default_3.permute([0, 2, 1, 3])
+ values = cat([permute_4, permute_5, v], 1)
+ transpose_2 = keys_1.transpose(1, 2)
- o = scaled_dot_product_attention(transpose_3, transpose_4, transpose_5, attn_mask=None)
- transpose_6 = o.transpose(1, 2)
+ float_2 = transpose_2.float()
+ square = float_2.square()
+ unflatten = square.unflatten(-1, (1, -1))
+ mean = unflatten.mean(-1)
+ attention_dense_default = jkv::attention_dense(transpose_3, transpose_4, transpose_5, mean, None, False, 0.17677669529663687, 0, 'taylor')
+ transpose_6 = attention_dense_default.transpose(1, 2)
- l_old_k_[:, l_n_old_:add] = getitem_4
- l_old_v_[:, l_n_old_:add] = getitem_5
+ permute_6 = getitem_4.permute([0, 2, 1, 3])
+ permute_7 = getitem_5.permute([0, 2, 1, 3])
+ jkv::append_kv(l_old_k__codes, l_old_k__scales, l_old_v__codes, l_old_v__scales, permute_6, permute_7, l_n_old_, 2, 2)
- l_new_k_[:, l_n_new_:add_1] = k
- l_new_v_[:, l_n_new_:add_1] = v
+ permute_8 = k.permute([0, 2, 1, 3])
+ permute_9 = v.permute([0, 2, 1, 3])
+ jkv::append_kv(l_new_k__codes, l_new_k__scales, l_new_v__codes, l_new_v__scales, permute_8, permute_9, l_n_new_, 2, 2)
""",
        )

    def test_two_caches_turned_after_the_read(self) -> None:
        self.assertExpectedInline(
            changes("two caches, turned after the read"),
            """\
- getitem = l_old_k_[:, :l_n_old_]
- getitem_1 = l_new_k_[:, :l_n_new_]
- keys = cat([getitem, getitem_1, k], 1)
- getitem_2 = l_old_v_[:, :l_n_old_]
- getitem_3 = l_new_v_[:, :l_n_new_]
- values = cat([getitem_2, getitem_3, v], 1)
+ select = l_old_k__scales.select(-1, 0)
+ narrow = narrow(select, 3, 0, l_n_old_)
+ float = narrow.float()
+ transpose = float.transpose(2, 3)
+ mul = mul(transpose, 0.25)
+ repeat_interleave = mul.repeat_interleave(32, -1)
+ to = repeat_interleave.to(torch.float32)
+ permute = to.permute([0, 2, 1, 3])
+ select_1 = l_new_k__scales.select(-1, 0)
+ narrow_1 = narrow(select_1, 3, 0, l_n_new_)
+ float_1 = narrow_1.float()
+ transpose_1 = float_1.transpose(2, 3)
+ mul_1 = mul(transpose_1, 0.25)
+ repeat_interleave_1 = mul_1.repeat_interleave(32, -1)
+ to_1 = repeat_interleave_1.to(torch.float32)
+ permute_1 = to_1.permute([0, 2, 1, 3])
+ zeros_like = zeros_like(k)
+ keys_1 = cat([permute, permute_1, zeros_like], 1)
+ dequantize_default = jkv::dequantize(l_old_k__codes, l_old_k__scales, 0, l_n_old_, 2, torch.float32)
+ permute_2 = dequantize_default.permute([0, 2, 1, 3])
+ dequantize_default_1 = jkv::dequantize(l_new_k__codes, l_new_k__scales, 0, l_n_new_, 2, torch.float32)
+ permute_3 = dequantize_default_1.permute([0, 2, 1, 3])
+ keys = cat([permute_2, permute_3, k], 1)
+ dequantize_default_2 = jkv::dequantize(l_old_v__codes, l_old_v__scales, 0, l_n_old_, 2, torch.float32)
+ permute_4 = dequantize_default_2.permute([0, 2, 1, 3])
+ dequantize_default_3 = jkv::dequantize(l_new_v__codes, l_new_v__scales, 0, l_n_new_, 2, torch.float32)
+ permute_5 = dequantize_default_3.permute([0, 2, 1, 3])
+ values = cat([permute_4, permute_5, v], 1)
+ a = keys_1[Ellipsis, 0::2]
+ b = keys_1[Ellipsis, 1::2]
+ mul_2 = mul(a, cos)
+ mul_3 = mul(b, sin)
+ sub = sub(mul_2, mul_3)
+ mul_4 = mul(a, sin)
+ mul_5 = mul(b, cos)
+ add = add(mul_4, mul_5)
+ stack = stack((sub, add), -1)
+ keys_2 = stack.flatten(-2)
+ transpose_2 = keys_2.transpose(1, 2)
- o = scaled_dot_product_attention(transpose_3, transpose_4, transpose_5, attn_mask=None)
- transpose_6 = o.transpose(1, 2)
+ float_2 = transpose_2.float()
+ square = float_2.square()
+ unflatten = square.unflatten(-1, (1, -1))
+ mean = unflatten.mean(-1)
+ attention_dense_default = jkv::attention_dense(transpose_3, transpose_4, transpose_5, mean, None, False, 0.17677669529663687, 0, 'taylor')
+ transpose_6 = attention_dense_default.transpose(1, 2)
- l_old_k_[:, l_n_old_:add_1] = getitem_4
- l_old_v_[:, l_n_old_:add_1] = getitem_5
+ permute_6 = getitem_4.permute([0, 2, 1, 3])
+ permute_7 = getitem_5.permute([0, 2, 1, 3])
+ jkv::append_kv(l_old_k__codes, l_old_k__scales, l_old_v__codes, l_old_v__scales, permute_6, permute_7, l_n_old_, 2, 2)
- l_new_k_[:, l_n_new_:add_2] = k
- l_new_v_[:, l_n_new_:add_2] = v
+ permute_8 = k.permute([0, 2, 1, 3])
+ permute_9 = v.permute([0, 2, 1, 3])
+ jkv::append_kv(l_new_k__codes, l_new_k__scales, l_new_v__codes, l_new_v__scales, permute_8, permute_9, l_n_new_, 2, 2)
""",
        )

    def test_a_whole_buffer_under_a_boolean_mask(self) -> None:
        self.assertExpectedInline(
            changes("a whole buffer under a boolean mask"),
            """\
- index_copy_ = l_cache_k_.index_copy_(2, l_positions_, transpose)
+ jkv::append_at(l_cache_k__codes, l_cache_k__scales, transpose, l_positions_, 2)
- index_copy__1 = l_cache_v_.index_copy_(2, l_positions_, transpose_1)
+ jkv::append_at(l_cache_v__codes, l_cache_v__scales, transpose_1, l_positions_, 2)
- o = scaled_dot_product_attention(transpose_2, l_cache_k_, l_cache_v_, attn_mask=getitem)
- transpose_3 = o.transpose(1, 2)
+ index_fill = getitem.index_fill(-1, l_positions_, False)
+ index_select = getitem.index_select(-1, l_positions_)
+ cat = cat([index_fill, index_select], -1)
+ attention_default = jkv::attention(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, 176], transpose, transpose_1, cat, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_default.transpose(1, 2)
""",
        )

    def test_a_whole_buffer_under_an_additive_mask(self) -> None:
        self.assertExpectedInline(
            changes("a whole buffer under an additive mask"),
            """\
- index_copy_ = l_cache_k_.index_copy_(2, l_positions_, transpose)
+ jkv::append_at(l_cache_k__codes, l_cache_k__scales, transpose, l_positions_, 2)
- index_copy__1 = l_cache_v_.index_copy_(2, l_positions_, transpose_1)
+ jkv::append_at(l_cache_v__codes, l_cache_v__scales, transpose_1, l_positions_, 2)
- o = scaled_dot_product_attention(transpose_2, l_cache_k_, l_cache_v_, attn_mask=getitem)
- transpose_3 = o.transpose(1, 2)
+ index_fill = getitem.index_fill(-1, l_positions_, -inf)
+ index_select = getitem.index_select(-1, l_positions_)
+ cat = cat([index_fill, index_select], -1)
+ attention_default = jkv::attention(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, 176], transpose, transpose_1, cat, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_default.transpose(1, 2)
""",
        )

    def test_a_whole_buffer_heads_repeated(self) -> None:
        self.assertExpectedInline(
            changes("a whole buffer, heads repeated"),
            """\
- index_copy_ = l_cache_k_.index_copy_(2, l_positions_, transpose)
+ jkv::append_at(l_cache_k__codes, l_cache_k__scales, transpose, l_positions_, 2)
- index_copy__1 = l_cache_v_.index_copy_(2, l_positions_, transpose_1)
+ jkv::append_at(l_cache_v__codes, l_cache_v__scales, transpose_1, l_positions_, 2)
- getitem = l_cache_k_[:, :, None]
- expand = getitem.expand(1, 2, 2, 176, 32)
- keys = expand.reshape(1, -1, 176, 32)
- getitem_1 = l_cache_v_[:, :, None]
- expand_1 = getitem_1.expand(1, 2, 2, 176, 32)
- values = expand_1.reshape(1, -1, 176, 32)
- o = scaled_dot_product_attention(transpose_2, keys, values, attn_mask=getitem_2)
- transpose_3 = o.transpose(1, 2)
+ index_fill = getitem_2.index_fill(-1, l_positions_, False)
+ index_select = getitem_2.index_select(-1, l_positions_)
+ cat = cat([index_fill, index_select], -1)
+ attention_default = jkv::attention(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, 176], transpose, transpose_1, cat, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_default.transpose(1, 2)
""",
        )

    def test_a_buffer_rolled_and_copied_back(self) -> None:
        self.assertExpectedInline(
            changes("a buffer rolled and copied back"),
            """\
- rolled = l_cache_k_.roll(-8, dims=1)
- rolled[:, -8:] = k
- rolled_1 = l_cache_v_.roll(-8, dims=1)
- rolled_1[:, -8:] = v
- copy_ = l_cache_k_.copy_(rolled)
- copy__1 = l_cache_v_.copy_(rolled_1)
+ jkv::move(l_cache_k__codes, l_cache_k__scales, 8, 0, 24)
+ permute = k.permute([0, 2, 1, 3])
+ jkv::move(l_cache_v__codes, l_cache_v__scales, 8, 0, 24)
+ permute_1 = v.permute([0, 2, 1, 3])
+ jkv::append_kv(l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, permute, permute_1, 24, 2, 2)
- transpose = l_cache_k_.transpose(1, 2)
- transpose_1 = l_cache_v_.transpose(1, 2)
- o = scaled_dot_product_attention(transpose_2, transpose, transpose_1, attn_mask=None)
- transpose_3 = o.transpose(1, 2)
+ permute_2 = k.permute([0, 2, 1, 3])
+ permute_3 = v.permute([0, 2, 1, 3])
+ attention_default = jkv::attention(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, 24], permute_2, permute_3, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_default.transpose(1, 2)
""",
        )

    def test_a_buffer_shifted_by_cat_and_copied_back(self) -> None:
        self.assertExpectedInline(
            changes("a buffer shifted by cat and copied back"),
            """\
- getitem = l_cache_k_[:, 8:]
- full_k = cat([getitem, k], 1)
- getitem_1 = l_cache_v_[:, 8:]
- full_v = cat([getitem_1, v], 1)
- copy_ = l_cache_k_.copy_(full_k)
- copy__1 = l_cache_v_.copy_(full_v)
+ jkv::move(l_cache_k__codes, l_cache_k__scales, 8, 0, 24)
+ permute = k.permute([0, 2, 1, 3])
+ jkv::move(l_cache_v__codes, l_cache_v__scales, 8, 0, 24)
+ permute_1 = v.permute([0, 2, 1, 3])
+ jkv::append_kv(l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, permute, permute_1, 24, 2, 2)
- transpose = full_k.transpose(1, 2)
- transpose_1 = full_v.transpose(1, 2)
- o = scaled_dot_product_attention(transpose_2, transpose, transpose_1, attn_mask=None)
- transpose_3 = o.transpose(1, 2)
+ permute_2 = k.permute([0, 2, 1, 3])
+ permute_3 = v.permute([0, 2, 1, 3])
+ attention_default = jkv::attention(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, 24], permute_2, permute_3, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_default.transpose(1, 2)
""",
        )

    def test_a_copy_edited_and_attended_written_back_in_the_graph(self) -> None:
        self.assertExpectedInline(
            changes("a copy edited and attended, written back in the graph"),
            """\
- temp_k = l_cache_k_.clone()
- temp_v = l_cache_v_.clone()
- temp_k[:, l_start_:add] = k
- temp_v[:, l_start_:add] = v
- getitem = temp_k[:, :add]
- getitem_1 = temp_v[:, :add]
- transpose = getitem.transpose(1, 2)
- transpose_1 = getitem_1.transpose(1, 2)
- o = scaled_dot_product_attention(transpose_2, transpose, transpose_1, attn_mask=None)
- transpose_3 = o.transpose(1, 2)
+ permute = k.permute([0, 2, 1, 3])
+ permute_1 = v.permute([0, 2, 1, 3])
+ attention_default = jkv::attention(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, l_start_], permute, permute_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_default.transpose(1, 2)
- l_cache_k_[:, l_start_:add] = k
- l_cache_v_[:, l_start_:add] = v
+ permute_2 = k.permute([0, 2, 1, 3])
+ permute_3 = v.permute([0, 2, 1, 3])
+ jkv::append_kv(l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, permute_2, permute_3, l_start_, 2, 2)
""",
        )

    def test_a_copy_edited_and_attended_written_back_in_eager_code(self) -> None:
        self.assertExpectedInline(
            changes("a copy edited and attended, written back in eager code"),
            """\
- temp_k = l_cache_k_.clone()
- temp_v = l_cache_v_.clone()
- temp_k[:, l_start_:add] = k
- temp_v[:, l_start_:add] = v
- getitem = temp_k[:, :add]
- getitem_1 = temp_v[:, :add]
- transpose = getitem.transpose(1, 2)
- transpose_1 = getitem_1.transpose(1, 2)
- o = scaled_dot_product_attention(transpose_2, transpose, transpose_1, attn_mask=None)
- transpose_3 = o.transpose(1, 2)
+ permute = k.permute([0, 2, 1, 3])
+ permute_1 = v.permute([0, 2, 1, 3])
+ attention_active_default = jkv::attention_active(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, l_cache_k__active, l_cache_k__active_range, l_cache_v__active, l_cache_v__active_range, 0, l_start_, permute, permute_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_active_default.transpose(1, 2)
""",
        )

    def test_a_concatenation_of_sink_window_and_current_chunk(self) -> None:
        self.assertExpectedInline(
            changes("a concatenation of sink, window and current chunk"),
            """\
- getitem = l_cache_k_[:, :4]
- getitem_1 = l_cache_k_[:, sym_max:l_start_]
- keys = cat([getitem, getitem_1, k], 1)
- getitem_2 = l_cache_v_[:, :4]
- getitem_3 = l_cache_v_[:, sym_max:l_start_]
- values = cat([getitem_2, getitem_3, v], 1)
- transpose = keys.transpose(1, 2)
- transpose_1 = values.transpose(1, 2)
- o = scaled_dot_product_attention(transpose_2, transpose, transpose_1, attn_mask=None)
- transpose_3 = o.transpose(1, 2)
+ permute = k.permute([0, 2, 1, 3])
+ permute_1 = v.permute([0, 2, 1, 3])
+ attention_default = jkv::attention(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, 4, sym_max, l_start_], permute, permute_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_default.transpose(1, 2)
- l_cache_k_[:, l_start_:add] = k
- l_cache_v_[:, l_start_:add] = v
+ permute_2 = k.permute([0, 2, 1, 3])
+ permute_3 = v.permute([0, 2, 1, 3])
+ jkv::append_kv(l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, permute_2, permute_3, l_start_, 2, 2)
""",
        )

    def test_buffers_allocated_in_the_first_forward(self) -> None:
        self.assertExpectedInline(
            changes("buffers allocated in the first forward"),
            """\
- l_self_k_cache[:, l_start_:add] = k
- l_self_v_cache[:, l_start_:add] = v
- getitem = l_self_k_cache[:, :add]
- getitem_1 = l_self_v_cache[:, :add]
+ permute = k.permute([0, 2, 1, 3])
+ permute_1 = v.permute([0, 2, 1, 3])
+ jkv::append_kv(l_self_k_cache_codes, l_self_k_cache_scales, l_self_v_cache_codes, l_self_v_cache_scales, permute, permute_1, l_start_, 2, 2)
- transpose = getitem.transpose(1, 2)
- transpose_1 = getitem_1.transpose(1, 2)
- o = scaled_dot_product_attention(transpose_2, transpose, transpose_1, attn_mask=None)
- transpose_3 = o.transpose(1, 2)
+ permute_2 = k.permute([0, 2, 1, 3])
+ permute_3 = v.permute([0, 2, 1, 3])
+ attention_default = jkv::attention(transpose_2, l_self_k_cache_codes, l_self_k_cache_scales, l_self_v_cache_codes, l_self_v_cache_scales, [0, l_start_], permute_2, permute_3, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_default.transpose(1, 2)
""",
        )

    def test_a_concatenation_of_sink_pinned_chunk_window_and_current_the_sink_turned(self) -> None:
        self.assertExpectedInline(
            changes("a concatenation of sink, pinned chunk, window and current, the sink turned"),
            """\
- getitem = l_cache_k_[:, :4]
- a = getitem[Ellipsis, 0::2]
- b = getitem[Ellipsis, 1::2]
+ select = l_cache_k__scales.select(-1, 0)
+ narrow = narrow(select, 3, 0, 4)
+ float = narrow.float()
+ transpose = float.transpose(2, 3)
+ mul = mul(transpose, 0.25)
+ repeat_interleave = mul.repeat_interleave(32, -1)
+ to = repeat_interleave.to(torch.float32)
+ permute = to.permute([0, 2, 1, 3])
+ a_1 = permute[Ellipsis, 0::2]
+ dequantize_default = jkv::dequantize(l_cache_k__codes, l_cache_k__scales, 0, 4, 2, torch.float32)
+ permute_1 = dequantize_default.permute([0, 2, 1, 3])
+ a = permute_1[Ellipsis, 0::2]
+ select_1 = l_cache_k__scales.select(-1, 0)
+ narrow_1 = narrow(select_1, 3, 0, 4)
+ float_1 = narrow_1.float()
+ transpose_1 = float_1.transpose(2, 3)
+ mul_1 = mul(transpose_1, 0.25)
+ repeat_interleave_1 = mul_1.repeat_interleave(32, -1)
+ to_1 = repeat_interleave_1.to(torch.float32)
+ permute_2 = to_1.permute([0, 2, 1, 3])
+ b_1 = permute_2[Ellipsis, 1::2]
+ dequantize_default_1 = jkv::dequantize(l_cache_k__codes, l_cache_k__scales, 0, 4, 2, torch.float32)
+ permute_3 = dequantize_default_1.permute([0, 2, 1, 3])
+ b = permute_3[Ellipsis, 1::2]
+ mul_2 = mul(a_1, cos)
+ mul_3 = mul(b_1, sin)
+ sub = sub(mul_2, mul_3)
+ mul_4 = mul(a_1, sin)
+ mul_5 = mul(b_1, cos)
+ add = add(mul_4, mul_5)
+ stack = stack((sub, add), -1)
+ flatten = stack.flatten(-2)
- getitem_1 = l_cache_k_[:, 4:12]
- getitem_2 = l_cache_k_[:, sym_max:l_start_]
- keys = cat([flatten_1, getitem_1, getitem_2, turned], 1)
- getitem_3 = l_cache_v_[:, :4]
- getitem_4 = l_cache_v_[:, 4:12]
- getitem_5 = l_cache_v_[:, sym_max:l_start_]
- values = cat([getitem_3, getitem_4, getitem_5, v], 1)
+ select_2 = l_cache_k__scales.select(-1, 0)
+ narrow_2 = narrow(select_2, 3, 4, 8)
+ float_2 = narrow_2.float()
+ transpose_2 = float_2.transpose(2, 3)
+ mul_6 = mul(transpose_2, 0.25)
+ repeat_interleave_2 = mul_6.repeat_interleave(32, -1)
+ to_2 = repeat_interleave_2.to(torch.float32)
+ permute_4 = to_2.permute([0, 2, 1, 3])
+ add_1 = add(-16, l_start_)
+ sym_max_1 = sym_max(12, add_1)
+ mul_7 = mul(-1, sym_max_1)
+ add_2 = add(l_start_, mul_7)
+ select_3 = l_cache_k__scales.select(-1, 0)
+ narrow_3 = narrow(select_3, 3, sym_max, add_2)
+ float_3 = narrow_3.float()
+ transpose_3 = float_3.transpose(2, 3)
+ mul_8 = mul(transpose_3, 0.25)
+ repeat_interleave_3 = mul_8.repeat_interleave(32, -1)
+ to_3 = repeat_interleave_3.to(torch.float32)
+ permute_5 = to_3.permute([0, 2, 1, 3])
+ zeros_like = zeros_like(turned)
+ keys_1 = cat([flatten, permute_4, permute_5, zeros_like], 1)
+ dequantize_default_2 = jkv::dequantize(l_cache_k__codes, l_cache_k__scales, 4, 12, 2, torch.float32)
+ permute_6 = dequantize_default_2.permute([0, 2, 1, 3])
+ dequantize_default_3 = jkv::dequantize(l_cache_k__codes, l_cache_k__scales, sym_max, l_start_, 2, torch.float32)
+ permute_7 = dequantize_default_3.permute([0, 2, 1, 3])
+ keys = cat([flatten_1, permute_6, permute_7, turned], 1)
+ dequantize_default_4 = jkv::dequantize(l_cache_v__codes, l_cache_v__scales, 0, 4, 2, torch.float32)
+ permute_8 = dequantize_default_4.permute([0, 2, 1, 3])
+ dequantize_default_5 = jkv::dequantize(l_cache_v__codes, l_cache_v__scales, 4, 12, 2, torch.float32)
+ permute_9 = dequantize_default_5.permute([0, 2, 1, 3])
+ dequantize_default_6 = jkv::dequantize(l_cache_v__codes, l_cache_v__scales, sym_max, l_start_, 2, torch.float32)
+ permute_10 = dequantize_default_6.permute([0, 2, 1, 3])
+ values = cat([permute_8, permute_9, permute_10, v], 1)
+ transpose_4 = keys_1.transpose(1, 2)
- o = scaled_dot_product_attention(transpose_5, transpose_6, transpose_7, attn_mask=None)
- transpose_8 = o.transpose(1, 2)
+ float_4 = transpose_4.float()
+ square = float_4.square()
+ unflatten = square.unflatten(-1, (1, -1))
+ mean = unflatten.mean(-1)
+ attention_dense_default = jkv::attention_dense(transpose_5, transpose_6, transpose_7, mean, None, False, 0.17677669529663687, 0, 'taylor')
+ transpose_8 = attention_dense_default.transpose(1, 2)
- l_cache_k_[:, l_start_:add_3] = turned
- l_cache_v_[:, l_start_:add_3] = v
+ permute_11 = turned.permute([0, 2, 1, 3])
+ permute_12 = v.permute([0, 2, 1, 3])
+ jkv::append_kv(l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, permute_11, permute_12, l_start_, 2, 2)
""",
        )

    def test_buffers_of_two_guidance_branches_chosen_ranges(self) -> None:
        self.assertExpectedInline(
            changes("buffers of two guidance branches, chosen ranges"),
            """\
- l_self_k_cache[:, l_start_:add] = k
- l_self_v_cache[:, l_start_:add] = v
+ permute = k.permute([0, 2, 1, 3])
+ permute_1 = v.permute([0, 2, 1, 3])
+ jkv::append_kv(l_self_k_cache_codes, l_self_k_cache_scales, l_self_v_cache_codes, l_self_v_cache_scales, permute, permute_1, l_start_, 2, 2)
- getitem = l_self_k_cache[:, :sym_min]
- getitem_1 = l_self_k_cache[:, sym_max:add]
- cat = cat([getitem, getitem_1], 1)
- getitem_2 = l_self_v_cache[:, :sym_min_1]
- getitem_3 = l_self_v_cache[:, sym_max:add]
- cat_1 = cat([getitem_2, getitem_3], 1)
- transpose = cat.transpose(1, 2)
- transpose_1 = cat_1.transpose(1, 2)
- o = scaled_dot_product_attention(transpose_2, transpose, transpose_1, attn_mask=None)
- transpose_3 = o.transpose(1, 2)
+ permute_2 = k.permute([0, 2, 1, 3])
+ permute_3 = v.permute([0, 2, 1, 3])
+ attention_default = jkv::attention(transpose_2, l_self_k_cache_codes, l_self_k_cache_scales, l_self_v_cache_codes, l_self_v_cache_scales, [0, 8, sym_max, l_start_], permute_2, permute_3, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_default.transpose(1, 2)
---
- l_self_k_uncond[:, l_start_:add] = k
- l_self_v_uncond[:, l_start_:add] = v
+ permute = k.permute([0, 2, 1, 3])
+ permute_1 = v.permute([0, 2, 1, 3])
+ jkv::append_kv(l_self_k_uncond_codes, l_self_k_uncond_scales, l_self_v_uncond_codes, l_self_v_uncond_scales, permute, permute_1, l_start_, 2, 2)
- getitem = l_self_k_uncond[:, :sym_min]
- getitem_1 = l_self_k_uncond[:, sym_max:add]
- cat = cat([getitem, getitem_1], 1)
- getitem_2 = l_self_v_uncond[:, :sym_min_1]
- getitem_3 = l_self_v_uncond[:, sym_max:add]
- cat_1 = cat([getitem_2, getitem_3], 1)
- transpose = cat.transpose(1, 2)
- transpose_1 = cat_1.transpose(1, 2)
- o = scaled_dot_product_attention(transpose_2, transpose, transpose_1, attn_mask=None)
- transpose_3 = o.transpose(1, 2)
+ permute_2 = k.permute([0, 2, 1, 3])
+ permute_3 = v.permute([0, 2, 1, 3])
+ attention_default = jkv::attention(transpose_2, l_self_k_uncond_codes, l_self_k_uncond_scales, l_self_v_uncond_codes, l_self_v_uncond_scales, [0, 8, sym_max, l_start_], permute_2, permute_3, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_default.transpose(1, 2)
""",
        )
