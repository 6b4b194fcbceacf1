"""Device memory that its owner can do without for a while: storages give up their bytes and get them back, and every
view of them stays valid."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


class Offload:
    """Tensors whose memory is released and restored together.

    tensors: called at each release, since an optimizer makes its state late; several may share a storage.
    keep: the contents come back from host memory; otherwise they are zero afterwards.
    """

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]], *, keep: bool):
        self._tensors, self._keep = tensors, keep
        self._released: list[tuple[torch.UntypedStorage, int, torch.Tensor | None]] | None = None

    @property
    def is_released(self) -> bool:
        return self._released is not None

    def num_bytes(self) -> int:
        """On the device now."""
        return sum(storage.nbytes() for storage in self._storages())

    def release(self) -> None:
        assert not self.is_released, "released twice"
        self._released = []
        for storage in self._storages():
            size, copy = storage.nbytes(), None
            if self._keep:
                copy = torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                copy.copy_(_bytes(storage))
            storage.resize_(0)
            self._released.append((storage, size, copy))

    def restore(self) -> None:
        assert self._released is not None, "restored without a release"
        for storage, size, copy in self._released:
            storage.resize_(size)
            if copy is None:
                _bytes(storage).zero_()
            else:
                _bytes(storage).copy_(copy)
        self._released = None

    def _storages(self) -> list[torch.UntypedStorage]:
        found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in self._tensors()}
        return list(found.values())


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
