"""What an axis' cut must be able to say, asked before anything is cut."""

from __future__ import annotations

from collections.abc import Sequence

from lit_prune.errors import UserError
from lit_prune.structure.families import Family
from lit_prune.structure.layout import Widths

#: Sizes that a config must hold when an axis is cut, each with what follows it else.
_HELD = {
    "channel": {"channel": "it is a multiple of hidden_size"},
    "group": {"head_dim": "it is hidden_size divided by num_attention_heads"},
    "query": {"head_dim": "it is hidden_size divided by num_attention_heads"},
    "value": {"value": "it is that of the keys"},
}


def require_axes(model_type: str, possible: Sequence[str], axes: Sequence[str]) -> None:
    """Refuse axes that a family has not.

    Args:
        model_type: The model's type.
        possible: The axes that it has.
        axes: What shall be cut.

    Raises:
        UserError: One of them is not possible.
    """
    for axis in axes:
        if axis not in possible:
            raise UserError(
                f"expected an axis that {model_type} can cut ({', '.join(possible)}), "
                f"got {axis!r}; choose another"
            )


def require_stock(model_type: str, family: Family, widths: Widths, axes: Sequence[str]) -> None:
    """Refuse axes whose cut the family's own config can't express.

    Args:
        model_type: The model's type.
        family: Its entry in the table.
        widths: Its present widths.
        axes: What shall be cut, the same number of units in every layer.

    Raises:
        UserError: The config has no field for a size that the cut sets, or the model has other
            widths in each layer already, or values that are narrower than its keys.
    """
    for axis in axes:
        for size, reason in _HELD.get(axis, {}).items():
            if size not in family.fields:
                raise UserError(
                    f"expected axes under --stock that the config of {model_type} can express, got "
                    f"{axis!r}, for which it would need a field for {size}: {reason}; leave out "
                    f"--stock or the axis"
                )
    head_dim = widths.shared["head_dim"]
    if narrow := [sizes["value"] for sizes in widths.layers if sizes["value"] != head_dim]:
        raise UserError(
            f"expected values as wide as keys under --stock, {head_dim} features a head, got "
            f"{narrow[0]}; leave out --stock or start from another model"
        )
    for axis in widths.layers[0] if widths.layers else ():
        found = sorted({sizes[axis] for sizes in widths.layers})
        if len(found) > 1:
            raise UserError(
                f"expected a model with the same {axis} width in every layer under --stock, got "
                f"{found[0]} to {found[-1]}; leave out --stock or start from another model"
            )
