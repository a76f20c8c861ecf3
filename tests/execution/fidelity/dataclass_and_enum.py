import dataclasses
import enum
import typing


@dataclasses.dataclass
class Item:
    name: str
    parent: "Item | None" = None


class Color(enum.Enum):
    RED = 1


print(Item("x"), Color.RED, typing.get_type_hints(Item))
