"""Perplexity and the metric, against slow literal loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lit_prune.errors import UserError
from lit_prune.evaluation import perplexity as evaluation
from lit_prune.evaluation.perplexity import TokenPerplexity, perplexity, token_nll
from tests.evaluation.small import tiny_model


def batch_of(lengths: list[int], pad: int = 0) -> dict[str, Tensor]:
    """Random rows padded on the right to the longest plus `pad`."""
    generator = torch.Generator().manual_seed(1)
    width = max(lengths) + pad
    ids = torch.randint(61, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def literal_nll(model: nn.Module, batch: dict[str, Tensor]) -> list[float]:
    """One forward pass per row, no padding; one token after the other."""
    found = []
    for ids, mask, labels in zip(*batch.values(), strict=True):
        length = int(mask.sum())
        with torch.no_grad():
            logits = model(input_ids=ids[None, :length]).logits[0]
        for position in range(length - 1):
            label = int(labels[position + 1])
            if label != -100:
                weights = [math.exp(value) for value in logits[position].tolist()]
                found.append(-math.log(weights[label] / sum(weights)))
    return found


def test_perplexity_is_the_literal_mean_over_tokens():
    model = tiny_model().train()
    batches = [batch_of([12, 9]), batch_of([5])]
    batches[0]["labels"][0, :4] = -100  # a prompt
    expected = [value for batch in batches for value in literal_nll(model, batch)]

    result = perplexity(model, batches)

    assert result.tokens == len(expected) == 8 + 8 + 4
    assert result.nll == pytest.approx(sum(expected) / len(expected), rel=1e-9)
    assert result.value == pytest.approx(math.exp(result.nll), rel=1e-12)


def test_padding_changes_nothing():
    model = tiny_model()
    batch = batch_of([12, 7], pad=3)
    single = []
    for row, length in enumerate((12, 7)):
        single.append({key: value[row : row + 1, :length] for key, value in batch.items()})

    padded, unpadded = perplexity(model, [batch]), perplexity(model, single)

    assert padded.tokens == unpadded.tokens
    assert padded.nll == pytest.approx(unpadded.nll, rel=1e-12)


def test_modes_come_back_and_no_gradient_is_kept():
    model = tiny_model().train()
    model.lm_head.eval()
    seen = []
    model.register_forward_hook(
        lambda module, args, out: seen.append((module.training, out.logits.requires_grad))
    )
    perplexity(model, [batch_of([4])])
    assert seen == [(False, False)]
    assert model.training
    assert not model.lm_head.training


def test_mode_comes_back_after_an_error():
    model = tiny_model().train()
    with pytest.raises(KeyError):
        perplexity(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    assert model.training


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (-math.inf, "inf|NaN")])
def test_a_loss_that_is_not_finite_is_one_clear_line(value: float, word: str):
    model = tiny_model()
    model.lm_head.weight.data[3] = value
    with pytest.raises(UserError, match=word) as caught:
        perplexity(model, [batch_of([6])], progress="dense")
    assert "batch 0 of 'dense'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_token_to_predict_is_refused():
    with pytest.raises(UserError, match="at least one token"):
        perplexity(tiny_model(), [batch_of([1])])


def test_progress_without_a_terminal_is_a_line_at_start_and_end(capsys: pytest.CaptureFixture):
    perplexity(tiny_model(), [batch_of([4])] * 3, progress="validation")
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(" ")[0] for line in err.splitlines()] == ["validation", "validation:"]
    perplexity(tiny_model(), [batch_of([4])])
    assert capsys.readouterr() == ("", "")


def test_nll_in_blocks_is_the_float32_log_softmax(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    logits = (torch.randn(3, 7, 50) * 4).bfloat16()
    labels = torch.randint(50, (3, 7))
    labels[1, 2:5] = -100
    flat, targets = logits[:, :-1].reshape(-1, 50).float(), labels[:, 1:].reshape(-1)
    expected = nn.functional.cross_entropy(flat, targets, reduction="none")[targets != -100]

    monkeypatch.setattr(evaluation, "_BLOCK_CPU", 4 * 50)
    nll = token_nll(logits, labels)

    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, expected, rtol=1e-6, atol=1e-6)


def test_blocks_cover_the_rows_once_and_are_consecutive():
    rows = torch.tensor([0, 1, 2, 3, 4, 7, 9, 10])
    blocks = list(evaluation.row_blocks(rows, height=2))
    found = [number for block, _ in blocks for number in range(block.start, block.stop)]
    places = [number for _, part in blocks for number in range(part.start, part.stop)]
    assert found == rows.tolist()
    assert places == list(range(8))
    assert max(block.stop - block.start for block, _ in blocks) == 2
    assert list(evaluation.row_blocks(rows[:0], height=2)) == []


def test_no_float32_copy_of_all_logits(monkeypatch: pytest.MonkeyPatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32:
                self.largest = max(self.largest, out.numel())
            return out

    monkeypatch.setattr(evaluation, "_BLOCK_CPU", 1000)
    with Watch() as watch:
        nll = token_nll(
            torch.zeros(2, 30, 100, dtype=torch.bfloat16), torch.zeros(2, 30, dtype=torch.long)
        )
    assert len(nll) == 58
    assert 0 < watch.largest <= 2 * 1000


def test_metric_equals_perplexity_over_batches():
    model = tiny_model().eval()
    batches = [batch_of([12, 9]), batch_of([5], pad=2)]
    ranks = TokenPerplexity(), TokenPerplexity()
    for metric, batch in zip(ranks, batches, strict=True):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        metric(logits, batch["labels"])
    ranks[0].merge_state(ranks[1])  # reduces as between processes
    expected = perplexity(model, batches)
    assert ranks[0].count == expected.tokens
    assert ranks[0].compute().item() == pytest.approx(expected.value, rel=1e-9)


def test_metric_goes_on_after_inference_mode():
    metric, batch = TokenPerplexity(), batch_of([12])
    logits = torch.zeros(1, 12, 61)
    with torch.inference_mode():
        metric.update(logits, batch["labels"])
    metric.update(logits, batch["labels"])
    assert metric.compute().item() == pytest.approx(61)


def test_metric_keeps_its_precision_when_the_module_is_cast():
    holder = nn.Module()
    metric: Metric = TokenPerplexity()
    holder.metric = metric
    logits, labels = torch.zeros(1, 1002, 3), torch.zeros(1, 1002, dtype=torch.long)
    metric.update(logits, labels)
    holder.to(torch.bfloat16)
    metric.update(logits, labels)
    assert (metric.total.dtype, metric.count.dtype) == (torch.float64, torch.int64)
    assert metric.count == 2002
    assert metric.compute().item() == pytest.approx(3, rel=1e-6)
    metric.reset()
    assert (metric.total.dtype, metric.count.dtype) == (torch.float64, torch.int64)
