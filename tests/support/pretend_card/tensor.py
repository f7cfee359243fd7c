"""A tensor that says it is on the card."""

import torch
from torch import Tensor

from . import card as cards
from .backend import DEVICE
from .card import Card

_data = Tensor.data  # PyTorch's own attribute, below the one of CardTensor


class CardTensor(Tensor):
    """A wrapper for C++ of the PrivateUse1 backend, whose Python attributes name the card's device.

    inner: the numbers on the CPU, or a shape on meta; its memory is the card's.
    """

    inner: Tensor
    card: Card

    @staticmethod
    def __new__(cls, inner: Tensor, card: Card):
        card.hold(inner)
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        made.inner, made.card = inner, card
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        from .dispatch import dispatch  # it makes tensors of this class

        return dispatch(func, types, args, kwargs or {})

    # What it says of itself

    device = property(lambda self: self.card.device)
    is_cuda = property(lambda self: self.card.kind == "cuda")
    is_mps = property(lambda self: self.card.kind == "mps")
    is_xpu = property(lambda self: self.card.kind == "xpu")
    is_cpu = property(lambda self: False)

    def get_device(self):
        return self.card.device.index

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def data_ptr(self):
        return self.inner.data_ptr()

    def __repr__(self, **_):
        return f"CardTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    # What PyTorch does below Python

    @property
    def data(self):
        return _data.__get__(self)

    @data.setter
    def data(self, value):
        if not isinstance(value, CardTensor):
            raise RuntimeError(f"pretended card: .data of a {self.device} tensor set to {value}")
        with torch.inference_mode(self.is_inference()):  # C++ wants both to be of one kind
            _data.__set__(self, CardTensor(value.inner, value.card))
        self.inner = value.inner

    def __deepcopy__(self, memo):
        made = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    # To other devices and back

    def to(self, *args, **kwargs):
        asked = read_to(*args, **kwargs)
        device = asked.pop("device", None)
        if device is not None and not self.card.is_named(device):
            return super().to(device=device, **asked)
        if device is not None:
            self.card.check(device if isinstance(device, torch.device) else torch.device(device))
        return super().to(**asked) if set(asked) - {"non_blocking"} else self

    def cuda(self, *_, **__):
        return self

    def cpu(self, *_, **__):
        return self.to("cpu")

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *_, **__):
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy "
            "the tensor to host memory first."
        )

    def pin_memory(self, *_):
        raise RuntimeError("only dense CPU tensors can be pinned")


def read_to(*args, **kwargs):
    """The arguments of Tensor.to in any of its spellings, by name; None is left out."""
    args = list(args)
    if args and isinstance(args[0], Tensor):
        kwargs["other"] = args.pop(0)
    elif args and not isinstance(args[0], torch.dtype):
        kwargs["device"] = args.pop(0)
    if args and (args[0] is None or isinstance(args[0], torch.dtype)):
        kwargs["dtype"] = args.pop(0)
    kwargs |= zip(("non_blocking", "copy"), args, strict=False)
    other = kwargs.pop("other", None)
    if other is not None:
        kwargs |= {"device": other.device, "dtype": other.dtype}
    return {name: value for name, value in kwargs.items() if value is not None}


def on_card(shape, dtype=torch.float32) -> CardTensor:
    """A tensor of this shape on the open card, its numbers not set."""
    card = cards.opened()
    assert card is not None
    return CardTensor(torch.empty(shape, dtype=dtype, device=card.home), card)
