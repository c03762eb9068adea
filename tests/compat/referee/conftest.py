"""Fixtures of the referee: the same script, run by TRL and by Turnwise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.compat.referee.packages import PACKAGES, PackageName


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """One thread, as the machines that tests run on are shared; and none of what libraries advise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> PackageName:
    """Each package in turn: what is asserted of both is a fact of TRL's."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def both(tmp_path: Path) -> Callable[[Callable[[PackageName, Path], Any]], tuple[Any, Any]]:
    """Runs a script with TRL and then with Turnwise, each in a directory of its own."""

    def run(script: Callable[[PackageName, Path], Any]) -> tuple[Any, Any]:
        theirs, ours = (script(package, tmp_path / package) for package in PACKAGES)
        return theirs, ours

    return run
