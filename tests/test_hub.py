"""Models on the hub. Oracle: a hub that is a folder here, behind the functions of huggingface_hub."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

from ptq.config import load_config
from ptq.errors import ConfigError, FormatError
from ptq.formats.checkpoint import DTYPE_NAMES, CheckpointReader
from ptq.models.hub import HubHeaders
from ptq.plan import make_plan
from ptq.plan_size import describe

MODEL = Path(__file__).resolve().parent.parent / "examples" / "tiny-llama"
NAME = "someone/tiny-llama"


def metadata(dtype: str | None = None) -> SafetensorsRepoMetadata:
    """What the hub says of the example's tensors."""
    reader = CheckpointReader(MODEL)
    tensors, end = {}, 0
    for name in reader.names():
        kind, shape = reader.spec(name)
        count = 1
        for extent in shape:
            count *= extent
        start, end = end, end + count * kind.itemsize
        tensors[name] = TensorInfo(dtype=dtype or DTYPE_NAMES[kind], shape=list(shape), data_offsets=(start, end))
    file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
    weight_map = dict.fromkeys(tensors, "model.safetensors")
    return SafetensorsRepoMetadata(metadata={}, sharded=False, weight_map=weight_map,
                                   files_metadata={"model.safetensors": file})  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Serves the example; returns the patterns of each download."""
    asked: list[list[str]] = []

    def snapshot_download(
        name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        assert name == NAME
        assert ("*.safetensors" in ignore_patterns) == ("*.safetensors" not in allow_patterns)
        assert "*.bin" in ignore_patterns, "as in vocab.bin or vocab/pytorch_model.bin"
        asked.append(allow_patterns)
        for file in MODEL.iterdir():
            if file.suffix == ".json" or "*.safetensors" in allow_patterns:
                shutil.copy(file, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name, revision: metadata())
    return asked


def test_a_dry_run_fetches_no_weight_and_plans_the_same(hub: list[list[str]], tmp_path: Path) -> None:
    settings = [f"model={NAME}", f"output={tmp_path / 'out'}"]
    plan = make_plan(load_config("demo.yaml", settings), weights=False)
    assert "*.safetensors" not in hub[0]
    assert not list(tmp_path.glob("*.safetensors"))
    local = describe(make_plan(load_config("demo.yaml", [f"output={tmp_path / 'out'}"])))
    assert describe(plan).splitlines()[1:] == local.splitlines()[1:]  # the first line names the model


@pytest.mark.parametrize("sharded", [False, True])
def test_a_dry_run_of_a_model_that_was_fetched_asks_the_hub_for_no_header(
    hub: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    monkeypatch.delattr(huggingface_hub, "get_safetensors_metadata")  # as good as no network
    shutil.copy(MODEL / "model.safetensors", tmp_path)
    if sharded:
        (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
        weight_map = dict.fromkeys(CheckpointReader(MODEL).names(), "model-00001-of-00001.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    settings = [f"model={NAME}", f"output={tmp_path / 'out'}"]
    assert isinstance(make_plan(load_config("demo.yaml", settings), weights=False).reader, CheckpointReader)


def test_a_run_fetches_the_weights(hub: list[list[str]], tmp_path: Path) -> None:
    plan = make_plan(load_config("demo.yaml", [f"model={NAME}", f"output={tmp_path / 'out'}"]))
    assert "*.safetensors" in hub[0]
    assert isinstance(plan.reader, CheckpointReader)


def test_headers_say_what_the_file_says(hub: list[list[str]]) -> None:
    headers, reader = HubHeaders(NAME, None), CheckpointReader(MODEL)
    assert headers.names() == reader.names()
    assert all(headers.spec(name) == reader.spec(name) for name in reader.names())
    tensor = headers.tensor("model.norm.weight")
    assert tensor.is_meta
    assert (tensor.dtype, tuple(tensor.shape)) == reader.spec("model.norm.weight")


def test_what_the_hub_refuses_is_a_sentence(hub: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(error: Exception) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", fail)

    for error in (OSError("no route to host."), HFValidationError("no route to host")):
        refuse(error)
        with pytest.raises(ConfigError, match="no route to host. Check the name, the network and your token"):
            HubHeaders(NAME, None)
    refuse(NotASafetensorsRepoError("only a pickle"))
    with pytest.raises(FormatError, match="must hold safetensors"):
        HubHeaders(NAME, None)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name, revision: metadata("F4"))
    with pytest.raises(FormatError, match="found F4"):
        HubHeaders(NAME, None)
    assert issubclass(HfHubHTTPError, OSError)  # what covers gated and missing models
