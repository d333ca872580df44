"""Copies from a device to the host on a stream of their own, through page-locked memory."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def moment(values: Tensor) -> torch.cuda.Event | None:
    """Mark the point in the device's work at which a tensor is complete; None where there is nothing to wait for."""
    return torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None


class Staging:
    """One page-locked buffer through which vectors leave the device, while other streams go on.

    A copy to ordinary memory goes through the driver's own buffer, at a fraction of the speed, and on the stream of
    whoever asks for it. The buffer costs as much host memory as the largest vector that has passed.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    def fetch(self, values: Float[Tensor, " D"], ready: torch.cuda.Event | None = None) -> Float[Tensor, " D"]:
        """Return a vector on the host: itself if it is there, else the buffer, which the next call overwrites.

        The calling thread waits for the copy, and lets other threads run. The vector must not change in the meantime.
        `ready` is from `moment`, where another thread than this one has made it.
        """
        if not values.is_cuda:
            return values.cpu()
        ready = ready or moment(values)
        assert ready is not None
        with torch.cuda.device(values.device):
            self._stream = self._stream or torch.cuda.Stream(values.device)
            if self._buffer is None or self._buffer.dtype != values.dtype or self._buffer.numel() < values.numel():
                self._buffer = torch.empty(values.numel(), dtype=values.dtype, pin_memory=True)
            target = self._buffer[: values.numel()]
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                target.copy_(values, non_blocking=True)
                done = self._stream.record_event()
        # The caller holds the vector until then: its memory cannot go to another tensor while it is being read.
        done.synchronize()
        return target
