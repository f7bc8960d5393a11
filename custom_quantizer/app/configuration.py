"""The quantizer that a user asked for, by a scheme, a file or a quantizer itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

from torchao.quantization.pt2e.quantizer import QuantizationConfig

from custom_quantizer.core.schemes import OpScheme
from custom_quantizer.errors import ConfigError
from custom_quantizer.planning.quantizer import IntegerQuantizer

__all__ = ["Configuration", "as_quantizer"]

Configuration: TypeAlias = (
    str | os.PathLike[str] | OpScheme | QuantizationConfig | Mapping[str, Any]
)
"""What :func:`as_quantizer` makes a quantizer of."""


def as_quantizer(config: Configuration | IntegerQuantizer | None) -> IntegerQuantizer:
    """Make a quantizer of a scheme, a configuration file or its content.

    Raises:
        ConfigError: ``config`` is none of these, or is not legal.
        InputError: the file cannot be read.
    """
    if isinstance(config, IntegerQuantizer):
        return config
    if config is None:
        return IntegerQuantizer().set_global("a8w8")
    if isinstance(config, Mapping) or _is_file_name(config):
        return IntegerQuantizer.from_config(cast("str | Mapping[str, Any]", config))
    if isinstance(config, (str, OpScheme, QuantizationConfig)):
        return IntegerQuantizer().set_global(config)
    raise ConfigError(
        f"config is a scheme name, a configuration file, its content or an IntegerQuantizer, not "
        f"{type(config).__name__}"
    )


def _is_file_name(config: object) -> bool:
    if isinstance(config, os.PathLike):
        return True
    return isinstance(config, str) and (
        config.endswith((".yaml", ".yml", ".json")) or os.path.isfile(config)
    )
