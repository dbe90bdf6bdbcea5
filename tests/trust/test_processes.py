"""Threads, several configurations, other processes: nothing is shared that should not be."""

from __future__ import annotations

import copy
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jkv_compile
from jkv_compile import is_packed, jkv_backend, materialize

from ..harness import BOUND, fresh_backend, relative_error, twins
from ..models import SelfAttention

ROOT = Path(__file__).parents[2]
TOKENS, CHUNK = 32, 8


def calls(model: Any, cache: dict[str, Tensor], seed: int, first: int = 0, last: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(1, CHUNK, 128, generator=generator) for _ in range(last)]
    with torch.no_grad():
        return [model(xs[i], cache, i * CHUNK) for i in range(first, last)]


def test_threads_with_a_model_each_do_not_meet() -> None:
    backend = fresh_backend()
    results: dict[int, float] = {}

    def work(i: int) -> None:
        torch.manual_seed(i)
        model = SelfAttention(heads=2)
        compiled, eager = twins(model, backend)
        ours, theirs = model.new_cache(1, TOKENS), model.new_cache(1, TOKENS)
        pairs = zip(calls(compiled, ours, i), calls(eager, theirs, i))
        results[i] = max(relative_error(got, want) for got, want in pairs) if is_packed(ours["k"]) else float("inf")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and max(results.values()) < BOUND, results


def test_configurations_side_by_side_keep_their_own() -> None:
    torch._dynamo.reset()
    model = SelfAttention(heads=2)
    eager = copy.deepcopy(model)
    settings = [{"bits": 8}, {"bits": (4, 2), "correction": "none", "quantizer": "quarot"}]  # more: recompile_limit
    backends = [jkv_backend(inner="eager", **s) for s in settings]
    compiled = [torch.compile(model, backend=b) for b in backends]
    caches = [model.new_cache(1, TOKENS) for _ in settings]
    alone = [calls(c, cache, seed=1)[-1] for c, cache in zip(compiled, caches)]
    torch._dynamo.reset()
    compiled = [torch.compile(model, backend=b) for b in backends]
    caches = [model.new_cache(1, TOKENS) for _ in settings]
    for first in range(4):  # in turns
        together = [calls(c, cache, 1, first, first + 1)[-1] for c, cache in zip(compiled, caches)]
    for one, other in zip(alone, together):
        assert torch.equal(one, other)
    want = calls(eager, model.new_cache(1, TOKENS), seed=1)[-1]
    errors = [relative_error(x, want) for x in together]
    assert errors[0] < BOUND and len(set(errors)) == len(errors)
    assert [c["k"]._store.bits for c in caches] == [8, 4]


def test_settings_of_torch_are_as_they_were() -> None:
    def settings() -> list[dict[str, Any]]:
        import torch._functorch.config
        import torch._inductor.config

        configs = torch._dynamo.config, torch._inductor.config, torch._functorch.config
        return [c.get_config_copy() for c in configs]  # type: ignore[attr-defined]

    before = settings()
    stance = torch._dynamo.eval_frame._stance
    model = SelfAttention(heads=2)
    compiled, _ = twins(model, fresh_backend())
    calls(compiled, model.new_cache(1, TOKENS), seed=0)
    with jkv_compile.enable(bits=4, inner="eager"):
        calls(torch.compile(model), model.new_cache(1, TOKENS), seed=0)
    compiled, _ = twins(model, fresh_backend(inner="aot_eager"), mode="default")
    calls(compiled, model.new_cache(1, TOKENS), seed=0, last=2)
    jkv_compile.explain(model, torch.randn(1, CHUNK, 128), model.new_cache(1, TOKENS), 0)
    assert settings() == before
    assert torch._dynamo.eval_frame._stance == stance


def test_what_is_packed_outlives_a_reset_of_the_compiler() -> None:
    model = SelfAttention(heads=2)
    compiled, eager = twins(model, fresh_backend())
    ours, theirs = model.new_cache(1, TOKENS), model.new_cache(1, TOKENS)
    got, want = calls(compiled, ours, 0, last=2), calls(eager, theirs, 0, last=2)
    torch.compiler.reset()
    assert is_packed(ours["k"])
    got, want = calls(compiled, ours, 0, first=2), calls(eager, theirs, 0, first=2)
    assert max(map(relative_error, got, want)) < BOUND


def in_child(model: Any, cache: dict[str, Tensor], results: Any) -> None:
    torch.set_num_threads(1)
    compiled = torch.compile(model, backend=jkv_backend(bits=8, inner="eager"))
    out = calls(compiled, cache, 0, first=2, last=3)[0]
    results.put((out.tolist(), is_packed(cache["k"]), materialize(cache["k"]).sum().item()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_goes_on_with_packed_caches(method: str) -> None:
    """A forked child has a copy; one that is spawned gets the packed data over a pipe, in shared memory."""
    model = SelfAttention(heads=2)
    compiled, _ = twins(model, fresh_backend())
    cache = model.new_cache(1, TOKENS)
    calls(compiled, cache, 0, last=2)
    context = torch.multiprocessing.get_context(method) if method == "spawn" else multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=in_child, args=(model, cache, results))
    child.start()
    out, packed, total = results.get(timeout=200)
    child.join(timeout=60)
    assert child.exitcode == 0 and packed
    want = calls(compiled, cache, 0, first=2, last=3)[0]
    torch.testing.assert_close(torch.tensor(out), want)
    torch.testing.assert_close(torch.tensor(total), materialize(cache["k"]).sum())


WARM = """
import hashlib, sys, torch
from torch._dynamo.utils import counters
from jkv_compile import jkv_backend
from tests.models import SelfAttention
from tests.trust.test_processes import calls
torch.manual_seed(0)
model = SelfAttention(heads=2).requires_grad_(False)
for correction in ("taylor", "none"):
    torch.compiler.reset()
    outputs = {}
    for inner in ("eager", "inductor"):
        compiled = torch.compile(model, backend=jkv_backend(bits=2, correction=correction, inner=inner))
        outputs[inner] = torch.cat(calls(compiled, model.new_cache(1, 32), 0, last=2))
    assert torch.allclose(outputs["eager"], outputs["inductor"], atol=1e-5), correction
    print(hashlib.sha256(outputs["inductor"].numpy().tobytes()).hexdigest())
print(counters["inductor"]["fxgraph_cache_hit"], file=sys.stderr)
"""


def test_a_second_process_takes_compiled_code_from_the_first_and_computes_the_same(tmp_path: Path) -> None:
    """Configurations that differ share nothing: each is compared with `inner="eager"`, cold and warm."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # fmt: skip
    runs = [
        subprocess.run([sys.executable, "-c", WARM], cwd=ROOT, env=environment, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert [r.returncode for r in runs] == [0, 0], runs
    cold, warm = (r.stdout.split() for r in runs)
    assert cold == warm and len(set(cold)) == 2
    assert int(runs[1].stderr.split()[-1]) > int(runs[0].stderr.split()[-1])
