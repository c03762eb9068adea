import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.samples import random_sample

from turnwise.learn.batch import pack
from turnwise.types import Sample


def samples_of(lengths: list[int]) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [random_sample(rng, length, id=f"t{i}") for i, length in enumerate(lengths)]


def test_two_samples_in_a_row() -> None:
    samples = samples_of([3, 2])
    (batch,) = pack(samples, micro_tokens=8, row_tokens=6)
    a, b = (sample.token_ids_T.tolist() for sample in samples)
    assert batch.token_ids_BT.tolist() == [[*a, *b, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch.documents_BT.tolist() == [[0, 0, 0, 1, 1, -1]]
    assert [sample.trajectory_id for sample in batch.samples] == ["t0", "t1"]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), max_size=40),
    micro=st.integers(8, 120),
    row=st.one_of(st.none(), st.integers(8, 64)),
    together=st.booleans(),
)
def test_every_sample_is_in_one_row_whole(
    lengths: list[int], micro: int, row: int | None, together: bool
) -> None:
    samples = samples_of(lengths)
    seen = []
    for batch in pack(samples, micro_tokens=micro, row_tokens=row, together=together):
        size = batch.token_ids_BT.size
        assert size <= micro or len(batch.token_ids_BT) == 1
        # No row without a document.
        assert (batch.documents_BT >= 0).any(axis=1).all()
        for document, sample in enumerate(batch.samples):
            seen.append(sample.trajectory_id)
            here = batch.documents_BT == document
            assert np.unique(np.nonzero(here)[0]).size == 1
            assert batch.positions_BT[here].tolist() == list(range(len(sample)))
            for name in ("token_ids", "loss_mask", "logprobs", "advantages", "weights"):
                np.testing.assert_array_equal(
                    getattr(batch, f"{name}_BT")[here], getattr(sample, f"{name}_T")
                )
        if not together:
            assert all(len(set(row_B) - {-1}) == 1 for row_B in batch.documents_BT.tolist())
        padding = batch.documents_BT < 0
        assert not batch.loss_mask_BT[padding].any()
        assert not batch.weights_BT[padding].any()
    assert sorted(seen) == sorted(sample.trajectory_id for sample in samples)


def test_like_lengths_share_a_micro_batch_so_little_is_padded() -> None:
    samples = samples_of([*range(100, 116), *(22 + i % 8 for i in range(320))])
    batches = pack(samples, micro_tokens=2048)
    real = sum(batch.tokens for batch in batches)
    assert real / sum(batch.token_ids_BT.size for batch in batches) > 0.9


def test_a_sample_longer_than_the_row_gets_its_own_length() -> None:
    batches = pack(samples_of([30, 8, 8]), micro_tokens=16, row_tokens=16)
    assert [batch.token_ids_BT.shape for batch in batches] == [(1, 30), (1, 16)]
