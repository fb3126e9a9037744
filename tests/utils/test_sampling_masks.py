"""Sampling masks of a response: parts, joints, and tokens outside their masks."""

import pickle

import numpy as np
import pytest

from verl.utils.sampling_masks import SamplingMasks


def masks_of(lists):
    counts = np.array([len(kept) for kept in lists], np.int32)
    return SamplingMasks(np.array([token for kept in lists for token in kept], np.int32), counts)


LISTS = [[3, 1], [], [7], [2, 9, 4], []]


@pytest.mark.parametrize("part", [slice(None), slice(2), slice(1, 4), slice(3, None), slice(2, 2), slice(-2, None)])
def test_a_part_has_the_lists_of_its_tokens(part):
    assert masks_of(LISTS)[part] == masks_of(LISTS[part])


def test_a_slice_with_gaps_is_an_error():
    with pytest.raises(ValueError, match="with step 2: only consecutive tokens"):
        masks_of(LISTS)[::2]


def test_joined_parts_are_the_whole():
    masks = masks_of(LISTS)
    joined = SamplingMasks.full(0) + masks[:2] + masks[2:] + SamplingMasks.full(2)
    assert joined == masks_of([*LISTS, [], []]) and len(joined) == 7
    assert joined.ids.dtype == joined.counts.dtype == np.int32
    assert joined != masks and pickle.loads(pickle.dumps(masks)) == masks


def test_excluded_tokens_are_those_outside_their_masks():
    masks = masks_of(LISTS)
    assert masks.excluded(np.array([1, 5, 7, 9, 5])).tolist() == []
    assert masks.excluded(np.array([7, 5, 7, 3, 5])).tolist() == [0, 3]
