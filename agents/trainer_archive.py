"""Trainer state from a file that nobody vouches for.

``torch.load(weights_only=True)`` runs no code that a file names, but a hundred bytes can make it
take gigabytes (a bytearray of any length), end the process (tuples nested deep enough, hashed as a
key) or unpack a compressed archive without end. So the archive and its instructions are read before
it is called: what training writes is a tree of dicts, lists, short tuples, numbers, text and dense
tensors, and nothing else passes.
"""

import io
import math
import pickletools
import zipfile

import torch
from torch import Tensor

_MOST_INSTRUCTIONS = 4 << 20  # bytes; training writes about 700 for each parameter
_DEEPEST = 50
_LONGEST_SHARED_TUPLE = 16

_ORDERED_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_NUMBERS = ["Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"]
_STORAGES = {f"torch {kind}Storage" for kind in _NUMBERS}


def read_trainer_state(content: bytes) -> dict:
    """Return the trainer state in the bytes of a ``.trainer.pt`` file, on the CPU.

    Raises:
        Exception: If it is damaged or holds anything else, of many kinds: ``ValueError`` for what
            is refused here, others where a reader stumbles.
    """
    _Follower().follow(_instructions(content))
    state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    if not isinstance(state, dict):
        raise ValueError("it is no dict")
    _check_tensors(state)
    return state


def _instructions(content: bytes) -> bytes:
    """Return the pickle in an archive whose members are as large as they say."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("a member is compressed, which torch.save never does")
        if sum(max(member.file_size, member.compress_size) for member in members) > len(content):
            raise ValueError("its members are larger than the file")
        pickles = [member for member in members if member.filename.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _MOST_INSTRUCTIONS:
            raise ValueError(f"it has {len(pickles)} pickles, or one far too large")
        return archive.read(pickles[0])


class _Container:
    """Stands for a dict or a list while a pickle is followed."""

    depth = 1


_PLAIN, _OBJECT, _MARK = "plain", "object", "mark"


class _Follower:
    """Follows what a pickle would do, with labels in place of values; raises at the first doubt.

    A tuple's label is the tuple of its items' labels; a global's label is its name.
    """

    def __init__(self) -> None:
        self.stack: list = []
        self.memo: dict[int, object] = {}

    def follow(self, pickle: bytes) -> None:
        """Follow all instructions of protocol 2 that training writes."""
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name not in _FOLLOW:
                raise ValueError(f"no trainer state needs the pickle instruction {opcode.name}")
            _FOLLOW[opcode.name](self, argument)

    def push_plain(self, _: object) -> None:
        self.stack.append(_PLAIN)

    def push_container(self, _: object) -> None:
        self.stack.append(_Container())

    def push_mark(self, _: object) -> None:
        self.stack.append(_MARK)

    def push_global(self, name: str) -> None:
        if name not in {_ORDERED_DICT, _TENSOR} | _STORAGES:
            raise ValueError(f"it names {name}, which no trainer state needs")
        self.stack.append(name)

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        """Use something again; shared containers could form a loop, or grow without end."""
        label = self.memo[index]
        if isinstance(label, _Container) or (
            isinstance(label, tuple) and (len(label) > _LONGEST_SHARED_TUPLE or _depth(label) > 1)
        ):
            raise ValueError("it uses a list, a dict or a nested tuple twice")
        self.stack.append(label)

    def pop_marked(self) -> list:
        """Take what lies above the last mark off the stack."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def push_tuple(self, items: list) -> None:
        label = tuple(items)
        if _depth(label) > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        self.stack.append(label)

    def push_tuple_of(self, size: int) -> None:
        items = self.stack[-size:]
        del self.stack[-size:]
        self.push_tuple(items)

    def fill(self, keys: list, values: list) -> None:
        """Put items into the list or dict on top of the stack."""
        container = self.stack[-1]
        # Other keys than text and numbers would be hashed, a tuple by recursion without a limit.
        if not isinstance(container, _Container) or any(key is not _PLAIN for key in keys):
            raise ValueError("it fills something other than a list or a dict with plain keys")
        container.depth = max(container.depth, 1 + max(map(_depth, values), default=0))
        if container.depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")

    def set_items(self, items: list) -> None:
        self.fill(items[::2], items[1::2])

    def call(self, _: object) -> None:
        function, arguments = self.stack[-2:]
        del self.stack[-2:]
        if function == _ORDERED_DICT and arguments == ():
            self.stack.append(_Container())
        elif function == _TENSOR and isinstance(arguments, tuple):
            self.stack.append(_OBJECT)
        else:
            raise ValueError("it calls something in a way that no trainer state needs")

    def fetch_storage(self, _: object) -> None:
        """Follow the reference to a tensor's storage: its kind among plain values."""
        label = self.stack.pop()
        others = (label[0], *label[2:]) if isinstance(label, tuple) and len(label) == 5 else ()
        if not others or label[1] not in _STORAGES or any(one is not _PLAIN for one in others):
            raise ValueError("it describes a tensor's storage in an unknown way")
        self.stack.append(_OBJECT)

    def build(self, _: object) -> None:
        """Set attributes, as an OrderedDict of weights has."""
        if not isinstance(self.stack.pop(), _Container) or not isinstance(
            self.stack[-1], _Container
        ):
            raise ValueError("it sets the attributes of something that is no dict")

    def ignore(self, _: object) -> None:
        """Follow nothing: the instruction changes neither stack nor memo."""


def _depth(label: object) -> int:
    """Return how deep a label's tuples, lists and dicts go; bounded, as each is when it is made."""
    if isinstance(label, tuple):
        return 1 + max(map(_depth, label), default=0)
    return label.depth if isinstance(label, _Container) else 0


_PUSH_PLAIN = "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE NONE NEWTRUE NEWFALSE"
_FOLLOW = {
    **dict.fromkeys(_PUSH_PLAIN.split(), _Follower.push_plain),
    "PROTO": _Follower.ignore,
    "STOP": _Follower.ignore,
    "EMPTY_DICT": _Follower.push_container,
    "EMPTY_LIST": _Follower.push_container,
    "EMPTY_TUPLE": lambda follower, _: follower.push_tuple([]),
    "GLOBAL": _Follower.push_global,
    "MARK": _Follower.push_mark,
    "BINPUT": _Follower.put,
    "LONG_BINPUT": _Follower.put,
    "BINGET": _Follower.get,
    "LONG_BINGET": _Follower.get,
    "TUPLE1": lambda follower, _: follower.push_tuple_of(1),
    "TUPLE2": lambda follower, _: follower.push_tuple_of(2),
    "TUPLE3": lambda follower, _: follower.push_tuple_of(3),
    "TUPLE": lambda follower, _: follower.push_tuple(follower.pop_marked()),
    "APPEND": lambda follower, _: follower.fill([], [follower.stack.pop()]),
    "APPENDS": lambda follower, _: follower.fill([], follower.pop_marked()),
    "SETITEM": lambda follower, _: follower.set_items(
        [follower.stack.pop(-2), follower.stack.pop()]
    ),
    "SETITEMS": lambda follower, _: follower.set_items(follower.pop_marked()),
    "REDUCE": _Follower.call,
    "BINPERSID": _Follower.fetch_storage,
    "BUILD": _Follower.build,
}


def _check_tensors(value: object) -> None:
    """Refuse tensors larger than their storage, which a copy would make real."""
    if isinstance(value, Tensor):
        if math.prod(value.shape) * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"a tensor of shape {tuple(value.shape)} has fewer values than that")
    elif isinstance(value, dict):
        for inner in value.values():
            _check_tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_tensors(inner)
