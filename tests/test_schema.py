import math
from typing import Any

import pytest
from pydantic import ValidationError

from fv_steer.errors import SteeringRequestError
from fv_steer.schema import Manifest, Recommended, SteeringSpec, parse_steering
from packs import make_pack, manifest_dict


def spec(**fields: Any) -> SteeringSpec:
    return SteeringSpec(**({"pack": "a"} | fields))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        (False, []),
        ("a", [spec()]),
        ({"pack": "a"}, [spec()]),
        (["a"], [spec()]),
        (["a", {"pack": "b", "scale": -2}], [spec(), spec(pack="b", scale=-2.0)]),
        (["a", "a"], [spec(), spec()]),
        ({"pack": "a", "scale": 0}, [spec(scale=0.0)]),
        ({"pack": "a", "scale": 100}, [spec(scale=100.0)]),
        ({"pack": "a", "scale": -100.0}, [spec(scale=-100.0)]),
        ({"pack": "a", "scale": None, "mode": None, "layer": None, "apply": None}, [spec()]),
        (
            {"pack": "a", "scale": 1.5, "mode": "fv", "layer": 3, "apply": "all"},
            [spec(scale=1.5, mode="fv", layer=3, apply="all")],
        ),
        ({"pack": "a", "mode": "dfv", "apply": "last"}, [spec(mode="dfv", apply="last")]),
        ({"pack": "a", "apply": "generation"}, [spec(apply="generation")]),
    ],
)
def test_accepted(value: Any, expected: list[SteeringSpec]) -> None:
    """A name, an object or a list of them gives specs; null and false give none."""
    assert parse_steering(value) == expected


REFUSED = [
    (True, "steering", "got bool"),
    (0, "steering", "got int"),
    (1.5, "steering", "got float"),
    ([], "steering", "empty list"),
    ([["a"]], "steering", "got list"),
    ([None], "steering", "got NoneType"),
    (["a", False], "steering", "got bool"),
    ({}, "steering.pack", "required"),
    ({"scale": 1.0}, "steering.pack", "required"),
    (["a", {"scale": 1.0}], "steering.pack", "required"),
    ("", "steering.pack", "at least 1 character"),
    ({"pack": ""}, "steering.pack", "at least 1 character"),
    ({"pack": None}, "steering.pack", "valid string"),
    ({"pack": 3}, "steering.pack", "valid string"),
    ({"pack": ["a"]}, "steering.pack", "valid string"),
    ({"pack": "a\r\nx: y"}, "steering.pack", "control characters"),
    ({"pack": "\ud800"}, "steering.pack", "valid string"),
    ({"pack": "a", "sclae": 1.0}, "steering.sclae", "known: pack, scale, mode, layer, apply"),
    ({"pack": "a", 1: 1}, "steering.1", "string"),
    ({"pack": "a", "scale": True}, "steering.scale", "valid number"),
    ({"pack": "a", "scale": False}, "steering.scale", "valid number"),
    ({"pack": "a", "scale": "1"}, "steering.scale", "valid number"),
    ({"pack": "a", "scale": [1.0]}, "steering.scale", "valid number"),
    ({"pack": "a", "scale": math.nan}, "steering.scale", "between -100 and 100"),
    ({"pack": "a", "scale": math.inf}, "steering.scale", "between -100 and 100"),
    ({"pack": "a", "scale": -math.inf}, "steering.scale", "between -100 and 100"),
    ({"pack": "a", "scale": 1e9}, "steering.scale", "between -100 and 100"),
    ({"pack": "a", "scale": 100.1}, "steering.scale", "between -100 and 100"),
    ({"pack": "a", "scale": 10**400}, "steering.scale", "between -100 and 100"),
    ({"pack": "a", "scale": -(10**400)}, "steering.scale", "between -100 and 100"),
    ({"pack": "a", "mode": "DFV"}, "steering.mode", "'dfv' or 'fv'"),
    ({"pack": "a", "mode": 1}, "steering.mode", "'dfv' or 'fv'"),
    ({"pack": "a", "mode": []}, "steering.mode", "'dfv' or 'fv'"),
    ({"pack": "a", "apply": "first"}, "steering.apply", "'last', 'generation' or 'all'"),
    ({"pack": "a", "apply": True}, "steering.apply", "'last', 'generation' or 'all'"),
    ({"pack": "a", "layer": -1}, "steering.layer", "greater than or equal to 0"),
    ({"pack": "a", "layer": 10**400}, "steering.layer", "less than or equal to"),
    ({"pack": "a", "layer": True}, "steering.layer", "valid integer"),
    ({"pack": "a", "layer": 1.0}, "steering.layer", "valid integer"),
    ({"pack": "a", "layer": "1"}, "steering.layer", "valid integer"),
]


@pytest.mark.parametrize(("value", "param", "words"), REFUSED)
def test_refused(value: Any, param: str, words: str) -> None:
    """A wrong value is refused as HTTP 400, naming the field and what is wrong with it."""
    with pytest.raises(SteeringRequestError) as caught:
        parse_steering(value)
    assert caught.value.param == param
    assert f"'{param}'" in str(caught.value)
    assert words in str(caught.value)
    assert caught.value.http_status == 400
    str(caught.value).encode()


def test_scale_is_one_number() -> None:
    """An integer scale and the equal float are the same spec, written the same way."""
    (whole,), (real,) = parse_steering({"pack": "a", "scale": 1}), parse_steering({"pack": "a", "scale": 1.0})
    assert repr(whole) == repr(real)
    assert type(whole.scale) is float


def test_specs_are_values() -> None:
    """Specs cannot be changed, and equal ones hash alike (they are cache keys)."""
    assert hash(spec(scale=1)) == hash(spec(scale=1.0))
    with pytest.raises(ValidationError, match="frozen"):
        spec().scale = 2.0  # type: ignore[misc]


def test_manifest_survives_json() -> None:
    """A manifest written as JSON and read back is equal."""
    manifest = make_pack().manifest
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "a b", "-a", "a=b", "a\n", "ä", "a" * 129])
def test_pack_names_are_plain(name: str) -> None:
    """A pack's name cannot hold a path, a separator or a header break."""
    with pytest.raises(ValidationError, match="name"):
        Manifest.model_validate(manifest_dict({"name": name}))


@pytest.mark.parametrize("scale", [math.nan, math.inf, 101, -1e9])
def test_recommended_scale_is_bounded(scale: float) -> None:
    """A pack cannot recommend what a request may not ask for."""
    with pytest.raises(ValidationError, match="scale"):
        Recommended(mode="dfv", scale=scale, apply="all", layer=0)
