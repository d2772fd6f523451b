"""The plan of a conversion, made and checked before anything is written: what every tensor becomes, in which shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from convert.policy import RECIPES, Form, Policy, check_patterns
from convert.source import Matrix, Source
from ivcore.adapter import Adapter
from ivcore.checkpoint import check_specs
from ivcore.config import ModelConfig
from ivcore.errors import ConfigError
from ivcore.shards import FLOAT_NAMES, TensorSpec, shard_names, split

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
DEFAULT_GROUP_SIZE = 64
DEFAULT_SHARD_BYTES = 5 * 10**9
_DTYPE_FIELDS = ("torch_dtype", "dtype")


@dataclass(frozen=True)
class Options:
    """What is asked of a conversion; the names are the command line's.

    bits: 4 or 8, or another width that MLX packs; dtype: "bf16", "fp16", "fp32", None keeps what is stored; keep: shell
    patterns of modules left in float beside the vision tower; adapter: a LoRA adapter's folder, to be merged.
    """

    bits: int | None = None
    group_size: int | None = None
    dtype: str | None = None
    keep: tuple[str, ...] = ()
    recipe: str | None = None
    adapter: str | Path | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES

    def __post_init__(self) -> None:
        if self.recipe is not None and self.recipe not in RECIPES:
            raise ConfigError(f"There is no recipe {self.recipe!r}; use one of {', '.join(RECIPES)}.")
        if self.recipe is not None and self.bits is not None:
            raise ConfigError(f"--bits {self.bits} and --recipe {self.recipe} exclude each other; give one of them.")
        if self.bits is not None and self.bits not in (2, 3, 4, 5, 6, 8):
            raise ConfigError(f"--bits {self.bits} cannot be packed; use 4 or 8.")
        if self.group_size is not None and self.bits is None and self.recipe is None:
            raise ConfigError("--group-size is of quantised groups, but nothing is quantised: add --bits or --recipe.")
        if self.group_size not in (None, 32, 64, 128):
            raise ConfigError(f"--group-size {self.group_size} is not one of 32, 64, 128.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype} is not one of {', '.join(DTYPES)}.")
        if self.keep and self.bits is None and self.recipe is None:
            raise ConfigError("--keep says what is not quantised, but nothing is: add --bits or --recipe.")
        if self.adapter == "":
            raise ConfigError("--adapter has no value; name the folder of a LoRA adapter, or leave it out.")
        if self.shard_bytes < 1:
            raise ConfigError("--shard-size must be at least one byte.")


@dataclass(frozen=True)
class Job:
    """One tensor of the model, from its stored form to its written one. reason: why its form is not the common one."""

    matrix: Matrix
    dtype: str
    form: Form | None
    adapted: bool
    reason: str

    @property
    def copies(self) -> bool:
        """Whether the stored bytes are written as they are."""
        return not self.adapted and (self.dtype, self.form) == (self.matrix.dtype, self.matrix.form)

    @cached_property
    def outputs(self) -> dict[str, TensorSpec]:
        """The tensors it writes, in order."""
        name, form = self.matrix.name, self.form
        if form is None:
            return {name: TensorSpec(self.matrix.shape, self.dtype)}
        module = name.removesuffix(".weight")
        rows, columns = self.matrix.shape
        groups = TensorSpec((rows, columns // form.group_size), self.dtype)
        weight = TensorSpec((rows, columns * form.bits // 32), "U32")
        return {name: weight, f"{module}.scales": groups, f"{module}.biases": groups}

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs.values())


@dataclass(frozen=True)
class Plan:
    """shards: file name -> its jobs, in the order of the source's files; config: what config.json will say."""

    source: Source
    options: Options
    adapter: Adapter | None
    shards: dict[str, tuple[Job, ...]]
    config: dict[str, Any]

    @property
    def jobs(self) -> list[Job]:
        return [job for jobs in self.shards.values() for job in jobs]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors to be written."""
        return sum(job.nbytes for job in self.jobs)

    def specs(self, shard: str) -> dict[str, TensorSpec]:
        return {name: spec for job in self.shards[shard] for name, spec in job.outputs.items()}


@dataclass(frozen=True)
class Row:
    """One line of the plan: all tensors of a kind that become the same. Bytes before and after."""

    kind: str
    tensors: int
    before: str
    after: str
    reason: str
    nbytes_before: int
    nbytes_after: int


def make_plan(source: Source, options: Options) -> Plan:
    """What a conversion will do; raises ConfigError or CheckpointError for options or an adapter that do not fit."""
    matrices = source.matrices()
    modules = [matrix.name.removesuffix(".weight") for matrix in matrices if matrix.name.endswith(".weight")]
    check_patterns(options.keep, modules)
    adapter = Adapter.load(options.adapter) if options.adapter is not None else None
    if adapter:
        adapter.check({m.name.removesuffix(".weight"): m.shape for m in matrices if m.name.endswith(".weight")})
    policy = Policy(
        options.bits,
        options.group_size or DEFAULT_GROUP_SIZE,
        options.keep,
        options.recipe,
        source.config.text.num_hidden_layers,
    )
    jobs = {matrix.name: _job(matrix, options, policy, adapter) for matrix in matrices}
    shards = split({name: job.nbytes for name, job in jobs.items()}, options.shard_bytes)
    by_shard = {
        file: tuple(jobs[name] for name in names) for file, names in zip(shard_names(len(shards)), shards, strict=True)
    }
    plan = Plan(source, options, adapter, by_shard, _config(source, options, policy, list(jobs.values())))
    specs = {name: spec for job in jobs.values() for name, spec in job.outputs.items()}
    shapes = {name: spec.shape for name, spec in specs.items()}
    check_specs(specs, ModelConfig.from_dict(plan.config, shapes=shapes, source="the converted config"), "the plan")
    return plan


def _job(matrix: Matrix, options: Options, policy: Policy, adapter: Adapter | None) -> Job:
    module = matrix.name.removesuffix(".weight")
    adapted = adapter is not None and module in adapter.modules
    # A double is no dtype that a model is stored in.
    dtype = DTYPES[options.dtype] if options.dtype else "F32" if matrix.dtype == "F64" else matrix.dtype
    if not policy.quantizes:
        form = None if options.dtype else matrix.form
        return Job(matrix, dtype, form, adapted, "")
    if not matrix.name.endswith(".weight"):
        return Job(matrix, dtype, None, adapted, "not a matrix")
    form, reason = policy.form(module, matrix.shape)
    return Job(matrix, dtype, form, adapted, reason)


def _config(source: Source, options: Options, policy: Policy, jobs: list[Job]) -> dict[str, Any]:
    """config.json's content: the source's, with every default written out, the dtype, and MLX's quantization block."""
    config = source.config.to_dict()
    config.pop("quantization", None)
    config.pop("quantization_config", None)
    for section in (config, config["text_config"], config["vision_config"]):
        for field in _DTYPE_FIELDS:
            if field in section:
                dtype = options.dtype or ("fp32" if section[field] == "float64" else None)
                section[field] = FLOAT_NAMES[DTYPES[dtype]] if dtype else section[field]
    packed = {job.matrix.name.removesuffix(".weight"): job.form for job in jobs if job.form}
    if packed:
        common = _common(packed, source, policy)
        block: dict[str, Any] = asdict(common)
        block |= {module: asdict(form) for module, form in packed.items() if form != common}
        # The second name is the one that Hugging Face's hub and mlx-lm show.
        config["quantization"] = config["quantization_config"] = block
    return config


