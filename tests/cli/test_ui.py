"""Numbers, tables, notes and errors as the terminal shows them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim.cli import ui
from optim.recipes.errors import OptimError

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (70272, "70.3 kB"), (490e6, "490 MB"),
     (999.6e6, "1.00 GB"), (9.996e6, "10.0 MB"), (1.4e9, "1.40 GB"), (2e15, "2000 TB")],
)  # fmt: skip
def test_size(value: float, text: str) -> None:
    assert ui.size(value) == text


@pytest.mark.parametrize(("value", "text"), [(61, "61"), (944e6, "944 M"), (2.694e9, "2.69 B")])
def test_count(value: float, text: str) -> None:
    assert ui.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.2, "0s"), (59.6, "1m00s"), (178, "2m58s"), (3599.7, "1h00m"), (3840, "1h04m")],
)
def test_seconds(value: float, text: str) -> None:
    assert ui.seconds(value) == text


@given(st.floats(min_value=0, max_value=1e15))
def test_a_size_has_at_most_three_figures_of_error(value: float) -> None:
    number, unit = ui.size(value).split()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert abs(float(number) * scale - value) <= max(0.5, 0.00502 * value)


def test_eta_follows_the_last_steps() -> None:
    now = 0.0
    eta = ui.Eta(clock=lambda: now)
    assert eta.left(0, 10) is None
    for done in range(1, 11):
        now += 100.0 if done == 1 else 2.0
        left = eta.left(done, 12)
    assert left == pytest.approx(2 * 2.0)


@pytest.mark.parametrize(("pace", "lines"), [(0, [0, 1, 2]), (3600, [2])])
def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    pace: int, lines: list[int], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ui, "SECONDS_A_LINE", pace)
    with ui.progress("awq") as step:
        for at in range(3):
            step(at, 2, f"layer {at} \x1b[31m")
    out, err = capsys.readouterr()
    assert out == ""
    said = [line.split(" · ")[:2] for line in err.splitlines()]
    assert said == [[f"awq {at}/2", f"layer {at} [31m"] for at in lines]


def test_quiet_hides_notes_and_progress_but_no_error(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ui.notes, "quiet", True)
    ui.note("hidden")
    with ui.progress("awq") as step:
        step(1, 2, "hidden")
    ui.error(OptimError("shown", fix="so"))
    assert capsys.readouterr() == ("", "error: shown\n  fix: so\n")


def test_an_error_keeps_its_lines_and_cannot_steer_the_terminal(capsys: Captured) -> None:
    ui.error(OptimError("bad [red]name\x1b]0;title\x07\n  a.yaml:1: x", fix="f" * 200))
    expected = "error: bad [red]name]0;title\n  a.yaml:1: x\n  fix: " + "f" * 200 + "\n"
    assert capsys.readouterr().err == expected


def test_a_table_is_not_cut_where_there_is_no_terminal(capsys: Captured) -> None:
    ui.table(("name", "size"), [("model.layers.10.[bold]" + "x" * 90, "7")])
    out = capsys.readouterr().out
    assert "model.layers.10.[bold]" + "x" * 90 in out
    assert out.splitlines()[1].split() == ["name", "size"]


def test_json_has_no_infinity(capsys: Captured) -> None:
    ui.emit({"a": [float("inf"), (float("nan"), 1.5)], 3: "é"})
    assert json.loads(capsys.readouterr().out) == {"a": [None, [None, 1.5]], "3": "é"}


def test_done_names_the_next_command(capsys: Captured) -> None:
    ui.done("./out · 2.67 GB", following="optim run ./out")
    assert capsys.readouterr().err == "✓ ./out · 2.67 GB\n  next: optim run ./out\n"


STEERING = "a\x1b[31m\x07\x9b2J\u202eb\ud800[/x]\tc\n"


def test_what_steers_a_terminal_is_taken_out() -> None:
    assert ui.plain(STEERING) == "a[31m2Jb[/x]\tc\n"


def test_json_has_no_raw_controls_and_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    ui.emit({"name": STEERING})
    shown = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in shown)
    assert json.loads(shown) == {"name": STEERING}
