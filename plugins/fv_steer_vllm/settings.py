"""The plugin's settings and the packs they name, as every process of a server sees them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fv_steer._version import __version__
from fv_steer.errors import BadInputError, PackFormatError, SteeringRequestError
from fv_steer.pack import Pack, check_fits, read_pack
from fv_steer.schema import PACK_NAME_PATTERN, Apply, Mode, ModelInfo, SteeringSpec, parse_steering
from fv_steer.serving import CONFIG_KEY


class Settings(BaseModel):
    """What travels in vLLM's `additional_config["fv_steer"]`, and so in its compile hash.

    `digests` and `plugin` are filled in at start: they keep compile caches of
    other packs, other plugin versions and of plain vLLM apart.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    packs: dict[str, str]
    default: str | None = None
    max_packs: int | None = None
    ignore_fingerprint: bool = False
    digests: dict[str, str] = {}
    plugin: str = ""


def settings_of(additional_config: Any) -> Settings | None:
    """The settings in an `additional_config`, or None if it holds none. Raises BadInputError."""
    value = additional_config.get(CONFIG_KEY) if isinstance(additional_config, dict) else None
    if value is None:
        return None
    try:
        return Settings.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadInputError(f"additional_config[{CONFIG_KEY!r}].{where}: {first['msg']}") from None


def parse_pack_flags(values: list[str]) -> dict[str, str]:
    """`--steering-pack` values, `[NAME=]PATH`, as name -> absolute path. A directory stands for every pack in it."""
    packs: dict[str, str] = {}
    for value in values:
        name, separator, path = value.rpartition("=")
        target = Path(path).expanduser().resolve()
        if target.is_dir():
            found = sorted(target.glob("*.safetensors"))
            if separator:
                raise BadInputError(f"--steering-pack {value}: {target} is a directory, so it takes no NAME=")
            if not found:
                raise BadInputError(f"--steering-pack {value}: no *.safetensors in {target}")
            entries = [(file.stem, file) for file in found]
        else:
            entries = [(name if separator else target.stem, target)]
        for key, file in entries:
            if not re.match(PACK_NAME_PATTERN, key):
                raise BadInputError(f"--steering-pack {value}: {key!r} is no valid pack name (letters, digits, . _ -)")
            if key in packs:
                raise BadInputError(f"--steering-pack names {key!r} twice: {packs[key]} and {file}")
            packs[key] = str(file)
    return packs


@dataclass(frozen=True)
class Resolved:
    """One spec with every default filled in."""

    name: str
    digest: str
    mode: Mode
    scale: float
    layer: int
    apply: Apply

    @property
    def header(self) -> str:
        """This spec in the `x-fv-steer` header."""
        return f"{self.name}@{self.digest[:12]};scale={self.scale:g};mode={self.mode}"


class Registry:
    """The loaded packs by the name they are served under."""

    def __init__(self, settings: Settings) -> None:
        """Read every pack; raises BadInputError if one is bad or changed since the server started."""
        if settings.max_packs is not None and len(settings.packs) > settings.max_packs:
            raise BadInputError(
                f"{len(settings.packs)} steering packs, but --max-steering-packs is {settings.max_packs}"
            )
        self.packs: dict[str, Pack] = {name: read_pack(path) for name, path in settings.packs.items()}
        for name, pack in self.packs.items():
            if settings.digests and settings.digests.get(name) != pack.digest:
                raise PackFormatError(f"pack {name!r} ({settings.packs[name]}) changed while the server was starting")
        if settings.default is not None and settings.default not in self.packs:
            raise BadInputError(f"--steering-default {settings.default!r} is not loaded; {self._loaded}")
        self.settings = settings.model_copy(
            update={"digests": {n: p.digest for n, p in self.packs.items()}, "plugin": __version__}
        )

    @property
    def _loaded(self) -> str:
        return f"loaded: {', '.join(sorted(self.packs)) or 'none'}"

    def check(self, model: ModelInfo) -> None:
        """Raise PackMismatchError unless every pack fits the model."""
        for pack in self.packs.values():
            check_fits(pack, model, ignore_fingerprint=self.settings.ignore_fingerprint)

    def resolve(self, steering: Any) -> list[Resolved]:
        """A request's `steering` value with defaults filled in; empty for none. Raises SteeringRequestError."""
        resolved = [self._resolve(spec) for spec in parse_steering(steering)]
        if len({item.apply for item in resolved}) > 1:
            raise SteeringRequestError(
                "the items of a 'steering' list must share one 'apply' (last, generation or all)", "steering.apply"
            )
        return resolved

    def default(self) -> list[Resolved]:
        """What a request gets that does not mention steering."""
        return self.resolve(self.settings.default)

    def _resolve(self, spec: SteeringSpec) -> Resolved:
        pack = self.packs.get(spec.pack)
        if pack is None:
            raise SteeringRequestError(f"unknown steering pack {spec.pack!r}; {self._loaded}", "steering.pack")
        use, n_layers = pack.manifest.recommended, pack.manifest.model.n_layers
        mode = spec.mode or use.mode
        if spec.layer is not None and mode != "fv":
            raise SteeringRequestError(
                "'steering.layer' is for mode 'fv'; dfv has a place for each head", "steering.layer"
            )
        if spec.layer is not None and spec.layer >= n_layers:
            raise SteeringRequestError(
                f"'steering.layer' {spec.layer} is out of range: the model has layers 0 to {n_layers - 1}",
                "steering.layer",
            )
        return Resolved(
            name=spec.pack,
            digest=pack.digest,
            mode=mode,
            scale=float(use.scale if spec.scale is None else spec.scale),
            layer=(use.layer if spec.layer is None else spec.layer) if mode == "fv" else -1,
            apply=spec.apply or use.apply,
        )
