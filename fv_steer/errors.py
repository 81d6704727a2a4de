"""Every error fv-steer raises on purpose.

FvSteerError                  exit 1   http 500
├── WorkFailedError           exit 1   http 500   the input was fine, the work was not
│   └── WeakPackError         exit 1              the pack does no better than its controls
└── BadInputError             exit 2   http 400
    ├── PackFormatError                           the file is not a valid pack
    ├── PackMismatchError                         a valid pack, made for another model
    ├── TaskError                                 unknown task, bad dataset
    ├── ModelError                                unknown, missing or unsupported model
    └── SteeringRequestError                      a request's `steering` is wrong
        └── UnknownAliasError          http 404   `model: BASE:NAME` names no pack
"""

from typing import ClassVar


class FvSteerError(Exception):
    """Base class; `str(error)` is a complete message for the user."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500


class WorkFailedError(FvSteerError):
    """The input was valid but the work could not be done."""


class WeakPackError(WorkFailedError):
    """The model cannot do the task, or the pack does no better than random heads."""


class BadInputError(FvSteerError):
    """Something the caller passed is wrong."""

    exit_code = 2
    http_status = 400


class PackFormatError(BadInputError):
    """The file is not a valid steering pack."""


class PackMismatchError(BadInputError):
    """The pack was made for another model."""


class TaskError(BadInputError):
    """The task is unknown or its dataset is invalid."""


class ModelError(BadInputError):
    """The model is unknown, missing or of an unsupported family."""


class SteeringRequestError(BadInputError):
    """A request's steering fields are invalid. `param` names the field."""

    def __init__(self, message: str, param: str = "steering") -> None:
        super().__init__(message)
        self.param = param


class UnknownAliasError(SteeringRequestError):
    """A `BASE:NAME` model alias names no loaded pack."""

    http_status = 404
