"""The offline extractor: runs prompts with HF transformers and writes steering packs."""
