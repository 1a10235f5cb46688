"""Where a recipe runs: the YAML files of `recipes/clusters`, and what is checked before launch. No torch."""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemo_moviegen.recipe import TaeRecipe
from nemo_moviegen.settings import from_plain, nearest

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "clusters"
NOTICE_SECONDS = 300
"""Before its time limit SLURM tells a job so that it saves itself: --signal in slurm/train.sbatch."""
SHORTEST_SECONDS = 2 * NOTICE_SECONDS


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What a site's SLURM wants to be told of a batch job; empty = its own default."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    time_limit: str = ""
    """As sbatch takes it, in quotes: "24:00:00"."""
    gpus_per_node: int = -1
    """GPUs asked for; -1 = as many as ranks, or none on a CPU cluster; 0 = the site counts no GPUs."""
    container: str = ""
    """An image that pyxis takes, file or registry#name; empty = the environment the job is submitted from."""
    mounts: tuple[str, ...] = ()
    """Folders the container sees besides the project's, as /data:/data."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, as --constraint=h100."""
    environment: tuple[str, ...] = ()
    """NAME=value, set for the job and its ranks, as NCCL_IB_HCA=mlx5."""

    def __post_init__(self):
        _check_entries("mounts", self.mounts, r"[^:]+(:[^:]+)+", "SOURCE:TARGET")
        _check_entries("options", self.options, r"--[a-z].*", "--NAME or --NAME=value")
        _check_entries("environment", self.environment, r"[A-Za-z_]\w*=.*", "NAME=value")
        if self.gpus_per_node < -1:
            raise ValueError(f"slurm.gpus_per_node is {self.gpus_per_node}; use -1, 0 or a number of GPUs")
        own_signal = any(option.startswith("--signal") for option in self.options)
        if self.limit_seconds < SHORTEST_SECONDS and not own_signal:
            raise ValueError(
                f"slurm.time_limit is {self.time_limit!r}, and a run saves itself {NOTICE_SECONDS} s before: "
                f"use {SHORTEST_SECONDS // 60} minutes or more, or --signal=B:USR1@SECONDS in slurm.options"
            )

    @property
    def variables(self) -> dict[str, str]:
        """`environment` by name."""
        return dict(entry.split("=", 1) for entry in self.environment)

    @property
    def limit_seconds(self) -> float:
        """Of `time_limit`; infinity where it states none."""
        if self.time_limit.upper() in ("", "UNLIMITED", "INFINITE"):
            return math.inf
        found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", self.time_limit)
        if not found:
            raise ValueError(
                f"slurm.time_limit is {self.time_limit!r}; sbatch takes minutes, hours:minutes:seconds or "
                'days-hours:minutes:seconds, as "24:00:00"'
            )
        days, *parts = (int(part) if part else 0 for part in found.groups())
        hours_first = found[1] is not None or found[4] is not None  # else minutes:seconds
        hours, minutes, seconds = parts if hours_first else (0, *parts[:2])
        return 86400 * days + 3600 * hours + 60 * minutes + seconds


def _check_entries(name, values, pattern, what):
    for value in values:
        if not re.fullmatch(pattern, value) or re.search(r"\s", value):
            raise ValueError(f"slurm.{name} has {value!r}; it needs {what}, without spaces")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One kind of machine and how many of them a run takes; a rank is one GPU, or one CPU process."""

    name: str
    accelerator: str
    """cpu, or the GPU's name: h100, h200."""
    nodes: int
    ranks_per_node: int
    memory_gib: float
    """Memory of one rank."""
    peak_dense_tflops: float = 0.0
    """Dense bf16 peak of one rank, half of what a sheet with sparsity says; 0 = unknown, so no MFU."""
    node_gbyte_s: float = 0.0
    """Bandwidth between ranks of a node, a rank and direction; 0 = unknown."""
    network_gbit_s: float = 0.0
    """Bandwidth between nodes, a rank and direction; 0 = unknown."""
    root: str = "."
    """Folder that the relative paths of a recipe start from."""
    slurm: Slurm = field(default_factory=Slurm)

    def __post_init__(self):
        for name in ("nodes", "ranks_per_node", "memory_gib"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"cluster {self.name}: {name} is {getattr(self, name)}; use a number above 0"
                )
        if not self.root:
            raise ValueError(f"cluster {self.name}: root is empty; use a folder, . for the present one")
        gpus = self.slurm.gpus_per_node
        if 0 < gpus < self.ranks_per_node:
            raise ValueError(
                f"cluster {self.name}: {self.ranks_per_node} ranks on a node of {gpus} GPUs "
                f"(slurm.gpus_per_node), and a rank is a GPU: set ranks_per_node to {gpus}, and nodes to "
                f"{-(-self.num_ranks // gpus)} for as many ranks"
            )

    @property
    def num_ranks(self) -> int:
        """Ranks of a run that takes the whole cluster."""
        return self.nodes * self.ranks_per_node

    @property
    def gpus_asked(self) -> int:
        """GPUs of a node that SLURM is asked for; 0 where it is asked for none."""
        if self.slurm.gpus_per_node >= 0:
            return self.slurm.gpus_per_node
        return 0 if self.accelerator == "cpu" else self.ranks_per_node


