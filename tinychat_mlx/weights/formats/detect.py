"""Select the layout of a checkpoint from config.json, check it against the tensors, refuse all others by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from tinychat_mlx.base.errors import ConfigError, FormatError
from tinychat_mlx.weights.formats.awq_gemm import AwqGemm
from tinychat_mlx.weights.formats.awq_gemv import AwqGemv
from tinychat_mlx.weights.formats.compressed_tensors import CompressedTensors
from tinychat_mlx.weights.formats.llm_awq import LlmAwq
from tinychat_mlx.weights.formats.mlx import BITS, GROUPS, Mlx
from tinychat_mlx.weights.formats.stored import Stored, Tensors
from tinychat_mlx.weights.safetensors import show
from tinychat_mlx.weights.weight import Packed

_REMEDY = "quantise the original model with `tinychat convert`"
_BLOCKS = ("quantization", "quantization_config", "compression_config")
_UNREAD = {  # quant_method -> its name
    "gptq": "GPTQ", "gptq_v2": "GPTQ", "marlin": "Marlin", "awq_marlin": "Marlin", "fp8": "FP8",
    "fbgemm_fp8": "FP8", "mxfp4": "MXFP4", "mxfp8": "MXFP8", "nvfp4": "NVFP4", "modelopt": "NVIDIA ModelOpt",
    "modelopt_fp4": "NVIDIA ModelOpt", "bitsandbytes": "bitsandbytes", "hqq": "HQQ", "aqlm": "AQLM",
    "quanto": "Quanto", "eetq": "EETQ", "vptq": "VPTQ", "higgs": "HIGGS", "torchao": "TorchAO",
    "bitnet": "BitNet", "exl2": "EXL2", "spqr": "SpQR", "quark": "Quark", "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound", "fp_quant": "FP-Quant", "finegrained_fp8": "FP8",
}  # fmt: skip
_MARKS = {  # last part of a tensor's name -> its format
    "qweight": "AWQ", "scaled_zeros": "AWQ", "weight_packed": "compressed-tensors", "g_idx": "GPTQ",
    "weight_g_idx": "compressed-tensors with reordered columns", "weight_scale_inv": "FP8",
    "absmax": "bitsandbytes", "SCB": "bitsandbytes", "quant_map": "bitsandbytes", "W_q": "HQQ",
    "codebooks": "AQLM",
}  # fmt: skip


class Layout(Protocol):
    """A storage layout of quantised modules."""

    @property
    def name(self) -> str: ...

    @property
    def w_bit(self) -> int: ...

    @property
    def group_size(self) -> int:
        """Inputs per group; -1: one group per row."""

    @property
    def key(self) -> str:
        """Suffix of the tensor that exactly the quantised modules have."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of all tensors of a quantised module, except its bias."""

    def read(self, stored: Stored) -> Packed: ...

    def fits(self, stored: Stored) -> bool:
        """Whether the dtypes and shapes of a module's tensors match this layout."""


_FAMILY = {Mlx: "MLX affine", CompressedTensors: "compressed-tensors"}


def declared(config: dict[str, Any]) -> list[Layout]:
    """Return the layouts that config.json allows: none without quantisation, else usually one.

    There are two if AWQ's version is not given; then the tensors decide. Raises ConfigError.
    """
    block = _block(config)
    if block is None:
        return []
    method = block.get("quant_method")
    if method is None and "bits" in block:
        return [_mlx(block)]
    method = str(method).lower()
    if method == "awq":
        return _awq(block)
    if method == "compressed-tensors":
        return [_compressed(block)]
    raise _refuse(_UNREAD.get(method, f"quant_method {show(method)}"))


