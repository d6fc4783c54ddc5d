"""The fields of an adapter_config.json: each read with its type and bounds, or refused by name."""

from __future__ import annotations

import json
from typing import Any

from .errors import AdapterRefused
from .patterns import Pattern, PatternError, PatternTable
from .quoting import printable, safe_key, show

MAX_RANK = 256
MAX_CONFIG_BYTES = 8 * 1024 * 1024
MAX_TARGETS = 100_000

# What a truthy value of these fields means; none of it is served.
_UNSERVED = {
    "use_dora": "DoRA",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "fan_in_fan_out": "fan_in_fan_out weights",
    "lora_bias": "a LoRA bias",
    "use_qalora": "QALoRA",
    "trainable_token_indices": "trained token embeddings",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "use_bdlora": "block-diagonal LoRA",
    "megatron_config": "Megatron layers",
}
# Initialisations that change the base weights too: the factors fit that changed model only.
_BASE_CHANGING_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")

# Fields that are read here, or that say nothing about what the adapter computes.
_KNOWN = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "use_rslora",
}


def load_fields(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_CONFIG_BYTES:
        raise AdapterRefused(
            "bad_config",
            f"adapter_config.json has {len(raw)} bytes, at most {MAX_CONFIG_BYTES} are read",
        )
    try:
        fields = json.loads(raw.decode("utf-8"))
    # RecursionError: JSON nested deeper than the interpreter's stack.
    except (ValueError, RecursionError) as error:
        raise AdapterRefused(
            "bad_config", f"adapter_config.json isn't valid JSON: {printable(str(error))}"
        ) from None
    if not isinstance(fields, dict):
        raise AdapterRefused("bad_config", "adapter_config.json isn't a JSON object")
    return fields


def refuse_unserved(fields: dict[str, Any]) -> None:
    for field, meaning in _UNSERVED.items():
        if fields.get(field):
            raise _unserved(field, f"{meaning} isn't served; {field} is {show(fields[field])}")
    if fields.get("bias", "none") not in (None, "none"):
        raise _unserved("bias", f"trained biases aren't served; bias is {show(fields['bias'])}")
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise _unserved(
            "init_lora_weights",
            f"init_lora_weights {show(init)} changes the base weights; save the adapter with "
            "path_initial_model_for_weight_conversion to make it a plain LoRA",
        )
    for field, value in fields.items():
        if value and field not in _KNOWN and field not in _UNSERVED:
            raise _unserved(
                field, f"the config field {show(field)} isn't known, so its effect can't be served"
            )


def bad_field(field: str, problem: str) -> AdapterRefused:
    return AdapterRefused("bad_config", f"adapter_config.json: {problem}", safe_key(field))


def _unserved(field: str, problem: str) -> AdapterRefused:
    return AdapterRefused("unsupported_feature", f"adapter_config.json: {problem}", safe_key(field))


def read_rank(value: Any, field: str) -> int:
    if type(value) is not int:
        raise bad_field(field, f"a rank must be an integer, {field} has {show(value)}")
    if not 1 <= value <= MAX_RANK:
        raise AdapterRefused(
            "rank_limit",
            f"adapter_config.json: {field} has rank {show(value)}, it must be 1 to {MAX_RANK}",
            field,
        )
    return value


def read_alpha(value: Any, field: str) -> float:
    # Bounded so that every scale alpha / rank is a finite float32.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise bad_field(field, f"an alpha must be a finite number, {field} has {show(value)}")
    return float(value)


def read_flag(fields: dict[str, Any], field: str) -> bool:
    value = fields.get(field)
    if value is not None and not isinstance(value, bool):
        raise bad_field(field, f"{field} must be true or false, it is {show(value)}")
    return bool(value)


def read_text(fields: dict[str, Any], field: str) -> str | None:
    value = fields.get(field)
    if value is not None and not isinstance(value, str):
        raise bad_field(field, f"{field} must be a string, it is {show(value)}")
    return value


def read_mapping(fields: dict[str, Any], field: str) -> dict[str, Any]:
    value = fields.get(field) or {}
    if not isinstance(value, dict) or len(value) > MAX_TARGETS:
        raise bad_field(field, f"{field} must map at most {MAX_TARGETS} patterns to numbers")
    return value


def read_table(values: dict[str, Any], field: str) -> PatternTable:
    try:
        return PatternTable(values)
    except PatternError as error:
        raise bad_field(field, f"{field}: pattern {error}") from None


def _pattern(text: str, field: str) -> Pattern:
    try:
        return Pattern(text)
    except PatternError as error:
        raise bad_field(field, f"{field}: pattern {show(text)} {error}") from None


def _strings(value: Any, field: str) -> frozenset[str]:
    if (
        not isinstance(value, list)
        or len(value) > MAX_TARGETS
        or not all(isinstance(v, str) and v for v in value)
    ):
        raise bad_field(field, f"{field} must be a list of at most {MAX_TARGETS} names")
    return frozenset(value)


def read_targets(value: Any, field: str) -> frozenset[str] | Pattern | str:
    """target_modules: a string is "all-linear" or a regular expression for the whole name."""
    if value is None:
        return frozenset()
    if isinstance(value, str):
        return "all-linear" if value.lower() == "all-linear" else _pattern(value, field)
    return _strings(value, field)


def read_excluded(value: Any) -> frozenset[str] | Pattern:
    if not value:
        return frozenset()
    if isinstance(value, str):
        return _pattern(value, "exclude_modules")
    return _strings(value, "exclude_modules")


def read_parameters(value: Any) -> frozenset[str]:
    return _strings(value, "target_parameters") if value is not None else frozenset()


def read_layers(fields: dict[str, Any]) -> frozenset[int] | None:
    value = fields.get("layers_to_transform")
    if value is None:
        return None
    value = value if isinstance(value, list) else [value]
    if not all(type(v) is int for v in value):
        raise bad_field(
            "layers_to_transform",
            f"layers_to_transform must hold layer numbers, it is {show(value)}",
        )
    return frozenset(value)


def read_layers_pattern(fields: dict[str, Any]) -> tuple[Pattern, ...]:
    value = fields.get("layers_pattern")
    if not value:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > 16 or not all(isinstance(t, str) for t in texts):
        raise bad_field("layers_pattern", "layers_pattern must be a name or a list of at most 16")
    return tuple(_pattern(rf"(?:^|.*?\.){text}", "layers_pattern") for text in texts)
