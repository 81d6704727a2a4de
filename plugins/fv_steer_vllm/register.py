"""Entry point `vllm.general_plugins`: vLLM calls `register()` in every process, and may call it again."""


def register() -> None:
    """Install the plugin's patches; raises if this vLLM is not one they are known to fit.

    The imports are here because vLLM logs and swallows an exception at import
    of a plugin, and would then serve unsteered; one raised here stops it.
    """
    from fv_steer_vllm import compat

    compat.install()
