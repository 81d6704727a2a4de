"""The typed values that cross a boundary: the pack's manifest and a request's steering spec."""

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from fv_steer.errors import SteeringRequestError

Mode = Literal["dfv", "fv"]
Apply = Literal["last", "generation", "all"]
Source = Literal["instruction", "icl", "instruction+icl"]
PromptFormat = Literal["qa", "chat"]
HeadSelection = Literal["lrp", "aie", "random"]
MODES: tuple[Mode, ...] = get_args(Mode)
APPLIES: tuple[Apply, ...] = get_args(Apply)

#: Largest |scale| a request may ask for; beyond it the output is noise.
MAX_SCALE = 100.0

PACK_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"


class _Closed(BaseModel):
    """Unknown keys are an error, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelInfo(_Closed):
    """The base model a pack belongs to."""

    id: str
    revision: str | None = None
    model_type: str
    n_layers: int = Field(gt=0, le=100_000)
    n_heads: int = Field(gt=0, le=100_000)
    n_kv_heads: int = Field(gt=0, le=100_000)
    head_dim: int = Field(gt=0, le=100_000)
    hidden_size: int = Field(gt=0, le=1_000_000)
    weights_fingerprint: str
    tokenizer_fingerprint: str


class FramedInstruction(_Closed):
    """An instruction and its intensional frame (the words that carry the task)."""

    text: str
    frame: str


class DatasetInfo(_Closed):
    """Where the word pairs came from; `digest` is sha256 of the canonical pairs."""

    name: str
    digest: str
    licence: str


class Recipe(_Closed):
    """How a pack was extracted: enough to make it again."""

    source: Source
    source_reason: str = ""
    format: PromptFormat
    instructions: list[FramedInstruction]
    shots: int
    samples: int
    head_selection: HeadSelection
    heads_from: Literal["global", "task"]
    top_k: int = Field(gt=0)
    dtype: str
    seed: int
    dataset: DatasetInfo


class Recommended(_Closed):
    """What a request gets when it does not say otherwise."""

    mode: Mode
    scale: float = Field(ge=-MAX_SCALE, le=MAX_SCALE)
    apply: Apply
    layer: int = Field(ge=0)


class Score(_Closed):
    """A proportion with its 95% Wilson interval."""

    value: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)


class Measurement(_Closed):
    """Accuracy of one arm: first target token (top-1) and whole decoded answer."""

    top1: Score
    exact: Score


class Evaluation(_Closed):
    """Accuracy on `n` held-out words, which no choice was made on."""

    n: int = Field(gt=0)
    unsteered: Measurement
    source_prompt: Measurement
    dfv: Measurement
    fv: Measurement
    random_heads: Measurement


class Manifest(_Closed):
    """A pack's provenance, stored as JSON in the safetensors header."""

    name: str = Field(pattern=PACK_NAME_PATTERN)
    task: str
    description: str
    model: ModelInfo
    recipe: Recipe
    recommended: Recommended
    evaluation: Evaluation | None = None
    versions: dict[str, str]
    created: str


def _finite_scale(value: float) -> float:
    # Compared first: an int may be too large for a float. NaN fails the comparison.
    if not abs(value) <= MAX_SCALE:
        raise ValueError(f"scale must be a finite number between -{MAX_SCALE:g} and {MAX_SCALE:g}")
    return float(value)


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("a pack name has no control characters or unpaired surrogates")
    return value


Scale = Annotated[StrictFloat | StrictInt, AfterValidator(_finite_scale)]


class SteeringSpec(BaseModel):
    """What one request asks for; None takes the pack's recommendation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pack: Annotated[StrictStr, Field(min_length=1), AfterValidator(_printable)]
    scale: Scale | None = None
    mode: Mode | None = None
    layer: Annotated[StrictInt, Field(ge=0, le=100_000)] | None = None
    apply: Apply | None = None


def parse_steering(value: Any) -> list[SteeringSpec]:
    """Parse a request's `steering` value: a name, an object, or a list of them.

    `None` and `False` mean no steering (an empty list).
    Raises SteeringRequestError naming the field that is wrong.
    """
    if value is None or value is False:
        return []
    if isinstance(value, str):
        value = {"pack": value}
    if isinstance(value, list):
        if not value:
            raise SteeringRequestError("'steering' is an empty list; name a pack, or send null for no steering")
        return [spec for item in value for spec in _parse_item(item)]
    return _parse_item(value)


def _parse_item(value: Any) -> list[SteeringSpec]:
    if isinstance(value, str):
        value = {"pack": value}
    if not isinstance(value, dict):
        raise SteeringRequestError(
            f"'steering' must be a pack name, an object with 'pack', or a list of those; got {type(value).__name__}"
        )
    try:
        return [SteeringSpec.model_validate(value)]
    except ValidationError as error:
        raise _request_error(error) from None


def _request_error(error: ValidationError) -> SteeringRequestError:
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    param = f"steering.{field}" if field else "steering"
    allowed = ", ".join(SteeringSpec.model_fields)
    if first["type"] == "extra_forbidden":
        return SteeringRequestError(f"'{param}' is not a known field; known: {allowed}", param)
    if first["type"] == "missing":
        return SteeringRequestError(f"'{param}' is required", param)
    message = str(first["msg"]).removeprefix("Value error, ")
    return SteeringRequestError(f"'{param}': {message}", param)
