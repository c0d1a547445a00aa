from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GlmConfig, LlamaConfig

from lit_prune.errors import UserError
from lit_prune.methods.elimination import Course, Step, plan_course
from lit_prune.structure import Structure, Widths
from lit_prune.structure.counting import count, unique_labels
from tests.structure.tiny import tiny_config

LLAMA_7B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32000,
)
CHATGLM3 = GlmConfig(
    hidden_size=4096,
    intermediate_size=13696,
    num_hidden_layers=28,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    vocab_size=65024,
    attention_bias=True,
    pad_token_id=0,
)
SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
ALL = ("query", "channel", "hidden")


class Planner:
    """Plans for a config, and counts what is left."""

    def __init__(self, config: Any) -> None:
        self.structure, model = Structure.of_config(config)
        self.labels = unique_labels(model, self.structure)
        self.widths = self.structure.widths

    def __call__(self, axes: Any, **options: Any) -> Course:
        return plan_course(self.labels, self.widths, axes, **options)

    def after(self, course: Course) -> list[Widths]:
        """Widths after each iteration."""
        found, left = [], self.widths
        for step in course.steps:
            left = step.applied(left)
            found.append(left)
        return found

    def gone(self, widths: Widths, *, decoder: bool = True) -> float:
        counts = [count(self.labels, w, decoder=decoder) for w in (self.widths, widths)]
        return 1 - counts[1] / counts[0]


def test_the_papers_llama_7b() -> None:
    """5.58B after three iterations and 5.22B after four, the paper's 20 % and 24 %."""
    plan = Planner(LLAMA_7B)
    course = plan(("group", "channel", "hidden"), iterations=4, ffn_step=320)
    left = plan.after(course)
    totals = [count(plan.labels, widths) / 1e9 for widths in left]
    assert totals[2:] == pytest.approx([5.58, 5.22], abs=0.005)
    assert [plan.gone(w) for w in left[2:]] == pytest.approx([0.175, 0.229], abs=0.0005)
    assert course.sparsity == pytest.approx(plan.gone(left[-1]))
    assert left[2].shared["hidden"] == 4096 - 3 * 128
    assert left[2].uniform("group") == 29
    assert left[2].uniform("channel") == 11008 - 3 * 320


def test_the_papers_chatglm3() -> None:
    """Two of 32 heads share each key: they go in one iteration, and twice as much of the rest."""
    plan = Planner(CHATGLM3)
    left = plan.after(plan(ALL, iterations=2))
    totals = [count(plan.labels, widths) / 1e9 for widths in left]
    assert totals == pytest.approx([5.5, 4.8], abs=0.05)
    assert left[0].uniform("query") == 15
    assert left[0].uniform("group") == 2
    assert left[0].uniform("channel") == 13696 - 2 * 428
    assert left[0].shared["hidden"] == 4096 - 2 * 128


def test_heads_that_are_many_go_once_they_are_due() -> None:
    """Three of nine heads go together: in every third iteration."""
    plan = Planner(SMOLLM2)
    left = plan.after(plan(ALL, iterations=6))
    assert [widths.uniform("query") for widths in left] == [3, 3, 2, 2, 2, 1]
    assert [widths.uniform("channel") for widths in left] == [1536 - i * 171 for i in range(1, 7)]
    assert [widths.shared["hidden"] for widths in left] == [576 - i * 64 for i in range(1, 7)]
    alone = plan.after(plan(("query",), iterations=2))
    assert [widths.uniform("query") for widths in alone] == [2, 1]
    groups = plan.after(plan(("group", "channel"), iterations=4))
    assert [widths.uniform("group") for widths in groups] == [3, 3, 2, 2]


@pytest.mark.parametrize("axes", [ALL, ("group", "channel"), ("channel",), ("channel", "hidden")])
@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.5])
def test_a_target_is_met_within_one_channel(axes: Any, sparsity: float) -> None:
    plan = Planner(SMOLLM2)
    course = plan(axes, sparsity=sparsity)
    left = plan.after(course)
    total = count(plan.labels, plan.widths, decoder=True)
    assert abs(plan.gone(left[-1]) - sparsity) * total <= 3 * left[-1].shared["hidden"]
    assert course.sparsity == pytest.approx(plan.gone(left[-1]))
    full = plan.after(plan(axes, iterations=len(left)))
    assert left[:-1] == full[:-1]
    assert plan.gone(full[-1]) >= sparsity - 1e-5
    assert not left[:-1] or plan.gone(left[-2]) < sparsity


def test_the_last_iteration_is_cut_short_on_channels_then_features() -> None:
    plan = Planner(LLAMA_7B)
    axes = ("group", "channel", "hidden")
    full = plan(axes, iterations=3)
    # all heads and features of the second iteration fit in, and half of its channels
    one = plan.after(full)[0]
    half = full.steps[1].removed["channel"][0] // 2
    middle = full.steps[1].applied(one)
    for sizes in middle.layers:
        sizes["channel"] += half
    course = plan(axes, sparsity=plan.gone(middle))
    assert len(course.steps) == 2
    assert course.steps[1].removed["group"] == [1] * 32
    assert course.steps[1].features == 128
    assert set(course.steps[1].removed["channel"]) == {half}
    # now its features don't fit in, and channels only make up what a feature is too much
    few = plan(axes, sparsity=plan.gone(one) + 0.02).steps[1]
    assert few.removed["group"] == [1] * 32
    assert 0 < few.features < 128
    assert sum(few.removed["channel"]) * 3 * 4000 < 32 * 12 * 11008
    # and last not even its heads
    least = plan(axes, sparsity=plan.gone(one) + 0.003).steps[1]
    assert least.removed["group"] == [0] * 32
    assert 0 < least.features < 30


