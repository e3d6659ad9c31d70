"""Work on a GPU as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch


# To capture work takes as long as some twenty plain passes of a small model: it waits until it has come as often.
TIMES_SEEN = 20


class CudaGraph:
    """
    Work on the GPU that was captured once and is replayed, on the same memory.

    Args:
        work (`Callable`): Launches it. It is called twice beforehand, for what PyTorch sets up at the first call.
        pool (`tuple`): The memory that graphs share which never run at once, `torch.cuda.graph_pool_handle()`.
    """

    def __init__(self, work: Callable[[], None], pool: Any):
        current, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(2):
                work()
        current.wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on: those that write files, say.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            work()

    def replay(self) -> None:
        """Does the work again."""
        self._graph.replay()


def new_pool() -> Any:
    """Returns the handle of memory for graphs that never run at once."""
    return torch.cuda.graph_pool_handle()
