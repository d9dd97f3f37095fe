"""`ModelContract`: derive a test class from it and pytest holds a plugin to its contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from llmfw.testing import checks
from llmfw.testing.failure import CheckSkipped

if TYPE_CHECKING:
    from llmfw.testing.checks import CheckFunction
    from llmfw.testing.reference import ReferenceFactory
    from llmfw.testing.subject import Subject


class ModelContract:
    """What every model plugin has to fulfil; each check is a test.

        class TestContract(ModelContract):
            architecture = "MyModelForCausalLM"
            tiny_config = {"hidden_size": 64, "num_hidden_layers": 2, ...}

    Attributes:
        architecture: As in config.json and in the entry point.
        tiny_config: Fields of a tiny config.json (hidden size 64, two layers); `model_type` is
            found by the architecture where transformers knows it. When left empty: the plugin's
            `tiny_configs`, or transformers' defaults in small.
        reference: The model to compare with where transformers has none: a function of the
            configuration, or "module:function"; see `llmfw.testing.reference.ReferenceFactory`.
        distribution: The distribution that must serve it, where several could.
    """

    architecture: ClassVar[str] = ""
    tiny_config: ClassVar[Mapping[str, Any]] = {}
    reference: ClassVar[str | ReferenceFactory | None] = None
    distribution: ClassVar[str | None] = None

    def test_discovered_by_metadata(self, llmfw_subject: Subject) -> None:
        """An installed entry point serves the architecture, and it loads."""
        _run(checks.discovered_by_metadata, llmfw_subject)

    def test_imports_without_torch(self, llmfw_subject: Subject) -> None:
        """The plugin's module imports where torch and CuPy cannot be imported."""
        _run(checks.imports_without_torch, llmfw_subject)

    def test_config_round_trip(self, llmfw_subject: Subject) -> None:
        """The configuration survives the way from config.json and back."""
        _run(checks.config_round_trip, llmfw_subject)

    def test_accounts_for_every_tensor(self, llmfw_subject: Subject) -> None:
        """Each parameter is filled once; each tensor is taken, or ignored and not needed."""
        _run(checks.accounts_for_every_tensor, llmfw_subject)

    def test_matches_reference(self, llmfw_subject: Subject) -> None:
        """A prefill gives the reference's logits at every position."""
        _run(checks.matches_reference, llmfw_subject)

    def test_step_by_step(self, llmfw_subject: Subject) -> None:
        """Tokens fed one at a time give the logits of one prefill."""
        _run(checks.step_by_step, llmfw_subject)

    def test_chunked_prefill(self, llmfw_subject: Subject) -> None:
        """A prompt in chunks gives the logits of one prefill."""
        _run(checks.chunked_prefill, llmfw_subject)

    def test_ragged_batch(self, llmfw_subject: Subject) -> None:
        """Requests in one batch get what each gets alone."""
        _run(checks.ragged_batch, llmfw_subject)

    def test_greedy_matches_reference(self, llmfw_subject: Subject) -> None:
        """Greedy generation through the engine gives the reference's tokens."""
        _run(checks.greedy_matches_reference, llmfw_subject)

    def test_greedy_repeatable(self, llmfw_subject: Subject) -> None:
        """The same batch twice gives the same tokens."""
        _run(checks.greedy_repeatable, llmfw_subject)

    def test_prefix_cache_hit(self, llmfw_subject: Subject) -> None:
        """A prompt that begins in the prefix cache gets the tokens of one that does not."""
        _run(checks.prefix_cache_hit, llmfw_subject)

    def test_preempted_undisturbed(self, llmfw_subject: Subject) -> None:
        """Requests that were preempted get the tokens of undisturbed ones."""
        _run(checks.preempted_undisturbed, llmfw_subject)

    def test_no_hooks_while_decoding(self, llmfw_subject: Subject) -> None:
        """Generating calls no hook."""
        _run(checks.no_hooks_while_decoding, llmfw_subject)

    def test_save_load_round_trip(self, llmfw_subject: Subject) -> None:
        """Saved again, the checkpoint has the same names and bits."""
        _run(checks.save_load_round_trip, llmfw_subject)

    @pytest.mark.slow
    def test_wheel_builds_and_installs(self, llmfw_subject: Subject) -> None:
        """The plugin's wheel builds, installs and is found."""
        _run(checks.wheel_builds_and_installs, llmfw_subject)

    @pytest.mark.gpu
    def test_kernels_equal_references(self, llmfw_subject: Subject) -> None:
        """The kernels chosen on a GPU give what torch's references give."""
        _run(checks.kernels_equal_references, llmfw_subject)

    @pytest.mark.gpu
    def test_graphs_equal_eager(self, llmfw_subject: Subject) -> None:
        """Captured decode graphs give the tokens of eager steps."""
        _run(checks.graphs_equal_eager, llmfw_subject)


def _run(check: CheckFunction | Callable[..., None], subject: Subject) -> None:
    __tracebackhide__ = True
    try:
        check(subject)
    except CheckSkipped as skipped:
        pytest.skip(str(skipped))
