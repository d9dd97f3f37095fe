"""The pytest plugin: the fixture of `ModelContract`, and `--llmfw-plugin NAME`.

It is loaded in every pytest run where llmfw-core is installed, so it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from llmfw.testing.subject import Subject

OPTION = "--llmfw-plugin"
INSTALLED = Path(__file__).with_name("installed.py")

wanted: list[str] = []
"""What `--llmfw-plugin` named, for `installed.py`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--llmfw-plugin NAME`."""
    parser.getgroup("llmfw").addoption(
        OPTION,
        action="append",
        default=[],
        metavar="NAME",
        help="hold an installed plugin to the model contract: a distribution or an architecture",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the contract's markers; with the option, collect the contract of those plugins."""
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")
    names = config.getoption(OPTION)
    if not names:
        return
    wanted[:] = names
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args.clear()
    config.args.append(str(INSTALLED))


@pytest.fixture(scope="class")
def llmfw_subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """The architecture that a `ModelContract` class names, with its tiny checkpoint."""
    from llmfw.testing.subject import Subject

    cls = request.cls
    if not cls.architecture:
        pytest.fail(f"{cls.__name__} names no architecture", pytrace=False)
    reference = cls.__dict__.get("reference", cls.reference)
    with Subject(
        cls.architecture,
        cls.tiny_config or None,
        reference=getattr(reference, "__func__", reference),
        distribution=cls.distribution,
    ) as subject:
        yield subject
