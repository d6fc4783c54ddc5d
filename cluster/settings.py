"""All settings of a Loraplex cluster, one model: arguments, `LORAPLEX_*` variables, a file."""

from __future__ import annotations

import difflib
import os
import secrets
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    ByteSize,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from .errors import ClusterSecretError, SettingsError
from .logs import LogConfig
from .settings_sources import ENV_PREFIX, Sources, read_sources

RAY_NAMESPACE = "loraplex"
MIN_SECRET_CHARS = 32
DEFAULT_POOL_BYTES = 1 << 30  # where there is no GPU to share out
DEFAULT_KV_TOKENS = 16384

# The file's table, while `Settings.load` builds from it.
_file_values: ContextVar[dict[str, Any] | None] = ContextVar("_file_values", default=None)


class Settings(BaseSettings):
    """What an operator may change. Sizes are bytes and read "512MiB"; times are seconds.

    An argument wins over the variable `LORAPLEX_<FIELD>`, which wins over the file, which wins
    over the default. The object is frozen and picklable: it travels to every Ray actor of the
    cluster.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
    )

    # Where the service listens, and where it keeps its files.
    host: str = Field("127.0.0.1", description="address of the REST API")
    port: int = Field(8000, ge=0, le=65535, description="port of the REST API, 0: any free one")
    internal_host: str = Field("127.0.0.1", description="address of listeners between processes")
    metrics_host: str = Field("127.0.0.1", description="address of the metrics exporters")
    metrics_port: int = Field(0, ge=0, le=65535, description="port of the admin side's metrics")
    metrics_token: SecretStr | None = Field(None, description="bearer token of the exporters")
    log_format: Literal["text", "json"] = Field("text", description="lines of every process's log")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO")
    trace_endpoint: str | None = Field(
        None, description="OTLP collector, http://host:4318/v1/traces; none: no traces"
    )
    data_dir: Path = Field(Path(".loraplex"), description="local state: store, disk tier, logs")
    cluster_secret: SecretStr | None = Field(None, description="shared by gateways and groups")
    cluster_secret_file: Path | None = Field(None, description="default: DATA_DIR/cluster.secret")

    # The model.
    model_path: str | None = Field(
        None, description="base model: a folder, s3://bucket/prefix, or a repository in HF_HOME"
    )
    model_version: str | None = Field(
        None, description="its exact files; found when a service starts"
    )
    model_endpoint: str | None = Field(None, description="S3 endpoint of the model; none: AWS")
    model_access_key: str | None = Field(None, description="none: boto3's own search")
    model_secret_key: SecretStr | None = Field(None)
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="dummy: random weights; the model's folder needs no weight files"
    )
    served_model_name: str | None = Field(None, description="default: the folder's name")
    demo_dir: Path | None = Field(None, description="folder of the demo model and adapters")

    # The object store.
    store_url: str = Field("s3://loraplex", description="s3://bucket or s3://bucket/prefix")
    store_endpoint: str | None = Field(None, description="S3 endpoint URL; none: AWS")
    store_public_endpoint: str | None = Field(
        None, description="S3 endpoint that uploading clients reach; none: STORE_ENDPOINT"
    )
    store_access_key: str | None = Field(None, description="none: boto3's own search")
    store_secret_key: SecretStr | None = Field(None)
    store_region: str = Field("us-east-1")
    store_kms_key: str | None = Field(
        None, description="id or ARN of the KMS key of SSE-KMS; none: the bucket's own default"
    )

    # Worker groups.
    groups: int = Field(2, ge=1, le=1024, description="worker groups (copies of the model)")
    max_groups: int | None = Field(
        None, ge=1, le=1024, description="groups are added under load up to so many; none: never"
    )
    target_wait_s: float = Field(
        1.0, gt=0, description="groups are added when a new request would wait for longer"
    )
    scale_up_after_s: float = Field(
        30.0, gt=0, description="how long the load must ask for more groups"
    )
    scale_down_after_s: float = Field(600.0, gt=0, description="the same for fewer groups")
    update_surge: int = Field(
        0, ge=0, le=100, description="percent of groups that an update may add; 0: old stop first"
    )
    tp: int = Field(1, ge=1, le=64, description="ranks in a group")
    ep: int = Field(1, ge=1, le=64, description="parts that the experts are split into; divides tp")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on CPU, the checkpoint's own on a GPU"
    )
    torch_threads: int = Field(0, ge=0, description="threads of a rank; 0: cores / ranks")
    pool_bytes: ByteSize | None = Field(
        None, ge=1 << 16, description="adapter pool, a rank; none: 1 GiB, a GPU's share"
    )
    max_lora_rank: int = Field(
        64, ge=1, le=256, description="largest rank of an adapter: GPU kernels set room aside"
    )
    kv_tokens: int | None = Field(
        None, ge=256, description="tokens in a group's KV cache; none: 16384, the rest of a GPU"
    )
    memory_fraction: float = Field(
        0.9, gt=0, le=1, description="of a GPU's memory, what is used; CUDA graphs are beyond it"
    )
    adapter_fraction: float = Field(
        0.3, gt=0, lt=1, description="the pool's share of what weights and activations leave"
    )
    max_batch_tokens: int = Field(2048, ge=16, description="tokens in one engine step")
    max_running: int = Field(64, ge=1, description="sequences decoded together in a group")
    step_adapter_bytes: ByteSize | None = Field(
        None, ge=1, description="distinct adapters of the running sequences; none: all of the pool"
    )
    overtake_slack: float = Field(
        8192.0, ge=0, description="work, in input tokens, that may pass a request without pool room"
    )
    step_timeout_s: float = Field(
        30.0, ge=1, description="a group whose engine step takes longer counts as hung and restarts"
    )
    drain_s: float = Field(
        2.0, ge=0, description="what open requests get when a group or a gateway is to stop"
    )
    disk_cache_bytes: ByteSize = Field(ByteSize(8 << 30), ge=1 << 20, description="a node's disk")
    host_cache_bytes: ByteSize = Field(
        ByteSize(2 << 30), ge=0, description="packs in a node's shared memory, /dev/shm; 0: none"
    )

    # The gateway.
    gateway_replicas: int = Field(1, ge=1, le=256)
    control_resource: str | None = Field(
        None, description="Ray resource of the nodes that controller, ingest and limiter run on"
    )
    ingest_concurrency: int = Field(2, ge=1, le=64, description="uploads validated at once")
    haproxy: bool = Field(False, description="Ray Serve's HAProxy mode (binds all interfaces)")
    max_open_requests: int = Field(
        1000, ge=1, description="tenants' requests open in a gateway; more are told to come later"
    )
    upload_max_bytes: ByteSize = Field(
        ByteSize(64_000_000), ge=1024, description="body of an upload through the gateway"
    )
    presigned_max_bytes: ByteSize = Field(
        ByteSize(16_000_000_000), ge=1024, description="weights uploaded by presigned URL"
    )
    presigned_expires_s: int = Field(3600, ge=60, le=7 * 86400)
    body_max_bytes: ByteSize = Field(ByteSize(8_000_000), ge=1024, description="JSON bodies")
    catalogue_poll_s: float = Field(
        1.0, gt=0, le=60, description="how late another gateway's change of keys or names is seen"
    )
    auth_grace_s: float = Field(
        600.0, ge=0, description="known keys go on so long with the store unreachable"
    )
    unknown_keys_per_minute: int = Field(30, ge=1, description="wrong keys tried by one source")

    # Defaults and bounds of one generation request.
    default_max_tokens: int = Field(16, ge=1, description="/v1/completions; chat: rest of context")
    max_context: int | None = Field(None, ge=1, description="none: the model's own")
    max_choices: int = Field(16, ge=1, description="n")
    max_sequences: int = Field(128, ge=1, description="prompts times n in one request")
    max_logprobs: int = Field(20, ge=0, le=100, description="alternatives shown beside a token")
    max_stop_strings: int = Field(16, ge=1)
    max_stop_chars: int = Field(1024, ge=1, description="length of one stop string")
    max_grammar_bytes: int = Field(32768, ge=1, description="a JSON schema or grammar")
    stream_keepalive_s: float = Field(15.0, gt=0, description="comment on a silent stream")

    @field_validator("store_url")
    @classmethod
    def _check_store_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme != "s3" or not parts.netloc:
            raise ValueError("must look like s3://bucket or s3://bucket/prefix")
        return value

    @field_validator("max_groups")
    @classmethod
    def _check_max_groups(cls, value: int | None, info: ValidationInfo) -> int | None:
        groups = info.data.get("groups", value)
        if value is not None and value < groups:
            raise ValueError(f"must be at least groups = {groups}")
        return value

    @field_validator("ep")
    @classmethod
    def _check_ep(cls, value: int, info: ValidationInfo) -> int:
        tp = info.data.get("tp", value)  # missing: it is wrong itself
        if tp % value:
            raise ValueError(f"must divide tp = {tp}")
        return value

    @field_validator("model_path", mode="before")
    @classmethod
    def _take_path(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("store_endpoint", "store_public_endpoint", "model_endpoint", "trace_endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise ValueError("must look like http://host:port or https://host")
        return value

    @field_validator("host", "internal_host", "metrics_host")
    @classmethod
    def _check_host(cls, value: str) -> str:
        if not value or "/" in value or " " in value:
            raise ValueError("must be an address or host name without scheme or port")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file_settings = InitSettingsSource(settings_cls, _file_values.get() or {})
        return init_settings, env_settings, file_settings

    @classmethod
    def load(cls, config: Path | None = None, **values: Any) -> Settings:
        """Settings from arguments (None: not given), environment, file and defaults.

        Args:
            config: a TOML file of settings; None: LORAPLEX_CONFIG's, if that is set.

        Raises:
            SettingsError: naming every wrong setting, its value, where it comes from and what
                would be right; or the file, when it can't be read.
        """
        return cls.from_sources(read_sources(config, values))

    @classmethod
    def from_sources(cls, sources: Sources) -> Settings:
        """Raises SettingsError as `load` does."""
        token = _file_values.set(dict(sources.file))
        try:
            return cls(**sources.arguments)
        except ValidationError as error:
            raise SettingsError(_explain(error, sources)) from None
        finally:
            _file_values.reset(token)

    def changed(self, **values: Any) -> Settings:
        """A copy with other values, checked. Raises SettingsError."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        values = {name: value for name, value in values.items() if value is not None}
        # The file was read once: what it said is among the given.
        return Settings.from_sources(Sources({**given, **values}))

    @property
    def rank_pool_bytes(self) -> int | None:
        """None: each group finds out what its GPUs have room for."""
        return self._size(self.pool_bytes, DEFAULT_POOL_BYTES)

    @property
    def group_kv_tokens(self) -> int | None:
        """None: each group finds out what its GPUs have room for."""
        return self._size(self.kv_tokens, DEFAULT_KV_TOKENS)

    def _size(self, given: int | None, default: int) -> int | None:
        return default if given is None and self.device != "cuda" else given

    @property
    def control_resources(self) -> dict[str, float]:
        """Ray resources that each of the named actors takes."""
        return {self.control_resource: 0.001} if self.control_resource else {}

    def store_options(self) -> dict[str, Any]:
        """Plain keyword arguments for `adapter_store.ObjectStore`."""
        secret = self.store_secret_key
        return {
            "url": self.store_url,
            "endpoint": self.store_endpoint,
            "access_key": self.store_access_key,
            "secret_key": secret.get_secret_value() if secret else None,
            "region": self.store_region,
            "kms_key": self.store_kms_key,
        }

    @property
    def logs(self) -> LogConfig:
        return LogConfig(self.log_format, self.log_level)

    @property
    def secret_path(self) -> Path:
        return self.cluster_secret_file or self.data_dir / "cluster.secret"

    @property
    def disk_dir(self) -> Path:
        """Folder of the disk tier: packs that any group of this node may read."""
        return self.data_dir / "packs"

    @property
    def model_cache_dir(self) -> Path:
        """Folder of models that come from S3."""
        return self.data_dir / "models"

    @property
    def scratch_dir(self) -> Path:
        """Folder where the ingest actor takes its local copies."""
        return self.data_dir / "scratch"

    def secret_bytes(self) -> bytes:
        """The cluster secret. Raises ClusterSecretError when nobody has set or made it."""
        if self.cluster_secret is not None:
            return self.cluster_secret.get_secret_value().encode()
        raise ClusterSecretError(
            "the cluster secret is not set: call Settings.with_cluster_secret() on the machine "
            f"that starts the cluster, or set {ENV_PREFIX}CLUSTER_SECRET"
        )

    def with_cluster_secret(self) -> Settings:
        """A copy that carries the cluster secret, read from its file, which is made if missing.

        Raises:
            ClusterSecretError: the file can't be read or written, or holds too short a secret.
        """
        if self.cluster_secret is not None:
            return self
        path = self.secret_path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                text = path.read_text().strip()
            else:
                text = secrets.token_hex(32)
                with os.fdopen(fd, "w") as file:
                    file.write(text)
        except OSError as error:
            raise ClusterSecretError(f"cannot use the secret file {path}: {error}") from None
        if len(text) < MIN_SECRET_CHARS:
            raise ClusterSecretError(
                f"the cluster secret in {path} has {len(text)} characters; at least "
                f"{MIN_SECRET_CHARS} are needed. Remove the file to have one made"
            )
        return self.model_copy(update={"cluster_secret": SecretStr(text)})


def is_secret(name: str) -> bool:
    """Whether a setting's value must not be shown."""
    field = Settings.model_fields.get(name)
    return field is not None and "SecretStr" in str(field.annotation)


def _explain(error: ValidationError, sources: Sources) -> str:
    lines = []
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else "?"
        where = sources.label(name)
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, Settings.model_fields, 1)
            meant = f"; did you mean {close[0]}?" if close else ""
            lines.append(f"{where}: there is no such setting{meant}")
            continue
        reason = item["msg"].removeprefix("Value error, ")
        field = Settings.model_fields.get(name)
        shown = "(hidden)" if is_secret(name) else repr(item["input"])
        hint = f" ({field.description})" if field is not None and field.description else ""
        flag = " [by a flag]" if sources.origin(name) == "flag" else ""
        lines.append(f"{where} = {shown}: {reason}{hint}{flag}")
    return "\n".join(lines)
