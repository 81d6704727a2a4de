"""All contact with vLLM's internals. Written for vLLM 0.32.

Every patch here wraps one function, does so once, and checks first that the
function is there: on another layout `install` raises, and vLLM stops, rather
than serving unsteered.
"""

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

from fv_steer.errors import BadInputError, SteeringRequestError
from fv_steer.modelinfo import model_info
from fv_steer.models import resolve_model
from fv_steer.serving import CONFIG_KEY
from fv_steer_vllm import http
from fv_steer_vllm.prefix_cache import block_key
from fv_steer_vllm.request import requested, resolved_of, with_resolved
from fv_steer_vllm.runtime import HookedLayer, Steering
from fv_steer_vllm.settings import Registry, Settings, parse_pack_flags, settings_of

SUPPORTED = ("0.32",)
MIDDLEWARE = "fv_steer_vllm.http.SteeringMiddleware"
_MARK = "__fv_steer_wrapped__"
_log = logging.getLogger("vllm.fv_steer")


def install() -> None:
    """Apply every patch once; raises RuntimeError on a vLLM it does not know."""
    import vllm

    if not vllm.__version__.startswith(SUPPORTED):
        raise RuntimeError(
            f"fv-steer supports vLLM {', '.join(SUPPORTED)}.x; this is {vllm.__version__}. "
            "Install a supported vLLM, or uninstall fv-steer to run without steering."
        )
    _patch("vllm.engine.arg_utils", "EngineArgs.add_cli_args", _add_flags)
    _patch("vllm.engine.arg_utils", "EngineArgs.from_cli_args", _read_flags)
    _patch("vllm.engine.arg_utils", "EngineArgs.create_engine_config", _check_at_start)
    _patch("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", _resolve_request)
    _patch("vllm.v1.core.kv_cache_utils", "generate_block_hash_extra_keys", _key_blocks)
    _patch("vllm.v1.worker.worker_base", "WorkerWrapperBase.init_device", _steer_worker)


