"""On a GPU: do kernels give what the references give, and graphs what eager steps give?"""

from __future__ import annotations

from llmfw.testing.checks.engine import GREEDY
from llmfw.testing.compare import require_same_logits
from llmfw.testing.failure import CheckFailure, CheckSkipped
from llmfw.testing.packed import PackedSession
from llmfw.testing.subject import Subject

GPU_TOLERANCE = {"float32": 2e-3, "bfloat16": 8e-2}
"""Of the largest logit: kernels add in another order than the references."""


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise CheckSkipped("torch sees no GPU")


def kernels_equal_references(subject: Subject) -> None:
    """The kernels chosen on the GPU give the logits of torch's references there.

    Raises:
        CheckFailure: Naming the dtype, the position and the kernels that were chosen.
    """
    _require_gpu()
    for dtype, relative in GPU_TOLERANCE.items():
        settings = {"device": "cuda", "dtype": dtype}
        plain = subject.load(kernels="reference", **settings).model
        fast = subject.load(kernels="auto", **settings).model
        table = fast.model_config.ops
        chosen = sorted({c.chosen for c in table.choices.values()} - {"reference"})
        for ids in subject.prompts[:2]:
            expected = _all_logits(plain, ids)
            require_same_logits(
                _all_logits(fast, ids),
                expected,
                problem=f"kernels differ from torch's references in {dtype}",
                where=f"a prompt of {len(ids)} tokens, prefilled and then decoded",
                tolerance=float(expected.abs().max()) * relative,
                look=f"the kernels chosen: {', '.join(chosen) or 'none'};\n"
                "llmfw kernels check; --kernels=-NAME leaves one out",
            )


def _all_logits(model: object, ids: list[int]):  # type: ignore[no-untyped-def]  # noqa: ANN202
    import torch

    session = PackedSession(model)  # type: ignore[arg-type]
    cut = max(1, len(ids) - 3)
    pieces = [ids[:cut], *([token] for token in ids[cut:])]
    return torch.cat([session.step({"a": piece})["a"] for piece in pieces]).float().cpu()


def graphs_equal_eager(subject: Subject) -> None:
    """Greedy tokens from captured decode graphs are those of eager steps.

    Raises:
        CheckFailure: If they are not.
    """
    _require_gpu()
    tokens = {}
    for graphs in (False, True):
        with subject.engine(device="cuda", kernels="auto", cuda_graphs=graphs) as llm:
            outputs = llm.generate([list(ids) for ids in subject.prompts], GREEDY)
            tokens[graphs] = [output.outputs[0].token_ids for output in outputs]
    if tokens[True] != tokens[False]:
        raise CheckFailure(
            "CUDA graphs give other tokens than eager steps",
            expected=tokens[False],
            got=tokens[True],
            look="forward() of the plugin's modules: values read on the host are frozen when a "
            "graph is captured",
        )
