"""Models on the Hugging Face hub: their files, or only their headers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ptq.errors import ConfigError, FormatError
from ptq.formats.checks import DTYPES
from ptq.formats.codec import TensorSpec
from ptq.formats.staging import read_json
from ptq.models.description import DESCRIPTION, WEIGHTS


@contextmanager
def _sentences(model: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model must be a local directory or a hub model this machine may read; {model!r} is no directory and "
            f"the hub answered: {str(error).splitlines()[0].rstrip('.')}. Check the name, the network and your token"
        ) from error


def download(model: str, revision: str | None, *, weights: bool) -> Path:
    """A directory with a hub model's files, fetched once and then from the cache; without ``weights`` all but those.

    Raises:
        ConfigError: no such model, no network, or no permission.
    """
    from huggingface_hub import snapshot_download

    wanted, never = list(DESCRIPTION), list(WEIGHTS)
    if weights:
        never.remove("*.safetensors")
        wanted.append("*.safetensors")
    with _sentences(model):
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=never))


def holds_weights(directory: Path) -> bool:
    """Whether all shards of a hub model lie in its directory, from an earlier download."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return (directory / "model.safetensors").is_file()
    shards = read_json(index).get("weight_map")
    return isinstance(shards, dict) and all((directory / str(file)).is_file() for file in shards.values())


class HubHeaders:
    """Names, dtypes, shapes and sizes of a hub model's tensors, from the first bytes of its shards.

    No weight is fetched. Stands where `ptq.formats.checkpoint.CheckpointReader` does in a plan.
    """

    def __init__(self, model: str, revision: str | None) -> None:
        """Ask the hub.

        Raises:
            ConfigError: no such model, no network, or no permission.
            FormatError: the model has no safetensors, or a dtype this project does not know.
        """
        from huggingface_hub import get_safetensors_metadata
        from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

        self._specs: dict[str, TensorSpec] = {}
        self._sizes: dict[str, int] = {}
        try:
            with _sentences(model):
                metadata = get_safetensors_metadata(model, revision=revision)
        except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
            raise FormatError(
                f"a hub model must hold safetensors; {model}: {str(error).splitlines()[0]}. Pickled weights are never "
                "read: convert them where you trust them"
            ) from error
        for file, content in metadata.files_metadata.items():
            unknown = {info.dtype for info in content.tensors.values()} - DTYPES.keys()
            if unknown:
                raise FormatError(f"{file}: dtypes must be among {', '.join(DTYPES)}, found {', '.join(unknown)}")
            self._sizes[file] = max((info.data_offsets[1] for info in content.tensors.values()), default=0)
            self._specs |= {name: (DTYPES[info.dtype], tuple(info.shape)) for name, info in content.tensors.items()}

    def names(self) -> tuple[str, ...]:
        """Every tensor."""
        return tuple(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        return self._specs[name]

    def files(self) -> dict[str, int]:
        """File name to bytes of its tensors."""
        return dict(self._sizes)

    def tensor(self, name: str) -> Tensor:
        """Not to be had: a tensor on ``meta``."""
        dtype, shape = self._specs[name]
        return torch.empty(shape, dtype=dtype, device="meta")
