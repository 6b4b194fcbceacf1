"""What tests of compiled formulas share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch._dynamo

from or1_megatron.parallel import compiler


@pytest.fixture(params=["eager", "compiled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The test runs both ways."""
    monkeypatch.setenv("OR1_COMPILE", "0" if request.param == "eager" else "1")
    # An engine in this process has switched the compiler off.
    with torch._dynamo.config.patch(disable=False):
        compiler.forget()
        if request.param == "compiled" and not compiler.can_compile():
            pytest.skip("torch.compile has no working C++ compiler here")
        yield request.param
    compiler.forget()
