"""Steer Hugging Face `generate` with a pack: `with steer(model, pack): model.generate(...)`."""

from fv_steer_hf.steer import steer

__all__ = ["steer"]
