"""ASGI middleware: checks `steering`, turns it into `vllm_xargs`, and says so in the response.

It validates before the engine sees the request, so that a bad one gets its 400
before the first byte of a stream. It serves no routes.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fv_steer.errors import SteeringRequestError
from fv_steer.schema import parse_steering
from fv_steer.serving import REQUEST_KEY
from fv_steer_vllm import request as requests
from fv_steer_vllm.settings import Registry, Resolved

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")

_registry: Registry | None = None


def serve_registry(registry: Registry) -> None:
    """Set the packs this API-server process answers for."""
    global _registry
    _registry = registry


class SteeringMiddleware:
    """Named in the server's `--middleware`; vLLM constructs it."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        if _registry is None:
            raise RuntimeError("fv-steer: the server has steering packs but this process has not loaded them")
        self.app = app
        self.registry = _registry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI event scope."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path not in PATHS:
            await self.app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            return
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            await self.app(scope, _replay(body, receive), send)
            return
        try:
            specs = self._rewrite(content)
        except SteeringRequestError as error:
            await _refuse(send, error)
            return
        body = json.dumps(content).encode()
        acting = [spec for spec in specs if spec.scale != 0]
        await self.app(
            _with_length(scope, len(body)), _replay(body, receive), _with_header(send, acting) if acting else send
        )

    def _rewrite(self, content: dict[str, Any]) -> list[Resolved]:
        """Move `steering` into `content["vllm_xargs"]`; returns what the request will be steered by."""
        xargs = content.get("vllm_xargs")
        if xargs is not None and not isinstance(xargs, dict):
            return []  # vLLM refuses it
        if REQUEST_KEY in (xargs or {}) or requests.RESOLVED_KEY in (xargs or {}):
            raise SteeringRequestError(f"{REQUEST_KEY!r} in vllm_xargs is internal: send 'steering'", "vllm_xargs")
        flat = requests.flat_steering(xargs or {})
        if "steering" in content:
            if flat:
                raise SteeringRequestError("steering was given twice: as 'steering' and in vllm_xargs")
            value = content.pop("steering")
            specs = self.registry.resolve(value)
            sent = [spec.model_dump(exclude_none=True) for spec in parse_steering(value)]
            content["vllm_xargs"] = {**(xargs or {}), REQUEST_KEY: json.dumps(sent)}
        else:
            specs = self.registry.resolve(flat) if flat else self.registry.default()
        if content.get("use_beam_search") and (specs or self.registry.settings.default):
            raise SteeringRequestError(
                "beam search cannot be steered: it resubmits generated text as a prompt. Drop 'use_beam_search'",
                "use_beam_search",
            )
        return specs


async def _read(receive: Receive) -> bytes | None:
    """The whole request body, or None if the client went away."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Deliver `body` once, then whatever the server sends (the disconnect)."""
    pending = True

    async def replayed() -> MutableMapping[str, Any]:
        nonlocal pending
        if pending:
            pending = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


def _with_length(scope: Scope, length: int) -> Scope:
    headers = [(k, v) for k, v in scope["headers"] if k.lower() not in (b"content-length", b"transfer-encoding")]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


def _with_header(send: Send, specs: list[Resolved]) -> Send:
    value = ", ".join(spec.header for spec in specs).encode()

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start" and message["status"] < 400:
            message = {**message, "headers": [*message.get("headers", []), (b"x-fv-steer", value)]}
        await send(message)

    return sending


async def _refuse(send: Send, error: SteeringRequestError) -> None:
    status = error.http_status
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    body = json.dumps({"error": {"message": str(error), "type": kind, "param": error.param, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