def _common(packed: Mapping[str, Form], source: Source, policy: Policy) -> Form:
    if policy.quantizes:
        bits = policy.bits or RECIPES[policy.recipe or ""].low
        return Form(bits, policy.group_size)
    stored = source.config.quantization
    assert stored is not None, packed
    return Form(stored.bits, stored.group_size)


def summarize(plan: Plan) -> list[Row]:
    """The plan by kind of tensor, in the order of the model; a layer's number makes no kind of its own."""
    rows: dict[tuple[str, str, str, str], list[Job]] = {}
    for job in plan.jobs:
        before = _describe(job.matrix.dtype, job.matrix.form)
        key = (kind_of(job.matrix.name), before, _describe(job.dtype, job.form), job.reason)
        rows.setdefault(key, []).append(job)
    specs = plan.source.checkpoint.specs
    return [
        Row(
            *key[:1], len(jobs), *key[1:],
            sum(specs[name].nbytes for job in jobs for name in job.matrix.stored),
            sum(job.nbytes for job in jobs),
        )
        for key, jobs in sorted(rows.items())
    ]  # fmt: skip


def kind_of(name: str) -> str:
    """The kind of a tensor: its name without the model's prefix and the numbers of its layer."""
    parts = name.removeprefix("model.").removeprefix("language_model.").split(".")
    return ".".join(part for part in parts if not part.isdigit())


def _describe(dtype: str, form: Form | None) -> str:
    return f"{form.bits} bits, groups of {form.group_size}" if form else DTYPE_WORDS[dtype]


DTYPE_WORDS = {dtype: word for word, dtype in DTYPES.items()} | {"F64": "fp64"}
