"""The table of model families: one line per module, all else follows.

To add a family, write its modules (paths as in the checkpoint, ``*`` for the layer's number), name
the config fields that hold its sizes, and add a tiny config to ``tests/structure/tiny.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_prune.errors import UserError


@dataclass(frozen=True)
class Family:
    """What this project knows of one family of models.

    Attributes:
        types: The ``model_type`` of its configs.
        modules: A line per module: path, then its dimensions (see `lit_prune.structure.dims`).
        fields: Config field of a size; a product of axes is one size (``group query``: heads).
        when: Config values that choose this entry among several of one ``model_type``.
        constants: Sizes that no field holds.
        norm: ``rms``, ``rms_plus_one`` (the stored weight is w - 1) or ``layer``.
        epsilon: Config field of an RMS norm's epsilon.
        scaled_embedding: The embedding is multiplied by the square root of the hidden size.
        alibi: A config value that says that attention has ALiBi biases, indexed by head.
        reads_config: Sizes that attention reads from the shared config in its forward pass.
        one_group: Attribute of attention that is true where one group serves all heads.
    """

    types: tuple[str, ...]
    modules: str
    fields: Mapping[str, str]
    when: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, int] = field(default_factory=dict)
    norm: str = "rms"
    epsilon: str = "rms_norm_eps"
    scaled_embedding: bool = False
    alibi: Mapping[str, Any] | None = None
    reads_config: Mapping[str, str] = field(default_factory=dict)
    one_group: str | None = None

    def has_alibi(self, config: Any) -> bool:
        """Whether attention of a model with this config has ALiBi biases."""
        if self.alibi is None:
            return False
        return all(getattr(config, key, None) == value for key, value in self.alibi.items())


_FIELDS = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "channel": "intermediate_size",
    "layer": "num_hidden_layers",
    "group query": "num_attention_heads",
    "group": "num_key_value_heads",
    "head_dim": "head_dim",
}
_MULTI_HEAD = {k: v for k, v in _FIELDS.items() if k not in {"group", "head_dim"}}

_EMBEDDING = """
model.embed_tokens                               vocab -> hidden
model.norm                                       hidden
lm_head                                          hidden -> vocab
"""
_ATTENTION = """
model.layers.*.self_attn.q_proj                  hidden -> (group query head_dim)
model.layers.*.self_attn.k_proj                  hidden -> (group head_dim)
model.layers.*.self_attn.v_proj                  hidden -> (group value)
model.layers.*.self_attn.o_proj                  (group query value) -> hidden
"""
_GATED = """
model.layers.*.mlp.gate_proj                     hidden -> channel
model.layers.*.mlp.up_proj                       hidden -> channel
model.layers.*.mlp.down_proj                     channel -> hidden
"""
_GATED_FUSED = """
model.layers.*.mlp.gate_up_proj                  hidden -> channel + channel
model.layers.*.mlp.down_proj                     channel -> hidden
"""
_TWO_NORMS = """
model.layers.*.input_layernorm                   hidden
model.layers.*.post_attention_layernorm          hidden
"""
_FOUR_NORMS = f"""{_TWO_NORMS}
model.layers.*.pre_feedforward_layernorm         hidden
model.layers.*.post_feedforward_layernorm        hidden
"""
_HEAD_NORMS = """
model.layers.*.self_attn.q_norm                  head_dim
model.layers.*.self_attn.k_norm                  head_dim
"""
_FALCON = """
transformer.word_embeddings                      vocab -> hidden
transformer.h.*.ln_attn                          hidden
transformer.h.*.ln_mlp                           hidden
transformer.h.*.input_layernorm                  hidden
transformer.h.*.post_attention_layernorm         hidden
transformer.h.*.self_attention.dense             (group query value) -> hidden
transformer.h.*.mlp.dense_h_to_4h                hidden -> channel
transformer.h.*.mlp.dense_4h_to_h                channel -> hidden
transformer.ln_f                                 hidden
lm_head                                          hidden -> vocab
"""
_FALCON_QKV = "transformer.h.*.self_attention.query_key_value  hidden -> "
_FALCON_FIELDS = {**_MULTI_HEAD, "channel": "ffn_hidden_size"}
_OPT = """
model.decoder.embed_positions                    2 + position -> hidden
model.decoder.layers.*.self_attn_layer_norm      hidden
model.decoder.layers.*.self_attn.q_proj          hidden -> (group head_dim)
model.decoder.layers.*.self_attn.k_proj          hidden -> (group head_dim)
model.decoder.layers.*.self_attn.v_proj          hidden -> (group value)
model.decoder.layers.*.self_attn.out_proj        (group value) -> hidden
model.decoder.layers.*.final_layer_norm          hidden
model.decoder.layers.*.fc1                       hidden -> channel
model.decoder.layers.*.fc2                       channel -> hidden
model.decoder.final_layer_norm                   hidden
"""
_OPT_FIELDS = {**_MULTI_HEAD, "channel": "ffn_dim", "position": "max_position_embeddings"}

FAMILIES: tuple[Family, ...] = (
    Family(
        types=("llama", "mistral", "qwen2"),
        modules=_EMBEDDING + _TWO_NORMS + _ATTENTION + _GATED,
        fields=_FIELDS,
    ),
    Family(
        types=("qwen3",),
        modules=_EMBEDDING + _TWO_NORMS + _ATTENTION + _HEAD_NORMS + _GATED,
        fields=_FIELDS,
    ),
    Family(
        types=("gemma2",),
        modules=_EMBEDDING + _FOUR_NORMS + _ATTENTION + _GATED,
        fields=_FIELDS,
        norm="rms_plus_one",
        scaled_embedding=True,
    ),
    Family(
        types=("gemma3_text",),
        modules=_EMBEDDING + _FOUR_NORMS + _ATTENTION + _HEAD_NORMS + _GATED,
        fields=_FIELDS,
        norm="rms_plus_one",
        scaled_embedding=True,
    ),
    Family(
        types=("phi3",),
        modules=_EMBEDDING
        + _TWO_NORMS
        + _GATED_FUSED
        + "model.layers.*.self_attn.qkv_proj                hidden -> "
        + "(group query head_dim) + (group head_dim) + (group value)"
        + """