@pytest.mark.parametrize(("axes", "unit"), [(("query", "hidden"), 1 / 576), (("query",), 0.13)])
def test_without_channels_the_nearest_is_taken(axes: Any, unit: float) -> None:
    plan = Planner(SMOLLM2)
    goal = {2: 0.15, 1: 0.12}[len(axes)]
    course = plan(axes, sparsity=goal)
    assert abs(course.sparsity - goal) <= unit / 2
    assert course.sparsity == pytest.approx(plan.gone(plan.after(course)[-1]))


def test_protected_layers_keep_heads_and_channels() -> None:
    plan = Planner(SMOLLM2)
    course = plan(ALL, sparsity=0.3, protected=[0, 29])
    last = plan.after(course)[-1]
    for layer in (0, 29):
        assert last.layers[layer] == plan.widths.layers[layer]
    assert last.layers[1]["channel"] < 1536
    assert last.shared["hidden"] < 576
    assert course.sparsity == pytest.approx(0.3, abs=1e-4)


def test_all_parameters_may_count() -> None:
    plan = Planner(SMOLLM2)
    course = plan(ALL, sparsity=0.2, decoder=False)
    last = plan.after(course)[-1]
    assert plan.gone(last, decoder=False) == pytest.approx(0.2, abs=1e-4)
    assert plan.gone(last) != pytest.approx(0.2, abs=1e-3)


def test_stock_takes_as_many_channels_of_each_layer() -> None:
    plan = Planner(SMOLLM2)
    course = plan(ALL, sparsity=0.2, stock=True)
    assert all(len(set(n)) == 1 for step in course.steps for n in step.removed.values())
    assert course.sparsity == pytest.approx(0.2, abs=30 * 3 * 576 / 106e6)


def test_one_unit_of_everything_stays() -> None:
    plan = Planner(tiny_config("llama"))
    left = plan.after(plan(ALL, iterations=60))[-1]
    assert left.shared["hidden"] == 1
    assert left.uniform("query") == left.uniform("channel") == 1
    assert left.uniform("group") == 2


@given(
    sparsity=st.floats(0.0, 0.9),
    name=st.sampled_from(["llama", "gpt2", "phi3", "opt", "falcon-new"]),
    features=st.booleans(),
    protected=st.sets(st.integers(0, 2), max_size=1),
)
@settings(max_examples=40)
def test_any_target_is_met_or_refused(
    sparsity: float, name: str, features: bool, protected: set[int]
) -> None:
    plan = Planner(tiny_config(name))
    heads = "query" if plan.widths.layers[0]["query"] > 1 else "group"
    axes = (heads, "channel", "hidden") if features else (heads, "channel")
    keep = list(protected)
    least = plan.after(plan(axes, iterations=40, protected=keep))[-1]
    most = plan.gone(least)
    total = count(plan.labels, plan.widths, decoder=True)
    one = Step({heads: [int(layer not in keep) for layer in range(3)]})
    by_heads = plan.gone(one.applied(plan.widths))
    try:
        course = plan(axes, sparsity=sparsity, protected=keep)
    except UserError as error:
        refused = str(error)
    else:
        last = plan.after(course)[-1]
        channel = 3 * (last.shared["hidden"] + 1)
        assert abs(plan.gone(last) - min(sparsity, most)) * total <= (
            channel if features else max(channel, 0.02 * total)
        )
        assert min(min(sizes.values()) for sizes in last.layers) >= 1
        assert last.shared["hidden"] >= 1
        return
    # beyond the most, or no channels are left where one head more would be too much
    nearest = float(refused.split("nearest is ")[1].split()[0])
    assert sparsity > most + 0.019 or (not features and sparsity - nearest < by_heads)
    assert f"the most is {most:.3f}" in refused


@pytest.mark.parametrize(
    ("axes", "options", "text"),
    [
        (("value", "channel"), {}, "axes out of group, query, channel, hidden.*got value, channel"),
        (("group", "query"), {}, "only one of the first two, got group, query"),
        ((), {}, "got none"),
        (ALL, {"sparsity": 1.0}, "a sparsity from 0 to below 1"),
        (ALL, {"iterations": 0}, "iterations and ffn_step of at least 1, got 0, 0 and None"),
        (ALL, {"ffn_step": -1}, "iterations and ffn_step of at least 1"),
        (ALL, {"protected": [3]}, "protected layers from 0 to 2, got 3"),
        (("channel",), {"protected": [0, 1, 2]}, "a layer that may be cut, got all 3 protected"),
        (
            ("channel",),
            {"sparsity": 0.9},
            "can reach, got 0.9; the nearest is 0.297 and the most is 0.297",
        ),
    ],
)
def test_what_cannot_be_is_refused(axes: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        Planner(tiny_config("llama"))(axes, **options)
    assert "\n" not in str(caught.value)
