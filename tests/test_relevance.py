"""Single-position AttnLRP gives the relevance of a full backward pass with the paper's rules."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fv_steer.families import FAMILIES
from offline_extract.attnlrp import attnlrp
from offline_extract.engine import last_logits
from offline_extract.prompts import Prompt
from offline_extract.relevance import head_relevance
from offline_extract.tasks import Pair
from tiny import CONFIGS, tiny_model


def _norm(module, x):
    return module.weight * (x / (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt().detach())


def _halved(x):
    return 0.5 * x + (0.5 * x).detach()


def reference_relevance(model, prompt, halve_products=True):
    """Full forward and backward in fp64, rules written out as in the paper's Table 3; every position has a gradient."""
    cut = _halved if halve_products else (lambda x: x)
    core, config = model.model, model.config
    ids = torch.tensor([prompt.ids])
    hidden = core.embed_tokens(ids).detach().requires_grad_()
    cos, sin = core.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    causal = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=hidden.dtype).triu(1)
    attention = []
    for layer in core.layers:
        x = _norm(layer.input_layernorm, hidden)
        att = layer.self_attn
        q, k, v = (
            p(x).view(1, -1, n, config.head_dim)
            for p, n in (
                (att.q_proj, config.num_attention_heads),
                (att.k_proj, config.num_key_value_heads),
                (att.v_proj, config.num_key_value_heads),
            )
        )
        if hasattr(att, "q_norm"):
            q, k = _norm(att.q_norm, q), _norm(att.k_norm, k)
        q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        groups = config.num_attention_heads // config.num_key_value_heads
        k, v = k.repeat_interleave(groups, 1), v.transpose(1, 2).repeat_interleave(groups, 1)
        weights = (cut(q @ k.transpose(2, 3)) * att.scaling + causal).softmax(-1)
        weights.retain_grad()
        attention.append(weights)
        hidden = hidden + att.o_proj(cut(weights @ v).transpose(1, 2).flatten(2))
        x = _norm(layer.post_attention_layernorm, hidden)
        gate = layer.mlp.gate_proj(x)
        hidden = hidden + layer.mlp.down_proj(cut(gate * gate.sigmoid().detach() * layer.mlp.up_proj(x)))
    logits = model.lm_head(_norm(core.norm, hidden))[0, -1]
    logits[prompt.target].backward()
    relevance = torch.stack([(w * w.grad)[0, :, -1, list(prompt.frame)].clamp(min=0).sum(-1) for w in attention])
    return relevance, logits.detach()


PROMPTS = [
    Prompt(Pair("x", ("y",)), (5, 9, 33, 71, 8, 14), 17, (2, 3)),
    Prompt(Pair("x", ("y",)), (5, 9, 33, 4, 6, 44, 80, 3), 60, (1, 2, 5)),
    Prompt(Pair("x", ("y",)), (5, 9, 33, 12, 50), 2, (1,)),
]


def test_every_family_has_a_parity_test():
    """A row in the table without a tiny model here cannot exist."""
    assert set(FAMILIES) == set(CONFIGS)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_relevance_equals_full_backward(model_type):
    """Batched over a shared prefix, left-padded, cached: the same numbers as an independent full pass."""
    loaded = tiny_model(model_type, dtype=torch.float64)
    ours = head_relevance(loaded, PROMPTS)
    logits = last_logits(loaded, [p.ids for p in PROMPTS])
    for row, prompt in enumerate(PROMPTS):
        relevance, expected = reference_relevance(loaded.model, prompt)
        torch.testing.assert_close(logits[row], expected.float(), rtol=1e-5, atol=1e-5)
        # The paper's Table 3 counts half of A's relevance (its product rule halves it once more).
        torch.testing.assert_close(ours[row].double(), 2 * relevance, rtol=1e-4, atol=1e-6)
    assert ours.max() > 1e-3


def test_reference_can_fail():
    """A wrong rule (products not halved) gives other numbers, so the parity test can fail."""
    loaded = tiny_model("llama", dtype=torch.float64)
    wrong, _ = reference_relevance(loaded.model, PROMPTS[0], halve_products=False)
    ours = head_relevance(loaded, PROMPTS[:1])[0].double()
    assert not torch.allclose(ours, wrong, rtol=1e-2)
    assert not torch.allclose(ours, 2 * wrong, rtol=1e-2)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_patches_are_undone(model_type):
    """After the rules' context, also after an exception in it, the model is as before."""
    loaded = tiny_model(model_type)
    before = last_logits(loaded, [p.ids for p in PROMPTS])
    implementation = loaded.model.config._attn_implementation
    with pytest.raises(RuntimeError, match="inside"), attnlrp(loaded.model, loaded.family):
        raise RuntimeError("inside")
    assert loaded.model.config._attn_implementation == implementation
    assert not any("forward" in m.__dict__ for m in loaded.model.modules())
    torch.testing.assert_close(last_logits(loaded, [p.ids for p in PROMPTS]), before, rtol=0, atol=0)
