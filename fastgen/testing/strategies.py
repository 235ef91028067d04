"""Hypothesis strategies for models, prompts and options of text generation.

They aim at what decoders get wrong: sizes that are no multiple of a vector, prompts up to the last
position, ragged batches, exact ties, k beyond the vocabulary, p at a token's boundary, temperatures
near the ends, eos as the first token. For example::

    from hypothesis import given
    from fastgen.testing import strategies as fg

    @given(case=fg.cases())
    def test_my_decoder(case):
        tensors = case.tensors()
        ...

Weights are drawn by NumPy from a drawn seed, so an example stays small and shrinks well.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import strategies as st

from fastgen.options import GenerationOptions
from fastgen.testing.models import GPTShape, Tensors, WeightRecipe, make_tensors

__all__ = [
    "Case",
    "cases",
    "generation_options",
    "gpt_configs",
    "prompt_batches",
    "prompts",
    "weights",
]

_HEAD_SIZES = (8, 9, 12, 16, 17, 20, 24, 32, 33, 40, 48, 64, 80, 96, 127, 128)


@st.composite
def gpt_configs(draw: st.DrawFn, large: bool | None = None) -> GPTShape:
    """Network sizes: 1-4 layers, 1-4 heads of 8-128, vocabulary 16-3000, 8-128 positions.

    Args:
        draw: supplied by hypothesis.
        large: False: small ones only; True: up to the upper ends; None: mostly small ones.
    """
    if large is None:
        large = draw(st.integers(0, 9)) == 9
    heads = draw(st.integers(1, 4))
    if large:
        head_size = draw(st.sampled_from(_HEAD_SIZES))
        vocab = draw(st.integers(16, 3000))
        layers = draw(st.integers(1, 4))
        intermediate = draw(st.integers(1, 4 * heads * head_size))
    else:
        head_size = draw(st.integers(8, 16))
        vocab = draw(
            st.one_of(st.integers(16, 80), st.sampled_from([16, 17, 63, 64, 65, 127, 257]))
        )
        layers = draw(st.sampled_from([1, 1, 1, 2, 2, 3]))
        intermediate = draw(st.integers(1, 4 * heads * head_size))
    return GPTShape(
        vocab_size=vocab,
        max_position_embeddings=draw(st.one_of(st.integers(8, 24), st.integers(8, 128))),
        hidden_size=heads * head_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
    )


def weights(kinds: tuple[str, ...] | None = None) -> st.SearchStrategy[WeightRecipe]:
    """Recipes of random weights, from flat to peaked distributions, sometimes with exact ties.

    Args:
        kinds: see :class:`fastgen.testing.models.WeightRecipe`; all, mostly ``random``, when None.
    """
    if kinds is None:
        kinds = ("random",) * 6 + ("paired", "table", "table", "flat")
    return st.builds(
        WeightRecipe,
        seed=st.integers(0, 2**32 - 1),
        logit_std=st.sampled_from([0.02, 0.3, 1.0, 2.0, 4.0, 8.0]),
        kind=st.sampled_from(kinds),
    )


def prompts(vocab_size: int, max_length: int, min_length: int = 1) -> st.SearchStrategy[list[int]]:
    """One prompt of ``min_length`` to ``max_length`` token ids, short ones more often.

    Tokens are uniform, or taken from three ids so that n-grams repeat.
    """
    token = st.integers(0, vocab_size - 1)
    short = min(max_length, max(min_length, 6))
    length = st.one_of(
        st.integers(min_length, short), st.integers(min_length, max_length), st.just(max_length)
    )

    @st.composite
    def build(draw: st.DrawFn) -> list[int]:
        count = draw(length)
        if draw(st.booleans()):
            few = draw(st.lists(token, min_size=1, max_size=3))
            start, stride = draw(st.integers(0, 2)), draw(st.integers(1, 2))
            return [few[(start + stride * i) % len(few)] for i in range(count)]
        # A long prompt is drawn by its seed: element by element it would be most of the example.
        if count > 8:
            start, factor = draw(token), draw(st.integers(1, 2**31 - 1))
            values = [(start + factor * (i * i + 1)) % (2**31 - 1) for i in range(count)]
            return [value % vocab_size for value in values]
        return draw(st.lists(token, min_size=count, max_size=count))

    return build()


@st.composite
def prompt_batches(
    draw: st.DrawFn, vocab_size: int, max_length: int, max_prompts: int = 4
) -> list[list[int]]:
    """A batch of 1 to ``max_prompts`` prompts: ragged, of one length, or with repeats."""
    count = draw(st.integers(1, max_prompts))
    first = draw(prompts(vocab_size, max_length))
    batch = [first]
    how = draw(st.sampled_from(["ragged", "ragged", "even", "repeated"]))
    for _ in range(count - 1):
        if how == "repeated":
            batch.append(list(first))
        elif how == "even":
            batch.append(draw(prompts(vocab_size, len(first), len(first))))
        else:
            batch.append(draw(prompts(vocab_size, max_length)))
    return batch


_TEMPERATURES = st.one_of(
    st.just(1.0),
    st.sampled_from([0.05, 0.1, 0.5, 0.7, 1.3, 2.0, 10.0, 50.0]),
    st.floats(0.0625, 50.0, width=32),
)


@st.composite
def generation_options(
    draw: st.DrawFn,
    vocab_size: int,
    max_length: int,
    longest_prompt: int,
    decode_strategy: str | None = None,
) -> GenerationOptions:
    """Options of one request, without a seed.

    ``no_repeat_ngram_size`` is drawn so that it cannot ban the whole vocabulary, where PaddleNLP's
    behaviour is undefined.

    Args:
        draw: supplied by hypothesis.
        vocab_size: of the model.
        max_length: largest number of new tokens.
        longest_prompt: of the batch.
        decode_strategy: ``greedy_search`` or ``sampling``; either when None.
    """
    token = st.integers(0, vocab_size - 1)
    optional_token = st.one_of(st.just(-1), st.just(-1), st.just(-1), token)
    if decode_strategy is None:
        decode_strategy = draw(st.sampled_from(["sampling", "greedy_search"]))
    length = draw(st.integers(1, max_length))
    ngrams = [0, 0, 0, 2, 3, 4]
    # One more for a banned eos, one to be left over.
    if longest_prompt + length + 2 < vocab_size:
        ngrams.append(1)
    sampling = decode_strategy == "sampling"
    top_k = top_p = None
    if sampling:
        top_k = draw(
            st.one_of(
                st.sampled_from([None, 0, 1, 2, 4, 50, vocab_size - 1, vocab_size, vocab_size + 7]),
                st.integers(1, vocab_size),
            )
        )
        # Quarters and sixteenths are exact sums of the flat distributions.
        top_p = draw(
            st.one_of(
                st.sampled_from([None, 0.0, 1.0, 1.0]),
                st.sampled_from([0.0625, 0.25, 0.5, 0.75, 0.9, 0.999]),
                st.floats(0.015625, 1.0, width=32),
            )
        )
    return GenerationOptions(
        decode_strategy=decode_strategy,
        max_length=length,
        min_length=draw(st.sampled_from([0, 0, 1, length])),
        top_k=top_k,
        top_p=top_p,
        temperature=draw(_TEMPERATURES) if sampling else 1.0,
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.0, 1.2, 2.0, 0.8])),
        no_repeat_ngram_size=draw(st.sampled_from(ngrams)),
        num_return_sequences=draw(st.sampled_from([1, 1, 1, 2, 3])) if sampling else 1,
        eos_token_id=draw(st.one_of(st.just(-1), token)),
        pad_token_id=draw(token),
        forced_bos_token_id=draw(optional_token),
        forced_eos_token_id=draw(optional_token),
    )


@dataclass(frozen=True)
class Case:
    """A model, a batch of prompts, options and a seed.

    ``eos_choice`` and ``p_choice`` are for a test that looks at the first step's distribution
    before it decides: make eos the token that comes first; put p ``below``, ``above`` or ``at`` the
    running sum after the token of that rank.
    """

    shape: GPTShape
    recipe: WeightRecipe
    prompts: list[list[int]]
    options: GenerationOptions
    seed: int
    first_sequence: int = 0
    eos_choice: str = field(default="drawn")
    p_choice: tuple[int, str] | None = field(default=None)

    def tensors(self) -> Tensors:
        """The model's weights, with PaddleNLP's names."""
        return make_tensors(self.shape, self.recipe)


@st.composite
def cases(
    draw: st.DrawFn,
    decode_strategy: str | None = None,
    large: bool | None = None,
    kinds: tuple[str, ...] | None = None,
    max_new_tokens: int = 6,
    max_prompts: int = 4,
    first_sequence: bool = False,
) -> Case:
    """Everything for one generation; prompt + new tokens never exceed the position table.

    Args:
        draw: supplied by hypothesis.
        decode_strategy: ``greedy_search`` or ``sampling``; either when None.
        large: see :func:`gpt_configs`.
        kinds: see :func:`weights`.
        max_new_tokens: largest ``max_length``.
        max_prompts: largest batch.
        first_sequence: let the sequence indices begin elsewhere than at 0.
    """
    shape = draw(gpt_configs(large))
    recipe = draw(weights(kinds))
    longest_new = min(max_new_tokens, shape.max_position_embeddings - 1)
    new_tokens = draw(st.integers(1, longest_new))
    batch = draw(
        prompt_batches(shape.vocab_size, shape.max_position_embeddings - new_tokens, max_prompts)
    )
    options = draw(
        generation_options(
            shape.vocab_size, new_tokens, max(len(prompt) for prompt in batch), decode_strategy
        )
    )
    sampling = options.decode_strategy == "sampling"
    boundary = None
    if sampling and draw(st.integers(0, 9)) == 9:
        index = draw(st.integers(0, min(shape.vocab_size - 1, 31)))
        boundary = (index, draw(st.sampled_from(["below", "above"] * 4 + ["at"])))
    ties = {"random": 0, "paired": 15, "table": 19, "flat": 19}[recipe.kind]
    if draw(st.integers(0, 19)) < ties:
        # Which of a group of equals top-p keeps is unspecified in PaddleNLP: few such cases.
        options, boundary = replace(options, top_p=1.0), None
    return Case(
        shape=shape,
        recipe=recipe,
        prompts=batch,
        options=options,
        seed=draw(st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1))),
        first_sequence=draw(st.sampled_from([1, 5, 2**31, 2**32 - 64])) if first_sequence else 0,
        eos_choice=draw(st.sampled_from(["drawn"] * 5 + ["first"])),
        p_choice=boundary,
    )
