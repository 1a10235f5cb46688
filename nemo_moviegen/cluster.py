"""Where a recipe runs: the YAML files of `recipes/clusters`, and what is checked before launch. No torch."""

from dataclasses import dataclass, replace
from pathlib import Path

from nemo_moviegen.recipe import TaeRecipe
from nemo_moviegen.settings import from_plain, nearest

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "clusters"


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

    def __post_init__(self):
        for name in ("nodes", "ranks_per_node", "memory_gib"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"cluster {self.name}: {name} is {getattr(self, name)}; use a number above 0"
                )
        if not self.root:
            raise ValueError(f"cluster {self.name}: root is empty; use a folder, . for the present one")

    @property
    def num_ranks(self) -> int:
        """Ranks of a run that takes the whole cluster."""
        return self.nodes * self.ranks_per_node


def cluster_names() -> list[str]:
    """Names of the clusters there are, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_cluster(name) -> Cluster:
    """The cluster of that name, `${oc.env:...}` filled in; ValueError names the nearest if unknown."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if name not in cluster_names():
        raise ValueError(f"no cluster {name!r}{nearest(name, cluster_names())}")
    path = FOLDER / f"{name}.yaml"
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"cluster {name} ({path.name}): {str(error).splitlines()[0]}") from None
    cluster = from_plain(Cluster, values, f"cluster {name}")
    if cluster.name != name:
        raise ValueError(f"{path.name} holds the cluster {cluster.name!r}; its name must be {name!r}")
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
