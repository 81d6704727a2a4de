"""HF steering equals editing the computation by hand, and leaves no trace behind."""

import numpy as np
import pytest
import torch

from fv_steer.families import FAMILIES
from fv_steer.steer import Offsets, o_projs, steered
from offline_extract.aie import indirect_effect
from offline_extract.engine import captured_heads, generate, last_logits, zero_shot_logits
from offline_extract.heads import function_vector, top_heads
from offline_extract.prompts import Prompt
from offline_extract.tasks import Pair
from tiny import tiny_model

IDS = [(5, 9, 33, 71, 8, 14), (7, 2, 61)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_dfv_at_every_position_equals_a_bias(model_type):
    """`apply="all"` is the same as an o_proj bias of W_O times the offset, written into the weights."""
    loaded = tiny_model(model_type)
    offset = np.random.default_rng(0).normal(size=32).astype(np.float32)
    ids = torch.tensor([IDS[0]])
    with torch.no_grad():
        with steered(loaded.model, Offsets({1: offset}, {}), "all"):
            ours = loaded.model(ids).logits
        projection = o_projs(loaded.model)[1]
        projection.bias = torch.nn.Parameter(projection.weight @ torch.from_numpy(offset))
        torch.testing.assert_close(ours, loaded.model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("apply", ["last", "generation", "all"])
@pytest.mark.parametrize("where", ["heads", "residual"])
def test_left_padded_batch_equals_rows_alone(apply, where):
    """Padding and batch-mates change nothing: each row's greedy tokens are those it gets alone."""
    loaded = tiny_model("llama")
    offset = np.random.default_rng(1).normal(size=32).astype(np.float32) * 3
    offsets = Offsets({1: offset}, {}) if where == "heads" else Offsets({}, {1: offset})
    with steered(loaded.model, offsets, apply):
        together = generate(loaded, IDS, 6)
        alone = [generate(loaded, [ids], 6)[0] for ids in IDS]
    cut = [row[: len(a)] for row, a in zip(together, alone, strict=True)]
    assert cut == alone
    assert alone != [generate(loaded, [ids], 6)[0] for ids in IDS]


def test_hooks_are_removed_on_exceptions():
    """An exception inside the block leaves the model unsteered."""
    loaded = tiny_model("llama")
    before = last_logits(loaded, IDS)
    with pytest.raises(RuntimeError, match="inside"), steered(loaded.model, Offsets({0: np.ones(32, np.float32)}, {})):
        raise RuntimeError("inside")
    torch.testing.assert_close(last_logits(loaded, IDS), before, rtol=0, atol=0)


def test_fv_is_the_sum_of_what_the_heads_write():
    """FV at a layer where all heads are selected equals the attention output made of the means."""
    loaded = tiny_model("llama")
    with captured_heads(loaded) as captured:
        last_logits(loaded, IDS[:1])
    mean = torch.stack([captured[layer][0] for layer in range(3)]).numpy()
    heads = np.array([[1, h] for h in range(4)], dtype=np.int32)
    expected = o_projs(loaded.model)[1](torch.from_numpy(mean[1]).reshape(1, -1))[0]
    np.testing.assert_allclose(function_vector(loaded, heads, mean), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_cached_aie_equals_one_full_forward_per_head():
    """The KV-cached indirect effect is that of replacing the head's output in a full forward pass."""
    loaded = tiny_model("llama")
    mean = np.random.default_rng(2).normal(size=(3, 4, 8)).astype(np.float32) * 2
    prompt = Prompt(Pair("x", ("y",)), IDS[0], 17, ())
    ours = indirect_effect(loaded, prompt, mean)
    clean = last_logits(loaded, [prompt.ids]).softmax(-1)[0, 17]
    for layer, head in np.ndindex(3, 4):

        def replace(module, args, layer=layer, head=head):
            hidden = args[0].clone()
            hidden[0, -1, head * 8 : head * 8 + 8] = torch.from_numpy(mean[layer, head])
            return (hidden,)

        handle = o_projs(loaded.model)[layer].register_forward_pre_hook(replace)
        patched = zero_shot_logits(loaded, [prompt.ids], None).softmax(-1)[0, 17]
        handle.remove()
        assert abs(float(patched - clean) - float(ours[layer, head])) < 1e-6
    assert ours.abs().max() > 1e-4


def test_top_heads_are_sorted_and_stable():
    """Best first; equal scores keep layer, then head order."""
    scores = np.array([[1, 3, 3], [2, 3, 0]], dtype=np.float32)
    assert top_heads(scores, 4).tolist() == [[0, 1], [0, 2], [1, 1], [1, 0]]
