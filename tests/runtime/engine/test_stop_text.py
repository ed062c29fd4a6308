"""Stop texts are found however the stream is cut, and nothing of them is shown."""

from hypothesis import given
from hypothesis import strategies as st

from optim.runtime.engine.stop_text import StopText

LETTERS = st.text(alphabet="abx\n", max_size=24)


def _run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    watch, shown = StopText(stops), ""
    for piece in pieces:
        shown += watch.push(piece)
        if watch.found:
            return shown, True
    return shown + watch.flush(), False


@given(
    text=LETTERS,
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=24, max_size=24),
)
def test_any_cut_of_a_text_ends_at_the_same_place(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    pieces, rest = [], text
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    shown, found = _run(pieces, stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert found == bool(ends)
    if not found:
        assert shown == text
        return
    # Token by token, the first to be complete ends it; a longer cut may hold an earlier start.
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert any(text[len(shown) :].startswith(stop) for stop in stops)


def test_text_comes_out_as_soon_as_it_may() -> None:
    watch = StopText(["END"])
    assert watch.push("the E") == "the "
    assert watch.push("N") == ""
    assert watch.push("T") == "ENT"
    assert watch.push("Ex") == "Ex"
    assert watch.push("EN") == ""
    assert watch.push("D and more") == ""
    assert watch.found