model.layers.*.self_attn.o_proj                  (group query value) -> hidden
""",
        fields=_FIELDS,
        reads_config={"num_attention_heads": "group query"},
    ),
    Family(
        types=("glm",),
        modules=_EMBEDDING + _TWO_NORMS + _ATTENTION + _GATED_FUSED,
        fields=_FIELDS,
    ),
    Family(
        types=("gpt2",),
        modules="""
transformer.wte                                  vocab -> hidden
transformer.wpe                                  position -> hidden
transformer.h.*.ln_1                             hidden
transformer.h.*.attn.c_attn                      hidden -> (2 group head_dim) + (group value)
transformer.h.*.attn.c_proj                      (group value) -> hidden
transformer.h.*.ln_2                             hidden
transformer.h.*.mlp.c_fc                         hidden -> channel
transformer.h.*.mlp.c_proj                       channel -> hidden
transformer.ln_f                                 hidden
lm_head                                          hidden -> vocab
""",
        fields={**_MULTI_HEAD, "channel": "n_inner", "position": "max_position_embeddings"},
        norm="layer",
    ),
    Family(
        types=("gpt_neox",),
        modules="""
gpt_neox.embed_in                                vocab -> hidden
gpt_neox.layers.*.input_layernorm                hidden
gpt_neox.layers.*.post_attention_layernorm       hidden
gpt_neox.layers.*.attention.query_key_value      hidden -> (group 3 head_dim)
gpt_neox.layers.*.attention.dense                (group value) -> hidden
gpt_neox.layers.*.mlp.dense_h_to_4h              hidden -> channel
gpt_neox.layers.*.mlp.dense_4h_to_h              channel -> hidden
gpt_neox.final_layer_norm                        hidden
lm_head                                          hidden -> vocab
""",
        fields=_MULTI_HEAD,
        norm="layer",
    ),
    Family(
        types=("bloom",),
        modules="""