def choose(layouts: list[Layout], tensors: Tensors, names: Iterable[str]) -> Layout | None:
    """Return the declared layout that the tensors have, None for plain floats.

    Raises FormatError if config.json and the tensors disagree.
    """
    found = families(tensors, names)
    expected = _FAMILY.get(type(layouts[0]), "AWQ") if layouts else None
    for family, name in found.items():
        if family not in ("AWQ", "MLX affine", "compressed-tensors"):
            raise FormatError(
                f"{show(name)} is {family}, which tinychat does not read",
                where=tensors.where(name),
                remedy=_REMEDY,
            )
        if family != expected:
            said = f"declares {expected}" if expected else "has no quantisation"
            raise _disagree(tensors, name, f"is {family}, config.json {said}")
    if not layouts:
        return None
    if expected not in found:
        raise FormatError(f"declares {expected}, but no tensor has this format", where="config.json")
    name = found[expected]
    stored = Stored(tensors, name.rpartition(".")[0])
    for layout in layouts:
        if layout.fits(stored):
            return layout
    shapes = ", ".join(f"{s} {list(stored.info(s)[1])}" for s in layouts[0].suffixes if stored.has(s))
    raise _disagree(tensors, name, f"is not laid out as {' or '.join(a.name for a in layouts)} ({shapes})")


def families(tensors: Tensors, names: Iterable[str]) -> dict[str, str]:
    """Return the quantisation families among the tensors, each with its first tensor."""
    found: dict[str, str] = {}
    for name in names:
        module, _, suffix = name.rpartition(".")
        family = _MARKS.get(suffix)
        if suffix == "scales" and f"{module}.weight" in tensors:
            family = "MLX affine" if f"{module}.biases" in tensors else "an MX or NV float form"
        elif suffix == "qweight" and f"{module}.g_idx" in tensors:
            family = "GPTQ"
        elif suffix == "qweight" and not any(f"{module}.{z}" in tensors for z in ("qzeros", "scaled_zeros")):
            family = "Marlin or another AWQ form without zero points"
        elif suffix == "weight_scale" and f"{module}.weight_packed" not in tensors:
            family = "FP8 or INT8"
        elif suffix.endswith("_blocks"):
            family = "MXFP4"
        if family is not None:
            found.setdefault(family, name)
    return found


