"""Parts never overlap; windows and rows are what a literal loop makes of the tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data.distributed import DistributedSampler

from lit_prune.data.tokens import Tokens
from lit_prune.data.windows import (
    IGNORED,
    Collate,
    EvenData,
    RowDataset,
    WindowDataset,
    cut,
    draw,
    require_items,
    split_parts,
)
from lit_prune.errors import UserError

shares = st.floats(0, 0.99)


@given(st.integers(0, 10_000), shares, shares)
def test_parts_cover_all_and_never_overlap(total, calibration, validation):
    parts = split_parts(total, calibration, validation)
    assert [*parts.train, *parts.calibration, *parts.validation] == list(range(total))
    assert abs(len(parts.validation) - total * validation) <= 0.5
    rest = total - len(parts.validation)
    assert abs(len(parts.calibration) - rest * calibration) <= 0.5


@given(st.integers(0, 500), shares, shares, st.integers(1, 40), st.integers(1, 40))
def test_windows_of_different_parts_share_no_token(total, calibration, validation, one, other):
    ids = torch.arange(total, dtype=torch.int32)
    seen = []
    for part, length in zip(
        split_parts(total, calibration, validation), (one, other, one), strict=True
    ):
        data = WindowDataset(ids, part, length)
        for i in range(len(data)):
            seen += data[i]["input_ids"].tolist()
    assert len(seen) == len(set(seen))


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 30), st.none() | st.integers(0, 99))
def test_windows_are_those_of_a_literal_loop(start, size, length, limit):
    ids = torch.randperm(start + size + 7).int()
    data = cut(Tokens(ids), range(start, start + size), length, limit)
    expected, position = [], start
    end = start + (size if limit is None else min(size, limit))
    while position + length <= end:
        expected.append(ids[position : position + length].tolist())
        position += length
    assert [item["input_ids"].tolist() for item in (data[i] for i in range(len(data)))] == expected
    assert data.tokens == sum(map(len, expected))
    with pytest.raises(IndexError):
        data[len(data)]


def test_a_window_is_whole_and_predicts_itself():
    item = WindowDataset(torch.arange(10, dtype=torch.int32), range(10), 5)[1]
    assert item["input_ids"].tolist() == item["labels"].tolist() == [5, 6, 7, 8, 9]
    assert item["attention_mask"].tolist() == [1] * 5
    assert all(tensor.dtype == torch.int64 for tensor in item.values())


def ragged(lengths, prompts):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Tokens(torch.arange(sum(lengths)).int() + 100, offsets, torch.tensor(prompts))


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=12),
    st.integers(2, 14),
    st.none() | st.integers(1, 60),
    st.data(),
)
def test_rows_are_those_of_a_literal_loop(sizes, length, limit, data):
    lengths, prompts = [p + a for p, a in sizes], [p for p, _ in sizes]
    tokens = ragged(lengths, prompts)
    first = data.draw(st.integers(0, len(sizes)))
    rows = RowDataset(tokens, range(first, len(sizes)), length, limit)
    expected, total = [], 0
    for row in range(first, len(sizes)):
        start = 100 + sum(lengths[:row])
        ids = list(range(start, start + lengths[row]))[:length]
        labels = [-100 if i < prompts[row] else token for i, token in enumerate(ids)]
        if all(label == -100 for label in labels):
            continue  # nothing to learn from
        if limit is not None and total + len(ids) > limit and expected:
            break
        expected.append((ids, labels))
        total += len(ids)
    found = [rows[i] for i in range(len(rows))]
    assert [(r["input_ids"].tolist(), r["labels"].tolist()) for r in found] == expected
    assert rows.tokens == total


@pytest.mark.parametrize(("limit", "rows"), [(1, 1), (8, 1), (9, 2), (13, 2), (14, 3), (None, 3)])
def test_rows_stop_before_the_limit_is_passed(limit, rows):
    assert len(RowDataset(ragged([5, 4, 5], [1, 1, 1]), range(3), 10, limit)) == rows


@pytest.mark.parametrize("processes", range(1, 6))
@pytest.mark.parametrize("rows", [False, True])
def test_processes_share_evenly_and_count_each_row_once(rows, processes):
    data = WindowDataset(torch.arange(50), range(50), 16)
    if rows:
        data = RowDataset(ragged([5, 4, 6], [2, 1, 3]), range(3), 10)
    even = EvenData(data, processes)
    assert 0 <= len(even) - len(data) < processes
    counted = []
    for rank in range(processes):  # as Lightning hands them out
        sampler = DistributedSampler(even, processes, rank, shuffle=False)
        assert len(sampler) == len(even) // processes
        given = [even[index] for index in sampler]
        assert all(set(item) == set(data[0]) and len(item["input_ids"]) for item in given)
        counted += [item for item in given if (item["labels"] != IGNORED).any()]
    seen = sorted(item["input_ids"].tolist() for item in counted)
    assert seen == sorted(item["input_ids"].tolist() for item in data)
    with pytest.raises(IndexError):
        even[len(even)]


def test_plain_tokens_have_no_rows():
    with pytest.raises(ValueError, match="plain text"):
        RowDataset(Tokens(torch.arange(3)), range(3), 2)


def test_padding_is_on_the_right_unseen_and_unlearnt():
    rows = RowDataset(ragged([5, 3], [2, 1]), range(2), 10)
    batch = Collate(7)([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[100, 101, 102, 103, 104], [105, 106, 107, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 102, 103, 104], [-100, 106, 107, -100, -100]]


@given(st.integers(0, 50), st.integers(1, 60), st.integers(0, 2**31))
def test_draws_are_different_and_reproducible(count, available, seed):
    drawn = draw(count, available, seed)
    assert len(set(drawn)) == len(drawn) == min(count, available)
    assert all(0 <= index < available for index in drawn)
    assert drawn == draw(count, available, seed)


def test_another_seed_draws_others():
    assert draw(8, 1000, 0) != draw(8, 1000, 1)


def test_too_short_says_the_numbers():
    data = cut(Tokens(torch.arange(100)), range(90), 32)
    require_items(data, 2, part="calibration", name="a.txt", option="length")
    with pytest.raises(UserError) as caught:
        require_items(data, 3, part="calibration", name="a.txt", option="length")
    assert str(caught.value) == (
        "expected at least 3 windows of 32 tokens in the calibration part of a.txt, "
        "got 90 tokens, 2 windows; give a longer text or a smaller length"
    )
    rows = cut(ragged([5, 3], [4, 3]), range(2), 4)
    with pytest.raises(UserError, match=r"1 rows with an answer within 4 tokens in the .* got 0;"):
        require_items(rows, 1, part="training", name="a.json", option="length")
