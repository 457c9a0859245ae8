"""A value of any type that msgspec can read, made from the type alone: with something in every field and every collection."""

from __future__ import annotations

from typing import Any

from msgspec import inspect


def example(kind: Any) -> Any:
    """As plain builtins, as `msgspec.convert` takes it."""
    return _of(inspect.type_info(kind))


def _of(kind: inspect.Type, depth: int = 0) -> Any:
    match kind:
        case inspect.StructType():
            fields = [(field.encode_name, _of(field.type, depth + 1)) for field in kind.fields]
            if kind.array_like:
                return [*([kind.tag] if kind.tag is not None else []), *(value for _, value in fields)]
            return ({kind.tag_field: kind.tag} if kind.tag_field is not None else {}) | dict(fields)
        case inspect.DataclassType():
            return {field.encode_name: _of(field.type, depth + 1) for field in kind.fields}
        case inspect.UnionType():
            return _of(next(each for each in kind.types if not isinstance(each, inspect.NoneType)), depth + 1)
        case inspect.TupleType():
            return [_of(each, depth + 1) for each in kind.item_types]
        case inspect.ListType() | inspect.VarTupleType() | inspect.SetType():
            return [_of(kind.item_type, depth + 1)]
        case inspect.DictType():
            return {_of(kind.key_type, depth + 1): _of(kind.value_type, depth + 1)}
        case inspect.LiteralType():
            return kind.values[0]
        case inspect.EnumType():
            return next(iter(kind.cls)).value
        case inspect.BytesType():
            return b"ab"
    plain = {inspect.IntType: 3, inspect.FloatType: 1.5, inspect.StrType: "text", inspect.BoolType: True, inspect.NoneType: None}
    return plain.get(type(kind), {"any": [1, "two", 3.0]})
