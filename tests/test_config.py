"""Configurations. Oracles: the values written in the YAML, exact messages, and dump/load as inverses."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ptq.config import (
    AWQConfig,
    CalibrationConfig,
    DatasetConfig,
    EvaluationConfig,
    GPTQConfig,
    RunConfig,
    SchemeOverride,
    check_evaluation,
    dump,
    load_config,
    matches,
    scheme_for,
    unused_patterns,
)
from ptq.errors import ConfigError
from ptq.formats.codec import Scheme

ROOT = Path(__file__).resolve().parent.parent
BASE = "model: some/model\noutput: out\nmethod: gptq\n"
LINEARS = [f"model.layers.{i}.{name}" for i in (1, 10) for name in ("self_attn.o_proj", "mlp.down_proj")] + ["lm_head"]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads YAML text from an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)

    def load(text, *overrides):
        Path("run.yaml").write_text(text, encoding="utf-8")
        return load_config("run.yaml", overrides)

    return load


def test_defaults_are_the_documented_ones(load):
    config = load(BASE)
    assert config == RunConfig(model="some/model", output="out", method="gptq")
    assert (config.bits, config.group_size, config.symmetric, config.format) == (4, 128, True, "gptq")
    assert config.exclude == ("lm_head",)
    assert config.calibration == CalibrationConfig(DatasetConfig("allenai/c4", "en"), 128, 2048, 8, 0, False)
    assert (config.gptq, config.awq) == (GPTQConfig(0.01, "static", 128), AWQConfig(20, True))
    assert config.evaluation is None


def test_every_key_of_the_tree_stands_in_demo_yaml_and_in_its_docstring():
    def check(cls, mapping):
        for item in fields(cls):
            assert item.name in mapping, f"{cls.__name__}.{item.name}"
            assert f"``{item.name}``" in cls.__doc__, f"{cls.__name__}.{item.name}"

    tree = yaml.safe_load((ROOT / "configs/demo.yaml").read_text(encoding="utf-8"))
    check(RunConfig, tree)
    for cls in (GPTQConfig, AWQConfig, CalibrationConfig):
        check(cls, tree[cls.__name__.removesuffix("Config").lower()])
    tree["evaluation"]["dataset"] = None  # the alternative to files
    check(EvaluationConfig, tree["evaluation"])


@pytest.mark.parametrize("name", ["demo.yaml", "llama8b.yaml", "llama8b-awq.yaml"])
def test_shipped_configurations_load_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(name)
    assert not Path(config.output).is_absolute()
    Path("copy.yaml").write_text(dump(config), encoding="utf-8")
    assert load_config("copy.yaml") == config


def test_demo_finds_the_repositorys_files_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("demo.yaml")
    assert Path(config.model) == ROOT / "examples/tiny-llama"
    assert config.calibration.dataset.files == (str(ROOT / "examples/text/calibration.txt"),)
    assert [Path(file).name for file in config.evaluation.files] == ["eval-novel.txt", "eval-nonfiction.txt"]
    assert config.output == "out/demo"


def test_the_working_directory_comes_before_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("examples/tiny-llama").mkdir(parents=True)
    assert load_config("demo.yaml").model == "examples/tiny-llama"
    Path("demo.yaml").write_text(BASE, encoding="utf-8")
    assert load_config("demo.yaml").model == "some/model"


def test_paths_in_a_configuration_of_ones_own_count_from_the_working_directory(load):
    Path("model").mkdir()
    Path("a.txt").write_text("a", encoding="utf-8")
    text = "model: model\noutput: out\nmethod: rtn\ncalibration: {dataset: {files: [a.txt]}}\n"
    config = load(text + "evaluation: {dataset: {files: [./a.txt]}}")
    assert (config.model, config.calibration.dataset.files) == ("model", ("a.txt",))
    assert config.evaluation.source.files == ("a.txt",)
    with pytest.raises(ConfigError, match="found none at .*calibration.txt; check the path"):
        load(BASE + "calibration: {dataset: {files: [examples/text/calibration.txt]}}")


PATHS = {
    "model": ("model: ", lambda config: config.model),
    "output": ("output: ", lambda config: config.output),
    "calibration.dataset.files": ("files: [", lambda config: config.calibration.dataset.files[0]),
    "evaluation.files": ("evaluation: {files: [", lambda config: config.evaluation.source.files[0]),
}


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("written", ["$PLACE/x", "${PLACE}/x"])
def test_variables_in_paths(key, written, load, tmp_path, monkeypatch):
    """As a shell has them. Oracle: the path written out; a variable that is not set is named."""
    (tmp_path / "x").mkdir() if key == "model" else (tmp_path / "x").write_text("a")
    Path("model").mkdir()
    Path("a.txt").write_text("a")
    text = (
        "model: model\noutput: out\nmethod: rtn\ncalibration: {dataset: {files: [a.txt]}}\nevaluation: {files: [a.txt]}"
    )
    before, of = PATHS[key]
    text = re.sub(re.escape(before) + r"[\w.]+", lambda found: f"{before}{json.dumps(written)}", text, count=1)
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert of(load(text)) == str(tmp_path / "x")
    monkeypatch.delenv("PLACE")
    sentence = (
        f"{key} must name environment variables that are set; {written!r} has {written[:-2]}, which is not: set P"
    )
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        load(text)


def test_overrides_from_the_command_line(load):
    config = load(
        BASE + "evaluation: null",
        "calibration.samples=64",
        "gptq.damping=1e-2",
        "evaluation.dataset.name=some/text",
        "evaluation.window = 1024",
        "overrides.model.layers.0.bits=8",
        "overrides.model.layers.1={bits: 3, group_size: 64}",
        "symmetric=false",
        "revision='1234567'",
    )
    assert config.calibration.samples == 64
    assert config.gptq.damping == 0.01
    assert (config.evaluation.dataset.name, config.evaluation.window) == ("some/text", 1024)
    assert config.overrides == {"model.layers.0": SchemeOverride(bits=8), "model.layers.1": SchemeOverride(3, 64)}
    assert config.symmetric is False
    assert config.revision == "1234567"
    assert load(BASE, "bits=8", "bits=3").bits == 3
    assert load(BASE, "overrides={'a.*': {symmetric: false}}").overrides == {"a.*": SchemeOverride(symmetric=False)}


MISTAKES = {
    "unknown key": (BASE + "grup_size: 64", "unknown key grup_size; did you mean group_size?"),
    "unknown nested key": (
        BASE + "calibration: {sampels: 3}",
        "unknown key calibration.sampels; did you mean calibration.samples?",
    ),
    "key of another level": (BASE + "samples: 3", "unknown key samples; did you mean calibration.samples?"),
    "nothing like it": (BASE + "awq: {xyz: 3}", "unknown key awq.xyz; the keys here are grid, clip"),
    "unknown override key": (
        BASE + "overrides: {mlp: {bit: 3}}",
        "unknown key overrides.mlp.bit; did you mean overrides.mlp.bits?",
    ),
    "not whole": (
        BASE + "calibration: {samples: many}",
        "calibration.samples must be a whole number, found 'many'",
    ),
    "bool for int": (BASE + "bits: true", "bits must be a whole number, found True"),
    "float for int": (BASE + "bits: 4.0", "bits must be a whole number, found 4.0"),
    "int for bool": (BASE + "strict: 1", "strict must be true or false, found 1"),
    "text for float": (BASE + "gptq: {damping: low}", "gptq.damping must be a number, found 'low'"),
    "number for text": (BASE + "revision: 12", "revision must be text that is not empty (quote what YAML would "),
    "empty text": (BASE.replace("some/model", "''"), "model must be text that is not empty"),
    "null": (BASE + "bits: null", "bits must be a whole number, found None"),
    "bits": (BASE + "bits: 5", "bits must be 2, 3, 4 or 8, or {budget: average}, found 5"),
    "group zero": (BASE + "group_size: 0", "group_size must be -1 (one group per channel) or 1 or more columns, found"),
    "group below -1": (BASE + "group_size: -2", "or 1 or more columns, found -2"),
    "override group": (BASE + "overrides: {mlp: {group_size: 0}}", "overrides.mlp.group_size must be -1"),
    "samples": (BASE + "calibration: {samples: 0}", "calibration.samples must be 1 or more, found 0"),
    "seed": (BASE + "calibration: {seed: -1}", "calibration.seed must be between 0 and 2**63 - 1, found -1"),
    "damping": (BASE + "gptq: {damping: 0}", "gptq.damping must be above 0, at most 1, found 0.0"),
    "nan": (BASE + "gptq: {damping: .nan}", "gptq.damping must be above 0, at most 1, found nan"),
    "method": (BASE.replace("gptq", "gtpq"), "method must be gptq, awq or rtn, found 'gtpq'; did you mean gptq?"),
    "order": (BASE + "gptq: {activation_order: 3}", "gptq.activation_order must be static or none, found 3"),
    "format": (BASE + "format: [gptq]", "format must be gptq, gptq_v2, awq or compressed-tensors, found ['gptq']"),
    "device": (BASE + "device: gpu", "device must be auto, cpu, cuda or cuda:N (as cuda:1), found 'gpu'"),
    "size": (BASE + "max_shard_size: 5 gigs", "max_shard_size must be a size such as 5GB, 500MB or 800KB, found"),
    "missing": ("model: a/b\noutput: c\n", "the key method is required and was not found; add 'method: ...'"),
    "empty file": ("# nothing\n", "run.yaml is empty; it needs at least the keys model, output and method"),
    "not a mapping": ("- 1\n", "the configuration must be a mapping of keys to values, found [1]"),
    "section": (BASE + "calibration: 3", "calibration must be a mapping of keys to values, found 3"),
    "overrides": (BASE + "overrides: [mlp]", "overrides must be a mapping, found ['mlp']"),
    "override pattern": (BASE + "overrides: {3: {bits: 8}}", "a key of overrides must be text"),
    "exclude": (BASE + "exclude: lm_head", "exclude must be a list, found 'lm_head'; write '[a, b]'"),
    "exclude entry": (BASE + "exclude: [lm_head, '']", "exclude[1] must be text that is not empty"),
    "exclude null": (BASE + "exclude: [null]", "exclude[0] must be text that is not empty"),
    "syntax": (BASE + "bits: [4", "run.yaml, line 4, column 9: valid YAML is required, found: expected ',' or ']'"),
    "control character": (BASE + "bits: \x01", "run.yaml: valid YAML is required, found: unacceptable character"),
    "twice": (BASE + "bits: 4\nbits: 8\n", "run.yaml, line 5, column 1: valid YAML is required, found: the key 'bits'"),
    "key of lists": ("? [a]\n: 1\n", "run.yaml, line 1, column 3: valid YAML is required, found: a sequence as a key"),
    "tag": (BASE + "bits: !!int abc", "line 4, column 7: valid YAML is required, found: 'abc' cannot be read as int"),
    "date tag": (BASE + "bits: !!timestamp abc", "line 4, column 7: valid YAML is required, found: 'abc' cannot be"),
    "date": (BASE + "bits: 2020-99-99", "line 4, column 7: valid YAML is required, found: '2020-99-99' cannot be read"),
    "digits": (BASE + f"bits: {'9' * 5000}", f"found: '{'9' * 57}...' cannot be read as int; correct it"),
    "depth": ("[" * 3000, "found lists or mappings nested too deeply to be read"),
    "itself": ("bits: &a {bits: *a}", "line 1, column 7: valid YAML is required, found: found unconstructable rec"),
    "surrogate": (BASE + 'revision: "\\ud800"', "line 4, column 11: valid YAML is required, found: an escaped NUL or"),
    "NUL": (BASE + 'revision: "\\0"', "line 4, column 11: valid YAML is required, found: an escaped NUL or half of a"),
    "no source": (BASE + "calibration: {dataset: {}}", "calibration.dataset needs either name (a hub dataset) or"),
    "two sources": (BASE + "calibration: {dataset: {name: a, files: [b.txt]}}", "(local text), found both; give one"),
    "split of files": (
        BASE + "calibration: {dataset: {files: [run.yaml], split: test}}",
        "calibration.dataset.config and calibration.dataset.split belong to a hub dataset",
    ),
    "no text": (BASE + "evaluation: {}", "evaluation needs either files or dataset, found neither"),
    "two texts": (BASE + "evaluation: {files: [a.txt], dataset: {name: b}}", "files or dataset, found both"),
    "empty dataset": (BASE + "evaluation: {dataset: {}}", "evaluation.dataset needs either name"),
    "stride": (
        BASE + "evaluation: {dataset: {name: a}, window: 64, stride: 65}",
        "evaluation.stride must be at most evaluation.window (64), found 65",
    ),
    "tokens": (
        BASE + "evaluation: {files: [run.yaml, run.yaml], tokens: 1023}",
        "evaluation.tokens must hold a window of 512 for each of 2 file(s), that is 1024 or more, found 1023",
    ),
    "evaluation file": (BASE + "evaluation: {files: [no.txt]}", "evaluation.files must name files that exist, found"),
    "model directory": (
        BASE.replace("some/model", "./no"),
        "model must be a hub name or a directory that exists, found './no'",
    ),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(load, text, message):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bits", "an override must read key=value, found 'bits'; for example calibration.samples=64"),
        ("=4", "an override must read key=value, found '=4'"),
        ("bits.x=4", "the override 'bits.x=4' needs a mapping at 'bits', found 4"),
        ("calibration.sample=4", "unknown key calibration.sample; did you mean calibration.samples?"),
        ("bits=[", "the override 'bits=[', line 1, column 2: valid YAML is required"),
        ("overrides.mlp.bit=4", "unknown key overrides.mlp.bit; did you mean overrides.mlp.bits?"),
        ("overrides.bits=4", "a key of overrides must be text that is not empty"),
    ],
)
def test_mistakes_in_overrides_are_named(load, override, message):
    with pytest.raises(ConfigError) as caught:
        load(BASE + "bits: 4", override)
    assert message in str(caught.value)


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(ConfigError, match="must be a readable UTF-8 file, found: 'utf-8' codec can't decode byte 0xff"):
        load_config(tmp_path / "run.yaml")


def test_an_evaluation_made_in_code_is_checked_too():
    with pytest.raises(ConfigError, match="evaluation.stride must be 1 or more, found 0"):
        check_evaluation(EvaluationConfig(files=("a.txt",), stride=0))


@pytest.mark.parametrize(("size", "count"), [("5GB", 5e9), ("800KB", 8e5), ("1MB", 1e6), ("2TB", 2e12)])
def test_shard_size_in_bytes(load, size, count):
    assert load(BASE + f"max_shard_size: {size}").max_shard_bytes == count


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
SCHEMES = st.builds(
    SchemeOverride,
    bits=st.none() | st.sampled_from([2, 3, 4, 8]),
    group_size=st.none() | st.just(-1) | st.integers(1, 4096),
    symmetric=st.none() | st.booleans(),
)
CONFIGS = st.builds(
    RunConfig,
    model=TEXT.filter(lambda text: not text.startswith(("/", ".", "~")) and "$" not in text),
    output=TEXT.filter(lambda text: "$" not in text),
    method=st.sampled_from(["gptq", "awq", "rtn"]),
    revision=st.none() | TEXT,
    exclude=st.lists(TEXT).map(tuple),
    overrides=st.dictionaries(TEXT, SCHEMES, max_size=3),
    strict=st.booleans(),
    gptq=st.builds(GPTQConfig, damping=st.floats(1e-300, 1.0)),
    calibration=st.builds(CalibrationConfig, dataset=st.builds(DatasetConfig, name=TEXT, config=st.none() | TEXT)),
    evaluation=st.none() | st.builds(EvaluationConfig, dataset=st.builds(DatasetConfig, name=TEXT)),
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=CONFIGS)
@example(config=RunConfig(model="0E0", output="1e-2", method="rtn"))  # texts that read as numbers
def test_what_dump_writes_loads_to_an_equal_configuration(load, config):
    loaded = load(dump(config))
    assert loaded == config
    assert list(loaded.overrides) == list(config.overrides), "later overrides win, so their order counts"


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "my_lm_head", False),
        ("model.layers.1", "model.layers.1.mlp.down_proj", True),
        ("model.layers.1", "model.layers.10.mlp.down_proj", False),
        ("mlp.down_proj", "model.layers.1.mlp.down_proj", True),
        ("mlp", "model.layers.1.mlp.down_proj", True),
        ("down", "model.layers.1.mlp.down_proj", False),
        ("*.down_proj", "model.layers.1.mlp.down_proj", True),
        ("model.layers.?.*", "model.layers.1.mlp.down_proj", True),
        ("model.layers.?.*", "model.layers.10.mlp.down_proj", False),
        ("model.layers.[0-3].mlp*", "model.layers.1.mlp.down_proj", True),
        ("layers.*", "model.layers.1.mlp.down_proj", False),
        ("*.MLP.*", "model.layers.1.mlp.down_proj", False),
    ],
)
def test_patterns(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_schemes():
    config = RunConfig(
        "m", "o", "gptq",
        exclude=("lm_head", "layers.10.mlp"),
        overrides={
            "mlp": SchemeOverride(bits=8, group_size=32),
            "model.layers.1": SchemeOverride(bits=3),
            "*.10.*": SchemeOverride(symmetric=False),
        },
    )  # fmt: skip
    assert {name: scheme_for(config, name) for name in LINEARS} == {
        "model.layers.1.self_attn.o_proj": Scheme(3, 128, True),
        "model.layers.1.mlp.down_proj": Scheme(3, 32, True),  # bits from the later entry, group_size from the earlier
        "model.layers.10.self_attn.o_proj": Scheme(4, 128, False),
        "model.layers.10.mlp.down_proj": None,
        "lm_head": None,
    }
    assert unused_patterns(config, LINEARS) == []


def test_patterns_without_effect_are_found():
    config = RunConfig(
        "m", "o", "gptq",
        exclude=("lm_head", "head"),
        overrides=dict.fromkeys(["lm_head", "mlp", "layers.2"], SchemeOverride(bits=8)),
    )  # fmt: skip
    assert unused_patterns(config, iter(LINEARS)) == ["head", "lm_head", "layers.2"]
    assert unused_patterns(replace(config, exclude=()), LINEARS) == ["layers.2"]


def test_the_tree_is_frozen():
    classes = (RunConfig, CalibrationConfig, DatasetConfig, GPTQConfig, AWQConfig, EvaluationConfig, SchemeOverride)
    for cls in classes:
        assert is_dataclass(cls)
        assert cls.__dataclass_params__.frozen, cls


@pytest.mark.slow
def test_a_wheel_carries_the_configurations(tmp_path):
    """Oracle: an interpreter that sees nothing but the unpacked wheel."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("ptq", "kernels", "configs", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "unpacked"], check=True)
    code = "import ptq.config as c; print(c.__file__, c.load_config('llama8b.yaml').method)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, 'unpacked'); {code}"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "unpacked/ptq/config.py"), "gptq"]
