"""Graphs of caches that hold their first tokens, and the newest, in full precision; others are as `test_graphs` has them."""

from __future__ import annotations

import expecttest

from .models import CHUNK
from .test_graphs import changes


class TestGraphs(expecttest.TestCase):
    def test_eviction_by_rolling(self) -> None:
        graphs = changes("eviction by rolling, with a sink", sink=4, recent=CHUNK)
        self.assertExpectedInline(
            graphs.split("---\n")[-1],
            """\
- getitem = l_cache_k_[:, add:l_stack1_]
- old = getitem.clone()
- l_cache_k_[:, 4:add_1] = old
- getitem_1 = l_cache_v_[:, add:l_stack1_]
- old_1 = getitem_1.clone()
+ jkv::move(l_cache_k__codes, l_cache_k__scales, add, 4, 20)
+ jkv::hold_moved(l_cache_k__held, l_cache_k__held_ranges, add, 4, 20)
- l_cache_v_[:, 4:add_2] = old_1
+ jkv::move(l_cache_v__codes, l_cache_v__scales, add, 4, 20)
+ jkv::hold_moved(l_cache_v__held, l_cache_v__held_ranges, add, 4, 20)
- l_cache_k_[:, sub_2:sub_3] = l_k_
- l_cache_v_[:, sub_2:sub_3] = l_v_
- getitem_2 = l_cache_k_[:, :sub_3]
- getitem_3 = l_cache_v_[:, :sub_3]
+ permute = l_k_.permute([0, 2, 1, 3])
+ permute_1 = l_k_.permute([0, 2, 1, 3])
+ jkv::hold(l_cache_k__held, l_cache_k__held_ranges, permute_1, sub_2)
+ permute_2 = l_v_.permute([0, 2, 1, 3])
+ jkv::append_kv(l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, permute, permute_2, sub_2, 2, 2)
+ permute_3 = l_v_.permute([0, 2, 1, 3])
+ jkv::hold(l_cache_v__held, l_cache_v__held_ranges, permute_3, sub_2)
- transpose = getitem_2.transpose(1, 2)
- transpose_1 = getitem_3.transpose(1, 2)
- o = scaled_dot_product_attention(transpose_2, transpose, transpose_1, attn_mask=None)
- transpose_3 = o.transpose(1, 2)
+ permute_4 = l_k_.permute([0, 2, 1, 3])
+ permute_5 = l_v_.permute([0, 2, 1, 3])
+ attention_held_default = jkv::attention_held(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [l_cache_k__held], [l_cache_k__held_ranges], [l_cache_v__held], [l_cache_v__held_ranges], [0, 4, 4, 24], permute_4, permute_5, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_held_default.transpose(1, 2)
""",
        )

    def test_a_past_turned_after_the_read(self) -> None:
        self.assertExpectedInline(
            changes("a fixed past, turned after the read", sink=4),
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
+ _outside_held = _outside_held(_outside, l_past_0__held_ranges, 0)
+ to = _outside_held.to(torch.float32)
+ zeros_like = zeros_like(transpose)
+ k_1 = cat([to, zeros_like], dim=2)
+ dequantize_held_default = jkv::dequantize_held(l_past_0__codes, l_past_0__scales, [l_past_0__held, l_past_0__active], [l_past_0__held_ranges, l_past_0__active_range], 0, 8, 2, 32, 'rtn', torch.float32)
+ k = cat([dequantize_held_default, transpose], dim=2)
- v = cat([past_v, transpose_2], dim=2)
+ dequantize_held_default_1 = jkv::dequantize_held(l_past_1__codes, l_past_1__scales, [l_past_1__held, l_past_1__active], [l_past_1__held_ranges, l_past_1__active_range], 0, 8, 2, 32, 'rtn', torch.float32)
+ v = cat([dequantize_held_default_1, transpose_2], dim=2)
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

    def test_keys_and_values_stacked_written_by_another_graph(self) -> None:
        self.assertExpectedInline(
            changes("keys and values stacked, written by another graph", sink=4),
            """\
- l_cache_[0, :, :, l_start_:add] = transpose
+ narrow = narrow(l_cache__codes, 0, 0, 1)
+ narrow_1 = narrow(l_cache__scales, 0, 0, 1)
+ jkv::append(narrow, narrow_1, transpose, l_start_, 2)
+ narrow_2 = narrow(l_cache__held, 0, 0, 1)
+ narrow_3 = narrow(l_cache__held_ranges, 0, 0, 1)
+ jkv::hold(narrow_2, narrow_3, transpose, l_start_)
- l_cache_[1, :, :, l_start_:add] = transpose_1
- return ()
+ narrow_4 = narrow(l_cache__codes, 0, 1, 1)
+ narrow_5 = narrow(l_cache__scales, 0, 1, 1)
+ jkv::append(narrow_4, narrow_5, transpose_1, l_start_, 2)
+ narrow_6 = narrow(l_cache__held, 0, 1, 1)
+ narrow_7 = narrow(l_cache__held_ranges, 0, 1, 1)
+ jkv::hold(narrow_6, narrow_7, transpose_1, l_start_)
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
+ narrow_4 = narrow(l_cache__held, 0, 0, 1)
+ narrow_5 = narrow(l_cache__held_ranges, 0, 0, 1)
+ narrow_6 = narrow(l_cache__active, 0, 0, 1)
+ narrow_7 = narrow(l_cache__held, 0, 1, 1)
+ narrow_8 = narrow(l_cache__held_ranges, 0, 1, 1)
+ narrow_9 = narrow(l_cache__active, 0, 1, 1)
+ attention_held_default = jkv::attention_held(transpose_2, narrow, narrow_1, narrow_2, narrow_3, [narrow_4, narrow_6], [narrow_5, l_cache__active_range], [narrow_7, narrow_9], [narrow_8, l_cache__active_range], [0, l_length_], transpose, transpose_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_held_default.transpose(1, 2)
""",
        )

    def test_a_whole_buffer_under_a_mask(self) -> None:
        self.assertExpectedInline(
            changes("a whole buffer under a boolean mask", sink=4),
            """\
- index_copy_ = l_cache_k_.index_copy_(2, l_positions_, transpose)
+ jkv::append_at(l_cache_k__codes, l_cache_k__scales, transpose, l_positions_, 2)
+ jkv::hold_at(l_cache_k__held, l_cache_k__held_ranges, transpose, l_positions_)
- index_copy__1 = l_cache_v_.index_copy_(2, l_positions_, transpose_1)
+ jkv::append_at(l_cache_v__codes, l_cache_v__scales, transpose_1, l_positions_, 2)
+ jkv::hold_at(l_cache_v__held, l_cache_v__held_ranges, transpose_1, l_positions_)
- o = scaled_dot_product_attention(transpose_2, l_cache_k_, l_cache_v_, attn_mask=getitem)
- transpose_3 = o.transpose(1, 2)
+ index_fill = getitem.index_fill(-1, l_positions_, False)
+ index_select = getitem.index_select(-1, l_positions_)
+ cat = cat([index_fill, index_select], -1)
+ attention_held_default = jkv::attention_held(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [l_cache_k__held], [l_cache_k__held_ranges], [l_cache_v__held], [l_cache_v__held_ranges], [0, 176], transpose, transpose_1, cat, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_3 = attention_held_default.transpose(1, 2)
""",
        )

    def test_a_concatenation_that_grows(self) -> None:
        graphs = changes("a concatenation that grows and is returned", sink=4, recent=CHUNK)
        self.assertExpectedInline(
            graphs.split("---\n")[-1],
            """\
- k = cat([l_past_0_, k_1], 2)
- v = cat([l_past_1_, v_1], 2)
- o = scaled_dot_product_attention(transpose, k, v)
- transpose_1 = o.transpose(1, 2)
+ attention_held_default = jkv::attention_held(transpose, l_past_0__codes, l_past_0__scales, l_past_1__codes, l_past_1__scales, [l_past_0__held, l_past_0__active], [l_past_0__held_ranges, l_past_0__active_range], [l_past_1__held, l_past_1__active], [l_past_1__held_ranges, l_past_1__active_range], [0, s69], k_1, v_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
+ transpose_1 = attention_held_default.transpose(1, 2)
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
+ clone = k_1.clone(memory_format=torch.contiguous_format)
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
+ clone_1 = v_1.clone(memory_format=torch.contiguous_format)
+ return (linear, 1, 2, add, 32, add_1, add_2, 32, 1, 0, getitem, getitem_1, add_3, add_4, 32, 1, clone, 0, s69, 0, s69, 1, 2, add_5, 32, add_6, add_7, 32, 1, 0, getitem_2, getitem_3, add_8, add_9, 32, 1, clone_1, 0, s89, 0, s89)
""",
        )