transformer.word_embeddings                      vocab -> hidden
transformer.word_embeddings_layernorm            hidden
transformer.h.*.input_layernorm                  hidden
transformer.h.*.self_attention.query_key_value   hidden -> (group 3 head_dim)
transformer.h.*.self_attention.dense             (group value) -> hidden
transformer.h.*.post_attention_layernorm         hidden
transformer.h.*.mlp.dense_h_to_4h                hidden -> channel
transformer.h.*.mlp.dense_4h_to_h                channel -> hidden
transformer.ln_f                                 hidden
lm_head                                          hidden -> vocab
""",
        fields={k: v for k, v in _MULTI_HEAD.items() if k != "channel"},
        norm="layer",
        alibi={},
    ),
    Family(
        types=("falcon",),
        modules=_FALCON + _FALCON_QKV + "(group (query + 1 + 1) head_dim)",
        fields={**_FALCON_FIELDS, "group": "num_kv_heads"},
        when={"new_decoder_architecture": True},
        norm="layer",
        alibi={"alibi": True},
    ),
    Family(
        types=("falcon",),
        modules=_FALCON + _FALCON_QKV + "(group (query + 1 + 1) head_dim)",
        fields=_FALCON_FIELDS,
        when={"new_decoder_architecture": False, "multi_query": True},
        constants={"group": 1},
        norm="layer",
        alibi={"alibi": True},
        one_group="multi_query",
    ),
    Family(
        types=("falcon",),
        modules=_FALCON + _FALCON_QKV + "(group 3 head_dim)",
        fields=_FALCON_FIELDS,
        when={"new_decoder_architecture": False, "multi_query": False},
        norm="layer",
        alibi={"alibi": True},
    ),
    Family(
        types=("opt",),
        modules=f"""{_OPT}
model.decoder.embed_tokens                       vocab -> embedding
model.decoder.project_in                         embedding -> hidden
model.decoder.project_out                        hidden -> embedding
lm_head                                          embedding -> vocab
""",
        fields={**_OPT_FIELDS, "embedding": "word_embed_proj_dim"},
        when={"factorised_embedding": True},
        norm="layer",
    ),
    Family(
        types=("opt",),
        modules=f"""{_OPT}
model.decoder.embed_tokens                       vocab -> hidden
lm_head                                          hidden -> vocab
""",
        fields={**_OPT_FIELDS, "(hidden)": "word_embed_proj_dim"},  # a second field for it
        when={"factorised_embedding": False},
        norm="layer",
    ),
)


def known_types() -> list[str]:
    """Every ``model_type`` in the table, sorted."""
    return sorted({name for family in FAMILIES for name in family.types})


def find_family(config: Any) -> Family:
    """Find a config's entry in the table.

    Args:
        config: A Hugging Face config, or one of our own exports (which names its base type).

    Raises:
        UserError: The table has no entry for it.
    """
    own = getattr(config, "lit_prune", None)
    model_type = own["base_model_type"] if isinstance(own, dict) else config.model_type
    for family in FAMILIES:
        if model_type in family.types and all(
            _trait(config, key) == value for key, value in family.when.items()
        ):
            return family
    raise UserError(
        f"expected a model of a known family ({', '.join(known_types())}), got model_type "
        f"{model_type!r}; to add it, write its modules into lit_prune/structure/families.py"
    )


def _trait(config: Any, key: str) -> Any:
    if key == "factorised_embedding":
        return config.word_embed_proj_dim != config.hidden_size
    return bool(getattr(config, key, None))
