"""A cache filled to a depth without computing a prompt: every token is there, wherever its segment lives."""

import torch

from hetero_attn.engine.timed_steps import fill
from tests.support.models.runtime import cpu_plan, make_engine, toy_workload, uniform_plan
from tests.support.models.toy import make_checkpoint


def test_every_token_of_a_filled_depth_is_stored(tmp_path):
    """Pages start as NaN, so that one token left out would show in the logits; the split plan spills most of them."""
    path = make_checkpoint(tmp_path, "llama")
    workload = toy_workload(path, max_context=128)
    for plan in (cpu_plan(workload), uniform_plan(workload, gpu=0.4, stream=0.3, gpu_kv_heads=1)):
        engine = make_engine(path, plan)
        stores = [store for pool in engine.kv_cache.pools for store in pool.stores.values()]
        for pages in (pages for store in stores for pages in (*store.k, *store.v)):
            pages.fill_(float("nan"))
        sequence = engine.kv_cache.open()
        fill(engine, sequence, 100)
        logits = engine.decode_step([sequence], [5])
        engine.kv_cache.close(sequence)
        engine.close()

        assert sequence.length == 101
        assert torch.isfinite(logits).all()
        assert all(store.free_pages == store.num_pages for store in stores)
