"""Recipe files: every problem at once, each at its line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim.recipes.build import build_recipe
from optim.recipes.errors import OptimError
from optim.recipes.yaml_source import MAX_BYTES, parse_mapping, parse_value

Refusal = Callable[[str | bytes], OptimError]

BAD = """\
version: 2
calibration:
  num_sample: 3
  seq_len: 8
  seed: "3"
quantize:
  method: awq
  bits: 5
  groupsize: 64
  group_size: 65
  ignore: ["re:(unclosed"]
  clip: off
  overrides:
    - targets: [a]
      bits: eight
    - targets: [b]
    - {targets: ["re:(a+)+b"], sym: true}
quantise: 3
"""

SAID = """\
bad.yaml is not a valid recipe (13 problems)
  bad.yaml:1: version: must be 1 (got 2)
  bad.yaml:3: calibration.num_sample: unknown key; did you mean 'num_samples'?
  bad.yaml:4: calibration.seq_len: must be greater than or equal to 16 (got 8)
  bad.yaml:5: calibration.seed: must be a whole number (got '3')
  bad.yaml:8: quantize.bits: must be 2, 3, 4 or 8 (got 5)
  bad.yaml:9: quantize.groupsize: unknown key; did you mean 'group_size'?
  bad.yaml:10: quantize.group_size: must be 'auto', -1, 16, 32, 64, 128 or 256 (got 65)
  bad.yaml:11: quantize.ignore.0: 're:(unclosed' is not a valid regular expression: \
missing ), unterminated subpattern at position 0
  bad.yaml:12: quantize.clip: must be true or false (got 'off')
  bad.yaml:15: quantize.overrides.0.bits: must be 2, 3, 4 or 8 (got 'eight')
  bad.yaml:16: quantize.overrides.1: an override must give bits, group_size or sym, or else a grid
  bad.yaml:17: quantize.overrides.2.targets.0: 're:(a+)+b' repeats too much: \
