"""Whatever text a response is, it arrives; in whatever pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from or1_megatron.reward.frames import frame, take_frame

TEXTS = st.text(st.characters(codec=None), max_size=50)  # lone surrogates and NUL too


@given(st.lists(st.tuples(st.dictionaries(TEXTS, TEXTS, max_size=3), TEXTS), max_size=4), st.integers(1, 40))
def test_messages_arrive_whole_and_in_order(messages: list[tuple[dict[str, str], str]], piece: int) -> None:
    stream = b"".join(frame(values, text) for values, text in messages)
    received, found = bytearray(), []
    for start in range(0, len(stream), piece):
        received += stream[start : start + piece]
        while (message := take_frame(received)) is not None:
            found.append(message)
    assert found == messages
    assert not received