def _block(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the quantisation block. MLX writes it twice, multimodal models into text_config."""
    nested = config.get("text_config")
    places = [config, nested] if isinstance(nested, dict) else [config]
    blocks = [(key, place[key]) for place in places for key in _BLOCKS if place.get(key) not in (None, {})]
    for key, block in blocks:
        if not isinstance(block, dict):
            raise ConfigError(f"{key} is {show(block)}, not a table", where="config.json")
        if block != blocks[0][1]:
            raise ConfigError(f"{blocks[0][0]} and {key} disagree", where="config.json", remedy=_REMEDY)
    return blocks[0][1] if blocks else None


def _mlx(block: dict[str, Any]) -> Mlx:
    bits, group = _mlx_form(block, "quantization")
    overrides: dict[str, tuple[int, int]] = {}
    for module, value in block.items():
        if isinstance(value, dict):
            form = {"bits": bits, "group_size": group} | value
            overrides[module] = _mlx_form(form, f"quantization.{show(module)}")
        elif module not in ("bits", "group_size", "mode") and not isinstance(value, bool):
            raise ConfigError(
                f"unknown value {show(value)} of quantization.{show(module)}", where="config.json"
            )
    return Mlx(bits, group, overrides)


def _mlx_form(block: dict[str, Any], where: str) -> tuple[int, int]:
    mode = block.get("mode", "affine")
    if mode != "affine":
        raise _refuse(f"MLX mode {show(mode)}", where)
    return _one_of(block, "bits", BITS, where), _one_of(block, "group_size", GROUPS, where)


def _awq(block: dict[str, Any]) -> list[Layout]:
    where = "quantization_config"
    _one_of(block, "bits", (4,), where)
    group = _group_size(block, where)
    if block.get("zero_point", True) is not True:
        raise _refuse("AWQ without zero points (Marlin's kind)", where)
    spellings = ("version", "format", "checkpoint_format")
    version = next((block[key] for key in spellings if block.get(key) is not None), None)
    if block.get("backend") == "llm-awq" or version == "llm-awq":
        return [LlmAwq(group)]
    layouts: dict[str, list[Layout]] = {
        "none": [AwqGemm(group), AwqGemv(group)],
        "gemm": [AwqGemm(group)],
        "gemv": [AwqGemv(group)],
        "gemv_fast": [LlmAwq(group, "qzeros")],
    }
    if str(version).lower() not in layouts:
        raise _refuse(f"AWQ version {show(version)}", where)
    return layouts[str(version).lower()]


def _compressed(block: dict[str, Any]) -> CompressedTensors:
    where = "quantization_config"
    if block.get("format") != "pack-quantized":
        raise _refuse(f"compressed-tensors format {show(block.get('format'))}", where)
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if (value := block.get(key)) and value != {"format": "dense"}:
            raise _refuse(f"compressed-tensors with {key}", where)
    groups = block.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError(
            f"{where}.config_groups is {show(groups)}, not a table of schemes", where="config.json"
        )
    schemes = [_scheme(group, f"{where}.config_groups.{name}") for name, group in groups.items()]
    if any(scheme != schemes[0] for scheme in schemes):
        raise _refuse("compressed-tensors with several schemes", where)
    return schemes[0]


def _scheme(group: Any, where: str) -> CompressedTensors:
    if not isinstance(group, dict) or not isinstance(weights := group.get("weights"), dict):
        raise ConfigError(f"{where} has no table of weights", where="config.json")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise _refuse(f"compressed-tensors with quantised {key}", where)
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise _refuse(f"compressed-tensors with actorder {show(weights['actorder'])}", where)
    if weights.get("type", "int") != "int" or weights.get("dynamic", False) is not False:
        raise _refuse(f"compressed-tensors with weights of type {show(weights.get('type'))}", where)
    _one_of(weights, "num_bits", (4,), f"{where}.weights")
    symmetric = weights.get("symmetric", True)
    strategy = weights.get("strategy")
    if not isinstance(symmetric, bool) or strategy not in ("group", "channel"):
        raise _refuse(f"compressed-tensors strategy {show(strategy)}, symmetric {show(symmetric)}", where)
    group_size = -1 if strategy == "channel" else _group_size(weights, f"{where}.weights")
    return CompressedTensors(group_size, symmetric)


def _group_size(block: dict[str, Any], where: str) -> int:
    size = block.get("group_size")
    if type(size) is not int or size != -1 and not (0 < size < 2**31 and size % 32 == 0):
        raise ConfigError(
            f"{where}.group_size is {show(size)}, not a multiple of 32 or -1", where="config.json"
        )
    return size


def _one_of(block: dict[str, Any], key: str, allowed: tuple[int, ...], where: str) -> int:
    value = block.get(key)
    if type(value) is not int or value not in allowed:
        read = ", ".join(map(str, allowed))
        raise ConfigError(
            f"{where}.{key} is {show(value)}; tinychat reads {read}", where="config.json", remedy=_REMEDY
        )
    return value


def _refuse(what: str, where: str = "quantization_config") -> ConfigError:
    return ConfigError(
        f"{where} has {what}, which tinychat does not read", where="config.json", remedy=_REMEDY
    )


def _disagree(tensors: Tensors, name: str, what: str) -> FormatError:
    return FormatError(f"{show(name)} {what}", where=tensors.where(name))


def check_left_out(config: dict[str, Any], quantised: frozenset[str]) -> None:
    """Raise ConfigError if a quantised module is listed as not quantised in config.json.

    Names match by whole parts: "mlp.gate" does not match "mlp.gate_proj". Patterns ("re:…") are ignored, because a
    malicious one may never finish; the tensors decide in any case.
    """
    block = _block(config) or {}
    listed = [module for module, value in block.items() if value is False]
    for key in ("modules_to_not_convert", "ignore"):
        names = block.get(key) or []
        if not isinstance(names, list):
            raise ConfigError(f"{key} is {show(names)}, not a list of modules", where="config.json")
        listed += names
    plain = [f".{name}." for name in listed if isinstance(name, str)]
    for module in quantised if plain else ():
        if any(name in f".{module}." for name in plain):
            raise ConfigError(
                f"{show(module)} is listed as not quantised, but it is quantised",
                where="config.json",
                remedy="download the model again",
            )