it could take forever to match
  bad.yaml:18: quantise: unknown key; did you mean 'quantize'?"""


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """Write bad.yaml and return the error that building it raises."""
    monkeypatch.chdir(tmp_path)

    def refuse(content: str | bytes) -> OptimError:
        raw = content.encode() if isinstance(content, str) else content
        (tmp_path / "bad.yaml").write_bytes(raw)
        with pytest.raises(OptimError) as caught:
            build_recipe("bad.yaml")
        assert caught.value.code == 2
        return caught.value

    return refuse


def test_all_problems_are_said_at_once_sorted_by_line(refusal: Refusal) -> None:
    assert refusal(BAD).message == SAID


HEAD = "bad.yaml is not a valid recipe (1 problem)\n  "
HEAD2 = "bad.yaml is not a valid recipe (2 problems)\n  "


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "bad.yaml is empty"),
        ("# nothing\n", "bad.yaml is empty"),
        ("- 1", "bad.yaml is not a mapping of keys to values"),
        ("word", "bad.yaml is not a mapping of keys to values"),
        (b"a: \xff", "bad.yaml is not UTF-8 text (byte 3)"),
        ("a: \0", "bad.yaml has a character that YAML does not allow (#x00)"),
        ("[" * 5000, "bad.yaml is nested too deeply to be a recipe"),
        ("a" * (MAX_BYTES + 1), "bad.yaml is larger than 256 KiB: it is hardly a recipe"),
        ("a: 1\n b: 2", "bad.yaml:2:3: not valid YAML: mapping values are not allowed here"),
        ("version: 1\n---\nb: 2", "bad.yaml:2:1: not valid YAML: but found another document"),
        ("a: 1\na: 2", HEAD + "bad.yaml:2: duplicate key 'a' (first on line 1)"),
        ("a: &x [1]\nb: *x", HEAD + "bad.yaml:1: aliases (*name) are not allowed; "
         "write the value again"),
        ("a: !!python/object:os.system x", HEAD + "bad.yaml:1: "
         "tags (tag:yaml.org,2002:python/object:os.system) are not allowed"),
        ("? [a]\n: 2", HEAD + "bad.yaml:1: a key must be a word"),
        ("version: 1", HEAD + "bad.yaml:1: must have a section quantize, prune, pack or export"),
        ("version: 1\nprune:\npack: {cast: 1}", HEAD2 + "bad.yaml:2: prune: "
         "must be a mapping of keys to values (got nothing)\n"
         "  bad.yaml:3: pack.cast: must be true or false (got 1)"),
        ("version: 1\nprune: {method: awq}", HEAD + "bad.yaml:2: prune.method: unknown method "
         "'awq'; choose one of 'threshold', 'coreinfer', 'relu-exact', 'prosparse'"),
        ("version: 1\nprune:\n  method: threshold\n  keep: 1", HEAD + "bad.yaml:4: "
         "prune.keep: not a key of method 'threshold' (it is one of coreinfer)"),
        ("version: 1\nprune: {method: coreinfer, kep: 1}", HEAD + "bad.yaml:2: "
         "prune.kep: unknown key; did you mean 'keep'?"),
        ("version: 1\nprune: {method: relu-exact}\npack: {}", HEAD + "bad.yaml:1: "
         "prune cannot stand beside pack: packed rows cannot be skipped; "
         "beside quantize only what no block holds is packed"),
        ("version: 1\nprune: {method: prosparse}\nquantize: {method: rtn}", HEAD +
         "bad.yaml:1: prune (prosparse) cannot stand beside quantize: it trains for hours under "
         "a plan of its own: go on from the folder it has written"),
        ("quantize: {method: rtn}", HEAD + "bad.yaml:1: version: must be given"),
        ("version: 1\nquantize:", HEAD + "bad.yaml:2: quantize: "
         "must be a mapping of keys to values (got nothing)"),
        ("version: 1\nquantize: {bits: 4}", HEAD + "bad.yaml:2: quantize.method: "
         "must be given; choose one of 'awq', 'rtn', 'gptq', 'mergequant'"),
        ("version: 1\nquantize: {method: fp8}", HEAD + "bad.yaml:2: quantize.method: "
         "unknown method 'fp8'; choose one of 'awq', 'rtn', 'gptq', 'mergequant'"),
        ("version: 1\nquantize:\n  method: rtn\n  n_grid: 4", HEAD + "bad.yaml:4: "
         "quantize.n_grid: not a key of method 'rtn' (it is one of awq)"),
        ("version: 1\nquantize: {method: rtn, ignore: lm_head}", HEAD + "bad.yaml:2: "
         "quantize.ignore: must be a list (got 'lm_head')"),
        ("version: 1\nquantize:\n  method: mergequant\n  lm_head_bits: 8", HEAD + "bad.yaml:4: "
         "quantize.lm_head_bits: mergequant leaves the head as it is; method awq can store it too"),
        ("version: 1\nquantize: {method: rtn, targets: []}", HEAD + "bad.yaml:2: "
         "quantize.targets: must name at least one (got [])"),
        ("version: 1\nquantize: {method: awq, damping: .inf}", HEAD + "bad.yaml:2: "
         "quantize.damping: must be a number (got '.inf')"),
    ],
)  # fmt: skip
def test_one_problem(refusal: Refusal, content: str | bytes, said: str) -> None:
    assert refusal(content).message == said


def test_aliases_are_refused_where_they_would_explode(refusal: Refusal) -> None:
    bomb = "a0: &a0 [x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))
    assert "aliases (*name) are not allowed" in refusal(bomb).message


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbfversion: 1\nquantize: {method: rtn}\n")
    assert build_recipe(str(path)).quantize.method == "rtn"


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(OptimError, match="Is a directory") as caught:
        build_recipe(str(tmp_path))
    assert caught.value.code == 2


def test_an_unknown_name_suggests_one() -> None:
    with pytest.raises(OptimError) as caught:
        build_recipe("awq-w4g46")
    assert caught.value.message == "there is no recipe 'awq-w4g46'; did you mean 'awq-w4g64'?"
    assert caught.value.fix is not None and "optim recipe list" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-2", 0.01), ("off", "off"), ("true", True), ("~", None), ("", None), ("-1", -1),
     ("0x10", "0x10"), ("'3'", "3"), ("1:30", "1:30"), ("[a, 3]", ["a", 3]), ("2.", 2.0)],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = parse_value(text, "--set")
    assert (found, type(found)) == (value, type(value))


@given(st.text(max_size=60))
def test_any_text_is_read_or_explained(text: str) -> None:
    try:
        data, places = parse_mapping(text, "x.yaml")
    except OptimError as error:
        assert error.code == 2 and "x.yaml" in error.message
    else:
        assert all((key,) in places for key in data)
