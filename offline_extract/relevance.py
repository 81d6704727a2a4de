"""Head relevance by single-position AttnLRP (paper, section 3.1).

Above the embedding only the query position S depends on S, so the positions
before it need no gradient: their keys and values are computed once, and
relevance is propagated through the last token alone. The result is that of a
full backward pass.
"""

from collections.abc import Sequence

import torch

from offline_extract.attnlrp import attnlrp
from offline_extract.engine import LoadedModel, make_batch, prefill
from offline_extract.prompts import Prompt


def head_relevance(loaded: LoadedModel, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Relevance of each head for each prompt, [B, n_layers, n_heads], float32 on the CPU.

    rho^h = sum over frame tokens j of max(A_Sj * dA_Sj, 0), where
    dA_Sj = g_h . V_j and g_h is the gradient at head h's output. Prompts
    should share their context: it is then run once.
    """
    model = loaded.model
    batch = make_batch([p.ids for p in prompts], loaded.device)
    upto = batch.ids.shape[1] - 1
    cache = prefill(model, batch, upto=upto)
    with attnlrp(model, loaded.family) as trace, torch.enable_grad():
        embedded = model.get_input_embeddings()(batch.ids[:, -1:]).detach().requires_grad_()
        logits = model(
            inputs_embeds=embedded,
            attention_mask=batch.full_mask,
            position_ids=batch.positions[:, -1:],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        targets = torch.tensor([p.target for p in prompts], device=logits.device)
        chosen = logits.gather(1, targets[:, None]).sum()
        layers = range(loaded.info.n_layers)
        gradients = torch.autograd.grad(chosen, [trace.outputs[layer] for layer in layers])
    frames = torch.zeros_like(batch.full_mask, dtype=torch.float32)
    for row, prompt in enumerate(prompts):
        frames[row, [batch.column(row, j) for j in prompt.frame]] = 1
    scores = []
    for layer, gradient in zip(layers, gradients, strict=True):
        derivative = torch.einsum("bhd,bhtd->bht", gradient[:, 0].float(), trace.values[layer].float())
        scores.append(((trace.weights[layer].float() * derivative).clamp(min=0) * frames[:, None]).sum(-1))
    return torch.stack(scores, dim=1).cpu()