def cluster_names() -> list[str]:
    """Names of the clusters there are, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def cluster_file(name) -> Path:
    """Where a cluster is written down: a name of `recipes/clusters`, or the path of a site's own YAML file.

    ValueError names the nearest if there is none.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ValueError(
                f"no cluster file {name}: copy recipes/clusters/site.yaml.template and fill it in"
            )
        return path
    if name not in cluster_names():
        raise ValueError(f"no cluster {name!r}{nearest(name, cluster_names())}")
    return FOLDER / f"{name}.yaml"


def read_cluster(name) -> Cluster:
    """The cluster of that name or file, `${oc.env:...}` filled in; ValueError says what is wrong with it."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = cluster_file(name)
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"cluster {name} ({path.name}): {str(error).splitlines()[0]}") from None
    if isinstance(values, dict) and values.get("slurm", {}) is None:  # every line below it is gone
        del values["slurm"]
    site = values.get("slurm") if isinstance(values, dict) else None
    if isinstance(site, dict) and type(limit := site.get("time_limit")) is int:
        raise ValueError(
            f'cluster {name}: slurm.time_limit must be in quotes, as "24:00:00": YAML reads {limit}'
        )
    cluster = from_plain(Cluster, values, f"cluster {name}")
    if cluster.name != path.stem:
        raise ValueError(f"{path.name} holds the cluster {cluster.name!r}; its name must be {path.stem!r}")
    return cluster


def check_on_cluster(recipe, cluster) -> int:
    """Micro-batches a step of `recipe` takes on `cluster`; ValueError where layout or batch do not divide."""
    try:
        return recipe.num_microbatches(cluster.num_ranks)
    except ValueError as error:
        raise ValueError(f"{recipe.name} on {cluster.name} ({cluster.num_ranks} ranks): {error}") from None


def placed(recipe, cluster):
    """`recipe` with its relative paths below the cluster's root."""
    root = Path(cluster.root)
    if root == Path("."):
        return recipe
    init_from = str(root / recipe.init_from) if recipe.init_from else ""
    if isinstance(recipe, TaeRecipe):
        data = replace(recipe.data, manifest=str(root / recipe.data.manifest))
        vgg_weights = str(root / recipe.loss.vgg_weights) if recipe.loss.vgg_weights else ""
        loss = replace(recipe.loss, vgg_weights=vgg_weights)
        return replace(recipe, data=data, loss=loss, output=str(root / recipe.output), init_from=init_from)
    text_encoders = str(root / recipe.data.text_encoders) if recipe.data.text_encoders else ""
    data = replace(recipe.data, folder=str(root / recipe.data.folder), text_encoders=text_encoders)
    heldout = str(root / recipe.validation.folder) if recipe.validation.folder else ""
    progress = recipe.progress
    if progress.autoencoder:
        progress = replace(progress, autoencoder=str(root / progress.autoencoder))
    return replace(
        recipe,
        data=data,
        progress=progress,
        output=str(root / recipe.output),
        init_from=init_from,
        validation=replace(recipe.validation, folder=heldout),
    )
