"""A GPU as the benchmark sees it: its clock, its memory, its graphs, and how fast it copies.

Everything that needs a GPU is here, behind the few methods of CudaDevice; the rest of the benchmark runs, and is
tested, without one.
"""

import contextlib
import statistics
import subprocess

import torch

COPY_BYTES = 1 << 28
COPY_ROUNDS = 20
FLUSH_L2S = 3  # the buffer that is written before each repeat, in sizes of the L2
WARM_UP_CALLS = 3


class NoGpu(RuntimeError):
    """There is no GPU to measure on; the message says what is missing."""


class CudaDevice:
    """The current GPU."""

    def __init__(self):
        if not torch.cuda.is_available():
            why = "this torch has no CUDA" if torch.version.cuda is None else "torch finds none (nvidia-smi tells more)"
            raise NoGpu(f"--device cuda needs a GPU, and {why}")
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.torch_device)
        self._flush = torch.empty(max(FLUSH_L2S * self._properties.L2_cache_size, 1 << 25), dtype=torch.uint8,
                                  device=self.torch_device)  # fmt: skip

    @property
    def name(self):
        return self._properties.name

    def describe(self):
        """What a report says of the machine beside what bench/environment.py does."""
        return {
            "gpu": self.name,
            "multiprocessors": self._properties.multi_processor_count,
            "capability": f"sm_{self._properties.major}{self._properties.minor}",
            "memory_bytes": self._properties.total_memory,
            "l2_bytes": self._properties.L2_cache_size,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }

    def planned_as(self):
        """What dsconv_cuda.plan() takes as its `arch`."""
        return str(self.torch_device)

    def seconds(self, call, repeats):
        """The median over `repeats` calls by the GPU's own clock, each after the L2 was emptied.

        While the GPU writes the buffer that does so, the host runs ahead and enqueues the call: what is timed is the
        GPU's work and not the host's, unless the host takes longer than that.
        """
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in pairs:
            self._flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median([begin.elapsed_time(end) / 1e3 for begin, end in pairs])

    def copy_bandwidth(self):
        """Bytes a second, read and written, of a copy much larger than the L2."""
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=self.torch_device)
        target = torch.empty_like(source)
        self.seconds(lambda: target.copy_(source), WARM_UP_CALLS)
        return 2 * COPY_BYTES / self.seconds(lambda: target.copy_(source), COPY_ROUNDS)

    def graph(self, call):
        """A function that replays `call` from a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()

        def replay():
            graph.replay()
            return results

        return replay

    def peak_bytes(self, call):
        """What a call allocates at its peak, its results included, beyond what was there before it."""
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = call()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before

    def out_of_memory(self):
        return torch.cuda.OutOfMemoryError

    def release(self):
        """Gives back what the calls of the last layer held."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def precision(name):
    """Float32 on the tensor cores (`tf32`) or not, for PyTorch and for the fused op, and cuDNN's search for its fastest
    algorithm."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = matmul.allow_tf32 = name == "tf32"
    cudnn.benchmark = True
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


def _driver():
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