def _patch(module_name: str, path: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module = importlib.import_module(module_name)
    owner, _, name = path.rpartition(".")
    holder = getattr(module, owner, None) if owner else module
    original = vars(holder).get(name) if holder is not None else None
    if original is None:
        raise RuntimeError(f"fv-steer does not fit this vLLM: {module_name}.{path} is not there")
    kind = type(original) if isinstance(original, staticmethod | classmethod) else None
    function = original.__func__ if kind else original
    if getattr(function, _MARK, False):
        return
    wrapped = functools.wraps(function)(wrap(function))
    setattr(wrapped, _MARK, True)
    setattr(holder, name, kind(wrapped) if kind else wrapped)
    if not owner:
        _rebind(name, function, wrapped)


def _rebind(name: str, old: Any, new: Any) -> None:
    """Modules that did `from ... import name` before keep the old function; give them the new one."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and vars(module).get(name) is old:
            setattr(module, name, new)


def _add_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    """Without it `vllm serve --steering-pack` is an unknown argument."""

    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        group = parser.add_argument_group("fv-steer", "Steering packs (fv-steer plugin)")
        group.add_argument(
            "--steering-pack",
            action="append",
            default=None,
            metavar="[NAME=]PATH",
            help="A steering pack, or a directory of packs; repeatable.",
        )
        group.add_argument("--steering-default", metavar="NAME", help="Pack of requests that do not mention steering.")
        group.add_argument("--max-steering-packs", type=int, metavar="N", help="Refuse to start with more packs.")
        group.add_argument(
            "--steering-ignore-fingerprint",
            action="store_true",
            help="Load packs made for other weights of the same geometry.",
        )
        return parser

    return add_cli_args


def _read_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    """`from_cli_args` drops fields it does not know. `args` is changed in place: API servers are spawned with it."""

    def from_cli_args(cls: Any, args: Any) -> Any:
        if getattr(args, "steering_pack", None):
            settings = Settings(
                packs=_or_exit(parse_pack_flags, args.steering_pack),
                default=args.steering_default,
                max_packs=args.max_steering_packs,
                ignore_fingerprint=args.steering_ignore_fingerprint,
            )
            args.additional_config = {**(args.additional_config or {}), CONFIG_KEY: settings.model_dump()}
        elif getattr(args, "steering_default", None) or getattr(args, "max_steering_packs", None):
            sys.exit("fv-steer: --steering-default and --max-steering-packs need --steering-pack")
        if _or_exit(settings_of, getattr(args, "additional_config", None)) is not None:
            middleware = getattr(args, "middleware", None)
            if middleware is not None and MIDDLEWARE not in middleware:
                args.middleware = [*middleware, MIDDLEWARE]
        return original(cls, args)

    return from_cli_args


def _or_exit(function: Callable[..., Any], *args: Any) -> Any:
    """Run `function`; bad input ends a `vllm serve` with its message alone, exit code 1 as vLLM's own."""
    try:
        return function(*args)
    except BadInputError as error:
        sys.exit(f"fv-steer: {error}")


def _check_at_start(original: Callable[..., Any]) -> Callable[..., Any]:
    """Bad packs, packs of another model and features that cannot be steered stop the start, in the front end."""

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = settings_of(self.additional_config)
        if settings is None:
            return original(self, *args, **kwargs)
        serving = "api_server" in str(args[:1]).lower() or "serve" in sys.argv[1:2]
        run = _or_exit if serving else (lambda function, *a: function(*a))
        registry = run(_load, settings, self.model, self.revision)
        self.additional_config = {**self.additional_config, CONFIG_KEY: registry.settings.model_dump()}
        config = original(self, *args, **kwargs)
        run(_refuse_features, config)
        http.serve_registry(registry)
        return config

    return create_engine_config


def _load(settings: Settings, model: str, revision: str | None) -> Registry:
    registry = Registry(settings)
    resolved = resolve_model(str(model), revision=revision)
    registry.check(model_info(resolved.path, model_id=resolved.id))
    return registry


def _refuse_features(config: Any) -> None:
    """Raise BadInputError for what reorders tokens, folds buffers, or reuses KV without our key."""
    parallel, speculative = config.parallel_config, config.speculative_config
    refused = {
        "micro-batching (--enable-dbo, --ubatch-size)": parallel.enable_dbo or getattr(parallel, "ubatch_size", 0) > 1,
        "prefill context parallel": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "decode context parallel": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "a KV connector (--kv-transfer-config): it may reuse KV without the steering key": config.kv_transfer_config
        is not None,
        "speculative decoding other than n-gram": speculative is not None and "ngram" not in str(speculative.method),
        "inductor freezing": _freezes(config),
    }
    for what, present in refused.items():
        if present:
            raise BadInputError(f"steering packs cannot be served with {what}; turn it off or drop --steering-pack")


def _freezes(config: Any) -> bool:
    """Inductor's freezing folds buffers into constants; max_autotune turns it on on CPU."""
    inductor = config.compilation_config.inductor_compile_config or {}
    on_cpu = config.device_config.device_type == "cpu"
    return bool(inductor.get("freezing") or (on_cpu and inductor.get("max_autotune")))


_registries: dict[str, Registry] = {}


def _registry(config: Any) -> Registry | None:
    """The packs of a server's configuration, read once a process."""
    settings = settings_of(config.additional_config)
    if settings is None:
        return None
    key = settings.model_dump_json()
    if key not in _registries:
        _registries[key] = Registry(settings)
    return _registries[key]


def _resolve_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """Every request passes here before the engine, the offline `LLM`'s too: steering is resolved or refused."""

    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        registry = _registry(self.vllm_config)
        if hasattr(params, "extra_args"):
            extra = params.extra_args or {}
            if registry is None:
                if CONFIG_KEY in extra or any(key.startswith("steering_") for key in extra):
                    raise ValueError("the request asks for steering, but no steering pack is loaded")
            else:
                params = _resolved_params(registry, params, bool(kwargs.get("resumable")))
        return original(self, request_id, prompt, params, *args, **kwargs)

    return process_inputs


def _resolved_params(registry: Registry, params: Any, resumable: bool) -> Any:
    if resolved_of(params):
        return params  # n > 1: a child of a request resolved before
    try:
        specs = requested(params.extra_args, registry)
    except SteeringRequestError as error:
        raise ValueError(str(error)) from None
    if specs and resumable:
        raise ValueError("resumable requests cannot be steered: their prompt length changes")
    params = params.clone()
    params.extra_args = with_resolved(params.extra_args, specs)
    return params


def _key_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    """Without it a request reads KV that other steering wrote for the same tokens."""

    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        own = block_key(request, end_token_idx)
        return (keys if own is None else (*(keys or ()), own)), mm_idx

    return generate_block_hash_extra_keys


def _steer_worker(original: Callable[..., Any]) -> Callable[..., Any]:
    """Hooks go in when the worker's `load_model` returns: after LoRA wrapping, before profiling and compiling."""

    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        worker = self.worker
        registry = _registry(worker.vllm_config)
        if registry is not None and not hasattr(worker, "fv_steer"):
            load_model = worker.load_model

            def load_and_hook(*a: Any, **k: Any) -> Any:
                loaded = load_model(*a, **k)
                worker.fv_steer = _install_in(worker, registry)
                return loaded

            worker.load_model = load_and_hook
        return result

    return init_device


def _install_in(worker: Any, registry: Registry) -> Steering:
    runner, config = worker.model_runner, worker.vllm_config
    layers = _find_layers(runner.get_model(), config)
    steering = Steering(
        registry,
        layers,
        hidden_size=config.model_config.get_hidden_size(),
        max_tokens=_max_tokens(config),
        max_seqs=config.scheduler_config.max_num_seqs,
        device=worker.device,
    )
    if hasattr(runner, "model_state"):
        _drive_v2(runner.model_state, steering)
    else:
        _drive_v1(runner, steering)
    packs = ", ".join(f"{name}@{pack.digest[:12]}" for name, pack in registry.packs.items())
    _log.info("fv-steer: %d layers hooked, %d rows; packs: %s", len(layers), steering.n_rows, packs)
    return steering


def _max_tokens(config: Any) -> int:
    """Largest forward pass, graph padding included."""
    sizes = config.compilation_config.cudagraph_capture_sizes or [0]
    return max(config.scheduler_config.max_num_batched_tokens, *sizes) + 64


def _find_layers(model: Any, config: Any) -> list[HookedLayer]:
    """The decoder layers on this worker; raises if a layer has no one output projection."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.linear import RowParallelLinear
    from vllm.model_executor.models.utils import extract_layer_index

    found = []
    rank = get_tensor_model_parallel_rank()
    for name in get_layers_from_vllm_config(config, AttentionLayerBase):
        attention_path = name.rpartition(".")[0]
        attention = model.get_submodule(attention_path)
        projections = [
            child
            for child in attention.children()
            if isinstance(getattr(child, "base_layer", child), RowParallelLinear)
        ]
        if len(projections) != 1:
            raise RuntimeError(
                f"fv-steer: {attention_path} has {len(projections)} output projections, expected one; "
                f"{type(model).__name__} cannot be steered"
            )
        width = getattr(projections[0], "base_layer", projections[0]).input_size_per_partition
        found.append(
            HookedLayer(
                index=extract_layer_index(name),
                layer=model.get_submodule(attention_path.rpartition(".")[0]),
                o_proj=projections[0],
                heads=slice(rank * width, (rank + 1) * width),
            )
        )
    if not found:
        raise RuntimeError(f"fv-steer: no attention layer found in {type(model).__name__}")
    return found


def _drive_v1(runner: Any, steering: Steering) -> None:
    """Model runner V1: fill the buffers between input preparation and the forward pass. Dummy runs skip both."""
    prepare, forward = runner._prepare_inputs, runner._model_forward
    tokens = 0

    def prepare_inputs(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal tokens
        tokens = scheduler_output.total_num_scheduled_tokens
        return prepare(scheduler_output, *args, **kwargs)

    def model_forward(*args: Any, **kwargs: Any) -> Any:
        batch = []
        for request_id in runner.input_batch.req_ids:
            state = runner.requests[request_id]
            batch.append((request_id, resolved_of(state.sampling_params), state.num_prompt_tokens))
        index = runner.req_indices.gpu[:tokens]
        steering.fill(steering.seats(batch), index, runner.positions[:tokens])
        return forward(*args, **kwargs)

    runner._prepare_inputs, runner._model_forward = prepare_inputs, model_forward


def _drive_v2(state: Any, steering: Steering) -> None:
    """Model runner V2: requests are known by id, since dummy batches reuse the slots of real ones."""
    add, prepare, remove, dummy = (
        state.add_request,
        state.prepare_inputs,
        state.remove_request,
        state.prepare_dummy_inputs,
    )
    requests: dict[str, tuple[Any, int]] = {}

    def add_request(req_index: int, new: Any, *args: Any, **kwargs: Any) -> Any:
        requests[new.req_id] = (resolved_of(new.sampling_params), len(new.prompt_token_ids or ()))
        return add(req_index, new, *args, **kwargs)

    def remove_request(req_id: str, *args: Any, **kwargs: Any) -> Any:
        requests.pop(req_id, None)
        return remove(req_id, *args, **kwargs)

    def prepare_inputs(batch: Any, *args: Any, **kwargs: Any) -> Any:
        known = [(request_id, *requests.get(request_id, ((), 0))) for request_id in batch.req_ids]
        counts = batch.query_start_loc[1 : batch.num_reqs + 1] - batch.query_start_loc[: batch.num_reqs]
        index = torch.repeat_interleave(
            torch.arange(batch.num_reqs, device=counts.device), counts, output_size=batch.num_tokens
        )
        steering.fill(steering.seats(known), index, batch.positions[: batch.num_tokens])
        return prepare(batch, *args, **kwargs)

    def prepare_dummy_inputs(*args: Any, **kwargs: Any) -> Any:
        steering.clear()
        return dummy(*args, **kwargs)

    state.add_request, state.remove_request = add_request, remove_request
    state.prepare_inputs, state.prepare_dummy_inputs = prepare_inputs, prepare_dummy_inputs
