"""Does the engine get the same tokens however the cache and the batch are used?"""

from __future__ import annotations

from collections.abc import Sequence

from llmfw.attention.state import slot_bytes
from llmfw.llm import LLM
from llmfw.sampling_params import SamplingParams
from llmfw.testing.checks.logits import BATCH, CACHE, model_of
from llmfw.testing.compare import (
    TINY_TIE,
    logits_tolerance,
    reference_logits,
    require_greedy,
)
from llmfw.testing.failure import CheckFailure, CheckSkipped
from llmfw.testing.subject import BLOCK_SIZE, Subject

NEW_TOKENS = 8
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)


def _generate(llm: LLM, prompts: Sequence[list[int]]) -> list[list[int]]:
    outputs = llm.generate([list(prompt) for prompt in prompts], GREEDY)
    for output in outputs:
        if output.error is not None:
            raise output.error
    return [output.outputs[0].token_ids for output in outputs]


def _require_same_tokens(
    subject: Subject, prompts: Sequence[list[int]], got: Sequence[list[int]],
    expected: Sequence[list[int]], problem: str, look: str,
) -> None:  # fmt: skip
    """Fail unless the tokens are equal, up to a tie in the reference's logits."""
    for number, (prompt, tokens, wanted) in enumerate(zip(prompts, got, expected, strict=True)):
        if tokens == wanted:
            continue
        step = next(
            i for i, pair in enumerate(zip(tokens, wanted, strict=True)) if pair[0] != pair[1]
        )
        row = reference_logits(subject.reference_model(), [*prompt, *wanted[:step]])[-1]
        if abs(float(row[tokens[step]] - row[wanted[step]])) < max(TINY_TIE, logits_tolerance(row)):
            continue
        raise CheckFailure(
            problem,
            tensor=f"generated token {step} of prompt {number} ({len(prompt)} tokens)",
            expected=f"{wanted[step]} (of {wanted})",
            got=f"{tokens[step]} (of {tokens})",
            look=look,
        )


def greedy_matches_reference(subject: Subject) -> None:
    """Greedy generation through the engine gives the reference's tokens.

    Raises:
        CheckFailure: Naming the first token that is another.
    """
    model_of(subject)
    with subject.engine() as llm:
        generated = _generate(llm, subject.prompts)
    for prompt, tokens in zip(subject.prompts, generated, strict=True):
        tie = max(TINY_TIE, logits_tolerance(subject.expected(prompt)))
        try:
            require_greedy(subject.reference_model(), prompt, tokens, tie)
        except CheckFailure as failure:
            failure.facts["look at"] = f"prefill first (matches_reference), then {CACHE}"
            raise


def greedy_repeatable(subject: Subject) -> None:
    """The same batch twice gives the same tokens.

    Raises:
        CheckFailure: Naming the first token that is another.
    """
    model_of(subject)
    with subject.engine(enable_prefix_caching=False) as llm:
        first, second = _generate(llm, subject.prompts), _generate(llm, subject.prompts)
    for number, (once, again) in enumerate(zip(first, second, strict=True)):
        if once != again:
            raise CheckFailure(
                "the same batch gives other tokens the second time",
                tensor=f"tokens of prompt {number}",
                expected=once,
                got=again,
                look="state that a module keeps on itself from one call to the next",
            )


def prefix_cache_hit(subject: Subject) -> None:
    """A prompt whose beginning is in the prefix cache gets the tokens of one that is not.

    Raises:
        CheckFailure: If the tokens differ, or nothing was taken from the cache.
    """
    if not model_of(subject).cache_specs():
        raise CheckSkipped("the model keeps nothing for each token")
    prompt = subject.prompts[0]
    shared = prompt[: len(prompt) * 2 // 3]
    other = [*shared, *reversed(prompt[len(shared) :])]
    with subject.engine(enable_prefix_caching=False) as llm:
        missed = _generate(llm, [prompt]) + _generate(llm, [other])
    with subject.engine() as llm:
        _generate(llm, [prompt])
        hit = _generate(llm, [prompt]) + _generate(llm, [other])
        hits = llm.stats().prefix_hits
    if not hits:
        raise CheckSkipped("this model's caches cannot share prefixes")
    _require_same_tokens(
        subject, [prompt, other], hit, missed,
        f"tokens differ when {hits} prompt tokens come from the prefix cache", CACHE,
    )  # fmt: skip


def preempted_undisturbed(subject: Subject) -> None:
    """Requests that were preempted and computed anew get the tokens of undisturbed ones.

    Raises:
        CheckFailure: If the tokens differ.
    """
    model = model_of(subject)
    specs = model.cache_specs()
    if not specs:
        raise CheckSkipped("the model keeps nothing for each token, so blocks cannot run out")
    length = max(1, subject.longest // 2 // BLOCK_SIZE) * BLOCK_SIZE  # no room in the last block
    ids = subject.prompts[0][:length]
    prompts = [[*ids[number:], *ids[:number]] for number in range(4)]
    need = len(prompts[0]) + NEW_TOKENS
    blocks = 2 * -(-len(prompts[0]) // BLOCK_SIZE) + 1  # two prompts, not what they generate
    per_block = BLOCK_SIZE * sum(spec.bytes_per_token for spec in specs.values())
    slots = (len(prompts) + 1) * slot_bytes(model.state_specs())
    memory = slots + max(slots, blocks * per_block)  # state has half of it at most
    with subject.engine() as llm:
        undisturbed = _generate(llm, prompts)
    settings = {"enable_prefix_caching": False, "max_model_len": need + 1}
    settings["max_num_seqs"] = len(prompts)
    with subject.engine(kv_cache_memory=memory, **settings) as llm:
        tokens = _generate(llm, prompts)
        preemptions = llm.stats().preemptions
    if not preemptions:
        raise CheckSkipped("nothing was preempted: the cache was too large for these prompts")
    _require_same_tokens(
        subject, prompts, tokens, undisturbed,
        f"tokens differ after {preemptions} preemptions",
        f"{CACHE};\nstate outside the cache; {BATCH}",
    )  # fmt: skip


def no_hooks_while_decoding(subject: Subject) -> None:
    """Generating calls no hook: they run while a model is built.

    Raises:
        CheckFailure: With the number of calls.
    """
    model_of(subject)
    with subject.engine() as llm:
        before = llm.loaded.host.calls
        _generate(llm, subject.prompts[:2])
        calls = llm.loaded.host.calls - before
    if calls:
        raise CheckFailure(
            "hooks are called while tokens are generated",
            expected="0 hook calls",
            got=f"{calls} hook calls for {2 * NEW_TOKENS} tokens",
            look="forward() of the plugin's modules: build parts in __init__, "
            "with model_config.make",
        )
