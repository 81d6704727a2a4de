"""Tiny random models of each supported family, with attention far from uniform."""

import torch
import transformers

from fv_steer.families import family_of
from fv_steer.schema import ModelInfo
from offline_extract.engine import LoadedModel

CONFIGS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def tiny_model(model_type: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> LoadedModel:
    config_class, model_class = CONFIGS[model_type]
    config = config_class(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = model_class(config).to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.2) + (parameter.ndim == 1))
    info = ModelInfo(
        id="tiny",
        model_type=model_type,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        hidden_size=32,
        weights_fingerprint="f",
        tokenizer_fingerprint="t",
    )
    return LoadedModel(model, None, info, family_of(model_type))
