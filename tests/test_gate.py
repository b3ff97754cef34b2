"""The gate of ``ptq eval``: which texts are conditions, and when an evaluation fails one.

Oracle: comparisons written out by hand, and the exit code a shell would see.
"""

from pathlib import Path

import pytest

from ptq import cli, evaluation
from ptq.errors import ConfigError, PtqError
from ptq.gate import Condition, parse_condition, require_parent, require_passed

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-llama"
TEXT = ROOT / "examples" / "text" / "eval-novel.txt"
ROW = {"perplexity": 12.5, "kl": 0.04, "top1": 0.9}


@pytest.mark.parametrize(
    ("text", "metric", "limit", "fails"),
    [
        ("kl>0.05", "kl", 0.05, False),
        ("kl > 0.03", "kl", 0.03, True),
        ("kl>=0.04", "kl", 0.04, True),
        ("kl>4e-2", "kl", 0.04, False),
        ("perplexity<=12.5", "perplexity", 12.5, True),
        ("top1<0.95", "top1", 0.95, True),
        (" agreement < .9 ", "top1", 0.9, False),
    ],
)
def test_conditions(text: str, metric: str, limit: float, fails: bool) -> None:
    condition = parse_condition(text)
    assert condition[0] == metric
    assert condition[2] == limit
    assert condition.holds(ROW[metric]) is fails
    if fails:
        with pytest.raises(PtqError, match=r"fails its gate: .* holds"):
            require_passed([condition], ROW)
    else:
        require_passed([condition], ROW)


WRONG = {
    "kl=0.05": "METRIC OPERATOR NUMBER",
    "kl": "METRIC OPERATOR NUMBER",
    "": "METRIC OPERATOR NUMBER",
    "perplexty>3": "did you mean perplexity",
    "kl>a lot": "METRIC OPERATOR NUMBER",
    "kl>lots": "finite number",
    "kl>nan": "finite number",
    "kl<inf": "finite number",
    "top1<95": "between 0 and 1",
    "agreement<-1": "between 0 and 1",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_not_a_condition_says_why(text: str) -> None:
    with pytest.raises(ConfigError, match=WRONG[text]):
        parse_condition(text)


@pytest.mark.parametrize("sign", [">", ">=", "<", "<="])
def test_what_is_not_a_number_fails_every_gate(sign: str) -> None:
    with pytest.raises(PtqError, match="fails its gate: .* kl is nan"):
        require_passed([parse_condition(f"kl{sign}0.05")], {**ROW, "kl": float("nan")})


def test_distances_need_a_parent() -> None:
    require_parent([Condition("perplexity", ">", 3.0, "perplexity>3")], None)
    with pytest.raises(ConfigError, match="add --parent"):
        require_parent([Condition("kl", ">", 3.0, "kl>3")], None)


def test_several_conditions_are_all_named() -> None:
    with pytest.raises(PtqError) as failed:
        require_passed([parse_condition(text) for text in ("kl>0.01", "top1<0.5", "perplexity>3")], ROW)
    assert "'kl>0.01' holds: kl is 0.04" in str(failed.value)
    assert "'perplexity>3' holds: perplexity is 12.5" in str(failed.value)
    assert "top1" not in str(failed.value)


def test_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent against itself: KL is exactly 0, agreement exactly 1."""
    arguments = ["eval", str(MODEL), "--parent", str(MODEL), "--text", str(TEXT), "--tokens", "64", "--window", "32"]
    assert cli.main([*arguments, "--fail-if", "kl>0", "--fail-if", "top1<1"]) == 0
    assert cli.main([*arguments, "--fail-if", "kl>=0", "--fail-if", "agreement>=1"]) == 3
    printed = capsys.readouterr()
    assert "perplexity" in printed.out
    assert "ptq: the checkpoint fails its gate: 'kl>=0' holds: kl is 0; 'agreement>=1' holds" in printed.err
    monkeypatch.setattr(evaluation, "evaluate_checkpoint", None)  # nothing may be computed
    assert cli.main([*arguments, "--fail-if", "lk>0"]) == 2
    assert "must name one of kl, perplexity, top1, agreement" in capsys.readouterr().err
    assert cli.main(["eval", str(MODEL), "--text", str(TEXT), "--fail-if", "kl>0"]) == 2
    assert "add --parent" in capsys.readouterr().err
