"""A run that is cut short goes on where it stopped.

Oracle: the bytes of the same run left alone. Damage is done to a copy of an unfinished run, file by file: afterwards
the bytes are the same or the run is refused with the damaged file named.
"""

import fcntl
import re
import shutil
from dataclasses import replace
from pathlib import Path

import crashes
import pytest
import torch
from crashes import checksums, small_parent, small_run, stop, unfinished
from tiny_models import run

from ptq import journal, walk
from ptq.config import EvaluationConfig, SchemeOverride
from ptq.errors import ConfigError, FormatError, NumericsError
from ptq.formats.assembly import write_part
from ptq.formats.sealed import seal, unseal

BLOCKS = 3


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return small_parent(tmp_path_factory.mktemp("resume") / "parent")


@pytest.fixture(scope="module", autouse=True)
def _no_commit_is_put_off():
    """However slow the disk is while other programs write to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "SECONDS", 3600.0)
        yield


def whole(config):
    """Checksums of the run left alone; its output is removed."""
    run(config)
    found = checksums(Path(config.output))
    shutil.rmtree(config.output)
    return found


def offloaded(config):
    return replace(config, calibration=replace(config.calibration, offload="disk"))


CASES = {
    "rtn": ("rtn", {}),
    "gptq": ("gptq", {}),
    "gptq, gradients": ("gptq", {"gptq": replace(crashes.FAST, gradient_tokens=32)}),
    "gptq, head": ("gptq", {"exclude": ("q_proj", "k_proj", "v_proj", "gate_proj"), "symmetric": True}),
    "awq": ("awq", {"exclude": ("lm_head", "gate_proj", "up_proj", "down_proj")}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_with_the_same_bytes(case, parent, tmp_path):
    method, changes = CASES[case]
    config = small_run(parent, tmp_path / "out", method, **changes)
    expected = whole(config)
    for after in range(1, BLOCKS + 1):
        stop(config, after)
        assert not (tmp_path / "out").exists()
        report = run(config)
        assert report.document["resumed"]["blocks"] == after
        assert report.document["resumed"]["notes"] == []
        assert len({name.split(".")[2] for name in report.modules if "layers" in name}) == BLOCKS
        assert checksums(tmp_path / "out") == expected
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(tmp_path / "out")


def test_hidden_states_on_disk_change_nothing(parent, tmp_path):
    """Not the weights; and either kind of run continues the other."""
    config = small_run(parent, tmp_path / "out")
    weights = {name: sums for name, sums in whole(config).items() if name.endswith((".safetensors", ".json"))}
    for first, second in ((config, offloaded(config)), (offloaded(config), config), (offloaded(config),) * 2):
        stop(first, 2)
        run(second)
        found = checksums(tmp_path / "out")
        assert weights.items() <= found.items()
        shutil.rmtree(tmp_path / "out")


def test_several_interruptions(parent, tmp_path):
    config = small_run(parent, tmp_path / "out")
    expected = whole(config)
    for after in (1, 2, 3):
        stop(config, after)
    run(config)
    assert checksums(tmp_path / "out") == expected


CHANGES = {
    "configuration.bits was 4 and is 8": {"bits": 8},
    "configuration.gptq.damping was 0.01 and is 0.05": {"gptq": replace(crashes.FAST, damping=0.05)},
    "configuration.exclude was": {"exclude": ("lm_head", "q_proj")},
    "configuration.max_shard_size was 12KB and is 1GB": {"max_shard_size": "1GB"},
    "configuration.overrides.o_proj.bits was absent and is 8": {"overrides": {"o_proj": SchemeOverride(bits=8)}},
}


@pytest.mark.parametrize("sentence", CHANGES)
def test_a_changed_configuration_is_refused(sentence, parent, tmp_path):
    config = small_run(parent, tmp_path / "out")
    place = stop(config, 1)
    before = sorted(path.name for path in place.rglob("*"))
    with pytest.raises(ConfigError, match=f"can go on only as it began: .*{sentence}.* or start over with --fresh"):
        run(small_run(parent, tmp_path / "out", **CHANGES[sentence]))
    assert sorted(path.name for path in place.rglob("*")) == before
    run(small_run(parent, tmp_path / "out", **CHANGES[sentence]), fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_changed_model_or_text_is_refused(tmp_path, monkeypatch):
    parent = small_parent(tmp_path / "parent")
    config = small_run(parent, tmp_path / "out")
    stop(config, 1)
    for path, change, sentence in (
        (parent / "model.safetensors", lambda data: flipped(data, -3), "model.model.safetensors was"),
        (parent / "config.json", lambda data: data + b"\n", "model.config.json was"),
        (parent / "tokenizer.json", lambda data: data + b"\n", "model.tokenizer.json was"),
        (parent / "text" / "calibration.txt", lambda data: data.replace(b"e", b"E"), "calibration text was"),
    ):
        kept = path.read_bytes()
        path.write_bytes(change(kept))
        with pytest.raises(ConfigError, match=sentence):
            run(config)
        path.write_bytes(kept)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with pytest.raises(ConfigError, match=r"machine.threads was \d+ and is 99"):
        run(config)


def test_large_weight_files_are_sampled(tmp_path):
    from ptq.journal_signature import SAMPLE_BYTES, SAMPLES, _file

    tensors = {"a": torch.zeros(SAMPLES * SAMPLE_BYTES), "b": torch.zeros(8)}
    write_part(tmp_path / "a.safetensors", tensors)
    write_part(tmp_path / "b.safetensors", {**tensors, "a": torch.ones(SAMPLES * SAMPLE_BYTES)})
    write_part(tmp_path / "c.safetensors", {"b": tensors["b"], "c": tensors["a"]})
    found = {_file(tmp_path / f"{name}.safetensors") for name in "abc"}
    assert len(found) == 3


def test_what_may_differ(parent, tmp_path):
    """Where files are, and what is done after the weights are written."""
    config = small_run(parent, tmp_path / "out")
    expected = whole(config)
    stop(config, 2)
    moved = shutil.copytree(parent, tmp_path / "moved")
    text = EvaluationConfig(files=(str(moved / "text" / "calibration.txt"),), tokens=64, window=32, stride=32)
    run(replace(small_run(moved, tmp_path / "out"), evaluation=text))
    found = checksums(tmp_path / "out")
    assert {name for name in found if found[name] != expected[name]} == {"ptq_config.yaml"}


def test_one_run_at_a_time(parent, tmp_path):
    config = small_run(parent, tmp_path / "out")
    place = stop(config, 1)
    with open(place / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"written by one run at a time; another one is writing \S+out: wait"):
            run(config)
    run(config)


def test_errors_that_would_come_again_leave_nothing(parent, tmp_path, monkeypatch):
    config = small_run(parent, tmp_path / "out")
    stop(config, 1)

    def fail(*_):
        raise NumericsError("always")

    monkeypatch.setattr(walk, "quantize_block", fail)
    with pytest.raises(NumericsError):
        run(config)
    assert list(tmp_path.iterdir()) == []


def flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


DAMAGES = {
    "flipped": lambda path: path.write_bytes(flipped(path.read_bytes(), -10)),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "deleted": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def two_done(parent, tmp_path_factory):
    """A run with two of three blocks finished, and the bytes it must end with."""
    config = small_run(parent, tmp_path_factory.mktemp("damage") / "out")
    expected = whole(config)
    return config, expected, stop(config, 2)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_healed_or_named(kind, two_done, tmp_path):
    """What the last block left can be computed again from what came before it; anything older is refused."""
    config, expected, place = two_done
    files = sorted(path.relative_to(place) for path in place.rglob("*") if path.is_file() and path.name != "lock")
    assert {str(path) for path in files} == {
        "run.json", "blocks/0000.json", "blocks/0000.safetensors", "blocks/0001.json", "blocks/0001.safetensors",
        "hidden/0001-quantized", "hidden/0001-float", "hidden/0002-quantized", "hidden/0002-float",
    }  # fmt: skip
    unread = {"hidden/0001-quantized", "hidden/0001-float"}  # needed only if something else is damaged as well
    healed = {"blocks/0001.json", "blocks/0001.safetensors", "hidden/0002-quantized", "hidden/0002-float"}
    for file in files:
        output = tmp_path / file.name / "out"
        copy = shutil.copytree(place, unfinished(replace(config, output=str(output))))
        DAMAGES[kind](copy / file)
        mine = replace(config, output=str(output))
        if str(file) in healed | unread:
            report = run(mine)
            notes = report.document["resumed"]["notes"]
            named = any(str(copy / file) in note for note in notes)
            # Without its last record a run looks like one that was cut short before it.
            assert named == (str(file) in healed and (kind, str(file)) != ("deleted", "blocks/0001.json"))
            found = checksums(output)
            assert {name for name in found if found[name] != expected[name]} <= {"ptq_config.yaml"}
            shutil.rmtree(output)
        else:
            with pytest.raises(FormatError, match=str(copy / file)):
                run(mine)
            assert copy.exists()
            assert not output.exists()


def test_two_damages_are_refused(two_done, tmp_path):
    config, _, place = two_done
    mine = replace(config, output=str(tmp_path / "out"))
    copy = shutil.copytree(place, unfinished(mine))
    for name in ("hidden/0001-float", "hidden/0002-float"):
        DAMAGES["flipped"](copy / name)
    with pytest.raises(FormatError, match="0002-float is damaged: its bytes are not .* cannot go on without it"):
        run(mine)


DAMAGED_FIRST = ["blocks/0000.json", "blocks/0000.safetensors", "hidden/0001-quantized", "hidden/0001-float"]


@pytest.fixture(scope="module")
def one_done(parent, tmp_path_factory):
    """A run with one of three blocks finished, and the bytes it must end with."""
    config = small_run(parent, tmp_path_factory.mktemp("first") / "out")
    expected = whole(config)
    return config, expected, stop(config, 1)


@pytest.mark.parametrize("file", DAMAGED_FIRST)
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_to_the_only_finished_block_begins_the_run_again(kind, file, one_done, tmp_path):
    """Oracle: the bytes of the run left alone; the report names the damage."""
    config, expected, place = one_done
    mine = replace(config, output=str(tmp_path / "out"))
    copy = shutil.copytree(place, unfinished(mine))
    DAMAGES[kind](copy / file)
    resumed = run(mine).document.get("resumed")
    if (kind, file) == ("deleted", "blocks/0000.json"):  # looks like a run that was cut short before it
        assert resumed is None
    else:
        (note,) = resumed["notes"]
        assert note.startswith(str(copy / file))
        assert note.endswith("; the run goes on from block 1, before the damage")
        assert resumed["blocks"] == 0
    found = checksums(tmp_path / "out")
    assert {name for name in found if found[name] != expected[name]} <= {"ptq_config.yaml"}


@pytest.mark.parametrize("kind", ["flipped", "truncated"])
@pytest.mark.parametrize("file", ["run.json", "blocks/0000.json"])
def test_a_damaged_journal_says_the_way_out_alone(file, kind, two_done, tmp_path):
    """Nobody can fetch these files. Oracle: the sentence in full, and a run with --fresh."""
    config, expected, place = two_done
    mine = replace(config, output=str(tmp_path / "out"))
    copy = shutil.copytree(place, unfinished(mine))
    DAMAGES[kind](copy / file)
    without = "" if file == "run.json" else "the run cannot go on without it: "
    sentence = (
        f"{copy / file} is damaged: its content does not have the checksum it was written with; {without}start over "
        "with --fresh"
    )
    with pytest.raises(FormatError, match=f"^{re.escape(sentence)}$"):
        run(mine)
    run(mine, fresh=True)
    found = checksums(tmp_path / "out")
    assert {name for name in found if found[name] != expected[name]} <= {"ptq_config.yaml"}


def test_a_record_of_another_run_is_refused(two_done, tmp_path):
    config, _, place = two_done
    mine = replace(config, output=str(tmp_path / "out"))
    copy = shutil.copytree(place, unfinished(mine))
    content, _ = unseal(copy / "blocks/0000.json")
    seal(copy / "blocks/0000.json", {**content, "after": "another"})
    with pytest.raises(FormatError, match="0000.json is not the record that followed in this run"):
        run(mine)


def test_commits_that_cost_too_much_are_put_off(parent, tmp_path, monkeypatch):
    """Then a run goes on from the last one that was made."""
    config = small_run(parent, tmp_path / "out")
    expected = whole(config)
    monkeypatch.setattr(journal, "SECONDS", 0.0)
    monkeypatch.setattr(journal, "SHARE", 0.0)
    for each in (config, offloaded(config)):
        place = stop(each, 2)
        assert [path.name for path in sorted((place / "blocks").glob("*.json"))] == ["0000.json"]
        report = run(each)
        assert report.document["resumed"]["blocks"] == 1
        found = checksums(tmp_path / "out")
        assert {name for name in found if found[name] != expected[name]} <= {"ptq_config.yaml"}
        shutil.rmtree(tmp_path / "out")


def interrupted(config, **options):
    with pytest.raises(KeyboardInterrupt):
        run(config, **options)


def half_assembled(config, monkeypatch):
    """A run that died with its second shard written."""
    from ptq.formats import assembly

    real, count = assembly._write_shard, []

    def third(*arguments):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(assembly, "_write_shard", third)
        interrupted(config)
    return unfinished(config)


def test_damage_while_shards_are_put_together(parent, tmp_path, monkeypatch):
    config = small_run(parent, tmp_path / "out")
    expected = whole(config)
    place = half_assembled(config, monkeypatch)
    run(config)
    assert checksums(tmp_path / "out") == expected
    shutil.rmtree(tmp_path / "out")
    for kind in ("flipped", "deleted"):
        place = half_assembled(config, monkeypatch)
        first = min((place / "checkpoint").glob("*.safetensors"))
        assert not (place / "blocks" / "0000.safetensors").exists()
        DAMAGES[kind](first)
        with pytest.raises(FormatError, match=r"(is damaged|is missing).*cannot go on without it: start over"):
            run(config)
        shutil.rmtree(place)
    place = half_assembled(config, monkeypatch)
    DAMAGES["flipped"](place / "blocks" / "0003.safetensors")
    with pytest.raises(FormatError, match="0003.safetensors is damaged: the bytes of .* start over with --fresh"):
        run(config)
