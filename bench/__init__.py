"""Measurements of dsconv_cuda: `python -m bench` (speed), `python -m bench.demo` (training on real digits)."""
