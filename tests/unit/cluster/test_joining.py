"""An address that could be anybody's cluster is refused before Ray is asked; nobody at an address is one line."""

from __future__ import annotations

import pytest

from or1_megatron.cluster import joining
from or1_megatron.errors import UserError


@pytest.mark.parametrize("address", ["auto", "localhost"])
def test_an_address_without_a_port_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match="set host:port"):
        joining.enter(0)


def test_a_count_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OR1_RAY_NODES", "two")
    with pytest.raises(UserError, match="OR1_RAY_NODES=two"):
        joining._number("OR1_RAY_NODES")


def test_addresses_sort_by_number() -> None:
    assert sorted(["10.0.0.10", "10.0.0.9"], key=joining._by_number) == ["10.0.0.9", "10.0.0.10"]
